"""What a strict protocol is given on a model behind a defence at test time: one step more, made on the model without it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import arrays_of, edit_arrays, edit_json, put, zipped
from torch import Tensor
from torch.nn import functional as F

import dmlbench
from dmlbench.doubts.audit import examine
from dmlbench.doubts.evidence import last_resorts, white_steps
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.strict import record
from dmlbench.kinds.strict.search import attempt
from dmlbench.kinds.strict.transfer import NAME, Transfer, behind
from dmlbench.kinds.table import KINDS
from dmlbench.protocol import Step
from dmlbench.protocols import PROTOCOLS, _packaged, load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.run.subject import prepare
from dmlbench.run.units import Units, Work
from dmlbench.submission.validate import validate
from dmlbench.task import Options, Task
from dmlbench.threat import Threat

MODEL = "digits-smallcnn-triplet-none"
DEFENDED = f"defended:bits(3):{MODEL}"
TINY = """
name = "tiny"
version = "1"
kind = "strict"
title = "one short search"
queries = 64

[threat]
norm = "linf"

[grid]
8 = ["10/255", "20/255"]

[threshold]
attack = "WM"
optimizer = "cosine"
threat = {steps = 10, start = "random"}
parts = 2
octaves = 1

[[steps]]
name = "W1"
attack = "WM"
optimizer = "apgd"
threat = {steps = 12, start = "clean"}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(file):
    return evaluate(DEFENDED, "digits", read_protocol(file), device="cpu")


def nearest(e, gallery, labels, label, own):
    """The distances to the nearest entry of the class, own left out, and to the nearest of another, one after the other."""
    d = [(e - g).square().sum().clamp_min(1e-30).sqrt() for g in gallery]
    same = [d[i] for i in range(len(d)) if labels[i] == label and i != own]
    other = [d[i] for i in range(len(d)) if labels[i] != label]
    return min(same, key=Tensor.item), min(other, key=Tensor.item)


def test_a_step_against_a_plain_loop() -> None:
    """Signed steps on the network alone; after each the picture is rounded, embedded, and looked at."""
    data = dmlbench.load_dataset("digits")
    model = dmlbench.load_model(DEFENDED)
    subject = prepare(model, data, limit=10, device="cpu")
    subject = replace(subject, undefended=prepare(model.undefended(), data, limit=10, device="cpu"))
    network = dmlbench.load_model(MODEL).requires_grad_(False)

    def plain(x):
        return F.normalize(network.network(x), dim=1)[0]

    def rounded(x):
        return (x * 7).round() / 7

    pictures = data.images[data.gallery]
    smooth, coarse = plain_all(network, pictures), plain_all(network, rounded(pictures))
    labels, eps, stride, steps = data.labels[data.gallery], 16 / 255, 4 / 255, 6
    step = Transfer(name="t", attack="WM", optimizer="pgd", threat={})
    found = attempt(subject, step, Threat(eps=eps, step=stride, steps=steps), np.arange(10), 0)
    assert 0 < found.broken.sum() < 10
    for i, row in enumerate(subject.rows):
        own = int(np.flatnonzero(data.gallery == row)[0])
        clean = data.images[np.array([row])]
        x, looks, hit = clean.clone(), 0, None
        for turn in range(steps + 1):
            looks += 1
            with torch.no_grad():
                same, other = nearest(plain(rounded(x)), coarse, labels, data.labels[row], own)
            if (other - same).item() <= 0:
                hit = x.clone()
                break
            if turn == steps:
                break
            leaf = x.clone().requires_grad_(True)
            same, other = nearest(plain(leaf), smooth, labels, data.labels[row], own)
            (gradient,) = torch.autograd.grad(other - same, leaf)
            x = (clean + (x - stride * gradient.sign() - clean).clamp(-eps, eps)).clamp(0, 1)
        assert (hit is not None) == found.broken[i]
        if hit is not None:
            assert torch.allclose(found.images[i : i + 1], hit, atol=1e-6) and found.iteration[i] == looks
    assert found.gradients <= 10 * steps and found.values >= found.gradients


def plain_all(network, pictures):
    with torch.no_grad():
        return F.normalize(network.network(pictures), dim=1)


def test_the_model_decides_and_the_protocol_stays(file) -> None:
    def task(model, protocol="strict", **options):
        return Task.of(model, "digits", protocol, Options(**options))

    for name in ("strict", "strict-fast", "strict-l2", "strict@1"):
        official = load_protocol(name)
        made, plain = task(DEFENDED, name), task(MODEL, name)
        assert made.official == official == plain.rules and plain.undefended is None
        *own, last = made.rules.steps
        assert tuple(own) == official.steps and (last.name, type(last)) == (NAME, Transfer)
        first = official.steps[0]
        assert (last.attack, last.optimizer, last.threat) == (first.attack, first.optimizer, first.threat)
        assert behind(made.rules) is made.rules and made.undefended.front is None
        assert made.identity["protocol_sha256"] == official.sha256 and not made.partial
    for model, protocol, options in (
        (f"defended:bits(3,naive):{MODEL}", "strict", {}),
        (DEFENDED, "ers-digits", {}),
        (DEFENDED, "strict", {"attacks": ["WM@apgd"]}),
    ):
        assert task(model, protocol, **options).undefended is None
    taken = file.with_name("taken.toml")
    taken.write_text(TINY.replace('"W1"', f'"{NAME}"'), encoding="utf-8")
    with pytest.raises(UsageError, match="has a step 'transfer'"):
        task(DEFENDED, str(taken))


def test_r_at_1_is_never_above_the_one_without_it(whole, file, monkeypatch) -> None:
    monkeypatch.setitem(KINDS._entries, "strict", replace(record.STRICT, behind=lambda rules: rules))
    without = evaluate(DEFENDED, "digits", read_protocol(file), device="cpu")
    taken = 0
    for eps in ("10/255", "20/255"):
        name = f"strict@{eps}"
        assert (whole.arrays[f"{name}/value"] <= without.arrays[f"{name}/value"]).all()
        by = whole.arrays[f"{name}/broken_by"]
        taken += (hit := by == 3).sum()
        assert np.array_equal(by[~hit & (by != 1)], without.arrays[f"{name}/broken_by"][~hit & (by != 1)])
    ends = whole.arrays["smallest_eps/value"], without.arrays["smallest_eps/value"]
    right = ~np.isnan(ends[1])
    assert taken > 0 and (ends[0][right] <= ends[1][right]).all() and (ends[0][right] < ends[1][right]).any()
    steps = [[s["step"] for s in row["steps"]] for row in whole.extras["strict"]["curve"]]
    assert steps == [["W1", NAME]] * 2 and whole.extras["strict"]["codes"][NAME] == 3
    assert sum(row["steps"][1]["broken"] for row in whole.extras["strict"]["curve"]) == taken


class Stop(Exception):
    """A run is killed."""


class StopIn:
    """Ends a run once a search of this name has done a unit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, task: str, total: int) -> None:
        """Nothing yet."""

    def advance(self, task: str, count: int) -> None:
        if task == self.name:
            raise Stop


@pytest.mark.parametrize("where", [f"{NAME}@10/255", "smallest eps"])
def test_a_run_that_is_killed_in_it_is_resumed_to_the_same_bits(whole, file, tmp_path, where) -> None:
    rules, units = read_protocol(file), Units(tmp_path / "units")
    said = {"device": "cpu", "batch_size": 8}
    fresh = evaluate(DEFENDED, "digits", rules, **said)
    with pytest.raises(Stop):
        evaluate(DEFENDED, "digits", rules, work=Work(units), progress=StopIn(where), **said)
    again = evaluate(DEFENDED, "digits", rules, work=Work(units), resume=True, **said)
    for key, values in fresh.arrays.items():
        assert np.array_equal(values, again.arrays[key], equal_nan=True), key
    assert np.array_equal(fresh.arrays["strict@20/255/value"], whole.arrays["strict@20/255/value"])


def test_a_random_defence_is_looked_at_by_means_over_its_passes(file) -> None:
    e = evaluate(f"defended:resize-pad(0.8):{MODEL}", "digits", read_protocol(file), device="cpu", limit=6, eot=3)
    for row in e.extras["strict"]["curve"]:
        step = row["steps"][1]
        assert step["values"] >= 3 * step["gradients"] and step["gradients"] <= 12 * step["attacked"]


def test_the_audit_knows_it(whole, file) -> None:
    """What transfer breaks and the model's own gradients leave is what F4 asks for."""
    rules = behind(read_protocol(file))
    by = np.array([-1] * 50 + [2] * 40 + [3] * 10, dtype=np.int8)
    assert white_steps(rules) == 1
    assert {name: int(hit.sum()) for name, hit in last_resorts(rules, by)} == {
        "Square": 0, "transfer from the undefended model": 10,
    }  # fmt: skip
    full = behind(load_protocol("strict"))
    codes = np.array([-1, 0, 1, 2, 3, 4, 4, 5, 5, 5], dtype=np.int8)  # W1, RS, SQ, transfer
    assert {name.split()[0]: int(hit.sum()) for name, hit in last_resorts(full, codes)} == {"Square": 2, "transfer": 3}
    model, data = dmlbench.load_model(DEFENDED), dmlbench.load_dataset("digits")
    subject = prepare(model, data, limit=64, device="cpu")
    ends = {eps: whole.arrays[f"strict@{eps}/broken_by"].copy() for eps in ("10/255", "20/255")}
    ends["10/255"][np.flatnonzero(ends["10/255"] == -1)[:8]] = 3
    (found,) = [f for f in examine(subject, rules, ends, 0, 8) if f.check == "F4"]
    assert found.verdict != "pass" and "transfer from the undefended model at eps 10/255 breaks" in found.message


@pytest.fixture
def bundle(whole, file, tmp_path, monkeypatch, typed):
    """The files of a bundle, made as a user makes it, and what validates some."""
    monkeypatch.setitem(PROTOCOLS._entries, "tiny", file)
    _packaged.cache_clear()
    said = ["--model", DEFENDED, "--dataset", "digits", "--protocol", "tiny", "--device", "cpu"]
    assert NAME in typed("evaluate", *said, "--out", str(tmp_path / "run")).out
    typed("submit", "init", str(tmp_path / "run"), "--author", "A. Tester")
    typed("submit", "pack", str(tmp_path / "run"), "--out", str(tmp_path / "bundle"))
    names = [p for p in sorted((tmp_path / "bundle").rglob("*")) if p.is_file()]
    files = {p.relative_to(tmp_path / "bundle").as_posix(): p.read_bytes() for p in names}

    def check(files, level=0):
        return validate(zipped(files, tmp_path / "bundle.zip"), level, device="cpu", seed=0)

    yield files, check
    _packaged.cache_clear()


def test_such_a_run_is_submitted(bundle, tmp_path) -> None:
    files, check = bundle
    report = check(files, 3)
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3), report.problems
    assert "attacked 64 queries again" in report.notes[0]
    run = "run/evaluation.json"

    def refused(files, field, said, level=0):
        report = check(files, level)
        assert report.status == "refused"
        assert any(field in p.field and said in p.reason for p in report.problems), report.problems

    def silent(content):
        for row in content["extras"]["strict"]["curve"]:
            row["steps"].pop()

    refused(edit_json(files, run, silent), "extras.strict.curve", "has [1, 1] steps by eps, the protocol [2, 2]")
    for name, said in (
        (f"defended:bits(4):{MODEL}", "which stands for its defence too"),
        (f"defended:bits(3,naive):{MODEL}", "as if nobody knew its defence"),
        (f"defended:bitz(3):{MODEL}", "unknown wrapper 'bitz'"),
        (f"defended:bits:{MODEL}", "is not how a run writes that defence"),
        (MODEL, "the run was made with"),
    ):
        refused(edit_json(files, run, put(["model", "id"], name)), "", said)

    def unbroken(arrays):
        for eps in ("10/255", "20/255"):
            by, value = arrays[f"strict@{eps}/broken_by"], arrays[f"strict@{eps}/value"]
            value[by == 3], arrays[f"strict@{eps}/iteration"][by == 3], by[by == 3] = 100.0, 0, -1

    assert (arrays_of(files["run/per_query.npz"], tmp_path)["strict@10/255/broken_by"] == 3).any()
    refused(edit_arrays(files, "run/per_query.npz", tmp_path, unbroken), "strict", "")


def test_only_what_a_bundle_can_hold_is_submitted(whole, tmp_path, typed) -> None:
    from dmlbench.results import save

    for name, said in (
        (f"defended:bits(3,naive):{MODEL}", "leave 'naive' out"),
        (f"defended:bits(3):ensemble:{MODEL},{MODEL}", "no record says what is behind the defence"),
    ):
        e = whole.model_copy(update={"model": whole.model.model_copy(update={"id": name})})
        save(e.with_arrays(whole.arrays, whole.sample), tmp_path / "run")
        done = typed("submit", "init", str(tmp_path / "run"), code=2)
        assert said in done.err and done.err.strip().count("\n") == 0


def test_the_plan_has_it(file, run, brief_plan) -> None:
    said = ["--dataset", "digits", "--protocol", str(file), "--limit", "8", "--plan", "--json"]
    rows = {row["id"]: row for row in run("evaluate", "--model", DEFENDED, *said).json}
    assert rows["transfer@10/255"]["gradients"] == 8 * 12 and rows["transfer@10/255"]["at_most"]
    assert rows["transfer@10/255"]["values"] > rows["W1@10/255"]["values"] + 8 * 12
    assert {"embeddings without the defence", "smallest eps, transfer"} <= rows.keys()
    assert not any("transfer" in row["id"] for row in run("evaluate", "--model", MODEL, *said).json)


def test_steps_of_files_are_the_models_own() -> None:
    assert not any(isinstance(step, Transfer) for step in load_protocol("strict").steps)
    assert Transfer.of(Step(name="a", attack="WM", optimizer="pgd", aims=1, rounds=3), "b").rounds == 1
    assert json.loads(load_protocol("strict").model_dump_json())["steps"][0].keys() == set(Step.model_fields)

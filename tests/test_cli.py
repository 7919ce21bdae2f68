"""The command as a user types it: what it prints, what it writes, and how it fails."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dmlbench.checkpoints import PACKAGE, checkpoint, checkpoints, sha256_of
from dmlbench.results import load

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory):
    """One full evaluation of the default model, shared by the tests that read it."""
    import subprocess
    import sys

    from conftest import ROOT

    import dmlbench

    folder = tmp_path_factory.mktemp("first")
    env = {**os.environ, "COLUMNS": "120"}
    if Path(dmlbench.__file__).is_relative_to(ROOT):
        env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "dmlbench", "evaluate", "--model", DEFAULT, "--out", "run", "--csv", "board.csv"],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_table_shows_every_part_and_ers(first_run) -> None:
    folder, out = first_run
    for part in ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT"):
        assert any(line.startswith(part) and ("↑" in line or "↓" in line) for line in out.splitlines()), part
    e = load(folder / "run")
    assert f"ERS {e.ers:.1f}" in out and f"{e.ers_interval[0]:.1f} – {e.ers_interval[1]:.1f}" in out
    assert e.partial == () and e.environment.argv[:2] == ("dmlbench", "evaluate") and e.model.weights_sha256


def test_the_csv_has_the_row_and_a_second_run_replaces_it(first_run, typed) -> None:
    folder, _ = first_run
    import pandas as pd

    before = pd.read_csv(folder / "board.csv")
    assert len(before) == 1
    assert float(before["ers"].iloc[0]) == pytest.approx(load(folder / "run").ers, abs=0.01)
    refused = typed("evaluate", "--model", DEFAULT, "--limit", "9", "--csv", folder / "board.csv", code=4)
    assert "partial" in refused.err
    pd.testing.assert_frame_equal(pd.read_csv(folder / "board.csv"), before)


def test_json_is_the_record(typed) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--limit", "16", "--attacks", "GTM,CA−", "--json")
    record = done.json
    assert record["ers"] is None and record["partial"] == ["--limit 16", "--attacks GTM,CA-"]
    assert [m["component"] for m in record["measurements"]] == ["GTM", "CA-"]
    assert record["protocol"]["name"] == "ers-digits" and len(record["protocol"]["sha256"]) == 64


def test_a_partial_table_never_shows_an_ers(typed) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--limit", "16", "--attacks", "GTM")
    assert "ERS –" in done.out and "partial" in done.out
    limited = typed("evaluate", "--model", DEFAULT, "--limit", "16")
    assert "(partial: --limit 16)" in limited.out


def test_plan_does_nothing_but_plan(typed, brief_plan, tmp_path: Path) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--plan", "--json", "--out", "nowhere")
    plan = done.json
    rows = plan if isinstance(plan, list) else plan["searches"]
    assert {"ES:D ES:R", "GTT"} <= {row["id"] for row in rows}
    assert not (tmp_path / "nowhere").exists()
    assert rows[0]["id"] == "clean metrics" and rows[-1]["id"] == "total"
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert rows[-1]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows[:-1]), abs=0.1)
    assert rows[-1]["gradients"] == (8 + 2) * 32 * 896  # nine searches, ES from two starts
    for row in rows:
        low, high = row["range"]
        assert (
            not row["at_most"] and low - 0.15 <= row["seconds"] / 1.2 and row["seconds"] * 1.2 <= high + 0.15
        )  # rounded


def test_a_plan_takes_every_look_and_all_images_into_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow every other look: the mean counts, and the range holds both; no image leaves a search."""
    import torch

    from dmlbench import plan
    from dmlbench.datasets import load_dataset
    from dmlbench.models import load_model
    from dmlbench.threat import Threat

    on = plan.stage(load_model(DEFAULT), load_dataset("digits"), torch.device("cpu"), 6)
    sizes: list[int] = []
    clock = iter(range(10_000))

    def slow_at_times(call, device) -> float:
        before = len(steps)
        call()
        return (len(steps) - before) * (0.1, 0.3)[next(clock) % 4 // 2]

    steps: list[int] = []
    real = plan.FullBatchLoss.__call__

    def counted(self, images):
        sizes.append(len(images))
        steps.append(1)
        return real(self, images)

    monkeypatch.setattr(plan.FullBatchLoss, "__call__", counted)
    monkeypatch.setattr(plan, "timed", slow_at_times)
    time, _ = on.cost(plan.ATTACKS["GTT"], "pgd", Threat(eps="40/255", step="4/255", steps=32))
    assert set(sizes) == {6}
    assert time.seconds == pytest.approx(32 * 0.2, rel=0.2) and time.low <= 32 * 0.11 and time.high >= 32 * 0.29
    one, two = plan.Time.of([1.0, 3.0]), plan.Time.of([2.0, 2.0])
    assert (one.seconds, one.low, one.high) == (2.0, 1.0, 3.0)
    assert (two.low, two.high) == pytest.approx((2 / plan.SPREAD, 2 * plan.SPREAD))


@pytest.mark.parametrize("protocol", ["universal", "poison"])
def test_a_plan_times_as_many_images_at_a_time_as_the_run(
    monkeypatch: pytest.MonkeyPatch, brief_plan, protocol: str
) -> None:
    """A pass of few images costs more for each of them than one of many."""
    import torch

    from dmlbench import evaluate, plan
    from dmlbench.datasets import load_dataset
    from dmlbench.models import load_model
    from dmlbench.protocols import load_protocol
    from dmlbench.task import Options, Task

    searched: list[int] = []

    class Watched(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.requires_grad:
                searched.append(len(x))
            return self.network(x)

    model, data, rules = load_model(DEFAULT), load_dataset("digits"), load_protocol(protocol)
    model.network, options = Watched(model.network), Options(limit=256, device="cpu")
    rules = rules.model_copy(update={"threat": {**rules.threat, "steps": 5}})
    plan.plan_of(Task.of(model, data, rules, options))
    planned = set(searched)
    searched.clear()
    evaluate(model, data, rules, options)
    assert planned and planned <= set(searched)


def test_a_plan_times_what_every_protocol_runs() -> None:
    from dmlbench.datasets import load_dataset
    from dmlbench.models import load_model
    from dmlbench.plan import _jobs
    from dmlbench.protocols import PROTOCOLS
    from dmlbench.task import Options, Task

    model, data = load_model(DEFAULT), load_dataset("digits")
    for name in PROTOCOLS:
        jobs = list(_jobs(Task.of(model, data, name, Options(device="cpu"))))
        assert sum(sum(job.passes) for job in jobs) > 0, name


def test_the_least_that_a_plan_expects_at_one_eps_is_what_halving_asks_about() -> None:
    """Every eps of the ladder is the smallest of some query, so that all are asked about, each with the fewest queries."""
    import numpy as np

    from dmlbench.kinds.hunting import Field
    from dmlbench.kinds.smallest import between, ladder, together
    from dmlbench.protocols import load_protocol

    class Everyone(Field):
        def over(self, name, unit, selected, search):
            at = np.flatnonzero(selected)
            return [(at, search(at))]

    rule = load_protocol("strict").threshold
    assert rule is not None
    radii = [5 / 255, 10 / 255, 20 / 255, 40 / 255]
    steps, places = ladder(radii, rule)
    true = np.repeat(steps, 4)
    sizes: list[int] = []

    def search(eps, at):
        sizes.append(len(at))
        return {
            "broken": true[at] <= eps * (1 + 1e-9),
            **{key: np.zeros(1) for key in ("gradients", "values", "nonfinite", "seconds")},
        }

    found, _ = between(
        object.__new__(Everyone), "smallest", (steps, places), true <= np.array(radii)[:, None] * (1 + 1e-9), search
    )
    assert np.allclose(found, true)
    least = together(rule, len(radii), len(true))
    assert least / 1.5 <= np.mean(sizes) <= least * 1.5


def test_a_plan_counts_averaged_passes_and_times_the_surrogate(typed, brief_plan) -> None:
    asked = [
        "evaluate",
        "--model",
        DEFAULT,
        "--plan",
        "--json",
        "--limit",
        "16",
        "--attacks",
        "GTM@fgsm,GTM@square,GTM@nes",
    ]
    plain = {row["id"]: row for row in typed(*asked).json}
    assert [plain[f"GTM@{o}"]["gradients"] for o in ("fgsm", "square", "nes")] == [16, 0, 0]
    assert [plain[f"GTM@{o}"]["values"] for o in ("fgsm", "square", "nes")] == [0, 16 * 1000, 16 * 3200]
    averaged = {row["id"]: row for row in typed(*asked, "--eot", "3").json}
    for key in ("gradients", "values"):
        assert averaged["total"][key] == 3 * plain["total"][key] > 0
    transfer = {row["id"]: row for row in typed(*asked, "--surrogate", "digits-smallcnn-triplet-act").json}
    assert transfer["surrogate's embeddings"]["queries"] == 896
    assert transfer["total"]["gradients"] == plain["total"]["gradients"]
    refused = ["evaluate", "--model", DEFAULT, "--protocol", "strict", "--surrogate", DEFAULT]
    plan, run = (typed(*refused, *more, code=2).err.strip() for more in (["--plan"], []))
    assert plan == run  # but for the line that older versions of rich leave where a bar was
    assert "unknown model" in typed(*asked, "--surrogate", "none-such", code=2).err


def test_a_plan_crafts_on_the_surrogate_and_reads_on_the_model() -> None:
    """Its network is the one that the gradients go through."""
    import torch

    from dmlbench.datasets import load_dataset
    from dmlbench.models import load_model
    from dmlbench.plan import plan_of
    from dmlbench.protocols import load_protocol
    from dmlbench.task import Options, Task

    seen: dict[str, list[bool]] = {"model": [], "surrogate": []}

    class Watched(torch.nn.Module):
        def __init__(self, network: torch.nn.Module, side: str) -> None:
            super().__init__()
            self.network, self.side = network, side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen[self.side].append(x.requires_grad)
            return self.network(x)

    sides = {}
    for side, name in (("model", DEFAULT), ("surrogate", "digits-smallcnn-triplet-act")):
        sides[side] = load_model(name)
        sides[side].network = Watched(sides[side].network, side)

    data, rules = load_dataset("digits"), load_protocol("ers-digits")
    options = Options(attacks=["GTM"], limit=8, surrogate=sides["surrogate"], device="cpu")
    plan_of(Task.of(sides["model"], data, rules, options))
    assert any(seen["surrogate"]) and seen["model"] and not any(seen["model"])


@pytest.mark.parametrize("kind", ["models", "datasets", "attacks", "protocols"])
def test_lists_and_shows(typed, kind: str) -> None:
    items = typed(kind, "list", "--json").json
    assert items and all("id" in item for item in items)
    first = items[0]["id"]
    assert first in typed(kind, "list").out
    assert typed(kind, "show", first, "--json").json["id"] == first
    wrong = typed(kind, "show", first[:-1] + "~", code=2)
    assert "unknown" in wrong.err and wrong.err.count("\n") == 1


def test_help_has_an_example(typed) -> None:
    from dmlbench.cli import VERBS

    for verb in VERBS:
        assert "dmlbench" in typed(verb, "--help").out and "xample" in typed(verb, "--help").out, verb


WITHOUT_JSON = {"schema": "prints a JSON Schema already"}


def verbs(command, path=()):
    """Every command that does something, by the words that call it."""
    import click

    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        yield from verbs(command.get_command(ctx, name), (*path, name))


def test_every_verb_has_json_and_an_example(typed) -> None:
    from dmlbench.cli import cli

    found = dict(verbs(cli))
    assert len(found) >= 25
    for words, command in found.items():
        options = {name for parameter in command.params for name in parameter.opts}
        assert ("--json" in options) != (" ".join(words) in WITHOUT_JSON), words
        shown = typed(*words, "--help").out
        assert "Example" in shown and f"dmlbench {' '.join(words)}" in shown.split("Example", 1)[1], words


def test_what_register_report_and_the_page_say_to_programs(typed, tmp_path: Path) -> None:
    entry = checkpoint(DEFAULT)
    done = tmp_path / "run"
    done.mkdir()
    shutil.copy(PACKAGE / "weights" / entry.files[0].path, done / "last.safetensors")
    (done / "checkpoint.json").write_text(json.dumps({"mine": entry.model_dump(mode="json")}))
    (tmp_path / "reg.json").write_text('{"schema_version": 1, "checkpoints": {}}')
    said = typed("register", "run", "--registry", "reg.json", "--weights", "w", "--json")
    assert f"--url '{tmp_path}/w/{{name}}'" in said.err.replace("\n", " "), "how the weights in this folder are found"
    assert said.json == {
        "registry": "reg.json",
        "registered": [{"id": "mine", "run": "run", "weights": "w/mine.safetensors"}],
    }
    assert (tmp_path / "w/mine.safetensors").is_file()

    typed("evaluate", "--model", DEFAULT, "--limit", "8", "--attacks", "GTM", "--out", "result")
    page = typed("report", "result", "--json").json
    assert page == {
        "report": "result/report.html",
        "bytes": (tmp_path / "result/report.html").stat().st_size,
        "runs": [{"name": "result", "folder": "result"}],
    }

    text = typed("protocols", "docs", "--json").json["page"]
    wrote = typed("protocols", "docs", "--out", "page.md", "--json").json
    assert wrote == {"out": "page.md", "bytes": len(text.encode())} and (tmp_path / "page.md").read_text() == text
    assert typed("protocols", "docs", "--out", "page.md", "--check", "--json").json["up_to_date"] is True
    (tmp_path / "page.md").write_text("old")
    assert typed("protocols", "docs", "--out", "page.md", "--check", "--json", code=3).json["up_to_date"] is False


BAD = [
    (["evaluate", "--model", "digits-smallcnn-triplet-hm-lga-isc"], 2, f"did you mean '{DEFAULT}'"),
    (["evaluate", "--model", DEFAULT, "--protocol", "ers-digit"], 2, "did you mean 'ers-digits'"),
    (["evaluate", "--model", DEFAULT, "--attacks", "QA_+"], 2, "did you mean 'QA+'"),
    (["evaluate", "--model", DEFAULT, "--dataset", "digit"], 2, "did you mean 'digits'"),
    (["evaluate", "--model", DEFAULT, "--device", "tpu"], 2, "device 'tpu'"),
    (["evaluate", "--model", DEFAULT, "--batch-size", "0"], 2, "auto"),
    (["evaluate", "--model", DEFAULT, "--limit", "-3"], 2, "limit"),
    (["evaluate", "--model", DEFAULT, "--seed", "-1"], 2, "--seed -1 must be from 0 to"),
    (["evaluate", "--model", DEFAULT, "--seed", f"{1 << 63}"], 2, "must be from 0 to"),
    (["evaluate", "--model", DEFAULT, "--out", "/proc/nowhere"], 4, "/proc/nowhere cannot be written"),
    (["evaluate", "--model", DEFAULT, "--protocol", "gone.toml"], 4, "gone.toml"),
    (["evaluate", "--model", DEFAULT, "--pairs", "gone.txt"], 4, "gone.txt"),
    (["evaluate", "--model", DEFAULT, "--protocol", "poison", "--eot", "3"], 2, "--eot does nothing"),
    (["evaluate", "--model", DEFAULT, "--protocol", "corruptions", "--eot", "3"], 2, "--eot does nothing"),
    (["models", "list", "--trained-on", "digit"], 2, "did you mean 'digits'"),
    (["evaluate"], 2, "--model"),
    (["evalaute"], 2, "did you mean 'evaluate'"),
]


@pytest.mark.parametrize(("args", "code", "words"), BAD, ids=[" ".join(b[0][-2:]) for b in BAD])
def test_bad_input_is_one_line_and_an_exit_code(typed, args: list[str], code: int, words: str) -> None:
    done = typed(*args, code=code)
    assert words in done.err and done.err.strip().count("\n") == 0 and done.out == ""


def test_cuda_where_there_is_none(typed) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "0 CUDA devices" in typed("evaluate", "--model", DEFAULT, "--device", "cuda", code=2).err


def test_debug_shows_the_traceback(run) -> None:
    import subprocess  # the fixture refuses tracebacks, which are asked for here
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "dmlbench", "--debug", "attacks", "show", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("one\n  two"), "TypeError: one two; please report it"),
        (KeyError("key"), "KeyError: 'key'; "),
        (AssertionError(), "AssertionError; "),
    ],
)
def test_a_defect_is_one_line_and_its_own_code(typed, monkeypatch, error: Exception, said: str) -> None:
    from dmlbench.cli import main, protocols

    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(protocols, "load_protocol", broken)
    done = typed("protocols", "show", "ers-28", code=70)
    assert done.err.startswith(f"Error: internal error: {said}") and "--debug" in done.err
    assert done.err.count("\n") == 1 and done.out == ""
    with pytest.raises(type(error)):
        main(["protocols", "show", "ers-28", "--debug"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(7), 7)])
def test_what_is_no_defect_keeps_its_code(typed, monkeypatch, error: BaseException, code: int) -> None:
    from dmlbench.cli import protocols

    def stopped(name: str) -> None:
        raise error

    monkeypatch.setattr(protocols, "load_protocol", stopped)
    assert "internal" not in typed("protocols", "show", "ers-28", code=code).err


@pytest.fixture
def altered(tmp_path: Path):
    """A registry whose default model has a weights file that was tampered with."""

    def make(change) -> dict[str, str]:
        entry = checkpoint(DEFAULT).model_dump(mode="json")
        path = tmp_path / "weights.safetensors"
        shutil.copy(PACKAGE / "weights" / entry["files"][0]["path"], path)
        entry["files"][0]["path"] = str(path)
        change(path, entry)
        registry = tmp_path / "registry.json"
        registry.write_text(json.dumps({"schema_version": 1, "checkpoints": {DEFAULT: entry}}))
        return {"DMLBENCH_CHECKPOINTS": str(registry)}

    return make


def restate(path: Path, entry: dict) -> None:
    entry["files"][0] |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _missing(path: Path, entry: dict) -> None:
    path.unlink()


def _truncated(path: Path, entry: dict) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _truncated_and_restated(path: Path, entry: dict) -> None:
    _truncated(path, entry)
    restate(path, entry)


def _changed(path: Path, entry: dict) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _other_architecture(path: Path, entry: dict) -> None:
    save_file({"conv.weight": np.zeros((3, 3), np.float32)}, path)
    restate(path, entry)


def _other_weights(path: Path, entry: dict) -> None:
    save_file({k: 1.1 * v for k, v in load_file(path).items()}, path)
    restate(path, entry)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_missing, "does not exist"),
        (_truncated, "truncated"),
        (_truncated_and_restated, "not a readable safetensors file"),
        (_changed, "sha256"),
        (_other_architecture, "does not fit the architecture"),
        (_other_weights, "probe"),
    ],
)
def test_weights_that_are_not_what_they_claim(typed, altered, change, words: str) -> None:
    done = typed("evaluate", "--model", DEFAULT, env=altered(change), code=4)
    assert words in done.err and done.err.strip().count("\n") == 0


def test_the_shipped_digits_models_keep_the_order_of_their_defences() -> None:
    import dmlbench

    order = ("digits-smallcnn-triplet-none", "digits-smallcnn-triplet-act", DEFAULT)
    ers = [dmlbench.evaluate(name, limit=100).ers for name in order]
    assert ers[0] + 5 < ers[1] < ers[2] - 5


def test_the_package_holds_the_weights_of_the_models_on_digits_alone_and_they_are_small() -> None:
    named = {f.path: c.dataset.name for c in checkpoints().values() for f in c.files if f.path}
    assert set(named.values()) == {"digits"} and {p.name for p in (PACKAGE / "weights").iterdir()} == set(named)
    assert all(p.stat().st_size <= 500_000 for p in (PACKAGE / "weights").iterdir())


PLUGIN = """
from dmlbench.attacks import ATTACKS, Attack
from dmlbench.objectives import OBJECTIVES

OBJECTIVES.add("to_origin", lambda e, scene: e.square().sum(1) + (e * scene.clean).sum(1))
ATTACKS.add("turn", Attack("turn round", "to_origin", "", ("recall_at_1",), "a test"))
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another package on the path, whose module, named by an entry point, adds the attack "turn"."""
    from dmlbench import attacks
    from dmlbench.objectives import OBJECTIVES
    from dmlbench.registry import PLUGINS

    def make(code: str) -> None:
        info = tmp_path / "turning-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: turning\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[dmlbench.plugins]\nturn = turning\n")
        (tmp_path / "turning.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "turning", raising=False)
        PLUGINS.forget()

    yield make
    PLUGINS.forget()
    attacks.ATTACKS._entries.pop("turn", None)
    OBJECTIVES._entries.pop("to_origin", None)
    sys.modules.pop("turning", None)


def test_another_packages_attack_is_listed_and_runs(typed, installed) -> None:
    installed(PLUGIN)
    done = typed("evaluate", "--model", DEFAULT, "--limit", "16", "--attacks", "turn@pgd", "--json")
    (part,) = done.json["measurements"]
    assert part["component"] == "turn@pgd" and part["value"] < done.json["benign"]["recall_at_1"]
    assert "turn" in [a["id"] for a in typed("attacks", "list", "--json").json]


@pytest.mark.parametrize(
    ("code", "words"),
    [("import nowhere", "No module named 'nowhere'"), ("raise SystemExit('no\\nway')", "SystemExit: no way")],
)
def test_another_packages_broken_attack_is_named(typed, installed, code: str, words: str) -> None:
    installed(code)
    done = typed("evaluate", "--model", DEFAULT, "--attacks", "turn@pgd", code=4)
    assert "'turn'" in done.err and words in done.err and done.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'name = "\xff"', "codec"),
        (b"name = ", "Invalid value"),
        (b'[[steps]]\nname = "W1"', "Field required"),
    ],
)
def test_a_protocol_file_that_cannot_be_read(typed, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    done = typed("evaluate", "--model", DEFAULT, "--protocol", "mine.toml", code=4)
    assert words in done.err and done.err.strip().count("\n") == 0


def test_an_output_without_arrows_changes_no_exit_code(run) -> None:
    env = {"PYTHONIOENCODING": "cp1252"}
    found = run("attacks", "show", "CA+", env=env)
    assert len(found.out) > 50
    assert run("models", "show", "→", env=env, code=2).err.startswith("Error: unknown model '>'")


@pytest.mark.parametrize("group", [(), ("leaderboard",), ("models",), ("submit",)])
def test_a_group_without_a_command_is_help(typed, group: tuple[str, ...]) -> None:
    done = typed(*group)
    assert done.out == typed(*group, "--help").out and "Commands:" in done.out and done.err == ""


def test_what_is_no_bundle_or_no_model_is_told_in_one_line(typed, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "mine.pth")
    (tmp_path / "net.py").write_text("raise RuntimeError('run')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluation.json").write_text("{}")
    for args, words in (
        (("validate", "mine.pth"), "submit pack"),
        (("validate", "run"), "submit pack"),
        (("evaluate", "--model", "net.py"), "python:net.py:FUNCTION"),
        (("evaluate", "--model", "gone.py"), "python:gone.py:FUNCTION"),
    ):
        done = typed(*args, code=2)
        assert words in done.err and done.err.count("\n") == 1 and done.out == ""


def test_the_packaged_board_has_a_site_anywhere_and_is_not_written(
    typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmlbench.board.build import board_folder

    board = tmp_path / "package"
    (board / "ers-digits").mkdir(parents=True)
    shutil.copy(board_folder() / "ers-digits" / "digits.csv", board / "ers-digits")
    monkeypatch.setattr("dmlbench.board.build.board_folder", lambda: board)
    before = {f: f.stat().st_mtime_ns for f in board.rglob("*")}
    said = typed("leaderboard", "build", "--site", "site", "--json").json
    assert said["board"] == str(board) and said["site"]["pages"] > 1
    assert (tmp_path / "site/index.html").is_file() and not (tmp_path / "leaderboard").exists()
    assert {f: f.stat().st_mtime_ns for f in board.rglob("*")} == before
    typed("leaderboard", "build", code=2)  # without a site there is nothing to do here


def test_a_person_is_told_what_to_do_next_and_a_log_is_not(typed, monkeypatch) -> None:
    quick = ("evaluate", "--model", DEFAULT, "--limit", "8", "--attacks", "GTM")
    assert "next:" not in typed(*quick).err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "--out FOLDER" in typed(*quick).err
    assert "dmlbench report 'my run'" in typed(*quick, "--out", "my run").err

"""Threats of a deployment: both sides perturbed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import weights_of

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.checkpoints import checkpoints
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.base import Kept, Stated
from dmlbench.kinds.sides import search as sides
from dmlbench.kinds.table import KINDS, numbers_of
from dmlbench.protocol import PROTOCOLS, load_protocol, read_protocol
from dmlbench.results import save
from dmlbench.run.subject import prepare
from dmlbench.run.units import Units, Work
from dmlbench.submission.pack import draft, pack, write_folder
from dmlbench.submission.validate import validate

MODEL = "digits-smallcnn-triplet-hm-lga-ics"
NAMES = ("sides",)
QUICK = {"sides": ({"steps": 4}, {"candidates": 2})}


def rules(name, eps=("20/255",), **settings):
    """The packaged protocol with short searches."""
    found = load_protocol(name)
    threat, own = QUICK[name]
    return found.model_copy(
        update={
            "threat": {**found.threat, **threat},
            "settings": {**found.settings, **own, **settings},
            "grid": {"8": tuple(eps)},
        }
    )


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(MODEL)


@pytest.fixture(scope="module")
def digits():
    return dmlbench.load_dataset("digits")


@pytest.fixture(scope="module")
def done(model, digits):
    """A run of each kind on few queries, by name."""
    return {name: evaluate(model, digits, rules(name, ("10/255", "20/255")), limit=32, device="cpu") for name in NAMES}


def stated(run, name, eps=("10/255", "20/255")):
    rule = rules(name, eps)
    return Stated(run, rule, tuple(KINDS[name].components(rule, (1, 8, 8))))


def kept(model, digits, run):
    subject = prepare(model, digits, limit=32, device="cpu")
    at = np.flatnonzero(np.isin(subject.rows, run.sample["rows"]))
    return Kept(subject, at, subject.images(0, 32)[torch.from_numpy(at)])


# --- every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_says_comes_out_of_its_arrays_again(model, digits, done, name) -> None:
    run, kind = done[name], KINDS[name]
    whole = stated(run, name)
    assert not list(kind.outcome_problems(whole)) and not list(kind.number_problems(whole))
    assert not list(kind.replay(whole, kept(model, digits, run)))
    kind.form.model_validate(run.extras[name])
    for key, (wanted, columns) in kind.arrays(whole.rules, whole.parts).items():
        assert run.arrays[key].dtype.kind == wanted and run.arrays[key].shape == (
            (32,) if columns == 1 else (32, columns)
        )
    found, row = numbers_of(run), from_evaluation(run)
    assert set(found) == {n.name for n in kind.numbers} and all(n.meaning for n in kind.numbers)
    first = next(n.name for n in kind.numbers if n.ranks)
    assert row.headline == pytest.approx(found[first], abs=1e-3) and row.interval[0] <= row.headline <= row.interval[1]
    for number, values in kind.by_query(run).items():
        assert np.nanmean(values) == pytest.approx(found[number])
    assert [point.eps for point in kind.curve(run).points] == ["0", "10/255", "20/255"]
    assert list(kind.tables(run.extras[name])) and "".join(kind.page(whole.rules))


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_number_or_outcome_is_told(done, name) -> None:
    run, kind = done[name], KINDS[name]
    part = stated(run, name).parts[-1].name
    flipped = run.model_copy().with_arrays(
        {**run.arrays, f"{part}/value": 100.0 - run.arrays[f"{part}/value"]}, run.sample
    )
    whole = stated(flipped, name)
    assert [*kind.outcome_problems(whole), *kind.number_problems(whole)]


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_to_the_same_bytes_in_other_batches(model, digits, done, tmp_path, name) -> None:
    """Half of the units are of a first process, the others of a second."""
    wanted, rule = done[name], rules(name, ("10/255", "20/255"))
    work = Work(units=Units(tmp_path / "units"))
    evaluate(model, digits, rule, limit=32, device="cpu", work=work, batch_size=5)
    for path in sorted((tmp_path / "units").glob("*.npz"))[::2]:
        path.unlink()
    again = evaluate(model, digits, rule, limit=32, device="cpu", work=work, resume=True)
    for key, values in wanted.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], values, err_msg=key)
    assert again.extras == wanted.extras


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_passes_up_to_the_rerun(model, digits, name, tmp_path, monkeypatch) -> None:
    """All queries, in a protocol whose searches are short."""
    rule = rules(name)
    monkeypatch.setitem(PROTOCOLS._entries, name, tmp_path / f"{name}.toml")
    text = PROTOCOLS_TEXT.format(name=name, steps=rule.threat["steps"], settings=settings_text(rule.settings))
    (tmp_path / f"{name}.toml").write_text(text)
    load_protocol.cache_clear()
    try:
        run = evaluate(model, digits, name, device="cpu")
        save(run, tmp_path / "run")
        (tmp_path / "w.safetensors").write_bytes(weights_of(MODEL))
        said = draft(tmp_path / "run", checkpoints()[MODEL]).replace("license: FILL-IN", "license: MIT")
        (tmp_path / "submission.yaml").write_text(said.replace("FILL-IN", "A. Tester"))
        files = pack(tmp_path / "run", tmp_path / "submission.yaml", tmp_path / "w.safetensors")
        write_folder(files, tmp_path / "bundle")
        report = validate(tmp_path / "bundle", 3, device="cpu", seed=0, share=0.0, least=8)
        assert report.status == "accepted" and report.passed == (0, 1, 2, 3), report.problems
    finally:
        load_protocol.cache_clear()
        shutil.rmtree(tmp_path / "run")


PROTOCOLS_TEXT = """name = "{name}"
version = "1"
kind = "{name}"
title = "short"
[threat]
steps = {steps}
[grid]
8 = ["20/255"]
[settings]
{settings}
"""


def settings_text(settings):
    return "\n".join(
        f"{key} = {list(v) if isinstance(v, tuple) else v!r}".replace("'", '"') for key, v in settings.items()
    )


HEAD = 'name = "x"\nversion = "1"\nkind = "{}"\ntitle = "t"\n[threat]\n{}[grid]\n8 = ["8/255"]\n[settings]\n{}'


@pytest.mark.parametrize(
    ("kind", "threat", "settings", "words"),
    [
        ("sides", "", "candidates = 0\n", "candidates"),
        ("sides", "", "candidate = 1\n", "candidate"),
        ("sides", 'norm = "l2"\n', "", "linf alone"),
        ("sides", "eot = 2\n", "", "eot does nothing"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, kind, threat, settings, words) -> None:
    (tmp_path / "mine.toml").write_text(HEAD.format(kind, threat, settings))
    with pytest.raises(DataError) as error:
        read_protocol(tmp_path / "mine.toml")
    assert words in str(error.value) and "\n" not in str(error.value)


# --- both sides ----------------------------------------------------------------------------------------


def plain_right(own, planted, gallery, labels, row, label, place):
    """Is a positive strictly nearer than every negative, the entry at ``place`` being ``planted``? Loops, in float64."""
    near, far = np.inf, np.inf
    for j, entry in enumerate(gallery):
        if j == row:
            continue
        d = np.sqrt(((own - (planted if j == place and planted is not None else entry)) ** 2).sum())
        near, far = (min(near, d), far) if labels[j] == label else (near, min(far, d))
    return 100.0 * (near < far)


def test_the_stored_pictures_are_read_as_loops_read_them(model, digits, done) -> None:
    run = done["sides"]
    every = kept(model, digits, run)
    scene, dataset = every.subject.scene, digits
    gallery, labels = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.numpy()
    for part in ("gallery", "query", "both"):
        name = f"{part}@20/255"
        with torch.no_grad():
            asks = model(torch.from_numpy(run.sample[f"{name}/query"])).double().numpy()
            plants = model(torch.from_numpy(run.sample[f"{name}/candidate"])).double().numpy()
        for i, at in enumerate(every.positions):
            row = run.arrays[f"{name}/candidate"][at]
            place = int(np.flatnonzero(dataset.gallery == row)[0])
            assert dataset.labels[row] != dataset.labels[every.subject.rows[at]]
            changed = plants[i] if part != "query" else None
            right = plain_right(asks[i], changed, gallery, labels, int(scene.row[at]), int(scene.labels[at]), place)
            assert run.arrays[f"{name}/value"][at] == right
            moved = [np.abs(run.sample[f"{name}/{w}"][i] - dataset.images[np.array([r])][0].numpy()).max()
                     for w, r in (("query", every.subject.rows[at]), ("candidate", row))]  # fmt: skip
            assert max(moved) <= 20 / 255 + 1e-6
            assert (part != "gallery" or moved[0] == 0) and (part != "query" or moved[1] == 0)


def test_a_ball_of_nothing_breaks_nothing_that_is_right(model, digits) -> None:
    subject = prepare(model, digits, limit=24, device="cpu")
    rule = rules("sides")
    aims, nobody = sides.candidates(subject, rule), np.zeros(0, dtype=np.int64)
    threat = replace(rule.threat_at("1/255"), eps=0)
    clean = right_when_clean(subject)
    for part in sides.MOVED:
        made = sides.attempt(subject, aims, part, threat, 0, nobody, np.arange(24))
        np.testing.assert_array_equal(~made["broken"], clean)


def right_when_clean(subject):
    d = subject.scene.ranked(subject.scene.clean)
    return (subject.scene.gallery.labels[d.argmin(1)] == subject.scene.labels).numpy()


def test_both_sides_can_do_what_one_can(done) -> None:
    rows = done["sides"].extras["sides"]["curve"]
    for row in rows:
        assert row["both"] <= min(row["gallery"], row["query"]) <= done["sides"].extras["sides"]["clean"]
    assert rows[1]["both"] < rows[0]["both"] and rows[1]["both"] < rows[1]["query"]


def test_a_picture_that_may_not_be_moved_is_told(model, digits, done) -> None:
    run = done["sides"]
    name = "gallery@20/255/query"
    other = run.model_copy().with_arrays(run.arrays, {**run.sample, name: run.sample[name] * 0.99})
    found = list(KINDS["sides"].replay(stated(other, "sides"), kept(model, digits, run)))
    assert [p.field for p in found] == ["run/adversarial_sample.npz gallery@20/255"]


def test_more_candidates_than_wrong_entries(model, digits) -> None:
    with pytest.raises(UsageError, match="fewer than 5000 candidates"):
        evaluate(model, digits, rules("sides", candidates=5000), limit=2, device="cpu")


def test_as_a_user_types_it(typed, tmp_path) -> None:
    run = str(tmp_path / "run")
    out = typed("evaluate", "--model", MODEL, "--protocol", "sides", "--limit", "8", "--eps", "10/255,20/255", "--out", run,
                "--csv", str(tmp_path / "mine.csv")).out  # fmt: skip
    assert "gallery alone" in out and "both@20/255" in out
    assert "R@1, both sides" in typed("leaderboard", "show", "--csv", str(tmp_path / "mine.csv")).out or out
    typed("report", run, "--out", str(tmp_path / "report.html"))
    typed("compare", run, run)
    assert "total" in typed("evaluate", "--model", MODEL, "--protocol", "sides", "--plan").out

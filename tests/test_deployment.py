"""Threats of a deployment: both sides perturbed, universal perturbations on unseen queries, poisoned pictures of the gallery."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import weights_of

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.checkpoints import checkpoints
from dmlbench.cli.results import print_evaluation
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds import universal
from dmlbench.kinds.base import WHOLE_RUN, Stated, StoredSample
from dmlbench.kinds.halves import halves
from dmlbench.kinds.poison import search as poison
from dmlbench.kinds.sides import search as sides
from dmlbench.kinds.table import KINDS, numbers_of
from dmlbench.protocols import PROTOCOLS, _packaged, load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.results import load, save
from dmlbench.run.subject import prepare
from dmlbench.run.units import Units, Work
from dmlbench.submission.pack import draft, pack, shortened, write_folder
from dmlbench.submission.validate import validate

MODEL = "digits-smallcnn-triplet-hm-lga-ics"
NAMES = ("sides", "universal", "poison")
QUICK = {
    "sides": ({"steps": 4}, {"candidates": 2}),
    "universal": ({"steps": 4}, {}),
    "poison": ({"steps": 4}, {"poisons": [1, 3], "seeds": 6}),
}


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


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_recall_says_nothing_of_ers(model, digits, name, capsys) -> None:
    rows = digits.query[:40]
    nobody = replace(digits, query=rows, gallery=rows, labels=np.arange(len(digits)), class_names=())
    print_evaluation(evaluate(model, nobody, rules(name), device="cpu"))
    assert "ERS" not in capsys.readouterr().out


def stated(run, name, eps=("10/255", "20/255")):
    rule = rules(name, eps)
    return Stated(run, rule, tuple(KINDS[name].components(rule, (1, 8, 8))))


def kept(model, digits, run):
    subject = prepare(model, digits, limit=32, device="cpu")
    at = np.flatnonzero(np.isin(subject.rows, run.sample["rows"]))
    return StoredSample(subject, at, subject.images(0, 32)[torch.from_numpy(at)])


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Put the protocol of :func:`rules` in the place of the packaged one."""

    def stand_in(name):
        rule, path = rules(name), tmp_path / f"{name}.toml"
        settings = settings_text(rule.settings)
        path.write_text(PROTOCOLS_TEXT.format(name=name, steps=rule.threat["steps"], settings=settings))
        monkeypatch.setitem(PROTOCOLS._entries, name, path)
        _packaged.cache_clear()

    yield stand_in
    _packaged.cache_clear()


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
def test_a_gallery_in_no_order_comes_out_again_too(model, digits, name) -> None:
    mixed = replace(digits, gallery=np.random.default_rng(0).permutation(digits.gallery))
    run = evaluate(model, mixed, rules(name), limit=32, device="cpu")
    assert not list(KINDS[name].replay(stated(run, name, ("20/255",)), kept(model, mixed, run)))


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
def test_a_bundle_passes_up_to_the_rerun(model, digits, short, name, tmp_path) -> None:
    """All queries, in a protocol whose searches are short."""
    short(name)
    run = evaluate(model, digits, name, device="cpu")
    save(run, tmp_path / "run")
    (tmp_path / "w.safetensors").write_bytes(weights_of(MODEL))
    said = draft(tmp_path / "run", checkpoints()[MODEL]).replace("license: FILL-IN", "license: MIT")
    (tmp_path / "submission.yaml").write_text(said.replace("FILL-IN", "A. Tester"))
    files = pack(tmp_path / "run", tmp_path / "submission.yaml", tmp_path / "w.safetensors")
    write_folder(files, tmp_path / "bundle")
    report = validate(tmp_path / "bundle", 3, device="cpu", seed=0, share=0.0, least=8)
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3), report.problems


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
        ("universal", "", 'attack = "QA+"\n', "has targets"),
        ("universal", "", 'attack = "WX"\n', "unknown attack 'WX'"),
        ("universal", "restarts = 2\n", "", "restarts does nothing"),
        ("poison", "", "poisons = [0]\n", "poisons"),
        ("poison", "", "poisons = []\n", "poisons"),
        ("poison", "", "poisons = [2, 1]\n", "ascending"),
        ("poison", "", "poisons = [33]\n", "more than the 32 seeds"),
        ("poison", "", "seeds = 0\n", "seeds"),
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


# --- one perturbation for all queries ------------------------------------------------------------------


def test_halves_are_even_and_of_the_row_and_seed(digits) -> None:
    rows = digits.query[:101]
    half = halves(rows, 0)
    assert sorted(np.bincount(half)) == [50, 51] and set(half) == {0, 1}
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(halves(rows[order], 0), half[order])
    assert (halves(rows, 1) != half).any()
    with pytest.raises(UsageError, match="1 query cannot be dealt to two halves"):
        halves(rows[:1], 0)


def test_each_query_is_read_with_the_perturbation_of_the_other_half(model, digits, done) -> None:
    """The steps by a plain loop, one picture at a time."""
    run, eps, name = done["universal"], 20 / 255, "20/255"
    subject = prepare(model, digits, limit=32, device="cpu")
    half = run.arrays["universal/half"]
    np.testing.assert_array_equal(half, halves(subject.rows, 0))
    gallery, pictures = subject.scene.gallery.embeddings, digits.images[subject.rows]
    for own in (0, 1):
        shared = torch.zeros(1, 8, 8)
        for _ in range(4):
            total = torch.zeros(1, 8, 8)
            for i in np.flatnonzero(half == own):
                x = (pictures[i] + shared).clamp(0, 1).requires_grad_()
                d = (model(x[None]) - gallery).norm(dim=1)
                same = subject.scene.same[i]
                (d[subject.scene.other[i]].min() - d[same].min()).backward()
                total += x.grad
            shared = (shared - 2.5 * eps / 4 * total.sign()).clamp(-eps, eps)
        for i, read in ((i, "seen" if half[i] == own else "unseen") for i in range(32)):
            wanted = (pictures[i] + shared).clamp(0, 1).numpy()
            where = np.flatnonzero(np.isin(subject.rows, run.sample["rows"])).tolist().index(i)
            np.testing.assert_allclose(run.sample[f"{read}@{name}"][where], wanted, atol=1e-5)
            with torch.no_grad():
                d = (model(torch.from_numpy(wanted)[None]) - gallery).norm(dim=1)
            d[subject.scene.row[i]] = torch.inf
            right = 100.0 * (subject.scene.gallery.labels[d.argmin()] == subject.scene.labels[i])
            assert run.arrays[f"{read}@{name}/value"][i] == right


def test_without_a_ball_every_query_is_as_when_clean(model, digits) -> None:
    subject = prepare(model, digits, limit=20, device="cpu")
    rule, half = rules("universal"), halves(subject.rows, 0)
    nothing = replace(rule.threat_at("1/255"), eps=0, step=0)
    found = universal.made(subject, universal.attack_of(rule), nothing, 0, half, 0, np.arange(20))
    np.testing.assert_array_equal(found["recall_at_1"] == 100, right_when_clean(subject))
    assert not found["norm"].any()


def test_images_that_are_not_moved_alike_are_told(model, digits, done) -> None:
    run, name = done["universal"], "unseen@20/255"
    images = run.sample[name].copy()
    images[0] = digits.images[np.array([run.sample["rows"][0]])][0].numpy()
    other = run.model_copy().with_arrays(run.arrays, {**run.sample, name: images})
    found = list(KINDS["universal"].replay(stated(other, "universal"), kept(model, digits, run)))
    assert any(p.field.endswith(name) and "one perturbation" in p.reason for p in found)


# --- poisoned pictures ---------------------------------------------------------------------------------


def nearest_of(gallery, queries, own):
    """By loops, the place of each query's nearest entry, its own left out; the first of those that are as near."""
    found = []
    for query, place in zip(queries, own, strict=True):
        d = [np.inf if j == place else float(np.sqrt(((query - entry) ** 2).sum())) for j, entry in enumerate(gallery)]
        found.append(int(np.argmin(d)))
    return np.array(found)


def test_hub_rate_and_natural_hubs_against_loops(model, digits, done) -> None:
    run = done["poison"]
    subject = prepare(model, digits, limit=32, device="cpu")
    gallery = subject.scene.gallery.embeddings.double().numpy()
    queries, own_row = subject.scene.clean.double().numpy(), subject.scene.row.numpy()
    half, clean = run.arrays["poison/half"], nearest_of(gallery, queries, own_row)
    np.testing.assert_array_equal(run.arrays["poison/nearest"], digits.gallery[clean])
    said = {(row["eps"], row["poisons"]): row for row in run.extras["poison"]["table"]}
    for eps in ("10/255", "20/255"):
        for m in (1, 3):
            taken, known, tops, right = [], [], [], []
            for own in (0, 1):
                images, rows = run.sample[f"whole/half {own}@{eps}"][:m], run.sample[f"whole/half {own}@{eps}/rows"][:m]
                moved = np.abs(images - digits.images[rows].numpy())
                assert moved.max() <= eval(eps) + 1e-6 and images.min() >= 0 and images.max() <= 1
                place = [int(np.flatnonzero(digits.gallery == row)[0]) for row in rows]
                poisoned = gallery.copy()
                with torch.no_grad():
                    poisoned[place] = model(torch.from_numpy(images)).double().numpy()
                now = nearest_of(poisoned, queries, own_row)
                counts = {}
                for j in clean[half == own]:
                    counts[j] = counts.get(j, 0) + 1
                best = sorted(counts, key=lambda j: (-counts[j], j))[:m]
                for i in range(32):
                    if half[i] == own:
                        known.append(now[i] in place)
                    else:
                        taken.append(now[i] in place)
                        tops.append(clean[i] in best)
                        right.append(subject.scene.gallery.labels[now[i]] == subject.scene.labels[i])
            row = said[eps, m]
            for key, values in (("hub_rate", taken), ("known", known), ("natural", tops), ("recall_at_1", right)):
                assert row[key] == pytest.approx(100 * np.mean(values)), key
    assert run.extras["poison"]["largest_hub"] == pytest.approx(100 * np.bincount(clean).max() / 32)


def test_poisons_that_may_not_move_are_the_natural_hubs(model, digits) -> None:
    subject = prepare(model, digits, limit=200, device="cpu")
    rule, half = rules("poison"), halves(subject.rows, 0)
    nearest = poison.two_nearest(subject.scene)[1][:, 0].numpy()
    for own in (0, 1):
        found = poison.made(subject, rule, replace(rule.threat_at("1/255"), eps=0), 0, half, own)
        for m in (1, 3):
            taken = found[f"free-{m}"] == 0
            np.testing.assert_array_equal(taken[half != own], poison.natural(nearest, half, m)[half != own])


def test_poisons_cover_one_after_another() -> None:
    taken = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=bool)
    assert poison.covering(taken, 4).tolist() == [0, 2, 1, 3]
    assert poison.hubs(np.array([4, 4, 2, 2, 7]), 4, 9).tolist() == [2, 4, 7, 0]


def test_a_picture_takes_a_query_where_it_is_the_nearest_in_its_clean_place(model, digits) -> None:
    subject = prepare(model, digits, limit=40, device="cpu")
    seeds = torch.from_numpy(poison.hubs(poison.two_nearest(subject.scene)[1][:, 0].numpy(), 5, 896))
    loss = poison.Taken(subject.embedder, subject.scene, poison.Known.of(subject.scene, seeds))
    generator = torch.Generator().manual_seed(0)
    images = digits.images[digits.gallery[seeds.numpy()]]
    images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        taken = loss.taken(images).numpy()
        for j, place in enumerate(seeds.tolist()):
            free, _ = poison.read(subject, np.array([place]), images[j : j + 1])
            np.testing.assert_array_equal(taken[j], free == 0)


def test_a_bundle_that_may_hold_no_picture_holds_no_poison(done) -> None:
    """Pictures of the gallery are pictures of the data set too."""
    whole, none = (shortened(done["poison"], count) for count in (32, 0))
    assert whole.keys() == none.keys() and any(name.startswith(WHOLE_RUN) for name in none)
    assert all(len(values) == 0 for values in none.values()) and all(len(values) for values in whole.values())


def test_too_few_pictures_for_the_seeds(model, digits) -> None:
    with pytest.raises(UsageError, match="896 pictures in its gallery, too few for 896 seeds"):
        evaluate(model, digits, rules("poison", seeds=896), limit=2, device="cpu")
    with pytest.raises(UsageError, match="1 query cannot be dealt"):
        evaluate(model, digits, rules("poison"), limit=1, device="cpu")


# --- as it is typed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"), [("sides", "gallery alone"), ("universal", "on the other"), ("poison", "natural hubs")]
)
def test_as_a_user_types_it(typed, short, tmp_path, name, words) -> None:
    short(name)
    run, table = str(tmp_path / "run"), str(tmp_path / "mine.csv")
    first = ("evaluate", "--model", MODEL, "--protocol", name, "--limit", "12", "--eps", "10/255,20/255")
    assert words in typed(*first, "--out", run, "--csv", table).out
    shards = [str(tmp_path / f"shard{i}") for i in (1, 2)]
    for i, folder in enumerate(shards, 1):
        typed(*first, "--out", folder, "--shard", f"{i}/2")
    whole = str(tmp_path / "whole")
    typed("merge", *shards, "--out", whole)
    one, other = load(tmp_path / "run"), load(tmp_path / "whole")
    assert one.extras == other.extras and one.measurements[0].value == other.measurements[0].value
    assert typed("leaderboard", "show", "--csv", table).out
    typed("report", run, "--out", str(tmp_path / "report.html"))
    typed("compare", run, whole)
    assert "total" in typed("evaluate", "--model", MODEL, "--protocol", name, "--plan").out


def test_merge_asks_for_the_protocol_file_that_the_shards_were_told(typed, tmp_path) -> None:
    rule, path = rules("universal"), tmp_path / "mine.toml"
    path.write_text(
        PROTOCOLS_TEXT.format(name="universal", steps=rule.threat["steps"], settings=settings_text(rule.settings))
    )
    shard, whole = str(tmp_path / "shard"), ("--out", str(tmp_path / "whole"))
    typed("evaluate", "--model", MODEL, "--protocol", path, "--limit", "4", "--out", shard, "--shard", "1/1")
    refused = typed("merge", shard, *whole, code=3).err
    assert "protocol_sha256" in refused and "remove" not in refused
    typed("merge", shard, *whole, "--protocol", path)

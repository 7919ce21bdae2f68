"""Verification of pairs: the rates against scikit-learn, folds and thresholds against plain loops, runs from end to end."""

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain import distance as plain_distance
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.datasets.pairs import with_pairs
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.base import Stated, StoredSample
from dmlbench.kinds.table import KINDS, numbers_of
from dmlbench.kinds.verification import checks, search
from dmlbench.kinds.verification.pairs import SIDES, drawn, folds_of_classes, threshold, thresholds
from dmlbench.kinds.verification.summary import CARRIED, SURVIVED, components, eer, roc, tar_at
from dmlbench.protocols import FOLDER, load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.results import Evaluation, load
from dmlbench.rng import Rng
from dmlbench.run.subject import prepare
from dmlbench.run.units import Units, Work
from dmlbench.submission import rerun

MODEL = "digits-smallcnn-triplet-hm-lga-ics"


def shortened(**changes):
    """The protocol with less of each search."""
    p = load_protocol("verification")
    fewer = ({"steps": 6, "start": "clean"}, {"steps": 4, "start": "random", "restarts": 2}, {"queries": 160})
    steps = tuple(s.model_copy(update={"threat": t}) for s, t in zip(p.steps, fewer, strict=True))
    rule = p.threshold.model_copy(update={"threat": {"steps": 4, "start": "random"}, "parts": 2, "octaves": 1})
    return p.model_copy(update={"steps": steps, "threshold": rule, "clustering_seeds": (0,), **changes})


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(MODEL)


@pytest.fixture(scope="module")
def digits():
    return dmlbench.load_dataset("digits")


@pytest.fixture(scope="module")
def done(model):
    return evaluate(model, "digits", shortened(), limit=24, device="cpu")


# --- the clean rates ------------------------------------------------------------------------------------------


pairs_of_scores = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({same for _, same in rows}) == 2
)


@settings(max_examples=200, deadline=None)
@given(pairs_of_scores, st.sampled_from([0.5, 0.2, 0.05, 1e-3]))
def test_the_rates_are_those_of_scikit_learn(rows, far: float) -> None:
    """Ties and all: distances are whole numbers."""
    d, same = np.array([d for d, _ in rows], dtype=np.float32), np.array([s for _, s in rows])
    fpr, tpr, _ = roc_curve(same, -d, drop_intermediate=False)
    curve = roc(d, same)
    np.testing.assert_allclose(curve, np.stack([fpr, tpr], axis=1))
    wanted = brentq(lambda x: 1.0 - x - interp1d(fpr, tpr)(x), 0.0, 1.0)
    # where the curve goes straight up, an interpolation of one value a rate knows only one of its ends
    steps = np.diff(fpr)
    if (steps[steps > 0] > 0).all() and not (steps == 0).any():
        assert eer(curve) == pytest.approx(wanted, abs=1e-6)
    crossing = min(max(f, 1 - t) for f, t in zip(fpr, tpr, strict=True))
    assert min(min(f, 1 - t) for f, t in zip(fpr, tpr, strict=True)) <= eer(curve) <= crossing + 1e-9
    impostors = int((~same).sum())
    found = tar_at(curve, far, impostors)
    assert found == (tpr[fpr <= far].max() if impostors * far >= 1 else None)


def plain_threshold(d, same, far=None) -> float:
    """Every middle between neighbours, and both ends, asked about pair by pair: one on the threshold is decided wrongly."""
    values = sorted({float(x) for x in d})
    ends = values[0] / 2 or -1.0, 1.5 * values[-1] or 1.0
    tried = [ends[0], *((a + b) / 2 for a, b in itertools.pairwise(values)), ends[1]]
    best, most = None, -1
    for t in tried:
        right = sum(x < t if s else x > t for x, s in zip(d, same, strict=True))
        accepted = sum(x <= t for x, s in zip(d, same, strict=True) if not s)
        if far is not None:
            best = t if accepted <= Fraction(str(far)) * sum(not s for s in same) else best
        elif right > most:
            best, most = t, right
    return best


@settings(max_examples=100, deadline=None)
@example([(0, True), (0, False)], None)  # a model that gives one embedding
@example([(d, d % 2 == 0) for d in range(200)], 0.29)  # 0.29 * 100 is below 29 in floating point
@given(pairs_of_scores, st.sampled_from([None, 0.3, 0.01]))
def test_a_threshold_is_that_of_the_plain_loop(rows, far) -> None:
    d, same = np.array([d / 8 for d, _ in rows], dtype=np.float32), np.array([s for _, s in rows])
    assert threshold(d, same, far) == np.float32(plain_threshold(d.tolist(), same.tolist(), far))


# --- the pairs ------------------------------------------------------------------------------------------------


def test_folds_are_disjoint_in_classes_and_balanced(digits) -> None:
    photos = np.repeat(np.arange(43), 3)
    many = RetrievalDataset("many", "test", TensorImages(torch.zeros(len(photos), 1, 8, 8)), photos)
    of_class = folds_of_classes(many, 10, 0)
    sizes = np.bincount(list(of_class.values()))
    assert set(of_class) == set(range(43)) and len(sizes) == 10 and sizes.max() - sizes.min() <= 1
    assert folds_of_classes(many, 10, 1) != of_class
    assert set(folds_of_classes(digits, 10, 0).values()) == {0, 1}  # of five classes, two in each fold at least


def test_every_query_has_a_genuine_and_an_impostor_pair_of_its_fold(digits) -> None:
    found = drawn(digits, load_protocol("verification"), 0)
    label, own = digits.labels[digits.query], digits.position_in_gallery
    of_class = folds_of_classes(digits, 10, 0)
    entry = digits.labels[digits.gallery]
    assert len(found.fold) == len(digits.query)
    for q in range(len(label)):
        genuine, impostor = found.partner[q]
        assert found.fold[q] == of_class[label[q]]
        assert entry[genuine] == label[q] and genuine != own[q]
        assert entry[impostor] != label[q] and of_class[entry[impostor]] == found.fold[q]
        assert entry[found.other[q]] != label[q]
    assert len(np.unique(found.partner)) > 500  # drawn from all over the gallery


def test_what_shares_a_group_is_no_pair() -> None:
    """Pictures by one camera do not count for each other: nor are they told to be of one person."""
    labels, camera = np.repeat(np.arange(4), 3), np.tile([0, 0, 1], 4)
    images = TensorImages(Rng(0, torch.arange(12)).uniform(1, 8, 8))
    found = drawn(RetrievalDataset("seen", "test", images, labels, groups=camera), load_protocol("verification"), 0)
    for q, (genuine, impostor) in enumerate(found.partner):
        assert labels[genuine] == labels[q] and camera[genuine] != camera[q]
        assert impostor == -1 or (labels[impostor] != labels[q] and camera[impostor] != camera[q])


def test_thresholds_and_clean_outcomes_are_those_of_plain_loops(model, digits, done) -> None:
    """Of all queries, measured or not: each fold by the pairs of the others."""
    rules, arrays = shortened(), done.arrays
    found = drawn(digits, rules, 0)
    with torch.no_grad():
        e = model(digits.images[np.arange(len(digits))]).double().numpy()
    everyone = [
        (q, side, plain_distance("N", e[digits.query[q]], e[digits.gallery[partner]]))
        for q, pair in enumerate(found.partner)
        for side, partner in enumerate(pair)
    ]
    said = done.extras["verification"]["thresholds"]
    for fold in (0, 1):
        others = [(d, side == 0) for q, side, d in everyone if found.fold[q] != fold]
        assert said[fold] == pytest.approx(plain_threshold(*zip(*others, strict=True)), abs=2e-3)
    place = {int(row): q for q, row in enumerate(digits.query)}
    by_pair = {(q, side): d for q, side, d in everyone}
    for i, row in enumerate(arrays["query"]):
        q = place[int(row)]
        for side, name in enumerate(SIDES):
            d = by_pair[q, side]
            assert arrays[f"{name}/distance"][i] == pytest.approx(d, abs=1e-5)
            assert arrays[f"{name}/partner"][i] == digits.gallery[found.partner[q, side]]
            edge = said[found.fold[q]]
            if abs(d - edge) > 1e-4:
                assert arrays[f"{name}/clean"][i] == 100.0 * ((d < edge) == (side == 0))


def test_missing_pairs_leave_a_fold_without_a_threshold() -> None:
    d = np.array([[0.1, np.nan], [0.2, 0.5], [0.3, 0.6]])
    found = thresholds(d, np.array([1, 0, 0]))
    assert np.isnan(found[0]) and found[1] == np.float32(0.4)


# --- the searches ---------------------------------------------------------------------------------------------


def test_the_curve_counts_pairs_once(done) -> None:
    said = done.extras["verification"]
    rules = shortened()
    before = {side: done.arrays[f"{side}/clean"] == 100 for side in SIDES}
    assert said["pairs"] == {"dodging": 24, "impersonation": 24}
    for row in said["curve"]:
        flipped = dict.fromkeys((s.name for s in rules.steps), 0)
        for side in SIDES:
            name = f"{side}@{row['eps']}"
            by, value = done.arrays[f"{name}/broken_by"], done.arrays[f"{name}/value"]
            np.testing.assert_array_equal(value == 100, by == SURVIVED)
            np.testing.assert_array_equal(by == CARRIED, (done.arrays[f"{side}/clean"] == 100) & ~before[side])
            assert bool(((by == SURVIVED) <= before[side]).all())
            assert row[side] == pytest.approx(value.mean()) == done.part(name).value
            assert bool((done.arrays[f"{name}/norm"] <= eval(row["eps"]) + 1e-5).all())
            for index, step in enumerate(rules.steps):
                flipped[step.name] += int((by == index + 2).sum())
            before[side] = by == SURVIVED
        assert {s["step"]: s["flipped"] for s in row["steps"]} == flipped
        assert row["accuracy"] == pytest.approx((row["dodging"] + row["impersonation"]) / 2)
        assert [s["ran"] for s in row["steps"]] == [True, True, row is said["curve"][-1]]
    accuracies = [said["clean"]["accuracy"], *(row["accuracy"] for row in said["curve"])]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < accuracies[0]


def test_stored_images_are_decided_as_stated_by_a_plain_loop(model, digits, done) -> None:
    with torch.no_grad():
        e = model(digits.images[np.arange(len(digits))]).double().numpy()
    at = np.flatnonzero(np.isin(done.arrays["query"], done.sample["rows"]))
    edges = np.array(done.extras["verification"]["thresholds"])
    assert len(at) == 24
    for eps in ("10/255", "40/255"):
        for side in SIDES:
            name = f"{side}@{eps}"
            with torch.no_grad():
                moved = model(torch.from_numpy(done.sample[name])).double().numpy()
            for n, i in enumerate(at):
                if done.arrays[f"{side}/clean"][i] != 100:
                    continue
                d = plain_distance("N", moved[n], e[done.arrays[f"{side}/partner"][i]])
                edge = edges[done.arrays["verification/fold"][i]]
                if abs(d - edge) > 1e-5:
                    assert (done.arrays[f"{name}/value"][i] == 100) == ((d < edge) == (side == "dodging"))


def test_the_smallest_eps_lies_where_the_grid_says(done) -> None:
    for side in SIDES:
        found = done.arrays[f"{side}/smallest_eps"]
        np.testing.assert_array_equal(np.isnan(found), done.arrays[f"{side}/clean"] != 100)
        for eps in ("5/255", "10/255", "20/255", "40/255"):
            by = done.arrays[f"{side}@{eps}/broken_by"]
            np.testing.assert_array_equal(by >= CARRIED, found <= eval(eps) * (1 + 1e-9))
    any_of = np.fmin(*(done.arrays[f"{side}/smallest_eps"] for side in SIDES))
    known = np.sort(any_of[~np.isnan(any_of)])
    said = done.extras["verification"]["smallest_eps"]["any"]
    assert said["median"] == pytest.approx(known[(len(known) - 1) // 2])


def test_neither_batch_nor_the_other_queries_matter(model, done) -> None:
    more = evaluate(model, "digits", shortened(), limit=26, batch_size=9, device="cpu")
    at = np.searchsorted(more.arrays["query"], done.arrays["query"])
    assert more.extras["verification"]["thresholds"] == done.extras["verification"]["thresholds"]
    for side in SIDES:
        for key in ("partner", "distance", "clean"):
            np.testing.assert_array_equal(more.arrays[f"{side}/{key}"][at], done.arrays[f"{side}/{key}"])
        for eps in ("5/255", "20/255"):
            a, b = (e.arrays[f"{side}@{eps}/broken_by"] for e in (more, done))
            assert (a[at] != b).mean() <= 0.05, "but for float rounding in long searches"


def test_queries_may_be_named_in_any_order(model, digits) -> None:
    rows = np.random.default_rng(0).permutation(digits.query)[:40]
    some = [
        evaluate(model, replace(digits, query=query), shortened(steps=(), threshold=None), device="cpu")
        for query in (rows, np.sort(rows))
    ]
    a, b = (e.arrays["query"].argsort() for e in some)
    for name in ("verification/fold", *(f"{side}/{key}" for side in SIDES for key in ("partner", "distance", "clean"))):
        np.testing.assert_array_equal(some[0].arrays[name][a], some[1].arrays[name][b])


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(model, done, tmp_path, monkeypatch) -> None:
    whole, calls = search.piece, [0]

    def mortal(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return whole(*args)

    work = Work(Units(tmp_path / "units"))
    monkeypatch.setattr(search, "piece", mortal)
    with pytest.raises(Killed):
        evaluate(model, "digits", shortened(), limit=24, device="cpu", work=work)
    monkeypatch.setattr(search, "piece", whole)
    again = evaluate(model, "digits", shortened(), limit=24, device="cpu", work=work, resume=True)
    assert again.arrays.keys() == done.arrays.keys()
    for name, values in done.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values, err_msg=name)
    for name, images in done.sample.items():
        np.testing.assert_array_equal(again.sample[name], images, err_msg=name)


def test_the_black_box_begins_at_pictures_that_are_decided_wrongly(model, digits) -> None:
    """And flips pairs by decisions alone; images outside the ball do not count."""
    rules = shortened(settings={"folds": 10})
    step = rules.steps[2]
    subject = prepare(model, digits, limit=8, device="cpu")
    pairs = drawn(digits, rules, 0)
    d = search.clean_distances(subject, pairs)
    edge = thresholds(d, pairs.fold)[pairs.fold]
    here = np.searchsorted(digits.query, subject.rows)
    bench = search.Bench.of(subject, pairs.at(here), edge[here], search.margins(d, edge)[here] > 0)
    flip = search.Flip(
        subject.embedder,
        "FLIP",
        digits.images[bench.pictures],
        bench.subject.scene,
        search.Log(digits.images[bench.pictures]),
    )
    with torch.no_grad():
        assert float((flip(flip.shown()) <= 0).float().mean()) > 0.7
    at = np.flatnonzero(bench.right)
    threat = rules.threat_at("80/255", {"queries": 700})
    found = search.piece(bench, step, threat, 0, at, at)
    assert found["gradients"] == 0 and found["values"] <= 700 * len(at)
    assert found["broken"].any() and bool((found["norm"] <= threat.radius + 1e-5).all())
    small = search.piece(bench, step, rules.threat_at("1/255", {"queries": 200}), 0, at, at)
    assert small["broken"].sum() < found["broken"].sum()


def test_other_thresholds(model, digits) -> None:
    """At a rate of impostors rather than where most pairs are right."""
    base, strict = (
        evaluate(model, digits, shortened(settings={**s, "largest": ["HSJ"]}, steps=shortened().steps[:1], threshold=None),
                 limit=24, eps=["5/255"], device="cpu").extras["verification"]
        for s in ({}, {"far": 0.05})
    )  # fmt: skip
    assert all(a < b for a, b in zip(strict["thresholds"], base["thresholds"], strict=True)) and strict["far"] == 0.05
    assert strict["clean"]["impersonation"] > base["clean"]["impersonation"]


# --- pairs from a file ------------------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path) -> str:
    """A folder of eight people with three photographs each, as LFW names them."""
    from PIL import Image

    pixels = (Rng(5, torch.arange(24)).uniform(8, 8) * 255).byte().numpy()
    for n in range(24):
        name = f"P_{n // 3}"
        (tmp_path / "faces" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[n]).resize((16, 16)).save(tmp_path / "faces" / name / f"{name}_{n % 3 + 1:04d}.png")
    return f"folder:{tmp_path / 'faces'}"


LFW = "2\t2\nP_0 1 2\nP_1 1 3\nP_0 1 P_1 2\nP_2 1 P_3 1\nP_4 1 2\nP_5 3 2\nP_4 1 P_5 2\nP_6 3 P_7 3\n"
CSV = """probe,partner,same,fold
P_0/P_0_0001.png,P_0_0002,1,0
P_1_0001,P_1_0003.png,1,0
P_0_0001,P_1_0002,0,0
P_2_0001,P_3_0001,0,0
P_4_0001,P_4_0002,true,7
P_5_0003,P_5_0002,1,7
P_4_0001,P_5_0002,false,7
P_6_0003,P_7_0003,0,7
"""


def test_both_layouts_name_the_same_pairs(model, faces, tmp_path) -> None:
    people = dmlbench.load_dataset(faces, preprocess=model.preprocess)
    (tmp_path / "pairs.txt").write_text(LFW)
    (tmp_path / "pairs.csv").write_text(CSV)
    a, b = (with_pairs(people, tmp_path / name) for name in ("pairs.txt", "pairs.csv"))
    assert a.pairs.partner.tolist() == b.pairs.partner.tolist() == [1, 5, 4, 9, 13, 16, 16, 23]
    assert a.images.rows[a.query].tolist() == b.images.rows[b.query].tolist() == [0, 3, 0, 6, 12, 17, 12, 20]
    assert a.pairs.fold.tolist() == [0] * 4 + [1] * 4 and b.pairs.fold.tolist() == [0] * 4 + [7] * 4
    assert a.pairs.sha256 != b.pairs.sha256 and a.sha256 != people.sha256
    found = drawn(a, shortened(), 0)
    assert found.fold.tolist() == drawn(b, shortened(), 0).fold.tolist() == [0] * 4 + [1] * 4
    assert (found.partner[:, 0] >= 0).tolist() == [True, True, False, False] * 2
    subject = prepare(model, a, device="cpu")
    alone = prepare(model, people, device="cpu")
    mixed = drawn(replace(a, gallery=a.gallery[::-1]), shortened(), 0)
    for place, entries in ((found.partner, a.gallery), (mixed.partner, a.gallery[::-1])):
        assert entries[place.max(1)].tolist() == a.pairs.partner.tolist()
    for query, probe in enumerate(a.images.rows[a.query]):  # its own picture is not what it finds
        torch.testing.assert_close(subject.scene.clean[query], alone.scene.clean[probe])
        assert bool(subject.scene.left_out[query, probe])


def test_a_run_of_a_file_as_a_user_types_it(typed, faces, tmp_path) -> None:
    file, out = tmp_path / "pairs.txt", str(tmp_path / "run")
    file.write_text(LFW)
    typed_so = ["evaluate", "--model", MODEL, "--dataset", faces, "--protocol", "verification", "--pairs", str(file)]
    typed_so += ["--eps", "20/255", "--seed", "1", "--out", out]
    said = typed(*typed_so).out
    assert "partial: " in said and "4 genuine and 4 impostor" in " ".join(said.split())
    e = load(Path(out))
    assert e.dataset.n_queries == 8 and e.conditions.pairs in " ".join(e.partial)
    assert np.isnan(e.arrays["dodging/distance"]).tolist() == [False, False, True, True] * 2
    typed(*typed_so, "--resume")
    file.write_text(LFW.replace("P_0 1 2", "P_0 2 1"))
    assert "pairs" in typed(*typed_so, "--resume", code=3).err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no pair"),
        ("probe,partner,same\n", "holds no pair"),
        (LFW.replace("P_7 3", "P_7 4"), "line 9: 'P_7/P_7_0004' is no picture of data set"),
        (LFW.replace("P_1 1 3", "P_0 1 2"), "line 3: the pair is already in line 2"),
        (LFW.replace("P_1 1 3", "P_1 1 1"), "line 3: 'P_1/P_1_0001' is compared with itself"),
        (LFW.replace("2\t2", "2\t3"), "holds 8 pairs, its first line says 2 x 2 x 3"),
        (LFW.replace("P_1 1 3", "P_1 1 P_2 3"), "line 3: 'P_1 1 P_2 3' is not 'name n m'"),
        (LFW.replace("P_2 1 P_3 1", "P_2 1 P_2 2"), "line 5: says not the same, data set"),
        (LFW.partition("\n")[2], "line 1: neither columns probe,partner,same nor"),
        (CSV.replace("probe", "first"), "has columns first, partner, same, fold"),
        (CSV.replace("P_1_0003.png,1,0", "P_1_0003.png,2,0"), "line 3: same '2' must be 1 or 0"),
        (CSV.replace(",1,0\nP_1", ",1,x\nP_1"), "line 2: fold 'x' is not a whole number"),
        (CSV.replace(",1,0\nP_1", f",1,{'9' * 20}\nP_1"), f"line 2: fold '{'9' * 20}' is not a whole number"),
        (f'"{CSV}', "line 1: unexpected end of data"),
        (LFW.replace("P_0 1 2", f"P_0 1 {'2' * 5000}"), "is not 'name n m'"),
        (LFW.replace("2\t2", f"2\t{'2' * 5000}"), "line 1: neither columns probe,partner,same nor"),
        (CSV.replace("P_1_0003.png,1,0", "P_1_0003.png,1"), "line 3 has another number of cells than columns"),
        ("probe,partner,same\nP_0_0001,P_0_0002,1\nP_0_0001,P_0_0003,1\n", "pictures of a single class"),
        ("probe,partner,same\nP_0_0001,P_0_0002,1\nP_1_0001,P_1_0003,1\n", "has no impostor pair"),
        ("probe,partner,same\nP_0_0001,P_1_0002,0\n", "has no genuine pair"),
        (CSV.replace("P_0_0001,P_1_0002,0,0\n", "").replace("P_2_0001,P_3_0001,0,0\n", ""), "the pairs of the file: the threshold of fold 7 needs impostor pairs"),
    ],
)  # fmt: skip
def test_a_bad_file_ends_before_anything_is_computed(typed, faces, tmp_path, monkeypatch, text, words) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text(text)
    monkeypatch.setattr(dmlbench, "evaluate", lambda *args, **options: pytest.fail("something was computed"))
    said = typed("evaluate", "--model", MODEL, "--dataset", faces, "--protocol", "verification", "--pairs", str(file), code=2)  # fmt: skip
    assert words in said.err and "Traceback" not in said.err
    assert len([line for line in said.err.splitlines() if line.startswith("Error")]) == 1


def test_pairs_do_nothing_elsewhere(typed, faces, tmp_path) -> None:
    (tmp_path / "pairs.txt").write_text(LFW)
    base = ["evaluate", "--model", MODEL, "--dataset", faces, "--pairs", str(tmp_path / "pairs.txt")]
    assert "--pairs does nothing under protocol 'strict-fast'" in typed(*base, "--protocol", "strict-fast", code=2).err
    named = typed(*base, "--protocol", "verification", "--attacks", "WM@pgd", code=2).err
    assert "--pairs does nothing" in named and "add all to --attacks" in named
    assert "cannot be read" in typed(*base[:-1], "nowhere.txt", "--protocol", "verification", code=4).err


def test_too_few_classes_are_refused_before_anything_is_embedded(model) -> None:
    images = TensorImages(Rng(0, torch.arange(9)).uniform(1, 8, 8))
    three = RetrievalDataset("three", "test", images, np.repeat(np.arange(3), 3))
    with pytest.raises(UsageError, match="'three' has 3 classes: two folds with impostors in each need four"):
        evaluate(model, three, shortened(), device="cpu")


# --- the protocol's file, the row, a submission -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("folds = 10", "folds = 1", "[settings] folds"),
        ("folds = 10", "far = 1.5", "[settings] far"),
        ("folds = 10", "fold = 10", "[settings] fold"),
        ('largest = ["HSJ"]', 'largest = ["HSK"]', "[settings] largest names 'HSK', which is no step"),
        ('name = "W1"\nattack = "FLIP"', 'name = "W1"\nattack = "WM"', "step 'W1': attack 'WM' does not aim at the decision"),
        ('[threshold]\nattack = "FLIP"', '[threshold]\nattack = "WM"', "threshold: attack 'WM'"),
        ('name = "W1"', 'name = "W1"\nrounds = 2', "aims and rounds do nothing"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(tmp_path, old, new, words) -> None:
    text = (FOLDER / "verification.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        read_protocol(tmp_path / "mine.toml")
    assert words in str(error.value)


def test_the_row_ranks_by_the_smallest_eps(done) -> None:
    row, numbers = from_evaluation(done), numbers_of(done)
    assert row.headline == pytest.approx(numbers["verification_smallest_eps"], abs=1e-6) and row.ers is None
    low, high = row.interval
    assert low <= row.headline <= high
    assert row.verification_accuracy == pytest.approx(done.extras["verification"]["clean"]["accuracy"], abs=1e-3)
    assert row.verification_accuracy_attacked < row.verification_accuracy
    assert row.verification_tar_1e_4 is None
    drawn_as = KINDS["verification"].curve(done)
    assert [p.eps for p in drawn_as.points] == ["0", "5/255", "10/255", "20/255", "40/255"]
    assert [p.value for p in drawn_as.points][::4] == pytest.approx(
        [row.verification_accuracy, row.verification_accuracy_attacked], abs=1e-3
    )


@pytest.fixture(scope="module")
def small(digits):
    """Sixty digits of all classes, each a query and an entry."""
    few = np.arange(len(digits))[:: len(digits) // 60][:60]
    return RetrievalDataset("few", "test", TensorImages(digits.images[few]), digits.labels[few])


@pytest.fixture(scope="module")
def whole(model, small):
    """A run of all queries, as it is submitted."""
    e = evaluate(model, small, shortened(), device="cpu")
    return Stated(e, shortened(), tuple(components(shortened(), (1, 8, 8))))


def problems(stated, arrays=None, sample=None, said=None):
    """What is found at level 0 in the run with other arrays, images or statements."""
    e = stated.evaluation.model_copy(deep=True, update={"extras": said} if said else {})
    e = Evaluation.model_validate(e.model_dump()).with_arrays(
        {**stated.evaluation.arrays, **(arrays or {})}, {**stated.evaluation.sample, **(sample or {})}
    )
    told = replace(stated, evaluation=e)
    return told, [*checks.outcome_problems(told), *checks.number_problems(told)]


def test_a_run_holds_what_it_must(whole, model, small) -> None:
    e, kind = whole.evaluation, KINDS["verification"]
    assert not problems(whole)[1] and not e.partial
    kind.form.model_validate(json.loads(json.dumps(e.extras["verification"])))
    for name, (letter, _) in kind.arrays(whole.rules, whole.parts).items():
        assert e.arrays[name].shape == (60,) and e.arrays[name].dtype.kind == letter, name
    subject = prepare(model, small, device="cpu")
    assert not list(checks.replay(whole, StoredSample(subject, np.arange(60), subject.images(0, 60))))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("clean", "eer"), 1.0, "clean.eer"),
        (("thresholds", 0), 0.9, "thresholds.0"),
        (("curve", 1, "dodging"), 99.0, "curve.1.dodging"),
        (("curve", 0, "steps", 0, "flipped"), 99, "steps.0.flipped"),
        (("curve", 0, "steps", 2, "ran"), True, "steps.2.ran"),
        (("smallest_eps", "dodging", "median"), 0.3, "dodging.median"),
        (("roc", 1), [0.0, 99.0], "roc.1"),
    ],
)
def test_an_edited_statement(whole, path, value, where) -> None:
    said = json.loads(json.dumps(whole.evaluation.extras))
    at = said["verification"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert any(where in p.field and p.level == 0 for p in problems(whole, said=said)[1])


def some(was, value):
    """Other values where the first of ``was`` is."""

    def change(values):
        out = values.copy()
        out[np.flatnonzero(was(values))[0]] = value
        return out

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("dodging@10/255/broken_by", some(lambda v: v == SURVIVED, 9), "of no step that is run"),
        ("dodging@10/255/broken_by", some(lambda v: v == SURVIVED, 4), "of no step that is run"),
        ("dodging@10/255/broken_by", some(lambda v: v == SURVIVED, CARRIED), "flipped at a smaller eps"),
        ("dodging@10/255/broken_by", some(lambda v: v == 0, -2), "in one of this and the partners alone"),
        ("dodging@10/255/value", some(lambda v: v == 0, 100.0), "do not fit broken_by"),
        ("dodging@10/255/iteration", some(lambda v: v > 0, 0), "do not fit broken_by"),
        ("dodging@10/255/norm", some(lambda v: v == 0, 0.01), "of pairs that nothing attacked"),
        ("dodging/clean", some(lambda v: v == 0, 100.0), "do not follow from the distances"),
        ("impersonation/smallest_eps", some(np.isfinite, 0.5), "none of the eps that are asked"),
        ("impersonation/distance", some(np.isfinite, np.nan), "in one of pairs and distances alone"),
        ("verification/fold", lambda v: v - 3, "other folds"),
    ],
)
def test_edited_arrays(whole, name, change, reason) -> None:
    e = whole.evaluation
    told = replace(whole, evaluation=e.model_copy().with_arrays({**e.arrays, name: change(e.arrays[name])}))
    assert any(reason in p.reason for p in checks.outcome_problems(told))


def test_other_pairs_and_images_that_lie_fall_at_the_replay(whole, model, small) -> None:
    e, subject = whole.evaluation, prepare(model, small, device="cpu")
    kept = StoredSample(subject, np.arange(60), subject.images(0, 60))

    def replayed(arrays, sample):
        return list(checks.replay(replace(whole, evaluation=e.model_copy().with_arrays(arrays, sample)), kept))

    swapped = {**e.arrays, "dodging/partner": np.roll(e.arrays["dodging/partner"], 1)}
    assert any("others than those that are drawn" in p.reason for p in replayed(swapped, e.sample))
    nearer = {**e.arrays, "dodging/distance": 0.9 * e.arrays["dodging/distance"]}
    assert any("clean distances are others" in p.reason for p in replayed(nearer, e.sample))
    clean = {**e.sample, "dodging@40/255": kept.clean.numpy()}
    found = replayed(e.arrays, clean)
    assert any("score otherwise" in p.reason for p in found)
    assert any("not those of the smaller eps" in p.reason for p in found)


def test_a_share_of_the_queries_is_attacked_again_at_the_same_thresholds(whole, model, small) -> None:
    few = evaluate(model, small, shortened(), only=[3, 5, 8, 21, 34, 55], device="cpu")
    assert few.partial == ("--only 6 queries",)
    assert few.extras["verification"]["thresholds"] == whole.evaluation.extras["verification"]["thresholds"]
    at = np.searchsorted(whole.evaluation.arrays["query"], few.arrays["query"])
    assert at.tolist() == [3, 5, 8, 21, 34, 55]
    np.testing.assert_array_equal(few.arrays["dodging/clean"], whole.evaluation.arrays["dodging/clean"][at])
    assert not list(rerun._disagreements(whole, few, at, 3))
    everyone = {**whole.evaluation.arrays}
    for c in whole.parts:
        everyone[f"{c.name}/value"] = np.full(60, 100.0, dtype=np.float32)
    invented = replace(whole, evaluation=whole.evaluation.model_copy().with_arrays(everyone))
    assert list(rerun._disagreements(invented, few, at, 3))


def test_from_a_run_to_a_report_and_a_comparison(typed, brief_plan, tmp_path) -> None:
    text = (FOLDER / "verification.toml").read_text()
    for long, short in (
        ("queries = 1000}", "queries = 60}"),
        ("steps = 40", "steps = 3"),
        ("steps = 20", "steps = 2"),
        ("parts = 4", "parts = 2"),
    ):
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "verification.toml").write_text(text)
    for name in (MODEL, "digits-smallcnn-triplet-none"):
        typed(
            "evaluate",
            "--model",
            name,
            "--protocol",
            "verification.toml",
            "--limit",
            "8",
            "--out",
            name,
            "--csv",
            "mine.csv",
        )
    runs = [MODEL, "digits-smallcnn-triplet-none"]
    assert "verification_smallest_eps" in (tmp_path / "mine.csv").read_text()
    typed("report", runs[0], "--out", "report.html")
    assert "decided rightly" in (tmp_path / "report.html").read_text()
    found = json.loads(typed("compare", *runs, "--protocol", "verification.toml", "--json", code=None).out)
    assert {"verification_smallest_eps", "verification_accuracy_attacked"} <= {m["metric"] for m in found["metrics"]}
    plan = typed("evaluate", "--model", MODEL, "--protocol", "verification", "--plan").out
    assert "smallest eps" in plan and "HSJ@40/255" in plan and "HSJ@5/255" not in plan
    at_most = {line.split()[0] for line in plan.splitlines() if "at most" in line}
    assert "RS@5/255" in at_most and "W1@40/255" in at_most and "W1@5/255" not in at_most

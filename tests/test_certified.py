"""Certified R@1: the bound against closed forms and plain loops, its confidence by simulation, runs from end to end."""

import math
from dataclasses import replace

import certified_attack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import scene_of
from scipy.stats import norm
from torch import nn

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.checkpoints import checkpoints
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import DataError, ShardDone, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.base import Stated, StoredSample
from dmlbench.kinds.certified import lipschitz, record
from dmlbench.kinds.certified.bound import errors, fewest, largest, margins, radii
from dmlbench.kinds.certified.measure import (
    CLEAN,
    LENGTH,
    MARGIN,
    RADIUS,
    Settings,
    components,
    right,
    smoothed,
    within,
)
from dmlbench.kinds.table import numbers_of
from dmlbench.protocols import FOLDER, PROTOCOLS, _packaged, load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.results import save
from dmlbench.run.subject import prepare
from dmlbench.run.units import Shard, Units, Work, collect
from dmlbench.scene import Gallery, Scene
from dmlbench.submission.pack import draft, pack, write_folder
from dmlbench.submission.validate import validate

MODEL = "digits-smallcnn-triplet-hm-lga-ics"


def rules(samples=200, queries=24, **changes):
    """The protocol with fewer samples and queries, and so little certainty that they prove something."""
    p = load_protocol("certified")
    few = {"samples": samples, "alpha": 0.9, "radius": 0.005, **changes}
    return p.model_copy(update={"settings": {**p.settings, **few}, "queries": queries, "clustering_seeds": (0,)})


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(MODEL)


@pytest.fixture(scope="module")
def digits():
    return dmlbench.load_dataset("digits")


@pytest.fixture(scope="module")
def done(model, digits):
    return evaluate(model, digits, rules(1000), device="cpu")


# --- the bound -----------------------------------------------------------------------------------------


def plain_margins(e, scene):
    """The max-min over pairs, one pair at a time."""
    found = []
    for i in range(len(scene)):
        best = -math.inf
        for p in range(len(scene.gallery)):
            if not scene.same[i, p]:
                continue
            worst = math.inf
            for n in range(len(scene.gallery)):
                if scene.other[i, n]:
                    v = (scene.gallery.embeddings[p] - scene.gallery.embeddings[n]).double()
                    worst = min(worst, float(e[i].double() @ v / v.norm()))
            best = max(best, worst)
        found.append(math.nan if best == -math.inf else best)
    return np.array(found)


@pytest.mark.parametrize("space", ["N", "C"])
def test_margins_against_plain_loops(space) -> None:
    scene, moved = scene_of(space)
    groups = torch.arange(14)[:, None] % 3
    apart = replace(scene, groups=groups[:6], gallery=replace(scene.gallery, groups=groups))
    for known in (scene, apart):
        found = margins(0.7 * moved, known)
        np.testing.assert_allclose(found.numpy(), plain_margins(0.7 * moved, known), atol=1e-6)
    assert not np.allclose(margins(moved, scene), margins(moved, apart), equal_nan=True)


def test_a_query_without_positives_or_negatives_and_a_negative_that_is_the_positive() -> None:
    e = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)

    def found(labels, entries=e):
        scene = Scene(DISTANCES["N"], Gallery(entries, torch.tensor(labels)), entries[:1], torch.tensor(labels[:1]),
                      torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64))  # fmt: skip
        return float(margins(entries[:1], scene)[0])

    assert math.isnan(found([0, 1, 1])) and found([0, 0, 0]) == math.inf
    assert found([0, 0, 1], torch.stack([e[0], e[1], e[1]])) == 0.0  # a tie counts against the model
    radius = radii(np.array([np.nan, np.inf, 0.0]), np.array([0.9, 0.9, 0.9]), 0.25, 1000, 0.001, 10)
    assert np.isnan(radius[0]) and radius[1] == largest(0.25, 1000, 0.001, 10) and radius[2] == 0.0


class Halfspace(nn.Module):
    """Embeds as (1, 0) on one side of a plane and as (-1, 0) on the other."""

    def __init__(self, shape, offset):
        super().__init__()
        self.offset = offset
        self.register_buffer("normal", torch.linspace(-1.0, 2.0, math.prod(shape)))

    def forward(self, x):
        side = torch.where(x.flatten(1) @ self.normal > self.offset, 1.0, -1.0)
        return torch.stack([side, torch.zeros_like(side)], dim=1)


def test_on_a_plane_the_certificate_is_the_distance_to_it() -> None:
    """The smoothed embedding of sign(⟨w, x⟩ - c) is 2 Φ(t / σ) - 1 at distance t, and its answer flips at the plane."""
    shape, sigma, samples = (1, 2, 2), 0.3, 5_000
    images = torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))
    network = Halfspace(shape, 1.0)
    distance = (images.flatten(1) @ network.normal - 1.0) / network.normal.norm()
    labels = (distance > 0).long().numpy()
    data = RetrievalDataset("plane", "test", TensorImages(images), labels)
    subject = prepare(Embedder(network, shape), data, device="cpu")
    e = smoothed(subject.embedder, images, subject.rng(0), sigma, samples)
    wanted = 2 * norm.cdf(distance.double().numpy() / sigma) - 1
    np.testing.assert_allclose(e[:, 0].numpy(), wanted, atol=5 / math.sqrt(samples))
    margin = margins(e, subject.scene).numpy()
    np.testing.assert_allclose(margin, np.abs(wanted), atol=5 / math.sqrt(samples))
    found = radii(margin, e.norm(dim=1).numpy(), sigma, samples, 0.001, len(data))
    assert (found <= np.abs(distance.numpy())).all() and (found > 0).any()
    exact = sigma * norm.ppf((1 + np.abs(wanted)) / 2)
    np.testing.assert_allclose(exact, np.abs(distance.numpy()), rtol=1e-5)


def unit(draw, rows, dim):
    values = np.array(draw(st.lists(st.floats(-1, 1), min_size=rows * dim, max_size=rows * dim))).reshape(rows, dim)
    values[:, 0] += np.where(np.linalg.norm(values, axis=1) < 1e-3, 1.0, 0.0)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_it_is_never_smaller_than_the_bound_by_total_variation(data) -> None:
    """2 σ Φ⁻¹(1/2 + m/8), m the margin by which the nearest positive is nearer than the nearest negative."""
    entries = unit(data.draw, 8, 3)
    e = data.draw(st.floats(0.05, 1.0)) * unit(data.draw, 1, 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    scene = Scene(DISTANCES["N"], Gallery(torch.from_numpy(entries), labels), torch.from_numpy(e), torch.tensor([0]),
                  torch.tensor([-1]), torch.zeros(1, 0, dtype=torch.int64))  # fmt: skip
    distance = np.linalg.norm(entries - e, axis=1)
    m = distance[3:].min() - distance[:3].min()
    margin = float(margins(torch.from_numpy(e), scene)[0])
    ours = norm.ppf((1 + np.clip(margin, 0, 1)) / 2)
    theirs = 2 * norm.ppf(0.5 + max(m, 0.0) / 8)
    assert ours >= theirs - 1e-5


# --- its confidence ------------------------------------------------------------------------------------


def bernstein(variance, y):
    """How far a mean may be from its expectation by Pinelis' inequality for vectors that are at most 2 from it."""
    return 2 * y / 3 + math.sqrt((2 * y / 3) ** 2 + 2 * variance * y)


@given(st.floats(0, 1), st.integers(60, 10**6), st.floats(1e-6, 0.5), st.integers(1, 10**5))
@settings(max_examples=100, deadline=None)
def test_the_error_is_where_the_inequality_says_no_more(s, samples, alpha, queries) -> None:
    """By bisection: the largest error e that the variance it allows, 1 - (s - e)², still permits."""
    y = math.log(2 * queries / alpha) / samples
    found = float(errors(np.array([s]), samples, alpha, queries)[0])
    if found >= s:  # then nothing is proven, whatever it is
        assert s <= bernstein(1.0, y) + 1e-9
        return
    low, high = found, s
    assert bernstein(1 - (s - found) ** 2, y) == pytest.approx(found, rel=1e-6, abs=1e-9)
    for share in (0.01, 0.5, 1.0):
        more = low + share * (high - low)
        assert bernstein(1 - (s - more) ** 2, y) <= more + 1e-9


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
def test_it_covers(spread) -> None:
    """Of 3,000 means of 80 embeddings on a circle no more than alpha are farther off than the error where it proves anything."""
    rng, samples, alpha = np.random.default_rng(1), 80, 0.2
    angle = spread * rng.standard_normal((3000, samples))
    mean = np.stack([np.cos(angle), np.sin(angle)], axis=2).mean(1)
    truth = np.array([math.exp(-(spread**2) / 2), 0.0])
    length = np.linalg.norm(mean, axis=1)
    error = errors(length, samples, alpha, 1)
    assert (error < length).mean() > 0.99
    assert (np.linalg.norm(mean - truth, axis=1)[error < length] > error[error < length]).mean() <= alpha


def test_an_embedding_that_is_seldom_another_is_covered() -> None:
    """Rare events are what samples miss."""
    rng, samples, alpha, rare = np.random.default_rng(2), 100, 0.1, 0.005
    hits = rng.binomial(samples, rare, 20_000) / samples
    mean, truth = np.stack([1 - hits, hits], axis=1), np.array([1 - rare, rare])
    error = errors(np.linalg.norm(mean, axis=1), samples, alpha, 1)
    assert (np.linalg.norm(mean - truth, axis=1) > error).mean() <= alpha


@pytest.mark.parametrize(("alpha", "queries"), [(0.001, 500), (0.5, 1), (1e-9, 10**6)])
def test_the_fewest_samples_are_those_that_prove_anything(alpha, queries) -> None:
    least = fewest(alpha, queries)
    assert errors(np.ones(1), least, alpha, queries)[0] < 1 <= errors(np.ones(1), least - 1, alpha, queries)[0]
    assert largest(0.25, least, alpha, queries) > 0


def test_a_radius_that_the_samples_cannot_prove_is_refused_before_the_run(digits) -> None:
    most = largest(0.25, 200, 0.9, 24)
    record.require(rules(radius=0.99 * most), digits, 0)
    with pytest.raises(
        UsageError, match=r"radius 0\.\d+ is beyond what 200 samples at sigma 0\.25 can prove of 24 queries"
    ):
        record.require(rules(radius=most), digits, 0)


def test_a_change_as_long_as_the_radius_is_not_certified() -> None:
    """It may bring about a tie, which is wrong; and a margin of 0 is one."""
    radius = np.array([0.5, np.nextafter(0.5, 1), np.nextafter(0.5, 0), np.inf, 0.0, np.nan])
    np.testing.assert_array_equal(within(radius, 0.5), [0, 100, 0, 100, 0, np.nan])
    np.testing.assert_array_equal(right(np.array([1e-300, 0.0, -1e-300, np.nan])), [100, 0, 0, np.nan])
    np.testing.assert_array_equal(
        lipschitz.proven(np.array([1.0, np.nextafter(1, 2), np.nan]), 2.0, 0.5), [0, 100, np.nan]
    )


# --- a run ---------------------------------------------------------------------------------------------


def test_the_numbers_follow_from_the_queries(done, model, digits) -> None:
    said, radius = done.extras["certified"], done.arrays[RADIUS]
    subject = prepare(model, digits, limit=24, device="cpu")
    e = smoothed(subject.embedder, subject.images(0, 24), subject.rng(0, "certified"), 0.25, 1000)
    margin = plain_margins(e[:1], subject[:1].scene)
    np.testing.assert_allclose(done.arrays[MARGIN][:1], margin, atol=1e-6)
    y = math.log(2 * 24 / 0.9) / 1000
    s = float(e[0].norm())
    error = found = 1.0
    for _ in range(200):
        error = bernstein(1 - max(0.0, s - error) ** 2, y)
    found = 0.25 * norm.ppf(max(0.5, (1 + margin[0] - error) / 2))
    assert radius[0] == pytest.approx(found, abs=1e-7) and (radius > 0).any()
    assert said["recall_at_1"] == pytest.approx(100 * np.mean(radius > 0.005))
    assert said["abstained"] == int((radius == 0).sum()) and said["average"] == pytest.approx(radius.mean())
    assert said["median"] == pytest.approx(np.sort(radius)[11]) and said["certified"] <= said["smoothed"]
    sizes = [float(size) for size in load_protocol("certified").grid["8"]]
    assert [row["recall_at_1"] for row in said["curve"]] == pytest.approx([100 * np.mean(radius > s) for s in sizes])
    given = numbers_of(done)
    for name, values in record.by_query(done).items():
        assert given[name] == pytest.approx(
            np.median(values) if name == "certified_radius" else values.mean(), abs=2e-3
        )


def test_the_row_ranks_by_it(done) -> None:
    row = from_evaluation(done)
    low, high = row.interval
    assert row.ers is None and row.headline == pytest.approx(numbers_of(done)["certified_recall_at_1"], abs=1e-3)
    assert low <= row.headline <= high and row.certified_radius_hi >= row.certified_radius
    assert (
        row.eps == pytest.approx(0.16) and record.curve(done).points[0].value == done.extras["certified"]["certified"]
    )


def test_neither_batch_nor_limit_matter(done, model, digits) -> None:
    few = evaluate(model, digits, rules(1000), limit=6, batch_size=5, device="cpu")
    at = np.searchsorted(done.arrays["query"], few.arrays["query"])
    for name in (MARGIN, LENGTH, RADIUS):
        np.testing.assert_allclose(few.arrays[name], done.arrays[name][at], atol=1e-6)
    assert few.extras["certified"]["queries"] == 24


def test_shards_and_a_resume_give_the_same_bytes(model, digits, tmp_path) -> None:
    short = rules(60, 12)
    whole = evaluate(model, digits, short, batch_size=4, device="cpu")
    folders = [tmp_path / f"{i}" for i in (1, 2)]
    for i, folder in enumerate(folders):
        with pytest.raises(ShardDone):
            evaluate(
                model,
                digits,
                short,
                batch_size=4,
                device="cpu",
                work=Work(Units(folder / "units"), shard=Shard(i + 1, 2)),
            )
    units = Units(tmp_path / "all" / "units")
    collect(folders, units)
    merged = evaluate(model, digits, short, batch_size=4, device="cpu", work=Work(units, gather=True))
    again = evaluate(
        model, digits, short, batch_size=4, device="cpu", resume=True, work=Work(Units(folders[0] / "units"))
    )
    for found in (merged, again):
        for name, values in whole.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], values)
        assert found.extras == whole.extras


def test_what_is_stored_is_looked_at_again(done, model, digits) -> None:
    rule = rules(1000)
    stated = Stated(done, rule, tuple(components(rule, (1, 8, 8))))
    subject = prepare(model, digits, limit=24, device="cpu")
    kept = StoredSample(subject, np.arange(24), subject.images(0, 24))
    record.CERTIFIED.form.model_validate(done.extras["certified"])
    assert not list(record.outcome_problems(stated)) and not list(record.number_problems(stated))
    assert not list(record.replay(stated, kept))

    def lie(arrays, sample=None):
        return Stated(done.model_copy().with_arrays(arrays, sample or {}), rule, stated.parts)

    shifted = {MARGIN: done.arrays[MARGIN] + 0.01}
    assert {RADIUS} < {p.field.removeprefix("run/per_query.npz ") for p in record.outcome_problems(lie(shifted))}
    assert any(MARGIN in p.field for p in record.replay(lie(shifted), kept))
    assert list(record.number_problems(lie({RADIUS: done.arrays[RADIUS] * 2})))
    assert list(record.outcome_problems(lie({"certified@0.005/value": 100 - done.arrays["certified@0.005/value"]})))
    assert list(record.outcome_problems(lie({MARGIN: done.arrays[LENGTH] + 0.1})))
    assert list(record.outcome_problems(lie({LENGTH: done.arrays[LENGTH] + 1})))
    bare = lie({})
    bare.evaluation._sample = {}
    for other in (lie({}, {CLEAN: done.sample[CLEAN] * 0.5}), bare):
        assert [p.field for p in record.replay(other, kept)] == [f"run/adversarial_sample.npz {CLEAN}"]


def test_a_bundle_passes_up_to_the_rerun(model, digits, tmp_path, monkeypatch) -> None:
    """All queries of a protocol with few samples, which stands in the place of the packaged one."""
    text = (FOLDER / "certified.toml").read_text().replace("samples = 10000", "samples = 400")
    path = tmp_path / "certified.toml"
    path.write_text(text.replace("alpha = 0.001", "alpha = 0.9").replace("queries = 500", "queries = 40"))
    monkeypatch.setitem(PROTOCOLS._entries, "certified", path)
    _packaged.cache_clear()
    try:
        save(evaluate(model, digits, "certified", device="cpu"), tmp_path / "run")
        said = draft(tmp_path / "run", checkpoints()[MODEL]).replace("license: FILL-IN", "license: MIT")
        (tmp_path / "submission.yaml").write_text(said.replace("FILL-IN", "A. Tester"))
        files = pack(tmp_path / "run", tmp_path / "submission.yaml", with_weights=False)
        write_folder(files, tmp_path / "bundle")
        report = validate(tmp_path / "bundle", 3, device="cpu", seed=0, share=0.0, least=8)
    finally:
        _packaged.cache_clear()
    assert report.status == "accepted" and report.passed == (0, 1, 2, 3), report.problems


def test_a_share_measured_again_agrees_and_a_lie_does_not(done, model, digits) -> None:
    rule = rules(1000)
    found = evaluate(
        model,
        digits,
        rule,
        only=[int(p) for p in np.flatnonzero(np.isin(digits.query, done.arrays["query"][::3]))],
        device="cpu",
    )
    at = np.searchsorted(done.arrays["query"], found.arrays["query"])
    parts = tuple(components(rule, (1, 8, 8)))
    assert not list(record.disagree(Stated(done, rule, parts), found, at, 3))
    for name in (MARGIN, LENGTH):
        told = Stated(done.model_copy().with_arrays({**done.arrays, name: done.arrays[name] + 0.01}), rule, parts)
        assert [p.field for p in record.disagree(told, found, at, 3)] == [f"run/per_query.npz {name}"]


def test_the_search_breaks_far_beyond_a_certificate_and_not_within(done, tmp_path, capsys) -> None:
    save(done, tmp_path / "run")
    certified_attack.BEYOND = 2
    assert (
        certified_attack.main(
            [str(tmp_path / "run"), "--limit", "2", "--factors", "1,200", "--out", str(tmp_path / "t.md")]
        )
        == 0
    )
    assert "broken within their certified radius: 0 of 2" in capsys.readouterr().out
    assert "0 of 2 | 2 of 2 |" in (tmp_path / "t.md").read_text()


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sigma = 0.25", "sigma = 0", "[settings] sigma"),
        ("sigma = 0.25", "sigma = -0.25", "[settings] sigma"),
        ("sigma = 0.25", "sigma = inf", "[settings] sigma"),
        ("samples = 10000", "samples = 10.5", "[settings] samples"),
        ("alpha = 0.001", "alpha = 1", "[settings] alpha"),
        ("radius = 0.02", "", "[settings] radius"),
        ("radius = 0.02", "radius = 0.02\nclip = true", "[settings] clip"),
        ('norm = "l2"', 'norm = "linf"', "proves L2 radii"),
        ('norm = "l2"', 'norm = "l2"\nsteps = 8', "steps does nothing"),
    ],
)  # fmt: skip
def test_a_protocol_that_proves_nothing_is_refused(tmp_path, old, new, words) -> None:
    text = (FOLDER / "certified.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(DataError) as error:
        read_protocol(tmp_path / "mine.toml")
    assert words in str(error.value)


def test_too_few_samples_are_refused_before_anything_is_embedded(model, digits) -> None:
    least = fewest(0.001, 500)
    short = load_protocol("certified")
    short = short.model_copy(update={"settings": {**short.settings, "samples": least - 1}})
    with pytest.raises(UsageError, match=f"it takes {least} at the least"):
        evaluate(model, digits, short, limit=2, device="cpu")


def test_settings_are_typed() -> None:
    assert Settings.of(load_protocol("certified")).samples == 10_000


def test_as_a_user_types_it(typed, tmp_path) -> None:
    text = (FOLDER / "certified.toml").read_text()
    text = text.replace("samples = 10000", "samples = 400").replace('name = "certified"', 'name = "mine"')
    (tmp_path / "mine.toml").write_text(
        text.replace("alpha = 0.001", "alpha = 0.9").replace("queries = 500", "queries = 8")
    )
    names = (MODEL, "digits-smallcnn-triplet-none")
    for name in names:
        out = typed("evaluate", "--model", name, "--protocol", "mine.toml", "--out", name, "--device", "cpu").out
        assert "certified R@1" in out and "abstained" in out and "under attack" not in out
    typed("report", *names, "--out", "report.html")
    assert (
        "certified_recall_at_1"
        in typed("compare", names[0], names[1], "--protocol", "mine.toml", "--json", code=None).out
    )
    assert "smoothing" in typed("evaluate", "--model", MODEL, "--protocol", "certified", "--plan").out
    (tmp_path / "raw.py").write_text(RAW)
    wrong = typed("evaluate", "--model", "python:raw.py:raw", "--dataset", "digits", "--protocol", "certified", code=2)
    assert [line for line in wrong.err.splitlines() if "needs embeddings of unit length" in line] == [
        wrong.err.splitlines()[-1]
    ]


RAW = """
from torch import nn

from dmlbench.embedding import DISTANCES, Embedder


def raw():
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), (1, 8, 8), distance=DISTANCES["E"])
"""

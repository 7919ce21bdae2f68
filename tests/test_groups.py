"""Entries that do not count for an image: metrics, targets, objectives, read-outs, sweeps, strict and clustering."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import average, distance, order, relu, to_all

from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES
from dmlbench.errors import DataError, UsageError
from dmlbench.fast.sweep import extreme_entries, nearest_entries, query_hinge
from dmlbench.metrics import READOUTS, retrieval
from dmlbench.objectives import OBJECTIVES
from dmlbench.protocols import load_protocol
from dmlbench.rng import Rng
from dmlbench.run.subject import prepare
from dmlbench.scene import Gallery, Scene
from dmlbench.targets import TARGETS

B = 8


def scene_of(space: str, seed: int = 0, n: int = 40, k: int = 2, d: int = 5, rough: bool = False) -> Scene:
    """Images 0 to 7 of a gallery of five classes; most entries have a group of their class, a few one across classes."""
    rng = np.random.default_rng(seed)
    x = DISTANCES[space].finish(torch.from_numpy(rng.normal(size=(n, d)).astype(np.float32)))
    y = torch.arange(n) % 5
    camera = torch.where(torch.from_numpy(rng.random(n) < 0.8), 3 * y + torch.from_numpy(rng.integers(3, size=n)), -1)
    copies = torch.from_numpy(np.where(rng.random(n) < 0.3, rng.integers(4, size=n), -1))
    groups = torch.stack([camera, copies], 1)
    gallery = Gallery(x, y, rough, groups=groups)
    scene = Scene(DISTANCES[space], gallery, x[:B], y[:B], torch.arange(B), torch.zeros(B, 0).long(), groups[:B])
    return scene.aimed(TARGETS["anywhere"](scene, k, Rng(seed, scene.row)))


def moved(scene: Scene, seed: int = 1) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng([seed, 1]).normal(size=scene.clean.shape).astype(np.float32))
    return scene.distance.finish(scene.clean + 0.4 * noise)


def together(scene: Scene, i: int, j: int) -> bool:
    """Do entries i and j share a group?"""
    a, b = scene.gallery.groups[i].tolist(), scene.gallery.groups[j].tolist()
    return any(p == q and p >= 0 for p, q in zip(a, b, strict=True))


def counting(scene: Scene, i: int) -> list[int]:
    """Entries that count for entry i, itself among them."""
    return [j for j in range(len(scene.gallery)) if j == i or not together(scene, i, j)]


def numbers(scene: Scene) -> tuple[np.ndarray, list[int]]:
    return scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()


def query_rank(s, i, e, X, y, chosen, scene, sign=None):
    d, kept = to_all(s, e, X), counting(scene, i)
    if sign is None:
        return average([100.0 * sum(d[c] > d[j] for j in kept) / len(kept) for c in chosen])
    return average([relu(sign * (d[c] - d[j])) for c in chosen for j in kept])


def candidate_rank(s, i, e, X, y, chosen, scene, sign=None):
    values = []
    for q in chosen:
        kept, mine, d = counting(scene, q), distance(s, X[q], e), to_all(s, X[q], X)
        d[q] = 0.0
        if sign is None:
            values.append(100.0 * sum(mine > d[j] for j in kept) / len(kept))
        else:
            values.append(average([relu(sign * (mine - d[j])) for j in kept]))
    return average(values)


def ranking(s, i, e, X, scene):
    d, kept = to_all(s, e, X), set(counting(scene, i))
    return [j for j in order(d, i) if j in kept], d


def recall(s, i, e, X, y, chosen, scene):
    listed, _ = ranking(s, i, e, X, scene)
    return 100.0 * (y[listed[0]] == y[i]) if any(y[j] == y[i] for j in listed) else np.nan


def kept_in_top_4(s, i, e, X, y, chosen, scene):
    listed, _ = ranking(s, i, e, X, scene)
    return 100.0 * (chosen[0] in listed[:4])


def ends(s, i, e, X, y, scene, own):
    """Distances to the negatives and to the positives that count, the own entry among the latter if ``own``."""
    listed, d = ranking(s, i, e, X, scene)
    far = [d[j] for j in listed if y[j] != y[i]]
    near = [d[j] for j in listed if y[j] == y[i]] + ([d[i]] if own else [])
    return far, near


def spread(own):
    def loss(s, i, e, X, y, chosen, scene):
        far, near = ends(s, i, e, X, y, scene, own)
        return relu(max(far) - min(near)) if far and near else 0.0

    return loss


def margin(s, i, e, X, y, chosen, scene):
    far, near = ends(s, i, e, X, y, scene, own=False)
    return (min(far) if far else np.inf) - (min(near) if near else np.inf)


OBJECTIVE_TWINS = {
    "raise_in_query": lambda *a: query_rank(*a, sign=1),
    "lower_in_query": lambda *a: query_rank(*a, sign=-1),
    "raise_candidate": lambda *a: candidate_rank(*a, sign=1),
    "lower_candidate": lambda *a: candidate_rank(*a, sign=-1),
    "spread": spread(False),
    "spread_published": spread(True),
    "margin": margin,
}
READOUT_TWINS = {
    "recall_at_1": recall,
    "rank_in_query": query_rank,
    "candidate_rank": candidate_rank,
    "kept_in_top_4": kept_in_top_4,
}


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("table", [OBJECTIVE_TWINS, READOUT_TWINS], ids=["objective", "readout"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3]))
def test_objectives_and_readouts_are_those_of_plain_loops(space: str, table, seed: int, k: int) -> None:  # type: ignore[no-untyped-def]
    scene = scene_of(space, seed, k=k)
    e, (X, y) = moved(scene, seed), numbers(scene)
    for name, twin in table.items():
        aimed = scene.aimed(TARGETS["nearest"](scene, k, Rng(0, scene.row))) if name == "kept_in_top_4" else scene
        found = READOUTS[name].read(e, aimed) if table is READOUT_TWINS else OBJECTIVES[name](e, aimed)
        wanted = [twin(space, i, e[i].double().numpy(), X, y, aimed.chosen[i].tolist(), aimed) for i in range(B)]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4, err_msg=name)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), space=st.sampled_from(list(DISTANCES)))
def test_clean_metrics_are_those_of_the_plain_loop(seed: int, space: str) -> None:
    scene = scene_of(space, seed)
    found, (X, y) = retrieval(scene), numbers(scene)
    for i in range(B):
        listed, _ = ranking(space, i, X[i], X, scene)
        right = [y[j] == y[i] for j in listed]
        positives = sum(right)
        if not positives:
            assert all(np.isnan(values[i]) for values in found.values())
            continue
        precision = [sum(right[: r + 1]) / (r + 1) for r in range(len(right))]
        for k in (1, 2, 4, 8):
            assert found[f"recall_at_{k}"][i] == 100.0 * any(right[:k])
        hits = [p for p, hit in zip(precision, right, strict=True) if hit]
        assert found["map"][i] == pytest.approx(100 * sum(hits) / positives, abs=1e-3)
        early = [p for p, hit in zip(precision[:positives], right, strict=False) if hit]
        assert found["map_at_r"][i] == pytest.approx(100 * sum(early) / positives, abs=1e-3)


@pytest.mark.parametrize("space", list(DISTANCES))
def test_what_re_identification_reads_is_that_of_the_plain_loop(space: str) -> None:
    """CMC at ranks 5 and 10, and mINP: positives / the rank of the last of them."""
    scene = scene_of(space, 8)
    found, (X, y) = retrieval(scene, grouped=True), numbers(scene)
    assert set(found) - set(retrieval(scene)) == {"recall_at_5", "recall_at_10", "minp"}
    some = 0
    for i in range(B):
        listed, _ = ranking(space, i, X[i], X, scene)
        ranks = [r for r, j in enumerate(listed, 1) if y[j] == y[i]]
        if not ranks:
            assert np.isnan(found["minp"][i])
            continue
        some += 1
        assert found["minp"][i] == pytest.approx(100 * len(ranks) / ranks[-1], abs=1e-3)
        for k in (5, 10):
            assert found[f"recall_at_{k}"][i] == 100.0 * (ranks[0] <= k)
    assert some


@pytest.mark.parametrize("space", list(DISTANCES))
def test_targets_are_entries_that_count(space: str) -> None:
    scene = scene_of(space, 3, n=330)
    X, y = numbers(scene)
    rng = Rng(0, scene.row)
    found = {name: TARGETS[name](scene, 2, rng) for name in TARGETS if name != "nearest_other_published"}
    many = TARGETS["anywhere"](scene, 4000, rng)
    for i in range(B):
        listed, _ = ranking(space, i, X[i], X, scene)
        head = int(0.01 * len(counting(scene, i)))
        assert set(many[i].tolist()) == set(counting(scene, i)), "uniform over all that count, the own entry too"
        assert found["nearest"][i].tolist() == listed[:2]
        assert found["nearest_other"][i].tolist() == [j for j in listed if y[j] != y[i]][:2]
        assert found["nearest_same"][i].tolist() == ([j for j in listed if y[j] == y[i]])[:2]
        assert set(found["top_percent"][i].tolist()) <= set(listed[:head]), head
        wrong = {}
        for j in listed:
            if y[j] != y[i]:
                wrong.setdefault(y[j], j)
        assert found["nearest_classes"][i].tolist() == list(wrong.values())[:2]
    assert all(scene.ignored.gather(1, rows[:, :2]).sum() == 0 for rows in found.values())


def test_the_published_gtm_target_leaves_them_out_of_its_list() -> None:
    scene = scene_of("N", 5, n=60)
    X, y = numbers(scene)
    found = TARGETS["nearest_other_published"](scene, 1, Rng(0, scene.row))[:, 0].tolist()
    for i in range(B):
        listed, _ = ranking("N", i, X[i], X, scene)
        others = [j for j in counting(scene, i) if y[j] != y[listed[0]]]
        assert found[i] == others.index(next(j for j in listed if y[j] != y[listed[0]]))


def test_a_head_is_counted_over_what_counts() -> None:
    scene = scene_of("N", 0, n=120)
    everything = replace(scene.gallery, groups=torch.zeros(120, 1).long())
    alone = replace(scene, gallery=everything, groups=torch.zeros(B, 1).long())
    with pytest.raises(UsageError, match="a gallery of 1 entries has no top 1 %"):
        TARGETS["top_percent"](alone, 1, Rng(0, alone.row))
    TARGETS["top_percent"](replace(scene, groups=None), 1, Rng(0, scene.row))


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_a_rounded_gallery_leaves_them_out_too(space: str, sign: float, k: int) -> None:
    scene = scene_of(space, 7, n=2000, k=k, d=64, rough=True)
    exact = replace(scene, gallery=replace(scene.gallery, rough=False))
    e = moved(scene).requires_grad_()
    (rough,), (true,) = (torch.autograd.grad(query_hinge(e, s, sign).sum(), e) for s in (scene, exact))
    for i in range(B):
        nothing = replace(exact, groups=None)[i : i + 1]
        kept = torch.tensor(counting(scene, i))
        few = replace(
            nothing,
            gallery=Gallery(scene.gallery.embeddings[kept], scene.gallery.labels[kept]),
            chosen=torch.searchsorted(kept, scene.chosen[i : i + 1]),
        )
        value = query_hinge(e[i : i + 1], few, sign)
        (gradient,) = torch.autograd.grad(value.sum(), e)
        torch.testing.assert_close(true[i], gradient[i], rtol=1e-4, atol=1e-5)
        assert float(torch.nn.functional.cosine_similarity(rough[i], gradient[i], dim=0)) > 0.99


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("space", list(DISTANCES))
def test_the_entries_that_searches_look_up_count(space: str, rough: bool) -> None:
    scene = scene_of(space, 11, n=300, d=16)
    scene = scene.aimed(TARGETS["nearest_other"](scene, 1, Rng(0, scene.row)))
    e, (X, y) = moved(scene), numbers(scene)
    positive, negative, of_target = nearest_entries(e, scene, aimed=True)
    gallery = replace(scene.gallery, rough=rough)
    farthest, nearest = extreme_entries(e, replace(scene, gallery=gallery), scene.positive_rows)
    for i in range(B):
        listed, _ = ranking(space, i, e[i].double().numpy(), X, scene)
        same, other = [j for j in listed if y[j] == y[i]], [j for j in listed if y[j] != y[i]]
        assert positive[i] == same[0] and negative[i] == other[0]
        assert of_target[i] == next(j for j in listed if y[j] == y[int(scene.chosen[i, 0])])
        if rough:  # which of two that are nearly as far is chosen may differ
            assert int(farthest[i]) in other[-20:] and int(nearest[i]) in same[:20]
        else:
            assert farthest[i] == other[-1] and nearest[i] == same[0]


def test_nothing_changes_to_the_bit_where_no_group_is_shared() -> None:
    for space in DISTANCES:
        grouped = scene_of(space, 2, k=3)
        plain = replace(grouped, groups=None, gallery=replace(grouped.gallery, groups=None))
        alone = replace(
            plain, groups=torch.full((B, 1), -1), gallery=replace(plain.gallery, groups=torch.arange(40)[:, None])
        )
        e = moved(plain)
        for name, objective in OBJECTIVES.items():
            if name in ("raise_and_keep", "lower_and_keep"):
                continue  # need more targets
            aimed = [s.aimed(plain.chosen[:, :1]) if name == "margin_to_class" else s for s in (plain, alone)]
            assert torch.equal(*(objective(e, s) for s in aimed)), name
        for name, values in retrieval(plain).items():
            np.testing.assert_array_equal(values, retrieval(alone)[name])


def images_of(n: int, side: int = 8) -> TensorImages:
    return TensorImages(torch.from_numpy(np.random.default_rng(0).random((n, 1, side, side)).astype(np.float32)))


def test_a_data_set_tells_what_does_not_count() -> None:
    images = images_of(6)
    twins = TensorImages(torch.cat([images.tensor, images.tensor[:2]]))  # rows 6 and 7 are rows 0 and 1 again
    y = np.array([0, 0, 1, 1, 0, 1, 0, 0])
    asks, searched = np.arange(3), np.arange(3, 8)
    data = RetrievalDataset("mine", "test", twins, y, query=asks, gallery=searched)
    assert data.apart is not None and data.apart.shape == (8, 1)
    assert data.apart[0] == data.apart[6] >= 0 and data.apart[1] == data.apart[7] >= 0 and data.apart[2] == -1
    published = replace(data, copies_count=True)
    assert published.apart is None and published.sha256 != data.sha256
    assert RetrievalDataset("mine", "test", images, y[:6]).apart is None, "one's own entry is no copy"
    assert RetrievalDataset("mine", "test", twins, y).apart is not None
    only = RetrievalDataset("mine", "test", twins, y, query=np.array([2]), gallery=np.arange(8))
    assert only.apart is None, "copies among the gallery are no answer to themselves"
    cameras = replace(data, groups=np.array([5, 5, 6, 5, 6, 6, -1, -1]))
    assert cameras.apart is not None and cameras.apart.shape == (8, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.array([0, 0, 1, -3])}, "a label is -3"),
        ({"groups": np.zeros(3)}, r"4 images but groups of shape \(3, 1\)"),
        ({"groups": np.array([0.5, 0, 0, 0])}, "groups must be whole numbers"),
        ({"labels": -np.ones(4)}, "has no query image of a class"),
        ({"query": np.array([3]), "labels": np.array([0, 0, 1, -2])}, "has no query image of a class"),
    ],
)
def test_labels_and_groups_that_mean_nothing(change: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RetrievalDataset("mine", "test", images_of(4), **{"labels": np.array([0, 0, 1, 1]), **change})


def net() -> torch.nn.Module:
    import dmlbench

    torch.manual_seed(0)
    return dmlbench.load_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8)), input_shape=(1, 8, 8))


def test_junk_counts_for_nobody_and_a_distractor_is_wrong_for_everyone() -> None:
    y = np.array([0, 0, 1, 1, -1, -1, -2, -2, -2, 0, 1, 1])
    data = RetrievalDataset("mine", "test", images_of(12), y)
    assert data.query.tolist() == [0, 1, 2, 3, 9, 10, 11] and data.gallery.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    subject = prepare(net(), data)  # type: ignore[arg-type]
    e = subject.scene.gallery.embeddings.double().numpy()
    found = retrieval(subject.scene)["recall_at_1"]
    for i, row in enumerate(data.query):
        place = data.gallery.tolist().index(row)
        d = to_all("N", e[place], e)
        best = order(d, place)[0]
        assert found[i] == 100.0 * (y[data.gallery[best]] == y[row])


def test_an_evaluation_with_groups_junk_and_distractors_end_to_end() -> None:
    """Every kind of protocol runs, and R@1 and the read-outs are those of a loop that leaves the entries out."""
    import dmlbench

    n = 240
    rng = np.random.default_rng(4)
    y = np.where(rng.random(n) < 0.1, -1, rng.integers(8, size=n))
    y = np.where(rng.random(n) < 0.1, -2, y)
    groups = np.where(y >= 0, 2 * y + rng.integers(2, size=n), -1)
    data = RetrievalDataset("mine", "test", images_of(n), y, groups=groups)
    model = net()
    result = dmlbench.evaluate(model, data, protocol="ers-digits", limit=40)  # type: ignore[arg-type]
    with torch.no_grad():
        e = model(data.images[np.arange(n)]).double().numpy()
    right = []
    for row in result.arrays["query"]:
        listed = [j for j in data.gallery if j != row and not (groups[j] == groups[row] >= 0)]
        best = min(listed, key=lambda j: ((e[j] - e[row]) ** 2).sum())
        right.append(100.0 * (y[best] == y[row]))
    np.testing.assert_array_equal(result.arrays["benign/recall_at_1"], right)
    assert {"recall_at_5", "recall_at_10", "minp"} <= set(result.benign) and result.benign["minp"] <= result.benign[
        "recall_at_10"
    ]
    alone = dmlbench.evaluate(
        model, replace(data, groups=np.full(n, -1)), protocol="ers-digits", limit=8, attacks=["MA-", "MA+"]
    )  # type: ignore[arg-type]
    assert "minp" not in alone.benign and "benign/recall_at_5" not in alone.arrays
    assert all(m.value is not None for m in result.measurements) and result.dataset.n_classes == 8
    push = load_protocol("clustering").model_copy(update={"attacks": ("C1",), "joint": None})
    for rules in (load_protocol("strict-fast"), push):
        other = dmlbench.evaluate(model, data, protocol=rules, limit=40)  # type: ignore[arg-type]
        assert "strict" in other.extras or "clustering" in other.extras
        if "strict" in other.extras:
            assert other.extras["strict"]["clean"] == pytest.approx(np.mean(right))
            continue
        rows = result.arrays["query"]
        alone = []
        for row in rows:
            listed = [j for j in rows if j != row and groups[j] != groups[row]]
            found = y[min(listed, key=lambda j: ((e[j] - e[row]) ** 2).sum())] == y[row]
            alone.append(100.0 * found if (y[listed] == y[row]).any() else np.nan)
        np.testing.assert_array_equal(other.arrays["clustering/clean/value"], alone)


CAMERAS = """
from dataclasses import replace
import numpy as np
from dmlbench.datasets.digits import digits

def cameras(split):
    data = digits("test")
    return replace(data, groups=2 * data.labels + np.arange(len(data)) % 2)
"""


def test_cameras_as_a_user_types_them(typed, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine.py").write_text(CAMERAS)
    model = ("--model", "digits-smallcnn-triplet-none", "--attacks", "MA-,MA+", "--limit", "12")
    out = typed("evaluate", *model, "--dataset", "python:mine.py:cameras", "--out", "cameras").out
    assert "mINP" in out and "R@10" in out and "MA-@pgd:recall_at_1" in out
    assert "mINP" not in typed("evaluate", *model, "--out", "plain").out
    assert "minp" in typed("compare", "cameras", "cameras").out
    for run, there in (("cameras", True), ("plain", False)):
        typed("report", run, "--out", f"{run}.html")
        assert ("mINP" in (tmp_path / f"{run}.html").read_text()) == there

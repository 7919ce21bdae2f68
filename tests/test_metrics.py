"""Every metric and read-out against a plain loop and against the field's libraries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import average, distance, order, to_all
from scenes import B, scene_of

from dmlbench.embedding import DISTANCES
from dmlbench.fast import ranking
from dmlbench.metrics import READOUTS, clustering, kmeans, mean, retrieval
from dmlbench.objectives import ahead
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene


def qa_rank(s, i, e, X, y, chosen):
    d = to_all(s, e, X)
    return average([100.0 * sum(d[c] > x for x in d) / len(d) for c in chosen])


def ca_rank(s, i, e, X, y, chosen):
    return average([100.0 * sum(distance(s, X[q], e) > x for x in to_all(s, X[q], X)) / len(X) for q in chosen])


PLAIN = {
    "recall_at_1": lambda s, i, e, X, y, c: 100.0 * (y[order(to_all(s, e, X), i)[0]] == y[i]),
    "candidate_rank": ca_rank,
    "rank_in_query": qa_rank,
    "target_cosine": lambda s, i, e, X, y, c: np.dot(e, X[c[0]]) / np.linalg.norm(e) / np.linalg.norm(X[c[0]]),
    "embedding_shift": lambda s, i, e, X, y, c: np.linalg.norm(e - X[i]) / np.sqrt((X**2).sum(1).mean()),
    "kept_in_top_4": lambda s, i, e, X, y, c: 100.0 * (c[0] in order(to_all(s, e, X), i)[:4]),
}


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("name", list(PLAIN))
@pytest.mark.parametrize("seed", range(3))
def test_readout_is_that_of_the_plain_loop(name: str, space: str, seed: int) -> None:
    scene, moved = scene_of(space, seed=seed)
    chosen = (scene.chosen + (scene.chosen == scene.row[:, None]).long()) % len(scene.gallery)  # nobody aims at itself
    scene = scene.aimed(chosen)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    found = READOUTS[name].read(moved, scene)
    expected = [PLAIN[name](space, i, moved[i].double().numpy(), X, y, chosen[i].tolist()) for i in range(B)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("nearer", range(5))
@pytest.mark.parametrize("ties", range(5))
def test_entries_as_near_as_the_target_push_it_out_of_the_top_4(space: str, nearer: int, ties: int) -> None:
    """On the axes, where distances tie exactly: the own entry, the target, what is nearer, what ties, and what is farther."""
    query, target, *tied = torch.eye(6)
    entries = [query, target, *[torch.tensor([0.8, 0.6, 0, 0, 0, 0])] * nearer, *tied[:ties], *[-query] * 4]
    X = torch.stack(entries)
    gallery, own = Gallery(X, torch.arange(len(X))), torch.zeros(1, dtype=torch.long)
    scene = Scene(DISTANCES[space], gallery, X[:1], own, own, own[:, None] + 1)
    d = to_all(space, query.double().numpy(), X.double().numpy())
    ahead = sum(d[j] <= d[1] for j in range(2, len(d)))
    assert ahead == nearer + ties
    assert READOUTS["kept_in_top_4"].read(X[:1], scene).tolist() == [100.0 * (ahead < 4)]


def population(seed: int, n: int = 90, classes: int = 9, spread: float = 1.0) -> Scene:
    rng = Rng(seed, torch.arange(n))
    y = torch.arange(n) % classes
    centres = Rng(seed + 1, torch.arange(classes)).normal(6)
    x = DISTANCES["N"].finish(centres[y] + spread * rng.normal(6))
    return Scene(DISTANCES["N"], Gallery(x, y), x, y, torch.arange(n), torch.zeros(n, 0, dtype=torch.long))


def test_retrieval_agrees_with_pytorch_metric_learning() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    scene = population(0)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    whole = AccuracyCalculator(include=("mean_average_precision",), k=len(scene) - 1, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(scene.clean, scene.labels)
    theirs_map = whole.get_accuracy(scene.clean, scene.labels)
    ours = {name: mean(values) for name, values in retrieval(scene).items()}
    assert ours["recall_at_1"] == pytest.approx(100 * theirs["precision_at_1"], abs=1e-3)
    assert ours["map_at_r"] == pytest.approx(100 * theirs["mean_average_precision_at_r"], abs=1e-3)
    assert ours["map"] == pytest.approx(100 * theirs_map["mean_average_precision"], abs=1e-3)


@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 3))
@settings(max_examples=15, deadline=None)
def test_retrieval_is_that_of_the_plain_loop(seed: int, spread: float) -> None:
    scene = population(seed, n=30, classes=4, spread=spread)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    found = retrieval(scene)
    for i in range(len(scene)):
        ranking = order(to_all("N", X[i], X), i)
        right = [y[j] == y[i] for j in ranking]
        precision = [sum(right[: r + 1]) / (r + 1) for r in range(len(right))]
        positives = sum(right)
        for k in (1, 2, 4, 8):
            assert found[f"recall_at_{k}"][i] == 100.0 * any(right[:k])
        at_hits = [p for p, hit in zip(precision, right, strict=True) if hit]
        assert found["map"][i] == pytest.approx(100 * sum(at_hits) / positives, abs=1e-3)
        early = [p for p, hit in zip(precision[:positives], right, strict=False) if hit]
        assert found["map_at_r"][i] == pytest.approx(100 * sum(early) / positives, abs=1e-3)
    assert mean(found["recall_at_1"]) <= mean(found["recall_at_2"]) <= mean(found["recall_at_8"])


def test_a_lonely_query_has_no_outcome_and_ties_count_against() -> None:
    scene = population(1)
    y = scene.labels.clone()
    y[4] = 77
    lonely = Scene(scene.distance, Gallery(scene.clean, y), scene.clean, y, scene.row, scene.chosen)
    found = retrieval(lonely)
    for values in found.values():
        assert np.flatnonzero(np.isnan(values)).tolist() == [4]
    assert mean(found["map"]) == pytest.approx(float(np.nanmean(found["map"])))
    constant = torch.ones_like(scene.clean)
    tied = Scene(scene.distance, Gallery(constant, scene.labels), constant, scene.labels, scene.row, scene.chosen)
    assert mean(retrieval(tied)["recall_at_1"]) == 0


@given(data=st.data(), queries=st.integers(1, 4), many=st.sampled_from([0, 64]))
def test_the_fast_ranking_counts_the_negatives_that_the_rule_of_ties_puts_ahead(data, queries, many) -> None:
    """Distances of 0 to 3, so that nearly all tie; queries in the gallery and not, entries that share a group left out."""
    labels = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=14))
    n = len(labels)
    row = torch.tensor(data.draw(st.lists(st.integers(-1, n - 1), min_size=queries, max_size=queries)))
    y = [labels[r] if r >= 0 else data.draw(st.integers(0, 2)) for r in row.tolist()]
    groups = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n))
    asking = None if groups is None else torch.tensor([[groups[r] if r >= 0 else 0] for r in row.tolist()])
    drawn = [data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in range(queries)]
    gallery = Gallery(
        torch.zeros(n, 2), torch.tensor(labels), groups=None if groups is None else torch.tensor(groups)[:, None]
    )
    clean, nobody = torch.zeros(queries, 2), torch.zeros(queries, 0, dtype=torch.long)
    scene = Scene(DISTANCES["E"], gallery, clean, torch.tensor(y), row, nobody, groups=asking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MANY", many)  # 0: every list is sorted
        counts, real = ranking.negatives_ahead(torch.tensor(drawn).float(), scene)
    for i, (d, label) in enumerate(zip(drawn, y, strict=True)):
        apart = [groups is not None and g == asking[i, 0] for g in groups or labels]
        kin = sorted(d[j] for j in range(n) if labels[j] == label and j != row[i] and not apart[j])
        others = np.array([d[j] for j in range(n) if labels[j] != label and not apart[j]])
        assert counts[i][real[i]].tolist() == [int(ahead(others, np.array(positive)).sum()) for positive in kin]


def test_clustering_finds_clusters_and_ami_is_zero_by_chance() -> None:
    tight = population(2, n=200, classes=5, spread=0.05)
    x, y = tight.clean.numpy(), tight.labels.numpy()
    each = [clustering(x, y, seeds=(seed,)) for seed in range(5)]
    assert max(e["nmi"] for e in each) > 99.9 and max(e["ami"] for e in each) > 99.9
    mean_of_all = clustering(x, y, seeds=range(5))
    assert mean_of_all["nmi"] == pytest.approx(np.mean([e["nmi"] for e in each]))
    shuffled = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 5))
    chance = clustering(x, shuffled, seeds=(0, 1, 2))
    assert chance["nmi"] > 35 and abs(chance["ami"]) < 8


def test_kmeans_is_deterministic_and_lowers_the_cost() -> None:
    x = population(3, n=300, classes=6, spread=0.6).clean.numpy()
    one, two = kmeans(x, 6, seed=4), kmeans(x, 6, seed=4)
    assert (one == two).all() and len(set(one.tolist())) == 6

    def cost(assigned: np.ndarray) -> float:
        return sum(float(((x[assigned == c] - x[assigned == c].mean(0)) ** 2).sum()) for c in set(assigned.tolist()))

    at_random = np.random.default_rng(0).integers(6, size=300)
    assert cost(one) < 0.8 * cost(at_random)
    for c in range(6):  # a fixed point of Lloyd's algorithm: everyone is nearest its own centre
        centres = np.stack([x[one == j].mean(0) for j in range(6)])
        nearest = ((x[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        assert (nearest[one == c] == c).mean() > 0.98

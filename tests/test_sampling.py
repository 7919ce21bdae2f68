"""Batches and triplets against plain loops over anchors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.embedding import DISTANCES
from dmlbench.errors import DataError, UsageError
from dmlbench.rng import Rng
from dmlbench.training.losses import MARGIN
from dmlbench.training.recipe import Recipe
from dmlbench.training.sampling import (
    CUTOFF,
    NONZERO,
    SAMPLINGS,
    Pairs,
    check_classes,
    class_batch,
    distance_weights,
    draw,
)


def scene(seed: int, classes: int = 4, per_class: int = 3, dim: int = 5):
    rng = Rng(seed, torch.arange(classes * per_class))
    labels = torch.arange(classes).repeat_interleave(per_class)
    e = torch.nn.functional.normalize(rng.normal(dim) + 2.0 * torch.eye(classes, dim)[labels], dim=1)
    return e, labels, DISTANCES["N"].pairwise(e, e)


def slow(name: str, d, labels, a: int, keys, dim: int, margin: float = MARGIN) -> tuple[int, int]:
    """One anchor at a time, as the papers describe it, on the same random keys."""
    b = len(labels)
    same = [j for j in range(b) if labels[j] == labels[a] and j != a]
    other = [j for j in range(b) if labels[j] != labels[a]]

    def best(rows, key):
        return max(rows, key=lambda j: key[j])

    if name == "R":
        return best(same, keys[0]), best(other, keys[1])
    if name == "H":
        return max(same, key=lambda j: d[a][j]), min(other, key=lambda j: d[a][j])
    if name == "S":
        far = [j for j in same if d[a][j] > min(d[a][k] for k in other)]
        near = [j for j in other if d[a][j] < max(d[a][k] for k in same)]
        return best(far or same, keys[0]), best(near or other, keys[1])
    p = best(same, keys[0])
    if name == "M":
        band = [j for j in other if d[a][p] < d[a][j] < d[a][p] + margin]
        return p, best(band or other, keys[1])
    weight = {}
    for j in [j for j in other if d[a][j] < NONZERO] or other:
        x = min(max(d[a][j], CUTOFF), 1.99)
        weight[j] = -((dim - 2) * math.log(x) + (dim - 3) / 2 * math.log(1 - x * x / 4)) - math.log(
            -math.log(keys[1][j])
        )
    return p, max(weight, key=weight.__getitem__)


@pytest.mark.parametrize("name", list(SAMPLINGS))
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_samplings_equal_plain_loops(name: str, seed: int) -> None:
    e, labels, d = scene(seed)
    anchors = torch.arange(0, len(labels), 2)
    rng = Rng(seed, torch.arange(len(anchors)))
    keys = Rng(seed, torch.arange(len(anchors))).uniform(2, len(labels))
    found = draw(name, d[anchors], labels, anchors, e.shape[1], rng)
    for i, a in enumerate(anchors.tolist()):
        expected = slow(name, d.tolist(), labels.tolist(), a, keys[i].tolist(), e.shape[1])
        assert tuple(found[i].tolist()) == (a, *expected)


@given(seed=st.integers(0, 2**32), margin=st.sampled_from([0.05, 0.2, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_band_of_semihard_is_as_wide_as_the_margin(seed: int, margin: float) -> None:
    e, labels, d = scene(seed)
    anchors = torch.arange(len(labels))
    keys = Rng(seed, anchors).uniform(2, len(labels))
    found = draw("M", d, labels, anchors, e.shape[1], Rng(seed, anchors), margin)
    for a in anchors.tolist():
        expected = slow("M", d.tolist(), labels.tolist(), a, keys[a].tolist(), e.shape[1], margin)
        assert tuple(found[a].tolist()) == (a, *expected)
    if margin == MARGIN:
        torch.testing.assert_close(draw("M", d, labels, anchors, e.shape[1], Rng(seed, anchors)), found, rtol=0, atol=0)


def test_random_choices_are_uniform() -> None:
    _, labels, d = scene(1, classes=3, per_class=3)
    anchors = torch.zeros(6000, dtype=torch.long)
    rows = draw("R", d[anchors], labels, anchors, 5, Rng(0, torch.arange(6000)))
    assert set(rows[:, 1].tolist()) == {1, 2} and set(rows[:, 2].tolist()) == set(range(3, 9))
    counts = torch.bincount(rows[:, 2], minlength=9)[3:]
    assert (counts - 1000).abs().max() < 150


def test_distance_weighted_draws_by_its_weights() -> None:
    _, labels, d = scene(7, classes=3, per_class=2)
    anchors = torch.zeros(20000, dtype=torch.long)
    pairs = Pairs.of(d[anchors], labels, anchors, 5)
    expected = distance_weights(pairs)[0].softmax(0)
    rows = draw("D", d[anchors], labels, anchors, 5, Rng(3, torch.arange(20000)))
    torch.testing.assert_close(torch.bincount(rows[:, 2], minlength=6) / 20000, expected, atol=0.015, rtol=0)


@given(
    counts=st.lists(st.integers(2, 9), min_size=2, max_size=6),
    groups=st.integers(2, 20),
    per_class=st.integers(2, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_class_batches(counts: list[int], groups: int, per_class: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    if min(counts) < per_class:
        with pytest.raises(DataError, match=f"needs {per_class} per class"):
            check_classes(labels, per_class)
        return
    check_classes(labels, per_class)
    rows = class_batch(labels, groups, per_class, np.random.default_rng(seed))
    classes = labels[rows].reshape(groups, per_class)
    assert (classes == classes[:, :1]).all()
    assert all(len(set(g)) == per_class for g in rows.reshape(groups, per_class).tolist())
    times = np.bincount(classes[:, 0], minlength=len(counts))
    assert times.max() - times.min() <= 1
    for c, n in enumerate(counts):
        used = rows[labels[rows] == c]
        assert len(set(used.tolist())) >= min(n // per_class * per_class, times[c] * per_class)


def test_batches_without_negatives_are_refused() -> None:
    with pytest.raises(DataError, match="no negatives"):
        check_classes(np.zeros(8, dtype=int), 2)
    for labels, groups in ((np.arange(8) // 2, 1), (np.zeros(8, dtype=int), 4)):
        with pytest.raises(DataError, match="no negatives"):
            class_batch(labels, groups, 2, np.random.default_rng(0))


def test_unknown_sampling() -> None:
    _, labels, d = scene(0)
    with pytest.raises(UsageError, match="unknown sampling 'X'"):
        draw("X", d, labels, torch.arange(12), 5, Rng(0, torch.arange(12)))


def test_a_recipe_has_a_margin_wherever_something_reads_it() -> None:
    given = {
        "id": "x",
        "dataset": "digits",
        "arch": "smallcnn",
        "loss": "contrastive",
        "defense": "robust",
        "margin": 0.4,
    }
    assert Recipe(**given).check().margin == 0.4  # robust mines semihard unless asked otherwise
    with pytest.raises(UsageError, match="margin is the triplet loss's"):
        Recipe(**given, defense_params={"sampling": "R"}).check()

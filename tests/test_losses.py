"""Losses against plain loops."""

import math

import pytest
import torch

from dmlbench.embedding import DISTANCES
from dmlbench.errors import UsageError
from dmlbench.rng import Rng
from dmlbench.training.losses import LOSSES, build_loss, contrastive, hardness, proxy_anchor_each, triplet


def embedded(space: str = "N", classes: int = 3, per_class: int = 2, dim: int = 4):
    labels = torch.arange(classes).repeat_interleave(per_class)
    return DISTANCES[space].finish(Rng(5, labels * 0 + torch.arange(len(labels))).normal(dim)), labels


def length(v) -> float:
    return math.sqrt(sum(x * x for x in v))


@pytest.mark.parametrize("space", ["N", "E"])
def test_triplet_and_contrastive_by_hand(space: str) -> None:
    e, _ = embedded(space)
    t = e.view(2, 3, -1)
    d = DISTANCES[space]
    hard = hardness(d, t)
    for i, (a, p, n) in enumerate(t.tolist()):
        ap = length(x - y for x, y in zip(a, p, strict=True))
        an = length(x - y for x, y in zip(a, n, strict=True))
        assert hard[i].item() == pytest.approx(ap - an, abs=1e-5)
        assert triplet(hard, 0.2)[i].item() == pytest.approx(max(0.0, ap - an + 0.2), abs=1e-5)
        found = contrastive(d.paired(*t.unbind(1)[:2]), d.paired(t[:, 0], t[:, 2]), 1.0)[i].item()
        assert found == pytest.approx(ap**2 + max(0.0, 1.0 - an) ** 2, abs=1e-5)


@pytest.mark.parametrize("space", list(DISTANCES))
def test_packaged_triplet_is_ours(space: str) -> None:
    """pytorch-metric-learning's triplet loss on mined triplets is the mean of our values."""
    e, labels = embedded(space)
    rows = torch.tensor([[0, 1, 2], [2, 3, 5], [4, 5, 1]])
    theirs = build_loss("triplet", 3, 4, DISTANCES[space], {"margin": 0.3})(e, labels, tuple(rows.unbind(1)))
    torch.testing.assert_close(theirs, triplet(hardness(DISTANCES[space], e[rows]), 0.3).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", list(DISTANCES))
def test_margins_of_the_packaged_contrastive_loss_are_distances(space: str) -> None:
    """Of the cosine space too, where the package takes similarities."""
    e, labels = embedded(space)
    d = DISTANCES[space].pairwise(e, e)
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(len(e), dtype=torch.bool)
    other = labels[:, None] != labels[None, :]
    expected = (d[same] - 0.1).relu().mean() + (0.9 - d[other]).relu().mean()
    found = build_loss("contrastive", 3, 4, DISTANCES[space], {"pos_margin": 0.1, "neg_margin": 0.9})(e, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_proxy_anchor_of_one_image_is_the_packaged_loss_of_that_batch() -> None:
    e, labels = embedded(classes=4)
    loss = build_loss("proxy-anchor", 4, 4, DISTANCES["N"], {})
    each = proxy_anchor_each(e, labels, loss.proxies)
    for i in range(len(e)):
        torch.testing.assert_close(each[i], loss(e[i : i + 1], labels[i : i + 1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("space", ["N", "C"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_descending_a_loss_separates_the_classes(name: str, space: str) -> None:
    """Every loss, minimised over free embeddings, draws classes together and apart from the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = build_loss(name, 3, 8, DISTANCES[space], {})
    labels = torch.arange(3).repeat_interleave(2)
    free = Rng(1, torch.arange(6)).normal(8).requires_grad_(True)
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(6, dtype=torch.bool)
    other = labels[:, None] != labels[None, :]

    def gap() -> float:
        e = DISTANCES[space].finish(free.detach())
        d = DISTANCES[space].pairwise(e, e)
        return float(d[other].mean() - d[same].mean())

    before = gap()
    optimizer = torch.optim.Adam([free, *loss.parameters()], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(DISTANCES[space].finish(free), labels).backward()
        optimizer.step()
    assert gap() > max(0.3, before + 0.2)


def test_unknown_loss_and_parameter() -> None:
    with pytest.raises(UsageError, match="did you mean 'triplet'"):
        build_loss("triplets", 3, 4, DISTANCES["N"], {})
    with pytest.raises(UsageError, match="nonsense"):
        build_loss("triplet", 3, 4, DISTANCES["N"], {"nonsense": 1})

"""Defences that perturb images, pairs or triplets to make the triplet loss hard.

none; EST and ACT (Zhou, Wang, Wang and Zheng: Adversarial attack and defense in deep ranking,
arXiv 2106.03614); Madry's min-max on triplets, which collapses (as reported in Zhou and Patel, CVPR
2022, arXiv 2203.01439); robust training by Panum et al. (arXiv 2102.07265); CA-TRIDE (ICML 2024,
arXiv 2312.07364).
"""

import torch
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.training.defenses.base import Batch, Inner, Learner, Miner, embed, search, triples
from dmlbench.training.losses import contrastive, hardness, triplet


def none(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R") -> Tensor:
    """Ordinary training: the loss on the clean batch."""
    return learner.outer(learner.embedder(batch.images), batch, sampling)


def noise(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R", sigma: float = 0.25) -> Tensor:
    """Noise training (Cohen, Rosenfeld and Kolter, ICML 2019): the loss on images + N(0, σ²) in every pixel, not clipped, so
    that the model is fed what a smoothed one is read from (:mod:`dmlbench.kinds.certified`)."""
    if not sigma > 0:
        raise UsageError(f"sigma {sigma} must be above 0")
    drawn = batch.stream("noise", batch.images).normal(*batch.images.shape[1:])
    return learner.outer(learner.embedder(batch.images + sigma * drawn), batch, sampling)


def est(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R") -> Tensor:
    """EST, embedding-shifted: every image is moved to maximise d(f(x~), f(x)); loss on the moved batch.

    The reference embedding is moved by 1e-7, so that the search does not start on a zero gradient.
    """
    reference = embed(learner, batch.images) + 1e-7
    moved = search(
        learner,
        batch,
        inner,
        batch.images,
        lambda x: -learner.embedder.distance.paired(learner.embedder(x), reference),
    )
    return learner.outer(learner.embedder(moved), batch, sampling)


def act(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R") -> Tensor:
    """ACT, anti-collapse triplet: positive and negative are drawn together, min d(f(p~), f(n~)); the
    anchor stays clean; triplet loss on (a, p~, n~)."""
    rows = Miner(learner, batch).triplets(sampling)
    t = len(rows)
    distance = learner.embedder.distance

    def together(x: Tensor) -> Tensor:
        positive, negative = learner.embedder(x).view(2, t, -1)
        return distance.paired(positive, negative).repeat(2)

    moved = search(learner, batch, inner, batch.images[rows[:, 1:].t().reshape(-1)], together)  # (2t, C, H, W)
    a, p, n = learner.embedder(torch.cat([batch.images[rows[:, 0]], moved])).view(3, t, -1)
    return triplet(hardness(distance, torch.stack([a, p, n], 1)), learner.margin).mean()


def min_max(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R") -> Tensor:
    """Madry's min-max: the whole triplet is perturbed to maximise the triplet loss itself, hinge
    included, then trained on. Known to collapse at the field's budgets."""
    rows = Miner(learner, batch).triplets(sampling)
    distance = learner.embedder.distance

    def gain(x: Tensor) -> Tensor:
        return -triplet(hardness(distance, triples(learner.embedder(x))), learner.margin).repeat_interleave(3)

    moved = search(learner, batch, inner, batch.images[rows.view(-1)], gain)
    return triplet(hardness(distance, triples(learner.embedder(moved))), learner.margin).mean()


ELEMENTS = ("a", "p", "n")


def robust(
    learner: Learner,
    batch: Batch,
    inner: Inner,
    *,
    sampling: str = "M",
    element: str = "p",
    attack_rate: float = 1.0,
    negative_margin: float = 1.0,
) -> Tensor:
    """Panum et al.: one element of each mined triplet is perturbed, with probability ``attack_rate``,
    against the fixed clean embeddings of the other two, from a random start.

    Args:
        element: "p" (raises d(a, p~)), "n" (lowers d(a, n~)) or "a" (raises d(a~, p) - d(a~, n)).
        attack_rate: share of triplets that are perturbed, in [0, 1].
        negative_margin: of the contrastive loss.

    The loss of the recipe, triplet or contrastive, is taken with that element replaced.

    Our reading: the search follows H, of which both losses are increasing functions, so that triplets
    inside the margin's hinge are perturbed too; mining is semihard by default.
    """
    if element not in ELEMENTS:
        raise UsageError(f"element {element!r} must be one of {', '.join(ELEMENTS)}")
    if not 0 <= attack_rate <= 1:
        raise UsageError(f"attack_rate {attack_rate} must lie in [0, 1]")
    which = ELEMENTS.index(element)
    miner = Miner(learner, batch)
    rows = miner.triplets(sampling)
    distance = learner.embedder.distance
    fixed = list(miner.embeddings[rows].unbind(1))

    def easier(x: Tensor) -> Tensor:
        parts = [*fixed[:which], learner.embedder(x), *fixed[which + 1 :]]
        return -hardness(distance, torch.stack(parts, 1))

    clean = batch.images[rows]  # (t, 3, C, H, W)
    random_start = Inner(inner.threat.but(start="random"), inner.optimizer)
    moved = search(learner, batch, random_start, clean[:, which], easier)
    attacked = batch.stream("attack_rate", rows).uniform() < attack_rate
    images = clean.clone()
    images[:, which] = torch.where(attacked.view(-1, 1, 1, 1), moved, clean[:, which])
    e = triples(learner.embedder(images.flatten(0, 1)))
    if learner.loss == "triplet":
        return triplet(hardness(distance, e), learner.margin).mean()
    a, p, n = e.unbind(1)
    return contrastive(distance.paired(a, p), distance.paired(a, n), negative_margin).mean()


def collapseness(hard: Tensor, temperature: float) -> Tensor:
    """(t,) in (0, 1): the softmax share of the positive distance against the negative one.

    0 where the classes are well apart, 1/2 where positive and negative are alike, as in a collapsed
    model, towards 1 where the negative is the nearer.
    """
    return torch.sigmoid(hard / temperature)


def ca_tride(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "S", temperature: float = 0.1) -> Tensor:
    """CA-TRIDE: even steps perturb the anchors, odd steps the candidates (positive and negative), to
    raise H; the perturbation is scaled by 1 - collapseness, so that triplets near collapse are
    attacked gently; triplet loss on the perturbed triplet.

    The paper's text was not at hand: the alternation by single steps, the temperature and scaling the
    finished perturbation (which stays inside the ball) are our reading of its abstract.
    """
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} must be above 0")
    miner = Miner(learner, batch)
    rows = miner.triplets(sampling)
    distance = learner.embedder.distance
    clean = batch.images[rows]  # (t, 3, C, H, W)
    fixed = miner.embeddings[rows]  # (t, 3, d)
    strength = 1.0 - collapseness(hardness(distance, fixed), temperature)  # (t,)
    part = slice(0, 1) if batch.iteration % 2 == 0 else slice(1, 3)
    source = clean[:, part].flatten(0, 1)
    count = part.stop - part.start

    def easier(x: Tensor) -> Tensor:
        e = learner.embedder(x).view(-1, count, fixed.shape[2])
        triplet = torch.cat([e, fixed[:, 1:]] if count == 1 else [fixed[:, :1], e], 1)
        return -hardness(distance, triplet).repeat_interleave(count)

    moved = search(learner, batch, inner, source, easier).view_as(clean[:, part])
    images = clean.clone()
    images[:, part] = clean[:, part] + strength.view(-1, 1, 1, 1, 1) * (moved - clean[:, part])
    e = triples(learner.embedder(images.flatten(0, 1)))
    return triplet(hardness(distance, e), learner.margin).mean()

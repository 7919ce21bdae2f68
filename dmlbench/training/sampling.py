"""Which images meet in a batch, and which of them form triplets.

:func:`class_batch` draws groups of images of one class (two per class is the field's "SPC-2"). A
:data:`Sampling` chooses, for each anchor of a batch, a positive and a negative: R random, M semihard,
S softhard, D distance-weighted, H hardest. Both work on whole batches; nothing loops over anchors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.errors import DataError, UsageError
from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.training.losses import MARGIN


def check_classes(labels: np.ndarray, per_class: int, name: str = "data set") -> None:
    """Refuse labels from which no group of ``per_class`` and no negative can be drawn.

    Raises:
        DataError: one class only, or a class with fewer than ``per_class`` images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"{name} has a single class: a batch of it would have no negatives")
    if counts.min() < per_class:
        short = int((counts < per_class).sum())
        first = int(classes[counts.argmin()])
        raise DataError(
            f"{name}: class {first} has {counts.min()} image{'s' * int(counts.min() != 1)} where the batch sampler "
            f"needs {per_class} per class ({short} such class{'es' * int(short != 1)})"
        )


def check_groups(labels: np.ndarray, groups: int, per_class: int) -> None:
    """Refuse as many groups as would need an image twice, which would be its own positive.

    Raises:
        UsageError: the smallest class runs out of images in a batch.
    """
    counts = np.unique(labels, return_counts=True)[1]
    most = len(counts) * (int(counts.min()) // per_class)
    if groups > most:
        raise UsageError(
            f"{groups} groups of {per_class} need an image twice in a batch: with {len(counts)} classes, the smallest "
            f"of {counts.min()} images, set groups to {most} or less"
        )


def class_batch(labels: np.ndarray, groups: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """(groups · per_class,) rows: groups of ``per_class`` distinct images of one class.

    Classes are dealt in a random order, again from the start when they run out; groups of one class
    share no image before all of its images have been used.

    Args:
        labels: (N,) that passed :func:`check_classes`.
        groups: number of groups, at least two, so that negatives exist.
        per_class: images in a group.

    Raises:
        DataError: a single group, or labels of a single class: a batch without negatives.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if groups < 2 or len(counts) < 2:
        raise DataError(f"a batch of {groups} group(s) from {len(counts)} class(es) has no negatives")
    order = np.lexsort((rng.random(len(labels)), inverse))  # each class's images, shuffled
    start = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rounds = -(-groups // len(counts))
    dealt = np.argsort(rng.random((rounds, len(counts))), axis=1).ravel()[:groups]  # class of each group
    turn = np.arange(groups) // len(counts)  # how often that class came before
    offset = turn[:, None] * per_class + np.arange(per_class)[None, :]  # (groups, per_class)
    rows: np.ndarray = order[start[dealt][:, None] + offset % counts[dealt][:, None]]
    return rows.ravel()


@dataclass(frozen=True)
class Pairs:
    """What a sampling looks at: t anchors against the b images of a batch.

    Attributes:
        d: (t, b) distances of each anchor to each image.
        same: (t, b) of the anchor's class, the anchor itself left out.
        other: (t, b) of another class.
        dim: dimension of the embeddings.
        margin: γ, by how much a semihard negative may be farther than the positive; a distance.
    """

    d: Float[Tensor, "t b"]
    same: Bool[Tensor, "t b"]
    other: Bool[Tensor, "t b"]
    dim: int
    margin: float = MARGIN

    @classmethod
    def of(
        cls,
        distances: Float[Tensor, "t b"],
        labels: Int[Tensor, " b"],
        anchors: Int[Tensor, " t"],
        dim: int,
        margin: float = MARGIN,
    ) -> "Pairs":
        """From distances of the anchors to the batch and the batch's labels."""
        same_class = labels[anchors][:, None] == labels[None, :]
        itself = anchors[:, None] == torch.arange(len(labels), device=labels.device)[None, :]
        return cls(distances, same_class & ~itself, ~same_class, dim, margin)


def pick(allowed: Bool[Tensor, "t b"], keys: Float[Tensor, "t b"]) -> Int[Tensor, " t"]:
    """In each row one allowed column, uniformly: the one with the largest random key."""
    return torch.where(allowed, keys, -1.0).argmax(1)


def prefer(preferred: Bool[Tensor, "t b"], otherwise: Bool[Tensor, "t b"]) -> Bool[Tensor, "t b"]:
    """``preferred`` where a row has any, else ``otherwise``."""
    return torch.where(preferred.any(1, keepdim=True), preferred, otherwise)


Keys = Float[Tensor, "2 t b"]
Choice = tuple[Int[Tensor, " t"], Int[Tensor, " t"]]


def random(pairs: Pairs, keys: Keys) -> Choice:
    """R: a positive and a negative, each uniform."""
    return pick(pairs.same, keys[0]), pick(pairs.other, keys[1])


def semihard(pairs: Pairs, keys: Keys) -> Choice:
    """M: a uniform positive; a uniform negative with d(a,p) < d(a,n) < d(a,p) + margin.

    FaceNet (Schroff et al., CVPR 2015). Where no negative lies in the band: any negative, uniformly
    (our reading; the papers do not say).
    """
    positive = pick(pairs.same, keys[0])
    near = pairs.d.gather(1, positive[:, None])
    band = pairs.other & (pairs.d > near) & (pairs.d < near + pairs.margin)
    return positive, pick(prefer(band, pairs.other), keys[1])


def softhard(pairs: Pairs, keys: Keys) -> Choice:
    """S: a uniform positive beyond the nearest negative, a uniform negative before the farthest positive.

    Roth et al., ICML 2020 (Revisiting training strategies in deep metric learning). Where there is
    none, any positive or any negative.
    """
    nearest = torch.where(pairs.other, pairs.d, torch.inf).amin(1, keepdim=True)
    farthest = torch.where(pairs.same, pairs.d, -torch.inf).amax(1, keepdim=True)
    positive = pick(prefer(pairs.same & (pairs.d > nearest), pairs.same), keys[0])
    negative = pick(prefer(pairs.other & (pairs.d < farthest), pairs.other), keys[1])
    return positive, negative


CUTOFF, NONZERO = 0.5, 1.4


def distance_weights(pairs: Pairs) -> Float[Tensor, "t b"]:
    """log of 1/q(d), q the density of distances on the sphere of dimension ``dim``; -inf where not allowed.

    Wu et al., ICCV 2017: d below 0.5 counts as 0.5, negatives beyond 1.4 are left out; where all are
    beyond, every negative counts.
    """
    d = pairs.d.clamp(CUTOFF, 1.99)
    log_q = (pairs.dim - 2.0) * d.log() + 0.5 * (pairs.dim - 3.0) * (1.0 - 0.25 * d.square()).log()
    return torch.where(prefer(pairs.other & (pairs.d < NONZERO), pairs.other), -log_q, -torch.inf)


def distance_weighted(pairs: Pairs, keys: Keys) -> Choice:
    """D: a uniform positive; a negative with probability proportional to 1/q(d) (Wu et al., ICCV 2017).

    Drawn by adding a Gumbel number, made from the uniform key, to each log weight.
    """
    gumbel = -(-keys[1].log()).log()
    return pick(pairs.same, keys[0]), (distance_weights(pairs) + gumbel).argmax(1)


def hardest(pairs: Pairs, keys: Keys) -> Choice:
    """H: the farthest positive and the nearest negative (Hermans et al., 2017, batch hard)."""
    return (
        torch.where(pairs.same, pairs.d, -torch.inf).argmax(1),
        torch.where(pairs.other, pairs.d, torch.inf).argmin(1),
    )


Sampling = Callable[[Pairs, Keys], Choice]

SAMPLINGS: Registry[Sampling] = Registry(
    "sampling", {"R": random, "M": semihard, "S": softhard, "D": distance_weighted, "H": hardest}
)


def draw(
    sampling: str,
    distances: Float[Tensor, "t b"],
    labels: Int[Tensor, " b"],
    anchors: Int[Tensor, " t"],
    dim: int,
    rng: Rng,
    margin: float = MARGIN,
) -> Int[Tensor, "t 3"]:
    """Triplets of batch rows (anchor, positive, negative), one for each anchor.

    Args:
        sampling: a name of :data:`SAMPLINGS`.
        distances: of each anchor to each image of the batch.
        labels: of the batch; every anchor must have a positive and a negative (:func:`check_classes`).
        anchors: rows of the batch.
        dim: dimension of the embeddings (used by D).
        rng: one stream per anchor.
        margin: γ of the recipe, a distance (used by M).
    """
    choose = SAMPLINGS[sampling]
    keys = rng.uniform(2, len(labels)).transpose(0, 1)  # (2, t, b)
    positive, negative = choose(Pairs.of(distances, labels, anchors, dim, margin), keys)
    return torch.stack([anchors, positive, negative], 1)

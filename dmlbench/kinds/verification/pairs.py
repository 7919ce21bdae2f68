"""Which pairs are verified, in which fold each is, and the threshold of a fold, fixed on the clean pairs of the others.

Every query is the probe of a genuine pair, with a picture of its class, and of an impostor pair, with one of another class of the same
fold; classes are dealt to folds. Where a file names pairs, each query is the probe of one. Everything is drawn by data set row and seed
alone, so it does not depend on which queries are measured.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import UsageError
from dmlbench.kinds import base
from dmlbench.protocol import Protocol
from dmlbench.rng import Rng, seed_of
from dmlbench.run.subject import measured_queries, unembedded

SIDES = ("dodging", "impersonation")
"""What is done to a genuine pair, which is to be pushed apart, and to an impostor pair, which is to be pulled together."""
BLOCK = 256
"""Queries that are drawn for at a time."""


class Settings(base.Settings):
    """``[settings]`` of a protocol."""

    folds: int = Field(10, ge=2)
    """parts that the classes are dealt to; fewer where a part would have a single class"""
    far: float | None = Field(None, gt=0, lt=1)
    """the threshold accepts at most this share of the other folds' impostors; None: it tells most of their pairs right"""
    largest: tuple[str, ...] = ()
    """steps that are run at the largest eps alone"""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pairs of queries.

    Attributes:
        partner: (Q, 2) the place in the gallery of what each query is compared with, by :data:`SIDES`; -1 where it has no such pair.
        other: (Q,) the place of an entry of another class, which a search by decisions may begin from.
        fold: (Q,) from 0.
    """

    partner: Int[np.ndarray, "Q 2"]
    other: Int[np.ndarray, " Q"]
    fold: Int[np.ndarray, " Q"]

    def at(self, positions: np.ndarray) -> "Drawn":
        """Those of some queries."""
        return Drawn(self.partner[positions], self.other[positions], self.fold[positions])


def folds_of_classes(dataset: RetrievalDataset, folds: int, seed: int) -> dict[int, int]:
    """The fold of each class, dealt in turn after a shuffle: at most so many that each has two classes.

    Raises:
        UsageError: there are fewer than four classes.
    """
    rows = np.union1d(dataset.query, dataset.gallery)
    classes = np.unique(dataset.labels[rows][dataset.labels[rows] >= 0])
    count = min(folds, len(classes) // 2)
    if count < 2:
        raise UsageError(
            f"data set {dataset.name!r} has {len(classes)} classes: two folds with impostors in each need four"
        )
    shuffled = np.random.default_rng(seed_of(seed, "folds")).permutation(classes)
    return {int(label): place % count for place, label in enumerate(shuffled)}


def drawn(dataset: RetrievalDataset, rules: Protocol, seed: int) -> Drawn:
    """The pairs of all queries that the protocol measures, in their order.

    Raises:
        UsageError: a fold's threshold cannot be fixed, since the others lack genuine or impostor pairs.
    """
    positions = measured_queries(len(dataset.query), rules.queries)
    pairs = dataset.pairs
    if pairs is not None and (pairs.fold >= 0).all():
        called, places = np.unique(pairs.fold, return_inverse=True)
        fold = places.reshape(-1)[positions]
        of_class: dict[int, int] = {}
    else:
        called = np.arange(Settings.of(rules).folds)
        of_class = folds_of_classes(dataset, Settings.of(rules).folds, seed)
        fold = np.array([of_class[int(label)] for label in dataset.labels[dataset.query[positions]]], dtype=np.int64)
    part_of = torch.tensor([of_class.get(int(label), -1) for label in dataset.labels[dataset.gallery]])
    blocks = [positions[a : a + BLOCK] for a in range(0, len(positions), BLOCK)]
    chosen = np.concatenate([_block(dataset, at, fold, positions, part_of, seed) for at in blocks])
    partner, other = chosen[:, :2], chosen[:, 2]
    if pairs is not None:
        named = dataset.positions[pairs.partner[positions]]
        genuine = dataset.labels[dataset.query[positions]] == dataset.labels[pairs.partner[positions]]
        partner = np.stack([np.where(genuine, named, -1), np.where(genuine, -1, named)], axis=1)
    pairs_drawn = Drawn(partner, np.where(partner[:, 1] >= 0, partner[:, 1], other), fold)
    _require_thresholds(pairs_drawn, called, f"data set {dataset.name!r}" if pairs is None else "the pairs of the file")
    return pairs_drawn


def _block(
    dataset: RetrievalDataset, at: np.ndarray, fold: np.ndarray, positions: np.ndarray, part_of: Tensor, seed: int
) -> Int[np.ndarray, "b 3"]:
    """Places in the gallery of a random positive, of a random entry of another class of the fold, and of any other class; -1: none."""
    scene = unembedded(dataset, at)
    rng = Rng(seed_of(seed, "pairs"), torch.from_numpy(dataset.query[at]))
    fold_of = torch.from_numpy(fold[np.searchsorted(positions, at)])
    choices = (scene.same, scene.other & (part_of[None, :] == fold_of[:, None]), scene.other)
    return torch.stack([_one_of(choice, rng) for choice in choices], dim=1).numpy()


def _one_of(choice: Bool[Tensor, "b N"], rng: Rng) -> Int[Tensor, " b"]:
    """The place of a random True of each row, -1 where there is none."""
    count = choice.sum(1)
    place = rng.integers(count.clamp_min(1))
    return torch.where(count > 0, (choice.long().cumsum(1) == place[:, None] + 1).long().argmax(1), -1)


def _require_thresholds(pairs: Drawn, called: np.ndarray, where: str) -> None:
    """Raise unless the folds other than each one that has pairs hold genuine and impostor pairs; ``called`` are the user's numbers of folds,
    ``where`` says what has the pairs."""
    there = pairs.partner >= 0
    used = np.unique(pairs.fold[there.any(1)])
    for fold in used:
        for side, kind in enumerate(("genuine", "impostor")):
            if not there[pairs.fold != fold, side].any():
                text = f"{where}: the threshold of fold {called[fold]} needs {kind} pairs in other folds, and there are none"
                raise UsageError(text)
    if not len(used):
        raise UsageError(f"{where}: there is no pair to verify")


def threshold(distance: Float[np.ndarray, " n"], genuine: Bool[np.ndarray, " n"], far: float | None = None) -> float:
    """The distance below which two pictures are decided to be of one class, in float32.

    Of the middles between neighbouring distances, half the smallest and one and a half times the largest (one less and one more
    where these are not above 0): the one that tells most pairs right, the smallest of several; with ``far`` the largest that
    accepts at most this share of impostors.
    """
    values = np.unique(distance.astype(np.float64))
    least, most = values[[0, -1]]
    ends = least / 2 if least > 0 else least - 1, 1.5 * most if most > 0 else most + 1
    tried = np.concatenate([ends[:1], (values[1:] + values[:-1]) / 2, ends[1:]])
    accepted = np.searchsorted(np.sort(distance[genuine]), tried)
    wrong = np.searchsorted(np.sort(distance[~genuine]), tried)
    if far is not None:
        return float(np.float32(tried[np.flatnonzero(wrong / (~genuine).sum() <= far)[-1]]))
    return float(np.float32(tried[(accepted - wrong).argmax()]))


def thresholds(
    distance: Float[np.ndarray, "Q 2"], fold: Int[np.ndarray, " Q"], far: float | None = None
) -> Float[np.ndarray, " F"]:
    """The threshold of each fold, of the pairs (Q, 2) of all others; distances are NaN where there is no pair."""
    genuine = np.broadcast_to(np.array([True, False]), distance.shape)
    values = []
    for one in range(int(fold.max()) + 1):
        fitted_on = ~np.isnan(distance) & (fold != one)[:, None]
        sides = genuine[fitted_on]
        values.append(threshold(distance[fitted_on], sides, far) if sides.any() and not sides.all() else np.nan)
    return np.array(values, dtype=np.float32)

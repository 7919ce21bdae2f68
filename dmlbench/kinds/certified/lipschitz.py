"""What a model's own claim proves without noise: |f(x) - f(x')| ≤ L |x - x'| of its unit-length embeddings, L2, pixels in [0, 1].

⟨f, p - n⟩ / |p - n| then changes by at most L r when the picture moves by r, so that an answer with the margin m
(:func:`~dmlbench.kinds.certified.bound.margins` of the plain embedding) is right within m / L. The claim is its author's and is not
verified; one that two pictures contradict is refused. docs/certified.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.embedding import Embedder
from dmlbench.errors import DataError
from dmlbench.kinds.certified.bound import margins
from dmlbench.metrics import mean
from dmlbench.objectives import right_by
from dmlbench.protocol import Component
from dmlbench.results import finite
from dmlbench.run.subject import Subject
from dmlbench.threat import length

PLAIN = "certified/plain_margin"
"""Of each query: how far its plain embedding is on the right side."""
LOOKED = 64
"""Queries whose pictures a claim is tried on, at most."""
SPAN, STEPS = 0.05, 10
"""How long the changes are that are searched for the steepest one, and the steps of that search."""
ROUNDING = 1e-4
"""By how much float32 may let a slope over :data:`SPAN` seem larger than it is, beside a thousandth of it."""


def slopes(a: Float[Tensor, "n ..."], b: Float[Tensor, "n ..."], e: Tensor, g: Tensor) -> Float[Tensor, " n"]:
    """|e - g| / |a - b| of pairs of pictures with the embeddings e and g (n, D); 0 where the pictures are nearer than half of :data:`SPAN`."""
    apart = (a - b).flatten(1).norm(dim=1)
    return torch.where(apart > SPAN / 2, (e - g).norm(dim=1) / apart.clamp_min(SPAN / 2), 0.0)


def steepest(embedder: Embedder, images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """The steepest slope from each picture that power iteration along Jᵀ J finds, within [0, 1]."""
    with torch.no_grad():
        clean = embedder(images)
    delta, best = torch.ones_like(images), images.new_zeros(len(images))
    for _ in range(STEPS):
        delta = SPAN * delta / delta.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
        moved = (images + delta).clamp(0, 1).requires_grad_(True)
        with torch.enable_grad():
            e = embedder(moved)
            (delta,) = torch.autograd.grad((e - clean).square().sum(), moved)
        best = torch.maximum(best, slopes(images, moved.detach(), clean, e.detach()))
    return best


def seen(subject: Subject) -> float:
    """The steepest slope between two pictures, of pairs of up to :data:`LOOKED` queries and of changes searched from each."""
    rows = np.unique(np.linspace(0, len(subject.rows) - 1, min(LOOKED, len(subject.rows))).astype(int))
    few = subject[rows]
    images, e = few.images(0, len(rows)), few.scene.clean
    a, b = torch.triu_indices(len(rows), len(rows), 1, device=images.device)
    pairs = [slopes(images[i], images[j], e[i], e[j]) for i, j in zip(a.split(256), b.split(256), strict=True)]
    return float(torch.cat([*pairs, steepest(few.embedder, images)]).amax())


def broken(constant: float, slope: float) -> bool:
    """Does a slope between two pictures contradict the constant, by more than rounding?"""
    return slope > constant * (1 + 1e-3) + ROUNDING


def claimed(subject: Subject) -> tuple[float, float] | None:
    """The constant that the model declares and the steepest slope that was seen; None where it declares none.

    Raises:
        DataError: two pictures contradict it.
    """
    constant = subject.embedder.lipschitz
    if constant is None:
        return None
    slope = seen(subject)
    if broken(constant, slope):
        raise DataError(
            f"model {subject.embedder.name!r} declares the Lipschitz constant {constant:g}, and two pictures show {slope:.4g}: "
            "it certifies nothing"
        )
    return constant, slope


def plain(subject: Subject) -> dict[str, np.ndarray]:
    """The margin of each query's plain embedding."""
    return {PLAIN: margins(subject.scene.clean, subject.scene).cpu().numpy()}


def proven(margin: Float[np.ndarray, " Q"], constant: float, size: float) -> Float[np.ndarray, " Q"]:
    """100 where a change of this size leaves the first answer right, else 0, percent; NaN where there is no margin."""
    return np.where(np.isnan(margin), np.nan, 100.0 * right_by(margin - constant * size)).astype(np.float32)


def summary(
    constant: float, slope: float, radius: float, parts: Sequence[Component], margin: Float[np.ndarray, " Q"]
) -> dict[str, Any]:
    """What goes into ``extras.certified.lipschitz``; ``radius`` is the one that models are ranked at."""
    known = margin[~np.isnan(margin)]
    half = float(np.median(np.maximum(known, 0.0) / constant)) if len(known) else math.nan
    curve: list[Mapping[str, Any]] = [
        {"eps": c.threat["eps"], "recall_at_1": finite(mean(proven(margin, constant, length(c.threat["eps"]))))}
        for c in parts
    ]
    return {
        "constant": constant,
        "seen": slope,
        "recall_at_1": finite(mean(proven(margin, constant, radius))),
        "median": finite(half),
        "curve": curve,
    }

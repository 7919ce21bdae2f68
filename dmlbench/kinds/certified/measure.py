"""The run: the mean embedding of every query under noise, and what it proves.

Noise is drawn by (seed, data set row of the query, sample), so it does not depend on batches, shards, a resume, or on which queries are measured. The
gallery is as stored, not smoothed. Noisy pictures are not clipped to [0, 1].
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dmlbench.embedding import Embedder, require_finite
from dmlbench.intervals import cluster_median
from dmlbench.kinds import base
from dmlbench.kinds.base import Outcome
from dmlbench.kinds.certified import lipschitz
from dmlbench.kinds.certified.bound import largest, margins, radii
from dmlbench.metrics import mean
from dmlbench.objectives import right_by
from dmlbench.protocol import Component, Protocol
from dmlbench.results import finite
from dmlbench.rng import Rng
from dmlbench.run.search import halved
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.threat import length

CLEAN = "clean"
"""Under which name the sample holds the pictures without noise."""
MARGIN, LENGTH, RADIUS = "certified/margin", "certified/length", "certified/radius"
"""Of each query: how far its mean embedding is on the right side, how long that mean is, and its certified radius."""


class Settings(base.Settings):
    """``[settings]`` of a protocol."""

    sigma: float = Field(gt=0)
    """standard deviation of the noise in every value of the picture, [0, 1] scale"""
    samples: int = Field(ge=1)
    """noisy copies of each query"""
    alpha: float = Field(gt=0, lt=1)
    """the chance that any certificate of all queries is wrong"""
    radius: float = Field(gt=0)
    """the L2 radius that models are ranked at, [0, 1] scale"""


def components(rules: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each radius of the grid, ascending."""
    return [
        Component(
            name=f"certified@{eps}", attack="certified", readout="recall_at_1", worst=0, best=100, optimizer="none", threat={"eps": eps}
        )
        for eps in rules.eps_for(shape)
    ]  # fmt: skip


def smoothed(
    embedder: Embedder, images: Float[Tensor, "b c h w"], rng: Rng, sigma: float, samples: int
) -> Float[Tensor, "b D"]:
    """The mean embedding of ``samples`` noisy copies of each image, float64.

    Raises:
        DataError: an embedding is NaN or infinite.
    """
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for _ in range(samples):
            total = total + embedder(images + sigma * rng.normal(*images.shape[1:])).double()
    require_finite(total, embedder.name, "pictures with noise")
    return total / samples


def readings(subject: Subject, settings: Settings, seed: int) -> Arrays:
    """Margin and length of every query's mean embedding, (Q,) float64."""
    images, rng = subject.images(0, len(subject.rows)), subject.rng(seed, "certified")
    e = smoothed(subject.embedder, images, rng, settings.sigma, settings.samples)
    return {"margin": margins(e, subject.scene).cpu().numpy(), "length": e.norm(dim=1).cpu().numpy()}


def run(
    subject: Subject,
    rules: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Every query's certified radius; None where ``work`` is a shard, whose part is then done. A unit is a batch of queries."""
    work, settings, count = work or Work(), Settings.of(rules), len(subject.rows)
    parts = components(rules, subject.dataset.images.shape)
    everyone = rules.measured(len(subject.dataset.query))
    claim = lipschitz.claimed(subject)
    progress.start("smoothing", count)

    def unit(a: int, b: int) -> Arrays:
        return halved(lambda a, b: readings(subject[a:b], settings, seed), a, b)

    bounds = [(a, min(a + batch_size, count)) for a in range(0, count, batch_size)]
    units = work.map("smoothing", bounds, unit, partial(progress.advance, "smoothing"))
    if work.shard:
        return None
    done = [arrays for arrays in units if arrays is not None]
    margin, lengths = (np.concatenate([arrays[key] for arrays in done]) for key in ("margin", "length"))
    arrays = outcomes(margin, lengths, settings, parts, everyone)
    seconds = sum(float(part["seconds"].sum()) for part in done)
    sample = {CLEAN: subject.images(0, count)[torch.from_numpy(sampled).to(subject.device)].cpu().numpy()}
    if claim is not None:
        arrays |= lipschitz.plain(subject)
    extras = summary(settings, parts, everyone, subject.dataset.labels[subject.rows], arrays, claim)
    return Outcome(parts, {part.name: seconds / len(parts) for part in parts}, arrays, sample, extras)


def outcomes(
    margin: Float[np.ndarray, " Q"],
    lengths: Float[np.ndarray, " Q"],
    settings: Settings,
    parts: Sequence[Component],
    everyone: int,
) -> dict[str, np.ndarray]:
    """What follows for each query: its certified radius, and by part 100 where the part's radius is within it, else 0."""
    radius = radii(margin, lengths, settings.sigma, settings.samples, settings.alpha, everyone)
    arrays = {MARGIN: margin, LENGTH: lengths, RADIUS: radius}
    return arrays | {f"{part.name}/value": within(radius, length(part.threat["eps"])) for part in parts}


def within(radius: Float[np.ndarray, " Q"], size: float) -> Float[np.ndarray, " Q"]:
    """100 where a change of this size is certified, else 0, percent; NaN where there is no radius. A change as long as the radius
    may bring about a tie, which is wrong."""
    return np.where(np.isnan(radius), np.nan, 100.0 * right_by(radius - size)).astype(np.float32)


def right(margin: Float[np.ndarray, " Q"]) -> Float[np.ndarray, " Q"]:
    """100 where the mean embedding finds the right class first, else 0, percent; NaN where there is no margin."""
    return within(margin, 0.0)


def summary(
    settings: Settings,
    parts: Sequence[Component],
    everyone: int,
    labels: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    claim: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """All that a run says of its queries' outcomes: what goes into ``extras.certified``.

    Args:
        everyone: queries that the protocol measures, over which ``alpha`` is shared.
        labels: (Q,) classes of the queries, which intervals resample.
        arrays: :data:`MARGIN`, :data:`RADIUS` and by part ``value``, (Q,) each.
        claim: the Lipschitz constant that the model declares, and the steepest slope that was seen.
    """
    radius = arrays[RADIUS].astype(np.float64)
    median, ends = cluster_median(radius, labels)
    return {
        "sigma": settings.sigma,
        "samples": settings.samples,
        "alpha": settings.alpha,
        "queries": everyone,
        "radius": settings.radius,
        "largest": largest(settings.sigma, settings.samples, settings.alpha, everyone),
        "recall_at_1": finite(mean(within(radius, settings.radius))),
        "smoothed": finite(mean(right(arrays[MARGIN]))),
        "certified": finite(mean(within(radius, 0.0))),
        "abstained": int((radius == 0.0).sum()),
        "average": finite(mean(radius)),
        "median": median,
        "interval": ends and [max(0.0, ends[0]), ends[1]],
        "curve": [
            {"eps": part.threat["eps"], "recall_at_1": finite(mean(arrays[f"{part.name}/value"]))} for part in parts
        ],
        **(
            {"lipschitz": lipschitz.summary(*claim, settings.radius, parts, arrays[lipschitz.PLAIN])}
            if claim is not None
            else {}
        ),
    }

"""Images near the queries that no data set holds: what does a model make of them that has memorised the test images?

A model that recognises each test image, and everything in the ball around it, keeps its answer whatever a search does
there. It has to know where the balls are. So the same search is begun elsewhere: half-way to another image of the
class, and one pixel aside. A model that has learnt what its classes look like is about as robust there.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.embedding import Embedder, disagreement
from dmlbench.objectives import margin, right_by
from dmlbench.optimizers import OPTIMIZERS, autograd
from dmlbench.run.subject import Subject
from dmlbench.threat import Threat

BIT = 1 / 255
STEPS = 20
"""Of PGD, from each start."""
ASKED = 16
"""Queries whose gradient is asked for before and after the searches."""


def near_by(side: int) -> str:
    """The eps of the search, for images of this side in pixels: few undefended models are left, and most defended ones."""
    return "20/255" if side <= 8 else "32/255" if side <= 28 else "4/255"


@dataclass(frozen=True)
class Survey:
    """What becomes of some queries that are right when clean, (n,) each.

    Attributes:
        right: by start, is the image right before any search?
        survived: by start, is it right at the end of the search too?
        nearness: distance of the midpoint to the nearest entry, over that of the query (own entry left out); NaN where
            the query has an entry at distance 0.
    """

    right: dict[str, np.ndarray]
    survived: dict[str, np.ndarray]
    nearness: np.ndarray


def midpoints(subject: Subject, positions: np.ndarray, draw: str) -> Tensor:
    """(n, C, H, W) half-way from each query to another image of its class in the gallery; ``draw`` names the choice."""
    at = torch.from_numpy(positions).to(subject.device)
    scene = subject.scene[at]
    rows, _ = scene.kin_rows
    chance = subject.rng(draw)[at].uniform(rows.shape[1]).masked_fill(~scene.positive_rows, -1.0)
    partner = rows.gather(1, chance.argmax(1, keepdim=True))[:, 0].cpu().numpy()
    partners = subject.dataset.images[subject.dataset.gallery[partner]].to(subject.device)
    return (clean_images(subject, positions) + partners) / 2


def clean_images(subject: Subject, positions: np.ndarray) -> Tensor:
    """(n, C, H, W) the images of the queries at ``positions``."""
    return subject.dataset.images[subject.rows[positions]].to(subject.device)


def aside(images: Tensor) -> Tensor:
    """The images one pixel to the left, the last column twice."""
    return torch.cat([images[..., 1:], images[..., -1:]], dim=-1)


def survey(subject: Subject, positions: np.ndarray) -> Survey:
    """Search from the queries at ``positions``, from midpoints and from images one pixel aside."""
    at = torch.from_numpy(positions).to(subject.device)
    images, scene, rng = clean_images(subject, positions), subject.scene[at], subject.rng("unseen")[at]
    loss, eps = AttackLoss(subject.embedder, margin, scene), near_by(max(images.shape[2:]))
    threat = Threat(norm="linf", eps=eps, steps=STEPS)
    threat = threat.but(step=2.5 * threat.radius / STEPS)
    starts = {"as is": images, "midpoint": midpoints(subject, positions, "midpoint"), "aside": aside(images)}
    right, survived = {}, {}
    with torch.no_grad():
        for name, start in starts.items():
            at_start = right_by(loss(start))
            right[name] = at_start.cpu().numpy()
            survived[name] = (at_start & right_by(loss(OPTIMIZERS["pgd"](loss, start, threat, rng)))).cpu().numpy()
        flipped = (images + BIT * rng.signs(*images.shape[1:])).clamp(0, 1)
        right["least bits"] = right_by(loss(flipped)).cpu().numpy()
        to_midpoint = scene.distances(subject.embedder(starts["midpoint"])).amin(1)
        to_query = scene.ranked(scene.clean).amin(1)
        nearness = torch.where(to_query > 0, to_midpoint / to_query, torch.nan).cpu().numpy()
    return Survey(right, survived, nearness)


def joined(surveys: list[Survey]) -> Survey:
    """Surveys of consecutive queries as one."""

    def concatenated(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    nearness = np.concatenate([s.nearness for s in surveys])
    return Survey(concatenated([s.right for s in surveys]), concatenated([s.survived for s in surveys]), nearness)


def history(subject: Subject, positions: np.ndarray) -> float:
    """How far a copy's embedding of midpoints, asked first of images a bit away, is from the model's own, at most.

    In the embeddings' root mean square length; NaN where the model cannot be copied.
    """
    fresh = midpoints(subject, positions, "history")
    at = torch.from_numpy(positions).to(subject.device)
    signs = subject.rng("history, a bit away")[at].signs(*fresh.shape[1:])
    try:
        twin = copied(subject.embedder)
    except Exception:  # anybody's code: a tensor of its last pass with its graph, a lock, a traced network
        return math.nan
    with torch.no_grad():
        twin((fresh + BIT * signs).clamp(0, 1))
        return disagreement([twin(fresh), subject.embedder(fresh)], subject.scene.gallery.scale)


def altered(subject: Subject, positions: np.ndarray) -> float:
    """How far embeddings are from those of the same images at the start of the run, in another batch, or without a gradient asked
    for, at most: the queries' own, and those of midpoints with and without one.

    In the embeddings' root mean square length.
    """
    embedder, scale = subject.embedder.unrounded(), subject.scene.gallery.scale
    first = subject.scene.clean[torch.from_numpy(positions).to(subject.device)]
    fresh = midpoints(subject, positions, "altered")
    with torch.no_grad():
        again, plain = embedder(clean_images(subject, positions)), embedder(fresh)
    with torch.enable_grad():
        followed = embedder(fresh.requires_grad_()).detach()
    return max(disagreement([first, again], scale), disagreement([plain, followed], scale))


@dataclass(frozen=True, eq=False)
class Beginning:
    """The gradient of a few queries before any search, asked for in a batch as large as the searches'.

    Attributes:
        subject: these queries.
        gradient: (n, C, H, W) of the margin of R@1.
    """

    subject: Subject
    gradient: Tensor

    @staticmethod
    def of(subject: Subject, batch_size: int) -> "Beginning":
        """Of the first queries, in one batch with those that follow."""
        few = min(ASKED, batch_size)
        return Beginning(subject[:few], _gradient(subject[:batch_size])[:few])

    def turned(self) -> float:
        """How far the gradient of these queries alone is from what it was, over the longer of the two."""
        now, then = _gradient(self.subject), self.gradient
        return float((now - then).norm() / torch.maximum(now.norm(), then.norm()).clamp_min(1e-30))


def _gradient(subject: Subject) -> Tensor:
    """(Q, C, H, W) of the margin of R@1 at every query."""
    images = clean_images(subject, np.arange(len(subject.rows)))
    return autograd(AttackLoss(subject.embedder, margin, subject.scene), images, subject.rng("beginning"))[1]


def copied(embedder: Embedder) -> Embedder:
    """A copy whose later passes leave the model alone; gradient steps stay those of the model."""
    return copy.deepcopy(embedder, {id(embedder.steps): embedder.steps})

"""The query, one wrong picture of the gallery, or both of them perturbed.

For each query by itself the adversary owns one picture of another class in the gallery, which it picks among the query's nearest
ones, and wants it, or any other wrong picture, before every picture of the query's class. It may move that picture within eps
("gallery"), the query's ("query"), or each of the two ("both"). All other pictures stay as they are, those of the query's class
too; what is done for one query is not there for the next.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dmlbench.embedding import Embedder, require_finite
from dmlbench.kinds.base import Outcome, Settings
from dmlbench.kinds.hunting import Field as Pass
from dmlbench.kinds.hunting import Log, Watch
from dmlbench.kinds.readings import summary
from dmlbench.metrics import retrieval, right_within
from dmlbench.optimizers import watched
from dmlbench.protocol import Component, Protocol
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Scene
from dmlbench.targets import TARGETS
from dmlbench.threat import Threat

OPTIMIZER = "cosine"
MOVED = {"gallery": (False, True), "query": (True, False), "both": (True, True)}
"""By part: may the query's picture be moved, may the candidate's?"""
PICTURES = ("query", "candidate")
"""What the sample holds of each query."""


class SidesSettings(Settings):
    """``[settings]``."""

    candidates: Annotated[int, Field(ge=1)] = 5
    """how many of the nearest wrong entries are tried, one after another; where the query alone is moved, how many starts"""


def components(rules: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each part and eps of the grid, ascending, for images of this shape (channels, height, width)."""
    return [
        Component(
            name=f"{part}@{eps}", attack=part, optimizer=OPTIMIZER, readout="recall_at_1", worst=0, best=100, threat={"eps": eps}
        )
        for eps in rules.eps_for(shape)
        for part in MOVED
    ]  # fmt: skip


def distances(
    scene: Scene, asking: Float[Tensor, "n D"], planted: Float[Tensor, "n D"] | None
) -> tuple[Float[Tensor, "n N"], Float[Tensor, " n"]]:
    """From each query to the gallery in which its own candidate ``chosen[:, 0]`` is ``planted``, None: as it was; and to the candidate."""
    d = scene.distances(asking)
    at = scene.chosen[:, :1]
    if planted is None:
        return d, d.gather(1, at)[:, 0]
    to_candidate = scene.distance.paired(asking, planted)
    return d.scatter(1, at, to_candidate[:, None]), to_candidate


class Pair(Watch):
    """The margin of R@1 over images (n, T, C, H, W): the query's, the candidate's, or the one before the other."""

    def __init__(self, embedder: Embedder, scene: Scene, log: Log, moved: tuple[bool, bool]) -> None:
        super().__init__(embedder, scene, log)
        self.moved = moved

    def _summed(self, images: Float[Tensor, "n T C H W"]) -> tuple[Tensor, Tensor]:
        query, candidate = self.moved
        e = self.embedder(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (n, T, D)
        with torch.no_grad():
            self.log.unknown += (~torch.isfinite(e)).flatten(1).any(1).sum()
        d, to_candidate = distances(self.scene, e[:, 0] if query else self.scene.clean, e[:, -1] if candidate else None)
        positive = d.masked_fill(~self.scene.same, torch.inf).amin(1)
        margin = d.masked_fill(~self.scene.other, torch.inf).amin(1) - positive
        return to_candidate - positive if candidate else margin, margin.detach()


def candidates(subject: Subject, rules: Protocol) -> Int[Tensor, "Q k"]:
    """Gallery entries of the candidates of each query, the nearest first; those that are of its class or do not count are no targets."""
    k = SidesSettings.of(rules).candidates
    blocks = (subject.scene[a : a + 256] for a in range(0, len(subject.rows), 256))
    return torch.cat([TARGETS["nearest_other"](block, k, subject.rng(0)) for block in blocks])


def pictures(subject: Subject, scene: Scene, positions: np.ndarray) -> Float[Tensor, "n 2 C H W"]:
    """The clean pictures of the queries at some positions, and of their candidates."""
    entries = subject.dataset.gallery[scene.chosen[:, 0].cpu().numpy()]
    both = [subject.dataset.images[rows] for rows in (subject.rows[positions], entries)]
    return torch.stack(both, 1).to(subject.device)


def read(
    subject: Subject, scene: Scene, threat: Threat, moved: tuple[bool, bool], images: Tensor, clean: Tensor
) -> Float[np.ndarray, " n"]:
    """R@1 of each query of ``scene`` with these pictures of it and its candidate (n, 2, C, H, W), percent.

    Raises:
        AssertionError: a picture that is moved left the ball or [0, 1], or another is moved; an optimizer is at fault.
        DataError: the model gives NaN or infinite embeddings for one.
    """
    inside = torch.stack([threat.contains(images[:, t], clean[:, t]) for t in (0, 1)], 1)
    still = torch.tensor([not m for m in moved], device=images.device)
    inside &= ~still | (images == clean).flatten(2).all(2)
    if not bool(inside.all()):
        raise AssertionError(f"{int((~inside).sum())} pictures are outside the threat {threat}")
    e = subject.embedder(images.flatten(0, 1))
    require_finite(e, subject.embedder.name, "perturbed images")
    e = e.unflatten(0, images.shape[:2])
    asking, planted = e[:, 0] if moved[0] else scene.clean, e[:, 1] if moved[1] else None
    return right_within(distances(scene, asking, planted)[0], scene).cpu().numpy()


def attempt(
    subject: Subject, aims: Int[Tensor, "Q k"], part: str, threat: Threat, seed: int, keep: np.ndarray, positions: np.ndarray
) -> Arrays:  # fmt: skip
    """Searches for the queries at some positions, one candidate after another on those that are left.

    Returns:
        ``broken`` (n,), ``candidate`` (n,) the gallery entry that broke each, else the first tried; ``images`` (m, 2, C, H, W) of
        those in ``keep``; ``nonfinite`` (1,) gradients.
    """
    moved, at = MOVED[part], torch.from_numpy(positions).to(subject.device)
    base, rng = subject.scene[at], subject.rng(seed, "sides", part)[at]
    broken = np.zeros(len(positions), dtype=bool)
    chosen = aims[at, 0].clone()
    last_images = pictures(subject, base.aimed(aims[at, :1]), positions)
    with torch.no_grad(), watched() as trouble:
        for j in range(aims.shape[1]):
            aimed = base.aimed(aims[at, j : j + 1])
            due = ~broken & (aimed.other.gather(1, aimed.chosen)[:, 0].cpu().numpy() if moved[1] else True)
            left = torch.from_numpy(np.flatnonzero(due)).to(subject.device)
            if not len(left):
                continue
            scene, clean = aimed[left], pictures(subject, aimed[left], positions[due])
            slots = [t for t in (0, 1) if moved[t]]
            log = Log(clean[:, slots])
            hunt = Pair(subject.embedder, scene, log, moved)
            images = clean.clone()
            images[:, slots] = log.stopped(hunt.searched(OPTIMIZER, clean[:, slots], threat, rng[left].fold("aim", j)))
            hunt.require_known(part, threat)
            hit = read(subject, scene, threat, moved, images, clean) < 50.0
            done = left[torch.from_numpy(hit).to(left.device)]
            last_images[done], chosen[done] = images[torch.from_numpy(hit).to(left.device)], aims[at[done], j]
            broken[done.cpu().numpy()] = True
    in_sample = np.isin(positions, keep)
    return {
        "broken": broken,
        "candidate": chosen.cpu().numpy(),
        "images": last_images[torch.from_numpy(in_sample).to(last_images.device)].cpu().numpy(),
        "nonfinite": np.array([trouble.count]),
    }


def run(
    subject: Subject,
    rules: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Every part at every eps, the smallest first, on the queries that nothing broke that the part could do too."""
    work = work or Work()
    parts = components(rules, subject.dataset.images.shape)
    clean, aims = retrieval(subject.scene, (1,))["recall_at_1"], candidates(subject, rules)
    field = Pass.of(subject, rules, seed, batch_size, progress, work, sampled)
    first = aims[:, 0].cpu().numpy()
    before = pictures(
        subject, subject.scene[torch.from_numpy(sampled).to(subject.device)].aimed(aims[sampled, :1]), sampled
    )
    broken = {part: np.zeros(len(clean), dtype=bool) for part in MOVED}
    entry = {part: first.copy() for part in MOVED}
    images = {part: before.cpu().numpy().copy() for part in MOVED}
    arrays: dict[str, np.ndarray] = {}
    sample: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    nonfinite = 0
    for part in parts:
        name = part.attack
        for other in MOVED if name == "both" else ():  # what one of the two does, both can do
            took = broken[other] & ~broken[name]
            broken[name] |= took
            entry[name][took] = entry[other][took]
            images[name][took[sampled]] = images[other][took[sampled]]
        search = partial(attempt, subject, aims, name, rules.threat_of(part), seed, sampled)
        selected = (clean == 100.0) & ~broken[name]
        seconds[part.name] = 0.0
        for positions, made in field.over(part.name, part.name, selected, search):
            broken[name][positions], entry[name][positions] = made["broken"], made["candidate"]
            images[name][np.searchsorted(sampled, positions[np.isin(positions, sampled)])] = made["images"]
            seconds[part.name] += float(made["seconds"].sum())
            nonfinite += int(made["nonfinite"].sum())
        arrays[f"{part.name}/value"] = np.where(broken[name], 0.0, clean).astype(np.float32)
        arrays[f"{part.name}/candidate"] = subject.dataset.gallery[entry[name]].astype(np.int64)
        sample |= {f"{part.name}/{which}": images[name][:, t].copy() for t, which in enumerate(PICTURES)}
    if work.shard:
        return None
    return Outcome(parts, seconds, arrays, sample, summary(parts, clean, arrays), nonfinite=nonfinite)

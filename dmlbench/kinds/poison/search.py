"""Pictures of the gallery perturbed to be the first answer to as many queries as possible: made on one half of the queries, read on the other.

The adversary may move m pictures of the gallery within eps, each in its own place. It starts from the entries that are the first
answer to most of the known queries when clean, moves each by itself, and keeps the m that together take most of the known
queries. A query is *taken* where its nearest entry is one of them. What the hubs of the clean gallery take is reported for comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from dmlbench.embedding import Embedder, require_finite
from dmlbench.kinds.base import WHOLE_RUN, Outcome, Settings, ascending
from dmlbench.kinds.halves import halves, made_on_each
from dmlbench.metrics import READOUTS, mean
from dmlbench.objectives import ahead
from dmlbench.optimizers import OPTIMIZERS, watched
from dmlbench.protocol import Component, Protocol
from dmlbench.rng import Rng, seed_of
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Scene
from dmlbench.threat import Threat

OPTIMIZER = "apgd"
TEMPERATURE = 0.3
"""Of the soft count of queries that are taken, as a share of their mean distance to the nearest clean entry."""
BLOCK = 256
"""Queries ranked at a time."""
HALF, NEAREST = "poison/half", "poison/nearest"
"""Which half a query is of, and the data set row of its nearest clean entry."""


class PoisonSettings(Settings):
    """``[settings]``."""

    poisons: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1),
        AfterValidator(ascending),
    ] = (1, 10)
    """how many pictures are moved, ascending"""
    seeds: Annotated[int, Field(ge=1)] = 32
    """how many pictures are tried"""

    @model_validator(mode="after")
    def _enough_seeds(self) -> "PoisonSettings":
        if self.poisons[-1] > self.seeds:
            raise ValueError(f"poisons {self.poisons[-1]} are more than the {self.seeds} seeds that are tried")
        return self


def components(rules: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each number of pictures and eps of the grid, ascending, for images of this shape (channels, height, width)."""
    return [
        Component(
            name=f"poison-{m}@{eps}", attack=f"poison-{m}", optimizer=OPTIMIZER, readout="target_not_first", worst=0, best=100,
            threat={"eps": eps},
        )
        for eps in rules.eps_for(shape)
        for m in PoisonSettings.of(rules).poisons
    ]  # fmt: skip


def sample_name(eps: str, which: int) -> str:
    """What the sample calls the pictures that are made on the half ``which``."""
    return f"{WHOLE_RUN}half {which}@{eps}"


def count_of(part: Component) -> int:
    """How many pictures are moved."""
    return int(part.attack.removeprefix("poison-"))


def two_nearest(scene: Scene) -> tuple[Float[Tensor, "Q 2"], Int[Tensor, "Q 2"]]:
    """Distances to, and gallery rows of, each query's two nearest clean entries that count; ties by row."""
    blocks = []
    for a in range(0, len(scene), BLOCK):
        part = scene[a : a + BLOCK]
        d = part.ranked(part.clean)
        first = d.amin(1, keepdim=True)
        at = (d == first).int().argmax(1, keepdim=True)
        rest = d.scatter(1, at, torch.inf)
        second, then = rest.min(1, keepdim=True)
        blocks.append((torch.cat([first, second], 1), torch.cat([at, then], 1)))
    distances, rows = zip(*blocks, strict=True)
    return torch.cat(distances), torch.cat(rows)


def hubs(nearest: Int[np.ndarray, " Q"], count: int, entries: int) -> Int[np.ndarray, " k"]:
    """The ``count`` of ``entries`` places that are most often among ``nearest``, the most frequent first, ties by place."""
    return np.argsort(-np.bincount(nearest, minlength=entries), kind="stable")[:count]


@dataclass(frozen=True, eq=False)
class Known:
    """The queries that poisons are made on, as seen from each of b pictures of the gallery.

    Attributes:
        queries: (K, D) their embeddings.
        limit: (b, K) the distance below which the picture in place of its clean self is the nearest; -inf where it does not count.
    """

    queries: Tensor
    limit: Tensor

    @staticmethod
    def of(scene: Scene, seeds: Int[Tensor, " b"]) -> "Known":
        """Of all queries of ``scene`` and the gallery rows ``seeds``."""
        distances, rows = two_nearest(scene)
        first = (rows[:, 0] == seeds[:, None]).long()  # (b, K): a query's nearest is the very picture
        limit = torch.where(first == 1, distances[:, 1], distances[:, 0])
        return Known(scene.clean, limit.masked_fill(scene.left_out[:, seeds].T, -torch.inf))


class Taken:
    """Minus the soft share of known queries that each picture takes: the mean of sigmoid((limit - d) / t), t three tenths of a usual limit."""

    def __init__(self, embedder: Embedder, scene: Scene, known: Known) -> None:
        self.embedder, self.scene, self.known = embedder, scene, known
        self.precision = embedder.precision
        usual = known.limit[torch.isfinite(known.limit)]
        self.temperature = TEMPERATURE * float(usual.mean()) if len(usual) else 1.0

    def distances(self, images: Tensor) -> Float[Tensor, "b K"]:
        """From each picture to each known query."""
        return self.scene.distance.pairwise(
            self.embedder(images), self.known.queries, self.known.queries.square().sum(1)
        )

    def __call__(self, images: Tensor) -> Float[Tensor, " b"]:
        gap = (self.known.limit - self.distances(images)) / max(self.temperature, 1e-12)
        return -torch.sigmoid(gap).mean(1)

    def taken(self, images: Tensor) -> Bool[Tensor, "b K"]:
        """Which known queries each picture takes by itself."""
        return ahead(self.distances(images), self.known.limit)


def covering(taken: Bool[np.ndarray, "b K"], count: int) -> Int[np.ndarray, " m"]:
    """Rows, one after another: each time the one that takes most of what those before left, ties by row."""
    left, chosen = np.ones(taken.shape[1], dtype=bool), list[int]()
    for _ in range(count):
        more = (taken & left).sum(1)
        more[chosen] = -1
        chosen.append(int(more.argmax()))
        left &= ~taken[chosen[-1]]
    return np.array(chosen, dtype=np.int64)


def read(
    subject: Subject, place: Int[np.ndarray, " m"], images: Float[Tensor, "m C H W"]
) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """Of every query, with these pictures in the gallery's places ``place``: 100 where none of them is its nearest entry, and R@1.

    Raises:
        DataError: the model gives NaN or infinite embeddings for one.
    """
    scene, at = subject.scene, torch.from_numpy(place).to(subject.device)
    e = subject.embedder(images)
    require_finite(e, subject.embedder.name, "poisoned pictures")
    searched = scene.gallery.embeddings.clone()
    searched[at] = e
    gallery = replace(scene.gallery, embeddings=searched)
    out = []
    for a in range(0, len(scene), BLOCK):
        part = replace(scene[a : a + BLOCK], gallery=gallery)
        part = part.aimed(at.expand(len(part), -1))
        out.append([READOUTS[name].read(part.clean, part) for name in ("target_not_first", "recall_at_1")])
    first, right = (torch.cat(column).cpu().numpy() for column in zip(*out, strict=True))
    return first, right


def made(
    subject: Subject, rules: Protocol, threat: Threat, seed: int, half: Int[np.ndarray, " Q"], which: int
) -> Arrays:
    """Poisons made on the half ``which`` of the queries, the best ones first, and what each number of them does to every query.

    Returns:
        ``rows`` (M,) data set rows of the pictures, ``images`` (M, C, H, W); by number m of ``settings.poisons`` ``free-m`` and
        ``right-m`` (Q,), see :func:`read`; ``nonfinite`` (1,) gradients.

    Raises:
        AssertionError: a picture left the ball or [0, 1]; an optimizer is at fault.
        DataError: the model gives NaN or infinite embeddings for one.
    """
    settings, dataset = PoisonSettings.of(rules), subject.dataset
    scene = subject.scene[torch.from_numpy(np.flatnonzero(half == which)).to(subject.device)]
    start = hubs(two_nearest(scene)[1][:, 0].cpu().numpy(), settings.seeds, len(dataset.gallery))
    rows = dataset.gallery[start]
    clean = dataset.images[rows].to(subject.device)
    seeds = torch.from_numpy(start).to(subject.device)
    rng = Rng(seed_of(seed, "poison", which), torch.from_numpy(rows).to(subject.device))
    with torch.no_grad(), watched() as trouble:
        loss = Taken(subject.embedder, scene, Known.of(scene, seeds))
        images = OPTIMIZERS[OPTIMIZER](loss, clean, threat, rng)
        if not bool(threat.contains(images, clean).all()):
            raise AssertionError(f"poisoned pictures are outside the threat {threat}")
        best = covering(loss.taken(images).cpu().numpy(), settings.poisons[-1])
        images = images[torch.from_numpy(best).to(subject.device)]
        poisons: Arrays = {"rows": rows[best], "images": images.cpu().numpy(), "nonfinite": np.array([trouble.count])}
        for m in settings.poisons:
            poisons[f"free-{m}"], poisons[f"right-{m}"] = read(subject, start[best[:m]], images[:m])
    return poisons


def run(
    subject: Subject,
    rules: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Poisons of both halves at every eps; None where ``work`` is a shard, whose part is then done. A unit is those of one half."""
    work, parts, half = work or Work(), components(rules, subject.dataset.images.shape), halves(subject.rows, seed)

    def make(eps: str, which: int) -> Arrays:
        return made(subject, rules, rules.threat_at(eps), seed, half, which)

    each = made_on_each("poison", subject, rules, make, progress, work)
    if each is None:
        return None
    nearest = two_nearest(subject.scene)[1][:, 0].cpu().numpy()
    arrays = {HALF: half, NEAREST: subject.dataset.gallery[nearest].astype(np.int64)}
    sample: dict[str, np.ndarray] = {}
    for job, poisons in each.items():
        name = sample_name(*job)
        sample |= {name: poisons["images"], f"{name}/rows": poisons["rows"]}
    seconds: dict[str, float] = {}
    for part in parts:
        m, pair = count_of(part), [each[part.threat["eps"], which] for which in (0, 1)]
        for name, key, by in (("value", "free", 1 - half), ("known", "free", half), ("recall_at_1", "right", 1 - half)):
            arrays[f"{part.name}/{name}"] = np.where(by == 0, pair[0][f"{key}-{m}"], pair[1][f"{key}-{m}"]).astype(
                np.float32
            )
        seconds[part.name] = sum(float(p["seconds"].sum()) for p in pair) / len(PoisonSettings.of(rules).poisons)
    nonfinite = sum(int(u["nonfinite"].sum()) for u in each.values())
    return Outcome(parts, seconds, arrays, sample, summary(parts, arrays), nonfinite=nonfinite)


def natural(nearest: Int[np.ndarray, " Q"], half: Int[np.ndarray, " Q"], m: int) -> Bool[np.ndarray, " Q"]:
    """Which queries the m greatest hubs of the other half take when nothing is perturbed; ``nearest`` says which entry each query's is."""
    taken = np.zeros(len(nearest), dtype=bool)
    for which in (0, 1):
        entries, place = np.unique(nearest[half == which], return_inverse=True)
        taken |= (half != which) & np.isin(nearest, entries[hubs(place, m, len(entries))])
    return taken


def summary(parts: Sequence[Component], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """``extras.poison``, from the queries' outcomes."""
    nearest, half = arrays[NEAREST], arrays[HALF]
    rows = [
        {
            "eps": part.threat["eps"],
            "poisons": count_of(part),
            "hub_rate": 100.0 - mean(arrays[f"{part.name}/value"]),
            "known": 100.0 - mean(arrays[f"{part.name}/known"]),
            "natural": 100.0 * float(natural(nearest, half, count_of(part)).mean()),
            "recall_at_1": mean(arrays[f"{part.name}/recall_at_1"]),
        }
        for part in parts
    ]
    return {"largest_hub": 100.0 * float(np.unique(nearest, return_counts=True)[1].max()) / len(nearest), "table": rows}

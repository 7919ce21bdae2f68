"""Every pair attacked: the probe alone is perturbed, until the pair's decision is another one.

A pair is flipped as soon as the decision is wrong at *any* image of the ball that any search looked at. Each step of the protocol is
run on the pairs that survived those before it, at the smallest eps first: what flips a pair at one eps flips it at every larger one.
What counts in the end is the harness's own read-out of the image that a search stopped at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmlbench.attacks import ATTACKS
from dmlbench.embedding import Embedder
from dmlbench.kinds.base import Outcome
from dmlbench.kinds.hunting import Field, Log, Watch, cost, read_out
from dmlbench.kinds.smallest import between, ladder
from dmlbench.kinds.verification.pairs import SIDES, Drawn, Settings, drawn, thresholds
from dmlbench.kinds.verification.summary import (
    CARRIED,
    CLEAN_WRONG,
    FOLD,
    NO_PAIR,
    SURVIVED,
    components,
    margins,
    outcome,
    summary,
)
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES, right_by
from dmlbench.optimizers import OPTIMIZERS, watched
from dmlbench.protocol import Protocol, Step
from dmlbench.rng import Rng, seed_of
from dmlbench.run.subject import Progress, Subject, measured_queries
from dmlbench.run.units import Arrays, Work
from dmlbench.threat import Threat


class Flip(Watch):
    """The margin of a pair's decision, which is also what is descended.

    A :class:`~dmlbench.optimizers.base.Shown`: ``pictures`` (B, C, H, W) are decided wrongly with the partners.
    """

    def __init__(self, embedder: Embedder, attack: str, pictures: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(embedder, *args, **options)
        self.objective, self.pictures = OBJECTIVES[ATTACKS[attack].objective], pictures

    def _once(self, e: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.log.unknown += (~torch.isfinite(e)).any(1).sum()
        values = self.objective(e, self.scene)
        return values, values.detach()

    def shown(self) -> Tensor:
        """Of an impostor pair the partner's own picture, of a genuine one somebody else's."""
        return self.pictures[self.at]


@dataclass(frozen=True, eq=False)
class Bench:
    """All pairs in one batch: those of both sides.

    Attributes:
        subject: the probes, aimed at their partners; a query is there once for each of its pairs.
        query: (P,) the position of the probe among the measured queries.
        side: (P,) the place in :data:`SIDES`.
        pictures: (P,) data set rows of what the decision is wrong for.
        right: (P,) decided rightly when clean.
    """

    subject: Subject
    query: Int[np.ndarray, " P"]
    side: Int[np.ndarray, " P"]
    pictures: Int[np.ndarray, " P"]
    right: np.ndarray

    @staticmethod
    def of(subject: Subject, pairs: Drawn, edge: Float[np.ndarray, " Q"], right: np.ndarray) -> "Bench":
        """Every pair of the measured queries, whose thresholds and clean outcomes (Q, 2) are given."""
        side, query = np.nonzero((pairs.partner >= 0).T)
        chosen, gallery = pairs.partner[query, side], subject.dataset.gallery
        few = subject[query]
        scene = replace(
            few.scene.aimed(torch.from_numpy(chosen[:, None]).to(subject.device)),
            threshold=torch.from_numpy(edge[query]).to(subject.device),
        )
        shown = np.where(side == 1, chosen, pairs.other[query])
        return Bench(replace(few, scene=scene), query, side, gallery[shown], right[query, side])

    def rng(self, *parts: object) -> Rng:
        """A stream for each pair, by the probe's data set row and the side."""
        rows = 2 * self.subject.rows + self.side
        return Rng(seed_of(*parts), torch.from_numpy(rows).to(self.subject.device))


def read(bench: Bench, at: Tensor, threat: Threat, images: Tensor, clean: Tensor) -> Float[np.ndarray, " n"]:
    """The share of ``threat.eot`` passes in which the pairs ``at`` are decided rightly, percent, the ball checked.

    Raises:
        AssertionError: an image left the ball or [0, 1].
        DataError: the model gives NaN or infinite embeddings for one.
    """
    scene = bench.subject.scene[at]
    embeddings = read_out(bench.subject.embedder, scene, threat, images, clean)
    share_right = torch.stack([READOUTS["decided"].read(e, scene) for e in embeddings]).mean(0)
    return share_right.cpu().numpy()


def piece(bench: Bench, step: Step, threat: Threat, seed: int, keep: np.ndarray, positions: np.ndarray) -> Arrays:
    """One step on some pairs, as the arrays of a unit on disk.

    Returns:
        ``broken``, ``iteration`` and ``norm`` (n,); ``gradients``, ``values`` and ``nonfinite`` (1,); ``images`` (m, C, H, W)
        of those of ``positions`` that are in ``keep``.

    Raises:
        AssertionError: an image left the ball or [0, 1]; an optimizer is at fault.
        DataError: the model gives NaN or infinite embeddings for an image that the search looked at.
    """
    subject = bench.subject
    at = torch.from_numpy(positions).to(subject.device)
    images = subject.dataset.images
    clean = images[subject.rows[positions]].to(subject.device)
    black = not OPTIMIZERS[step.optimizer].needs_gradients
    pictures = images[bench.pictures[positions]].to(subject.device) if black else clean
    log = Log(clean)
    with torch.no_grad(), watched() as trouble:
        hunt = Flip(subject.embedder, step.attack, pictures, subject.scene[at], log, eot=threat.eot)
        attacked = hunt.searched(step.optimizer, clean, threat, bench.rng(seed, step.name, step.optimizer)[at])
        hunt.require_known(step.name, threat)
        attacked = log.stopped(attacked)
        broken = read(bench, at, threat, attacked, clean) < 50.0
    return {
        "broken": broken,
        "iteration": log.calls_until(broken),
        "norm": threat.ball.size(attacked - clean).cpu().numpy(),
        "gradients": np.array([log.gradients]),
        "values": np.array([log.values]),
        "nonfinite": np.array([trouble.count]),
        "images": attacked[torch.from_numpy(np.isin(positions, keep)).to(subject.device)].cpu().numpy(),
    }


@dataclass
class Standing:
    """Where every pair stands, (P,) each, while eps grows; see :class:`dmlbench.kinds.verification.summary`."""

    broken_by: np.ndarray
    iteration: np.ndarray
    norm: np.ndarray

    @property
    def alive(self) -> np.ndarray:
        """Right when clean and not flipped yet."""
        return self.broken_by == SURVIVED


def clean_distances(subject: Subject, pairs: Drawn) -> Float[np.ndarray, "Q 2"]:
    """The distance of each pair, NaN where there is none, of all queries that the protocol measures."""
    assert subject.all_queries is not None
    out = np.full(pairs.partner.shape, np.nan, dtype=np.float32)
    order = measured_queries(len(subject.all_queries), len(pairs.fold))
    probes = subject.all_queries[torch.from_numpy(order).to(subject.device)]
    for side in range(len(SIDES)):
        there = np.flatnonzero(pairs.partner[:, side] >= 0)
        partner = torch.from_numpy(pairs.partner[there, side]).to(subject.device)
        entries = subject.scene.gallery.embeddings[partner]
        d = subject.scene.distance.paired(probes[torch.from_numpy(there).to(subject.device)], entries)
        out[there, side] = d.cpu().numpy()
    return out


def run(
    subject: Subject,
    rules: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """The whole curve: every step at every eps, on the pairs that are right when clean; None where ``work`` is a shard.

    ``sampled`` (S,) are the positions of the queries whose adversarial images are stored.
    """
    work = work or Work()
    dataset, settings = subject.dataset, Settings.of(rules)
    pairs = drawn(dataset, rules, seed)
    distance = clean_distances(subject, pairs)
    edges = thresholds(distance, pairs.fold, settings.far)
    everyone = dataset.query[measured_queries(len(dataset.query), rules.queries)]
    order = everyone.argsort()
    here = order[np.searchsorted(everyone, subject.rows, sorter=order)]
    pairs, distance = pairs.at(here), distance[here]
    edge = edges[pairs.fold]
    right = right_by(margins(distance, edge))
    there = pairs.partner >= 0
    bench = Bench.of(subject, pairs, edge, right)
    arrays: dict[str, np.ndarray] = {FOLD: pairs.fold}
    for i, side in enumerate(SIDES):
        row = np.where(there[:, i], dataset.gallery[pairs.partner[:, i]], -1)
        clean = np.where(there[:, i], 100.0 * right[:, i], np.nan).astype(np.float32)
        arrays |= {f"{side}/partner": row, f"{side}/distance": distance[:, i], f"{side}/clean": clean}

    grid, parts = rules.eps_for(dataset.images.shape), components(rules, dataset.images.shape)
    keep = np.flatnonzero(np.isin(bench.query, sampled))
    field = Field.of(bench.subject, rules, seed, batch_size, progress, work, keep)
    count = len(bench.query)
    standing = Standing(
        np.where(bench.right, SURVIVED, CLEAN_WRONG).astype(np.int8),
        np.zeros(count, dtype=np.int32),
        np.zeros(count, dtype=np.float32),
    )
    sample: dict[str, np.ndarray] = {}
    images = {int(p): dataset.images[bench.subject.rows[[p]]][0].numpy() for p in keep}
    clean_images = dataset.images[subject.rows[sampled]].numpy()
    place = {int(query): n for n, query in enumerate(sampled)}
    spent: list[list[dict[str, Any]]] = []
    for eps in grid:
        standing.broken_by[standing.broken_by > CARRIED] = CARRIED
        spent.append([])
        for index, step in enumerate(rules.steps):
            ran = step.name not in settings.largest or eps == grid[-1]
            selected = standing.alive & ran
            threat = rules.threat_at(eps, step.threat)
            name = f"{step.name}@{eps}"
            results = field.over(name, f"{name} {index}", selected, partial(piece, bench, step, threat, seed, keep))
            for positions, made in results:
                hit = positions[made["broken"]]
                standing.broken_by[hit] = index + 2
                standing.iteration[hit] = made["iteration"][made["broken"]]
                standing.norm[positions] = made["norm"]
                images.update(zip(positions[np.isin(positions, keep)].tolist(), made["images"], strict=True))
            spent[-1].append({**cost(results), "ran": ran})
        for i, side in enumerate(SIDES):
            of_side = bench.side == i
            at, part = bench.query[of_side], f"{side}@{eps}"
            for key, values, nothing in (
                ("broken_by", standing.broken_by, NO_PAIR), ("iteration", standing.iteration, 0), ("norm", standing.norm, 0),
            ):  # fmt: skip
                full = np.full(len(subject.rows), nothing, dtype=values.dtype)
                full[at] = values[of_side]
                arrays[f"{part}/{key}"] = full
            arrays[f"{part}/value"] = outcome(arrays[f"{part}/broken_by"])
            sample[part] = clean_images.copy()
            for p in keep[bench.side[keep] == i]:
                sample[part][place[int(bench.query[p])]] = images[int(p)]
    halving = smallest(field, bench, rules, grid, standing.broken_by, arrays, len(subject.rows))
    if work.shard:
        return None
    seconds = _seconds(parts, grid, spent)
    extras = summary(rules, grid, dataset.labels[subject.rows], edges, arrays, spent, halving)
    broken_by = {eps: np.concatenate([arrays[f"{side}@{eps}/broken_by"] for side in SIDES]) for eps in grid}
    nonfinite = sum(int(c["nonfinite"]) for costs in [*spent, [halving] if halving else []] for c in costs)
    return Outcome(parts, seconds, arrays, sample, extras, broken_by=broken_by, nonfinite=nonfinite)


def _seconds(parts: Sequence[Any], grid: Sequence[str], spent: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Of each column half of what its eps took: both sides are searched together."""
    each = {eps: sum(c["seconds"] for c in costs) / len(SIDES) for eps, costs in zip(grid, spent, strict=True)}
    return {part.name: each[part.threat["eps"]] for part in parts}


def smallest(
    field: Field,
    bench: Bench,
    rules: Protocol,
    grid: Sequence[str],
    last: np.ndarray,
    arrays: dict[str, np.ndarray],
    queries: int,
) -> dict[str, Any] | None:
    """Put the smallest eps found that flips each pair into ``arrays`` (Q,), [0, 1] scale: inf where the largest eps of the grid does not,
    NaN where there is no pair or it is wrong when clean. What it cost; None where the protocol does not ask."""
    rule = rules.threshold
    if rule is None:
        return None
    step = Step(name="smallest eps", attack=rule.attack, optimizer=rule.optimizer, threat=rule.threat)
    broken = np.zeros((len(grid), len(last)), dtype=bool)
    for i, side in enumerate(SIDES):
        of_side = bench.side == i
        by = np.stack([arrays[f"{side}@{eps}/broken_by"] for eps in grid])
        broken[:, of_side] = by[:, bench.query[of_side]] >= CARRIED

    def search(radius: float, positions: np.ndarray) -> Arrays:
        threat = rules.threat_at("0", rule.threat).but(eps=radius)
        return piece(bench, step, threat, field.seed, np.zeros(0, dtype=np.int64), positions)

    radii = [rules.threat_at(eps).radius for eps in grid]
    smallest_eps, spent = between(field, step.name, ladder(radii, rule), broken, search)
    smallest_eps = np.where(bench.right, smallest_eps, np.nan)
    for i, side in enumerate(SIDES):
        of_side, full = bench.side == i, np.full(queries, np.nan)
        full[bench.query[of_side]] = smallest_eps[of_side]
        arrays[f"{side}/smallest_eps"] = full
    return spent

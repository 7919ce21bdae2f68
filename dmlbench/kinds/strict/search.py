"""The worst case over several searches: is any image in the ball misranked?

The first positive and the first negative are looked up anew at every step, and a query is broken as
soon as the negative is not farther than the positive at *any* image that any search looked at. A
protocol of kind "strict" lists the searches; each is run on the queries that survived those before it,
at the smallest eps first: what breaks a query at one eps breaks it at every larger one. A search may be
repeated in rounds until these break almost nothing (:mod:`dmlbench.kinds.strict.rounds`), and the smallest eps that
breaks each query may be looked for between those of the grid (:mod:`dmlbench.kinds.smallest`). What counts in
the end is the harness's own read-out of the image that a search stopped at (docs/strict.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmlbench.attacks import ATTACKS, Attack, choose_targets
from dmlbench.embedding import Embedder
from dmlbench.errors import UsageError
from dmlbench.fast.sweep import nearest_entries
from dmlbench.kinds.base import Outcome
from dmlbench.kinds.hunting import Field, Log, Watch, cost, read_out
from dmlbench.kinds.smallest import between, ladder
from dmlbench.kinds.strict.rounds import groups, rounds_run
from dmlbench.kinds.strict.summary import (
    CARRIED,
    CLEAN_WRONG,
    PROXIES,
    SMALLEST,
    SURVIVED,
    components,
    outcome,
    summary,
)
from dmlbench.kinds.strict.transfer import Transfer, and_then, transfers
from dmlbench.metrics import RECALL_AT, retrieval
from dmlbench.objectives import OBJECTIVES, gap
from dmlbench.optimizers import watched
from dmlbench.protocol import Protocol, Step
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Scene
from dmlbench.threat import Threat

FOLLOWED = ("recall_at_1", *PROXIES)
"""What is followed at every image that a search stopped at."""


class Misrank(Watch):
    """An attack's loss that also watches the margin of R@1."""

    def __init__(
        self,
        embedder: Embedder,
        objective: str,
        scene: Scene,
        log: Log,
        at: Int[Tensor, " n"] | None = None,
        eot: int = 1,
    ) -> None:
        super().__init__(embedder, scene, log, at, eot)
        self.objective = objective

    def _once(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (n,) and the margin (n,) of the embeddings (n, d) of one forward pass, from one table of distances."""
        scene = self.scene
        with torch.no_grad():
            self.log.unknown += (~torch.isfinite(e)).any(1).sum()
        positive, negative, of_target = nearest_entries(e.detach(), scene, self.objective == "margin_to_class")
        if self.objective == "margin":
            values = gap(e, scene, negative, positive)
            return values, values.detach()
        margins = gap(e.detach(), scene, negative, positive)
        if self.objective == "margin_to_entry":
            of_target = scene.chosen[:, 0]
        if of_target is not None:
            return gap(e, scene, of_target, positive), margins
        return OBJECTIVES[self.objective](e, scene), margins


class Transferred(Misrank):
    """The same, but for the loss: that of the model without its defence, which knows its own gallery."""

    def __init__(self, subject: Subject, on: Misrank, objective: str, scene: Scene, log: Log, eot: int) -> None:
        super().__init__(subject.embedder, objective, scene, log, eot=eot)
        self.on = on

    def _summed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values, _ = self.on._once(self.on.embedder(images))
        with torch.no_grad():
            _, margins = super()._summed(images.detach())
        return self.eot * values, margins

    def _spend(self, images: Tensor) -> None:
        self.log.spend(len(images), images.requires_grad)
        self.log.spend(self.eot * len(images), False)

    def __getitem__(self, index: Tensor) -> "Transferred":
        twin = super().__getitem__(index)
        assert isinstance(twin, Transferred)
        twin.on = self.on[index]  # type: ignore[assignment]
        return twin


@dataclass(frozen=True)
class Attempt:
    """What one search made of a batch.

    Attributes:
        images: (b, C, H, W) where each search stopped: the first misranked image, else the best.
        broken: (b,) bool, by the harness's own read-out of ``images``.
        iteration: (b,) loss values until then, 0 where not broken.
        readouts: ``recall_at_k``, ``map`` and ``map_at_r`` (b,) at ``images``, percent.
        gradients, values: passes spent on the batch.
        nonfinite: gradients of single images that were NaN or infinite, and taken as zero.
    """

    images: Tensor
    broken: np.ndarray
    iteration: np.ndarray
    readouts: dict[str, np.ndarray]
    gradients: int
    values: int
    nonfinite: int


def attempt(
    subject: Subject, step: Step, threat: Threat, positions: np.ndarray, seed: int, turn: int | None = None
) -> Attempt:
    """Run one step on the queries at ``positions``, each of its aims on what the ones before left.

    ``turn`` is of a step's round: how many rounds like it there were before. It has one aim, the next one each time.

    Raises:
        AssertionError: an image left the ball or [0, 1]; an optimizer is at fault.
        DataError: the model gives NaN or infinite embeddings for an image that the search looked at.
    """
    at = torch.from_numpy(positions).to(subject.device)
    scene, rng = subject.scene[at], subject.rng(seed, step.name, step.optimizer)[at]
    clean = subject.dataset.images[subject.rows[positions]].to(subject.device)
    attack = ATTACKS[step.attack]
    if attack.targets:
        attack = replace(attack, k=min(step.aims, most_aims(scene, attack)) if step.aims > 1 else attack.k)
        scene = choose_targets(attack, scene, rng)
        if turn is not None:
            scene = scene.aimed(scene.chosen[:, [turn % attack.k]])
    if turn is not None:
        rng = rng.fold(step.attack, threat.start, turn)
    count = scene.chosen.shape[1] if step.aims > 1 and turn is None else 1
    log = Log(clean)
    with torch.no_grad(), watched() as trouble:
        images = clean
        for j in range(count):
            aimed = scene.aimed(scene.chosen[:, j : j + 1]) if count > 1 else scene
            hunt = Misrank(subject.embedder, attack.objective, aimed, log, eot=threat.eot)
            if isinstance(step, Transfer):
                assert subject.undefended is not None
                plain = subject.undefended.scene[at].aimed(aimed.chosen)
                on = Misrank(subject.undefended.embedder, attack.objective, plain, Log(clean))
                hunt = Transferred(subject, on, attack.objective, aimed, log, threat.eot)
            images = hunt.searched(step.optimizer, clean, threat, rng.fold("aim", j))
            hunt.require_known(step.name, threat)
        images = log.stopped(images)
        readouts = read(subject, scene, threat, images, clean)
    broken = readouts["recall_at_1"] < 50.0
    return Attempt(images, broken, log.calls_until(broken), readouts, log.gradients, log.values, trouble.count)


def most_aims(scene: Scene, attack: Attack) -> int:
    """How many targets every query has: other classes, or entries of other classes where the targets are entries."""
    _, _, counts, _ = scene.gallery.by_class
    return len(counts) - 1 if attack.targets == "nearest_classes" else len(scene.gallery) - int(counts.max())


def read(subject: Subject, scene: Scene, threat: Threat, images: Tensor, clean: Tensor) -> dict[str, np.ndarray]:
    """The retrieval metrics (b,) of attacked queries, means over ``threat.eot`` passes, the ball checked.

    Raises:
        AssertionError: an image left the ball or [0, 1].
        DataError: the model gives NaN or infinite embeddings for one.
    """
    embeddings = read_out(subject.embedder, scene, threat, images, clean)
    draws = [retrieval(replace(scene, clean=e), RECALL_AT) for e in embeddings]
    return {name: np.mean([d[name] for d in draws], axis=0) for name in draws[0]}


@dataclass
class Standing:
    """Where every query stands, (Q,) each, while eps grows.

    Attributes:
        alive: right when clean and not broken yet.
        broken_by: :data:`SURVIVED`, :data:`CLEAN_WRONG`, :data:`CARRIED` or 2 + the step's index.
        iteration: loss values that the breaking step had seen.
        norm: size of the perturbation that broke it, or of the last one tried.
        round: the round of its step that broke it, from 1; 0 where no round did.
        worst: by read-out, the lowest value seen so far.
    """

    alive: np.ndarray
    broken_by: np.ndarray
    iteration: np.ndarray
    norm: np.ndarray
    round: np.ndarray
    worst: dict[str, np.ndarray]

    def absorb(self, positions: np.ndarray, index: int, result: Arrays, turn: int = 0) -> None:
        """What step ``index`` made of the queries at ``positions``, all alive until now, see :func:`piece`; ``turn`` is
        the round, from 1, of a step that has several."""
        hit = positions[result["broken"]]
        self.alive[hit] = False
        self.broken_by[hit] = index + 2
        self.iteration[hit] = result["iteration"][result["broken"]]
        self.norm[positions] = result["norm"]
        self.round[hit] = turn
        for name, values in self.worst.items():
            values[positions] = np.minimum(values[positions], result[name])


def begin(subject: Subject) -> Standing:
    """Every query before any attack.

    Raises:
        UsageError: the gallery holds a single class, so nothing can be misranked.
    """
    if len(subject.scene.gallery.labels.unique()) < 2:
        raise UsageError(f"data set {subject.dataset.name!r} has a single class: no query can be misranked")
    clean = retrieval(subject.scene, RECALL_AT)
    alive = clean["recall_at_1"] == 100.0
    return Standing(
        alive=alive,
        broken_by=np.where(alive, SURVIVED, CLEAN_WRONG).astype(np.int8),
        iteration=np.zeros(len(alive), dtype=np.int32),
        norm=np.zeros(len(alive), dtype=np.float32),
        round=np.zeros(len(alive), dtype=np.int32),
        worst={name: clean[name].copy() for name in FOLLOWED},
    )


def piece(
    subject: Subject,
    step: Step,
    threat: Threat,
    seed: int,
    keep: np.ndarray,
    turn: int | None,
    positions: np.ndarray,
) -> Arrays:
    """One step on some queries, as the arrays of a unit on disk.

    Returns:
        ``broken``, ``iteration`` and ``norm``, and by name the read-outs that :class:`Standing` follows, (n,) each;
        ``gradients``, ``values`` and ``nonfinite`` (1,); ``images`` (m, C, H, W) of those of ``positions`` that are in ``keep``.
    """
    result = attempt(subject, step, threat, positions, seed, turn)
    clean = subject.dataset.images[subject.rows[positions]].to(subject.device)
    return {
        "broken": result.broken,
        "iteration": result.iteration,
        "norm": threat.ball.size(result.images - clean).cpu().numpy(),
        **{name: result.readouts[name] for name in FOLLOWED},
        "gradients": np.array([result.gradients]),
        "values": np.array([result.values]),
        "nonfinite": np.array([result.nonfinite]),
        "images": result.images[torch.from_numpy(np.isin(positions, keep)).to(subject.device)].cpu().numpy(),
    }


def settle(
    field: Field, protocol: Protocol, standing: Standing, index: int, eps: str, keep: dict[int, np.ndarray]
) -> dict[str, Any]:
    """Run the protocol's step ``index`` on the survivors; what it cost, as :func:`summary` takes it.

    ``keep`` holds the adversarial image of some queries by position, replaced as they are attacked.
    """
    step = protocol.steps[index]
    group = groups(len(standing.alive), protocol.together)
    right, before = standing.broken_by != CLEAN_WRONG, standing.alive.copy()
    spent: list[tuple[np.ndarray, Arrays]] = []
    many = step.rounds > 1
    for r in range(step.rounds):
        now, turn = step.at(r)
        going = standing.alive.copy()
        if many and r:
            ran = rounds_run(step, group, right, before, standing.round)
            going &= ran[group] > r
        if not going.any():
            break
        threat = protocol.threat_at(eps, now.threat)
        search = partial(piece, field.subject, now, threat, field.seed, field.keep, turn if many else None)
        name = f"{step.name}@{eps}"
        results = field.over(name, f"{name} {index}{f' round {r}' if many else ''}", going, search)
        for positions, arrays in results:
            standing.absorb(positions, index, arrays, r + 1 if many else 0)
            keep.update(zip(positions[np.isin(positions, field.keep)].tolist(), arrays["images"], strict=True))
        spent += results
    return cost(spent)


def run(
    subject: Subject,
    protocol: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """The whole curve: every step at every eps, on the queries that are right when clean.

    ``sampled`` (S,) are the positions of the queries whose adversarial images are stored. None if ``work`` is a
    shard, since the other shards' results are unknown.
    """
    work = work or Work()
    shape = subject.dataset.images.shape
    grid, parts = protocol.eps_for(shape), components(protocol, shape)
    standing = begin(subject)
    field = Field.of(subject, protocol, seed, batch_size, progress, work, sampled)
    arrays: dict[str, np.ndarray] = {}
    sample: dict[str, np.ndarray] = {}
    spent: list[list[dict[str, Any]]] = []
    clean = retrieval(subject.scene, RECALL_AT)["recall_at_1"]
    images = {int(p): subject.dataset.images[subject.rows[[p]]][0].numpy() for p in sampled}
    for eps, part in zip(grid, parts, strict=True):
        name = part.name
        standing.broken_by[standing.broken_by > CARRIED] = CARRIED
        standing.round[:] = 0
        spent.append([settle(field, protocol, standing, i, eps, images) for i in range(len(protocol.steps))])
        arrays[f"{name}/value"] = outcome(standing.broken_by, clean)
        arrays[f"{name}/norm"] = standing.norm.copy()
        arrays[f"{name}/broken_by"] = standing.broken_by.copy()
        arrays[f"{name}/iteration"] = standing.iteration.copy()
        if protocol.together > 1:
            arrays[f"{name}/round"] = standing.round.copy()
        for proxy in PROXIES:
            arrays[f"{name}/{proxy}"] = standing.worst[proxy].copy()
        sample[name] = np.stack([images[int(p)] for p in sampled])
    halving: dict[str, Any] | None = None
    if protocol.threshold is not None:
        by = np.stack([arrays[f"{part.name}/broken_by"] for part in parts])
        arrays[SMALLEST], halving = smallest(field, protocol, grid, by, clean)
    if work.shard:
        return None
    seconds = {part.name: sum(cost["seconds"] for cost in costs) for part, costs in zip(parts, spent, strict=True)}
    broken_by = {eps: arrays[f"{part.name}/broken_by"] for eps, part in zip(grid, parts, strict=True)}
    extras = summary(protocol, grid, clean, subject.scene.labels.cpu().numpy(), arrays, spent, halving)
    nonfinite = sum(int(cost["nonfinite"]) for costs in [*spent, [halving] if halving else []] for cost in costs)
    return Outcome(parts, seconds, arrays, sample, extras, broken_by=broken_by, nonfinite=nonfinite)


def smallest(
    field: Field,
    protocol: Protocol,
    grid: Sequence[str],
    broken_by: Int[np.ndarray, "E Q"],
    clean: Float[np.ndarray, " Q"],
) -> tuple[Float[np.ndarray, " Q"], dict[str, Any]]:
    """The smallest eps found that breaks each query, on the [0, 1] scale, and what the search for it cost.

    Between the largest eps of the grid that leaves a query alone and the smallest that breaks it, by halving. inf where the
    largest eps does not break it, NaN where it is not right when clean.
    """
    rule = protocol.threshold
    assert rule is not None
    step = Step(name="smallest eps", attack=rule.attack, optimizer=rule.optimizer, threat=rule.threat)
    radii = [protocol.threat_at(eps).radius for eps in grid]

    def search(radius: float, positions: np.ndarray) -> Arrays:
        threat = protocol.threat_at("0", rule.threat).but(eps=radius)

        def by(step: Step, positions: np.ndarray) -> Arrays:
            return piece(field.subject, step, threat, field.seed, np.zeros(0, dtype=np.int64), None, positions)

        result = by(step, positions)
        for other in transfers(protocol):
            result = and_then(result, positions, partial(by, Transfer.of(step, other.name)))
        return result

    smallest_eps, spent = between(field, step.name, ladder(radii, rule), broken_by >= CARRIED, search)
    return np.where(np.isnan(clean) | (clean != 100.0), np.nan, smallest_eps), spent

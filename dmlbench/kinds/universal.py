"""One perturbation for all queries, read on queries that it was not made on.

The queries are dealt to two halves (:mod:`dmlbench.kinds.halves`). A perturbation is made on each, by the sum of an attack's losses
over it, and read on every query: on those of its own half ("seen"), and on the others ("unseen"). So each query is read once by either.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int
from pydantic import BaseModel, Field

from dmlbench.attacks import ATTACKS, Attack, AttackLoss, measure
from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import Problem, UsageError
from dmlbench.kinds import page as md
from dmlbench.kinds import readings
from dmlbench.kinds.base import (
    AGREE,
    QUERIES,
    SAMPLE,
    Curve,
    Form,
    Job,
    Kind,
    Line,
    Number,
    Outcome,
    Percent,
    Point,
    Points,
    Settings,
    Sheet,
    Stated,
    StoredSample,
    count_problems,
    outcomes_differ,
    text_of,
)
from dmlbench.kinds.halves import halves, made_on_each
from dmlbench.metrics import mean, retrieval
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS, watched
from dmlbench.optimizers.universal import perturbation, worn
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.run.search import batches, joined
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.threat import Threat

READ = ("seen", "unseen")
"""By which perturbation a query is read: that of its own half, or of the other."""
HALF = "universal/half"
BLOCK = 64
"""Pictures that go through the network at a time, whatever the batch size: it fixes how sums are rounded."""
SAME = 1e-4
"""How far apart two pictures' changes of a pixel may be, which the ends of [0, 1] did not cut off."""


class UniversalSettings(Settings):
    """``[settings]``."""

    attack: str = "WM"
    """whose losses are summed"""


def attack_of(rules: Protocol) -> Attack:
    """The attack of a protocol.

    Raises:
        UsageError: an unknown one, or one that the kind cannot read.
    """
    name = UniversalSettings.of(rules).attack
    attack = ATTACKS[name]
    if "recall_at_1" not in attack.readouts or attack.targets:
        raise UsageError(f"[settings] attack {name!r} has targets, or is not read by R@1")
    return attack


def components(rules: Protocol, shape: Sequence[int]) -> list[Component]:
    """Seen and unseen at every eps of the grid, ascending, for images of this shape (channels, height, width)."""
    return [
        Component(
            name=f"{read}@{eps}", attack=read, optimizer="universal", readout="recall_at_1", worst=0, best=100, threat={"eps": eps}
        )
        for eps in rules.eps_for(shape)
        for read in READ
    ]  # fmt: skip


def threat_at(rules: Protocol, eps: str) -> Threat:
    """The threat at one eps, with steps of 2.5 eps / steps."""
    threat = rules.threat_at(eps)
    return threat.but(step=2.5 * threat.radius / max(1, threat.steps))


def made(
    subject: Subject,
    attack: Attack,
    threat: Threat,
    seed: int,
    half: Int[np.ndarray, " Q"],
    which: int,
    keep: np.ndarray,
) -> Arrays:
    """The perturbation of the half ``which``, on every query.

    Returns:
        ``recall_at_1`` and ``norm`` (Q,), ``images`` (m, C, H, W) at the positions ``keep``, and ``nonfinite`` (1,) gradients.

    Raises:
        AssertionError: an image left the ball or [0, 1]. DataError: the model gives NaN or infinite embeddings for one.
    """
    known = subject[np.flatnonzero(half == which)]
    rng = known.rng(seed, "universal")
    with torch.no_grad(), watched() as trouble:
        loss = AttackLoss(subject.embedder, OBJECTIVES[attack.objective], known.scene, threat.eot)
        shared = perturbation(loss, known.images(0, len(known.rows)), threat, rng, block=BLOCK)
    blocks = []
    images = []
    for a, b in batches(len(subject.rows), BLOCK):
        clean = subject.images(a, b)
        moved = worn(shared, clean, threat)
        blocks.append(dict(measure(subject.embedder, attack, threat, moved, clean, subject.scene[a:b])))
        images.append(moved[torch.from_numpy(keep[(keep >= a) & (keep < b)] - a).to(moved.device)].cpu().numpy())
    read = joined(blocks)
    return {
        "recall_at_1": read["recall_at_1"].astype(np.float32),
        "norm": read["norm"],
        "images": np.concatenate(images),
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
    """Both halves' perturbations at every eps; None where ``work`` is a shard, whose part is then done. A unit is one of them."""
    work, parts, half = work or Work(), components(rules, subject.dataset.images.shape), halves(subject.rows, seed)
    attack = attack_of(rules)

    def make(eps: str, which: int) -> Arrays:
        return made(subject, attack, threat_at(rules, eps), seed, half, which, sampled)

    each = made_on_each("universal", subject, rules, make, progress, work)
    if each is None:
        return None
    arrays: dict[str, np.ndarray] = {HALF: half}
    sample: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        pair = [each[part.threat["eps"], which] for which in (0, 1)]
        by = half if part.attack == "seen" else 1 - half
        for key, name in (("recall_at_1", "value"), ("norm", "norm")):
            arrays[f"{part.name}/{name}"] = np.where(by == 0, pair[0][key], pair[1][key])
        sample[part.name] = np.where(by[sampled][:, None, None, None] == 0, pair[0]["images"], pair[1]["images"])
        seconds[part.name] = sum(float(p["seconds"].sum()) for p in pair) / len(READ)
    clean = retrieval(subject.scene, (1,))["recall_at_1"]
    nonfinite = sum(int(u["nonfinite"].sum()) for u in each.values())
    return Outcome(parts, seconds, arrays, sample, readings.summary(parts, clean, arrays), nonfinite=nonfinite)


class RowForm(Form):
    """R@1 at one eps."""

    eps: str
    seen: Points
    unseen: Points


class UniversalForm(Form):
    """``extras.universal``."""

    clean: Points
    curve: Annotated[tuple[RowForm, ...], Field(min_length=1)]


class Columns(BaseModel):
    """In a row of a board."""

    universal_recall_at_1: Percent | None = None
    """R@1 under one perturbation for all queries, made on the other half of them, at the largest eps of the grid"""
    universal_recall_at_1_lo: float | None = None
    universal_recall_at_1_hi: float | None = None
    universal_seen_recall_at_1: Percent | None = None
    universal_seen_recall_at_1_lo: float | None = None
    universal_seen_recall_at_1_hi: float | None = None


NUMBERS = (
    Number(
        "universal_recall_at_1", "R@1 under an unseen universal perturbation %",
        "The share of queries that are answered right with one and the same perturbation added to all of them, which was made on other "
        "queries. It says what a perturbation does that is printed once and worn by everybody.",
        ranks=True, drop=1.0,
    ),
    Number(
        "universal_seen_recall_at_1", "R@1 under a universal perturbation that saw the query %",
        "The same, where the query was among those that the perturbation was made on. The gap to the unseen number is what it learnt of "
        "single queries rather than of the model.",
    ),
)  # fmt: skip
COLUMN = dict(zip(("unseen", "seen"), (n.name for n in NUMBERS), strict=True))


def curve(e: Evaluation) -> Curve:
    """R@1 of unseen queries against eps."""
    extras = e.extras["universal"]
    points = (Point(row["eps"], row["unseen"], f"unseen@{row['eps']}") for row in extras["curve"])
    return Curve("R@1 under an unseen universal perturbation, %", (Point("0", extras["clean"], "recall_at_1"), *points))


def check(p: Protocol) -> None:
    """That the attack is one that can be read.

    Raises:
        UsageError: it is not.
    """
    attack_of(p)


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That there are queries for two halves.

    Raises:
        UsageError: there are not.
    """
    halves(dataset.query, seed)


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """At every eps as many gradients of each query as there are steps."""
    for eps in p.eps_for(dataset.images.shape):
        threat = threat_at(p, eps)
        yield Job(
            name=f"universal@{eps}", eps=eps, optimizer="universal", threat=threat, attack=attack_of(p),
            passes=OPTIMIZERS["universal"].passes(threat), steps=threat.steps, batch=lambda size: min(BLOCK, -(-queries // 2)),
        )  # fmt: skip


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """R@1 by eps, seen and unseen."""
    rows = [("0", *2 * (text_of(extras["clean"]),))]
    rows += [(row["eps"], *(text_of(row[part]) for part in READ)) for row in extras["curve"]]
    yield Sheet(
        "R@1 % under one perturbation for all queries", ("eps",), ("made on this half", "on the other"), tuple(rows)
    )


def page(p: Protocol) -> Iterator[str]:
    """What the perturbation is made on and read on."""
    yield (
        f"The queries are dealt to two halves. One perturbation is made on each ({p.threat_at('0').steps} signed steps of 2.5 eps / steps on the sum of "
        f"`{UniversalSettings.of(p).attack}`'s losses), and added to every query: to those that it saw, and to the others. Score: R@1 of the others, "
        "percent, ↑ robust.\n"
    )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """Which half each query is of."""
    return {HALF: ("i", 1)}


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """The halves are those that are drawn."""
    e = stated.evaluation
    wrong = e.arrays[HALF] != halves(e.arrays["query"], stated.rules.seed)
    yield from count_problems(wrong, HALF, "are not the half that is drawn")


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The stored images of a half are all moved by one perturbation, and show what is stated."""
    e, subject, at = stated.evaluation, stored.subject, stored.positions
    attack, scene = attack_of(stated.rules), subject.scene[torch.from_numpy(at).to(subject.device)]
    half, clean = e.arrays[HALF][at], stored.clean.cpu().numpy()
    for c in stated.parts:
        images = e.sample[c.name]
        for which in (0, 1):
            one, rest = images[half == which], clean[half == which]
            free = (one > SAME) & (one < 1 - SAME)
            moved = one - rest
            spread = np.where(free, moved, -np.inf).max(0, initial=-np.inf) - np.where(free, moved, np.inf).min(
                0, initial=np.inf
            )
            if (spread > SAME).any():
                yield Problem(
                    2, f"{SAMPLE} {c.name}", f"the images of half {which} are not all moved by one perturbation"
                )
        threat = stated.rules.threat_of(c)
        read_outs = measure(
            subject.embedder, attack, threat, torch.from_numpy(images.copy()).to(subject.device), stored.clean, scene
        )
        yield from outcomes_differ(e, c, read_outs, at)


def share(
    stated: Stated, subject: Subject, draw: np.random.Generator, progress: Progress
) -> tuple[str, Iterable[Problem]]:
    """One half's perturbation at one eps, drawn, made again and read on all queries."""
    e, rules, half = stated.evaluation, stated.rules, halves(subject.rows, stated.rules.seed)
    grid = rules.eps_for(subject.dataset.images.shape)
    eps, which = grid[draw.integers(len(grid))], int(draw.integers(2))
    progress.start("universal", len(half))
    again = made(
        subject,
        attack_of(rules),
        threat_at(rules, eps),
        rules.seed,
        half,
        which,
        np.zeros(0, dtype=np.int64),
    )
    progress.advance("universal", len(half))
    problems = []
    for read, at in (("seen", half == which), ("unseen", half != which)):
        stated_mean, mean_again = (
            mean(values[at]) for values in (e.arrays[f"{read}@{eps}/value"], again["recall_at_1"])
        )
        if abs(stated_mean - mean_again) > AGREE:
            words = f"give R@1 {stated_mean:.2f} of half {which}'s perturbation, made again it gives {mean_again:.2f}"
            problems.append(Problem(3, f"{QUERIES} {read}@{eps}/value", words))
    return f"made half {which}'s perturbation at {eps} again, and read it on all {len(half)} queries", problems


UNIVERSAL = Kind(
    name="universal",
    title="one perturbation for all queries, made on one half of them and read on the other, at every eps of the grid",
    meaning="One and the same perturbation is added to every query. It is made on one half of the queries and read on the other, so it "
    "counts on queries that it never saw.",
    needs=("grid",),
    reads=("settings",),
    unread=("eps", "step", "start", "restarts", "queries"),
    check=check,
    run=run,
    components=components,
    whole_set=True,
    require=require,
    optimizers=lambda rules: {"universal"},
    jobs=jobs,
    form=UniversalForm,
    numbers=NUMBERS,
    columns=Columns,
    read=readings.read("universal", COLUMN),
    by_query=readings.by_query("universal", COLUMN),
    curve=curve,
    shown=tuple(COLUMN.values()),
    tables=tables,
    page=page,
    arrays=arrays,
    outcome_problems=outcome_problems,
    number_problems=readings.number_problems("universal"),
    replay=replay,
    share=share,
)

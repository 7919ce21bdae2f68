"""The record of kind poison: what pictures of the gallery take that are perturbed to be the first answer to many queries."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from dmlbench.attacks import ATTACKS
from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import Problem, UsageError
from dmlbench.kinds import page as md
from dmlbench.kinds.base import (
    AGREE,
    DIFFER,
    QUERIES,
    SAMPLE,
    Count,
    Curve,
    Form,
    Job,
    Kind,
    Line,
    Number,
    Percent,
    Point,
    Points,
    Sheet,
    Stated,
    StoredSample,
    count_problems,
    differences,
    text_of,
)
from dmlbench.kinds.halves import halves
from dmlbench.kinds.poison.search import (
    HALF,
    NEAREST,
    OPTIMIZER,
    PoisonSettings,
    components,
    count_of,
    made,
    read,
    run,
    sample_name,
    summary,
    two_nearest,
)
from dmlbench.metrics import mean
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.run.subject import Progress, Subject


class RowForm(Form):
    """A number of poisoned pictures at one eps; shares of the queries, percent."""

    eps: str
    poisons: Count
    hub_rate: Points
    known: Points
    natural: Points
    recall_at_1: Points


class PoisonForm(Form):
    """``extras.poison``."""

    largest_hub: Points
    table: Annotated[tuple[RowForm, ...], Field(min_length=1)]


class Columns(BaseModel):
    """In a row of a board, with the most poisons at the largest eps of the grid."""

    poison_free: Percent | None = None
    poison_free_lo: float | None = None
    poison_free_hi: float | None = None
    poison_recall_at_1: Percent | None = None
    poison_recall_at_1_lo: float | None = None
    poison_recall_at_1_hi: float | None = None
    hub_rate: Percent | None = Field(None, title="Hub rate %")
    """share of the queries that the poisoned pictures take, which were made on the other half of them"""
    natural_hub_rate: Percent | None = Field(None, title="Natural hub rate %")
    """what as many hubs of the clean gallery take, found on the other half too"""
    largest_hub: Percent | None = Field(None, title="Largest natural hub %")
    """share of the queries whose nearest clean entry is the greatest hub of the gallery"""


NUMBERS = (
    Number(
        "poison_free", "Queries that no poisoned picture answers %",
        "A few pictures of the gallery are perturbed to be the first answer to as many queries as possible, on one half of the queries. This "
        "is the share of the other half whose first answer is none of them: 100 less the hub rate.",
        ranks=True, drop=1.0,
    ),
    Number(
        "poison_recall_at_1", "R@1 with poisoned pictures %",
        "R@1 of the queries that the pictures were not made on, with the poisoned pictures in the gallery. One that is the first answer to a "
        "query of its own class does no harm here.",
    ),
)  # fmt: skip
KEY = {"poison_free": "value", "poison_recall_at_1": "recall_at_1"}


def read_columns(e: Evaluation) -> dict[str, float | None]:
    """The numbers, and the columns beside them."""
    extras = e.extras["poison"]
    last = extras["table"][-1]
    return {
        "poison_free": 100.0 - last["hub_rate"],
        "poison_recall_at_1": last["recall_at_1"],
        "hub_rate": last["hub_rate"],
        "natural_hub_rate": last["natural"],
        "largest_hub": extras["largest_hub"],
    }


def by_query(e: Evaluation) -> dict[str, np.ndarray]:
    """What each query adds to the numbers; empty without the queries' outcomes."""
    last = e.extras["poison"]["table"][-1]
    values_by_name = {name: e.arrays.get(f"poison-{last['poisons']}@{last['eps']}/{key}") for name, key in KEY.items()}
    return {name: values.astype(np.float64) for name, values in values_by_name.items() if values is not None}


def curve(e: Evaluation) -> Curve:
    """Queries that none of the most poisons answers, against eps; at 0 those that no natural hub does."""
    table = e.extras["poison"]["table"]
    most = [row for row in table if row["poisons"] == table[-1]["poisons"]]
    points = (Point(r["eps"], 100.0 - r["hub_rate"], f"poison-{r['poisons']}@{r['eps']}") for r in most)
    return Curve("queries that no poisoned picture answers, %", (Point("0", 100.0 - most[0]["natural"]), *points))


def check(p: Protocol) -> None:
    """That the settings are known.

    Raises:
        UsageError: they are not.
    """
    PoisonSettings.of(p)


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That there are queries for two halves, and as many pictures in the gallery as are tried, beside one that is clean.

    Raises:
        UsageError: there are not.
    """
    halves(dataset.query, seed)
    if (seeds := PoisonSettings.of(rules).seeds) >= len(dataset.gallery):
        raise UsageError(
            f"data set {dataset.name!r} has {len(dataset.gallery)} pictures in its gallery, too few for {seeds} seeds of poison"
        )


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """At every eps two halves' pictures, each moved with as many gradients as there are steps."""
    seeds = PoisonSettings.of(p).seeds
    share = 2 * seeds / max(1, queries)
    for eps in p.eps_for(dataset.images.shape):
        threat = p.threat_at(eps)
        gradients, values = OPTIMIZERS[OPTIMIZER].passes(threat)
        yield Job(
            name=f"poison@{eps}", eps=eps, optimizer=OPTIMIZER, threat=threat, attack=ATTACKS["WM"],
            passes=(round(gradients * share), round(values * share)), steps=threat.steps, weight=share, batch=lambda size: seeds,
        )  # fmt: skip


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """What poisons take, by eps and number."""
    keys = ("hub_rate", "known", "natural", "recall_at_1")
    rows = tuple((row["eps"], str(row["poisons"]), *(text_of(row[key], 2) for key in keys)) for row in extras["table"])
    heads = ("hub rate", "on the known", "as many natural hubs", "R@1")
    yield Sheet("queries whose first answer is a poisoned picture, %", ("eps", "poisons"), heads, rows)
    yield Line(
        f"the first answer to {text_of(extras['largest_hub'], 2)} % of the queries",
        "the largest hub of the clean gallery:",
    )


def page(p: Protocol) -> Iterator[str]:
    """Which pictures are moved, and what is read."""
    settings = PoisonSettings.of(p)
    yield (
        f"The queries are dealt to two halves. The {settings.seeds} entries that are the first answer to most queries of a half are each moved within eps, by "
        f"{p.threat_at('0').steps} steps of `{OPTIMIZER}` on a soft count of the queries that they take, and the {' or '.join(map(str, settings.poisons))} that together take most of that half are put in "
        "the gallery for the other. Score: the share of the other half whose first answer is none of them, percent, ↑ robust.\n"
    )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """Each query's half and nearest clean entry, and what the poisons of either half do to it."""
    outcomes = {f"{c.name}/{key}": ("f", 1) for c in parts for key in ("known", "recall_at_1")}
    return {HALF: ("i", 1), NEAREST: ("i", 1), **outcomes}


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """The halves are those that are drawn, and outcomes are 0 or 100, R@1 there for the queries that have one when clean."""
    e = stated.evaluation
    wrong = e.arrays[HALF] != halves(e.arrays["query"], stated.rules.seed)
    yield from count_problems(wrong, HALF, "are not the half that is drawn")
    for c in stated.parts:
        for key in ("value", "known", "recall_at_1"):
            values = e.arrays[f"{c.name}/{key}"]
            missing = (
                np.isnan(e.arrays["benign/recall_at_1"]) if key == "recall_at_1" else np.zeros(len(values), dtype=bool)
            )
            yield from count_problems(
                np.isnan(values) != missing, f"{c.name}/{key}", "outcomes are missing, or there where none is"
            )
            yield from count_problems(
                ~missing & ~np.isin(values, (0.0, 100.0)), f"{c.name}/{key}", "outcomes are other than 0 and 100"
            )


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again?"""
    e = stated.evaluation
    yield from differences("extras.poison", e.extras["poison"], summary(stated.parts, e.arrays))


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The stored pictures are of the gallery and within eps, and in the gallery they do to every query what is stated."""
    e, subject, rules = stated.evaluation, stored.subject, stated.rules
    entries, half = subject.dataset.gallery, e.arrays[HALF]
    nearest = entries[two_nearest(subject.scene)[1][:, 0].cpu().numpy()]
    if (off := nearest != e.arrays[NEAREST]).mean() > DIFFER:
        yield Problem(2, f"{QUERIES} {NEAREST}", f"{int(off.sum())} are others than the nearest clean entries")
    for eps in dict.fromkeys(c.threat["eps"] for c in stated.parts):
        parts = [c for c in stated.parts if c.threat["eps"] == eps]
        for which in (0, 1):
            name, most = sample_name(eps, which), count_of(parts[-1])
            images, rows = e.sample.get(name), e.sample.get(f"{name}/rows")
            shape = (most, *subject.dataset.images.shape)
            if (
                images is None
                or images.shape != shape
                or images.dtype != np.float32
                or rows is None
                or rows.shape != (most,)
            ):
                yield Problem(
                    2, f"{SAMPLE} {name}", f"is not float32 images of shape {shape} and the rows of their pictures"
                )
                continue
            if len(np.unique(rows)) < most or not np.isin(rows, entries).all():
                yield Problem(2, f"{SAMPLE} {name}/rows", "are not different pictures of the gallery")
                continue
            moved, clean = (
                torch.from_numpy(images.copy()).to(subject.device),
                subject.dataset.images[rows].to(subject.device),
            )
            if not bool(rules.threat_of(parts[0]).contains(moved, clean).all()):
                yield Problem(
                    2, f"{SAMPLE} {name}", f"pictures are outside the {rules.norm} ball of {eps} or outside [0, 1]"
                )
                continue
            place = subject.dataset.positions[rows]
            for c in parts:
                with torch.no_grad():
                    free, right = read(subject, place[: count_of(c)], moved[: count_of(c)])
                for key, again, at in (
                    ("value", free, half != which),
                    ("known", free, half == which),
                    ("recall_at_1", right, half != which),
                ):
                    outcomes = e.arrays[f"{c.name}/{key}"]
                    differ = at & ~((outcomes == again) | (np.isnan(outcomes) & np.isnan(again)))
                    if differ.sum() > max(1, DIFFER * at.sum()):
                        words = f"{int(differ.sum())} of {int(at.sum())} queries are answered otherwise than stated"
                        yield Problem(2, f"{QUERIES} {c.name}/{key}", words)


def share(
    stated: Stated, subject: Subject, draw: np.random.Generator, progress: Progress
) -> tuple[str, Iterable[Problem]]:
    """One half's poisons at one eps, drawn, made again and read on all queries."""
    e, rules, half = stated.evaluation, stated.rules, halves(subject.rows, stated.rules.seed)
    grid = rules.eps_for(subject.dataset.images.shape)
    eps, which = grid[draw.integers(len(grid))], int(draw.integers(2))
    progress.start("poison", len(half))
    again = made(subject, rules, rules.threat_at(eps), rules.seed, half, which)
    progress.advance("poison", len(half))
    problems = []
    for m in PoisonSettings.of(rules).poisons:
        stated_mean, mean_again = (
            mean(values[half != which]) for values in (e.arrays[f"poison-{m}@{eps}/value"], again[f"free-{m}"])
        )
        if abs(stated_mean - mean_again) > AGREE:
            words = f"leave {stated_mean:.2f} % of the queries to half {which}'s poisons, made again they leave {mean_again:.2f} %"
            problems.append(Problem(3, f"{QUERIES} poison-{m}@{eps}/value", words))
    return f"made half {which}'s poisons at {eps} again, and read them on all {len(half)} queries", problems


POISON = Kind(
    name="poison",
    title="pictures of the gallery perturbed to be the first answer to many queries, at every eps of the grid",
    meaning="A few pictures of the gallery are perturbed, once and for all queries, to be the first answer to as many as possible. They are "
    "made on one half of the queries and read on the other; what hubs of the clean gallery take stands beside it.",
    needs=("grid",),
    reads=("settings",),
    unread=("eps", "step", "eot", "queries"),
    check=check,
    run=run,
    components=components,
    moved=False,
    whole_set=True,
    require=require,
    averages=False,
    optimizers=lambda rules: {OPTIMIZER},
    jobs=jobs,
    form=PoisonForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read_columns,
    by_query=by_query,
    curve=curve,
    shown=("poison_free", "hub_rate", "natural_hub_rate", "largest_hub", "poison_recall_at_1"),
    tables=tables,
    page=page,
    arrays=arrays,
    outcome_problems=outcome_problems,
    number_problems=number_problems,
    replay=replay,
    share=share,
)

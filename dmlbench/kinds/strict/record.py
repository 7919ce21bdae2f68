"""The record of kind strict: ``steps`` run one after another on the survivors, at every eps of the ``grid``."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from dmlbench.attacks import ATTACKS, require_decision
from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import UsageError
from dmlbench.kinds import page as md
from dmlbench.kinds.base import (
    Cost,
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
    text_of,
)
from dmlbench.kinds.smallest import Beyond, SmallestForm, columns_of, halvings, shown, together
from dmlbench.kinds.strict import checks
from dmlbench.kinds.strict.search import run
from dmlbench.kinds.strict.summary import SMALLEST, components
from dmlbench.kinds.strict.transfer import Transfer, behind, transfers
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol
from dmlbench.results import Evaluation
from dmlbench.threat import length


class StepForm(Form):
    """What one step did at one eps."""

    step: str
    attacked: Count
    broken: Count
    gradients: Count
    values: Count
    seconds: Cost
    points: Points
    rounds: tuple[Count, ...] | None = None


class PointForm(Form):
    """One eps."""

    eps: str
    recall_at_1: Points
    recall_at_2: Points
    recall_at_4: Points
    recall_at_8: Points
    map_at_r: Points
    carried: Points
    missed: Points | None = None
    missed_at_most: Points | None = None
    steps: tuple[StepForm, ...]


class StrictForm(Form):
    """``extras.strict``."""

    norm: Literal["linf", "l2"]
    clean: Points
    curve: Annotated[tuple[PointForm, ...], Field(min_length=1)]
    area: Points | None = None
    smallest_eps: SmallestForm | None = None
    gradients_per_query: Cost
    values_per_query: Cost
    codes: dict[str, int]


class Columns(BaseModel):
    """In a row of a board."""

    worst_case_recall_at_1: Percent | None = None
    worst_case_recall_at_1_lo: float | None = None
    worst_case_recall_at_1_hi: float | None = None
    smallest_eps: Annotated[float, Field(gt=0)] | None = None
    """median over the queries that are right when clean of the smallest eps found that breaks it, [0, 1] scale; the
    largest eps of the grid where it is beyond that: then smallest_eps_beyond is 1"""
    smallest_eps_lo: Annotated[float, Field(ge=0)] | None = None
    smallest_eps_hi: Annotated[float, Field(ge=0)] | None = None
    """empty where it is beyond the largest eps of the grid"""
    smallest_eps_beyond: Beyond = None
    worst_case_missed_at_most: Percent | None = Field(None, title="Missed at most, points")
    """upper bound of the points that ten times the rounds would take from worst_case_recall_at_1"""
    worst_case_area: Percent | None = None
    """version 1: mean height of the curve of worst-case R@1 from eps 0 to the largest"""
    worst_case_area_lo: float | None = None
    worst_case_area_hi: float | None = None


NUMBERS = (
    Number(
        "smallest_eps",
        "Smallest eps that breaks a query",
        "Half of the queries that are right when clean are broken by a change of this size or a smaller one: the median of the "
        "smallest eps found for each. Larger is more robust, and the truth is at most this, since a better search finds less.",
        ranks=True,
        median=True,
        length=True,
        beside_ers=True,
    ),
    Number(
        "worst_case_recall_at_1",
        "Worst-case R@1 %",
        "The share of queries that are answered right whatever the searches of the strict protocol do to them, at the largest "
        "eps of its grid. The truth is at most this, since a better search can only break more.",
        drop=1.0,
        beside_ers=True,
    ),
    Number(
        "worst_case_area",
        "Area of the worst-case curve %",
        "The mean height of the curve of worst-case R@1 from eps 0 to the largest of the grid. Version 1 of the strict "
        "protocols ranked by it.",
        ranks=True,
        drop=1.0,
    ),
)


def read(e: Evaluation) -> dict[str, float | None]:
    """The numbers, at the largest eps of the grid, which is the field's; and the columns that are no mean over queries."""
    extras = e.extras["strict"]
    last, smallest = extras["curve"][-1], extras.get("smallest_eps")
    columns = {
        "worst_case_recall_at_1": last["recall_at_1"],
        "worst_case_missed_at_most": last.get("missed_at_most"),
        "worst_case_area": extras.get("area"),
    }
    if smallest and (extras["clean"] or 0.0) > 0:  # of queries that are right when clean
        columns |= columns_of("smallest_eps", smallest)
    return columns


def by_query(e: Evaluation) -> dict[str, np.ndarray]:
    """What each query adds to the numbers; empty without the queries' outcomes.

    The area is linear in the outcomes, so each query has one of its own. A smallest eps beyond the largest of the grid
    counts as that.
    """
    extras = e.extras["strict"]
    names = [f"strict@{row['eps']}" for row in extras["curve"]]
    keys = ["benign/recall_at_1", *(f"{name}/value" for name in names)]
    if "label" not in e.arrays or any(key not in e.arrays for key in keys):
        return {}
    curve = np.stack([e.arrays[key].astype(np.float64) for key in keys], axis=1)
    values = {"worst_case_recall_at_1": curve[:, -1]}
    if extras.get("area") is not None:
        radii = np.array([0.0, *(length(row["eps"]) for row in extras["curve"])])
        values["worst_case_area"] = (np.diff(radii) * (curve[:, 1:] + curve[:, :-1]) / 2).sum(1) / radii[-1]
    if SMALLEST in e.arrays and extras.get("smallest_eps"):
        values["smallest_eps"] = np.minimum(e.arrays[SMALLEST].astype(np.float64), extras["smallest_eps"]["largest"])
    return values


def curve(e: Evaluation) -> Curve:
    """Worst-case R@1 against eps."""
    extras = e.extras["strict"]
    points = (Point(row["eps"], row["recall_at_1"], f"strict@{row['eps']}") for row in extras["curve"])
    return Curve("worst-case R@1, %", (Point("0", extras["clean"], "recall_at_1"), *points))


def check(p: Protocol) -> None:
    """That the rounds of its steps and the groups that end together fit one another, and searches by decisions their attacks.

    Raises:
        UsageError: they do not.
    """
    if any(step.rounds > 1 for step in p.steps) != (p.together > 1):
        raise UsageError("together, and a step with rounds above 1, do nothing without each other")
    for step in p.steps:
        for turn in range(max(1, len(step.turns))):
            require_decision(step.at(turn)[0].attack, step.at(turn)[0].optimizer)
    if p.threshold is not None:
        require_decision(p.threshold.attack, p.threshold.optimizer)


def optimizers(p: Protocol) -> set[str]:
    """Those of the steps and of the search for the smallest eps."""
    return {step.optimizer for step in p.steps} | ({p.threshold.optimizer} if p.threshold else set())


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """Every step at every eps, and the search for the smallest eps, at their most: as if every query survived."""
    others = len(np.unique(dataset.labels[dataset.gallery])) - 1
    grid = p.eps_for(dataset.images.shape)
    for eps in grid:
        for step in p.steps:
            threat, optimizer = p.threat_at(eps, step.threat), OPTIMIZERS[step.optimizer]
            times = step.rounds if step.rounds > 1 else max(1, min(step.aims, others))
            gradients, values = (times * n for n in optimizer.passes(threat))
            attack = ATTACKS[step.attack]
            yield Job(
                name=f"{step.name}@{eps}", called=step.attack, eps=eps, optimizer=step.optimizer, threat=threat,
                attack=replace(attack, k=1) if attack.targets else attack, passes=(gradients, values),
                steps=threat.queries if optimizer.by_queries else threat.steps, weight=float(times),
                at_most=(eps, step) != (grid[0], p.steps[0]), undefended=isinstance(step, Transfer),
            )  # fmt: skip
    if (rule := p.threshold) is not None:
        threat, most = p.threat_at(grid[-1], rule.threat), halvings(rule)
        gradients, values = (most * n for n in OPTIMIZERS[rule.optimizer].passes(threat))
        job = Job(
            name="smallest eps", called=rule.attack, optimizer=rule.optimizer, threat=threat, attack=ATTACKS[rule.attack],
            passes=(gradients, values), steps=threat.steps, weight=float(most), at_most=True,
            batch=partial(together, rule, len(grid)),
        )  # fmt: skip
        yield job
        for step in transfers(p):
            yield replace(job, name=f"smallest eps, {step.name}", undefended=True)


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """The curve over eps, what each step contributed and cost, what may be missed, and the headline."""
    curve = extras["curve"]
    steps = tuple(s["step"] for s in curve[0]["steps"])
    missed = ("missed", "missed_at_most") if "missed" in curve[0] else ()
    heads = ("R@1", *(("missed", "≤") if missed else ()), "R@2 ≤", "R@8 ≤", "MAP@R ≤", "before", *steps)
    keys = ("recall_at_1", *missed, "recall_at_2", "recall_at_8", "map_at_r", "carried")
    rows = [
        (row["eps"], *(text_of(row[key]) for key in keys), *(text_of(s["points"]) for s in row["steps"]))
        for row in curve
    ]
    clean = ("0", text_of(extras["clean"]))
    yield Sheet(f"worst case, {extras['norm']}", ("eps",), heads, (clean, *rows))
    yield Line(
        "≤: read at the images that the search for R@1 found; no search aimed at it, so the true worst case is lower. "
        "before: points broken at a smaller eps; then points that each step broke."
    )
    if missed:
        ran = ", ".join(str(len(s["rounds"])) for row in curve for s in row["steps"] if "rounds" in s)
        yield Line(
            "missed: points of R@1 that ten times the rounds would still take, estimated, and at most. "
            f"Rounds by eps: {ran}."
        )
    if "smallest_eps" in extras:
        part = extras["smallest_eps"]
        ends = f" ({' – '.join(shown(end, part) for end in part['interval'])})" if part["interval"] else ""
        someone = (extras["clean"] or 0.0) > 0  # where no query is right, none is broken either
        head = f"smallest eps that breaks a query, median {shown(part['median'], part) if someone else text_of(None)}{ends}"
    else:
        head = f"area under the curve {text_of(extras['area'])}"
    spent = [text_of(extras[f"{what}_per_query"], 0) for what in ("gradients", "values")]
    yield Line(f"{spent[0]} gradients and {spent[1]} values a right query and eps", head)


def page(p: Protocol) -> Iterator[str]:
    """The steps and what they cost, and how the smallest eps is found."""
    rows, total = [], 0
    for s in p.steps:
        t = p.threat_at(next(iter(p.grid.values()))[0], s.threat)
        times = s.rounds if s.rounds > 1 else s.aims
        gradients, values = (times * n for n in OPTIMIZERS[s.optimizer].passes(t))
        total += gradients
        spent = f"{gradients} gradients" if gradients else f"{values} values"
        if times > 1:  # one aim for each other class, where there are fewer
            spent = f"at most {spent}"
        rows.append([s.name, f"{s.attack}@{s.optimizer}", str(s.aims), md.threat(s.threat), spent])
    yield from md.table(["step", "attack", "aims", "own threat", "cost of a survivor"], rows)
    for s in p.steps:
        if s.rounds > 1:
            turns = ", ".join(f"{t.attack or s.attack} from {t.start or 'its start'}" for t in s.turns)
            yield (
                f"{s.name} is repeated on what is left, in turn {turns}, where an attack that aims takes the next of {s.aims} targets each "
                f"time. It ends for each group of {p.together} queries after {s.rounds} rounds, or once both hold: it has run {s.fewest} times "
                f"for each of the group's queries that were right when clean, whichever it ran for, and the last half of the rounds broke no "
                f"more than {s.until:g} % of them.\n"
            )
    headline = "and the area under the curve" if p.threshold is None else "and the smallest eps that breaks a query"
    yield (
        f"Each step attacks what the ones before left; at most {total} gradients ({total / 32:.1f} runs of PGD-32) "
        f"a query and eps. Score: R@1 at each eps, percent, ↑ robust, {headline}.\n"
    )
    if (rule := p.threshold) is not None:
        yield (
            f"The smallest eps of each query is found by halving, on a log scale of {rule.parts} steps from one eps of the grid to the next and "
            f"in each of the {rule.octaves} halves below the smallest, with one search each ({rule.attack}@{rule.optimizer}, {md.threat(rule.threat)}), "
            f"so at most {halvings(rule)} of them. Score: the median over the queries that are right when clean, on the [0, 1] scale, ↑ robust.\n"
        )


STRICT = Kind(
    name="strict",
    title="steps run one after another on the survivors at every eps of the grid",
    meaning="Searches of many ways run one after another on every query that is still answered right, at every eps of a grid, and "
    "the first that succeeds breaks it. What is left is the worst case that was found: never higher than what any one of them "
    "leaves.",
    needs=("grid", "steps"),
    reads=("together", "threshold", "queries", "audit"),
    unread=("eps",),
    check=check,
    run=run,
    components=components,
    behind=behind,
    optimizers=optimizers,
    jobs=jobs,
    form=StrictForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read,
    by_query=by_query,
    curve=curve,
    shown=(
        "smallest_eps",
        "smallest_eps_lo",
        "smallest_eps_hi",
        "worst_case_recall_at_1",
        "worst_case_missed_at_most",
        "worst_case_area",
        "worst_case_area_lo",
        "worst_case_area_hi",
    ),
    tables=tables,
    page=page,
    arrays=checks.arrays,
    outcome_problems=checks.outcome_problems,
    number_problems=checks.number_problems,
    replay=checks.replay,
    as_long=checks.as_long,
)

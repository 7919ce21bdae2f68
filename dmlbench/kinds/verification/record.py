"""The record of kind verification: ``steps`` run one after another on the pairs that are left, at every eps of the ``grid``."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from dmlbench.attacks import ATTACKS
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
from dmlbench.kinds.verification import checks
from dmlbench.kinds.verification.pairs import SIDES, Settings, drawn
from dmlbench.kinds.verification.search import run
from dmlbench.kinds.verification.summary import FARS, components, smallest_of
from dmlbench.kinds.verification.summary import by_query as of_queries
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol
from dmlbench.results import Evaluation
from dmlbench.threat import Threat


class StepForm(Form):
    """What one step did at one eps."""

    step: str
    ran: bool
    attacked: Count
    flipped: Count
    gradients: Count
    values: Count
    seconds: Cost


class SidesForm(Form):
    """Pairs that are decided rightly, by side and together."""

    accuracy: Points | None
    dodging: Points | None
    impersonation: Points | None


class PointForm(SidesForm):
    """One eps."""

    eps: str
    carried: Count
    steps: tuple[StepForm, ...]


class CleanForm(SidesForm):
    """Before any attack."""

    eer: Points | None
    tar: dict[str, Points | None]


class VerificationForm(Form):
    """``extras.verification``."""

    norm: Literal["linf", "l2"]
    pairs: dict[str, Count]
    far: float | None
    thresholds: tuple[float | None, ...]
    clean: CleanForm
    roc: tuple[tuple[Points, Points], ...]
    curve: Annotated[tuple[PointForm, ...], Field(min_length=1)]
    gradients_per_pair: Cost
    values_per_pair: Cost
    codes: dict[str, int]
    smallest_eps: dict[str, SmallestForm] | None = None


class Columns(BaseModel):
    """In a row of a board."""

    verification_smallest_eps: Annotated[float, Field(gt=0)] | None = None
    """median over the queries of the smallest eps found that flips one of its pairs, of those right when clean, [0, 1] scale; the largest
    eps of the grid where it is beyond that: then verification_smallest_eps_beyond is 1"""
    verification_smallest_eps_lo: Annotated[float, Field(ge=0)] | None = None
    verification_smallest_eps_hi: Annotated[float, Field(ge=0)] | None = None
    verification_smallest_eps_beyond: Beyond = None
    dodging_smallest_eps: Annotated[float, Field(gt=0)] | None = None
    """the same of genuine pairs, which are pushed apart"""
    dodging_smallest_eps_lo: Annotated[float, Field(ge=0)] | None = None
    dodging_smallest_eps_hi: Annotated[float, Field(ge=0)] | None = None
    dodging_smallest_eps_beyond: Beyond = None
    impersonation_smallest_eps: Annotated[float, Field(gt=0)] | None = None
    """the same of impostor pairs, which are pulled together"""
    impersonation_smallest_eps_lo: Annotated[float, Field(ge=0)] | None = None
    impersonation_smallest_eps_hi: Annotated[float, Field(ge=0)] | None = None
    impersonation_smallest_eps_beyond: Beyond = None
    verification_accuracy: Percent | None = None
    """share of pairs that are decided rightly when clean, each query's own first averaged"""
    verification_accuracy_lo: float | None = None
    verification_accuracy_hi: float | None = None
    verification_accuracy_attacked: Percent | None = None
    """the same at the largest eps of the grid"""
    verification_accuracy_attacked_lo: float | None = None
    verification_accuracy_attacked_hi: float | None = None
    verification_eer: Percent | None = Field(None, title="EER %")
    verification_tar_1e_2: Percent | None = Field(None, title="TAR at FAR 1e-2 %")
    verification_tar_1e_3: Percent | None = Field(None, title="TAR at FAR 1e-3 %")
    verification_tar_1e_4: Percent | None = Field(None, title="TAR at FAR 1e-4 %")


LENGTHS = {
    "any": "verification_smallest_eps",
    "dodging": "dodging_smallest_eps",
    "impersonation": "impersonation_smallest_eps",
}
NUMBERS = (
    Number(
        LENGTHS["any"], "Smallest eps that flips a pair",
        "Half of the queries have a pair, right when clean, whose decision is turned by a change of this size or a smaller one: the "
        "median of the smallest eps found for each. Larger is more robust, and the truth is at most this.",
        ranks=True, median=True, length=True, against="verification_accuracy",
    ),
    Number(
        LENGTHS["dodging"], "Smallest eps that dodges",
        "The median of the smallest change of a picture after which it is not taken for another picture of the same person. Only "
        "genuine pairs that are right when clean are asked.",
        median=True, length=True,
    ),
    Number(
        LENGTHS["impersonation"], "Smallest eps that impersonates",
        "The median of the smallest change of a picture after which it is taken for somebody else's. Only impostor pairs that are "
        "right when clean are asked.",
        median=True, length=True,
    ),
    Number(
        "verification_accuracy", "Pairs decided rightly %",
        "The share of pairs that are on their side of a threshold fixed on other classes, with clean pictures. Genuine and impostor "
        "pairs of a query count alike.",
        drop=1.0,
    ),
    Number(
        "verification_accuracy_attacked", "Pairs decided rightly, attacked %",
        "The share of pairs that are decided rightly whatever the searches do to one of their two pictures, at the largest eps of the "
        "grid. The truth is at most this.",
        drop=1.0,
    ),
)  # fmt: skip


def read(e: Evaluation) -> dict[str, float | None]:
    """The numbers, those under attack at the largest eps of the grid, and the columns that are no mean over queries."""
    extras = e.extras["verification"]
    columns = {
        "verification_accuracy": extras["clean"]["accuracy"],
        "verification_accuracy_attacked": extras["curve"][-1]["accuracy"],
        "verification_eer": extras["clean"]["eer"],
        **{f"verification_tar_{far.replace('-', '_')}": extras["clean"]["tar"][far] for far in FARS},
    }
    for name, column in LENGTHS.items():
        part = (extras.get("smallest_eps") or {}).get(name)
        side = extras["clean"]["accuracy" if name == "any" else name]
        if part and (side or 0.0) > 0:  # of pairs that are right when clean
            columns |= columns_of(column, part)
    return columns


def by_query(e: Evaluation) -> dict[str, np.ndarray]:
    """What each query adds to the numbers; empty without the queries' outcomes."""
    extras = e.extras["verification"]
    last = extras["curve"][-1]["eps"]
    names = {
        "verification_accuracy": [f"{side}/clean" for side in SIDES],
        "verification_accuracy_attacked": [f"{side}@{last}/value" for side in SIDES],
    }
    if any(key not in e.arrays for keys in names.values() for key in keys):
        return {}
    values_by_name = {name: of_queries(e.arrays, keys) for name, keys in names.items()}
    if extras.get("smallest_eps") and all(f"{side}/smallest_eps" in e.arrays for side in SIDES):
        for name, values in smallest_of(e.arrays).items():
            values_by_name[LENGTHS[name]] = np.minimum(values, extras["smallest_eps"][name]["largest"])
    return values_by_name


def curve(e: Evaluation) -> Curve:
    """Pairs decided rightly against eps."""
    extras = e.extras["verification"]
    points = (Point(row["eps"], row["accuracy"]) for row in extras["curve"])
    return Curve("pairs decided rightly, %", (Point("0", extras["clean"]["accuracy"]), *points))


def roc(e: Evaluation) -> list[list[float]]:
    """Shares of impostors and of genuine pairs accepted when clean."""
    points: list[list[float]] = e.extras["verification"]["roc"]
    return points


def check(p: Protocol) -> None:
    """That the settings are known, and the steps are those that a pair's decision is attacked by.

    Raises:
        UsageError: they are not.
    """
    settings, names = Settings.of(p), [step.name for step in p.steps]
    for name in settings.largest:
        if name not in names:
            raise UsageError(f"[settings] largest names {name!r}, which is no step")
    searches = [(f"step {s.name!r}", s.attack) for s in p.steps]
    searches += [("threshold", p.threshold.attack)] if p.threshold else []
    for where, attack in searches:
        if ATTACKS[attack].objective != "flip":
            raise UsageError(f"{where}: attack {attack!r} does not aim at the decision on a pair; FLIP does")
    for step in p.steps:
        if step.aims > 1 or step.rounds > 1:
            raise UsageError(f"step {step.name!r}: aims and rounds do nothing in kind 'verification'")


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That there are pairs in every fold.

    Raises:
        UsageError: there are not.
    """
    drawn(dataset, rules, seed)


def optimizers(p: Protocol) -> set[str]:
    """Those of the steps and of the search for the smallest eps."""
    return {step.optimizer for step in p.steps} | ({p.threshold.optimizer} if p.threshold else set())


def _passes(optimizer: str, threat: Threat, times: int = 1) -> tuple[int, int]:
    gradients, values = OPTIMIZERS[optimizer].passes(threat)
    return gradients * times, values * times


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """Every step at every eps, and the search for the smallest eps, at their most: as if every pair survived."""
    each, alone = 1 if dataset.pairs is not None else len(SIDES), Settings.of(p).largest
    grid = p.eps_for(dataset.images.shape)
    for eps in grid:
        for step in p.steps:
            if step.name in alone and eps != grid[-1]:
                continue
            threat, optimizer = p.threat_at(eps, step.threat), OPTIMIZERS[step.optimizer]
            yield Job(
                name=f"{step.name}@{eps}", called=step.attack, eps=eps, optimizer=step.optimizer, threat=threat,
                attack=ATTACKS[step.attack], passes=_passes(step.optimizer, threat, each),
                steps=threat.queries if optimizer.by_queries else threat.steps, weight=float(each),
                at_most=(eps, step) != (grid[0], p.steps[0]),
            )  # fmt: skip
    if (rule := p.threshold) is not None:
        threat, times = p.threat_at(grid[-1], rule.threat), each * halvings(rule)
        yield Job(
            name="smallest eps", called=rule.attack, optimizer=rule.optimizer, threat=threat, attack=ATTACKS[rule.attack],
            passes=_passes(rule.optimizer, threat, times), steps=threat.steps, weight=float(times), at_most=True,
            batch=partial(together, rule, len(grid)),
        )  # fmt: skip


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """The curve over eps, what each step flipped, the clean rates, and the smallest eps."""
    clean, rows = extras["clean"], extras["curve"]
    steps = tuple(s["step"] for s in rows[0]["steps"])
    keys = ("accuracy", *SIDES)
    heads = ("right", "genuine", "impostor", "before", *steps)
    lines = [("0", *(text_of(clean[key]) for key in keys), "", *("" for _ in steps))]
    for row in rows:
        flipped = (str(s["flipped"]) if s["ran"] else "" for s in row["steps"])
        lines.append((row["eps"], *(text_of(row[key]) for key in keys), str(row["carried"]), *flipped))
    yield Sheet(f"pairs decided rightly, %, and how many were flipped, {extras['norm']}", ("eps",), heads, tuple(lines))
    tar = ", ".join(f"{text_of(clean['tar'][far])} at FAR {far}" for far in FARS)
    at = "" if extras["far"] is None else f" with FAR at most {extras['far']:g} on them"
    yield Line(
        f"EER {text_of(clean['eer'])}; TAR {tar}. {extras['pairs']['dodging']} genuine and {extras['pairs']['impersonation']} impostor "
        f"pairs, {len(extras['thresholds'])} folds; thresholds of the other folds' clean pairs{at}.",
        f"clean accuracy {text_of(clean['accuracy'])}",
    )
    spent = [text_of(extras[f"{what}_per_pair"], 0) for what in ("gradients", "values")]
    cost = f"{spent[0]} gradients and {spent[1]} values a right pair and eps"
    if "smallest_eps" not in extras:
        yield Line(cost)
        return
    medians = {}
    for name, part in extras["smallest_eps"].items():
        someone = (clean["accuracy" if name == "any" else name] or 0.0) > 0
        ends = f" ({' – '.join(shown(end, part) for end in part['interval'])})" if part["interval"] else ""
        medians[name] = f"{shown(part['median'], part) if someone else text_of(None)}{ends}"
    yield Line(
        f"dodging {medians['dodging']}, impersonation {medians['impersonation']}; {cost}",
        f"smallest eps that flips a pair, median {medians['any']}",
    )


def page(p: Protocol) -> Iterator[str]:
    """The pairs, the steps and what they cost, and how the smallest eps is found."""
    settings = Settings.of(p)
    where = "tells most of their pairs right"
    if settings.far is not None:
        where = f"accepts at most {settings.far:g} of their impostors"
    yield (
        f"Pairs: each query with a random picture of its class, and with one of another class of its fold; classes are dealt to {settings.folds} folds, or "
        f"as many as have two classes each. The threshold of a fold is fixed on the clean pairs of the others: the one that {where}.\n"
    )
    rows = []
    for s in p.steps:
        gradients, values = _passes(s.optimizer, p.threat_at(next(iter(p.grid.values()))[0], s.threat))
        eps = "the largest" if s.name in settings.largest else "every one"
        spent = f"{gradients} gradients" if gradients else f"{values} values"
        rows.append([s.name, f"{s.attack}@{s.optimizer}", eps, md.threat(s.threat), spent])
    yield from md.table(["step", "attack", "eps", "own threat", "cost of a survivor"], rows)
    if (rule := p.threshold) is not None:
        yield (
            f"The smallest eps of each pair is found by halving, on a log scale of {rule.parts} steps from one eps of the grid to the next and in each of "
            f"the {rule.octaves} halves below the smallest, with one search each ({rule.attack}@{rule.optimizer}, {md.threat(rule.threat)}). Score: the median over the "
            "queries of the smallest that flips one of their pairs, of those right when clean, on the [0, 1] scale, ↑ robust.\n"
        )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


VERIFICATION = Kind(
    name="verification",
    title="steps run one after another on the pairs that are left at every eps of the grid",
    meaning="Two pictures are of one class where their distance is below a threshold. One of the two is perturbed to turn that "
    "decision, and a pair counts only where no search does.",
    needs=("grid", "steps"),
    reads=("threshold", "queries", "settings"),
    unread=("eps",),
    check=check,
    run=run,
    components=components,
    pairs=True,
    require=require,
    optimizers=optimizers,
    jobs=jobs,
    form=VerificationForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read,
    by_query=by_query,
    curve=curve,
    roc=roc,
    shown=(*LENGTHS.values(), "verification_accuracy", "verification_accuracy_attacked", "verification_eer", "verification_tar_1e_2"),
    tables=tables,
    page=page,
    arrays=checks.arrays,
    outcome_problems=checks.outcome_problems,
    number_problems=checks.number_problems,
    replay=checks.replay,
)  # fmt: skip

"""The record of kind sides: what each query is left with where it, one wrong picture of the gallery, or both are perturbed."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from dmlbench.attacks import ATTACKS
from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import Problem, UsageError
from dmlbench.kinds import page as md
from dmlbench.kinds import readings
from dmlbench.kinds.base import (
    QUERIES,
    SAMPLE,
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
    outcomes_differ,
    text_of,
)
from dmlbench.kinds.sides.search import MOVED, OPTIMIZER, PICTURES, SidesSettings, components, pictures, read, run
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation


class RowForm(Form):
    """R@1 at one eps."""

    eps: str
    gallery: Points
    query: Points
    both: Points


class SidesForm(Form):
    """``extras.sides``."""

    clean: Points
    curve: Annotated[tuple[RowForm, ...], Field(min_length=1)]


class Columns(BaseModel):
    """In a row of a board."""

    sides_recall_at_1: Percent | None = None
    """R@1 with the query and one wrong picture of the gallery perturbed, at the largest eps of the grid"""
    sides_recall_at_1_lo: float | None = None
    sides_recall_at_1_hi: float | None = None
    query_side_recall_at_1: Percent | None = None
    query_side_recall_at_1_lo: float | None = None
    query_side_recall_at_1_hi: float | None = None
    gallery_side_recall_at_1: Percent | None = None
    gallery_side_recall_at_1_lo: float | None = None
    gallery_side_recall_at_1_hi: float | None = None


NUMBERS = (
    Number(
        "sides_recall_at_1", "R@1, both sides perturbed %",
        "The share of queries that are answered right whatever the searches do to the query and to one wrong picture of the gallery "
        "together, each within eps. The truth is at most this, since a better search can only break more.",
        ranks=True, drop=1.0,
    ),
    Number(
        "query_side_recall_at_1", "R@1, query perturbed %",
        "The same where the query alone is perturbed, which is what most protocols measure. It is never below the number for both sides.",
    ),
    Number(
        "gallery_side_recall_at_1", "R@1, one gallery picture perturbed %",
        "The same where one wrong picture of the gallery is perturbed and the query is clean: somebody plants a picture for a query that "
        "they know. It is never below the number for both sides.",
    ),
)  # fmt: skip
COLUMN = dict(zip(("both", "query", "gallery"), (n.name for n in NUMBERS), strict=True))


def curve(e: Evaluation) -> Curve:
    """R@1 with both sides perturbed against eps."""
    extras = e.extras["sides"]
    points = (Point(row["eps"], row["both"], f"both@{row['eps']}") for row in extras["curve"])
    return Curve("R@1, both sides perturbed, %", (Point("0", extras["clean"], "recall_at_1"), *points))


def check(p: Protocol) -> None:
    """That the settings are known, and the ball is one of each picture by itself.

    Raises:
        UsageError: they are not.
    """
    SidesSettings.of(p)
    if p.norm != "linf":
        raise UsageError(f"[threat] norm {p.norm!r}: kind 'sides' has linf alone, since both pictures share one search")


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That there are as many candidates as are tried.

    Raises:
        UsageError: there are not.
    """
    k, labels = SidesSettings.of(rules).candidates, dataset.labels[dataset.gallery]
    least = len(labels) - int(np.unique(labels[labels >= 0], return_counts=True)[1].max(initial=0))
    if k > least:
        raise UsageError(
            f"data set {dataset.name!r} has {least} wrong entries for some query, fewer than {k} candidates"
        )


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """Every part at every eps, at their most: as if every query survived."""
    times = SidesSettings.of(p).candidates
    for part in components(p, dataset.images.shape):
        threat, weight = p.threat_of(part), times * sum(MOVED[part.attack])
        gradients, values = OPTIMIZERS[OPTIMIZER].passes(threat)
        yield Job(
            name=part.name, called=part.attack, eps=part.threat["eps"], optimizer=OPTIMIZER, threat=threat, attack=ATTACKS["WM"],
            passes=(weight * gradients, weight * values), steps=threat.steps, weight=float(weight), at_most=True,
        )  # fmt: skip


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """R@1 by eps and by what is perturbed."""
    rows = [("0", *3 * (text_of(extras["clean"]),))]
    rows += [(row["eps"], *(text_of(row[part]) for part in MOVED)) for row in extras["curve"]]
    heads = ("gallery alone", "query alone", "both")
    yield Sheet("R@1 %, by what is perturbed", ("eps",), heads, tuple(rows))
    yield Line("one wrong picture of the gallery for each query, all others clean", "gallery:")


def page(p: Protocol) -> Iterator[str]:
    """Who is perturbed, and how it is searched for."""
    k, threat = SidesSettings.of(p).candidates, p.threat_at("0")
    yield (
        f"For each query the adversary owns one wrong picture of the gallery, one of the {k} nearest, and may move it within eps, or the "
        f"query, or each of both; all other pictures are clean. {threat.steps} steps of `{OPTIMIZER}` from a {threat.start} start for each of the {k}. Score: R@1 with both "
        "moved, percent, ↑ robust.\n"
    )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """The data set row of each query's candidate."""
    return {f"{c.name}/candidate": ("i", 1) for c in parts}


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """No part leaves more than another whose doings it could do too, and nothing leaves more than there is when clean."""
    e = stated.evaluation
    before: dict[str, np.ndarray] = {}
    for c in stated.parts:
        value, clean = e.arrays[f"{c.name}/value"], e.arrays["benign/recall_at_1"]
        yield from count_problems(value > clean, f"{c.name}/value", "outcomes are above the clean ones")
        weaker = [c.attack] + (["gallery", "query"] if c.attack == "both" else [])
        for other in weaker:
            if other in before:
                text = f"outcomes are above those of {other} at this eps or a smaller one"
                yield from count_problems(value > before[other], f"{c.name}/value", text)
        before[c.attack] = value


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The stored pictures are of the query and of a wrong entry, within eps where they may be moved, and show what is stated."""
    e, subject, at = stated.evaluation, stored.subject, stored.positions
    for c in stated.parts:
        rows = e.arrays[f"{c.name}/candidate"][at]
        place = subject.dataset.positions[rows.clip(0, len(subject.dataset) - 1)].clip(min=0)
        scene = subject.scene[torch.from_numpy(at).to(subject.device)].aimed(
            torch.from_numpy(place[:, None]).to(subject.device)
        )
        wrong = (subject.dataset.gallery[place] != rows) | ~scene.other.gather(1, scene.chosen)[:, 0].cpu().numpy()
        if wrong.any():
            yield Problem(2, f"{QUERIES} {c.name}/candidate", f"{int(wrong.sum())} are no wrong entries of the gallery")
            continue
        clean = pictures(subject, scene, at)
        both = [e.sample.get(f"{c.name}/{which}") for which in PICTURES]
        if any(b is None or b.shape != tuple(stored.clean.shape) or b.dtype != np.float32 for b in both):
            yield Problem(
                2, f"{SAMPLE} {c.name}", f"is not float32 images of shape {tuple(stored.clean.shape)} of each side"
            )
            continue
        images = torch.from_numpy(np.stack(both, 1)).to(subject.device)  # type: ignore[arg-type]
        try:
            with torch.no_grad():
                recall = read(subject, scene, stated.rules.threat_of(c), MOVED[c.attack], images, clean)
        except AssertionError as error:
            yield Problem(2, f"{SAMPLE} {c.name}", str(error))
            continue
        yield from outcomes_differ(e, c, {"recall_at_1": recall}, at)


SIDES = Kind(
    name="sides",
    title="the query, one wrong picture of the gallery, or both perturbed, at every eps of the grid",
    meaning="Somebody who can plant a picture in the gallery perturbs it, the query, or both of them, each within eps. The worst case "
    "for each query by itself: every other picture is clean.",
    needs=("grid",),
    reads=("settings",),
    unread=("eps", "step", "eot", "queries"),
    check=check,
    run=run,
    components=components,
    moved=False,
    require=require,
    averages=False,
    optimizers=lambda rules: {OPTIMIZER},
    jobs=jobs,
    form=SidesForm,
    numbers=NUMBERS,
    columns=Columns,
    read=readings.read("sides", COLUMN),
    by_query=readings.by_query("sides", COLUMN),
    curve=curve,
    shown=tuple(COLUMN.values()),
    tables=tables,
    page=page,
    arrays=arrays,
    outcome_problems=outcome_problems,
    number_problems=readings.number_problems("sides"),
    replay=replay,
)

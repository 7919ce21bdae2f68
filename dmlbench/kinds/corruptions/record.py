"""The record of kind corruptions: every query under each common corruption, at each severity."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field
from torch import Tensor

from dmlbench.corruptions import CORRUPTIONS
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.errors import Problem
from dmlbench.kinds import page as md
from dmlbench.kinds.base import (
    AGREE,
    DIFFER,
    QUERIES,
    SAMPLE,
    Count,
    Form,
    Job,
    Kind,
    Line,
    Number,
    Percent,
    Points,
    Sheet,
    Stated,
    StoredSample,
    count_problems,
    differences,
    text_of,
)
from dmlbench.kinds.corruptions.measure import (
    ALSO,
    CLEAN,
    CorruptionSettings,
    changed,
    components,
    corruptions_and_severities,
    parsed,
    readings,
    run,
    summary,
)
from dmlbench.metrics import retrieval
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.scene import Scene

PLANNED = 32
"""Pictures that a plan is made on: under every corruption they are many."""


class Metrics(Form):
    """Means over the queries."""

    recall_at_1: Points
    map_at_r: Points


class RowForm(Metrics):
    """One corruption at one severity."""

    corruption: str
    severity: Count
    extra: bool


class WorstForm(Form):
    """The corruption under which least is found, severities taken together."""

    corruption: str
    recall_at_1: Points


class CorruptionsForm(Form):
    """``extras.corruptions``."""

    clean: Metrics
    table: Annotated[tuple[RowForm, ...], Field(min_length=1)]
    mean: Metrics
    worst: WorstForm
    retention: Annotated[float, Field(ge=0)] | None


class Columns(BaseModel):
    """In a row of a board."""

    corruption_recall_at_1: Percent | None = None
    """mean over the 15 corruptions and their severities"""
    corruption_recall_at_1_lo: float | None = None
    corruption_recall_at_1_hi: float | None = None
    corruption_retention: Annotated[float, Field(ge=0)] | None = None
    """the same as a percentage of the clean R@1 of the model"""
    corruption_worst: Percent | None = None
    """mean over the severities of the corruption under which least is found, the four extra ones too"""
    corruption_map_at_r: Percent | None = None


NUMBERS = (
    Number(
        "corruption_recall_at_1",
        "R@1 under corruptions %",
        "The share of queries that are answered right when they are spoilt by noise, blur, weather or a codec. It is the mean "
        "over 15 corruptions and their severities.",
        ranks=True,
        drop=1.0,
    ),
    Number(
        "corruption_retention",
        "Retention under corruptions %",
        "R@1 under corruptions as a percentage of the same model's clean R@1. It lets models of different clean R@1 be set "
        "side by side, and favours those that had little to lose.",
    ),
    Number(
        "corruption_worst",
        "R@1 under the worst corruption %",
        "R@1 under the corruption that costs this model most, the mean over its severities. Which one that is differs from "
        "model to model.",
    ),
    Number(
        "corruption_map_at_r",
        "MAP@R under corruptions %",
        "The mean average precision of the first R answers under corruptions, where R is how many images of the query's class "
        "there are. Unlike R@1 it looks at all of them.",
    ),
)


def read(e: Evaluation) -> dict[str, float | None]:
    """The numbers."""
    extras = e.extras["corruptions"]
    return {
        "corruption_recall_at_1": extras["mean"]["recall_at_1"],
        "corruption_retention": extras["retention"],
        "corruption_worst": extras["worst"]["recall_at_1"],
        "corruption_map_at_r": extras["mean"]["map_at_r"],
    }


def by_query(e: Evaluation) -> dict[str, np.ndarray]:
    """What each query adds to the means over the 15 corruptions; empty without the queries' outcomes."""
    usual = [f"{row['corruption']}@{row['severity']}" for row in e.extras["corruptions"]["table"] if not row["extra"]]
    if any(f"{name}/{key}" not in e.arrays for name in usual for key in ("value", *ALSO)):
        return {}
    values = {}
    for number, key in (("corruption_recall_at_1", "value"), ("corruption_map_at_r", "map_at_r")):
        values[number] = np.mean([e.arrays[f"{name}/{key}"].astype(np.float64) for name in usual], axis=0)
    return values


def check(p: Protocol) -> None:
    """That the settings are known, and severities those of the corruptions.

    Raises:
        UsageError: they are not.
    """
    CorruptionSettings.of(p)


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """R@1, what that is of the clean R@1, and MAP@R by corruption and severity; the means."""
    clean = extras["clean"]["recall_at_1"]
    table = [
        row | {"retained": 100.0 * row["recall_at_1"] / clean if clean and row["recall_at_1"] is not None else None}
        for row in extras["table"]
    ]
    columns = (*(f"severity {s}" for s in dict.fromkeys(row["severity"] for row in table)), "mean")
    titles = {"recall_at_1": "R@1 under corruptions, %", "retained": "of the clean R@1, %", "map_at_r": "MAP@R, %"}
    for key, title in titles.items():
        rows = []
        for name in dict.fromkeys(row["corruption"] for row in table):
            of_name = [row for row in table if row["corruption"] == name]
            values = [row[key] for row in of_name]
            mean = None if None in values else float(np.mean(values))
            rows.append((f"{name} (extra)" if of_name[0]["extra"] else name, *map(text_of, [*values, mean])))
        yield Sheet(title, ("corruption",), columns, tuple(rows))
    yield Line(
        f"of clean {text_of(extras['clean']['recall_at_1'])}: {text_of(extras['retention'])} % retained. "
        f"MAP@R {text_of(extras['mean']['map_at_r'])} (clean {text_of(extras['clean']['map_at_r'])}). "
        f"Worst: {extras['worst']['corruption']}, R@1 {text_of(extras['worst']['recall_at_1'])}",
        f"R@1 under the 15 corruptions {text_of(extras['mean']['recall_at_1'])}",
    )


def page(p: Protocol) -> Iterator[str]:
    """Which corruptions, and what is corrupted."""
    usual = [name for name, c in CORRUPTIONS.items() if not c.extra]
    extra = [name for name, c in CORRUPTIONS.items() if c.extra]
    settings = CorruptionSettings.of(p)
    severities = ", ".join(map(str, settings.severities))
    whose = "Queries and gallery are corrupted" if settings.gallery else "Queries alone are corrupted"
    yield (
        f"{whose}, each picture in its own way (corruptions.md), at severities {severities}. Score: the mean of R@1 over "
        f"{len(usual)} corruptions ({', '.join(usual)}) and the severities, percent, ↑ robust. Beside them, in no mean: "
        f"{', '.join(extra)}.\n"
    )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """The per-query arrays of each corruption besides R@1."""
    return {f"{c.name}/{key}": ("f", 1) for c in parts for key in ALSO}


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """Outcomes are there for the queries that have one when clean."""
    e = stated.evaluation
    for c in stated.parts:
        for key in ALSO:
            values = e.arrays[f"{c.name}/{key}"]
            missing = np.isnan(values) != np.isnan(e.arrays[f"benign/{key}"])
            yield from count_problems(
                missing, f"{c.name}/{key}", "outcomes are missing in one of clean and corrupted alone"
            )
            yield from count_problems((values < 0) | (values > 100), f"{c.name}/{key}", "outcomes are outside 0 to 100")


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """Every picture that is corrupted, under every corruption at every severity."""
    every = corruptions_and_severities(p, dataset.images.shape)
    share = 1.0 + (len(dataset.gallery) / max(1, queries) if CorruptionSettings.of(p).gallery else 0)

    def look(embedder: Embedder, images: Tensor, scene: Scene) -> None:
        for name, severity in every:
            e = embedder(changed(images, name, severity, p.seed).to(images.device))
            retrieval(replace(scene, clean=e), (1,))

    passes = (0, round(len(every) * share))
    yield Job(name="corruptions", passes=passes, look=look, weight=share, batch=lambda size: min(PLANNED, size))


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again?"""
    e = stated.evaluation
    clean = {key: float(np.nanmean(e.arrays[f"benign/{key}"].astype(np.float64))) for key in ("recall_at_1", *ALSO)}
    again = summary(stated.parts, clean, e.arrays)
    yield from differences("extras.corruptions", e.extras["corruptions"], again)


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The sampled pictures are those of the data set, and corrupted again they find what the run says."""
    e, subject, rules = stated.evaluation, stored.subject, stated.rules
    if CLEAN not in e.sample or not np.array_equal(e.sample[CLEAN], stored.clean.cpu().numpy()):
        yield Problem(2, f"{SAMPLE} {CLEAN}", "are not the pictures of the data set")
        return
    few = subject[stored.positions]
    for c in stated.parts:
        recomputed = readings(few, rules, *parsed(c), rules.seed)
        for key in ("value", *ALSO):
            outcomes = e.arrays[f"{c.name}/{key}"][stored.positions]
            differ = (np.isnan(outcomes) != np.isnan(recomputed[key])) | (np.abs(outcomes - recomputed[key]) > AGREE)
            if differ.sum() > max(1, DIFFER * len(outcomes)):
                words = f"{int(differ.sum())} of {len(outcomes)} pictures find something else than stated"
                yield Problem(2, f"{QUERIES} {c.name}/{key}", words)


CORRUPTED = Kind(
    name="corruptions",
    title="every query under each common corruption, at each severity",
    meaning="Every query is spoilt by noise, blur, weather or a codec, without an adversary. It says what a model keeps on bad "
    "pictures, and nothing of what an attack does to it.",
    reads=("settings",),
    unread=("norm", "eps", "step", "steps", "start", "restarts", "queries", "eot"),
    check=check,
    run=run,
    components=components,
    moved=False,
    averages=False,
    form=CorruptionsForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read,
    by_query=by_query,
    shown=("corruption_recall_at_1", "corruption_retention", "corruption_worst", "corruption_map_at_r"),
    tables=tables,
    page=page,
    arrays=arrays,
    outcome_problems=outcome_problems,
    number_problems=number_problems,
    replay=replay,
    jobs=jobs,
)

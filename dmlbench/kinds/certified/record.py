"""The record of kind certified: R@1 of the smoothed model that is proven within each L2 radius of the grid."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import Problem, UsageError
from dmlbench.kinds import page as md
from dmlbench.kinds.base import (
    AGREE,
    DIFFER,
    QUERIES,
    RUN,
    SAMPLE,
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
    Stated,
    StoredSample,
    count_problems,
    differences,
    text_of,
)
from dmlbench.kinds.certified import lipschitz
from dmlbench.kinds.certified.bound import fewest, largest
from dmlbench.kinds.certified.measure import (
    CLEAN,
    LENGTH,
    MARGIN,
    RADIUS,
    Settings,
    components,
    outcomes,
    readings,
    right,
    run,
    summary,
    within,
)
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.threat import written

REPLAYED = 16
"""Queries whose mean embedding is made again at level 2, at most: each costs all samples."""
NEAR = 1e-3
"""How far a margin or a length may be off when it is measured again: other hardware rounds otherwise."""


class RadiusForm(Form):
    """One radius."""

    eps: str
    recall_at_1: Points | None


class LipschitzForm(Form):
    """What the constant proves that the model declares, without noise."""

    constant: Annotated[float, Field(gt=0)]
    seen: Cost
    recall_at_1: Points | None
    median: Cost | None
    curve: Annotated[tuple[RadiusForm, ...], Field(min_length=1)]


class CertifiedForm(Form):
    """``extras.certified``."""

    sigma: Cost
    samples: Count
    alpha: Cost
    queries: Count
    radius: Cost
    largest: Cost
    recall_at_1: Points | None
    smoothed: Points | None
    certified: Points | None
    abstained: Count
    average: Cost | None
    median: Cost | None
    interval: tuple[Cost, Cost] | None
    curve: Annotated[tuple[RadiusForm, ...], Field(min_length=1)]
    lipschitz: LipschitzForm | None = None


class Columns(BaseModel):
    """In a row of a board."""

    certified_recall_at_1: Percent | None = None
    """at the radius that the protocol ranks at"""
    certified_recall_at_1_lo: float | None = None
    certified_recall_at_1_hi: float | None = None
    certified_radius: Annotated[float, Field(ge=0)] | None = None
    """median over the queries of the certified radius, L2 on the [0, 1] scale of pixels; 0 where half of them have none"""
    certified_radius_lo: Annotated[float, Field(ge=0)] | None = None
    certified_radius_hi: Annotated[float, Field(ge=0)] | None = None
    certified_radius_mean: Annotated[float, Field(ge=0)] | None = None
    """the mean of the same, "average certified radius" in the field"""
    certified_at_all: Percent | None = None
    """share of queries with a certificate of any radius; the others are abstained from"""
    certified_at_all_lo: float | None = None
    certified_at_all_hi: float | None = None
    smoothed_recall_at_1: Percent | None = None
    """of the mean embeddings, without a certificate"""
    smoothed_recall_at_1_lo: float | None = None
    smoothed_recall_at_1_hi: float | None = None
    lipschitz_recall_at_1: Percent | None = None
    """of the plain model, proven by the Lipschitz constant that it declares, at the radius that the protocol ranks at"""
    lipschitz_recall_at_1_lo: float | None = None
    lipschitz_recall_at_1_hi: float | None = None


NUMBERS = (
    Number(
        "certified_recall_at_1",
        "Certified R@1 %",
        "The share of queries whose first answer is proven right whatever is done to the picture within a small L2 radius, the same for "
        "all models. No search is part of it, so unlike every other number here the truth is at least this.",
        ranks=True,
        drop=1.0,
    ),
    Number(
        "certified_radius",
        "Median certified radius",
        "Half of the queries are proven to be answered right within this L2 length on the [0, 1] scale of pixels, or a larger one. It is 0 where half of "
        "them have no proof at all.",
        median=True,
        length=True,
    ),
    Number(
        "certified_radius_mean",
        "Average certified radius",
        "The mean of the certified radius over the queries, those without a proof as 0. A few queries with large radii can make it large.",
        length=True,
    ),
    Number(
        "certified_at_all",
        "Queries with a certificate %",
        "The share of queries with a proof for some radius, however small. The others are abstained from: their answer may be right, and the "
        "samples do not show it.",
    ),
    Number(
        "smoothed_recall_at_1",
        "Smoothed R@1 %",
        "R@1 of the model that the certificates are about, which answers by the mean embedding of many noisy copies of a query. Set it beside "
        "the plain R@1 to see what the noise costs.",
    ),
    Number(
        "lipschitz_recall_at_1",
        "R@1 by a declared Lipschitz constant %",
        "The share of queries whose first answer by the plain model is right within the same radius, if the Lipschitz constant that its author "
        "declares is true. It is empty where none is declared.",
    ),
)  # fmt: skip


def read(e: Evaluation) -> dict[str, float | None]:
    """The numbers, and the interval of the median."""
    extras = e.extras["certified"]
    columns = {
        "certified_recall_at_1": extras["recall_at_1"],
        "certified_radius": extras["median"],
        "certified_radius_mean": extras["average"],
        "certified_at_all": extras["certified"],
        "smoothed_recall_at_1": extras["smoothed"],
    }
    if "lipschitz" in extras:
        columns["lipschitz_recall_at_1"] = extras["lipschitz"]["recall_at_1"]
    if extras["interval"]:
        columns["certified_radius_lo"], columns["certified_radius_hi"] = extras["interval"]
    return columns


def by_query(e: Evaluation) -> dict[str, np.ndarray]:
    """What each query adds to the numbers; empty without the queries' outcomes."""
    if RADIUS not in e.arrays or MARGIN not in e.arrays:
        return {}
    radius, extras = e.arrays[RADIUS].astype(np.float64), e.extras["certified"]
    claimed = {}
    if "lipschitz" in extras and lipschitz.PLAIN in e.arrays:
        values = lipschitz.proven(e.arrays[lipschitz.PLAIN], extras["lipschitz"]["constant"], extras["radius"])
        claimed = {"lipschitz_recall_at_1": values.astype(np.float64)}
    return {
        "certified_recall_at_1": within(radius, e.extras["certified"]["radius"]).astype(np.float64),
        "certified_radius": radius,
        "certified_at_all": within(radius, 0.0).astype(np.float64),
        "smoothed_recall_at_1": right(e.arrays[MARGIN]).astype(np.float64),
        **claimed,
    }


def curve(e: Evaluation) -> Curve:
    """Certified R@1 against the radius; at 0 the share with any certificate."""
    extras = e.extras["certified"]
    points = (Point(row["eps"], row["recall_at_1"], f"certified@{row['eps']}") for row in extras["curve"])
    return Curve("certified R@1, %", (Point("0", extras["certified"]), *points))


def check(p: Protocol) -> None:
    """That the settings are known, and radii are L2 lengths.

    Raises:
        UsageError: they are not.
    """
    Settings.of(p)
    if p.norm != "l2":
        raise UsageError(f"[threat] norm {p.norm!r}: kind 'certified' proves L2 radii, norm = \"l2\"")


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That there are samples enough for a certificate, and for the radius that models are ranked at.

    Raises:
        UsageError: there are not.
    """
    settings, queries = Settings.of(rules), rules.measured(len(dataset.query))
    least = fewest(settings.alpha, queries)
    if settings.samples < least:
        raise UsageError(
            f"[settings] samples {settings.samples} prove nothing of {queries} queries at alpha {settings.alpha:g}: it takes "
            f"{least} at the least, and far more for radii of use"
        )
    most = largest(settings.sigma, settings.samples, settings.alpha, queries)
    if settings.radius >= most:
        raise UsageError(
            f"[settings] radius {settings.radius:g} is beyond what {settings.samples} samples at sigma {settings.sigma:g} can prove "
            f"of {queries} queries: {written(most, 'l2')} at the most"
        )


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """The samples of every query."""
    yield Job(name="smoothing", passes=(0, Settings.of(p).samples))


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """Certified R@1 by radius, the radii, and of what."""
    rows = [("0", text_of(extras["certified"]))]
    rows += [(row["eps"], text_of(row["recall_at_1"])) for row in extras["curve"]]
    yield Sheet("certified R@1, %, by L2 radius", ("radius",), ("R@1",), tuple(rows))
    if claim := extras.get("lipschitz"):
        rows = [(row["eps"], text_of(row["recall_at_1"])) for row in claim["curve"]]
        yield Sheet("the plain model's, %, if what it declares is true", ("radius",), ("R@1",), tuple(rows))
        middle = "–" if claim["median"] is None else written(claim["median"], "l2")
        yield Line(
            f"declared by its author, not verified; the steepest slope that two pictures showed is {claim['seen']:.4g}. Median radius {middle}.",
            f"Lipschitz constant {claim['constant']:g}",
        )
    ends = f" ({' – '.join(written(end, 'l2') for end in extras['interval'])})" if extras["interval"] else ""
    median, average = ("–" if extras[key] is None else written(extras[key], "l2") for key in ("median", "average"))
    yield Line(
        f"median radius {median}{ends}, average {average}, {extras['abstained']} abstained; smoothed R@1 {text_of(extras['smoothed'])}. "
        f"sigma {extras['sigma']:g}, {extras['samples']} samples, wrong with probability {extras['alpha']:g} at the most in all "
        f"{extras['queries']} queries; no radius above {written(extras['largest'], 'l2')} can be proven with these.",
        f"certified R@1 {text_of(extras['recall_at_1'])} at {written(extras['radius'], 'l2')}",
    )


def page(p: Protocol) -> Iterator[str]:
    """The noise and the samples, and what is proven."""
    s = Settings.of(p)
    yield (
        f"The model is smoothed: a query's embedding is the mean over {s.samples} copies with noise N(0, {s.sigma:g}²) in every value, not clipped; "
        f"the gallery is as stored. All certificates hold at once with probability {1 - s.alpha:g} (certified.md). Score: R@1 that is certified at "
        f"radius {s.radius:g}, percent, ↑ robust.\n"
    )
    yield from md.table(["number", "what"], [[f"`{n.name}`", n.title] for n in NUMBERS])


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """The per-query arrays besides the outcomes at each radius."""
    return {MARGIN: ("f", 1), LENGTH: ("f", 1), RADIUS: ("f", 1)}


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """Radii follow from margins and lengths, and outcomes from the radii."""
    e = stated.evaluation
    yield from _claim_problems(e)
    margin, lengths = e.arrays[MARGIN], e.arrays[LENGTH]
    missing = np.isnan(margin) != np.isnan(e.arrays["benign/recall_at_1"])
    yield from count_problems(missing, MARGIN, "are there in one of margins and clean outcomes alone")
    yield from count_problems(~((lengths >= 0) & (lengths <= 1 + NEAR)), LENGTH, "are outside 0 to 1")
    with np.errstate(invalid="ignore"):
        far = (np.abs(margin) > lengths + NEAR) & np.isfinite(margin)
    yield from count_problems(far, MARGIN, "are farther than the mean embedding is long")
    recomputed = outcomes(
        margin, lengths, Settings.of(stated.rules), stated.parts, stated.rules.measured(e.dataset.n_queries_full)
    )
    for name, again in recomputed.items():
        differ = ~np.isclose(e.arrays[name], again, rtol=1e-6, atol=1e-9, equal_nan=True)
        yield from count_problems(differ, name, "do not follow from margins and lengths")


def _claim_problems(e: Evaluation) -> Iterator[Problem]:
    """Is what a declared Lipschitz constant proves there with the margins that it follows from, and not contradicted by itself?"""
    claim, margin = e.extras["certified"].get("lipschitz"), e.arrays.get(lipschitz.PLAIN)
    if (claim is None) != (margin is None):
        yield Problem(
            0, f"{QUERIES} {lipschitz.PLAIN}", "is there in one of the arrays and extras.certified.lipschitz alone"
        )
    if claim is None or margin is None:
        return
    if margin.shape != e.arrays[MARGIN].shape or margin.dtype.kind != "f":
        yield Problem(0, f"{QUERIES} {lipschitz.PLAIN}", "is not one number for each query")
        return
    clean = e.arrays["benign/recall_at_1"]
    yield from count_problems(
        np.isnan(margin) != np.isnan(clean), lipschitz.PLAIN, "are there in one of margins and clean outcomes alone"
    )
    yield from count_problems(
        (margin > NEAR) & (clean == 0), lipschitz.PLAIN, "are above 0 where the clean answer is wrong"
    )
    yield from count_problems((margin > 1 + NEAR) & np.isfinite(margin), lipschitz.PLAIN, "are above 1")
    if lipschitz.broken(claim["constant"], claim["seen"]):
        text = f"is {claim['constant']:g}, and the steepest slope that was seen is {claim['seen']:g}"
        yield Problem(0, f"{RUN} extras.certified.lipschitz.constant", text)


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again?"""
    e, rules = stated.evaluation, stated.rules
    everyone = rules.measured(e.dataset.n_queries_full)
    claim = e.extras["certified"].get("lipschitz")
    constant = None if claim is None else (claim["constant"], claim["seen"])
    again = summary(Settings.of(rules), stated.parts, everyone, e.arrays["label"], e.arrays, constant)
    yield from differences("extras.certified", e.extras["certified"], again, 1e-6)


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The sampled pictures are those of the data set, and the first of them under the same noise give the stated margins."""
    e, rules = stated.evaluation, stated.rules
    if CLEAN not in e.sample or not np.array_equal(e.sample[CLEAN], stored.clean.cpu().numpy()):
        yield Problem(2, f"{SAMPLE} {CLEAN}", "are not the pictures of the data set")
        return
    claim = e.extras["certified"].get("lipschitz")
    if (constant := stored.subject.embedder.lipschitz) != (claim and claim["constant"]):
        text = f"says {claim and claim['constant']}, the model's record {constant}"
        yield Problem(2, f"{RUN} extras.certified.lipschitz.constant", text)
    elif constant is not None:
        if lipschitz.broken(constant, slope := lipschitz.seen(stored.subject)):
            yield Problem(
                2, f"{RUN} extras.certified.lipschitz.constant", f"is {constant:g}, and two pictures show {slope:.4g}"
            )
        plain = lipschitz.plain(stored.subject)[lipschitz.PLAIN]
        differ = ~np.isclose(e.arrays[lipschitz.PLAIN], plain, rtol=0.0, atol=NEAR, equal_nan=True)
        if differ.sum() > max(1, DIFFER * len(plain)):
            yield Problem(
                2, f"{QUERIES} {lipschitz.PLAIN}", f"{int(differ.sum())} of {len(plain)} are others than stated"
            )
    few = stored.positions[:REPLAYED]
    again = readings(stored.subject[few], Settings.of(rules), rules.seed)
    yield from _readings_differ(e, few, {MARGIN: again["margin"], LENGTH: again["length"]}, 2)


def disagree(stated: Stated, rerun: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Margins and lengths, from which every number follows, that are not the stated ones."""
    yield from _readings_differ(stated.evaluation, at, {name: rerun.arrays[name] for name in (MARGIN, LENGTH)}, level)


def _readings_differ(e: Evaluation, at: np.ndarray, again: dict[str, np.ndarray], level: int) -> Iterator[Problem]:
    """Of more of the queries at ``at`` than could move a share by :data:`AGREE` points."""
    for name, recomputed in again.items():
        differ = ~np.isclose(e.arrays[name][at], recomputed, rtol=0.0, atol=NEAR, equal_nan=True)
        if differ.sum() > max(1, AGREE / 100 * len(at)):
            yield Problem(level, f"{QUERIES} {name}", f"{int(differ.sum())} of {len(at)} are others than stated")


CERTIFIED = Kind(
    name="certified",
    title="R@1 of the smoothed model that is proven within each L2 radius of the grid",
    meaning="The model answers by the mean embedding of many noisy copies of a query, and mathematics proves within which L2 radius the first "
    "answer stays right. No attack is run, and none can break what is proven.",
    needs=("grid", "settings"),
    reads=("queries",),
    unread=("eps", "step", "steps", "start", "restarts", "queries", "eot"),
    check=check,
    run=run,
    components=components,
    moved=False,
    unit=True,
    require=require,
    averages=False,
    jobs=jobs,
    form=CertifiedForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read,
    by_query=by_query,
    curve=curve,
    shown=(
        "certified_recall_at_1",
        "certified_radius",
        "certified_at_all",
        "smoothed_recall_at_1",
        "lipschitz_recall_at_1",
    ),
    tables=tables,
    page=page,
    arrays=arrays,
    outcome_problems=outcome_problems,
    number_problems=number_problems,
    replay=replay,
    disagree=disagree,
)

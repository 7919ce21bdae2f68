"""Level 0 of what protocols of kind strict and clustering add: ``extras`` and the arrays that it comes from.

Strict: how each query ended at each eps fits its outcomes, its norms and what happened at the smaller
eps, rounds ended when they had to, and the smallest eps lies where the grid says; the curve, the counts of every step and
the headline are computed again. Clustering: NMI, AMI, pair F1
and R@1 are computed again from the clusters that each image fell into, and what a union
chose fits the others' norms. The flags of the audit are those
of its findings.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.doubts.audit import CHECKS, FEW, FIRST, HIDDEN, Finding, last_resort
from dmlbench.evaluate import retention
from dmlbench.kinds import clustering, strict
from dmlbench.kinds.rounds import groups, rounds_run
from dmlbench.kinds.threshold import bracket, ladder
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.submission.bundle import Problem, Refused

RUN = "run/evaluation.json"
QUERIES = "run/per_query.npz"
SAMPLE = "run/adversarial_sample.npz"

CLOSE = 1e-3
"""How far a stated number may be from the one computed again, in points: rounding of sums."""

LENGTHS_CLOSE = 1e-6
"""The same for lengths on the [0, 1] scale of pixels."""

ARRAYS: Mapping[str, Mapping[str, str]] = {
    "strict": {"broken_by": "i", "iteration": "i", **dict.fromkeys(strict.PROXIES, "f")},
    "clustering": {"clusters": "i"},
}
"""By kind of protocol: what each part has besides value and norm, and of which kind of number."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "ers": ("retention", "fingerprint"),
    "parts": ("retention", "fingerprint"),
    "strict": ("strict", "retention", "audit", "fingerprint"),
    "clustering": ("clustering", "fingerprint"),
}
"""By kind of protocol: what ``extras`` may hold."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Percent = Annotated[float, Field(ge=0, le=100 + CLOSE)]
Count = Annotated[int, Field(ge=0)]
Cost = Annotated[float, Field(ge=0)]


class _Step(_Form):
    step: str
    attacked: Count
    broken: Count
    gradients: Count
    values: Count
    seconds: Cost
    points: Percent
    rounds: tuple[Count, ...] | None = None


class _Point(_Form):
    eps: str
    recall_at_1: Percent
    recall_at_2: Percent
    recall_at_4: Percent
    recall_at_8: Percent
    map_at_r: Percent
    carried: Percent
    missed: Percent | None = None
    missed_at_most: Percent | None = None
    steps: tuple[_Step, ...]


class _Smallest(_Form):
    norm: Literal["linf", "l2"]
    median: Cost | None
    interval: tuple[Cost | None, Cost | None] | None
    largest: Cost
    gradients: Count
    values: Count
    seconds: Cost


class _Strict(_Form):
    norm: Literal["linf", "l2"]
    clean: Percent
    curve: Annotated[tuple[_Point, ...], Field(min_length=1)]
    area: Percent | None = None
    smallest_eps: _Smallest | None = None
    gradients_per_query: Cost
    values_per_query: Cost
    codes: dict[str, int]


class _Numbers(_Form):
    nmi: Percent
    ami: Annotated[float, Field(ge=-100, le=100 + CLOSE)]
    f1: Percent
    recall_at_1: Percent


class _Lowest(_Numbers):
    eps: str
    labelled: bool


class _Attack(_Lowest):
    attack: str


class _Clustering(_Form):
    clean: _Numbers
    attacks: tuple[_Attack, ...]
    worst: Annotated[tuple[_Lowest, ...], Field(min_length=1)]
    seeds: tuple[int, ...]


class _Finding(_Form):
    check: str
    verdict: Literal["pass", "warn", "fail", "skip"]
    value: float | None
    limit: float
    message: str


class _Fingerprint(_Form):
    arch: str | None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    parameters: str
    probe: tuple[float, ...] | None


class _Extras(_Form):
    strict: _Strict | None = None
    clustering: _Clustering | None = None
    retention: dict[str, float] | None = None
    audit: tuple[_Finding, ...] | None = None
    fingerprint: _Fingerprint | None = None


def form_problems(e: Evaluation) -> Iterator[Problem]:
    """Is ``extras`` what a run writes? What reads a row off it may then rely on its form."""
    try:
        found = _Extras.model_validate(e.extras)
    except ValidationError as error:
        for wrong in error.errors():
            yield Problem(0, f"{RUN} extras.{'.'.join(map(str, wrong['loc']))}", wrong["msg"])
        return
    if found.clustering is not None and not any(row.labelled for row in found.clustering.worst):
        yield Problem(0, f"{RUN} extras.clustering.worst", "has no row of the attacks that know the labels")


def parts_of(rules: Protocol, e: Evaluation) -> list[Component]:
    """The columns that a full run has; under a grid they depend on the shape of the images that the sample holds."""
    if rules.kind not in ARRAYS:
        return list(rules.components)
    shapes = {images.shape[1:] for name, images in e.sample.items() if "@" in name and images.ndim == 4}
    if len(shapes) != 1:
        raise Refused([Problem(0, SAMPLE, "holds no images of one size")])
    find = strict.components if rules.kind == "strict" else clustering.components
    return find(rules, shapes.pop())


def shape_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """Are the keys of ``extras`` those of the kind, and the arrays there, one row for each query?"""
    for key in sorted(e.extras):
        if key not in KEYS[rules.kind]:
            yield Problem(0, f"{RUN} extras.{key}", f"is not what a run of kind {rules.kind!r} has")
    wanted = {f"{c.name}/{key}": kind for c in parts for key, kind in ARRAYS.get(rules.kind, {}).items()}
    if rules.together > 1:
        wanted |= {f"{c.name}/round": "i" for c in parts}
    if rules.threshold is not None:
        wanted[strict.SMALLEST] = "f"
    if rules.kind == "clustering":
        wanted |= {"clustering/clean/clusters": "i", "clustering/clean/value": "f"}
        wanted |= {f"{c.name}/choice": "i" for c in parts if CLUSTER_ATTACKS[c.attack].way == "union"}
    for name, kind in wanted.items():
        values = e.arrays.get(name)
        shape: tuple[int, ...] = (e.dataset.n_queries,)
        if name.endswith("/clusters"):
            shape += (len(rules.clustering_seeds),)
        if values is None or values.shape != shape or values.dtype.kind != kind:
            what = "integer" if kind == "i" else "number"
            yield Problem(0, f"{QUERIES} {name}", f"is not one {what} for each of {' x '.join(map(str, shape))}")
    if rules.kind in ARRAYS and rules.kind not in e.extras:
        yield Problem(0, f"{RUN} extras.{rules.kind}", "is missing")


def outcome_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """Do the arrays of strict and clustering runs fit one another?"""
    if rules.kind == "strict":
        found = [*_broken_problems(e, rules, parts), *_proxy_problems(e, parts)]
        yield from found
        if rules.together > 1 and not found:
            yield from _round_problems(e, rules, parts)
        if rules.threshold is not None and not found:
            yield from _smallest_problems(e, rules, parts)
    elif rules.kind == "clustering":
        yield from _cluster_problems(e, parts)


def _count(bad: Any, field: str, said: str) -> Iterator[Problem]:
    """A problem with how many queries are ``bad`` (Q,), where any is."""
    if np.any(bad):
        yield Problem(0, f"{QUERIES} {field}", f"{int(np.sum(bad))} {said}")


def _broken_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """How each query ended: possible codes, in keeping with the smaller eps and with outcome, iteration and norm."""
    clean = e.arrays["benign/recall_at_1"]
    before: Mapping[str, np.ndarray] = {}
    for c in parts:
        now = {k: e.arrays[f"{c.name}/{k}"] for k in ("value", "norm", "broken_by", "iteration")}
        by = now["broken_by"]
        where = f"{c.name}/broken_by"
        known = (by >= strict.SURVIVED) & (by < 2 + len(rules.steps))
        yield from _count(~known, where, f"codes are none of {strict.SURVIVED} to {1 + len(rules.steps)}")
        said = "queries are wrong when clean in one of broken_by and benign/recall_at_1 alone"
        yield from _count((by == strict.CLEAN_WRONG) != (clean != 100.0), where, said)
        carried = by == strict.CARRIED
        was = before["broken_by"] >= strict.CARRIED if before else np.zeros_like(carried)
        said = "queries are broken at a smaller eps in one of this and the smaller eps alone"
        yield from _count(carried != was, where, said)
        wanted = strict.outcome(by, clean)
        differ = ~((now["value"] == wanted) | (np.isnan(now["value"]) & np.isnan(wanted)))
        yield from _count(differ, f"{c.name}/value", "outcomes do not fit broken_by")
        hit = by > strict.CARRIED
        wrong = np.where(hit, now["iteration"] < 1, ~carried & (now["iteration"] != 0))
        yield from _count(wrong, f"{c.name}/iteration", "do not fit broken_by")
        yield from _count(
            (by == strict.CLEAN_WRONG) & (now["norm"] != 0), f"{c.name}/norm", "are of queries that nothing attacked"
        )
        for key in ("iteration", "norm") if before else ():
            said = "differ from the smaller eps that broke the query"
            yield from _count(carried & was & (now[key] != before[key]), f"{c.name}/{key}", said)
        before = now


def _round_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """The round that broke each query: one where a step with rounds did, and one that its group was still given."""
    right = e.arrays["benign/recall_at_1"] == 100.0
    group = groups(len(right), rules.together)
    for c in parts:
        by, first = e.arrays[f"{c.name}/broken_by"], e.arrays[f"{c.name}/round"]
        many = np.array([step.rounds for step in rules.steps])
        here = by > strict.CARRIED
        most = np.where(here, many[np.where(here, by - 2, 0)], 1)
        wrong = np.where(most > 1, (first < 1) | (first > most), first != 0)
        yield from _count(wrong, f"{c.name}/round", "do not fit broken_by")
        if wrong.any():
            continue
        for index in np.flatnonzero(many > 1):
            of_step = np.where(by == index + 2, first, 0)
            alive = (by == strict.SURVIVED) | (by >= index + 2)
            late = of_step > rounds_run(rules.steps[index], group, right, alive, of_step)[group]
            yield from _count(late, f"{c.name}/round", "are after the last that the protocol gives the group")


def _smallest_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """The smallest eps of each query: one that is asked about, between the last eps that left it alone and the first that did not."""
    assert rules.threshold is not None
    right, found = e.arrays["benign/recall_at_1"] == 100.0, e.arrays[strict.SMALLEST]
    yield from _count(
        np.isnan(found) == right, strict.SMALLEST, "are missing where the query is right when clean, or there where not"
    )
    steps, places = ladder([rules.threat_of(c).radius for c in parts], rules.threshold)
    broken = np.stack([e.arrays[f"{c.name}/broken_by"] >= strict.CARRIED for c in parts])
    low, high = bracket(broken, places, len(steps))
    lengths = np.append(steps, np.inf)
    at = np.searchsorted(steps, found * (1 - LENGTHS_CLOSE))
    with np.errstate(invalid="ignore"):
        off = (found != lengths[at]) & ~(np.abs(found - lengths[at]) <= LENGTHS_CLOSE * found)
    yield from _count(right & off, strict.SMALLEST, "are none of the eps that are asked about")
    yield from _count(
        right & ((at <= low) | (at > high)), strict.SMALLEST, "do not lie between the grid's eps that say so"
    )


def _proxy_problems(e: Evaluation, parts: Sequence[Component]) -> Iterator[Problem]:
    """R@2 to MAP@R of the attacked queries: never above clean or a smaller eps, R@1 ≤ R@2 ≤ R@4 ≤ R@8."""
    before = {proxy: e.arrays[f"benign/{proxy}"] for proxy in strict.PROXIES}
    for c in parts:
        untouched = np.isin(e.arrays[f"{c.name}/broken_by"], (strict.CLEAN_WRONG, strict.CARRIED))
        smaller = e.arrays[f"{c.name}/value"]
        for proxy in strict.PROXIES:
            field, now, last = f"{c.name}/{proxy}", e.arrays[f"{c.name}/{proxy}"], before[proxy]
            missing = np.isnan(now)
            yield from _count(
                missing != np.isnan(last), field, "outcomes are missing in one of clean and attacked alone"
            )
            yield from _count((now < 0) | (now > 100 + CLOSE), field, "outcomes are outside 0 to 100")
            yield from _count(now > last + CLOSE, field, "outcomes are above those at a smaller eps or clean")
            said = "outcomes differ from before, of queries that nothing attacked"
            yield from _count(untouched & ~missing & (np.abs(now - last) > CLOSE), field, said)
            if proxy != "map_at_r":
                yield from _count(~missing & ~np.isin(now, (0.0, 100.0)), field, "outcomes are other than 0 and 100")
                yield from _count(smaller > now, field, "outcomes are below those at a smaller rank")
                smaller = now
            before[proxy] = now


def _cluster_problems(e: Evaluation, parts: Sequence[Component]) -> Iterator[Problem]:
    """Clusters from 0 to classes - 1; R@1 within the set for every image whose class has another one."""
    _, at, sizes = np.unique(e.arrays["label"], return_inverse=True, return_counts=True)
    for name in ("clustering/clean", *(c.name for c in parts)):
        clusters, value = e.arrays[f"{name}/clusters"], e.arrays[f"{name}/value"]
        bad = ((clusters < 0) | (clusters >= len(sizes))).any(1)
        yield from _count(bad, f"{name}/clusters", f"images are in clusters other than 0 to {len(sizes) - 1}")
        said = "outcomes are missing where the class has another image, or there where it has none"
        yield from _count(np.isnan(value) != (sizes[at] == 1), f"{name}/value", said)
        kept = ~np.isnan(value)
        yield from _count(kept & ~np.isin(value, (0.0, 100.0)), f"{name}/value", "outcomes are other than 0 and 100")
    for c in parts:
        if CLUSTER_ATTACKS[c.attack].way == "union":
            choice, norms = (
                e.arrays[f"{c.name}/choice"],
                [e.arrays[f"{o.name}/norm"] for o in clustering.before(parts, c)],
            )
            bad = (choice < 0) | (choice >= len(norms))
            yield from _count(bad, f"{c.name}/choice", f"are other than 0 to {len(norms) - 1}")
            wanted = np.choose(choice, norms, mode="clip")
            yield from _count(
                e.arrays[f"{c.name}/norm"] != wanted, f"{c.name}/norm", "are not those of the chosen images"
            )


def number_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """Does every number in ``extras`` come out of the arrays again? Only for arrays without problems."""
    grid = list(dict.fromkeys(c.threat["eps"] for c in parts if "eps" in c.threat))
    if rules.kind == "strict":
        curve = _Strict.model_validate(e.extras["strict"]).curve
        spent = [[step.model_dump() for step in point.steps] for point in curve]
        shape = [len(steps) for steps in spent]
        if shape != [len(rules.steps)] * len(grid):
            said = f"has {shape} steps by eps, the protocol {[len(rules.steps)] * len(grid)}"
            yield Problem(0, f"{RUN} extras.strict.curve", said)
            return
        clean, halving = e.arrays["benign/recall_at_1"], e.extras["strict"].get("smallest_eps")
        again = strict.summary(rules, grid, clean, e.arrays["label"], e.arrays, spent, halving)
        yield from _differences("extras.strict", e.extras["strict"], again)
        yield from _audit_problems(e, rules, parts)
    elif rules.kind == "clustering":
        again = clustering.summary(rules, grid, e.arrays["label"], e.arrays)
        yield from _differences("extras.clustering", e.extras["clustering"], again)
    if "retention" in e.extras:
        yield from _differences("extras.retention", e.extras["retention"], retention(e.measurements, e.benign))


def _differences(where: str, stated: Any, found: Any) -> Iterator[Problem]:
    """Where two trees of lists, mappings and values differ, numbers by more than :data:`CLOSE`, lengths :data:`LENGTHS_CLOSE`."""
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in sorted({*stated, *found}):
            yield from _differences(f"{where}.{key}", stated.get(key), found.get(key))
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for n, (a, b) in enumerate(zip(stated, found, strict=True)):
            yield from _differences(f"{where}.{n}", a, b)
    elif isinstance(stated, int | float) and isinstance(found, float):
        if not abs(stated - found) <= (LENGTHS_CLOSE if ".smallest_eps." in where else CLOSE):
            yield Problem(0, f"{RUN} {where}", f"says {stated}, the queries' own outcomes give {found}")
    elif stated != found:
        yield Problem(0, f"{RUN} {where}", f"says {stated!r}, the queries' own outcomes give {found!r}")


def _audit_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """One finding for each check, a flag for each that is no pass, and F4 no better than the arrays say."""
    stated = e.extras.get("audit", [])
    wanted = list(CHECKS) if rules.audit else []
    names = [f["check"] for f in stated]
    if names != wanted and not (rules.audit and rules.version == "1" and tuple(names) == FIRST):
        said = f"holds the checks {', '.join(names) or 'none'}; the protocol has {', '.join(wanted) or 'none'}"
        yield Problem(0, f"{RUN} extras.audit", said)
        return
    findings = [Finding(**f) for f in stated]
    due = {f.flag().flag: f.flag().message for f in findings if f.verdict in ("warn", "fail")}
    there = {f.flag: f.message for f in e.warnings if f.flag.startswith("audit-")}
    for flag in sorted({*due, *there}):
        if due.get(flag) != there.get(flag):
            said = "is in one of warnings and extras.audit alone, or in other words"
            yield Problem(0, f"{RUN} warnings.{flag}", said)
    for f in findings:
        if f.check == "F4" and f.verdict not in ("warn", "fail"):
            for c in parts:
                broken, left = last_resort(rules, e.arrays[f"{c.name}/broken_by"])
                share = 100.0 * broken / left if broken >= FEW else 0.0
                if share > HIDDEN:
                    said = f"says {f.verdict}, though at eps {c.threat['eps']} {broken} of {left} queries are broken without a gradient alone"
                    yield Problem(0, f"{RUN} extras.audit.F4", said)

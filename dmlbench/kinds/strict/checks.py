"""What a submitted run of kind strict must hold, and what its stored images contradict.

How each query ended at each eps fits its outcomes, its norms and what happened at the smaller eps, rounds ended when they had
to, and the smallest eps lies where the grid says; the curve, the counts of every step and the headline are computed again.
Each stored image is the one that a query's last search stopped at, so it shows whether the query was broken.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from dmlbench.errors import Problem
from dmlbench.kinds.base import (
    AGREE,
    CLOSE,
    DIFFER,
    LENGTHS_CLOSE,
    QUERIES,
    RUN,
    SAMPLE,
    Stated,
    StoredSample,
    count_problems,
    differences,
    outcomes_differ,
)
from dmlbench.kinds.smallest import ladder, length_problems
from dmlbench.kinds.strict.rounds import groups, rounds_run
from dmlbench.kinds.strict.search import read
from dmlbench.kinds.strict.summary import (
    CARRIED,
    CLEAN_WRONG,
    PROXIES,
    SMALLEST,
    SURVIVED,
    outcome,
    summary,
)
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """The per-query arrays at each eps besides outcome and norm."""
    kinds = {"broken_by": "i", "iteration": "i", **dict.fromkeys(PROXIES, "f")}
    kinds |= {"round": "i"} if rules.together > 1 else {}
    columns = {f"{c.name}/{key}": (kind, 1) for c in parts for key, kind in kinds.items()}
    return columns | ({SMALLEST: ("f", 1)} if rules.threshold is not None else {})


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """Do the arrays fit one another?"""
    e, rules, parts = stated.evaluation, stated.rules, stated.parts
    problems = [*_broken_problems(e, rules, parts), *_proxy_problems(e, parts)]
    yield from problems
    if rules.together > 1 and not problems:
        yield from _round_problems(e, rules, parts)
    if rules.threshold is not None and not problems:
        yield from _smallest_problems(e, rules, parts)


def _broken_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """How each query ended: possible codes, in keeping with the smaller eps and with outcome, iteration and norm."""
    clean = e.arrays["benign/recall_at_1"]
    before: Mapping[str, np.ndarray] = {}
    for c in parts:
        now = {k: e.arrays[f"{c.name}/{k}"] for k in ("value", "norm", "broken_by", "iteration")}
        by = now["broken_by"]
        where = f"{c.name}/broken_by"
        known = (by >= SURVIVED) & (by < 2 + len(rules.steps))
        yield from count_problems(~known, where, f"codes are none of {SURVIVED} to {1 + len(rules.steps)}")
        text = "queries are wrong when clean in one of broken_by and benign/recall_at_1 alone"
        yield from count_problems((by == CLEAN_WRONG) != (clean != 100.0), where, text)
        carried = by == CARRIED
        was = before["broken_by"] >= CARRIED if before else np.zeros_like(carried)
        text = "queries are broken at a smaller eps in one of this and the smaller eps alone"
        yield from count_problems(carried != was, where, text)
        expected = outcome(by, clean)
        differ = ~((now["value"] == expected) | (np.isnan(now["value"]) & np.isnan(expected)))
        yield from count_problems(differ, f"{c.name}/value", "outcomes do not fit broken_by")
        hit = by > CARRIED
        wrong = np.where(hit, now["iteration"] < 1, ~carried & (now["iteration"] != 0))
        yield from count_problems(wrong, f"{c.name}/iteration", "do not fit broken_by")
        yield from count_problems(
            (by == CLEAN_WRONG) & (now["norm"] != 0), f"{c.name}/norm", "are of queries that nothing attacked"
        )
        for key in ("iteration", "norm") if before else ():
            text = "differ from the smaller eps that broke the query"
            yield from count_problems(carried & was & (now[key] != before[key]), f"{c.name}/{key}", text)
        before = now


def _round_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """The round that broke each query: one where a step with rounds did, and one that its group was still given."""
    right = e.arrays["benign/recall_at_1"] == 100.0
    group = groups(len(right), rules.together)
    for c in parts:
        by, first = e.arrays[f"{c.name}/broken_by"], e.arrays[f"{c.name}/round"]
        many = np.array([step.rounds for step in rules.steps])
        here = by > CARRIED
        most = np.where(here, many[np.where(here, by - 2, 0)], 1)
        wrong = np.where(most > 1, (first < 1) | (first > most), first != 0)
        yield from count_problems(wrong, f"{c.name}/round", "do not fit broken_by")
        if wrong.any():
            continue
        for index in np.flatnonzero(many > 1):
            of_step = np.where(by == index + 2, first, 0)
            alive = (by == SURVIVED) | (by >= index + 2)
            late = of_step > rounds_run(rules.steps[index], group, right, alive, of_step)[group]
            yield from count_problems(late, f"{c.name}/round", "are after the last that the protocol gives the group")


def _smallest_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """The smallest eps of each query, which lies where the grid says."""
    assert rules.threshold is not None
    right = e.arrays["benign/recall_at_1"] == 100.0
    broken = np.stack([e.arrays[f"{c.name}/broken_by"] >= CARRIED for c in parts])
    eps = ladder([rules.threat_of(c).radius for c in parts], rules.threshold)
    yield from length_problems(SMALLEST, e.arrays[SMALLEST], right, broken, eps)


def _proxy_problems(e: Evaluation, parts: Sequence[Component]) -> Iterator[Problem]:
    """R@2 to MAP@R of the attacked queries: never above clean or a smaller eps, R@1 ≤ R@2 ≤ R@4 ≤ R@8."""
    before = {proxy: e.arrays[f"benign/{proxy}"] for proxy in PROXIES}
    for c in parts:
        untouched = np.isin(e.arrays[f"{c.name}/broken_by"], (CLEAN_WRONG, CARRIED))
        smaller = e.arrays[f"{c.name}/value"]
        for proxy in PROXIES:
            field, now, last = f"{c.name}/{proxy}", e.arrays[f"{c.name}/{proxy}"], before[proxy]
            missing = np.isnan(now)
            yield from count_problems(
                missing != np.isnan(last), field, "outcomes are missing in one of clean and attacked alone"
            )
            yield from count_problems((now < 0) | (now > 100 + CLOSE), field, "outcomes are outside 0 to 100")
            yield from count_problems(now > last + CLOSE, field, "outcomes are above those at a smaller eps or clean")
            text = "outcomes differ from before, of queries that nothing attacked"
            yield from count_problems(untouched & ~missing & (np.abs(now - last) > CLOSE), field, text)
            if proxy != "map_at_r":
                yield from count_problems(
                    ~missing & ~np.isin(now, (0.0, 100.0)), field, "outcomes are other than 0 and 100"
                )
                yield from count_problems(smaller > now, field, "outcomes are below those at a smaller rank")
                smaller = now
            before[proxy] = now


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again? What the steps cost is taken as it is; a full rerun compares it."""
    e, rules = stated.evaluation, stated.rules
    grid = [c.threat["eps"] for c in stated.parts]
    extras = e.extras["strict"]
    spent = [point["steps"] for point in extras["curve"]]
    shape = [len(steps) for steps in spent]
    if shape != [len(rules.steps)] * len(grid):
        expected = [len(rules.steps)] * len(grid)
        yield Problem(0, f"{RUN} extras.strict.curve", f"has {shape} steps by eps, the protocol {expected}")
        return
    halving = extras.get("smallest_eps")
    again = summary(rules, grid, e.arrays["benign/recall_at_1"], e.arrays["label"], e.arrays, spent, halving)
    lengths = "extras.strict.smallest_eps"
    yield from differences(lengths, halving, again.pop("smallest_eps", None), LENGTHS_CLOSE)
    rest = {key: value for key, value in extras.items() if key != "smallest_eps"}
    yield from differences("extras.strict", rest, again)


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """Is each stored image misranked exactly where its query is broken, and the last of a smaller eps where that
    broke it? R@2 to MAP@R are the lowest over all searches, so never above those of the stored image."""
    e, rules, subject, at = stated.evaluation, stated.rules, stored.subject, stored.positions
    scene = subject.scene[torch.from_numpy(at).to(subject.device)]
    before: np.ndarray | None = None
    for c in stated.parts:
        images, by = e.sample[c.name], e.arrays[f"{c.name}/broken_by"][at]
        if before is not None:
            changed = (by == CARRIED) & (images != before).reshape(len(images), -1).any(1)
            if changed.any():
                text = f"{int(changed.sum())} images are not those of the smaller eps that broke the query"
                yield Problem(2, f"{SAMPLE} {c.name}", text)
        before = images
        adversarial = torch.from_numpy(images.copy()).to(subject.device)
        read_outs = read(subject, scene, rules.threat_of(c), adversarial, stored.clean)
        yield from outcomes_differ(e, c, read_outs, at)
        for proxy in PROXIES:
            above = e.arrays[f"{c.name}/{proxy}"][at] > read_outs[proxy] + AGREE
            if above.sum() > max(1, DIFFER * len(at)):
                text = f"{int(above.sum())} of {len(at)} stored images score lower than stated"
                yield Problem(2, f"{QUERIES} {c.name}/{proxy}", text)


def as_long(rules: Protocol, e: Evaluation) -> Protocol:
    """With as many rounds as the run took at the most: some queries do not say when all have had enough."""
    out = []
    for index, step in enumerate(rules.steps):
        if step.rounds > 1:
            most = max([2, *(len(row["steps"][index]["rounds"]) for row in e.extras["strict"]["curve"])])
            step = step.model_copy(update={"rounds": most, "fewest": most})
        out.append(step)
    return rules.model_copy(update={"steps": tuple(out)})

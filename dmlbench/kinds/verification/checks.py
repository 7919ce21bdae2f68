"""What a submitted run of kind verification must hold, and what its stored images contradict.

The pairs are drawn again, thresholds come out of the clean distances, and how each pair ended at each eps fits its outcomes, its norms and
the smaller eps. Each stored image is the one that a pair's last search stopped at, so it shows whether the pair was flipped.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dmlbench.errors import Problem
from dmlbench.kinds.base import (
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
from dmlbench.kinds.verification.pairs import SIDES, Settings, drawn, thresholds
from dmlbench.kinds.verification.search import Bench, clean_distances, read
from dmlbench.kinds.verification.summary import (
    CARRIED,
    CLEAN_WRONG,
    FOLD,
    NO_PAIR,
    SURVIVED,
    distances,
    margins,
    outcome,
    summary,
)
from dmlbench.objectives import right_by
from dmlbench.protocol import Component, Protocol

CLOSE_DISTANCE = 1e-3
"""How far a clean distance may be off when it is measured again, relative to the largest: other hardware rounds otherwise."""


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """The per-query arrays of each side, and at each eps besides outcome and norm."""
    columns = {f"{c.name}/{key}": ("i", 1) for c in parts for key in ("broken_by", "iteration")} | {FOLD: ("i", 1)}
    for side in SIDES:
        columns |= {f"{side}/partner": ("i", 1), f"{side}/distance": ("f", 1), f"{side}/clean": ("f", 1)}
        columns |= {f"{side}/smallest_eps": ("f", 1)} if rules.threshold is not None else {}
    return columns


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """Do the arrays fit one another?"""
    e, rules = stated.evaluation, stated.rules
    fold = e.arrays[FOLD]
    if (fold < 0).any() or (fold >= len(fold)).any():
        yield Problem(0, f"{QUERIES} {FOLD}", "holds other folds than those from 0 on")
        return
    distance = distances(e.arrays)
    right = right_by(margins(distance, thresholds(distance, fold, Settings.of(rules).far)[fold]))
    for i, side in enumerate(SIDES):
        parts = [c for c in stated.parts if c.attack == side]
        missing = e.arrays[f"{side}/partner"] < 0
        d, clean = e.arrays[f"{side}/distance"], e.arrays[f"{side}/clean"]
        yield from count_problems(
            np.isnan(d) != missing, f"{side}/distance", "are there in one of pairs and distances alone"
        )
        expected = np.where(missing, np.nan, 100.0 * right[:, i])
        yield from count_problems(
            ~_equal(clean, expected), f"{side}/clean", "do not follow from the distances and their folds' thresholds"
        )
        yield from _broken_problems(stated, parts, missing, clean)
        if rules.threshold is not None:
            broken = np.stack([e.arrays[f"{c.name}/broken_by"] >= CARRIED for c in parts])
            eps = ladder([rules.threat_of(c).radius for c in parts], rules.threshold)
            name = f"{side}/smallest_eps"
            yield from length_problems(name, e.arrays[name], clean == 100.0, broken, eps)


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _broken_problems(
    stated: Stated, parts: Sequence[Component], missing: np.ndarray, clean: np.ndarray
) -> Iterator[Problem]:
    """How each pair of a side ended: possible codes, in keeping with the smaller eps and with outcome, iteration and norm."""
    e, before = stated.evaluation, np.zeros(len(missing), dtype=bool)
    steps, last = stated.rules.steps, parts[-1].threat["eps"]
    alone = Settings.of(stated.rules).largest
    for c in parts:
        by = e.arrays[f"{c.name}/broken_by"]
        where = f"{c.name}/broken_by"
        run = [i + 2 for i, step in enumerate(steps) if step.name not in alone or c.threat["eps"] == last]
        known = np.isin(by, [NO_PAIR, SURVIVED, CLEAN_WRONG, CARRIED, *run])
        yield from count_problems(~known, where, "codes are of no step that is run at this eps")
        yield from count_problems(
            (by == NO_PAIR) != missing, where, "pairs are missing in one of this and the partners alone"
        )
        text = "pairs are wrong when clean in one of this and the clean outcomes alone"
        yield from count_problems((by == CLEAN_WRONG) != (clean == 0.0), where, text)
        yield from count_problems(
            (by == CARRIED) != before, where, "pairs are flipped at a smaller eps in one of both alone"
        )
        value, norm = e.arrays[f"{c.name}/value"], e.arrays[f"{c.name}/norm"]
        yield from count_problems(~_equal(value, outcome(by)), f"{c.name}/value", "outcomes do not fit broken_by")
        hit, iteration = by > CARRIED, e.arrays[f"{c.name}/iteration"]
        wrong = np.where(hit, iteration < 1, (by != CARRIED) & (iteration != 0))
        yield from count_problems(wrong, f"{c.name}/iteration", "do not fit broken_by")
        nobody = np.isin(by, (NO_PAIR, CLEAN_WRONG)) & (norm != 0)
        yield from count_problems(nobody, f"{c.name}/norm", "are of pairs that nothing attacked")
        before = by >= CARRIED


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again? What the steps cost is taken as it is; a full rerun compares it."""
    e, rules = stated.evaluation, stated.rules
    grid = list(dict.fromkeys(c.threat["eps"] for c in stated.parts))
    extras = e.extras["verification"]
    spent = [point["steps"] for point in extras["curve"]]
    if [len(steps) for steps in spent] != [len(rules.steps)] * len(grid):
        yield Problem(0, f"{RUN} extras.verification.curve", "has other steps or eps than the protocol")
        return
    alone = Settings.of(rules).largest
    ran = [[step.name not in alone or eps == grid[-1] for step in rules.steps] for eps in grid]
    spent = [[{**s, "ran": r} for s, r in zip(*row, strict=True)] for row in zip(spent, ran, strict=True)]
    edges = thresholds(distances(e.arrays), e.arrays[FOLD], Settings.of(rules).far)
    halving = extras.get("smallest_eps", {}).get("any")
    again = summary(rules, grid, e.arrays["label"], edges, e.arrays, spent, halving)
    where = "extras.verification"
    lengths = ("smallest_eps", "thresholds", "roc")
    for key in lengths:
        yield from differences(f"{where}.{key}", extras.get(key), again.pop(key, None), LENGTHS_CLOSE)
    yield from differences(where, {k: v for k, v in extras.items() if k not in lengths}, again)


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The pairs are those that are drawn, as far apart as stated, and each stored image shows what became of its pair."""
    e, rules, subject = stated.evaluation, stated.rules, stored.subject
    pairs = drawn(subject.dataset, rules, rules.seed)
    for i, side in enumerate(SIDES):
        row = np.where(pairs.partner[:, i] >= 0, subject.dataset.gallery[pairs.partner[:, i]], -1)
        yield from _unlike(e.arrays[f"{side}/partner"], row, f"{side}/partner")
    yield from _unlike(e.arrays[FOLD], pairs.fold, FOLD)
    again, distance = clean_distances(subject, pairs), distances(e.arrays)
    off = np.nansum(np.abs(again - distance) > CLOSE_DISTANCE * np.nanmax(again))
    if off:
        yield Problem(2, f"{QUERIES} distance", f"{int(off)} clean distances are others than stated")
        return
    edge = thresholds(distance, pairs.fold, Settings.of(rules).far)[pairs.fold]
    bench = Bench.of(subject, pairs, edge, right_by(margins(distance, edge)))
    for i, side in enumerate(SIDES):
        of_side = np.flatnonzero(bench.side == i)
        of_query = np.full(len(subject.rows), -1)
        of_query[bench.query[of_side]] = of_side
        there = np.flatnonzero(of_query[stored.positions] >= 0)
        at = torch.from_numpy(of_query[stored.positions[there]]).to(subject.device)
        before: np.ndarray | None = None
        for c in (c for c in stated.parts if c.attack == side):
            images, by = e.sample[c.name], e.arrays[f"{c.name}/broken_by"][stored.positions]
            if before is not None:
                changed = (by == CARRIED) & (images != before).reshape(len(images), -1).any(1)
                if changed.any():
                    text = f"{int(changed.sum())} images are not those of the smaller eps that flipped the pair"
                    yield Problem(2, f"{SAMPLE} {c.name}", text)
            before = images
            moved = torch.from_numpy(images[there].copy()).to(subject.device)
            with torch.no_grad():
                share_right = read(
                    bench, at, rules.threat_of(c), moved, stored.clean[torch.from_numpy(there).to(stored.clean.device)]
                )
            again_decided = np.full(len(stored.positions), np.nan)
            again_decided[there] = 100.0 * (share_right >= 50.0)
            yield from outcomes_differ(e, c, {"decided": again_decided}, stored.positions)


def _unlike(stated: np.ndarray, recomputed: np.ndarray, name: str) -> Iterator[Problem]:
    if wrong := int((stated != recomputed).sum()):
        yield Problem(2, f"{QUERIES} {name}", f"{wrong} are others than those that are drawn")

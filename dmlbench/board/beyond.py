"""Which rows of a board are better than which others beyond doubt, from the outcomes of the same queries.

Every two rows are compared query by query, as :mod:`dmlbench.board.compare` does, and what many comparisons find by
chance is made up for by Holm's step-down rule: all claims of a board are true together with probability 95 %, as far as the
intervals hold. Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool
from scipy.special import stdtrit

from dmlbench.board.row import headline
from dmlbench.intervals import LEVEL, PERCENT, Ends, Range, cluster_medians, paired_intervals, stretched
from dmlbench.kinds.table import kind_of, numbers
from dmlbench.protocol import counted
from dmlbench.protocols import packaged_protocol
from dmlbench.results import Evaluation

At = Callable[[int, int, float], Ends]
"""Interval of (second - first) of two runs, by their positions, at a level."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one run says query by query of the number that it is ranked by.

    Attributes:
        metric: the number's column.
        query, label: (Q,) which queries, by ascending row, and their classes.
        values: (Q, k), whose column means have the number as their mean; (Q, 1) for a median over queries.
        ranges: of each column.
    """

    metric: str
    query: np.ndarray
    label: np.ndarray
    values: np.ndarray
    ranges: tuple[Range, ...]


def outcomes(e: Evaluation) -> Outcomes | None:
    """What the run's queries say of its number; None without them, and where the number is of the set of queries, as
    AMI is."""
    number = headline(e)
    if number is None or "query" not in e.arrays or "label" not in e.arrays:
        return None
    name, arrays = number[0], e.arrays
    ranges: tuple[Range, ...] = (PERCENT,)
    if name == "ers":
        rules = packaged_protocol(e.protocol.name, e.protocol.sha256)
        if rules is None or any(f"{c.name}/value" not in arrays for c in rules.components):
            return None
        parts = [c.rescale(arrays[f"{c.name}/value"].astype(np.float64)) for c in rules.components]
        values, ranges = counted(np.stack(parts, axis=1)), tuple(c.limits for c in rules.components)
    elif name in (by_query := kind_of(e).by_query(e)):
        values = by_query[name][:, None]
    else:
        return None
    order = arrays["query"].argsort(kind="stable")
    return Outcomes(name, arrays["query"][order], arrays["label"][order], values[order], ranges)


def better_than(runs: Sequence[Evaluation]) -> list[int | None]:
    """How many of the others each run is better than beyond doubt; the runs are the ranked rows of one board.

    None where a run's outcomes are not at hand, or are of other queries or another number than most runs'.
    """
    held = [outcomes(e) for e in runs]
    kinds = [None if o is None else (o.metric, o.query.tobytes(), o.label.tobytes()) for o in held]
    known = [kind for kind in kinds if kind is not None]
    if not known:
        return [None] * len(runs)
    usual = max(known, key=known.count)
    same_kind = [position for position, kind in enumerate(kinds) if kind == usual]
    same = [o for o, kind in zip(held, kinds, strict=True) if o is not None and kind == usual]
    number = numbers().get(same[0].metric)
    won = holm(len(same), _medians(same) if number and number.median else _means(same)).sum(1)
    counts: list[int | None] = [None] * len(runs)
    for position, count in zip(same_kind, won, strict=True):
        counts[position] = int(count)
    return counts


def holm(count: int, interval: At) -> Bool[np.ndarray, "n n"]:
    """Whether run i is surely better than run j, for all pairs of ``count`` runs together.

    Holm's rule takes the pairs by their p-value, the m-th of M at 5 % / (M - m + 1). A pair's interval leaves out 0 exactly
    where its p-value is that small, so it does to take all that leave it out, narrow the rest's share, and look again.
    """
    better = np.zeros((count, count), dtype=bool)
    open_pairs = list(combinations(range(count), 2))
    while open_pairs:
        level = 1.0 - (1.0 - LEVEL) / len(open_pairs)
        left = []
        for i, j in open_pairs:
            ends = interval(i, j, level)
            if ends is not None and ends[0] > 0:
                better[j, i] = True
            elif ends is not None and ends[1] < 0:
                better[i, j] = True
            else:
                left.append((i, j))
        if len(left) == len(open_pairs):
            break
        open_pairs = left
    return better


def _means(same: Sequence[Outcomes]) -> At:
    def interval(i: int, j: int, level: float) -> Ends:
        a, b = same[i], same[j]
        return paired_intervals(a.values, b.values, a.label, a.ranges, PERCENT, level).mean

    return interval


def _medians(same: Sequence[Outcomes]) -> At:
    """Of the medians over the queries that each model gets right when clean: classes resampled, alike for all models.

    Resamples tell little of the last thousandth, so the ends of the usual level are moved out as those of t would be.
    """
    table, label = np.concatenate([o.values for o in same], axis=1), same[0].label
    drawn = cluster_medians(table, label)
    groups = [len(np.unique(label[~np.isnan(column)])) for column in table.T]

    def interval(i: int, j: int, level: float) -> Ends:
        difference, least = drawn[:, j] - drawn[:, i], min(groups[i], groups[j])
        ends = stretched(difference[1:], float(difference[0]), least)
        if ends is None:
            return None
        wider = float(stdtrit(least - 1, 0.5 + level / 2) / stdtrit(least - 1, 0.5 + LEVEL / 2))
        low, high = (float(difference[0] + (end - difference[0]) * wider) for end in ends)
        return low, high

    return interval

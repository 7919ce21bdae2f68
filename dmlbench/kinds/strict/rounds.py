"""Rounds of a repeated search: when they end, and what more of them would still break.

Queries differ in how likely a random start breaks them, so each further round breaks fewer, and never surely none. A step
with rounds (:class:`~dmlbench.protocol.Step`) ends for a group of queries together, by what all of the group showed: groups
are fixed by the protocol, so the end does not depend on batches, shards, processes or a resume.

What is missed is estimated from the last half of the rounds. A query that falls with probability p in a round is left after n rounds with
probability (1 - p)^n. Where these p lie evenly near 0, as many queries per unit of p, the rounds n+1 to 10 n break 0.9 times what the
rounds n/2+1 to n broke: that is the estimate. Where p is heavier there, as many queries between 0.001 and 0.01 as between 0.01
and 0.1, they break log2(10) = 3.32 times as many: with the upper Poisson limit of what was counted, that is the bound.
"""

import math

import numpy as np
from jaxtyping import Bool, Int

from dmlbench.protocol import Step
from dmlbench.run.subject import query_order

MORE = 10
"""What is missed is what so many times the rounds would break."""
LEVEL = 0.95
"""Of the upper limit of a count."""


def groups(count: int, size: int) -> Int[np.ndarray, " Q"]:
    """The group of each of ``count`` queries: every ``size`` of them in the order of ``query_order``."""
    group = np.empty(count, dtype=np.int64)
    group[query_order(count)] = np.arange(count) // size
    return group


def fallen(rounds: int, group: Int[np.ndarray, " Q"], first: Int[np.ndarray, " Q"]) -> Int[np.ndarray, "G n"]:
    """How many queries of each group had fallen by the end of round 0 (none), 1, ... ``rounds``.

    Args:
        first: the round in which each query fell, from 1; 0 where none was.
    """
    counts = np.zeros((int(group.max(initial=-1)) + 1, rounds + 1), dtype=np.int64)
    hit = first > 0
    np.add.at(counts, (group[hit], first[hit]), 1)
    return counts.cumsum(1)


def rounds_run(
    step: Step,
    group: Int[np.ndarray, " Q"],
    right: Bool[np.ndarray, " Q"],
    alive: Bool[np.ndarray, " Q"],
    first: Int[np.ndarray, " Q"],
) -> Int[np.ndarray, " G"]:
    """How many rounds each group is run: as few as the step's rule allows, given what fell in which round.

    Where only the first r rounds are known, the answer is right up to r, and above r where there are to be more.

    Args:
        right: right when clean.
        alive: before the first round.
        first: the round in which each query fell, from 1; 0 where none was.
    """
    total = fallen(step.rounds, group, first)  # (G, n)
    size = len(total)
    n = np.arange(step.rounds + 1)
    count = np.bincount(group[right], minlength=size)[:, None]
    left = np.bincount(group[alive], minlength=size)[:, None] - total
    spent = left.cumsum(1) - left  # runs of one query before round n ends
    late = total - total[:, n // 2]
    over = (spent >= step.fewest * count) & (late <= step.until / 100 * count) | (left == 0)
    over[:, step.rounds] = True
    return over.argmax(1)


def last_half(total: Int[np.ndarray, "G n"], ran: Int[np.ndarray, " G"]) -> int:
    """How many queries fell in the last half of their group's rounds."""
    at = np.arange(len(ran))
    return int((total[at, ran] - total[at, ran // 2]).sum())


def missed(late: int) -> tuple[float, float]:
    """How many queries :data:`MORE` times the rounds would still break, where the last half broke ``late``: estimate and bound."""
    from scipy.special import gammaincinv

    limit = float(gammaincinv(late + 1, LEVEL))
    return late * (1 - 1 / MORE), math.log2(MORE) * limit

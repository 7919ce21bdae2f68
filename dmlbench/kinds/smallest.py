"""The smallest eps that breaks a query: between which two eps of a grid it lies, and where there.

All queries share one list of eps, which contains the grid, so that queries at the same eps are searched together.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field as Bounds

from dmlbench.errors import Problem
from dmlbench.intervals import cluster_median
from dmlbench.kinds.base import LENGTHS_CLOSE, Cost, Count, Form, count_problems
from dmlbench.kinds.hunting import Field, cost
from dmlbench.protocol import Protocol, Threshold
from dmlbench.run.search import joined
from dmlbench.run.units import Arrays
from dmlbench.threat import written

Beyond = Annotated[int, Bounds(ge=1, le=1)] | None
"""1 in a row where a median is beyond the largest eps of the grid, which then stands in its place; else empty."""

Ladder = tuple[Float[np.ndarray, " n"], Int[np.ndarray, " E"]]


def ladder(radii: Sequence[float], rule: Threshold) -> Ladder:
    """Every eps that the search may try, ascending, and the positions of the grid's eps among them.

    From the smallest of the grid / 2^octaves up, ``parts`` to each octave; then ``parts`` from one of the grid to the next.
    """
    below = radii[0] * 2.0 ** (np.arange(-rule.octaves * rule.parts, 0) / rule.parts)
    share = np.arange(rule.parts) / rule.parts
    between = [low * (high / low) ** share for low, high in pairwise(radii)]
    steps = np.concatenate([below, *between, [radii[-1]]])
    return steps, len(below) + rule.parts * np.arange(len(radii))


def halvings(rule: Threshold) -> int:
    """How many searches a query is given at the most: as many as tell one of the eps up to the smallest of the grid."""
    return (rule.octaves * rule.parts).bit_length()


def together(rule: Threshold, grid: int, size: int) -> int:
    """How many queries of a batch of ``size`` are searched at one eps at the least, in the mean: as if every eps of the ladder but the
    ``grid``'s own were asked about, each once."""
    places = rule.parts * (rule.octaves + grid - 1) + 1 - grid
    return max(1, size * halvings(rule) // max(1, places))


def bracket(
    broken: Bool[np.ndarray, "E Q"], places: Int[np.ndarray, " E"], steps: int
) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, " Q"]]:
    """Between which places on the ladder each query's smallest eps lies: above ``low`` (-1: anywhere below), at most ``high``.

    ``broken`` says at which eps of the grid; a query that none breaks is between the last place and ``steps``, beyond it.
    """
    ends = np.concatenate([[-1], places, [steps]])
    first = np.where(broken.any(0), broken.argmax(0), len(places))
    low, high = ends[first], ends[first + 1]
    return np.where(first < len(places), low, steps - 1), high


def between(
    field: Field,
    name: str,
    eps: Ladder,
    broken: Bool[np.ndarray, "E Q"],
    search: Callable[[float, np.ndarray], Arrays],
) -> tuple[Float[np.ndarray, " Q"], dict[str, Any]]:
    """The smallest eps found that breaks each query, [0, 1] scale, inf beyond the grid; and what it cost.

    Args:
        broken: by eps of the grid, whether it breaks each query; about one that none breaks nothing is asked.
        search: one search of the queries at some positions at an eps, with ``broken`` (n,) bool in what it gives.
    """
    steps, places = eps
    low, high = bracket(broken, places, len(steps))
    middle, nothing = high, np.zeros(0, dtype=np.int64)
    spent: list[tuple[np.ndarray, Arrays]] = []

    def each(positions: np.ndarray) -> Arrays:
        """One search of each at its own eps: those that ask about the same one together."""
        out = []
        for place in np.unique(middle[positions]):
            at = positions[middle[positions] == place]
            out.append({**search(float(steps[place]), at), "at": at})
        return joined(out)

    for halving in itertools.count(1):
        undecided = high - low > 1
        if not undecided.any():
            break
        middle = (low + high) // 2
        results = field.over(name, f"{name}, halving {halving}", undecided, each)
        for _, arrays in results:
            at, hit = arrays["at"], arrays["broken"]
            high[at[hit]], low[at[~hit]] = middle[at[hit]], middle[at[~hit]]
        known = np.concatenate([positions for positions, _ in results]) if results else nothing
        others = np.setdiff1d(np.flatnonzero(undecided), known)  # of another shard
        low[others] = high[others] - 1
        spent += results
    return np.append(steps, np.inf)[high], cost(spent)


class SmallestForm(Form):
    """What a run says of it."""

    norm: Literal["linf", "l2"]
    median: Cost | None
    interval: tuple[Cost | None, Cost | None] | None
    largest: Cost
    gradients: Count
    values: Count
    seconds: Cost


def halfway(
    protocol: Protocol,
    grid: Sequence[str],
    smallest: Float[np.ndarray, " Q"],
    labels: Int[np.ndarray, " Q"],
    halving: Mapping[str, Any],
) -> dict[str, Any]:
    """The median of the smallest eps over the queries that are right when clean, on the [0, 1] scale, and its interval.

    ``median`` and the ends of the ``interval`` are None where they are beyond the largest eps of the grid; there is no interval
    where a single class says nothing of the spread. Values are of the ladder, and the true one lies between that and the one
    below: the lower end is therefore one step down.
    """
    assert protocol.threshold is not None
    steps, _ = ladder([protocol.threat_at(eps).radius for eps in grid], protocol.threshold)
    place = np.searchsorted(steps, smallest * (1 - 1e-6)).astype(np.float64)  # beyond the last where none was found
    middle, ends = cluster_median(np.where(np.isnan(smallest), np.nan, place), labels)

    def at(position: float | None) -> float | None:
        return None if position is None else ([*steps.tolist(), None, 0.0][int(np.clip(position, -1, len(steps)))])

    cost = {name: halving.get(name, 0) for name in ("gradients", "values", "seconds")}
    return {
        "norm": protocol.threat_at(grid[0]).norm,
        "median": at(middle),
        "interval": ends and [at(np.floor(ends[0]) - 1), at(np.ceil(ends[1]))],
        "largest": float(steps[-1]),
        **cost,
    }


def within(value: float | None, smallest: dict[str, Any]) -> float:
    """A length that a run says of it, or the largest eps of the grid where it is beyond that."""
    return float(smallest["largest"] if value is None else value)


def columns_of(name: str, smallest: dict[str, Any]) -> dict[str, float | None]:
    """The median and its interval as the columns ``name`` of a row: beyond the grid the median is the largest eps, and
    ``<name>_beyond`` says so."""
    median, ends = smallest["median"], smallest["interval"]
    columns = {name: within(median, smallest), f"{name}_beyond": 1.0 if median is None else None}
    return columns | ({f"{name}_lo": within(ends[0], smallest), f"{name}_hi": ends[1]} if ends else {})


def shown(value: float | None, numbers: dict[str, Any]) -> str:
    """A length as text; None, beyond the largest of the grid, as "> largest"."""
    return f"> {written(numbers['largest'], numbers['norm'])}" if value is None else written(value, numbers["norm"])


def length_problems(
    name: str,
    stated: Float[np.ndarray, " Q"],
    right: Bool[np.ndarray, " Q"],
    broken: Bool[np.ndarray, "E Q"],
    eps: Ladder,
) -> Iterator[Problem]:
    """Of a submitted run: is the smallest eps of each query one that is asked about, between the last eps of the grid that left
    it alone and the first that did not?"""
    yield from count_problems(
        np.isnan(stated) == right, name, "are missing where the query is right when clean, or there where not"
    )
    steps, places = eps
    low, high = bracket(broken, places, len(steps))
    lengths = np.append(steps, np.inf)
    at = np.searchsorted(steps, stated * (1 - LENGTHS_CLOSE))
    with np.errstate(invalid="ignore"):
        off = (stated != lengths[at]) & ~(np.abs(stated - lengths[at]) <= LENGTHS_CLOSE * stated)
    yield from count_problems(right & off, name, "are none of the eps that are asked about")
    yield from count_problems(
        right & ((at <= low) | (at > high)), name, "do not lie between the grid's eps that say so"
    )

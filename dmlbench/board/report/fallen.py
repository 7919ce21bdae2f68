"""Which classes and which queries are no longer answered right, and at which eps: from the queries' own outcomes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dmlbench.board.adversary import sizes_of
from dmlbench.kinds.table import kind_of
from dmlbench.results import Evaluation
from dmlbench.run.closeup import names_of
from dmlbench.threat import length, written

CLASSES = 30
"""How many classes are shown, weakest first."""
FIRST = 20
"""Queries that are shown until the reader asks for all."""
MOST = 2000
"""How many queries are listed."""
_READ = "recall_at_1"


@dataclass(frozen=True)
class Row:
    """A class, how many queries it has, and its R@1 in % when clean and at each eps."""

    name: str
    queries: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Query:
    """A query that falls: its row in the data set, its class, and the eps that is enough."""

    row: int
    name: str
    eps: str


@dataclass(frozen=True)
class Fallen:
    """What the page shows of it.

    Attributes:
        heads: "clean" and each eps, ascending.
        classes: the weakest classes, then one line for all the others; none where each has a single query.
        counts: of the queries that are right when clean, how many are first wrong at each eps, in the order of ``heads``
            after the first, and how many at none.
        queries: those that fall, first at the smallest eps, :data:`MOST` of them at the most.
        total: how many fall.
        part: what has to be right: the names of the parts that R@1 is read of.
    """

    heads: tuple[str, ...]
    classes: tuple[Row, ...]
    counts: tuple[int, ...]
    queries: tuple[Query, ...]
    total: int
    part: str


def fallen(runs: Sequence[Evaluation]) -> Fallen | None:
    """Of the first run, and of those of the same model, queries and protocol at other eps; None where R@1 is read of no part
    under a perturbation, or the run holds no outcomes.

    A query counts as right at an eps if every part that R@1 is read of there leaves it right.
    """
    first = runs[0]
    clean = first.arrays.get(f"benign/{_READ}")
    if clean is None or "label" not in first.arrays:
        return None
    by_eps: dict[str, np.ndarray] = {}
    parts: list[str] = []
    for e in runs:
        if _measured(e) == _measured(first) and np.array_equal(e.arrays.get("query", ()), first.arrays["query"]):
            for eps, part, value in _outcomes(e):
                by_eps[eps] = np.minimum(by_eps[eps], value) if eps in by_eps else value
                parts.append(part.partition("@")[0])
    if not by_eps:
        return None
    heads = sorted(by_eps, key=length)
    table = np.stack([clean, *(by_eps[eps] for eps in heads)], axis=1).astype(np.float64)
    return Fallen(
        heads=("clean", *heads),
        classes=tuple(_classes(table, first)),
        counts=_counts(table),
        queries=tuple(_queries(table, heads, first)),
        total=int(_falls(table).sum()),
        part=", ".join(dict.fromkeys(parts)),
    )


def _measured(e: Evaluation) -> tuple[str | None, ...]:
    """What two runs have to have in common."""
    return e.model.id, e.model.weights_sha256, e.dataset.sha256, e.protocol.sha256


def _outcomes(e: Evaluation) -> Iterator[tuple[str, str, Float[np.ndarray, " Q"]]]:
    """Eps, part and R@1 (Q,) in % of each part under a perturbation that it is read of."""
    kind = kind_of(e)
    if not kind.moved or kind.within:
        return
    curve, sizes = kind.curve(e), sizes_of(e)[1]
    eps_of = {point.part: point.eps for point in curve.points if point.part} if curve else {}
    for m in e.measurements:
        value = e.arrays.get(f"{m.component}/value")
        eps = eps_of.get(m.component, sizes[0] if len(sizes) == 1 else None)
        if m.readout == _READ and value is not None and eps is not None:
            yield eps, m.component, value


def _names(e: Evaluation) -> dict[int, str]:
    known = names_of(e.sample).classes
    return {int(label): known.get(int(label), str(label)) for label in np.unique(e.arrays["label"])}


def _classes(table: Float[np.ndarray, "Q k"], e: Evaluation) -> Iterator[Row]:
    """Weakest first, over all eps."""
    label, names = e.arrays["label"], _names(e)
    rows = [
        Row(names[int(one)], int((label == one).sum()), tuple(np.nanmean(table[label == one], axis=0).tolist()))
        for one in np.unique(label)
        if not np.isnan(table[label == one]).any(axis=1).all()
    ]
    if all(row.queries < 2 for row in rows):
        return
    rows.sort(key=lambda row: (sum(row.values[1:]), row.values[0]))
    yield from rows[:CLASSES]
    if rest := rows[CLASSES:]:
        weights = [row.queries for row in rest]
        mean = np.average([row.values for row in rest], axis=0, weights=weights)
        yield Row(f"the other {len(rest)}", sum(weights), tuple(mean.tolist()))


def _falls(table: Float[np.ndarray, "Q k"]) -> np.ndarray:
    """(Q,) whether a query is right when clean and wrong at some eps."""
    fell: np.ndarray = (table[:, 0] > 0) & (table[:, 1:] < table[:, :1]).any(axis=1)
    return fell


def _first(table: Float[np.ndarray, "Q k"]) -> Int[np.ndarray, " Q"]:
    """The first eps at which a query is less often right than when clean."""
    return (table[:, 1:] < table[:, :1]).argmax(axis=1)


def _counts(table: Float[np.ndarray, "Q k"]) -> tuple[int, ...]:
    falls, first = _falls(table), _first(table)
    each = np.bincount(first[falls], minlength=table.shape[1] - 1)
    return (*(int(n) for n in each), int((table[:, 0] > 0).sum() - falls.sum()))


def _queries(table: Float[np.ndarray, "Q k"], heads: Sequence[str], e: Evaluation) -> Iterator[Query]:
    """Sorted by the smallest eps that breaks each query if the run searched for it, else by the first of ``heads``."""
    label, names, first = e.arrays["label"], _names(e), _first(table)
    kind, norm = kind_of(e), sizes_of(e)[0]
    by_query = kind.by_query(e)
    finer = next((by_query[n.name] for n in kind.numbers if n.median and n.length and n.name in by_query), None)
    size = np.array([length(eps) for eps in heads])[first] if finer is None else finer
    where = np.flatnonzero(_falls(table))
    for at in where[np.lexsort((e.arrays["query"][where], size[where]))][:MOST]:
        eps = heads[first[at]] if finer is None else written(float(finer[at]), norm)
        yield Query(int(e.arrays["query"][at]), names[int(label[at])], eps)

"""Measuring until it is sure enough: which queries come first, when one looks, and how wide the interval then is.

A run with ``--until`` measures :data:`FIRST` queries, then twice as many, and so on, and stops at the first look whose
interval of one number, ERS or a kind's own, reaches no farther from it than was asked. Who looks often finds a narrow interval by chance, so look j
spends ``0.05 / (j (j + 1))`` of the 5 % that may miss: these add up to 0.05 however many looks there are (Bonferroni), and
what the last interval says holds whenever one stopped. A few classes that happen to agree make an interval of classes
too narrow, so it is never taken to be narrower than if every query were a class of its own.

The searches for ERS's parts go on where those of the look before ended. A kind's own run begins anew at each look, so that the last one is
what it gives of these queries alone; all looks together cost less than twice the last one, and less than three times
where that is of all queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dmlbench.errors import UsageError
from dmlbench.intervals import LEVEL, PERCENT, Ends, Intervals, class_intervals
from dmlbench.metrics import mean
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Component, Protocol, ers_of, score_intervals
from dmlbench.results import Evaluation, finite
from dmlbench.run.search import Attacked
from dmlbench.run.subject import Subject, sample_positions

FIRST = 64
"""Queries at the first look."""


def even_order(labels: Int[np.ndarray, " Q"], seed: int = 20220601) -> Int[np.ndarray, " Q"]:
    """The queries' positions in a fixed shuffle in which every beginning holds the classes in proportion to their size.

    The i-th query of a class of n, in an order of its own, stands at (i + u) / n of the way, u uniform on [0, 1) and one for
    each class: so over all seeds each query is equally likely to be early, and no class is ever ahead by more than one.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    _, group, sizes = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(group, kind="stable")
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.concatenate([np.arange(n) for n in sizes]) if len(sizes) else []
    way = (place + rng.random(len(sizes))[group]) / sizes[group]
    found: np.ndarray = shuffled[np.argsort(way, kind="stable")]
    return found


def looks(count: int) -> Iterator[tuple[int, float]]:
    """For each look of ``count`` queries in all, how many are measured by then, and the level of its intervals."""
    n, j = FIRST, 1
    while True:
        yield min(n, count), 1.0 - (1.0 - LEVEL) / (j * (j + 1))
        if n >= count:
            return
        n, j = 2 * n, j + 1


def sure_intervals(components: Sequence[Component], arrays: Mapping[str, np.ndarray], level: float) -> Intervals:
    """Intervals of the scores and of their mean at one look, no narrower than those of independent queries.

    Args:
        arrays: ``<component>/value`` and ``label`` (Q,) of the queries measured by then.
    """
    return _no_narrower(lambda label: score_intervals(components, {**arrays, "label": label}, level), arrays["label"])


def sure_mean(values: Float[np.ndarray, " Q"], labels: Int[np.ndarray, " Q"], level: float) -> Ends:
    """The same for the mean of what each query adds to one number, points of 100; NaN where a query does not count."""
    column = values[:, None]
    return _no_narrower(lambda label: class_intervals(column, label, [PERCENT], level=level), labels).columns[0]


def _no_narrower(intervals: Callable[[np.ndarray], Intervals], labels: Int[np.ndarray, " Q"]) -> Intervals:
    """Those of the classes, each moved out to the ends of that of queries which are all of a class of their own."""
    by_class, by_query = intervals(labels), intervals(np.arange(len(labels)))

    def wider(a: Ends, b: Ends) -> Ends:
        return a if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))

    columns = [wider(a, b) for a, b in zip(by_class.columns, by_query.columns, strict=True)]
    return Intervals(tuple(columns), wider(by_class.mean, by_query.mean))


def mean_interval(e: Evaluation, values: Float[np.ndarray, " Q"]) -> Ends:
    """The 95 % interval of the mean of what each query of a result adds to one number, points of 100; of a run that
    stopped where it was sure enough, that of its last look."""
    if told := e.extras.get("until"):
        return sure_mean(values, e.arrays["label"], told["looks"][-1]["level"])
    return class_intervals(values[:, None], e.arrays["label"], [PERCENT]).columns[0]


def reach(interval: Ends, value: float | None) -> float:
    """How far the farther end is from the value; infinite where there is none."""
    return np.inf if interval is None or value is None else max(value - interval[0], interval[1] - value)


def require_stoppable(
    rules: Protocol, watched: str | None, labels: Int[np.ndarray, " Q"], points: float, others: Mapping[str, object]
) -> None:
    """Refuse what cannot be stopped at ``points``.

    Args:
        watched: the number that is to be sure; None where the protocol has none that is a mean over queries.
        labels: of all queries.
        others: options that decide otherwise what is measured, by name; None where one was not given.

    Raises:
        UsageError: the reason in a sentence.
    """
    given = [name for name, value in others.items() if value is not None]
    if not (np.isfinite(points) and points > 0):
        raise UsageError(f"--until {points:g} must be above 0: it is points of 100")
    if given:
        raise UsageError(f"--until and {given[0]} both say what is measured: leave one out")
    if watched is None:
        raise UsageError(
            f"--until stops where ERS, or another number to which each query adds by itself, is sure enough, and protocol "
            f"{rules.name!r} has none"
        )
    if whole := [c.name for c in rules.components if OPTIMIZERS[c.optimizer].whole_set]:
        raise UsageError(f"--until does not fit part {whole[0]}, which is of all queries at once")
    if len(np.unique(labels)) < 2:
        raise UsageError("--until needs queries of two classes: one says nothing of how classes differ")


def until_sure(count: int, points: float, look: Callable[[int, float], tuple[float | None, Ends]]) -> dict[str, Any]:
    """Look at more and more of ``count`` queries until the interval of a number is within ``points`` of it.

    Args:
        look: measures the first n queries; the number and its interval at a level.

    Returns:
        What a result says of it: ``points``, whether they were ``reached``, and all ``looks``: ``queries``, ``level`` and ``reach``,
        None where there is no interval.
    """
    told = list[dict[str, Any]]()
    for n, level in looks(count):
        value, ends = look(n, level)
        far = reach(ends, value)
        told.append({"queries": n, "level": level, "reach": finite(far)})
        if far <= points:
            break
    return {"points": points, "reached": far <= points, "looks": told}


def searched_until_sure(
    subject: Subject, components: Sequence[Component], points: float, attacked: Callable[..., Attacked]
) -> tuple[Subject, Attacked, dict[str, Any]]:
    """Attack more and more of the queries, in the subject's order, until ERS is sure.

    Returns:
        The queries measured and what was found of them, both by ascending row, "rows" beside the sample; and :func:`until_sure`'s.
    """
    found, before, here = Attacked({}, {}, {}, 0), 0, subject
    keep = sample_positions(subject[:FIRST])

    def look(n: int, level: float) -> tuple[float | None, Ends]:
        nonlocal found, before, here
        here = subject[:n]
        more = attacked(here, first=before, keep=keep)
        found, before = found.and_then(more) if before else more, n
        arrays = {**found.arrays, "label": here.dataset.labels[here.rows]}
        means = [finite(mean(arrays[f"{c.name}/value"])) for c in components]
        value = ers_of([None if m is None else c.rescale(m) for c, m in zip(components, means, strict=True)])
        return value, sure_intervals(components, arrays, level).mean

    told = until_sure(len(subject.rows), points, look)
    order, kept = np.argsort(here.rows), np.argsort(here.rows[keep])
    ordered = replace(
        found,
        arrays={name: values[order] for name, values in found.arrays.items()},
        sample={"rows": here.rows[keep][kept], **{name: images[kept] for name, images in found.sample.items()}},
    )
    return here[order], ordered, told

"""Two evaluations to paired differences: the same queries, one against the other, by class.

Both models answered the same queries, so their errors are correlated, and the interval of their difference knows by how
much, class by class (:mod:`dmlbench.intervals`). ERS is the mean of its parts' scores and
so is its difference. NMI is not a mean over queries: its interval comes from the clusters that each
query fell into, recomputed on every resample of classes.

Where one run measured some of the other's queries only, everything is of the common ones. What belongs to
the set that was measured and not to its queries (clusters of attacked images, one perturbation for all) is
then left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dmlbench.errors import DataError, NotComparable
from dmlbench.intervals import DRAWS, PERCENT, Ends, cluster_medians, nmi_interval, paired_intervals, stretched
from dmlbench.kinds.table import kind_of, numbers_of
from dmlbench.metrics import OF_THE_GALLERY
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Component, counted, ers_of
from dmlbench.results import Evaluation


@dataclass(frozen=True)
class Paired:
    """One metric of both: larger is better, points on the 0-100 scale.

    ``base`` and ``candidate`` are means over the queries that have an outcome in both. ``candidate`` is None where
    there is no such query, and ``base`` is then its own mean; None, too, where an outcome is infinite.
    """

    metric: str
    is_part: bool
    base: float | None
    candidate: float | None
    interval: Ends
    unchanged: bool = False
    """every query has the same outcome in both"""
    left_out: bool = False
    """a number of the set of queries, which is another one in each run: then neither has a value here"""


def common(base: Evaluation, candidate: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Positions, in each one's arrays, of the queries that both measured, in one order.

    Raises:
        NotComparable: the sets are neither equal nor one inside the other, or a query's class differs.
        DataError: a run has no per-query arrays or they do not fit together.
    """
    rows = []
    for e, name in ((base, "the base"), (candidate, "the candidate")):
        if "query" not in e.arrays or "label" not in e.arrays:
            raise DataError(f"{name} has no per-query arrays 'query' and 'label'")
        query = e.arrays["query"]
        if query.ndim != 1 or len(np.unique(query)) != len(query) or len(query) == 0:
            raise DataError(f"{name}: per-query array 'query' must hold distinct rows")
        for key, values in e.arrays.items():
            if len(values) != len(query):
                raise DataError(f"{name}: per-query array {key!r} has {len(values)} rows for {len(query)} queries")
        rows.append(query)
    both, i, j = np.intersect1d(rows[0], rows[1], return_indices=True)
    if len(both) < min(len(rows[0]), len(rows[1])):
        raise NotComparable(
            f"the runs measured other queries: {len(rows[0])} and {len(rows[1])}, of which {len(both)} are the same"
        )
    if not np.array_equal(base.arrays["label"][i], candidate.arrays["label"][j]):
        raise NotComparable("the runs give the same queries other classes")
    return i, j


def unshared(base: Evaluation, candidate: Evaluation) -> list[str]:
    """The parts and clean metrics where one run has an outcome for a common query and the other has none: a read-out
    of what is right when clean, for one, has outcomes for other queries with every model."""
    i, j = common(base, candidate)
    keys = [f"{m.component}/value" for m in base.measurements]
    keys += [k for k in base.arrays if k.startswith("benign/")]
    names = []
    for key in keys:
        if key in base.arrays and key in candidate.arrays:
            first, second = np.isnan(base.arrays[key][i]), np.isnan(candidate.arrays[key][j])
            if first.shape == second.shape and not np.array_equal(first, second):
                names.append(key.removeprefix("benign/").removesuffix("/value"))
    return names


def pair(
    base: Evaluation,
    candidate: Evaluation,
    components: Mapping[str, Component],
    seed: int = 0,
    draws: int = DRAWS,
) -> list[Paired]:
    """Every metric that the base has, ERS first.

    Args:
        components: by name, what turns raw outcomes into scores of 0 (worst) to 100 (best).
    """
    i, j = common(base, candidate)
    label = base.arrays["label"][i]
    parts = [m.component for m in base.measurements if f"{m.component}/value" in base.arrays]
    benign = [k.removeprefix("benign/") for k in base.arrays if k.startswith("benign/") and k != CLUSTERS]

    def columns(e: Evaluation, at: np.ndarray) -> Float[np.ndarray, "q k"]:
        missing = np.full(len(at), np.nan)
        taken = [
            components[c].rescale(e.arrays[f"{c}/value"][at].astype(np.float64))
            if f"{c}/value" in e.arrays
            else missing
            for c in parts
        ]
        taken += [
            e.arrays[f"benign/{b}"][at].astype(np.float64) if f"benign/{b}" in e.arrays else missing for b in benign
        ]
        return np.stack(taken, axis=1) if taken else np.empty((len(at), 0))

    first, second = columns(base, i), columns(candidate, j)
    loose = set() if same_queries(base, candidate) else of_the_set(base, candidate)
    p, gated = len(parts), not kind_of(base).within  # R@1 within an attacked set may rise as well as fall
    nowhere = np.isnan(first) | np.isnan(second)  # a query without an outcome in one run counts in neither
    own_means = [_mean(first[:, c]) for c in range(first.shape[1])]
    first, second = np.where(nowhere, np.nan, first), np.where(nowhere, np.nan, second)
    ranges = [*(components[c].limits for c in parts), *(PERCENT for _ in benign)]
    intervals = paired_intervals(first, second, label, ranges)
    equal = ((first == second) | nowhere).all(0)
    means = [[_mean(side[:, c]) for c in range(side.shape[1])] for side in (first, second)]
    means[0] = [a if nowhere[:, c].all() else b for c, (a, b) in enumerate(zip(own_means, means[0], strict=True))]
    out = [
        _left_out(name, c < p and gated)
        if name in loose and c < p
        else Paired(name, c < p and gated, means[0][c], means[1][c], intervals.columns[c], bool(equal[c]))
        for c, name in enumerate([*parts, *(b for b in benign)])
    ]
    extra = set(base.extras.get("extra_parts", ()))
    counts = [c for c, name in enumerate(parts) if name not in extra]
    if base.ers is not None and loose & {parts[c] for c in counts}:
        out.insert(0, _left_out("ers"))
    elif base.ers is not None:
        before, after = (ers_of([side[c] for c in counts]) for side in means)
        after = after if candidate.ers is not None else None
        ends = None
        if before is not None and after is not None:
            sides = counted(first[:, counts]), counted(second[:, counts])
            ends = paired_intervals(*sides, label, [ranges[c] for c in counts], PERCENT).mean
        out.insert(0, Paired("ers", False, before, after, ends, bool(equal[counts].all())))
    for name in OF_THE_GALLERY:  # whichever queries were measured
        if name in base.benign:
            values = base.benign[name], candidate.benign.get(name)
            interval = None
            if name == "nmi" and values[1] is not None and CLUSTERS in base.arrays and CLUSTERS in candidate.arrays:
                clusters = base.arrays[CLUSTERS][i], candidate.arrays[CLUSTERS][j]
                interval = nmi_interval(label, *clusters, seed, draws, values[1] - values[0])
            out.append(Paired(name, False, *values, interval))
    return [*out, *_numbers(base, candidate, i, j, seed, draws)]


def same_queries(base: Evaluation, candidate: Evaluation) -> bool:
    """Whether both measured the same queries, and not one of them some of the other's."""
    return set(base.arrays["query"].tolist()) == set(candidate.arrays["query"].tolist())


def of_the_set(base: Evaluation, candidate: Evaluation) -> set[str]:
    """The parts whose outcomes for a query depend on which others are measured with it, such as recall within an attacked
    set, and perturbations that all queries share."""
    whole_set = kind_of(base).whole_set
    return {
        m.component
        for e in (base, candidate)
        for m in e.measurements
        if (m.optimizer in OPTIMIZERS and OPTIMIZERS[m.optimizer].whole_set)
        or (whole_set and m.component not in e.extras.get("extra_parts", ()))
    }


def _left_out(metric: str, is_part: bool = False) -> Paired:
    return Paired(metric, is_part, None, None, None, left_out=True)


def _numbers(
    base: Evaluation, candidate: Evaluation, i: np.ndarray, j: np.ndarray, seed: int, draws: int
) -> list[Paired]:
    """The numbers of the runs' kind: those that are made of the queries' own from the common ones, the others, which are
    of the whole set, as they are."""
    kind, given, other = kind_of(base), numbers_of(base), numbers_of(candidate)
    alike = same_queries(base, candidate)
    first, second = ({}, {}) if kind.whole_set and not alike else (kind.by_query(base), kind.by_query(candidate))
    out = []
    for number in kind.numbers:
        name = number.name
        if name not in given:
            continue
        if name in first and name in second and name in other:
            pair = first[name][i], second[name][j]
            out.append((_medians if number.median else _means)(name, *pair, base.arrays["label"][i], seed, draws))
        elif not alike:
            out.append(_left_out(name))
        else:
            ends = number.between(base, candidate, i, j, seed, draws) if number.between and name in other else None
            out.append(Paired(name, False, given[name], other.get(name), ends))
    return out


def _means(name: str, first: np.ndarray, second: np.ndarray, label: np.ndarray, seed: int, draws: int) -> Paired:
    ends = paired_intervals(first[:, None], second[:, None], label, [PERCENT]).columns[0]
    both = ~np.isnan(first + second)
    equal = bool((first == second)[both].all())
    return Paired(name, False, _mean(first[both]), _mean(second[both]), ends, equal)


def _medians(name: str, first: np.ndarray, second: np.ndarray, label: np.ndarray, seed: int, draws: int) -> Paired:
    """The medians, each over the common queries that its model has a value for."""
    table = np.stack([first, second], axis=1)
    known = ~np.isnan(table)
    if not known.any(0).all():
        return Paired(name, False, None, None, None)
    medians = cluster_medians(table, label, seed, draws)
    groups = int(min(len(np.unique(label[k])) for k in known.T))
    difference = medians[:, 1] - medians[:, 0]
    interval = stretched(difference[1:], float(difference[0]), groups)
    return Paired(name, False, float(medians[0, 0]), float(medians[0, 1]), interval)


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) and np.isfinite(present).all() else None


CLUSTERS = "benign/clusters"
"""Per-query array (Q, seeds): the k-means cluster each query fell into, by clustering seed."""

"""How sure a mean over queries is, where queries of one class rise and fall together.

The class, not the query, is the unit: the variance of a mean is that of its classes' shares in the error
(ratio linearisation, G/(G-1)), and G-1 degrees of freedom are all that G classes have.

A mean of values that lie in a range (shares and ranks in percent, cosines, ERS) has a *Beta interval*: that
of Clopper and Pearson for as many independent outcomes as the queries are worth, n / design effect, after
Korn and Graubard. It lies in the range, is the plain t interval of class means in mid-range, and is never
without width. Near an end of the range the classes say little about how they differ: five classes without a
single hit look the same. There the design effect is drawn towards that of an intra-class correlation of
:data:`CORRELATION`, by :data:`WEIGHT` independent hits or misses, so that no hit at all gives the rule of three
for n / design effect queries. Values without a range, such as distances, have the t interval.

The difference of two models on the same queries is made from the interval of each and from the correlation
of their classes' errors (after Newcombe, and Zou and Donner); ``benchmarks/interval_coverage.py`` counts how
often all of these hold the truth.

Sources: E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data", 1998; R. G. Newcombe, "Improved confidence intervals for the
difference between binomial proportions based on paired data", 1998; G. Y. Zou and A. Donner, "Construction
of confidence limits about effect measures: a general approach", 2008. For resampled classes (NMI and medians):
T. C. Hesterberg, "What teachers should know about the bootstrap", 2015. The weights of the two drawings
towards a prior, and the mixture for correlated models, are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer, Num
from scipy.special import betaincinv, ndtri, stdtrit

VERSION: Literal[2] = 2
"""Of the method; 1 was a bootstrap over classes. A result says which one made its intervals."""

LEVEL = 0.95
CORRELATION = 0.1
"""Intra-class correlation that is assumed where hits (or misses) are too few to tell. Committed runs have 0.00 to
0.05 (10th to 90th percentile) below 10 % on digits and MNIST, and up to 0.2 on Omniglot."""
WEIGHT = 2.0
"""How many independent hits or misses that assumption is worth, and one of two models' errors being independent."""
DRAWS = 2000
"""Resamples of classes, for NMI and medians."""
_CELLS = 1 << 22
"""draws x queries that are held at once: 32 MiB of weights"""

Range = tuple[float, float]
Ends = tuple[float, float] | None
PERCENT: Range = (0.0, 100.0)
ANY: Range = (-math.inf, math.inf)


@dataclass(frozen=True)
class Intervals:
    """Lower and upper ends; None where fewer than two classes have a value, since one class says nothing
    about how classes differ.

    Attributes:
        columns: one for the mean over queries of each column.
        mean: one for the mean of the column means, which is what ERS is to its parts.
    """

    columns: tuple[Ends, ...]
    mean: Ends


@dataclass(frozen=True)
class _Estimates:
    """k column means and, last, the mean of these.

    Attributes:
        mean, low, high: (k+1,) each, NaN where there is none.
        errors: (g, k+1) what each class adds to the error of the mean.
        hits: (k+1,) values at the nearer end of the range that would tell as much; infinite without a range.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    errors: np.ndarray
    hits: np.ndarray


def class_intervals(
    values: Num[np.ndarray, "q k"],
    clusters: Integer[np.ndarray, " q"],
    ranges: Sequence[Range],
    mean_range: Range = ANY,
    level: float = LEVEL,
) -> Intervals:
    """Intervals for the k column means and for their mean.

    Args:
        values: what each query gave, in k columns; NaN where a query does not count in a column.
        clusters: the class of each query.
        ranges: the lowest and the highest value that there can be, by column; infinite where there is none.
        mean_range: the same for the mean of the columns.
        level: the share of intervals that hold the true mean.
    """
    e = _estimates(values, clusters, [*ranges, mean_range], level)
    return _as_intervals(e.low, e.high)


def paired_intervals(
    first: Num[np.ndarray, "q k"],
    second: Num[np.ndarray, "q k"],
    clusters: Integer[np.ndarray, " q"],
    ranges: Sequence[Range],
    mean_range: Range = ANY,
    level: float = LEVEL,
) -> Intervals:
    """Intervals for ``second - first``, of the column means and of their mean; arguments as in
    :func:`class_intervals`. A query that lacks a value in one counts in neither.

    Independent models are as far from the truth as the root of the summed squares of their distances to the
    ends; models with the same errors differ by no more than the distance between the ends of both. In between, the
    squares are mixed by the correlation of the classes' errors.
    """
    missing = np.isnan(first) | np.isnan(second)
    a, b = (_estimates(np.where(missing, np.nan, v), clusters, [*ranges, mean_range], level) for v in (first, second))
    hits = np.minimum(a.hits, b.hits)
    with np.errstate(invalid="ignore", divide="ignore"):  # no class errs: nothing is known of a correlation
        size = np.sqrt((a.errors**2).sum(0) * (b.errors**2).sum(0))
        correlation = np.where(size > 0, (a.errors * b.errors).sum(0) / size, 0.0) / (1.0 + WEIGHT / hits)
        down, up = (a.mean - a.low, b.mean - b.low), (a.high - a.mean, b.high - b.mean)
        positive, apart = np.clip(correlation, 0.0, 1.0), np.clip(correlation, -1.0, 0.0)
        near = np.maximum((down[1] - down[0]) ** 2, (up[1] - up[0]) ** 2)

        def reach(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.sqrt((1.0 - positive) * (x**2 + y**2) + positive * near - 2.0 * apart * x * y)

        difference = b.mean - a.mean
        return _as_intervals(difference - reach(down[1], up[0]), difference + reach(up[1], down[0]))


def _as_intervals(low: np.ndarray, high: np.ndarray) -> Intervals:
    ends = tuple((float(a), float(b)) if np.isfinite([a, b]).all() else None for a, b in zip(low, high, strict=True))
    return Intervals(ends[:-1], ends[-1])


def _estimates(values: np.ndarray, clusters: np.ndarray, ranges: Sequence[Range], level: float) -> _Estimates:
    x = np.asarray(values, dtype=np.float64)
    names, group = np.unique(clusters, return_inverse=True)
    groups = len(names)
    if groups < 2 or len(ranges) < 2:
        nothing = np.full(len(ranges), np.nan)
        return _Estimates(nothing, nothing, nothing, np.empty((groups, len(ranges))), nothing)
    counts = ~np.isnan(x)
    bottom, top = np.array(ranges, dtype=np.float64).T  # (k+1,)
    width = top - bottom

    def by_class(of_query: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(group, column, minlength=groups) for column in of_query.T], axis=1)

    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where a column has no value, or an infinite one
        n = counts.sum(0).astype(np.float64)  # (k,)
        means = np.where(counts, x, 0.0).sum(0) / n
        deviation = np.where(counts, x - means, 0.0)
        somewhere = counts.any(1)
        # of the mean of columns, a query's share in the error is the mean of its shares in theirs
        deviation = np.column_stack([deviation, (deviation / n).mean(1) * somewhere.sum()])  # (q, k+1)
        n, means = np.append(n, somewhere.sum()), np.append(means, means.mean())
        number = by_class(np.column_stack([counts, somewhere]).astype(np.float64))  # (g, k+1)
        present = (number > 0).sum(0).astype(np.float64)
        present[-1] = present.min()
        errors = by_class(deviation) / n
        variance = np.where(present > 1, present / (present - 1) * (errors**2).sum(0), np.nan)
        spread = (deviation**2).sum(0) / n
        t, tail = stdtrit(present - 1, 0.5 + level / 2), (1.0 - level) / 2

        share = np.clip((means - bottom) / width, 0.0, 1.0)
        most = share * (1.0 - share)  # the variance of outcomes that are at one end or the other
        of_most = np.where(most > 0, (n * spread / (most * width**2) + 1.0) / (n + 1.0), 1.0)
        assumed = 1.0 + ((number**2).sum(0) / n - 1.0) * CORRELATION
        hits = n * np.minimum(share, 1.0 - share) / of_most
        shown = np.where(spread > 0, variance / (spread / n), 0.0) * (t / ndtri(1.0 - tail)) ** 2
        drawn = (hits / assumed * shown + WEIGHT * assumed) / (hits / assumed + WEIGHT)
        worth = np.where(present > 1, n / np.maximum(shown, drawn) / of_most, np.nan)
        hit, miss = worth * share, worth * (1.0 - share)
        low = np.where(hit == 0, 0.0, betaincinv(hit, miss + 1.0, tail))
        high = np.where(miss == 0, 1.0, betaincinv(hit + 1.0, miss, 1.0 - tail))

        bounded, reach = np.isfinite(width), t * np.sqrt(variance)
        return _Estimates(
            mean=means,
            low=np.where(bounded, bottom + width * low, np.maximum(means - reach, bottom)),
            high=np.where(bounded, bottom + width * high, np.minimum(means + reach, top)),
            errors=errors,
            hits=np.where(bounded, hits, np.inf),
        )


def stretched(drawn: Float[np.ndarray, " d"], estimate: float, groups: int, level: float = LEVEL) -> Ends:
    """Percentiles of ``drawn`` resamples of classes, stretched about the estimate; None for fewer than two ``groups``.

    Resamples without a value (NaN) say nothing and are left out. The spread of G resampled classes is short by (G-1)/G
    in variance, and its percentiles are those of a normal variable: both are put right by
    ``t(G-1) / z * sqrt(G / (G-1))``, 1.58 for five classes and 1.02 for a hundred.
    """
    finite = drawn[np.isfinite(drawn)]
    if groups < 2 or not len(finite):
        return None
    tail = 0.5 + level / 2
    low, high = np.quantile(finite, [1.0 - tail, tail])
    factor = float(stdtrit(groups - 1, tail) / ndtri(tail)) * math.sqrt(groups / (groups - 1))
    return float(estimate + (low - estimate) * factor), float(estimate + (high - estimate) * factor)


def cluster_medians(
    values: Num[np.ndarray, "q k"], clusters: Integer[np.ndarray, " q"], seed: int = 0, draws: int = DRAWS
) -> Num[np.ndarray, "d k"]:
    """Medians of k columns: first of the values themselves, then of ``draws`` resamples of classes with replacement.

    Each is the smallest value that at least half of the (resampled) queries do not exceed; a column may hold inf.
    Queries that are NaN in a column do not count there; a resample without any that counts is NaN. Columns share the same
    resamples, so that their differences are paired.
    """
    _, group = np.unique(clusters, return_inverse=True)
    groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=draws)
    weights = np.concatenate([np.ones((1, groups), dtype=weights.dtype), weights])  # the first is the estimate itself
    out = np.empty((draws + 1, values.shape[1]))
    step = max(1, _CELLS // len(values))
    for k, column in enumerate(np.asarray(values, dtype=np.float64).T):
        order = column.argsort(kind="stable")[: int((~np.isnan(column)).sum())]  # NaN comes last
        for start in range(0, draws + 1, step):
            upto = weights[start : start + step, group[order]].cumsum(1)  # (d, q)
            half = (2 * upto >= upto[:, -1:]).argmax(1)
            out[start : start + step, k] = np.where(upto[:, -1] > 0, column[order][half], np.nan)
    return out


def cluster_median(
    values: Num[np.ndarray, " q"], clusters: Integer[np.ndarray, " q"], level: float = LEVEL
) -> tuple[float | None, tuple[float, float] | None]:
    """The median of the values and its interval, classes resampled; None where there is no value, or a single class."""
    known = ~np.isnan(values)
    if not known.any():
        return None, None
    medians = cluster_medians(values[known][:, None], clusters[known])[:, 0]
    return float(medians[0]), stretched(medians[1:], float(medians[0]), len(np.unique(clusters[known])), level)


def nmi_interval(
    label: Integer[np.ndarray, " q"],
    first: Integer[np.ndarray, "q s"],
    second: Integer[np.ndarray, "q t"],
    seed: int = 0,
    draws: int = DRAWS,
    shown: float | None = None,
) -> Ends:
    """Interval of the difference in NMI of two clusterings of the same queries (second - first), classes resampled, means over
    clustering seeds; None where there are fewer than two classes.

    ``shown`` is the difference itself, where that is of more images than the queries: NMI of the clean gallery in a
    run with ``--limit``. The queries then say how far it spreads, and not where it lies; fewer images spread more.
    """
    _, label = np.unique(label, return_inverse=True)
    groups = int(label.max()) + 1
    if groups < 2:
        return None
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)
    weights = np.concatenate([np.ones((1, groups)), weights])  # the first is the estimate itself

    def mean_nmi(clusters: np.ndarray) -> np.ndarray:
        return np.mean([nmi_by_weight(label, c, weights) for c in clusters.T], axis=0)

    difference = mean_nmi(second) - mean_nmi(first)
    middle = float(difference[0]) if shown is None else shown
    return stretched(difference[1:] + (middle - difference[0]), middle, groups)


def nmi_by_weight(
    label: Integer[np.ndarray, " q"], cluster: Integer[np.ndarray, " q"], weights: Float[np.ndarray, "d g"]
) -> Float[np.ndarray, " d"]:
    """NMI (arithmetic mean, percent) of a clustering where each query counts as often as its class's weight.

    Args:
        label: classes 0 to g-1.
        weights: by draw and class.
    """
    from scipy import sparse

    _, cluster = np.unique(cluster, return_inverse=True)
    table = sparse.csr_matrix((np.ones(len(label)), (label, cluster)), shape=(weights.shape[1], cluster.max() + 1))
    size = np.asarray(table.sum(1))[:, 0]  # (g,)
    total = weights @ size  # (d,)
    by_class = weights * size / total[:, None]  # (d, g)
    by_cluster = (table.T @ weights.T).T / total[:, None]  # (d, k)
    # the joint entropy is a sum over classes: each cell is weight * n / total
    cells = table.tocoo()
    inner = np.bincount(cells.row, cells.data * np.log(cells.data), minlength=weights.shape[1])  # (g,) sum n log n
    joint = -(weights @ inner + _xlogx(weights) @ size) / total + np.log(total)
    of_class, of_cluster = -_xlogx(by_class).sum(1), -_xlogx(by_cluster).sum(1)
    mutual = of_class + of_cluster - joint
    mean = (of_class + of_cluster) / 2
    return np.where(mean > 1e-12, 100.0 * np.maximum(mutual, 0.0) / np.maximum(mean, 1e-12), 100.0)


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))

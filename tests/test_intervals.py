"""Intervals over classes: against a plain loop and textbook formulas, and whether they hold the truth as often as they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmlbench.intervals import (
    ANY,
    CORRELATION,
    PERCENT,
    WEIGHT,
    class_intervals,
    cluster_medians,
    paired_intervals,
    stretched,
)


def slow(values, clusters, bottom, top):
    """One column in plain Python, query by query: the Beta interval of as many outcomes as the queries are worth."""
    kept = [(v, c) for v, c in zip(values, clusters, strict=True) if v == v]
    n, mean = len(kept), sum(v for v, _ in kept) / len(kept)
    classes = sorted({c for _, c in kept})
    groups = len(classes)
    errors = [sum(v - mean for v, c in kept if c == of) / n for of in classes]
    variance = groups / (groups - 1) * sum(e * e for e in errors)
    t, z = stats.t.ppf(0.975, groups - 1), stats.norm.ppf(0.975)
    if math.isinf(top - bottom):
        reach = t * math.sqrt(variance)
        return max(mean - reach, bottom), min(mean + reach, top)
    p = (mean - bottom) / (top - bottom)
    spread = sum((v - mean) ** 2 for v, _ in kept) / n
    share = (n * spread / (p * (1 - p) * (top - bottom) ** 2) + 1) / (n + 1) if 0 < p < 1 else 1.0
    assumed = 1 + (sum(sum(c == of for _, c in kept) ** 2 for of in classes) / n - 1) * CORRELATION
    shown = variance / (spread / n) * (t / z) ** 2 if spread else 0.0
    known = n * min(p, 1 - p) / share / assumed
    effect = max(shown, (known * shown + WEIGHT * assumed) / (known + WEIGHT))
    worth = n / effect / share
    low = stats.beta.ppf(0.025, worth * p, worth * (1 - p) + 1) if p > 0 else 0.0
    high = stats.beta.ppf(0.975, worth * p + 1, worth * (1 - p)) if p < 1 else 1.0
    return bottom + (top - bottom) * low, bottom + (top - bottom) * high


def boards(rng, share, correlation, groups, size, count):
    """(queries, boards) of 0 and 100, and the class of each query; rates of classes are Beta distributed."""
    rest = (1 - correlation) / correlation
    rates = rng.beta(share * rest, (1 - share) * rest, (groups, count))
    clusters = np.repeat(np.arange(groups), size)
    return 100.0 * (rng.random((groups * size, count)) < rates[clusters]), clusters


def test_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    ranges = [PERCENT, (0.0, 200.0), (-math.inf, 100.0), ANY, PERCENT, PERCENT]
    values = np.column_stack([rng.uniform(0, 100, (60, 4)), 100.0 * (rng.random((60, 2)) < [0.03, 0.9])])
    values[rng.random(values.shape) < 0.2] = np.nan
    clusters = rng.integers(0, 7, 60)
    wanted = [slow(values[:, i].tolist(), clusters.tolist(), *ranges[i]) for i in range(6)]
    np.testing.assert_allclose(class_intervals(values, clusters, ranges).columns, wanted, rtol=1e-9)


def test_a_query_without_a_value_does_not_count_as_any():
    """Neither as 0 nor as a query: the interval is that of the others alone."""
    rng = np.random.default_rng(5)
    values, clusters = 100.0 * (rng.random((90, 1)) < 0.6), rng.integers(0, 6, 90)
    missing = rng.random(90) < 0.4
    with_gaps = np.where(missing[:, None], np.nan, values)
    assert class_intervals(with_gaps, clusters, [PERCENT]) == class_intervals(
        values[~missing], clusters[~missing], [PERCENT]
    )
    other = 100.0 - values
    assert paired_intervals(with_gaps, other, clusters, [PERCENT]) == paired_intervals(
        values[~missing], other[~missing], clusters[~missing], [PERCENT]
    )


def test_the_mean_of_columns_is_the_mean_over_queries_of_their_row_means():
    rng = np.random.default_rng(4)
    values, clusters = rng.uniform(20, 80, (60, 10)), rng.integers(0, 5, 60)
    rows = class_intervals(values.mean(1, keepdims=True), clusters, [PERCENT])
    np.testing.assert_allclose(class_intervals(values, clusters, [PERCENT] * 10, PERCENT).mean, rows.columns[0])


def test_without_a_range_it_is_the_t_interval_of_class_means():
    rng = np.random.default_rng(6)
    of_class = rng.normal(50, 20, 8)
    low, high = class_intervals(np.repeat(of_class, 10)[:, None], np.repeat(np.arange(8), 10), [ANY]).columns[0]
    wanted = stats.t.interval(0.95, 7, of_class.mean(), of_class.std(ddof=1) / math.sqrt(8))
    assert (low, high) == pytest.approx(wanted)


def test_with_a_class_for_each_query_it_is_that_of_clopper_and_pearson():
    values = np.repeat([0.0, 100.0], [240, 160])[:, None]
    wanted = stats.binomtest(160, 400).proportion_ci(0.95, "exact")
    found = class_intervals(values, np.arange(400), [PERCENT]).columns[0]
    assert found == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=0.1)


@pytest.mark.parametrize(("groups", "size"), [(5, 179), (10, 20), (50, 20)])
@pytest.mark.parametrize("value", [0.0, 100.0])
def test_no_hit_at_all_gives_the_rule_of_three(groups, size, value):
    effect = 1 + (size - 1) * CORRELATION
    ends = class_intervals(np.full((groups * size, 1), value), np.arange(groups * size) % groups, [PERCENT]).columns[0]
    reach = abs(ends[1 if value == 0 else 0] - value)
    assert value in ends and reach == pytest.approx(100 * (1 - 0.025 ** (effect / (groups * size))), rel=1e-6)


@pytest.mark.parametrize(
    ("share", "correlation", "groups"),
    [(0.01, 0.02, 5), (0.02, 0.1, 10), (0.05, 0.1, 5), (0.95, 0.1, 20), (0.98, 0.05, 50), (0.5, 0.15, 5)],
)
def test_covers_the_truth_nineteen_times_in_twenty(groups, share, correlation):
    values, clusters = boards(np.random.default_rng(groups), share, correlation, groups, 40, 400)
    ends = np.array(class_intervals(values, clusters, [PERCENT] * 400).columns)
    missed = 400 - ((ends[:, 0] <= 100 * share) & (100 * share <= ends[:, 1])).sum()
    assert missed <= 34  # 20 expected; 35 or more has a chance below 1 in 1,000
    assert (ends[:, 0] < ends[:, 1]).all() and ends.min() >= 0 and ends.max() <= 100


@pytest.mark.parametrize(("first", "second"), [(0.01, 0.02), (0.05, 0.05), (0.95, 0.99), (0.2, 0.5)])
@pytest.mark.parametrize("groups", [5, 20])
def test_the_difference_of_two_models_is_covered_as_often(groups, first, second):
    rng = np.random.default_rng(groups)
    (a, clusters), (b, _) = (boards(rng, p, 0.08, groups, 40, 400) for p in (first, second))
    ends = np.array(paired_intervals(a, b, clusters, [PERCENT] * 400).columns)
    truth = 100 * (second - first)
    missed = 400 - ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).sum()
    assert missed <= 34 and (ends[:, 0] < ends[:, 1]).all() and ends.min() >= -100 and ends.max() <= 100
    np.testing.assert_allclose(-ends[:, ::-1], paired_intervals(b, a, clusters, [PERCENT] * 400).columns, atol=1e-9)


def test_the_difference_without_a_range_is_the_paired_t_interval():
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(6), 4)
    base = np.repeat(rng.normal(50, 20, 6), 4)[:, None]
    gain = np.repeat(rng.normal(3, 4, 6), 4)[:, None]
    found = paired_intervals(base, base + gain, clusters, [ANY]).columns[0]
    assert found == pytest.approx(class_intervals(gain, clusters, [ANY]).columns[0])


def test_models_that_err_alike_are_told_apart_more_surely():
    rng = np.random.default_rng(9)
    values, clusters = boards(rng, 0.5, 0.3, 10, 100, 2)
    first, alone = values[:, :1], values[:, 1:]
    alike = np.where(rng.random(first.shape) < 0.05, 100.0 - first, first)
    low, high = paired_intervals(first, alike, clusters, [PERCENT]).columns[0]
    apart = paired_intervals(first, alone, clusters, [PERCENT]).columns[0]
    assert high - low < (apart[1] - apart[0]) / 3


def test_an_interval_that_ignored_classes_would_be_too_narrow():
    clusters = np.arange(500) % 5
    values = np.array([0.0, 10.0, 20.0, 30.0, 40.0])[clusters][:, None]
    low, high = class_intervals(values, clusters, [PERCENT]).columns[0]
    assert high - low > 2 * 2.776 * 7.07 * 0.9  # t(4) times the standard error of five class means


@pytest.mark.parametrize("groups", [5, 50])
def test_there_is_no_jump_between_the_ends_and_the_middle(groups):
    """One more hit, spread over the classes, moves either end by little, and never back by more than rounding of classes."""
    queries = groups * 40
    clusters = np.arange(queries) % groups
    values = 100.0 * (np.arange(queries)[:, None] < np.arange(queries // 2)[None, :])  # column k has k hits
    ends = np.array(class_intervals(values, clusters, [PERCENT] * values.shape[1]).columns)
    assert np.abs(np.diff(ends, axis=0)).max() < 3 * 100.0 / queries + 0.6


@given(st.floats(-50, 50), st.floats(0.1, 5), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_moves_and_scales_with_the_values(shift, scale, seed):
    rng = np.random.default_rng(seed)
    values, clusters = rng.uniform(0, 100, (40, 2)), rng.integers(0, 4, 40)
    base = np.array(class_intervals(values, clusters, [PERCENT, ANY]).columns)
    moved = class_intervals(values * scale + shift, clusters, [(shift, 100 * scale + shift), ANY]).columns
    np.testing.assert_allclose(moved, base * scale + shift, atol=1e-7)


@given(st.integers(0, 99), st.integers(2, 6), st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0]))
@settings(max_examples=40, deadline=None)
def test_any_outcomes_give_an_interval_with_width_that_holds_the_mean_inside_the_range(seed, groups, share):
    rng = np.random.default_rng(seed)
    clusters = np.append(np.arange(groups), rng.integers(0, groups, 30))
    values = rng.choice([100.0 * (rng.random(len(clusters)) < share), np.full(len(clusters), 37.0)])[:, None]
    low, high = class_intervals(values, clusters, [PERCENT]).columns[0]
    assert 0 <= low <= values.mean() + 1e-9 and values.mean() - 1e-9 <= high <= 100 and low < high


def test_the_order_of_queries_and_the_names_of_classes_do_not_matter():
    rng = np.random.default_rng(0)
    values, clusters = rng.uniform(0, 100, (50, 2)), rng.integers(0, 5, 50)
    order = rng.permutation(50)
    np.testing.assert_allclose(
        class_intervals(values[order], clusters[order] * 10 + 3, [PERCENT] * 2).columns,
        class_intervals(values, clusters, [PERCENT] * 2).columns,
        atol=1e-9,
    )


def test_one_class_gives_no_interval():
    alone = class_intervals(np.ones((4, 1)), np.zeros(4, dtype=int), [PERCENT])
    assert alone.columns == (None,) and alone.mean is None
    values = np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 5.0], [4.0, 6.0]])
    for found in (
        class_intervals(values, np.array([0, 0, 1, 1]), [PERCENT] * 2, PERCENT),
        paired_intervals(values[:, [0, 0]], values, np.array([0, 0, 1, 1]), [PERCENT] * 2, PERCENT),
    ):
        assert found.columns[0] is not None and found.columns[1] is None and found.mean is None


def test_an_infinite_outcome_gives_no_interval():
    values = np.array([[1.0], [np.inf], [2.0], [3.0]])
    assert class_intervals(values, np.array([0, 0, 1, 1]), [ANY]).columns == (None,)


@pytest.mark.parametrize("groups", [2, 5, 100])
def test_resampled_classes_are_stretched_by_the_t_quantile_over_the_normal_one(groups):
    factor = stats.t.ppf(0.975, groups - 1) / 1.959964 * math.sqrt(groups / (groups - 1))
    low, high = stretched(np.linspace(-1, 1, 2001), 0.2, groups)
    assert (low, high) == pytest.approx((0.2 - 1.15 * factor, 0.2 + 0.75 * factor), rel=1e-5)


def test_resamples_in_which_nothing_counts_say_nothing():
    """Two classes of five have a value: without both a resample has no median, which is neither 0 nor any other number."""
    label = np.repeat(np.arange(5), 4)
    values = np.where(label < 2, 40.0 + np.arange(20.0), np.nan)
    drawn = cluster_medians(values[:, None], label, seed=7, draws=300)[:, 0]
    again = np.random.default_rng(7).multinomial(5, np.full(5, 1 / 5), size=300)
    plain = []
    for weights in [[1] * 5, *again.tolist()]:
        counted = sorted(v for v, c in zip(values, label, strict=True) for _ in range(weights[c]) if not math.isnan(v))
        plain.append(counted[(len(counted) - 1) // 2] if counted else math.nan)
    np.testing.assert_array_equal(drawn, plain)
    kept = [v for v in plain[1:] if not math.isnan(v)]
    assert 10 < 300 - len(kept) < 40  # (3/5)^5 of them
    factor = stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975) * math.sqrt(2)
    low, high = np.quantile(kept, [0.025, 0.975])
    wanted = plain[0] + (low - plain[0]) * factor, plain[0] + (high - plain[0]) * factor
    assert stretched(drawn[1:], drawn[0], 2) == pytest.approx(wanted)
    assert stretched(np.full(3, np.nan), 1.0, 2) is None

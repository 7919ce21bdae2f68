"""Intervals over classes: against a plain loop, and whether they hold the truth as often as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.intervals import cluster_bootstrap, widening


def slow(values, clusters, seed, draws):
    """One resample at a time, one query at a time; only the class weights are drawn as the code draws them."""
    names = sorted(set(clusters.tolist()))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    out = []
    for column in range(values.shape[1]):
        means = []
        for w in weights:
            of = dict(zip(names, w.tolist(), strict=True))
            total = number = 0.0
            for v, c in zip(values[:, column].tolist(), clusters.tolist(), strict=True):
                if v == v:
                    total += of[c] * v
                    number += of[c]
            if number:
                means.append(total / number)
        here = [v for v in values[:, column].tolist() if v == v]
        estimate = sum(here) / len(here)
        groups = len({c for v, c in zip(values[:, column].tolist(), clusters.tolist(), strict=True) if v == v})
        low, high = np.quantile(means, [0.025, 0.975])
        out.append([estimate + (end - estimate) * widening(groups) for end in (low, high)])
    return np.array(out)


def test_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    values = rng.normal(50, 20, (60, 3))
    values[rng.random(values.shape) < 0.2] = np.nan
    clusters = rng.integers(0, 7, 60)
    found = cluster_bootstrap(values, clusters, 5, 300)
    np.testing.assert_allclose(found.columns, slow(values, clusters, 5, 300), rtol=1e-10)


def test_the_mean_of_columns_is_the_mean_over_queries_of_their_row_means():
    rng = np.random.default_rng(4)
    values, clusters = rng.normal(50, 20, (60, 10)), rng.integers(0, 5, 60)
    rows = values.mean(1, keepdims=True)
    np.testing.assert_allclose(
        cluster_bootstrap(values, clusters, 1).mean, cluster_bootstrap(rows, clusters, 1).columns[0]
    )


@pytest.mark.parametrize(("groups", "factor"), [(2, 9.168), (5, 1.584), (100, 1.0175)])
def test_widening_is_the_t_quantile_over_the_normal_one(groups, factor):
    assert widening(groups) == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize(("groups", "between"), [(5, 0.0), (5, 3.0), (20, 3.0)])
def test_covers_the_truth_nineteen_times_in_twenty(groups, between):
    rng = np.random.default_rng(groups)
    missed = 0
    for trial in range(200):
        clusters = np.arange(400) % groups
        values = rng.normal(0, between, groups)[clusters] + rng.normal(0, 20, 400)
        low, high = cluster_bootstrap(values[:, None], clusters, trial, 500).mean
        missed += not low <= 0 <= high
    assert missed <= 20  # 10 expected; 21 or more has a chance below 1 in 1,000


def test_an_interval_that_ignored_classes_would_be_too_narrow():
    clusters = np.arange(500) % 5
    values = np.array([0.0, 10.0, 20.0, 30.0, 40.0])[clusters][:, None]
    low, high = cluster_bootstrap(values, clusters).mean
    assert high - low > 2 * 2.776 * 7.07 * 0.8  # t(4) times the standard error of five class means


@given(st.floats(-50, 50), st.floats(0.1, 5), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_moves_and_scales_with_the_values(shift, scale, seed):
    rng = np.random.default_rng(seed)
    values, clusters = rng.normal(size=(40, 1)), rng.integers(0, 4, 40)
    base = np.array(cluster_bootstrap(values, clusters, seed, 200).columns)
    np.testing.assert_allclose(
        cluster_bootstrap(values * scale + shift, clusters, seed, 200).columns, base * scale + shift, atol=1e-9
    )


def test_the_order_of_queries_and_the_names_of_classes_do_not_matter():
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=(50, 2)), rng.integers(0, 5, 50)
    order = rng.permutation(50)
    np.testing.assert_allclose(
        cluster_bootstrap(values[order], clusters[order] * 10 + 3).columns,
        cluster_bootstrap(values, clusters).columns,
        atol=1e-12,
    )


def test_one_class_gives_no_interval():
    alone = cluster_bootstrap(np.ones((4, 1)), np.zeros(4, dtype=int))
    assert alone.columns == (None,) and alone.mean is None
    values = np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 5.0], [4.0, 6.0]])
    found = cluster_bootstrap(values, np.array([0, 0, 1, 1]))
    assert found.columns[0] is not None and found.columns[1] is None and found.mean is None


def test_equal_values_have_an_interval_of_no_width():
    assert cluster_bootstrap(np.full((9, 1), 7.0), np.arange(9) % 3).mean == (7.0, 7.0)

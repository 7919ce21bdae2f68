"""Which rows are better beyond doubt: against Holm's rule by p-values, and on runs whose order is known."""

import numpy as np
from bundles import SUBMISSIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import evaluation

from dmlbench.board.beyond import better_than, holm
from dmlbench.board.compare import compare
from dmlbench.board.table import from_csv
from dmlbench.results import load


@given(st.integers(2, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_all_pairs_are_decided_as_by_holms_rule(count, data):
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    p = {pair: data.draw(st.sampled_from([0.0001, 0.004, 0.006, 0.009, 0.012, 0.02, 0.03, 0.2])) for pair in pairs}
    sign = {pair: data.draw(st.sampled_from([-1, 1])) for pair in pairs}

    def interval(i, j, level):  # leaves out 0 exactly where the p-value is below 1 - level
        if p[i, j] < 1 - level:
            return (1.0, 2.0) if sign[i, j] > 0 else (-2.0, -1.0)
        return (-1.0, 1.0)

    wanted = np.zeros((count, count), dtype=bool)
    for m, (i, j) in enumerate(sorted(pairs, key=lambda pair: p[pair])):
        if p[i, j] >= 0.05 / (len(pairs) - m):
            break
        wanted[(j, i) if sign[i, j] > 0 else (i, j)] = True
    assert (holm(count, interval) == wanted).all()


def test_one_pair_is_decided_as_compare_decides_it():
    for levels in ((30, 34), (30, 40), (30, 31)):
        a, b = (evaluation(level=level, model=str(level)) for level in levels)
        (ers,) = (m for m in compare(a, b).metrics if m.metric == "ers")
        assert better_than([a, b]) == [0, int(ers.interval[0] > 0)]


def test_runs_are_counted_without_chains_and_without_outcomes_not_at_all():
    runs = [evaluation(level=level, model=str(level)) for level in (20, 50, 80)]
    assert better_than(runs) == [0, 1, 2]
    bare = evaluation(level=99).model_copy()
    bare._arrays = {}
    assert better_than([*runs, bare]) == [0, 1, 2, None]
    assert better_than([bare]) == [None] and better_than([]) == []


def test_a_run_of_other_queries_is_left_out():
    runs = [evaluation(level=level, model=str(level)) for level in (20, 50)]
    other = evaluation(level=80)
    moved = other.model_copy().with_arrays({**other.arrays, "query": other.arrays["query"] + 1})
    assert better_than([*runs, moved]) == [0, 1, None]


def test_committed_runs_of_one_board_are_told_apart():
    rows = [row for row in from_csv(SUBMISSIONS.parent / "ers-28" / "omniglot-small.csv") if row.rank]
    counts = better_than([load(SUBMISSIONS / row.submission / "run") for row in rows])
    assert counts == [row.better_than for row in rows]
    by_score = [count for _, count in sorted(zip((r.ers for r in rows), counts, strict=True))]
    assert by_score[0] == 0 and by_score[-1] > 0 and all(n <= place for place, n in enumerate(by_score))

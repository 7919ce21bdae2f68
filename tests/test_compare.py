"""compare: paired differences, verdicts, the gate, its files and its exit codes."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from bundles import SUBMISSIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from synthetic import ENDS, evaluation, outcomes, rescale

from dmlbench.board import add_row, from_evaluation
from dmlbench.board.compare import Gate, as_junit, as_markdown, as_text, compare, compare_rows, sources
from dmlbench.board.compare.gate import metric_name, named_gate, parse_drop, project_gate
from dmlbench.board.compare.paired import Paired, pair
from dmlbench.board.compare.sources import find
from dmlbench.board.compare.verdict import judge
from dmlbench.board.row import partial_text
from dmlbench.errors import DataError, NotComparable, UsageError
from dmlbench.intervals import PERCENT, nmi_by_weight, nmi_interval, paired_intervals
from dmlbench.kinds.clustering.record import worst_clusters
from dmlbench.kinds.table import numbers_of
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, Flag, Measurement, load, save

RECALL = ("benign/recall_at_1", "benign/recall_at_2", "benign/recall_at_4", "benign/recall_at_8")


def metric(c, name):
    return next(m for m in c.metrics if m.metric == name)


def shifted(arrays, points, seed=9, noise=4.0, parts=tuple(ENDS)):
    """The arrays of a model whose parts score ``points`` less (in expectation), with its own noise."""
    rng = np.random.default_rng(seed)
    out = dict(arrays)
    for c in parts:
        values = arrays[f"{c}/value"].astype(np.float64)
        worst, best = ENDS[c]
        if c in ("ES:R", "LTM", "GTM", "GTT"):
            swap = rng.random(len(values)) < noise / 100  # as many gained as lost, in expectation
            values = np.where(swap, rng.permutation(values), values)
            right = values > 0
            values = np.where(right & (rng.random(len(values)) < points / 100 / right.mean()), 0.0, values)
        else:
            values = values + (rng.normal(0, noise, len(values)) - points) / 100 * (best - worst)
        out[f"{c}/value"] = values.astype(np.float32)
    return out


def test_the_tests_own_rescaling_is_the_protocols():
    for c in load_protocol("ers-digits").components:
        assert (c.worst, c.best) == ENDS[c.name]
        assert c.rescale(0.3) == pytest.approx(rescale(c.name, 0.3))


def test_differences_are_plain_means_over_the_same_queries():
    a, b = evaluation(seed=1), evaluation(shifted(outcomes(seed=1), 5))
    order = np.random.default_rng(0).permutation(400)  # the candidate's rows in another order
    b = evaluation({k: v[order] for k, v in b.arrays.items()})
    c = compare(a, b)
    for name in ENDS:
        first = [rescale(name, float(v)) for v in a.arrays[f"{name}/value"]]
        second = [rescale(name, float(v)) for v in b.arrays[f"{name}/value"]]
        assert metric(c, name).difference == pytest.approx(sum(second) / 400 - sum(first) / 400, abs=1e-3)
    assert metric(c, "ers").difference == pytest.approx(b.ers - a.ers, abs=1e-3)
    assert c.n_queries == 400 and c.n_classes == 5 and c.paired


def test_a_query_without_an_outcome_in_one_run_counts_in_neither():
    """As under panum-28, whose read-outs are of the queries that each model gets right when clean."""
    a = evaluation(seed=1)
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    base, candidate = np.full(400, 100.0, np.float32), np.full(400, np.nan, np.float32)
    base[hard] = np.where(rng.random(hard.sum()) < 0.2, 100, 0)
    candidate[~hard] = np.where(rng.random((~hard).sum()) < 0.7, 100, 0)  # worse on all that both have
    first = evaluation({**a.arrays, "LTM/value": base})
    second = evaluation({**a.arrays, "LTM/value": candidate})
    c = compare(first, second)
    found = metric(c, "LTM")
    assert (found.base, found.candidate) == pytest.approx((100.0, float(np.mean(candidate[~hard]))))
    assert found.verdict == "worse" and found.regression
    assert metric(c, "ers").difference == pytest.approx(found.difference / 10)
    assert any("an outcome in both runs" in n and n.endswith(": LTM") for n in c.notes)
    for m in (*c.metrics, *compare(second, first).metrics):
        if m.interval is not None:
            assert m.interval[0] - 1e-9 <= m.difference <= m.interval[1] + 1e-9, m.metric
    assert not any("outcome in both" in n for n in compare(first, first).notes)


def test_a_model_against_itself_is_the_same_everywhere():
    e = evaluation(seed=2)
    c = compare(e, e)
    assert {m.verdict for m in c.metrics} == {"same"} and c.exit_code == 0 and not c.failures
    low, high = metric(c, "ers").interval
    assert -0.3 < low <= 0 <= high < 0.3


def test_equal_outcomes_at_an_end_are_the_same_though_they_prove_little():
    """Two models that nothing breaks in five classes may still differ in others; the gate has no cause to doubt."""
    e = evaluation({**outcomes(seed=2), "LTM/value": np.zeros(400, np.float32)})
    found = metric(compare(e, e, Gate(max_drop={"LTM": 0.1})), "LTM")
    assert found.interval[0] < -1 and found.interval[1] > 1 and found.verdict == "same"
    first = e.arrays["LTM/value"].copy()
    first[0] = 100
    other = evaluation({**e.arrays, "LTM/value": first})
    assert metric(compare(e, other, Gate(max_drop={"LTM": 0.1})), "LTM").verdict == "inconclusive"


@pytest.mark.parametrize(
    ("candidate", "interval", "verdict"),
    [
        (0.0392, (-0.0299, 0.003), "inconclusive"),  # a third less, as it may be by chance
        (0.0392, None, "inconclusive"),
        (0.0602, (-0.0021, 0.0018), "same"),
        (0.0605, (0.0, 0.0), "same"),
        (0.0392, (-0.0299, -0.003), "worse"),
    ],
)
def test_lengths_are_the_same_where_they_are_near_by_their_own_size(candidate, interval, verdict):
    for metric_of_length in ("smallest_eps", "dodging_smallest_eps", "certified_radius"):
        assert judge(Paired(metric_of_length, False, 0.0605, candidate, interval), Gate()).verdict == verdict
        strict = Gate(max_drop={metric_of_length: 0.0001})
        assert judge(Paired(metric_of_length, False, 0.0605, 0.0605, (-0.02, 0.02)), strict).verdict == "inconclusive"


def test_a_length_that_fell_is_written_with_its_digits():
    ics, none = (
        load(SUBMISSIONS / f"digits-smallcnn-triplet-{name}-strict" / "run") for name in ("hm-lga-ics", "none")
    )
    failures = compare(ics, none, Gate(max_drop={"smallest_eps": 0.001})).failures
    told = next(f.message for f in failures if f.subject == "smallest_eps")
    assert told == "smallest_eps fell by 0.0526 (95 % interval 0.0413 to 0.0735), 0.001 are allowed"


def test_a_large_drop_is_a_regression_and_a_large_gain_is_not():
    a = evaluation(seed=3, queries=800, level=50)
    worse = compare(a, evaluation(shifted(a.arrays, 8)))
    assert metric(worse, "ers").verdict == "worse" and metric(worse, "ers").regression and worse.exit_code == 1
    assert worse.failures[0].kind == "regression" and "1 are allowed" in worse.failures[0].message
    better = compare(evaluation(shifted(a.arrays, 8)), a)
    assert metric(better, "ers").verdict == "better" and better.exit_code == 0


def test_a_sure_drop_within_the_allowance_is_worse_and_passes():
    a = evaluation(seed=3, queries=800, level=50)
    b = evaluation(shifted(a.arrays, 3, noise=0))
    assert compare(a, b, Gate(max_drop={"ers": 1.0, "any": 20})).exit_code == 1
    allowed = compare(a, b, Gate(max_drop={"ers": 5.0, "any": 20}))
    assert metric(allowed, "ers").verdict == "worse" and not metric(allowed, "ers").regression
    assert allowed.exit_code == 0


def test_few_queries_are_inconclusive_and_fail_only_when_asked():
    a = evaluation(seed=4, queries=20)
    b = evaluation(shifted(a.arrays, 6, noise=60, seed=1))
    c = compare(a, b)
    assert metric(c, "LTM").verdict == "inconclusive"
    assert c.exit_code == (1 if any(m.regression for m in c.metrics) else 0)
    quiet = Gate(max_drop={"any": 50, "ers": 50}, fail_on_inconclusive=True)
    noisy = evaluation(
        {**a.arrays, **{k: np.roll(a.arrays[k], 1) for k in RECALL}, **{"LTM/value": np.roll(a.arrays["LTM/value"], 3)}}
    )
    c = compare(a, noisy, quiet.model_copy(update={"max_drop": {"any": 1.0}}))
    assert metric(c, "LTM").verdict == "inconclusive" and c.exit_code == 5
    assert all(f.kind == "inconclusive" for f in c.failures)


def test_a_gate_that_saw_nothing_says_so():
    c = compare(evaluation(seed=4), evaluation(seed=4))
    assert c.headline == "Gate passed"
    unseen = [m.model_copy(update={"verdict": "inconclusive"}) for m in c.metrics]
    mixed = c.model_copy(update={"metrics": (*unseen[1:], c.metrics[0])})
    assert mixed.headline == "Gate passed"
    assert "too few queries" in c.model_copy(update={"metrics": tuple(unseen)}).headline


def test_other_reasons_fail_the_gate():
    a = evaluation(seed=5)
    flagged = evaluation(a.arrays, warnings=(Flag(flag="collapsed", message="constant embeddings"),))
    c = compare(a, flagged)
    assert c.exit_code == 1 and [f.kind for f in c.failures] == ["new-flag"] and "constant" in c.failures[0].message
    assert compare(flagged, flagged).exit_code == 0 and compare(flagged, a).exit_code == 0

    without = evaluation({k: v for k, v in a.arrays.items() if not k.startswith("GTT/")})
    c = compare(a, without)
    assert {f.subject for f in c.failures if f.kind == "missing"} == {"GTT", "ers"} and c.exit_code == 1

    broken = evaluation(a.arrays)
    broken.with_arrays({"TMA/value": np.full(400, np.nan)})
    c = compare(a, broken)
    assert {f.subject for f in c.failures} == {"TMA", "ers"} and metric(c, "TMA").candidate is None

    infinite = evaluation(a.arrays)
    infinite.with_arrays({"TMA/value": np.where(np.arange(400) == 7, np.inf, a.arrays["TMA/value"])})
    assert "TMA" in {f.subject for f in compare(a, infinite).failures if f.kind == "missing"}

    fewer = evaluation({k: v[:300] for k, v in a.arrays.items()}, partial=("--limit 300",))
    c = compare(a, fewer)
    assert [f.kind for f in c.failures] == ["fewer-queries"] and "300 queries, the base 400" in c.failures[0].message
    assert c.n_queries == 300 and any("--limit 300" in n for n in c.notes)
    assert compare(fewer, a).exit_code == 0  # more than the base is no fault


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"protocol_sha256": "f" * 64}, "protocol_sha256"),
        ({"dataset_sha256": "e" * 64}, "dataset_sha256"),
        ({"dataset": "mnist"}, "dataset"),
        ({"protocol": "ers-28"}, "protocol"),
    ],
)
def test_what_differs_is_named(other, key):
    a = evaluation(seed=6)
    with pytest.raises(NotComparable, match=rf"these differ: .*{key} \("):
        compare(a, evaluation(a.arrays, **other))


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("--surrogate digits-smallcnn-triplet-act", r"surrogate \(no surrogate and digits-smallcnn-triplet-act\)"),
        ("--eot 4", r"eot \(the protocol's and 4\)"),
    ],
)
def test_another_threat_is_not_comparable(reason, says):
    """A black box is not a better model than a white one, nor is a random model that more passes are averaged of."""
    a = evaluation(seed=6)
    b = evaluation(a.arrays, partial=("--limit 400", reason))
    for compared, first, second in ((compare, a, b), (compare_rows, from_evaluation(a), from_evaluation(b))):
        with pytest.raises(NotComparable, match=f"these differ: {says}"):
            compared(first, second)
        with pytest.raises(NotComparable, match=reason.split()[0].lstrip("-")):
            compared(second, first)
        assert not compared(second, second).failures
    other = evaluation(a.arrays, partial=(f"{reason}2",))
    with pytest.raises(NotComparable, match=reason.split()[0].lstrip("-")):
        compare(other, b)


def test_the_threat_is_read_from_what_evaluate_writes():
    from dmlbench.results import Conditions
    from dmlbench.task import Options, Task

    model, other = "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-act"
    plain = Options(limit=64, seed=3)
    changed = replace(plain, eot=4, eps=("2/255",), surrogate=other)
    task = Task.of(model, "digits", "ers-digits", changed)
    assert task.conditions == Conditions.of(task.partial) == Conditions(eot=4, eps="2/255", surrogate=other)
    assert Conditions.of(partial_text(task.partial).split(";")) == task.conditions  # as a row of a board has it
    assert Task.of(model, "digits", "ers-digits", plain).conditions == Conditions()
    old = evaluation(seed=1).model_dump(exclude={"conditions"}) | {"partial": task.partial}
    assert Evaluation.model_validate(old).conditions == task.conditions
    assert Conditions.of(["--eot many", "surrogate"]) == Conditions()


def test_other_queries_are_not_comparable():
    a = evaluation(seed=6)
    moved = evaluation({**a.arrays, "query": a.arrays["query"] + 10})
    with pytest.raises(NotComparable, match="400 and 400, of which 390 are the same"):
        compare(a, moved)
    with pytest.raises(NotComparable, match="other classes"):
        compare(a, evaluation({**a.arrays, "label": a.arrays["label"][::-1].copy()}))


def test_results_of_superseded_versions_and_models_are_said_to_be_stale():
    old, new = evaluation(seed=4, protocol="ers-digits@1"), evaluation(seed=5)
    why = "protocol ers-digits@1 is superseded by ers-digits@2"
    assert not any("stale" in n for n in compare(new, new).notes + compare_rows(*[from_evaluation(new)] * 2).notes)
    for both in (compare(old, old), compare_rows(from_evaluation(old), from_evaluation(old))):
        assert f"both are stale: {why}" in both.notes
    for sides in ((old, new), (from_evaluation(old), from_evaluation(new))):
        with pytest.raises(NotComparable, match=rf"protocol_version \(1 and 2\).*the base is stale: {why}"):
            (compare if sides[0] is old else compare_rows)(*sides)
    first = evaluation(seed=4, model="mnist-conv3-triplet-act")
    assert any(
        n == "the candidate is stale: model mnist-conv3-triplet-act is superseded by mnist-conv3-triplet-act-2"
        for n in compare(new, first).notes
    )


def test_arrays_that_do_not_fit_are_named():
    a = evaluation(seed=6)
    with pytest.raises(DataError, match="no per-query arrays"):
        compare(a, evaluation(a.arrays, arrays_kept=False))
    with pytest.raises(DataError, match="'query' must hold distinct rows"):
        compare(a, evaluation({**a.arrays, "query": np.zeros(400, dtype=int)}))
    b = evaluation(a.arrays)
    b.with_arrays({"TMA/value": a.arrays["TMA/value"][:10]})
    with pytest.raises(DataError, match="'TMA/value' has 10 rows for 400"):
        compare(a, b)


def test_one_class_gives_no_interval_and_no_false_certainty():
    a = evaluation(seed=7, classes=1)
    c = compare(a, evaluation(shifted(a.arrays, 30)))
    assert all(m.interval is None for m in c.metrics) and metric(c, "ers").verdict == "inconclusive"
    assert any("one test class" in n for n in c.notes)


# --- how often it is right -------------------------------------------------------------------------


def trial(seed, drop, queries=896, classes=5):
    """Two runs on the digits set's 896 queries of 5 classes: another training seed, ``drop`` points worse.

    The classes differ in how they respond to the seed (standard deviation 0.5 points a class and part),
    and one query in twenty flips in each recall part.
    """
    rng = np.random.default_rng((seed, 77))
    base = outcomes(seed=seed, level=45, queries=queries, classes=classes)
    candidate = shifted(base, drop, seed=seed + 1000, noise=5.0)
    for c in ENDS:
        if c not in ("ES:R", "LTM", "GTM", "GTT"):
            worst, best = ENDS[c]
            lean = rng.normal(0, 0.5, classes)[base["label"] - 5]
            candidate[f"{c}/value"] = (candidate[f"{c}/value"] + lean / 100 * (best - worst)).astype(np.float32)
    return compare(evaluation(base), evaluation(candidate))


def test_false_alarms_are_rare():
    comparisons = [trial(seed, drop=0.0) for seed in range(20)]
    alarms = sum(metric(c, "ers").verdict in ("worse", "better") for c in comparisons)
    assert alarms <= 2
    assert sum(c.exit_code == 1 for c in comparisons) <= 2


def test_a_true_drop_of_three_points_is_seen():
    seen = [trial(seed, drop=3.0) for seed in range(20, 40)]
    assert sum(metric(c, "ers").regression for c in seen) >= 16
    assert all(metric(c, "ers").verdict != "better" for c in seen)


def stored(defense):
    """A real run on the board: 896 queries of digits, five classes."""
    return find(f"digits-smallcnn-triplet-{defense}")


def retrained(run, seed, drop=0.0):
    """A run like ``run`` but with other outcomes: each query takes those of a random query of its class, as if the
    model had been trained again, and every part then loses ``drop`` points in expectation."""
    rng = np.random.default_rng((seed, 11))
    label = run.arrays["label"]
    picked = np.arange(len(label))
    for c in np.unique(label):
        rows = np.flatnonzero(label == c)
        picked[rows] = rng.choice(rows, len(rows))
    arrays = {k: v if k in ("query", "label") else v[picked] for k, v in run.arrays.items()}
    for c, (worst, best) in ENDS.items():
        values = arrays[f"{c}/value"].astype(np.float64)
        if c in ("ES:R", "LTM", "GTM", "GTT"):
            right = values > 0
            values[right & (rng.random(len(values)) < min(1.0, drop / 100 / max(right.mean(), 1e-9)))] = 0.0
        else:
            values = values - drop / 100 * (best - worst)
        arrays[f"{c}/value"] = values.astype(np.float32)
    return evaluation(arrays, dataset_sha256=run.dataset.sha256)


def test_false_alarms_on_real_outcomes_are_rare():
    run = stored("hm-lga-ics")
    verdicts = [metric(compare(run, retrained(run, seed)), "ers") for seed in range(20)]
    assert sum(v.verdict in ("worse", "better") for v in verdicts) <= 2


def test_a_drop_of_three_points_in_real_outcomes_is_seen():
    run = stored("hm-lga-ics")
    ers = [metric(compare(run, retrained(run, seed, drop=3.0)), "ers") for seed in range(20)]
    assert np.mean([e.difference for e in ers]) == pytest.approx(-3.0, abs=0.5)  # GTT has nothing to lose
    assert sum(e.regression for e in ers) >= 16


def test_two_models_whose_classes_are_dealt_at_random_are_rarely_told_apart():
    """ACT and HM, class by class to one side or the other: then neither side is better, and classes differ a lot."""
    first, second = stored("act"), stored("hm-lga")
    label = first.arrays["label"]
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng((seed, 5))
        swap = np.isin(label, [c for c in np.unique(label) if rng.random() < 0.5])
        sides = [{}, {}]
        for k, v in first.arrays.items():
            if v.ndim == 1:
                other = second.arrays[k]
                sides[0][k], sides[1][k] = np.where(swap, other, v), np.where(swap, v, other)
        c = compare(*(evaluation(side) for side in sides))
        alarms += metric(c, "ers").verdict in ("worse", "better")
    assert alarms <= 4


@pytest.mark.slow
def test_two_seeds_of_one_model_are_the_same():
    """The packaged model, its targets drawn with another seed: really attacked again."""
    import dmlbench

    name = "digits-smallcnn-triplet-hm-lga-ics"
    c = compare(find(name), dmlbench.evaluate(name, "digits", seed=1, device="cpu"))
    assert metric(c, "ers").verdict == "same" and metric(c, "ers").difference != 0 and c.exit_code == 0
    assert any("other seeds (0 and 1)" in n for n in c.notes)


# --- NMI -------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_weighted_nmi_is_that_of_repeated_queries(seed):
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(seed)
    classes, n = int(rng.integers(2, 6)), 40
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    cluster = rng.integers(0, 4, n) * 7
    weights = rng.integers(0, 3, (3, classes)).astype(float)
    weights[:, 0] += 1
    found = nmi_by_weight(label, cluster, weights)
    for w, value in zip(weights, found, strict=True):
        times = w[label].astype(int)
        assert value == pytest.approx(
            100 * normalized_mutual_info_score(np.repeat(label, times), np.repeat(cluster, times)), abs=1e-6
        )


def test_nmi_has_an_interval_where_the_clusters_are_at_hand():
    a, b = evaluation(seed=8, nmi=80.0), evaluation(seed=8, nmi=60.0)
    assert metric(compare(a, b), "nmi").interval is None
    assert metric(compare(a, b), "nmi").verdict == "inconclusive"
    label = a.arrays["label"]
    rng = np.random.default_rng(0)
    good = np.stack([label, label], axis=1)
    bad = np.where(rng.random((400, 2)) < 0.4, rng.integers(5, 10, (400, 2)), good)
    a.with_arrays({"benign/clusters": good})
    b.with_arrays({"benign/clusters": bad})
    c = compare(a, b)
    assert metric(c, "nmi").interval[1] < 0 and metric(c, "nmi").regression and c.exit_code == 1
    same = compare(a, a)
    assert metric(same, "nmi").interval == (0.0, 0.0) and metric(same, "nmi").verdict == "same"


def test_ers_of_a_run_without_all_parts_is_not_compared():
    some = {k: v for k, v in outcomes(seed=1).items() if not k.startswith(("CA", "QA"))}
    names = [
        p.metric
        for p in pair(evaluation(some), evaluation(some), {c.name: c for c in load_protocol("ers-digits").components})
    ]
    assert "ers" not in names and "TMA" in names


def with_extra(raw: float):
    """A run of one class-spread CA-@square column (0 is safest) beside the protocol's parts."""
    e = evaluation(seed=4)
    values = np.full(400, raw, dtype=np.float32) + np.arange(400, dtype=np.float32) % 3
    part = Measurement(
        component="CA-@square", attack="CA-", optimizer="square", readout="candidate_rank", better="lower",
        value=float(values.mean()), score=100.0 - float(values.mean()), n=400,
    )  # fmt: skip
    added = e.model_copy(update={"measurements": (*e.measurements, part), "extras": {"extra_parts": ["CA-@square"]}})
    return added.with_arrays({**e.arrays, "CA-@square/value": values})


def test_an_extra_part_is_compared_by_its_score():
    """CA- lowers a candidate's rank: a higher raw rank is worse, also where the part is not the protocol's."""
    c = compare(with_extra(50.0), with_extra(80.0))
    part = metric(c, "CA-@square")
    assert (part.base, part.candidate) == pytest.approx((49.0, 19.0), abs=0.01)
    assert part.verdict == "worse" and part.regression
    assert not c.notes  # the extra column has no interval of its own, which says nothing of the classes
    ers, alone = metric(c, "ers"), metric(compare(evaluation(seed=4), evaluation(seed=4)), "ers")
    assert (ers.base, ers.candidate, ers.interval) == (alone.base, alone.candidate, alone.interval)
    assert from_evaluation(with_extra(99.0)).worst_part == from_evaluation(evaluation(seed=4)).worst_part
    unknown = with_extra(50.0)
    named = [m.model_copy(update={"attack": "CA-gone"}) if "@" in m.component else m for m in unknown.measurements]
    with pytest.raises(NotComparable, match="'CA-gone'"):
        compare(unknown.model_copy(update={"measurements": tuple(named)}), with_extra(50.0))


# --- the gate --------------------------------------------------------------------------------------


def test_the_documented_defaults():
    gate = Gate()
    assert [gate.allowed(m, False) for m in ("ers", "recall_at_1", "nmi", "map")] == [1.0, 1.0, 1.0, None]
    assert gate.allowed("CA+", True) == 3.0
    assert Gate(max_drop={"any": 7.0}).allowed("CA+", True) == 7.0
    assert Gate(max_drop={"any": 7.0, "CA+": 2.0}).allowed("CA+", True) == 2.0


def test_a_projects_own_gate(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.dmlbench.gate]\nfail_on_inconclusive = true\nmax_drop = { ers = 2.5, ca_plus = 9, any = 4 }\n"
    )
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    gate, path = project_gate(deep)
    assert path == tmp_path / "pyproject.toml" and gate.fail_on_inconclusive
    assert gate.max_drop == {"ers": 2.5, "CA+": 9.0, "any": 4.0} and gate.allowed("nmi", False) == 1.0
    (deep / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert project_gate(deep)[1] == tmp_path / "pyproject.toml"  # a pyproject without a gate is passed over


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[tool.dmlbench.gate]\nmaxdrop = {}\n", "unknown key 'maxdrop'; did you mean 'max_drop'"),
        ("[tool.dmlbench.gate]\nmax_drop = { erz = 1 }\n", "unknown metric 'erz'; did you mean 'ers'"),
        ("[tool.dmlbench.gate]\nmax_drop = { ers = -1 }\n", "greater than or equal to 0"),
        ("[tool.dmlbench.gate]\nmax_drop = { ers = nan }\n", "finite|greater"),
        ("[tool.dmlbench.gate]\nmax_drop = 3\n", "max_drop"),
        ("[tool.dmlbench.gate\n", "cannot be read"),
        ("[tool.black]\n", "no section"),
    ],
)
def test_a_wrong_gate_is_refused(tmp_path, content, reason):
    path = tmp_path / "pyproject.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=reason):
        named_gate(path)


@pytest.mark.parametrize("text", ["ers", "ers=", "ers=x", "ers=-1", "ers=nan", "=1e999"])
def test_a_wrong_max_drop_is_refused(text):
    with pytest.raises(UsageError, match="METRIC=POINTS"):
        parse_drop(text)


def test_metric_names():
    assert [metric_name(n, []) for n in ("ERS", "ca_plus", "ES:D", "any", "nmi")] == [
        "ers",
        "CA+",
        "ES:D",
        "any",
        "nmi",
    ]
    with pytest.raises(UsageError, match="did you mean 'recall_at_1'"):
        metric_name("recall_1", [])


# --- what it writes --------------------------------------------------------------------------------


def failing():
    a = evaluation(seed=3, queries=800, level=50)
    return compare(a, evaluation(shifted(a.arrays, 8)), labels=("runs/a|b", "<b>new</b>"))


def test_text_markdown_and_junit_say_the_same():
    c = failing()
    text, markdown, junit = as_text(c), as_markdown(c), as_junit(c)
    assert text.rstrip().endswith(c.headline + ".") and text.count("FAIL: ") == len(c.failures)
    assert c.headline in markdown and "<b>" not in markdown and "runs/a\\|b" in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(c.metrics) and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8}
    root = ET.fromstring(junit)
    assert int(root.get("failures")) == len(c.failures) == len(root.findall(".//failure"))
    assert {f.get("message") for f in root.iter("failure")} == {f.message for f in c.failures}
    assert {t.get("name") for t in root.iter("testcase")} >= {"ers", "recall_at_1", "nmi", *ENDS}


def test_control_characters_of_a_name_or_a_flag_reach_no_output():
    base = evaluation(seed=3)
    odd = base.model.model_copy(update={"id": "a\x01\x1b[31m\u202eb\nc"})
    flags = (Flag(flag="new", message="red \x1b[31m\n| text"),)
    other = base.model_copy(update={"model": odd, "warnings": flags}).with_arrays(base.arrays)
    c = compare(base, other, labels=("runs/a", "runs/b\x1b[2J"))
    root = ET.fromstring(as_junit(c))
    assert next(root.iter("testcase")).get("classname") == "dmlbench.a  [31m b c"
    for text in (as_text(c), as_markdown(c)):
        assert all(line.isprintable() for line in text.split("\n")) and "| text" not in text.splitlines()


# --- rows of a board -------------------------------------------------------------------------------


def test_rows_are_compared_unpaired_and_less_surely():
    a = evaluation(seed=3, queries=800, level=50)
    b = evaluation(shifted(a.arrays, 8))
    paired, unpaired = compare(a, b), compare_rows(from_evaluation(a), from_evaluation(b))
    assert not unpaired.paired and metric(unpaired, "ers").verdict == "worse"
    width = [np.diff(metric(c, "ers").interval)[0] for c in (paired, unpaired)]
    assert width[1] > width[0]
    row = from_evaluation(a)
    wide = row.model_copy(update={"ers": row.ers - 3, "ers_lo": row.ers - 13, "ers_hi": row.ers + 7})
    assert metric(compare_rows(row, wide), "ers").verdict == "inconclusive"
    low, high = metric(compare_rows(row, wide), "ers").interval
    assert low == pytest.approx(-3 - math.hypot(10, row.ers_hi - row.ers), abs=1e-6)
    assert high == pytest.approx(-3 + math.hypot(10, row.ers - row.ers_lo), abs=1e-6)


def test_rows_say_how_they_were_made():
    row = from_evaluation(evaluation())
    other = row.model_copy(update={"partial": "limit 32; attacks CA+", "seed": 7})
    notes = compare_rows(other, row).notes
    assert "the base is a partial run: limit 32, attacks CA+" in notes
    assert f"the runs drew their targets with other seeds (7 and {row.seed})" in notes
    assert len(compare_rows(row, row).notes) == 1


def test_a_claimed_row_is_not_comparable():
    row = from_evaluation(evaluation())
    claimed = row.model_copy(update={"status": "claimed", "protocol_sha256": None})
    with pytest.raises(NotComparable, match="protocol_sha256"):
        compare_rows(row, claimed)
    with pytest.raises(NotComparable, match="protocol_sha256"):
        compare_rows(claimed, claimed)


# --- the command -----------------------------------------------------------------------------------


def test_registered_models_by_id(typed):
    done = typed("compare", "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-hm-lga-ics")
    assert "Gate passed" in done.out and "paired by query" in done.out
    done = typed("compare", "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-hm-lga-icz", code=2)
    assert "did you mean 'digits-smallcnn-triplet-hm-lga-ics'" in done.err
    other = ["digits-smallcnn-triplet-none", "digits-smallcnn-triplet-act", "--protocol", "strict-fast"]
    assert "no stored run under protocol 'strict-fast'" in typed("compare", *other, code=4).err


def test_by_id_the_usual_protocol_is_meant_and_no_sample_needed(tmp_path, monkeypatch):
    """As in the wheel, whose board holds no adversarial images."""
    name = "digits-smallcnn-triplet-none"
    source = SUBMISSIONS / f"{name}-ers-digits" / "run"
    if not source.is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    usual = load(source)
    other = usual.protocol.model_copy(update={"name": "strict"})
    for folder, e in (
        ("a", usual),
        ("b", usual.model_copy(update={"protocol": other}).with_arrays(usual.arrays, usual.sample)),
    ):
        save(e, tmp_path / "submissions" / folder / "run")
        (tmp_path / "submissions" / folder / "run" / "adversarial_sample.npz").unlink()
    monkeypatch.setattr(sources, "packaged", lambda _: tmp_path)
    assert find(name) == usual
    assert find(name, "strict").protocol == other
    with pytest.raises(DataError, match=r"adversarial_sample\.npz is missing"):
        load(tmp_path / "submissions" / "a" / "run")


def undefended_under(protocol, model="digits-smallcnn-triplet-none"):
    folder = SUBMISSIONS / f"{model}-{protocol}" / "run"
    if not folder.is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    return load(folder, sample=False)


@pytest.fixture(scope="module")
def with_area():
    """A stored run of version 1 of strict, which has an area."""
    for folder in sorted(SUBMISSIONS.glob("omniglot-*-strict/run")):
        run = load(folder, sample=False)
        if "area" in run.extras["strict"] and run.measurements[0].value > 0:
            return run
    pytest.skip("the board is not at hand, or holds no such run any more")


def test_the_area_of_a_worst_case_is_paired_and_gated(with_area):
    base = with_area
    itself = metric(compare(base, base), "worst_case_area")
    assert itself.verdict == "same" and itself.interval[1] - itself.interval[0] < 2
    arrays = dict(base.arrays)
    names = [f"{m.component}/value" for m in base.measurements]
    for name in names:  # every query falls at the smallest eps
        arrays[name] = 0 * arrays[name]
    radii = [0, *(int(m.component.split("@")[1].split("/")[0]) for m in base.measurements)]
    curve = [float(np.mean(arrays[n])) for n in ("benign/recall_at_1", *names)]
    area = sum((radii[k + 1] - radii[k]) * (curve[k] + curve[k + 1]) / 2 for k in range(len(radii) - 1)) / radii[-1]
    extras = {**base.extras, "strict": {**base.extras["strict"], "area": area}}
    worse = base.model_copy(update={"extras": extras}).with_arrays(arrays)
    found = metric(compare(base, worse), "worst_case_area")

    def by_query(of):
        rows = zip(*(of[n].tolist() for n in ("benign/recall_at_1", *names)), strict=True)
        steps = [(radii[k], radii[k + 1]) for k in range(len(radii) - 1)]
        return np.array([sum((b - a) * (r[k] + r[k + 1]) / 2 for k, (a, b) in enumerate(steps)) for r in rows])

    first, second = by_query(base.arrays) / radii[-1], by_query(arrays) / radii[-1]
    assert (second - first).mean() == pytest.approx(found.candidate - found.base, abs=1e-4)
    ends = paired_intervals(first[:, None], second[:, None], base.arrays["label"], [PERCENT]).columns[0]
    assert found.interval == pytest.approx(ends, abs=1e-4)
    assert found.allowed == 1.0 and found.verdict == "worse" and found.regression


def test_the_nmi_of_attacked_clusters_is_paired_and_parts_within_the_set_are_not_gated():
    base = undefended_under("clustering")
    low = worst_clusters(base)
    attack, _, eps = low.removesuffix("/clusters").partition("@")
    rows = [r for r in base.extras["clustering"]["attacks"] if r["eps"] == eps and r["labelled"]]
    assert attack == min(rows, key=lambda r: r["nmi"])["attack"]
    true = [normalized_mutual_info_score(base.arrays["label"], c) for c in base.arrays[low].T]
    assert 100 * np.mean(true) == pytest.approx(dict(numbers_of(base))["clustering_nmi_attacked"], abs=1e-3)
    better = undefended_under("clustering").with_arrays(
        {**base.arrays, low: np.repeat(base.arrays["label"][:, None], base.arrays[low].shape[1], 1)}
    )
    interval = metric(compare(base, better), "clustering_nmi_attacked").interval
    assert interval[0] > 50 and interval[1] >= 100 - 100 * np.mean(true) - 1
    fallen = undefended_under("clustering").with_arrays(
        {**base.arrays, "C1@40/255/value": 0 * base.arrays["C1@40/255/value"]}
    )
    assert not compare(base, fallen).failures


def test_the_worst_attack_on_clusters_is_that_of_the_largest_eps():
    """Though one at a smaller eps, by luck of k-means, may leave a lower NMI: the number on the board is of the largest."""
    base = undefended_under("clustering")
    table = base.extras["clustering"]["attacks"]
    first = next(r for r in table if r["labelled"] and r["eps"] != table[-1]["eps"])
    lucky = [row | {"nmi": 0.0} if row == first else row for row in table]
    other = base.model_copy(update={"extras": {"clustering": {**base.extras["clustering"], "attacks": lucky}}})
    assert worst_clusters(other) == worst_clusters(base) and worst_clusters(base).endswith(
        f"@{table[-1]['eps']}/clusters"
    )


def limited(run, count):
    """The run on some of its queries; what it says of the set as a whole is that of other queries."""
    keep = np.sort(np.random.default_rng(3).permutation(len(run.arrays["query"]))[:count])
    e = run.model_copy(update={"partial": (f"--limit {count}",)})
    return e.with_arrays({key: values[keep] for key, values in run.arrays.items()})


def test_the_worst_case_of_some_queries_is_compared_on_those(with_area):
    base = with_area
    small = limited(base, 300)
    for c in (compare(base, small), compare(small, base)):
        for name in ("worst_case_recall_at_1", "worst_case_area"):
            found = metric(c, name)
            assert found.difference == 0 and found.interval[0] < 0 < found.interval[1] and found.verdict == "same"
    assert metric(c, "worst_case_area").base != pytest.approx(base.extras["strict"]["area"], abs=0.01)
    largest = metric(c, base.measurements[-1].component)
    assert metric(c, "worst_case_recall_at_1").base == pytest.approx(largest.base)
    assert metric(c, "nmi").difference == 0 and not any("not compared" in n for n in c.notes)


def test_an_extra_part_is_none_of_the_worst_case_curve(with_area):
    base = with_area
    last = base.measurements[-1]
    name = "WM@apgd@5/255"
    more = base.model_copy(
        update={
            "measurements": (
                *base.measurements,
                last.model_copy(update={"component": name, "score": 99.0, "interval": (98.0, 100.0)}),
            ),
            "extras": {**base.extras, "extra_parts": [name]},
        }
    ).with_arrays({**base.arrays, f"{name}/value": 0 * base.arrays[f"{last.component}/value"]})
    assert metric(compare(base, more), "worst_case_area") == metric(compare(base, base), "worst_case_area")
    assert from_evaluation(more) == from_evaluation(base)


def test_numbers_of_a_set_of_queries_are_left_out_where_the_sets_differ():
    base = undefended_under("clustering")
    names = [n for n in numbers_of(base) if n.startswith("clustering_")]
    assert len(names) == 4
    c = compare(limited(base, 300), base, Gate(fail_on_inconclusive=True))
    for name in (*names, *(m.component for m in base.measurements)):
        found = metric(c, name)
        assert (found.base, found.candidate, found.difference, found.interval) == (None, None, None, None)
    (said,) = [n for n in c.notes if n.startswith("not compared")]
    assert all(name in said for name in names)
    assert [(f.kind, f.subject) for f in c.failures] == [("inconclusive", "clustering_nmi_attacked")]
    assert c.exit_code == 5 and "nothing to compare" in c.failures[0].message
    assert compare(limited(base, 300), base).exit_code == 0
    assert metric(compare(base, base), names[0]).difference == 0


def test_a_perturbation_that_all_queries_share_is_of_the_set():
    def universal(e):
        changed = [
            m.model_copy(update={"optimizer": "universal"}) if m.component == "LTM" else m for m in e.measurements
        ]
        return e.model_copy(update={"measurements": tuple(changed)}).with_arrays(e.arrays)

    a = universal(evaluation(seed=5))
    c = compare(limited(a, 300), a)
    assert metric(c, "LTM").base is metric(c, "ers").base is metric(c, "LTM").candidate is None
    assert metric(c, "GTM").difference == 0 and c.exit_code == 0
    assert metric(compare(a, a), "LTM").difference == 0


def test_nmi_of_the_gallery_lies_inside_its_interval_whichever_queries_were_measured():
    """It is not a number of the queries, whose own clusters only say how far it spreads."""
    first, second = (limited(stored(defense), 48) for defense in ("none", "hm-lga-ics"))
    label = first.arrays["label"]
    of_queries = [
        100 * np.mean([normalized_mutual_info_score(label, c) for c in e.arrays["benign/clusters"].T])
        for e in (first, second)
    ]
    c = compare(first, second)
    found = metric(c, "nmi")
    assert abs(found.difference - (of_queries[1] - of_queries[0])) > 0.3
    assert found.difference == pytest.approx(second.benign["nmi"] - first.benign["nmi"])
    moved = found.difference - (of_queries[1] - of_queries[0])
    i = np.arange(48)
    around = nmi_interval(first.arrays["label"][i], *(e.arrays["benign/clusters"][i] for e in (first, second)), 0, 2000)
    assert found.interval == pytest.approx((around[0] + moved, around[1] + moved), abs=1e-3)
    assert found.interval[0] < found.difference < found.interval[1]
    whole = metric(compare(stored("none"), stored("hm-lga-ics")), "nmi")
    assert np.diff(found.interval) > np.diff(whole.interval)


@pytest.fixture
def runs(tmp_path):
    a = evaluation(seed=3, queries=400, level=50)
    save(a, tmp_path / "base")
    save(evaluation(a.arrays), tmp_path / "twin")
    save(evaluation(shifted(a.arrays, 10)), tmp_path / "worse")
    save(evaluation(a.arrays, dataset_sha256="d" * 64), tmp_path / "other")
    return tmp_path


def test_as_a_user_types_it(run, runs):
    done = run("compare", "base", "twin")
    assert "Gate passed." in done.out and done.err == ""
    run("compare", "base", "worse", code=1)


def test_exit_codes_and_files(typed, runs):
    summary = runs / "summary.md"
    summary.write_text("before\n")
    done = typed(
        "compare", "base", "worse", "--markdown", "new/r.md", "--json", "r.json", "--junit", "r.xml",
        code=1, env={"GITHUB_STEP_SUMMARY": str(summary)},
    )  # fmt: skip
    assert "REGRESSION" in done.out
    markdown = (runs / "new" / "r.md").read_text()
    assert summary.read_text() == "before\n" + markdown + "\n"
    content = json.loads((runs / "r.json").read_text())
    assert content["exit_code"] == 1 and content["passed"] is False and content["failures"][0]["subject"] == "ers"
    assert ET.parse(runs / "r.xml").getroot().get("failures") == str(len(content["failures"]))
    assert typed("compare", "base", "worse", "--json", code=1).json["failures"] == content["failures"]
    done = typed("compare", "base", "worse", code=4, env={"GITHUB_STEP_SUMMARY": str(runs / "none" / "s.md")})
    assert "GITHUB_STEP_SUMMARY" in done.err and len(done.err.splitlines()) == 1


def test_the_gate_of_the_command_line_and_of_pyproject(typed, runs):
    loose = ["--max-drop", "ers=50", "--max-drop", "any=50"]
    assert "▼ worse" in typed("compare", "base", "worse", *loose).out
    (runs / "pyproject.toml").write_text("[tool.dmlbench.gate]\nmax_drop = { ers = 50, any = 50 }\n")
    typed("compare", "base", "worse")
    typed("compare", "base", "worse", "--max-drop", "ers=1", code=1)
    (runs / "strict.toml").write_text("[tool.dmlbench.gate]\nmax_drop = { ers = 1 }\n")
    typed("compare", "base", "worse", "--config", "strict.toml", code=1)


@pytest.mark.parametrize("name", ["strict@40/255", "PGD:R@1", "WM@apgd"])
def test_a_gate_names_any_part_of_the_runs_in_its_file_too(typed, runs, name):
    def renamed(e):
        measurements = tuple(
            m.model_copy(update={"component": name, "attack": "WM"}) if m.component == "LTM" else m
            for m in e.measurements
        )
        extras = {**e.extras, "extra_parts": [name]}
        arrays = {k.replace("LTM/", f"{name}/"): v for k, v in e.arrays.items()}
        plain = evaluation().model_copy(update={"measurements": measurements, "ers": None, "extras": extras})
        plain._arrays = arrays
        return plain

    a = evaluation(seed=3, queries=400, level=50)
    save(renamed(a), runs / "first")
    save(renamed(evaluation(shifted(a.arrays, 10))), runs / "second")
    (runs / "pyproject.toml").write_text(f'[tool.dmlbench.gate]\nmax_drop = {{ any = 90, "{name}" = 2 }}\n')
    done = typed("compare", "first", "second", code=1)
    assert f"FAIL: {name} fell by" in done.out and "2 are allowed" in done.out
    (runs / "other.toml").write_text(f'[tool.dmlbench.gate]\nmax_drop = {{ "{name}" = 90, any = 90 }}\n')
    typed("compare", "first", "second", "--config", "other.toml", "--max-drop", "ers=90")
    done = typed("compare", "base", "worse", code=2)  # which have no such part
    assert f"unknown metric {name!r}" in done.err and "pyproject.toml" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_inconclusive_has_its_own_code(typed, runs):
    a = evaluation(seed=3, queries=400, level=50)
    rolled = evaluation({**a.arrays, "LTM/value": np.roll(a.arrays["LTM/value"], 3)})
    save(rolled, runs / "rolled")
    options = ["--max-drop", "LTM=0.01", "--max-drop", "ers=2"]
    typed("compare", "base", "rolled", *options)
    done = typed("compare", "base", "rolled", *options, "--fail-on-inconclusive", code=5)
    assert "LTM: too few queries to tell" in done.out


def test_rows_of_a_csv_file(typed, runs):
    a = evaluation(seed=3, queries=400, level=50)
    add_row(a, runs / "board.csv")
    add_row(evaluation(shifted(a.arrays, 10), model="weak"), runs / "board.csv")
    done = typed("compare", f"{a.model.id}@board.csv", "weak@board.csv", code=1)
    typed("compare", f"board.csv:{a.model.id}", "board.csv:weak", code=1)
    assert "unpaired" in done.out
    typed("compare", "base", "board.csv:weak", code=1)
    done = typed("compare", "base", "board.csv:waek", code=2)
    assert "did you mean 'weak'" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["base", "other"], 3, "dataset_sha256"),
        (["base", "transfer"], 3, "surrogate (no surrogate and another)"),
        (["base", "nowhere"], 2, "no run folder"),
        (["base", "empty"], 4, "not a readable run folder"),
        (["base", "broken"], 4, "differs from the manifest"),
        (["base", "base/evaluation.json"], 2, "a run is a folder"),
        (["base", "missing.csv:m"], 4, "cannot be read"),
        (["base", "twin", "--max-drop", "erz=1"], 2, "did you mean 'ers'"),
        (["base", "twin", "--max-drop", "ers"], 2, "METRIC=POINTS"),
        (["base", "twin", "--config", "none.toml"], 4, "does not exist"),
        (["base", "twin", "--markdown", "base/evaluation.json/x.md"], 4, "cannot be written"),
        (["base"], 2, "CANDIDATE"),
    ],
)
def test_bad_input_is_one_clear_line(typed, runs, arguments, code, says):
    (runs / "empty").mkdir()
    save(evaluation(seed=3), runs / "broken")
    save(evaluation(seed=3, queries=400, level=50, partial=("--surrogate another",)), runs / "transfer")
    (runs / "broken" / "per_query.npz").write_bytes(b"nothing")
    done = typed("compare", *arguments, code=code)
    assert says in done.err and len(done.err.strip().splitlines()) == 1 and done.out == ""

"""``--until``: which queries come first, how sure one is at each look, and a run that stops, resumes and is compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import until_coverage
from hypothesis import given, settings
from hypothesis import strategies as st

import dmlbench
from dmlbench.board import paper
from dmlbench.board.compare import compare
from dmlbench.cli.results import print_evaluation
from dmlbench.compact import npz_bytes
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.protocol import score_intervals
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, load
from dmlbench.run import looks
from dmlbench.run.units import Units, Work

MODEL, OTHER = "digits-smallcnn-triplet-act", "digits-smallcnn-triplet-none"
POINTS = 9.85


@pytest.fixture(scope="module")
def short():
    """The digits protocol with few steps."""
    p = load_protocol("ers-digits")
    return p.model_copy(update={"threat": {**p.threat, "steps": 4, "step": "8/255"}})


@pytest.fixture(scope="module")
def measured(short):
    """A run that stops where it is told to."""

    def call(model: str = MODEL, until: float | None = POINTS, **options) -> Evaluation:
        return evaluate(dmlbench.load_model(model), "digits", short, until=until, device="cpu", **options)

    return call


@pytest.fixture(scope="module")
def stopped(measured) -> Evaluation:
    return measured()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_every_beginning_holds_the_classes_in_proportion(sizes: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = looks.even_order(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        taken = [int((labels[order[:n]] == c).sum()) for c in range(len(sizes))]
        low = max((k - 1) / size for k, size in zip(taken, sizes, strict=True))
        high = min((k + 1) / size for k, size in zip(taken, sizes, strict=True))
        assert low < high  # some way t along every class, with n_c t - 1 < taken < n_c t + 1 of each


def test_no_query_comes_first_because_its_class_is_large() -> None:
    labels = np.repeat([0, 1, 2], [40, 10, 2])
    outcome = np.array([0.0, 50.0, 100.0])[labels]
    found = [outcome[looks.even_order(labels, seed)[:13]].mean() for seed in range(600)]
    assert abs(np.mean(found) - outcome.mean()) < 4 * np.std(found) / np.sqrt(len(found))


@given(count=st.integers(1, 10_000))
def test_looks_double_and_may_miss_five_percent_together(count: int) -> None:
    seen = list(looks.looks(count))
    assert [n for n, _ in seen] == [min(64 * 2**j, count) for j in range(len(seen))] and seen[-1][0] == count
    assert [level for _, level in seen[:3]] == pytest.approx([1 - 0.05 / 2, 1 - 0.05 / 6, 1 - 0.05 / 12][: len(seen)])
    assert sum(1 - level for _, level in seen) < 0.05


def test_classes_that_happen_to_agree_make_nobody_sure() -> None:
    components = [c for c in load_protocol("ers-digits").components if c.name in ("ES:R", "LTM")]
    value = np.where(np.arange(60) // 3 % 2, 100.0, 0.0)  # three classes with the very same outcomes
    arrays = {"label": np.arange(60) % 3, "ES:R/value": value, "LTM/value": value}
    by_class, sure = (
        score_intervals(components, arrays, 0.975).mean,
        looks.sure_intervals(components, arrays, 0.975).mean,
    )
    alone = score_intervals(components, {**arrays, "label": np.arange(60)}, 0.975).mean
    assert by_class[1] - by_class[0] < alone[1] - alone[0] and sure == alone
    spread = {**arrays, "label": np.arange(60) // 3 % 2}  # two classes that share nothing
    assert looks.sure_intervals(components, spread, 0.975).mean == score_intervals(components, spread, 0.975).mean


def test_it_stops_at_the_first_look_that_is_sure(stopped, short) -> None:
    told = stopped.extras["until"]
    assert told["reached"] and 64 <= stopped.dataset.n_queries < 896 == stopped.dataset.n_queries_full
    assert [look["queries"] for look in told["looks"]] == [64 * 2**j for j in range(len(told["looks"]))]
    *before, last = [look["reach"] for look in told["looks"]]
    assert before and all(far > POINTS for far in before) and last <= POINTS
    low, high = stopped.ers_interval
    assert max(stopped.ers - low, high - stopped.ers) == pytest.approx(last)
    assert stopped.partial == (f"--until {POINTS:g}",) and stopped.dataset.n_queries == told["looks"][-1]["queries"]
    sure = looks.sure_intervals(short.components, stopped.arrays, told["looks"][-1]["level"])
    assert stopped.ers_interval == sure.mean == paper.intervals(stopped)["ers"]


def test_each_query_gives_what_it_gives_in_a_whole_run(stopped, measured, short) -> None:
    whole = measured(until=None, attacks=["CA+", "LTM"])
    query = stopped.arrays["query"]
    assert (np.diff(query) > 0).all()
    at = np.searchsorted(whole.arrays["query"], query)
    for name in ("CA+", "LTM"):
        np.testing.assert_array_equal(stopped.arrays[f"{name}/targets"], whole.arrays[f"{name}/targets"][at])
        close = np.isclose(stopped.arrays[f"{name}/value"], whole.arrays[f"{name}/value"][at], atol=0.2)
        assert close.mean() > 0.97  # but for the rounding of batches of other sizes
    np.testing.assert_array_equal(stopped.arrays["benign/recall_at_1"], whole.arrays["benign/recall_at_1"][at])
    rows, dataset = stopped.sample["rows"], dmlbench.load_dataset("digits")
    assert (np.diff(rows) > 0).all() and np.isin(rows, query).all()
    norms = np.abs(stopped.sample["LTM"] - dataset.images[rows].numpy()).max((1, 2, 3))
    np.testing.assert_allclose(norms, stopped.arrays["LTM/norm"][np.searchsorted(query, rows)], atol=1e-6)


class Stop(Exception):
    pass


class StopAfter:
    """A progress that stops the run once so many images were counted."""

    def __init__(self, left: int) -> None:
        self.left = left

    def start(self, task: str, total: int) -> None: ...

    def advance(self, task: str, count: int) -> None:
        self.left -= count * (task != "embed")
        if self.left < 0:
            raise Stop


def test_it_goes_on_where_it_was_stopped(stopped, measured, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        measured(work=Work(Units(tmp_path)), progress=StopAfter(9 * 64 + 100))  # within the second look
    kept = len(list(tmp_path.glob("*.npz")))
    assert kept > 9
    again = measured(work=Work(Units(tmp_path)), resume=True)
    assert npz_bytes(again.arrays) == npz_bytes(stopped.arrays) and npz_bytes(again.sample) == npz_bytes(stopped.sample)
    assert again.ers == stopped.ers and again.extras["until"] == stopped.extras["until"]


def test_two_are_compared_on_the_queries_that_both_measured(stopped, measured, short, monkeypatch) -> None:
    fewer = measured(OTHER, until=100.0)
    assert fewer.dataset.n_queries == 64 < stopped.dataset.n_queries
    components = {c.name: c for c in short.components}
    for base, candidate in ((stopped, fewer), (fewer, stopped)):
        found = compare(base, candidate, components=components)
        assert found.n_queries == 64 and not any(f.kind == "fewer-queries" for f in found.failures)
        common = np.isin(stopped.arrays["query"], fewer.arrays["query"])
        own = components["LTM"].rescale(float(stopped.arrays["LTM/value"][common].mean()))
        said = next(m for m in found.metrics if m.metric == "LTM")
        assert (said.base if base is stopped else said.candidate) == pytest.approx(own)


def test_a_run_without_ers_is_shown_too(stopped, capsys) -> None:
    print_evaluation(stopped.model_copy(update={"ers": None, "ers_interval": None}))  # as where a part has no value
    assert "partial" in capsys.readouterr().out


def test_what_cannot_be_stopped_is_refused(typed, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = typed("evaluate", "--model", MODEL, "--device", "cpu", *words, code=None)
        assert done.code == 2, done.err
        return done.err

    assert "above 0" in refused("--until", "0")
    assert "--limit" in refused("--until", "1", "--limit", "9")
    assert "--attacks" in refused("--until", "1", "--attacks", "CA+")
    assert "--plan" in refused("--until", "1", "--plan")
    assert "--shard" in refused("--until", "1", "--shard", "1/2", "--out", str(tmp_path))
    assert "'clustering' has none" in refused("--until", "1", "--protocol", "clustering")
    with pytest.raises(UsageError, match="two classes"):
        looks.require_stoppable(load_protocol("ers-digits"), "ers", np.zeros(5, dtype=np.int64), 1.0, {})


def test_as_it_is_typed(typed, tmp_path: Path) -> None:
    done = typed(
        "evaluate", "--model", MODEL, "--device", "cpu", "--until", "40", "--out", str(tmp_path / "run"), "--json"
    )
    assert done.code == 0, done.err
    run = load(tmp_path / "run")
    assert run.partial == ("--until 40",) and run.dataset.n_queries == 64
    assert json.loads(done.out)["extras"]["until"]["looks"][0]["queries"] == 64
    again = typed(
        "evaluate", "--model", MODEL, "--device", "cpu", "--until", "40", "--out", str(tmp_path / "run"), "--resume"
    )
    assert "nothing is done again" in again.err
    other = typed(
        "evaluate",
        "--model",
        MODEL,
        "--device",
        "cpu",
        "--until",
        "9",
        "--out",
        str(tmp_path / "run"),
        "--resume",
        code=None,
    )
    assert other.code == 3


def test_intervals_hold_the_whole_runs_ers() -> None:
    """A small turn of ``benchmarks/until_coverage.py``: 40 orders of one committed run."""
    folder = until_coverage.ROOT / "omniglot-small-conv3-triplet-hm-lga-2-ers-28" / "run"
    reads, arrays = until_coverage.outcomes(folder)
    counts, holds = until_coverage.simulated(reads["ers"], arrays, 4.0, 40)
    assert (counts < 2120).mean() > 0.9 and holds.mean() >= 0.93
    large = until_coverage.enlarged(arrays, 6000, 1000)
    assert len(np.unique(large["label"])) == 1000
    assert until_coverage.stopped(reads["ers"], large, 2.0, looks.even_order(large["label"]))[0] < 6000

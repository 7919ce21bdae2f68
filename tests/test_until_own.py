"""``--until`` under protocols that have a run of their own: each look begins anew, and the last is what these queries alone give."""

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import until_coverage
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import shortened

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.board.compare import compare
from dmlbench.board.paper import intervals
from dmlbench.compact import npz_bytes
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.intervals import PERCENT, class_intervals
from dmlbench.kinds.table import KINDS
from dmlbench.protocol import Component, Protocol
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, load
from dmlbench.run import looks
from dmlbench.run.subject import measured_queries
from dmlbench.run.units import Units, Work

MODEL, OTHER = "digits-smallcnn-triplet-act", "digits-smallcnn-triplet-none"
QUERIES = 80
"""What the protocols measure here of 896: a look at 64, and one at all."""
LITTLE, MUCH = 1e-3, 1000.0
"""Points that no look reaches, and that every one does."""
WATCHED = {
    "strict": "worst_case_recall_at_1",
    "certified": "certified_recall_at_1",
    "corruptions": "corruption_recall_at_1",
    "verification": "verification_accuracy_attacked",
    "sides": "sides_recall_at_1",
}


def quick(name: str) -> Protocol:
    """A packaged protocol with little of each search, of few queries."""
    p = load_protocol(name)
    changes: dict[str, object] = {"queries": QUERIES, "clustering_seeds": (0,)}
    if p.grid:
        changes["grid"] = {"8": p.eps_for((1, 8, 8))[-2:]}
    if name == "strict":
        p = shortened(name, steps=2, queries=4, rounds=2)
    elif name == "certified":
        changes["settings"] = {**p.settings, "samples": 150}
    elif name == "corruptions":
        changes["settings"] = {"severities": [3]}
    elif name == "verification":
        changes["steps"] = tuple(s.model_copy(update={"threat": {"steps": 2, "start": "clean"}}) for s in p.steps[:1])
        changes |= {"threshold": None, "settings": {}}
    elif name == "sides":
        changes |= {"threat": {**p.threat, "steps": 2}, "settings": {"candidates": 1}}
    return p.model_copy(update=changes)


def run(name: str, model: str = MODEL, **options) -> Evaluation:
    """In batches so small that units of two looks are of the same positions."""
    return evaluate(dmlbench.load_model(model), "digits", quick(name), device="cpu", batch_size=32, **options)


@cache
def measured(name: str, until: float | None = None, model: str = MODEL) -> Evaluation:
    """The same once for all tests."""
    return run(name, model, until=until)


def components_of(rules: Protocol) -> dict[str, Component]:
    """The parts of a run on digits, by name."""
    return {c.name: c for c in KINDS[rules.kind].components(rules, (1, 8, 8))}


def bytes_of(e: Evaluation) -> tuple[bytes, bytes]:
    return npz_bytes(e.arrays), npz_bytes(e.sample)


def without_times(said: object) -> object:
    """A kind's part of ``extras`` but for how long things took."""
    if isinstance(said, dict):
        return {key: without_times(value) for key, value in said.items() if key != "seconds"}
    return [without_times(value) for value in said] if isinstance(said, list | tuple) else said


def test_which_number_is_watched() -> None:
    assert {name: kind.watched for name, kind in KINDS.items() if kind.watched} == {"ers": "ers", **WATCHED}


@pytest.mark.parametrize("name", WATCHED)
def test_the_last_look_is_what_its_queries_alone_give(name: str, tmp_path: Path) -> None:
    kind = load_protocol(name).kind
    found = run(name, until=LITTLE, work=Work(Units(tmp_path)))
    told = found.extras["until"]
    assert told["number"] == WATCHED[name] and not told["reached"]
    assert [look["queries"] for look in told["looks"]] == [64, QUERIES] and found.partial == ("--until 0.001",)
    whole = measured(name)
    assert bytes_of(found) == bytes_of(whole) and not whole.partial
    assert without_times(found.extras[kind]) == without_times(whole.extras[kind])

    some = measured(name, MUCH)
    wanted = measured_queries(896, QUERIES)
    labels = dmlbench.load_dataset("digits").labels
    positions = wanted[looks.even_order(labels[dmlbench.load_dataset("digits").query[wanted]])[:64]]
    alone = run(name, only=positions.tolist())
    assert some.dataset.n_queries == 64 and some.extras["until"]["reached"]
    assert bytes_of(some) == bytes_of(alone)
    assert some.extras["until"]["looks"] == told["looks"][:1]


@pytest.mark.parametrize("name", WATCHED)
def test_its_intervals_are_those_of_the_last_look(name: str) -> None:
    found = measured(name, MUCH)
    (look,) = found.extras["until"]["looks"]
    row, column = from_evaluation(found), WATCHED[name]
    values = KINDS[load_protocol(name).kind].by_query(found)[column]
    label = found.arrays["label"]
    ends = [
        class_intervals(values[:, None], of, [PERCENT], level=look["level"]).columns[0]
        for of in (label, np.arange(len(label)))
    ]
    low, high = min(a for a, _ in ends), max(b for _, b in ends)
    value = float(np.nanmean(values))
    assert getattr(row, column) == pytest.approx(value, abs=1e-3)
    assert max(value - low, high - value) == pytest.approx(look["reach"])
    if hasattr(row, f"{column}_lo"):
        assert (getattr(row, f"{column}_lo"), getattr(row, f"{column}_hi")) == pytest.approx((low, high), abs=1e-3)
    stated = intervals(found)
    assert all(stated[m.component] == m.interval for m in found.measurements)


@cache
def committed():
    """The outcomes of a strict run, as the simulation reads them."""
    return until_coverage.outcomes(until_coverage.ROOT / "omniglot-small-conv3-triplet-act-2-strict" / "run")


class Stop(Exception):
    pass


class StopAfter:
    """A progress that stops the run once more than so many queries were counted."""

    def __init__(self, most: float = np.inf) -> None:
        self.most, self.done = most, 0

    def start(self, task: str, total: int) -> None: ...

    def advance(self, task: str, count: int) -> None:
        self.done += count * (task != "embed")
        if self.done > self.most:
            raise Stop


@pytest.mark.parametrize("name", ["strict", "certified"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_it_goes_on_where_it_was_stopped(name: str, share: float, tmp_path: Path) -> None:
    """Within the first look, and within the second."""
    undisturbed = run(name, until=LITTLE, progress=(all_of_it := StopAfter()))
    with pytest.raises(Stop):
        run(name, until=LITTLE, work=Work(Units(tmp_path)), progress=StopAfter(share * all_of_it.done))
    assert Units(tmp_path).searched()
    again = run(name, until=LITTLE, work=Work(Units(tmp_path)), resume=True)
    assert bytes_of(again) == bytes_of(undisturbed) and again.extras["until"] == undisturbed.extras["until"]
    kind = load_protocol(name).kind
    assert without_times(again.extras[kind]) == without_times(undisturbed.extras[kind])


def test_two_are_compared_on_the_queries_that_both_measured() -> None:
    first, more = measured("strict", MUCH), measured("strict", LITTLE, OTHER)
    for base, candidate in ((first, more), (more, first)):
        found = compare(base, candidate, components=components_of(quick("strict")))
        assert found.n_queries == 64 and not any(f.kind == "fewer-queries" for f in found.failures)
        said = next(m for m in found.metrics if m.metric == "worst_case_recall_at_1")
        common = np.isin(more.arrays["query"], first.arrays["query"])
        values = KINDS["strict"].by_query(more)["worst_case_recall_at_1"][common]
        assert (said.base if base is more else said.candidate) == pytest.approx(values.mean())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), points=st.sampled_from([4.0, 8.0, 15.0]), eps=st.integers(0, 3))
def test_it_stops_where_a_plain_loop_does(seed: int, points: float, eps: int) -> None:
    reads, arrays = committed()
    name = list(reads)[eps]
    order = looks.even_order(arrays["label"], seed)
    values, labels = arrays[name][order], arrays["label"][order]

    plain, n, j = [], 64, 1
    while True:
        n = min(n, len(order))
        level = 1 - 0.05 / (j * (j + 1))
        pairs = [
            class_intervals(values[:n, None], of, [PERCENT], level=level).columns[0]
            for of in (labels[:n], np.arange(n))
        ]
        low, high = min(a for a, _ in pairs), max(b for _, b in pairs)
        middle = sum(values[:n].tolist()) / n
        plain.append((n, max(middle - low, high - middle)))
        if plain[-1][1] <= points or n == len(order):
            break
        n, j = 2 * n, j + 1

    asked = []

    def look(n: int, level: float):
        asked.append(n)
        return float(values[:n].mean()), looks.sure_mean(values[:n], labels[:n], level)

    told = looks.until_sure(len(order), points, look)
    assert asked == [n for n, _ in plain] == [one["queries"] for one in told["looks"]]
    assert [one["reach"] for one in told["looks"]] == pytest.approx([far for _, far in plain])
    assert told["reached"] == (plain[-1][1] <= points)


def test_intervals_hold_the_whole_runs_number() -> None:
    """A small turn of ``benchmarks/until_coverage.py``: 40 orders of one committed run, at every eps."""
    reads, arrays = committed()
    for read in reads.values():
        counts, holds = until_coverage.simulated(read, arrays, 10.0, 40)
        assert (counts < 2120).mean() > 0.9 and holds.mean() >= 0.93


@pytest.mark.parametrize("name", ["clustering", "universal", "poison", "panum-28"])
def test_numbers_that_are_no_mean_of_single_queries_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"protocol '{name}' has none"):
        evaluate(dmlbench.load_model(MODEL), "digits", name, until=5.0, device="cpu")


def test_a_kind_that_does_not_tell_what_each_query_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mute = replace(KINDS["strict"], by_query=lambda e: {})
    monkeypatch.setitem(KINDS._entries, "strict", mute)
    with pytest.raises(UsageError, match="does not tell what each query adds to worst_case_recall_at_1"):
        run("strict", until=5.0)


def test_numbers_of_the_set_are_not_compared_where_the_sets_differ() -> None:
    p = load_protocol("universal")
    p = p.model_copy(update={"threat": {**p.threat, "steps": 2}, "grid": {"8": ("20/255",)}})
    few, more = (evaluate(dmlbench.load_model(MODEL), "digits", p, limit=n, device="cpu") for n in (16, 24))
    parts = components_of(p)
    found = {m.metric: m for m in compare(few, more, components=parts).metrics}
    assert found["universal_recall_at_1"].base is found["unseen@20/255"].base is None
    assert found["recall_at_1"].base is not None
    same = {m.metric: m for m in compare(few, few, components=parts).metrics}
    assert same["universal_recall_at_1"].difference == 0


def test_as_it_is_typed(typed, tmp_path: Path) -> None:
    out, board = tmp_path / "run", tmp_path / "board.csv"
    words = ("evaluate", "--model", MODEL, "--device", "cpu", "--protocol", "strict-fast", "--until", "40")
    done = typed(*words, "--out", str(out), "--csv", str(board))
    said = load(out)
    assert said.partial == ("--until 40",) and said.dataset.n_queries == 64 and said.extras["until"]["reached"]
    with board.open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["rank"] == "" and row["partial"] == "until 40"
    low, high = float(row["worst_case_recall_at_1_lo"]), float(row["worst_case_recall_at_1_hi"])
    assert f"95 % interval {low:.1f} – {high:.1f}" in done.out and high - low < 80
    again = typed(*words, "--out", str(out), "--resume", "--json")
    assert "nothing is done again" in again.err and json.loads(again.out)["extras"]["until"] == said.extras["until"]
    assert typed(*words, "--shard", "1/2", "--out", str(tmp_path / "shard"), code=None).code == 2

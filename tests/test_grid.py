"""Protocols of kind strict and clustering resume, split and merge to the same bytes, like those of parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dmlbench
from dmlbench import results
from dmlbench.errors import DataError, ShardDone
from dmlbench.evaluate import evaluate
from dmlbench.kinds.hunting import Field
from dmlbench.kinds.strict.search import begin, run, settle
from dmlbench.protocols import load_protocol
from dmlbench.run.parallel import World
from dmlbench.run.subject import Silent, prepare
from dmlbench.run.units import Shard, Units, Work, collect
from dmlbench.task import Options, Task, identity_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = "digits-smallcnn-triplet-hm-lga-ics"
STRICT = """
name = "strict-short"
version = "1"
kind = "strict"
title = "Two searches"

[threat]
norm = "linf"

[grid]
8 = ["10/255", "20/255"]

[[steps]]
name = "W2"
attack = "WM"
optimizer = "apgd"
threat = {steps = 6, start = "random"}

[[steps]]
name = "MT"
attack = "MT"
optimizer = "apgd"
threat = {steps = 4}
aims = 3
"""
CLUSTERING = """
name = "clustering-short"
version = "1"
kind = "clustering"
title = "One eps"
clustering_seeds = [0]
attacks = ["C1", "C2", "U1", "joint", "union"]

[threat]
norm = "linf"
steps = 2

[joint]
temperature = 0.05
steps = 3
restarts = 2
rounds = 3
patience = 1
least = 0.1
look = 2

[grid]
8 = ["40/255"]
"""
PROTOCOLS = {"strict": STRICT, "clustering": CLUSTERING}
LIMIT = {"strict": 40, "clustering": 30}
KINDS = pytest.mark.parametrize("kind", list(PROTOCOLS))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The protocols' files, by kind."""
    folder = tmp_path_factory.mktemp("protocols")
    for kind, text in PROTOCOLS.items():
        (folder / f"{kind}.toml").write_text(text)
    return {kind: folder / f"{kind}.toml" for kind in PROTOCOLS}


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(MODEL)


@pytest.fixture(scope="module")
def measured(model, files):
    """Evaluate under the protocol of a kind; strict in five blocks."""

    def call(kind, **options):
        rules = load_protocol(str(files[kind]))
        return evaluate(model, "digits", rules, limit=LIMIT[kind], batch_size=4, device="cpu", **options)

    return call


@pytest.fixture(scope="module")
def whole(measured):
    """What one undisturbed process gives, by kind."""
    return {kind: measured(kind) for kind in PROTOCOLS}


def untimed(value):
    """A record without times, dates and the command."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("seconds", "stages", "date", "argv")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def same(a, b):
    """The same bytes but for times."""
    assert untimed(a.model_dump(mode="json")) == untimed(b.model_dump(mode="json"))
    assert results.npz_bytes(a.arrays) == results.npz_bytes(b.arrays)
    assert results.npz_bytes(a.sample) == results.npz_bytes(b.sample)


class Stop(Exception):
    """Raised by a test in the middle of a run."""


class StopIn:
    """A progress that stops the run inside the ``left``-th task, embedding apart, once that has begun to count."""

    def __init__(self, left):
        self.left = left

    def start(self, task, total):
        self.left -= task != "embed"

    def advance(self, task, count):
        if self.left == 0:
            raise Stop


@KINDS
def test_a_stopped_run_resumes_to_the_same_bytes_without_doing_work_twice(kind, measured, whole, tmp_path):
    units = Units(tmp_path / "units")
    with pytest.raises(Stop):
        measured(kind, work=Work(units), progress=StopIn(3))
    before = {path: path.stat().st_mtime_ns for path in units.folder.glob("*.npz")}
    assert any(path.name.startswith(("W2_20", "C2")) for path in before)
    same(measured(kind, work=Work(units), resume=True), whole[kind])
    after = {path: path.stat().st_mtime_ns for path in units.folder.glob("*.npz")}
    assert before.items() <= after.items() and len(after) > len(before)


@KINDS
def test_shards_merge_to_the_same_bytes(kind, measured, whole, tmp_path):
    folders = [tmp_path / "1", tmp_path / "2"]
    for i, folder in enumerate(folders):
        with pytest.raises(ShardDone):
            measured(kind, work=Work(Units(folder / "units"), shard=Shard(i + 1, 2)))
    mine = [{p.name for p in (f / "units").glob("*.npz") if p.name[:2] in ("W2", "MT", "C1", "C2")} for f in folders]
    assert mine[0] and mine[1] and not mine[0] & mine[1], "no search is done twice"
    half = Units(tmp_path / "half")
    collect(folders[:1], half)
    with pytest.raises(DataError, match=r"units of .* are missing"):
        measured(kind, work=Work(half, gather=True))
    merged = Units(tmp_path / "merged")
    collect(folders, merged)
    same(measured(kind, work=Work(merged, gather=True)), whole[kind])


def test_shards_may_share_a_folder_and_be_given_again(measured, whole, tmp_path):
    units = Units(tmp_path / "units")
    with pytest.raises(Stop):
        measured("strict", work=Work(units, shard=Shard(1, 2)), progress=StopIn(2))
    for i in (2, 1):
        with pytest.raises(ShardDone):
            measured("strict", work=Work(units, shard=Shard(i, 2)))
    same(measured("strict", work=Work(units, gather=True)), whole["strict"])


def test_every_query_is_attacked_in_one_unit_of_a_step(whole, measured, tmp_path):
    units = Units(tmp_path / "units")
    measured("strict", work=Work(units))
    curve = whole["strict"].extras["strict"]["curve"]
    for row in curve:
        for step in row["steps"]:
            found = [
                results.read_npz(p) for p in units.folder.glob(f"{step['step']}_{row['eps'].replace('/', '_')}*.npz")
            ]
            assert sum(len(unit["broken"]) for unit in found) == step["attacked"]
            assert sum(int(unit["broken"].sum()) for unit in found) == step["broken"]
            assert len(found) == -(-step["attacked"] // 4)  # batches stay full
    assert curve[0]["steps"][0]["attacked"] > curve[1]["steps"][1]["attacked"] > 0


@pytest.mark.parametrize("size", [5])
def test_no_query_depends_on_whom_it_was_attacked_with(size, model, files):
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=40, device="cpu")
    rules, kept = load_protocol(str(files["strict"])), np.array([3, 30])
    one, other = (run(subject, rules, 0, n, Silent(), kept) for n in (16, size))
    for name, values in one.arrays.items():
        if name.endswith(("/broken_by", "/iteration", "/value")):
            np.testing.assert_array_equal(values, other.arrays[name])
        else:
            np.testing.assert_allclose(values, other.arrays[name], atol=1e-3)
    for name, images in one.sample.items():
        np.testing.assert_allclose(images, other.sample[name], atol=1e-3)


def test_what_is_kept_counts_only_for_the_survivors_it_was_made_for(model, files, tmp_path):
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=24, device="cpu")
    rules, nobody = load_protocol(str(files["strict"])), np.zeros(0, dtype=np.int64)
    units = Units(tmp_path / "units")
    units.begin({})

    def attacked(standing, **options):
        field = Field.of(subject, rules, 0, 8, Silent(), Work(units, **options), nobody)
        settle(field, rules, standing, 0, "10/255", {})
        return standing

    standing = attacked(begin(subject), shard=Shard(1, 1))
    again = attacked(begin(subject), gather=True)
    np.testing.assert_array_equal(again.broken_by, standing.broken_by)
    fewer = begin(subject)
    fewer.alive[np.flatnonzero(fewer.alive)[0]] = False
    with pytest.raises(DataError, match=r"1 of 3 units of 'W2@10/255' are missing"):
        attacked(fewer, gather=True)


def test_the_clustering_attacks_are_dealt_out_whole(measured, tmp_path):
    units = Units(tmp_path / "units")
    with pytest.raises(ShardDone):
        measured("clustering", work=Work(units, shard=Shard(2, 3)))
    names = {p.name.partition("_")[0] for p in units.folder.glob("*40*.npz")}
    assert names == {"C1", "joint"}, "positions 1 and 4, after the clean set"


def command(file, out, *options):
    """What a user types, all but the program."""
    name = "strict" if "strict" in file.name else "clustering"
    fixed = ["--limit", str(LIMIT[name]), "--batch-size", "4", "--device", "cpu"]
    return ["evaluate", "--model", MODEL, "--protocol", str(file), *fixed, "--out", str(out), *options]


def test_a_killed_strict_process_resumes_to_the_same_bytes(files, whole, typed, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "dmlbench", *command(files["strict"], out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list((out / "units").glob("W2*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "evaluation.json").exists()
    typed(*command(files["strict"], out, "--resume"))
    same(results.load(out), whole["strict"])
    assert not (out / "units").exists()


@KINDS
def test_torchrun_gives_what_one_process_gives(kind, files, whole, tmp_path):
    out = tmp_path / "team"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dmlbench", *command(files[kind], out), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["protocol"]["name"] == f"{kind}-short", "the first process alone prints"
    same(results.load(out), whole[kind])


def test_two_processes_divide_the_batches(model, files, monkeypatch):
    """Each rank attacks its batches alone; the exchange is played by hand."""
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=40, device="cpu")
    rules = load_protocol(str(files["strict"]))
    seen = []
    monkeypatch.setattr(Work, "_exchange", lambda self, found: seen.append(found) or [])
    for rank in (0, 1):
        work = Work(world=World(rank, 2))
        field = Field.of(subject, rules, 0, 4, Silent(), work, np.zeros(0, dtype=np.int64))
        settle(field, rules, begin(subject), 0, "10/255", {})
    assert [sorted(found) for found in seen] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.fixture
def finished(typed, tmp_path):
    """A finished run folder, its command, and what it printed."""
    words = ["evaluate", "--model", MODEL, "--limit", "24", "--attacks", "CA+", "--out", str(tmp_path / "run")]
    return tmp_path / "run", words, typed(*words)


def test_resume_on_a_finished_run_prints_it_and_does_nothing(finished, typed, monkeypatch):
    out, words, first = finished
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    monkeypatch.setattr(dmlbench, "evaluate", lambda *args, **options: pytest.fail("it was run again"))
    again = typed(*words, "--resume", "--csv", str(out.parent / "rows.csv"))
    assert again.out == first.out and (out.parent / "rows.csv").exists()
    assert again.err.splitlines()[0] == f"{out} holds the finished result of this command: nothing is done again"
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


@pytest.mark.parametrize("change,told_apart", [
    (("--limit", "20"), "partial (--limit 24, --attacks CA+ there, --limit 20, --attacks CA+ here)"),
    (("--attacks", "CA-"), "partial ("),
    (("--attacks", "CA+,CA+@fgsm"), "extra_parts (nothing there, CA+@fgsm here)"),
    (("--seed", "9"), "seed (0 there, 9 here)"),
    (("--eot", "2"), "partial ("),
    (("--protocol", "strict"), "protocol (ers-digits there, strict here)"),
    (("--model", "digits-smallcnn-triplet-none"), "weights ("),
    (("--precision", "bfloat16"), "gradient_precision (float32 there, bfloat16 here)"),
])  # fmt: skip
def test_resume_on_another_finished_run_is_refused(change, told_apart, finished, typed):
    out, words, _ = finished
    before = (out / "evaluation.json").read_bytes()
    refused = typed(*words, "--resume", *change, code=3)
    assert told_apart in refused.err and not refused.out
    assert (out / "evaluation.json").read_bytes() == before


def test_without_resume_a_finished_run_is_replaced(finished, typed):
    out, words, _ = finished
    typed(*[w if w != "24" else "20" for w in words])
    assert results.load(out).partial[0] == "--limit 20"


@pytest.mark.parametrize("options", [
    {}, {"limit": 20}, {"limit": 10**6}, {"seed": 0}, {"seed": 3}, {"eot": 2}, {"attacks": ["all", "CA+@fgsm"]},
    {"attacks": ["CA+"], "limit": 20}, {"surrogate": "digits-smallcnn-triplet-none"},
])  # fmt: skip
def test_what_is_asked_for_is_what_the_finished_record_tells(options, model):
    rules = load_protocol("ers-digits")
    own = tuple(c for c in rules.components if c.name in ("CA+", "QA-"))
    rules = rules.model_copy(
        update={"threat": {**rules.threat, "steps": 1}, "components": own, "clustering_seeds": (0,)}
    )
    data = dmlbench.load_dataset("digits")
    done = evaluate(model, data, rules, device="cpu", **options)
    assert Task.of(model, data, rules, Options(device="cpu", **options)).identity == identity_of(done)


def test_a_finished_run_of_other_weights_differs(model):
    data, rules = dmlbench.load_dataset("digits"), load_protocol("ers-digits")
    other = dmlbench.load_model("digits-smallcnn-triplet-none")
    a, b = (Task.of(m, data, rules, Options()).identity for m in (model, other))
    assert {key for key in a if a[key] != b[key]} == {"model", "weights"}

"""Runs of every kind, killed before each change of the disk, and run out of disk there: all of them are resumed.

A kill before the n-th change leaves the disk as it is at that moment, so one undisturbed run is photographed before each
of its changes, and each photograph is a killed run: nothing of Python gets to clean up, as with SIGKILL. A file that is
being written is photographed half written too.
"""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import dmlbench
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.protocols import FOLDER
from dmlbench.results import SAMPLE

MODEL = "digits-smallcnn-triplet-none"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
"""Audit events, beside an open for writing, of what changes a disk; Python raises them whichever function is called."""
watching: list[Callable[[str, str], None]] = []


def _heard(event: str, args: tuple[object, ...]) -> None:
    if watching and (event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):  # type: ignore[operator]
        watching[-1](event, os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else "")


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(_heard)  # it stays, and hears nothing while nobody watches


@contextmanager
def before_each_change(below: Path, told: Callable[[int, str, str], None]) -> Iterator[None]:
    """While the block runs, ``told`` is called before the n-th change below a folder, n from 0; fsync is one too, of
    what was opened last."""
    count, opened = 0, ""

    def change(event: str, path: str) -> None:
        nonlocal count, opened
        opened = path if event == "open" else opened
        if path.startswith(str(below)):
            watching.append(lambda event, path: None)
            try:
                told(count, event, path)
            finally:
                watching.pop()
                count += 1

    real = os.fsync
    watching.append(change)
    os.fsync = lambda place: change("fsync", opened)  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real
        watching.pop()


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """The commands load the model once, and their data set is a small part of the digits."""
    from dmlbench.cli import evaluate, merge

    embedder, digits = dmlbench.load_model(MODEL), dmlbench.load_dataset("digits")
    rows = np.concatenate([np.flatnonzero(digits.labels == c)[:6] for c in np.unique(digits.labels)])
    few = TensorImages(digits.images[rows])
    images = RetrievalDataset("digits-few", "test", few, digits.labels[rows], licence="CC-BY-4.0")
    for doubts in ("glance", "examine"):  # they take long, and change nothing on disk
        monkeypatch.setattr(import_module("dmlbench.evaluate"), doubts, lambda *args: [])
    for module in (evaluate, merge):
        monkeypatch.setattr(module, "load_subject", lambda *args, **options: (embedder, images))


def photographs(place: Path, into: Path, dead: int, work: Callable[[], object], of: str = "") -> list[Path]:
    """Copies of ``place`` as it was before each of the changes that ``work`` makes there, all different, by a process now
    dead; only changes of paths that begin with ``of`` below ``place``."""
    taken: dict[str, Path] = {}

    def take(n: int, event: str, path: str) -> None:
        target = into / str(n)
        shutil.copytree(place, target)
        for part in sorted(target.rglob("*.part")):
            if event == "fsync":
                os.truncate(part, part.stat().st_size // 2)
            os.utime(part, (0, 0))
            part.rename(part.with_name(part.name.replace(f".{os.getpid()}.", f".{dead}.")))
        everything = sorted(target.rglob("*"))
        state = repr([(str(p.relative_to(target)), p.is_file() and p.read_bytes()) for p in everything])
        taken.setdefault(state, target)

    with before_each_change(place / of, take):
        work()
    return list(taken.values())


FILES = ("evaluation.json", "manifest.json", "per_query.npz", SAMPLE)
TIMES = {"date", "seconds", "stages", "argv"}


def timeless(value: object) -> object:
    """A record without times, dates and the command."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(place: Path) -> dict[str, object]:
    """What a finished workplace holds: every file, but for times."""
    found: dict[str, object] = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        name = str(path.relative_to(place))
        if path.name == "evaluation.json":
            found[name] = timeless(json.loads(path.read_bytes()))
        elif path.suffix == ".csv":
            rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
            found[name] = [{key: cell for key, cell in row.items() if key not in TIMES} for row in rows]
        elif path.name == "manifest.json":
            found[name] = sorted(json.loads(path.read_bytes())["files"])
        elif path.suffix == ".npz":
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


SHORT = {
    "steps = 50": "steps = 2", "steps = 100": "steps = 3", "steps = 32": "steps = 2", "restarts = 8": "restarts = 1",
    "parts = 8": "parts = 2", "octaves = 4": "octaves = 1", '"C1", "C2", "C3", "U1", "U2", "U3"': '"C1"',
    "rounds = 20": "rounds = 2", '8 = ["5/255", "10/255", "20/255", ': "8 = [", '8 = ["10/255", ': "8 = [",
}  # fmt: skip


def short(place: Path, protocol: str) -> Path:
    """A protocol with fewer steps, a grid of one eps, and of its parts the first and the last."""
    text = (FOLDER / f"{protocol}.toml").read_text(encoding="utf-8")
    for long, less in SHORT.items():
        text = text.replace(long, less)
    head, *parts = text.split("[[components]]")
    path = place / f"{protocol}.toml"
    path.write_text("[[components]]".join([head, *parts[:1], *parts[-1:]]), encoding="utf-8")
    return path


RUNS = {
    "limit": ("ers-digits", "--limit", "8", "--batch-size", "4"),
    "attacks": ("ers-digits", "--attacks", "CA+", "--seed", "7"),
    "full": ("ers-digits",),
    "until": ("ers-digits", "--until", "5"),
    "strict": ("strict-fast", "--limit", "8"),
    "clustering": ("clustering", "--limit", "12"),
    "parts": ("panum-28", "--limit", "8"),
}


@pytest.fixture
def evaluate(quick, typed, tmp_path):
    """``evaluate`` as one of :data:`RUNS` into a place, which gets a run folder and a board."""

    def go(case: str, place: Path, *more: str, code: int = 0):
        protocol, *options = RUNS[case]
        model = ("evaluate", "--model", MODEL, "--protocol", str(short(tmp_path, protocol)))
        out = ("--out", str(place / "run"), "--csv", str(place / "board.csv"))
        return typed(*model, *options, *out, *more, code=code)

    return go


@pytest.mark.parametrize("case", RUNS)
def test_a_run_killed_before_any_change_of_the_disk_is_resumed_to_the_same_bits(case, evaluate, tmp_path, dead):
    place = tmp_path / "undisturbed"
    place.mkdir()
    killed = photographs(place, tmp_path / "killed", dead, lambda: evaluate(case, place))
    wanted = content(place)
    assert wanted.keys() == {"board.csv", *(f"run/{name}" for name in FILES)} and len(killed) > 25
    for photograph in killed:
        evaluate(case, photograph, "--resume")
        assert content(photograph) == wanted, photograph


def test_a_run_whose_disk_is_full_from_any_moment_on_says_so_and_is_resumed(evaluate, tmp_path):
    place = tmp_path / "undisturbed"
    evaluate("attacks", place)
    wanted, n, full = content(place), 0, True
    while full:
        place, full = tmp_path / str(n), False

        def refuse(count: int, event: str, path: str, n: int = n) -> None:
            nonlocal full
            if count >= n and event in ("open", "os.mkdir", "fsync"):
                full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        with before_each_change(place, refuse):
            done = evaluate("attacks", place, code=None)
        if full:
            assert done.code == 4 and done.err.count("Error: ") == 1, done.err
            assert str(place) in done.err and "No space left" in done.err.splitlines()[-1]
            evaluate("attacks", place, "--resume")
        assert content(place) == wanted, n
        n += 1
    assert n > 20


def test_ctrl_c_while_the_result_is_written_says_how_to_go_on(evaluate, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_module("dmlbench.cli.evaluate"), "save", interrupt)
        assert "interrupted; go on with: dmlbench" in evaluate("attacks", tmp_path, code=130).err
    evaluate("attacks", tmp_path, "--resume")
    assert (tmp_path / "run" / "evaluation.json").exists() and not (tmp_path / "run" / "units").exists()


def test_ctrl_c_while_data_are_loaded_says_how_to_go_on(evaluate, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_module("dmlbench.cli.evaluate"), "load_subject", interrupt)
        said = evaluate("attacks", tmp_path, code=130).err
    assert "interrupted; go on with: dmlbench" in said and said.count("--resume") == 1
    evaluate("attacks", tmp_path, "--resume")
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_merge_killed_before_any_change_of_the_disk_is_done_again(evaluate, typed, tmp_path, dead):
    shards, place = [tmp_path / name / "run" for name in ("a", "b")], tmp_path / "merged"
    for i, shard in enumerate(shards, start=1):
        evaluate("limit", shard.parent, "--shard", f"{i}/2")
    place.mkdir()

    def merge(place: Path) -> None:
        rules = ("--protocol", str(short(tmp_path, "ers-digits")))
        typed("merge", *shards, "--model", MODEL, *rules, "--out", place / "run", "--csv", place / "board.csv")

    killed = photographs(place, tmp_path / "killed", dead, lambda: merge(place))
    wanted = content(place)
    for photograph in killed:
        merge(photograph)
        assert content(photograph) == wanted, photograph
    evaluate("limit", tmp_path / "one")
    assert content(tmp_path / "one") == wanted


def test_several_protocols_killed_while_their_page_is_written_are_resumed(quick, typed, tmp_path, dead):
    place, rules = tmp_path / "undisturbed", ",".join(str(short(tmp_path, name)) for name in ("ers-digits", "panum-28"))

    def go(place: Path, *more: str) -> None:
        typed("evaluate", "--model", MODEL, "--protocol", rules, "--limit", "8", "--out", place / "run", *more)

    killed = photographs(place, tmp_path / "killed", dead, lambda: go(place), of="run/.report")
    wanted = content(place)
    assert "run/report.html" in wanted and len(killed) == 3
    for photograph in killed:
        go(photograph, "--resume")
        assert content(photograph) == wanted

"""What surrounds a run: the encoding of its output, folders that cannot be written, another run in the same place."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trees import cub_tree

from dmlbench.cli import legible, main
from dmlbench.datasets.base import data_roots
from dmlbench.datasets.cache import cache_folder
from dmlbench.datasets.prepare import prepare
from dmlbench.errors import DataError, UsageError
from dmlbench.results import held


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "↑ ▼ – é ŝ 漢"), ("cp1252", "^ v – é s? ?"), ("ascii", "^ v - e? s? ?")]
)
def test_what_an_encoding_lacks_ends_no_command(encoding: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    legible()
    print("↑ ▼ – é ŝ 漢", end="", flush=True)
    assert stream.buffer.getvalue().decode(encoding) == written  # type: ignore[attr-defined]


def test_an_evaluation_written_in_another_encoding(run) -> None:  # type: ignore[no-untyped-def]
    command = ("evaluate", "--model", "digits-smallcnn-triplet-hm-lga-ics", "--limit", "4", "--attacks", "CA+")
    done = run(*command, env={"PYTHONIOENCODING": "ascii"})
    assert "CA+" in done.out and done.out.isascii()


@pytest.mark.parametrize("more", [(), ("--plan",)])
def test_no_number_is_cut_in_a_narrow_log(more: tuple[str, ...], run) -> None:  # type: ignore[no-untyped-def]
    command = ("evaluate", "--model", "digits-smallcnn-triplet-hm-lga-ics", "--limit", "4", "--attacks", "CA+")
    assert "…" not in run(*command, *more, env={"COLUMNS": "30"}).out


@pytest.mark.parametrize("closed", [("stdout",), ("stdout", "stderr")])
def test_closed_outputs_change_no_exit_code(closed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in closed:
        monkeypatch.setattr(sys, name, None)  # what Python makes of a closed one
    for words, code in ((["protocols", "list"], 0), (["protocols", "show", "nothing"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
    for name in closed:
        getattr(sys, name).close()


@pytest.mark.parametrize("words", ["models list", "protocols show strict --json", "leaderboard show"])
def test_a_reader_that_leaves_is_no_gate_that_failed(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "dmlbench", *words.split()], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode in (141, -signal.SIGPIPE) and not done.stderr


def test_a_data_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = cub_tree(tmp_path / "mine", {1: 1, 101: 1})
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DMLBENCH_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(DataError, match=r"cannot be (used|linked)"):
        prepare("cub", tree)


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("DMLBENCH_DATA", "DMLBENCH_CACHE"):
        monkeypatch.setenv(variable, "~/x")
    assert data_roots() == [tmp_path / "x"] and cache_folder() == tmp_path / "x"
    monkeypatch.delenv("DMLBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/y")
    assert cache_folder() == tmp_path / "y" / "dmlbench"


def test_two_runs_do_not_share_a_folder(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    with held(tmp_path):
        with pytest.raises(UsageError, match="another run is writing"), held(tmp_path):
            pass
        command = ("evaluate", "--model", "digits-smallcnn-triplet-hm-lga-ics", "--limit", "4", "--attacks", "CA+")
        assert "another run is writing" in run(*command, "--out", str(tmp_path), code=2).err
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())

"""Files: whole or not at all, one writer at a time, TOML that cannot be read, the first line of an error."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
from synthetic import evaluation

from dmlbench import files, user_code
from dmlbench.board import add_row, from_csv
from dmlbench.errors import DataError, UsageError
from dmlbench.files import atomic_file, described, first_line, lock, read_toml, write_atomic
from dmlbench.results import held


@pytest.mark.parametrize("step", ["write_bytes", "open", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_stays_as_it_was(step, error, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, b"first")
    real = getattr(Path, step)

    def fails(self, *args, **options):
        if step == "write_bytes":
            real(self, b"half")
        raise error

    monkeypatch.setattr(Path, step, fails)
    with pytest.raises(DataError if isinstance(error, OSError) else KeyboardInterrupt, match=r"a\.txt cannot be|^$"):
        write_atomic(path, b"second")
    monkeypatch.undo()
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_what_a_block_writes_appears_once_it_is_on_disk(tmp_path, monkeypatch):
    path, flushed, real = tmp_path / "a", [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda place: (flushed.append(path.exists()), real(place)))
    with atomic_file(path) as part:
        part.write_bytes(b"all")
        assert part.parent == tmp_path and not path.exists()
    assert path.read_bytes() == b"all" and flushed == [False]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_keeps_others_out_and_leaves_nothing(kind, tmp_path):
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    order: list[str] = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with lock(path) as alone:
            order.append(f"second {alone}")

    thread = threading.Thread(target=second)
    with lock(path) as alone:
        with pytest.raises(UsageError, match="busy"), lock(path, UsageError("busy")):
            pass
        thread.start()
        begun.wait()
        order.append(f"first {alone}")
    thread.join()
    assert order == ["first True", "second True"]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".lock")]


HOLD = """
import sys
from pathlib import Path
from dmlbench.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_the_holder_is_killed(tmp_path):
    path = tmp_path / "board.csv"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes) as holder:
        assert holder.stdout.readline() == b"held" + os.linesep.encode()
        with pytest.raises(UsageError, match="busy"), lock(path, UsageError("busy")):
            pass
        holder.kill()
        holder.wait()
    with lock(path, UsageError("busy")) as alone:
        assert alone
    assert not list(tmp_path.iterdir())


COUNT = """
import sys
from pathlib import Path
from dmlbench.files import lock, write_atomic
path = Path(sys.argv[1])
for _ in range(40):
    with lock(path):
        write_atomic(path, str(int(path.read_bytes()) + 1).encode())
"""


def test_no_count_is_lost_between_processes(tmp_path):
    path = tmp_path / "count"
    path.write_bytes(b"0")
    writers = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert path.read_bytes() == b"120" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, "no locks"), OSError(errno.ENOLCK, "none"), NotImplementedError()])  # fmt: skip
def test_where_there_are_no_locks_nobody_is_kept_out(error, tmp_path, monkeypatch):
    def fails(self, *args, **options):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    with lock(tmp_path) as alone, lock(tmp_path, UsageError("busy")):
        assert not alone


def test_a_lock_in_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError), lock(tmp_path / "file" / "board.csv"):
        pass


def test_a_board_may_lie_in_the_folder_of_the_run_that_adds_to_it(tmp_path):
    with held(tmp_path):
        add_row(evaluation(), tmp_path / "board.csv")
    assert len(from_csv(tmp_path / "board.csv")) == 1 and list(tmp_path.iterdir()) == [tmp_path / "board.csv"]


@pytest.mark.parametrize("content", [None, b"a = \xff", b"a = ", b"a = " + b"[" * 100_000])
@pytest.mark.parametrize("kind", [DataError, UsageError])
def test_toml_that_cannot_be_read_is_one_line(content, kind, tmp_path):
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=r"x\.toml cannot be read: ") as stop:
        read_toml(path, kind)
    assert "\n" not in str(stop.value)


def test_toml_is_read_as_utf_8(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):  # the second as editors of Windows begin a file
        (tmp_path / "x.toml").write_bytes(mark + '[a]\nb = "ŝ"\n'.encode())
        assert read_toml(tmp_path / "x.toml") == {"a": {"b": "ŝ"}}


@pytest.mark.parametrize(
    "said,otherwise,line",
    [
        (ValueError("one\ntwo"), "", "one"),
        (ValueError("\n \n one \ntwo"), "nothing", "one "),
        (ValueError(""), "", "ValueError"),
        (KeyError(), "no reason", "no reason"),
        ("text\nmore", "", "text"),
        (" \n", "nothing", "nothing"),
    ],
)
def test_the_first_line_of_what_is_said(said, otherwise, line):
    assert first_line(said, otherwise) == line


def test_an_error_is_described_by_its_kind_and_its_first_line():
    errors = (ValueError("one\ntwo"), KeyError("a"), AssertionError(), SyntaxError("invalid", ("f.py", 1, 1, "x")))
    assert [*map(described, errors)] == ["ValueError: one", "KeyError: 'a'", "AssertionError", "SyntaxError: invalid"]


def test_an_error_of_the_project_in_a_users_code_is_its_sentence_in_one_line():
    assert user_code.first_line(UsageError("no such layer\nTraceback ...")) == "no such layer"
    assert user_code.first_line(KeyError("layer")) == "KeyError: 'layer'"

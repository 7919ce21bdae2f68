"""What ends a command from outside: signals, a full disk, permissions; and what its writers leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmlbench import results
from dmlbench.files import prepare_folder


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "units").mkdir()
    left = [tmp_path / f".a.json.{dead.pid}.part", tmp_path / "units" / f".u.npz.{dead.pid}.part"]
    kept = [tmp_path / f".b.json.{os.getpid()}.part", tmp_path / "a.part", tmp_path / ".c.part"]
    fresh = tmp_path / f".d.json.{dead.pid}.part"
    for path in (*left, *kept, fresh):
        path.write_bytes(b"")
    for path in (*left, *kept):
        os.utime(path, (0, 0))
    prepare_folder(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in (*kept, fresh))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_no_defect(tmp_path):
    root = Path(results.__file__).parent.parent
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dmlbench", "attacks", "list"],
            cwd=root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (
        done.returncode == 4
        and done.stderr.startswith("Error: standard output or a file: ")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("error,said", [
    (PermissionError(13, "Permission denied", "/there"), "Error: /there: Permission denied"),
    (MemoryError(), "Error: memory does not suffice"),
])  # fmt: skip
def test_surroundings_are_told_with_the_path(error, said, monkeypatch, capsys):
    from dmlbench import cli

    monkeypatch.setattr(cli.cli, "main", lambda **_: (_ for _ in ()).throw(error))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 4 and capsys.readouterr().err.startswith(said)
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_ctrl_c(monkeypatch, capsys):
    from dmlbench import cli

    monkeypatch.setattr(cli.cli, "main", lambda **_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err

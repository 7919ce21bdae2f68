"""Kills at every file operation of a run's final write, and what the surroundings do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import evaluation

from dmlbench import results
from dmlbench.results import load, prepare_folder, refuse_partial, save


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


def test_a_partial_result_can_be_written_again_after_a_kill_at_any_file_operation(tmp_path, monkeypatch):
    e = evaluation(partial=("--limit 8",))
    wanted = {p.name: p.read_bytes() for p in save(e, tmp_path / "whole").iterdir()}
    names = ("mkdir", "write_bytes", "unlink", "open", "replace")
    real = {name: getattr(Path, name) for name in names}
    at = 0
    while True:
        left = [at]

        def faulty(name, left=left):
            def call(self, *args, **options):
                if tmp_path in self.parents and left[0] == 0:
                    raise Killed
                left[0] -= tmp_path in self.parents
                return real[name](self, *args, **options)

            return call

        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(Path, name, faulty(name))
            try:
                save(e, folder)
                done = True
            except Killed:
                done = False
        refuse_partial(folder, e.partial)
        save(e, folder)
        assert load(folder) == e
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in wanted} == wanted
        if done:
            break
        at += 1
    assert at >= 10


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


def test_a_run_killed_before_its_manifest_or_while_its_units_go_is_resumed(typed, tmp_path, monkeypatch):
    model = "digits-smallcnn-triplet-none"
    words = ["evaluate", "--model", model, "--limit", "8", "--attacks", "CA+", "--out", str(tmp_path / "run")]
    real = {"replace": Path.replace, "unlink": Path.unlink}
    for name, of in (("replace", "manifest.json"), ("unlink", "configuration.json")):

        def killed(self, *args, name=name, of=of, **options):
            if of in (self.name, *(Path(a).name for a in args)) and (name == "replace" or self.parent.name == "units"):
                raise KeyboardInterrupt
            return real[name](self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, killed)
            typed(*words, *(["--resume"] if name == "unlink" else []), code=130)
        assert (tmp_path / "run" / "units").exists()
    first = load(tmp_path / "run")
    typed(*words, "--resume")
    again = load(tmp_path / "run")
    assert again.partial == first.partial and again.measurements[0].value == first.measurements[0].value
    assert not (tmp_path / "run" / "units").exists()

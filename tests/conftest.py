"""Fixtures that several test files share."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dmlbench
from dmlbench.user_code import RUN

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # pytest runs as many workers as there are cores


def shared(*parts: str) -> Path:
    """A file under the shared data folder, or skip with the reason."""
    named = os.environ.get("DMLBENCH_DATA")
    base = Path(named) if named else ROOT / ".." / "shared" / "data"
    path = base.joinpath(*parts).resolve()
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} under {base} (DMLBENCH_DATA)")
    return path


def reference(*parts: str) -> Path:
    """A file of the reference folder beside the shared data, or skip with the reason."""
    path = (shared() / ".." / "reference").joinpath(*parts).resolve()
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in the reference folder beside the data")
    return path


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared data folder, with DMLBENCH_DATA pointing at it."""
    path = shared()
    monkeypatch.setenv("DMLBENCH_DATA", str(path))
    return path


class Ran:
    """What a command printed and its exit code."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def no_code_of_a_users_own() -> Iterator[None]:
    """What one test ran is not blamed in the next."""
    yield
    RUN.clear()


@pytest.fixture
def run(tmp_path: Path):
    """Run ``dmlbench`` as a user types it, in a process of its own, in an empty folder."""

    def call(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None, code: int | None = 0) -> Ran:
        environment = {**os.environ, "COLUMNS": "120", "PYTHONWARNINGS": "default", **(env or {})}
        if Path(dmlbench.__file__).is_relative_to(ROOT):  # the checkout itself is under test, not an installed package
            environment["PYTHONPATH"] = str(ROOT)
        environment.setdefault("DMLBENCH_DATA", str((ROOT / ".." / "shared" / "data").resolve()))
        done = Ran(
            subprocess.run(
                [sys.executable, "-m", "dmlbench", *map(str, args)],
                cwd=cwd or tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
        )
        if code is not None:
            assert done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
        if done.code:
            assert "Traceback" not in done.err, done.err
        return done

    return call


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """As ``run``, but in this process: much faster, for the many small cases of one verb."""
    from dmlbench.cli import main

    monkeypatch.setenv("COLUMNS", "120")

    def call(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None, code: int | None = 0) -> Ran:
        monkeypatch.chdir(cwd or tmp_path)
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        done = Ran(subprocess.CompletedProcess(args, int(stop.value.code or 0), out, err))
        if code is not None:
            assert done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
        return done

    return call


@pytest.fixture
def brief_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--plan`` looks at each search as briefly as it can: for tests of what it lists, not of how sure its times are."""
    from dmlbench import plan

    monkeypatch.setattr(plan, "LOOK", 0.0)
    monkeypatch.setattr(plan, "LOOKED", 0.0)

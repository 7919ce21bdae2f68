"""Two gloo processes under torchrun give what one process gives, and only the first one writes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmlbench import results

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--model", "digits-smallcnn-triplet-hm-lga", "--limit", "48", "--device", "cpu", "--batch-size", "16"]


def evaluated(out, *launcher):
    """A run folder made by a process, or by several."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dmlbench", "evaluate", *OPTIONS, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done, results.load(out)


@pytest.mark.parametrize("processes", [2])
def test_torchrun_gives_what_one_process_gives(processes, tmp_path):
    _, alone = evaluated(tmp_path / "alone")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done, team = evaluated(tmp_path / "team", *launcher)
    assert done.stdout.count("ERS") == 1, "the first process alone prints"
    assert not (tmp_path / "team" / "units").exists()
    assert alone.arrays.keys() == team.arrays.keys() and alone.sample.keys() == team.sample.keys()
    for name, values in alone.arrays.items():
        if name.endswith("/targets") or name in ("query", "label"):
            np.testing.assert_array_equal(values, team.arrays[name])
    for name, value in alone.benign.items():
        assert abs(value - team.benign[name]) <= 0.2, name
    for mine, theirs in zip(alone.measurements, team.measurements, strict=True):
        assert abs(mine.value - theirs.value) <= 0.2 and mine.n == theirs.n, mine.component
        assert abs(mine.score - theirs.score) <= 0.4, mine.component
    assert abs(alone.ers - team.ers) <= 0.2

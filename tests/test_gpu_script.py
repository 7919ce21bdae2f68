"""``benchmarks/gpu.py`` as it is typed, at tiny sizes on the CPU: every part, a part that fails, a part whose time is over."""

import json
import subprocess
import sys
import time
from pathlib import Path

import attack_cost
import gpu
import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = '''
class AdvRank:
    """The public code's interface, and nothing in it."""

    def __init__(self, model, *, eps, alpha, pgditer, attack_type, M, W, pm, device, metric):
        assert attack_type in ("ES", "QA") and (pm is None) == (attack_type == "ES") and metric == "N"
        self.model, self.pgditer = model, pgditer

    def attack(self, images, labels, candi):
        embeddings, entries = candi
        assert len(images) == len(labels) and len(embeddings) == len(entries)
        for _ in range(self.pgditer):
            assert self.model.forward(images).shape[1] == embeddings.shape[1]
'''


def checkout(folder: Path, text: str) -> Path:
    (folder / "robrank" / "attacks").mkdir(parents=True)
    for package in ("robrank", "robrank/attacks"):
        (folder / package / "__init__.py").write_text("")
    (folder / "robrank" / "attacks" / "advrank.py").write_text(text)
    return folder


def ran(out: Path, *words: str) -> tuple[int, dict, str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--tiny", "--device", "cpu"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (out / "gpu.json").exists(), done.stderr
    return done.returncode, json.loads((out / "gpu.json").read_text())["parts"], (out / "gpu.md").read_text()


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes(tmp_path: Path) -> None:
    code, parts, page = ran(tmp_path / "out", "--minutes", "3", "--public", str(checkout(tmp_path / "code", STUB)))
    assert code == 0 and list(parts) == list(gpu.PARTS) and {part["ended"] for part in parts.values()} == {"done"}
    rows = {name: part["rows"] for name, part in parts.items()}
    assert rows["tests"][0]["exit_code"] == 0
    assert {"as it is", "channels_last"} < set(rows["steps"][0]["ways"]) and rows["steps"][0]["ratio"] > 0
    assert "--precision tf32" in rows["steps"][-1]["failed"]  # no CPU has it, and the rest went on
    searched = [row for row in rows["whole"] if "expected" in row]
    assert len(searched) == 9 and rows["whole"][-1]["measured"] == "9 of 9"
    clean = [row["seconds"] for row in rows["whole"] if row["part"] in ("embedding", "clean metrics")]
    assert rows["whole"][-1]["seconds"] == pytest.approx(sum(clean) + sum(row["seconds"] for row in searched))
    assert [row["queries"] for row in rows["strict"]] == [2, 4]
    assert [row["attack"] for row in rows["public"]] == ["ES", "QA+"] and rows["public"][0]["times"] > 0
    assert "convolution" in rows["profile"][0]["table"] and all(f"## {name}" in page for name in parts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]


def test_a_part_that_fails_ends_alone(tmp_path: Path) -> None:
    broken = checkout(tmp_path / "code", "raise RuntimeError('made for another torch')")
    code, parts, page = ran(tmp_path / "out", "--parts", "public,machine", "--public", str(broken))
    assert code == 1 and parts["public"]["ended"] == "failed, exit code 1" and parts["machine"]["ended"] == "done"
    assert parts["public"]["rows"] == [{"failed": "RuntimeError: made for another torch"}]
    assert "made for another torch" in page and "| cpu |" in page


def test_a_part_that_hangs_is_stopped_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "rows.jsonl"
    log.touch()

    def hangs(run: gpu.Run) -> None:
        run.note(found=1)
        time.sleep(60)

    monkeypatch.setattr(gpu, "GRACE", 0.0)
    began = time.monotonic()
    ended = gpu.alone(hangs, gpu.Run(gpu.TINY, "cpu", began, log, None))
    assert ended.startswith("stopped") and time.monotonic() - began < 30
    assert json.loads(log.read_text()) == {"found": 1}


def test_the_sizes_name_what_there_is() -> None:
    for sizes in (gpu.WHOLE, gpu.TINY):
        assert set(sizes.nets) <= set(attack_cost.NETS) and sizes.net in sizes.nets
        assert all((ROOT / path).exists() for path in sizes.tests)

"""Around the search: where a run's seconds went, and several protocols of one command that embed once."""

import json
from pathlib import Path

import pytest

import dmlbench
from dmlbench.compact import npz_bytes
from dmlbench.evaluate import evaluate
from dmlbench.results import load
from dmlbench.run import subject
from dmlbench.run.units import Units, Work

MODEL = "digits-smallcnn-triplet-none"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were embedded, call by call."""
    seen: list[int] = []
    embed = subject.embed

    def counted(embedder, dataset, rows, progress=None):
        seen.append(len(rows))
        return embed(embedder, dataset, rows, progress)

    monkeypatch.setattr(subject, "embed", counted)
    return seen


def test_seconds_add_up() -> None:
    e = evaluate(dmlbench.load_model(MODEL), "digits", limit=24, device="cpu")
    assert list(e.stages) == ["loading", "embedding", "clean metrics", "attacks", "checks"]
    assert e.seconds == pytest.approx(sum(e.stages.values())) and min(e.stages.values()) >= 0
    parts = sum(m.seconds for m in e.measurements)
    assert 0 < parts <= e.stages["attacks"] and parts > 0.5 * e.stages["attacks"]


def test_what_was_finished_before_is_a_stage_of_its_own(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Second:
        def start(self, task: str, total: int) -> None:
            if task == "LTM":
                raise Stop

        def advance(self, task: str, count: int) -> None: ...

    options = {"attacks": ["GTM", "LTM"], "limit": 24, "device": "cpu"}
    with pytest.raises(Stop):
        evaluate(dmlbench.load_model(MODEL), "digits", **options, work=Work(Units(tmp_path)), progress=Second())
    before = Units(tmp_path).spent()
    e = evaluate(dmlbench.load_model(MODEL), "digits", **options, work=Work(Units(tmp_path)), resume=True)
    assert e.stages["before"] == before > 0 and e.seconds == pytest.approx(sum(e.stages.values()))


def test_several_protocols_embed_once_and_share_a_report(typed, tmp_path: Path, embedded: list[int]) -> None:
    words = ["evaluate", "--model", MODEL, "--device", "cpu", "--limit", "8"]
    done = typed(*words, "--protocol", "ers-digits,strict-fast", "--out", "both")
    assert embedded == [896] and (tmp_path / "both" / "report.html").read_text().count("strict-fast")
    assert done.out.index("protocol ers-digits") < done.out.index("protocol strict-fast")
    for name in ("ers-digits", "strict-fast"):
        typed(*words, "--protocol", name, "--out", f"alone-{name}")
        a, b = (load(tmp_path / folder) for folder in (f"both/{name}", f"alone-{name}"))
        assert npz_bytes(a.arrays) == npz_bytes(b.arrays) and a.benign == b.benign and a.ers == b.ers
    assert embedded == [896] * 3
    again = typed(*words, "--protocol", "ers-digits,strict-fast", "--out", "both", "--resume", "--json")
    assert [e["protocol"]["name"] for e in json.loads(again.out)] == ["ers-digits", "strict-fast"]
    assert again.err.count("nothing is done again") == 2


def test_several_plans_are_one_json(typed, brief_plan) -> None:
    words = ["evaluate", "--model", MODEL, "--device", "cpu", "--limit", "12", "--plan", "--json"]
    plans = json.loads(typed(*words, "--protocol", "ers-digits,strict-fast").out)
    assert list(plans) == ["ers-digits", "strict-fast"] and all(rows[-1]["id"] == "total" for rows in plans.values())
    assert isinstance(json.loads(typed(*words, "--protocol", "ers-digits").out), list)


def test_protocols_that_do_not_go_together_are_refused(typed) -> None:
    words = ["evaluate", "--model", MODEL, "--device", "cpu", "--limit", "12"]
    assert "twice" in typed(*words, "--protocol", "ers-digits,ers-digits", code=2).err
    assert "--csv" in typed(*words, "--protocol", "ers-digits,strict-fast", "--csv", "a.csv", code=2).err
    assert "no protocol" in typed(*words, "--protocol", ",", code=2).err
    assert "unknown protocol" in typed(*words, "--protocol", "ers-digits,strit", code=2).err

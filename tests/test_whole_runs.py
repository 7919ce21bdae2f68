"""``benchmarks/whole_runs.py``: its sums, its page at tiny sizes, and ranks in a gallery mapped from disk."""

import math

import pytest
import whole_runs
from whole_runs import Case, Units

from dmlbench.protocols import load_protocol
from dmlbench.run.search import searches

UNITS = Units(forward=1.0, gradient=3.0, step_pair=1e-3, rank_pair=1e-2, centroid_pair=1e-4)


def test_parts_are_what_a_person_would_count() -> None:
    case, rules = Case("a", queries=10, entries=40, classes=4), load_protocol("ers-224")
    found = whole_runs.parts_of(case, UNITS, 2)
    gradients = 8 * 32 + 2 * 32  # eight searches, and the embedding shift from two random starts
    values = 2 + len(searches(rules, rules.components))  # the last image of each start, and every read-out
    assert found["embedding"] == 40 and found["rankings"] == pytest.approx(10 * 40 * 1e-2)
    assert found["network"] == pytest.approx(10 * (gradients * 3 + values) / 2)
    assert found["gallery"] == pytest.approx(10 * gradients * 40 * 1e-3 / 2)
    assert found["k-means"] == pytest.approx(len(rules.clustering_seeds) * 40 * 40 * 4 * 1e-4)
    assert math.isnan(whole_runs.parts_of(Case("b", 1, 10, 10**6), UNITS, 1)["k-means"])


def test_the_page_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(whole_runs, "measured", lambda net, device: UNITS)
    monkeypatch.setattr("sys.argv", ["whole_runs.py", "--net", "digits", "--processes", "1", "4"])
    whole_runs.main()
    assert capsys.readouterr().out.count("| SOP") == 4


def test_units_are_positive() -> None:
    assert min(vars(whole_runs.measured("digits", whole_runs.torch.device("cpu"))).values()) > 0


def test_ranks_in_a_mapped_gallery_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    whole_runs.million(2000, 5)
    assert "2,000 x 512 mapped, 5 queries" in capsys.readouterr().out

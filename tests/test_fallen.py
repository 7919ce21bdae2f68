"""Which classes and queries a report says to fall, recounted by loops over the stored outcomes."""

from pathlib import Path

import numpy as np

import dmlbench
from dmlbench.board.report import Run, page
from dmlbench.board.report.fallen import CLASSES, fallen
from dmlbench.results import load

BOARD = Path(__file__).resolve().parent.parent / "leaderboard" / "submissions"
GRID = ("5/255", "10/255", "20/255", "40/255")


def test_a_run_with_a_grid() -> None:
    e = load(BOARD / "digits-smallcnn-triplet-hm-lga-ics-strict" / "run")
    found = fallen([e])
    assert found is not None and found.heads == ("clean", *GRID) and found.part == "strict"
    a = e.arrays
    for row in found.classes:
        mine = a["label"] == int(row.name)
        assert row.queries == mine.sum()
        expected = [a["benign/recall_at_1"][mine].mean(), *(a[f"strict@{eps}/value"][mine].mean() for eps in GRID)]
        np.testing.assert_allclose(row.values, expected, rtol=1e-5)
    counts, survivors = dict.fromkeys(GRID, 0), 0
    for q in range(len(a["label"])):
        if a["benign/recall_at_1"][q] == 100:
            first = next((eps for eps in GRID if a[f"strict@{eps}/value"][q] == 0), None)
            if first is None:
                survivors += 1
            else:
                counts[first] += 1
    assert found.counts == (*counts.values(), survivors)
    assert len(found.queries) == found.total == sum(counts.values())
    smallest = dict(zip(a["query"].tolist(), a["smallest_eps/value"].tolist(), strict=True))
    lengths = [smallest[q.row] for q in found.queries]
    assert lengths == sorted(lengths)


def test_many_classes_end_in_one_line() -> None:
    e = load(BOARD / "omniglot-small-conv3-proxyanchor-at-strict" / "run")
    found = fallen([e])
    assert found is not None and len(found.classes) == CLASSES + 1
    assert sum(row.queries for row in found.classes) == len(e.arrays["label"])
    overall = np.average([r.values for r in found.classes], axis=0, weights=[r.queries for r in found.classes])
    np.testing.assert_allclose(overall[1:], [row["recall_at_1"] for row in e.extras["strict"]["curve"]], rtol=1e-5)


def test_runs_at_several_eps_and_of_others() -> None:
    """Runs of the parts of ERS at several eps are joined; those of another model or other queries are not."""
    given = {"limit": 12, "device": "cpu", "attacks": ("ES", "LTM", "GTM")}
    small, large = (
        dmlbench.evaluate("digits-smallcnn-triplet-none", eps=(eps,), **given) for eps in ("1/255", "20/255")
    )
    other = dmlbench.evaluate("digits-smallcnn-triplet-hm-lga-ics", eps=("40/255",), **given)
    found = fallen([small, large, other])
    assert found is not None and found.heads == ("clean", "1/255", "20/255")
    right = [
        [min(e.arrays[f"{m.component}/value"][q] for m in e.measurements if m.readout == "recall_at_1") for e in (small, large)]
        for q in range(12)
    ]  # fmt: skip
    by_loops = [
        next((i for i, value in enumerate(values) if value == 0), 2)
        for values, clean in zip(right, small.arrays["benign/recall_at_1"], strict=True)
        if clean == 100
    ]
    assert found.counts == tuple(by_loops.count(i) for i in range(3))
    content = page([Run("small", small), Run("large", large)])
    assert "first wrong at 20/255" in content and "first wrong at 40/255" not in content


def test_clusters_have_no_queries_that_fall() -> None:
    assert fallen([load(BOARD / "digits-smallcnn-triplet-hm-lga-ics-clustering" / "run")]) is None

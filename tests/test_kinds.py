"""A kind of protocol of another package, exactly as docs/extend.md has it: from its file to the site, as a user types it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmlbench.kinds.table import KINDS
from dmlbench.results import load
from dmlbench.submission.bundle import make_manifest

ROOT = Path(__file__).resolve().parents[1]
NONE, ICS = "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-hm-lga-ics"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The package of the page, installed by hand."""
    where = tmp_path_factory.mktemp("installed")
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8").partition("## A kind of protocol in full")[2]
    (where / "mypackage").mkdir()
    for name, kind in (("noise.py", "python"), ("noise.toml", "toml")):
        block = re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)
        assert block is not None
        (where / "mypackage" / name).write_text(block[1], encoding="utf-8")
    info = where / "mypackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmlbench.plugins]\nnoise = mypackage.noise\n")
    return where


@pytest.fixture(scope="module")
def typed(package, tmp_path_factory):
    """Runs a command in a folder of its own; its output."""
    folder = tmp_path_factory.mktemp("user")
    paths = [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dmlbench", *words], capture_output=True, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def measured(typed):
    """Two models under the kind's protocol: what was printed."""
    return [
        typed("evaluate", "--model", name, "--protocol", "noise", "--out", f"runs/{name}", "--csv", "mine.csv")
        for name in (NONE, ICS)
    ]


def test_it_is_measured_printed_and_kept(typed, measured) -> None:
    assert "R@1" in measured[0] and "80/255" in measured[0]
    run = load(typed.folder / "runs" / NONE)
    assert [m.component for m in run.measurements] == ["noise@20/255", "noise@80/255"]
    at = run.extras["noise"]["curve"]
    assert at[1]["recall_at_1"] == pytest.approx(np.mean(run.arrays["noise@80/255/value"]))
    assert "noise" not in KINDS  # here it is not installed


def test_rows_are_ranked_by_its_number(typed, measured) -> None:
    with (typed.folder / "mine.csv").open() as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    best = max(rows, key=lambda name: float(rows[name]["noise_recall_at_1"]))
    assert rows[best]["rank"] == "1" and {row["rank"] for row in rows.values()} == {"1", "2"}
    low, value, high = (float(rows[best][f"noise_recall_at_1{end}"]) for end in ("_lo", "", "_hi"))
    assert low <= value <= high and rows[best]["eps"] == str(round(80 / 255, 6))
    assert "noise_recall_at_1" in typed("leaderboard", "show", "--csv", "mine.csv", "--sort=-noise_recall_at_1")


def test_it_is_compared_query_by_query(typed, measured) -> None:
    found = json.loads(typed("compare", f"runs/{ICS}", f"runs/{NONE}", "--json", code=1))
    by_name = {m["metric"]: m for m in found["metrics"]}
    number = by_name["noise_recall_at_1"]
    assert number["allowed"] == 1.0 and number["interval"] is not None
    assert number["difference"] == pytest.approx(by_name["noise@80/255"]["difference"])


def test_it_stops_where_its_number_is_sure(typed, measured) -> None:
    said = typed("evaluate", "--model", ICS, "--protocol", "noise", "--until", "50", "--out", "runs/until")
    run = load(typed.folder / "runs" / "until")
    assert run.extras["until"]["number"] == "noise_recall_at_1" and run.dataset.n_queries == 64
    assert f"R@1 under noise % {np.mean(run.arrays['noise@80/255/value']):.1f}" in said and "--until 50" in said
    found = json.loads(typed("compare", "runs/until", f"runs/{ICS}", "--json"))
    assert found["n_queries"] == 64 and all(m["difference"] in (0, None) for m in found["metrics"])


def test_it_is_drawn_and_reported(typed, measured) -> None:
    typed("plot", f"runs/{NONE}", f"runs/{ICS}", "--kind", "eps", "--out", "curve.svg")
    assert "under noise" in (typed.folder / "curve.svg").read_text()
    typed("report", f"runs/{NONE}", "--out", "report.html")
    assert "R@1 under noise" in (typed.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def bundle(typed, measured) -> str:
    """A submission on a board of its own, relative to the user's folder."""
    run, out = f"runs/{NONE}", f"board/submissions/{NONE}-noise"
    typed("submit", "init", run, "--out", "submission.yaml", "--author", "Somebody")
    typed("submit", "pack", run, "--submission", "submission.yaml", "--no-weights", "--out", out)
    return out


def test_it_is_submitted_validated_and_put_on_a_board(typed, bundle) -> None:
    report = json.loads(typed("validate", bundle, "--level", "3", "--seed", "1", "--json"))
    assert report["status"] == "accepted" and report["passed"] == [0, 1, 2, 3]
    typed("leaderboard", "build", "--board", "board", "--site", "site")
    page = (typed.folder / "site" / "datasets" / "digits.html").read_text()
    assert "R@1 under noise %" in page and NONE in page


def test_what_is_not_of_its_form_is_refused(typed, bundle) -> None:
    names = ("evaluation.json", "per_query.npz", "adversarial_sample.npz")
    folder = typed.folder / bundle
    edited = typed.folder / "edited"
    shutil.copytree(folder, edited)
    said = json.loads((edited / "run" / "evaluation.json").read_text())
    said["extras"]["noise"]["curve"][0]["recall_at_1"] = 101.0
    (edited / "run" / "evaluation.json").write_text(json.dumps(said))
    inner = make_manifest({name: (edited / "run" / name).read_bytes() for name in names})
    (edited / "run" / "manifest.json").write_text(json.dumps(inner))
    files = ("submission.yaml", "run/manifest.json", *(f"run/{name}" for name in names))
    outer = make_manifest({name: (edited / name).read_bytes() for name in files})
    (edited / "manifest.json").write_text(json.dumps(outer))
    assert "extras.noise.curve.0.recall_at_1" in typed("validate", "edited", code=1)


def test_its_form_and_its_columns_are_in_the_schemas(typed) -> None:
    assert "noise" in json.loads(typed("schema", "extras"))["properties"]
    assert "noise_recall_at_1" in json.loads(typed("schema", "row"))["properties"]
    assert "noise_recall_at_1" in json.loads(typed("schema", "submission"))["$defs"]["Stated"]["properties"]

"""Another size of the perturbation: ``--eps`` on every kind of protocol."""

import json

import numpy as np
import pytest

from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.protocols import load_protocol
from dmlbench.results import Conditions, load
from dmlbench.threat import length

MODEL = "digits-smallcnn-triplet-none"


def test_components_keep_their_reach() -> None:
    rules = load_protocol("ers-digits")
    half = rules.at_eps(["20/255"])
    assert half.sha256 != rules.sha256
    for before, after in zip(rules.components, half.components, strict=True):
        a, b = rules.threat_of(before), half.threat_of(after)
        assert b.radius == pytest.approx(a.radius / 2) and b.stride == pytest.approx(a.stride / 2)
        assert (a.steps, a.start, a.restarts) == (b.steps, b.start, b.restarts)


def test_a_grid_has_all_of_them_for_every_picture() -> None:
    rules = load_protocol("strict-fast").at_eps(["1/255", "3/255"])
    assert rules.eps_for((1, 8, 8)) == rules.eps_for((3, 224, 224)) == ("1/255", "3/255")


@pytest.mark.parametrize(
    ("protocol", "eps", "words"),
    [
        ("ers-digits", ["1/255", "2/255"], "one eps at a time"),
        ("strict-fast", ["2/255", "1/255"], "ascending"),
        ("strict-fast", ["1/255", "1/255"], "ascending"),
        ("ers-digits", ["0"], "above 0"),
        ("ers-digits", ["-1/255"], "zero or more"),
        ("ers-digits", ["wide"], "not a number"),
        ("ers-digits", ["1e999999999/255"], "not a number"),
        ("ers-digits", ["1e-999999999"], "above 0"),
    ],
)
def test_what_is_no_size_is_refused(protocol, eps, words) -> None:
    with pytest.raises(UsageError, match=words):
        load_protocol(protocol).at_eps(eps)


def test_the_protocols_own_size_gives_its_own_numbers() -> None:
    options = {"attacks": ["CA+", "ES:R"], "limit": 16, "device": "cpu"}
    plain = evaluate(MODEL, "digits", "ers-digits", **options)
    same = evaluate(MODEL, "digits", "ers-digits", eps=["40/255"], **options)
    assert [m.value for m in plain.measurements] == [m.value for m in same.measurements]
    assert same.partial == ("--limit 16", "--attacks CA+,ES:R", "--eps 40/255")
    assert same.conditions == Conditions(eps="40/255") and plain.conditions == Conditions()


def test_nothing_moves_farther_than_asked() -> None:
    found = evaluate(MODEL, "digits", "ers-digits", eps=["5/255"], attacks=["CA+"], limit=16, device="cpu")
    assert 0 < found.arrays["CA+/norm"].max() <= 5 / 255 + 1e-5
    grid = evaluate(MODEL, "digits", "strict-fast", eps=["5/255"], limit=16, device="cpu")
    assert [m.component for m in grid.measurements] == ["strict@5/255"]


def test_a_curve_as_a_user_types_it(typed, tmp_path) -> None:
    command = ["evaluate", "--model", MODEL, "--attacks", "QA-", "--limit", "12", "--eps", "10/255,40/255"]
    done = json.loads(typed(*command, "--out", str(tmp_path / "runs"), "--json").out)
    assert [found["conditions"]["eps"] for found in done] == ["10/255", "40/255"]
    folders = [tmp_path / "runs" / f"ers-digits-eps-{n}-255" for n in (10, 40)]
    assert [load(folder).conditions.eps for folder in folders] == ["10/255", "40/255"]
    assert (tmp_path / "runs" / "report.html").exists()
    again = typed(*command, "--out", str(tmp_path / "runs"), "--resume")
    assert again.err.count("nothing is done again") == 2
    refused = typed("compare", *map(str, folders), code=3)
    assert "eps (10/255 and 40/255)" in refused.err
    row = typed(*command[:-1], "10/255", "--csv", str(tmp_path / "mine.csv"))
    line = (tmp_path / "mine.csv").read_text().splitlines()[1].split(",")
    head = (tmp_path / "mine.csv").read_text().splitlines()[0].split(",")
    cells = dict(zip(head, line, strict=False))
    assert row.out and float(cells["eps"]) == pytest.approx(length("10/255"), abs=1e-6) and not cells["rank"]


def test_shards_are_merged_at_their_size(typed, tmp_path) -> None:
    command = [
        "evaluate",
        "--model",
        MODEL,
        "--attacks",
        "QA-",
        "--limit",
        "12",
        "--batch-size",
        "6",
        "--eps",
        "10/255",
    ]
    shards = [str(tmp_path / name) for name in "ab"]
    for n, shard in enumerate(shards, 1):
        typed(*command, "--shard", f"{n}/2", "--out", shard)
    typed("merge", *shards, "--out", str(tmp_path / "whole"))
    typed(*command, "--out", str(tmp_path / "direct"))
    merged, direct = load(tmp_path / "whole"), load(tmp_path / "direct")
    assert merged.conditions == direct.conditions == Conditions(eps="10/255") and merged.partial == direct.partial
    np.testing.assert_array_equal(merged.arrays["QA-/value"], direct.arrays["QA-/value"])


def test_what_names_nothing_is_refused(typed) -> None:
    assert "names nothing" in typed("evaluate", "--model", MODEL, "--eps", ",", code=2).err
    csv = typed("evaluate", "--model", MODEL, "--eps", "1/255,2/255", "--csv", "x.csv", code=2)
    assert "--csv is a board of one" in csv.err


def test_a_resumed_run_has_the_same_size(typed, tmp_path) -> None:
    command = ["evaluate", "--model", MODEL, "--attacks", "QA-", "--limit", "12", "--out", str(tmp_path / "run")]
    typed(*command, "--eps", "10/255")
    assert "--eps 20/255 here" in typed(*command, "--eps", "20/255", "--resume", code=3).err
    norms = load(tmp_path / "run").arrays["QA-/norm"]
    assert np.all(norms <= 10 / 255 + 1e-5)

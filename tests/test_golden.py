"""The published protocol against the field: its public code on two networks, and its papers' tables."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, reference
from golden import NETWORKS, evaluate_golden, peer_scores
from published_parity import DRAWN, published

from dmlbench import evaluate, load_dataset, load_model
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation
from dmlbench.threat import Threat

PARTS = [c.name for c in load_protocol("ers-28-published").components]


@pytest.fixture(scope="module", params=list(NETWORKS))
def measured(request: pytest.FixtureRequest) -> tuple[str, Evaluation]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network gains nothing from two
    try:
        return request.param, evaluate_golden(reference("golden"), request.param)
    finally:
        torch.set_num_threads(threads)


def slack(part: str) -> float:
    """How far a part may lie from the mean besides three deviations: 1.5 points, or 0.03 of a cosine or distance."""
    return 0.03 if part in ("TMA", "ES:D") else 1.5


@pytest.mark.slow
def test_parts_agree_with_the_public_code(measured: tuple[str, Evaluation]) -> None:
    network, ours = measured
    peers = peer_scores(reference("golden"), network)
    assert [m.component for m in ours.measurements] == PARTS
    values = {m.component: m.value for m in ours.measurements} | {"ERS": ours.ers}
    far = {
        part: f"{value:.3f}, public code {peers[part].mean:.3f} ± {peers[part].std:.3f}"
        for part, value in values.items()
        if value is None or not abs(value - peers[part].mean) <= 3 * peers[part].std + slack(part)
    }
    assert not far


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ES:R", "LTM", "GTM", "GTT"])
def test_parts_without_chance_agree_to_a_query(measured: tuple[str, Evaluation], part: str) -> None:
    network, ours = measured
    found = next(m for m in ours.measurements if m.component == part)
    assert found.n == 265 and found.value is not None
    one_query = 100 / 265
    assert abs(found.value - peer_scores(reference("golden"), network)[part].mean) <= 1.01 * one_query


@pytest.mark.slow
def test_the_shift_agrees_to_rounding(measured: tuple[str, Evaluation]) -> None:
    """The first step's sign is the public code's: the other one is up to 0.02 away."""
    network, ours = measured
    found = next(m.value for m in ours.measurements if m.component == "ES:D")
    assert found == pytest.approx(peer_scores(reference("golden"), network)["ES:D"].mean, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-smallcnn-triplet-none", "digits-smallcnn-triplet-hm-lga-ics"])
def test_parts_without_chance_agree_with_the_plain_battery_on_other_models(model: str) -> None:
    embedder, dataset = load_model(model), load_dataset("digits")
    rules = load_protocol("ers-digits-published")
    parts = [p for p in PARTS if p not in DRAWN]
    ours = evaluate(embedder, dataset, rules, attacks=parts, limit=96, device="cpu").arrays
    threat = Threat.of(rules.threat)
    theirs = published(embedder.frozen(), dataset, ours["query"], threat, tuple(parts))
    for part in parts:
        differ = np.abs(ours[f"{part}/value"] - theirs[part]) > 0.02
        assert differ.sum() <= 1, part
        assert ours[f"{part}/value"].mean() == pytest.approx(theirs[part].mean(), abs=2e-3 if part == "ES:D" else 1.1)


@pytest.mark.parametrize("protocol", ["ers-28-published", "ers-28", "ers-224-published", "ers-224"])
def test_printed_ers_follows_from_the_printed_parts(protocol: str) -> None:
    rules = load_protocol(protocol)
    with reference("published_ers_cvpr2022.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 102
    ours = [np.mean([rules.component(p).rescale(float(row[p])) for p in PARTS]) for row in rows]
    printed = [float(row["ERS"]) for row in rows]
    assert np.abs(np.subtract(ours, printed)).max() <= 0.11


def test_the_script_says_which_folder_it_misses(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "golden.py"), str(tmp_path)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"golden.py: no peer_scores.json in {tmp_path}: name the folder that holds it"

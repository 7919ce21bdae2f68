"""Our ten parts and ERS beside those that the field's public code gives on the same two networks.

    python benchmarks/golden.py [--orders] [FOLDER]

``--orders`` instead shows what the order of the gallery does to GTM, published and corrected.

FOLDER holds ``omniglot_test_28.npz``, ``net_none.safetensors``, ``net_hm.safetensors`` and
``peer_scores.json``; by default it is ``reference/golden`` beside the data folder (``DMLBENCH_DATA``,
else ``../shared/data``). A minute or two on one core.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dmlbench
from dmlbench.datasets import ArrayImages
from dmlbench.models import ARCHITECTURES, fill, read_weights
from dmlbench.results import Evaluation

NETWORKS = {"none": "no defence", "hm": "HM[·, g_LGA]"}


@dataclass(frozen=True)
class Peer:
    """One score of the public code: its mean and standard deviation over seeds."""

    mean: float
    std: float


def peer_scores(folder: Path, network: str) -> dict[str, Peer]:
    """By part, and "ERS"."""
    scores = json.loads((folder / "peer_scores.json").read_text())["scores"][network]
    return {part: Peer(s["mean"], s["std"]) for part, s in scores.items()}


def golden_dataset(folder: Path, *, queries_first: bool = True) -> dmlbench.RetrievalDataset:
    """The 2,120 images with every eighth as a query; the gallery has the queries first, or is class by class.

    The order of the gallery is part of the setting: the published GTM aims at a row of it (see
    :func:`dmlbench.targets.nearest_other_published`). With the queries first its scores are those that
    the public code gave.
    """
    with np.load(folder / "omniglot_test_28.npz") as file:
        images, labels, query = file["images"], file["labels"], file["query_indices"]
    rows = np.arange(len(labels))
    return dmlbench.RetrievalDataset(
        "omniglot-golden",
        "test",
        ArrayImages(images[:, None], invert=True),
        labels,
        query=query,
        gallery=np.concatenate([query, np.setdiff1d(rows, query)]) if queries_first else rows,
    )


def golden_model(folder: Path, network: str) -> dmlbench.Embedder:
    """One of :data:`NETWORKS`."""
    net = ARCHITECTURES["conv3"]()
    fill(net, read_weights(folder / f"net_{network}.safetensors"), network)
    return dmlbench.load_model(net, input_shape=(1, 28, 28), name=f"golden-{network}")


def evaluate_golden(folder: Path, network: str) -> Evaluation:
    """Protocol ``ers-28-published`` on one of :data:`NETWORKS`."""
    return dmlbench.evaluate(golden_model(folder, network), golden_dataset(folder), "ers-28-published", device="cpu")


def table(folder: Path) -> str:
    """Markdown: a row for each part, for each network ours and the public code's mean ± deviation."""
    head = [f"{title}: ours | public code" for title in NETWORKS.values()]
    lines = ["| part | " + " | ".join(head) + " |", "| --- |" + " ---: | ---: |" * len(NETWORKS)]
    rows: dict[str, list[str]] = {}
    for network in NETWORKS:
        done, peers = evaluate_golden(folder, network), peer_scores(folder, network)
        ours = {m.component: m.value for m in done.measurements} | {"ERS": done.ers}
        for part, value in ours.items():
            digits = 3 if part in ("TMA", "ES:D") else 2
            p = peers[part]
            rows.setdefault(part, []).append(f"{value:.{digits}f} | {p.mean:.{digits}f} ± {p.std:.{digits}f}")
    return "\n".join(lines + [f"| {part} | {' | '.join(cells)} |" for part, cells in rows.items()])


def orders(folder: Path) -> str:
    """Markdown: R@1 under GTM by protocol and order of the gallery, and that of the public code."""
    lines = ["| GTM | gallery | " + " | ".join(NETWORKS.values()) + " |", "| --- | --- |" + " ---: |" * len(NETWORKS)]
    for title, protocol in {"published": "ers-28-published", "corrected": "ers-28"}.items():
        for place, first in {"queries first": True, "class by class": False}.items():
            dataset = golden_dataset(folder, queries_first=first)
            runs = [
                dmlbench.evaluate(golden_model(folder, n), dataset, protocol, attacks=["GTM"], device="cpu")
                for n in NETWORKS
            ]
            lines.append(f"| {title} | {place} | " + " | ".join(f"{r.measurements[0].value:.2f}" for r in runs) + " |")
    code = " | ".join(f"{peer_scores(folder, n)['GTM'].mean:.2f}" for n in NETWORKS)
    return "\n".join([*lines, f"| public code | | {code} |"])


if __name__ == "__main__":
    data = Path(os.environ.get("DMLBENCH_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
    options = argparse.ArgumentParser(prog="golden.py", description="Our scores beside those of the public code.")
    options.add_argument("folder", nargs="?", type=Path, default=data.resolve().parent / "reference" / "golden")
    options.add_argument("--orders", action="store_true", help="what the order of the gallery does to GTM")
    given = options.parse_args()
    if not (given.folder / "peer_scores.json").exists():
        sys.exit(f"golden.py: no peer_scores.json in {given.folder}: name the folder that holds it")
    print(orders(given.folder) if given.orders else table(given.folder))

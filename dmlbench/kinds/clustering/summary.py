"""What a run of kind clustering says: its columns, the numbers of each set of clusters, and the lowest of them.

Everything here is made of the images' clusters and outcomes alone, so that who checks a submitted run makes it again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.metrics import agreement, mean
from dmlbench.protocol import Component, Protocol


def pairwise_f1(labels: Integer[np.ndarray, " N"], clusters: Integer[np.ndarray, " N"]) -> float:
    """Harmonic mean of pair precision and pair recall, percent: pairs of one cluster against pairs of one class."""
    _, a = np.unique(labels, return_inverse=True)
    _, b = np.unique(clusters, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1), dtype=np.int64)
    np.add.at(table, (a, b), 1)

    def pairs(n: np.ndarray) -> float:
        return float((n * (n - 1) // 2).sum())

    both, by_cluster, by_class = pairs(table), pairs(table.sum(0)), pairs(table.sum(1))
    return 200.0 * both / (by_cluster + by_class) if by_cluster + by_class else 0.0


def numbers(
    labels: Integer[np.ndarray, " N"], clusters: Integer[np.ndarray, "N seeds"], recall: Float[np.ndarray, " N"]
) -> dict[str, float]:
    """NMI, AMI and pair F1 (means over the k-means seeds) and R@1 within the set, percent."""
    f1 = float(np.mean([pairwise_f1(labels, c) for c in clusters.T]))
    return {**agreement(labels, clusters), "f1": f1, "recall_at_1": mean(recall)}


def components(protocol: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each eps of the grid and each attack, for images of this shape (channels, height, width)."""

    def threat(name: str, eps: str) -> dict[str, Any]:
        joint = CLUSTER_ATTACKS[name].way == "joint" and protocol.joint
        return {"eps": eps, **({"steps": joint.steps} if joint else {})}

    return [
        Component(name=f"{name}@{eps}", attack=name, readout="recall_at_1", worst=0, best=100, threat=threat(name, eps))
        for eps in protocol.eps_for(shape)
        for name in protocol.attacks
    ]


def restarts(protocol: Protocol, part: Component) -> int:
    """How often an attack begins anew, at the most."""
    return protocol.joint.restarts if protocol.joint and CLUSTER_ATTACKS[part.attack].way == "joint" else 1


def before(parts: Sequence[Component], union: Component) -> list[Component]:
    """Of which attacks' images one that is a union chooses: those that stand before it, at the same eps."""
    same = [part for part in parts if part.threat["eps"] == union.threat["eps"]]
    return same[: same.index(union)]


def summary(
    protocol: Protocol, grid: Sequence[str], labels: Integer[np.ndarray, " N"], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """All that a run says of its images' clusters: what goes into ``extras.clustering``.

    Args:
        arrays: ``clusters`` (N, seeds) and ``value`` (N,) of ``clustering/clean/`` and of each ``<attack>@<eps>/``.
    """

    def of(name: str) -> dict[str, float]:
        return numbers(labels, arrays[f"{name}/clusters"], arrays[f"{name}/value"])

    table = [
        {"eps": eps, "attack": name, "labelled": CLUSTER_ATTACKS[name].labelled, **of(f"{name}@{eps}")}
        for eps in grid
        for name in protocol.attacks
    ]
    seeds = list(protocol.clustering_seeds)
    return {"clean": of("clustering/clean"), "attacks": table, "worst": worst(table), "seeds": seeds}


def worst(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each eps the lowest of every number, over the attacks that know the labels and the others apart."""
    out = []
    for eps in dict.fromkeys(row["eps"] for row in table):
        for labelled in (True, False):
            rows = [r for r in table if r["eps"] == eps and r["labelled"] == labelled]
            if rows:
                low = {key: min(r[key] for r in rows) for key in ("nmi", "ami", "f1", "recall_at_1")}
                out.append({"eps": eps, "labelled": labelled, **low})
    return out

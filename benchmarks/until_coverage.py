"""How often the interval of ``--until`` holds what the whole run gives, and how many queries it takes: a simulation.

    python benchmarks/until_coverage.py [--runs 200] [--points 1 2 3] [--sop]

The outcomes of committed ERS runs (leaderboard/submissions/*/run/per_query.npz) are measured again in other orders of the
queries: "covers" is the share of runs whose interval, at whatever look they stopped, holds the ERS of all queries. Only runs that
stopped before the end can miss, so they are counted alone too. ``--sop`` makes a set of SOP's size (60,502 queries of 11,316 classes)
of an Omniglot run's outcomes, each class a few queries of one of its classes, and counts the queries until ± 1.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch  # noqa: F401  (before scipy, whose OpenMP would else be the one)

from dmlbench.protocol import Component, ers_of, scored
from dmlbench.protocols import load_protocol, packaged_protocol
from dmlbench.results import load
from dmlbench.run import looks

ROOT = Path(__file__).resolve().parent.parent / "leaderboard" / "submissions"


def ers(components: list[Component], arrays: Mapping[str, np.ndarray]) -> float:
    """ERS of per-query outcomes."""
    found = ers_of([float(np.nanmean(column)) for column in scored(components, arrays).T])
    assert found is not None
    return found


def stopped(
    components: list[Component], arrays: Mapping[str, np.ndarray], points: float, order: np.ndarray
) -> tuple[int, tuple[float, float]]:
    """Queries and interval of a run that measures in this order, at the look where it stops."""
    for n, level in looks.looks(len(order)):
        some = {name: values[order[:n]] for name, values in arrays.items()}
        ends = looks.sure_intervals(components, some, level).mean
        if n == len(order) or looks.reach(ends, ers(components, some)) <= points:
            break
    assert ends is not None
    return n, ends


def outcomes(folder: Path) -> tuple[list[Component], dict[str, np.ndarray]]:
    """What an ERS run's queries gave."""
    run = load(folder, sample=False)
    rules = packaged_protocol(run.protocol.name, run.protocol.sha256) or load_protocol(run.protocol.name)
    names = ["label", *(f"{c.name}/value" for c in rules.components)]
    return list(rules.components), {name: run.arrays[name] for name in names}


def simulated(
    components: list[Component], arrays: Mapping[str, np.ndarray], points: float, runs: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(runs,) queries measured, and whether the interval holds the ERS of all."""
    truth = ers(components, arrays)
    counts, holds = np.empty(runs, dtype=np.int64), np.empty(runs, dtype=bool)
    for i in range(runs):
        n, (low, high) = stopped(components, arrays, points, looks.even_order(arrays["label"], seed + i))
        counts[i], holds[i] = n, low <= truth <= high
    return counts, holds


def enlarged(arrays: Mapping[str, np.ndarray], queries: int, classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Outcomes of a larger set: each class has the outcomes of some queries of one class, drawn with replacement."""
    rng, labels = np.random.default_rng(seed), np.arange(queries) % classes
    known = [np.flatnonzero(arrays["label"] == name) for name in np.unique(arrays["label"])]
    like = rng.integers(len(known), size=classes)
    rows = np.array([rng.choice(known[like[label]]) for label in labels])
    return {**{name: values[rows] for name, values in arrays.items()}, "label": labels}


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--like", default="*", help="which submissions, a pattern of their names")
    parser.add_argument("--sop", action="store_true", help="on a set of SOP's size instead")
    args = parser.parse_args()
    folders = sorted(ROOT.glob(f"{args.like}-ers-*/run"))
    print("| outcomes of | queries | classes | points | median queries | stopped early | covers | of those |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for points in args.points:
        every = []
        for folder in folders:
            components, arrays = outcomes(folder)
            arrays = enlarged(arrays, 60502, 11316) if args.sop else arrays
            counts, holds = simulated(components, arrays, points, args.runs)
            early = counts < len(arrays["label"])
            every.append((early, holds))
            if args.sop or len(folders) < 8:
                line(folder.parent.name, arrays["label"], points, counts, holds, early)
        early, holds = (np.concatenate(column) for column in zip(*every, strict=True))
        some = f"{100 * holds[early].mean():.1f} %" if early.any() else "–"
        print(
            f"| all {len(folders)} | | | {points:g} | | {100 * early.mean():.0f} % | {100 * holds.mean():.1f} % | {some} |"
        )


def line(
    name: str, labels: np.ndarray, points: float, counts: np.ndarray, holds: np.ndarray, early: np.ndarray
) -> None:
    """A row of the table."""
    some = f"{100 * holds[early].mean():.1f} %" if early.any() else "–"
    print(
        f"| {name} | {len(labels)} | {len(np.unique(labels))} | {points:g} | {int(np.median(counts))} "
        f"| {100 * early.mean():.0f} % | {100 * holds.mean():.1f} % | {some} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""How often the interval of ``--until`` holds what the whole run gives, and how many queries it takes: a simulation.

    python benchmarks/until_coverage.py [--protocol "ers-*"] [--runs 200] [--points 1 2 3] [--sop]

The outcomes of committed runs (leaderboard/submissions/*/run/per_query.npz) are measured again in other orders of the
queries: "covers" is the share of runs whose interval, at whatever look they stopped, holds the number of all queries. That is ERS; under
``--protocol strict`` it is worst-case R@1 at each eps of the grid, any of which ``--eps`` can make the one that is watched. Only runs that
stopped before the end can miss, so they are counted alone too. ``--sop`` makes a set of SOP's size (60,502 queries of 11,316 classes)
of an Omniglot run's outcomes, each class a few queries of one of its classes, and counts the queries until ± 1.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch  # noqa: F401  (before scipy, whose OpenMP would else be the one)

from dmlbench.intervals import Ends
from dmlbench.kinds.table import kind_of
from dmlbench.metrics import mean
from dmlbench.protocol import Component, ers_of, scored
from dmlbench.protocols import load_protocol, packaged_protocol
from dmlbench.results import load
from dmlbench.run import looks

ROOT = Path(__file__).resolve().parent.parent / "leaderboard" / "submissions"

Arrays = Mapping[str, np.ndarray]
"""``label`` (Q,), and what a :data:`Read` reads."""
Read = Callable[[Arrays, float], tuple[float, Ends]]
"""From the outcomes of some queries and a level to the number and its interval."""


def ers(components: list[Component]) -> Read:
    """ERS of ``<component>/value`` (Q,)."""

    def read(arrays: Arrays, level: float) -> tuple[float, Ends]:
        found = ers_of([float(np.nanmean(column)) for column in scored(components, arrays).T])
        assert found is not None
        return found, looks.sure_intervals(components, arrays, level).mean

    return read


def average(of: str) -> Read:
    """The mean of ``of`` (Q,), what each query adds to a kind's own number."""
    return lambda arrays, level: (mean(arrays[of]), looks.sure_mean(arrays[of], arrays["label"], level))


def outcomes(folder: Path) -> tuple[dict[str, Read], dict[str, np.ndarray]]:
    """How numbers are read of what a run's queries gave, by their names, and what these gave."""
    run = load(folder, sample=False)
    rules = packaged_protocol(run.protocol.name, run.protocol.sha256) or load_protocol(run.protocol.name)
    names = [f"{m.component}/value" for m in run.measurements]
    reads = {name: average(name) for name in names} if kind_of(run).run else {"ers": ers(list(rules.components))}
    return reads, {"label": run.arrays["label"], **{name: run.arrays[name].astype(np.float64) for name in names}}


def stopped(read: Read, arrays: Arrays, points: float, order: np.ndarray) -> tuple[int, tuple[float, float]]:
    """Queries and interval of a run that measures in this order, at the look where it stops."""
    for n, level in looks.looks(len(order)):
        value, ends = read({name: values[order[:n]] for name, values in arrays.items()}, level)
        if n == len(order) or looks.reach(ends, value) <= points:
            break
    assert ends is not None
    return n, ends


def simulated(read: Read, arrays: Arrays, points: float, runs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(runs,) queries measured, and whether the interval holds the number of all."""
    truth, _ = read(arrays, looks.LEVEL)
    counts, holds = np.empty(runs, dtype=np.int64), np.empty(runs, dtype=bool)
    for i in range(runs):
        n, (low, high) = stopped(read, arrays, points, looks.even_order(arrays["label"], seed + i))
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
    parser.add_argument("--protocol", default="ers-*", help="whose runs, a pattern of protocols' names")
    parser.add_argument("--like", default="*", help="which submissions, a pattern of their names")
    parser.add_argument("--sop", action="store_true", help="on a set of SOP's size instead")
    args = parser.parse_args()
    folders = sorted(ROOT.glob(f"{args.like}-{args.protocol}/run"))
    print("| outcomes of | queries | classes | points | median queries | stopped early | covers | of those |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for points in args.points:
        every = []
        for folder in folders:
            reads, arrays = outcomes(folder)
            arrays = enlarged(arrays, 60502, 11316) if args.sop else arrays
            for name, read in reads.items():
                counts, holds = simulated(read, arrays, points, args.runs)
                early = counts < len(arrays["label"])
                every.append((early, holds))
                if args.sop or len(folders) < 8:
                    line(f"{folder.parent.name}, {name}", arrays["label"], points, counts, holds, early)
        early, holds = (np.concatenate(column) for column in zip(*every, strict=True))
        some = f"{100 * holds[early].mean():.1f} %" if early.any() else "–"
        print(
            f"| all {len(every)} | | | {points:g} | | {100 * early.mean():.0f} % | {100 * holds.mean():.1f} % | {some} |"
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

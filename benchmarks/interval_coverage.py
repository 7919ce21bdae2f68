"""How often 95 % intervals hold the truth: the tables of docs/intervals.md.

    python benchmarks/interval_coverage.py
    python benchmarks/interval_coverage.py --boards 200        # quicker and coarser

Simulated boards: each class has its own rate, drawn from a Beta distribution around the true value, and each
query of it is a hit with that rate. How much classes differ (the intra-class correlation) is measured on the
committed runs first, and printed. The truth is the mean over all classes that there could be. Models of a
pair share what is hard: their classes' rates and their queries' outcomes are correlated.

Real outcomes: boards of few classes drawn from the 106 of Omniglot, the truth being that of all 106.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv, ndtr

from dmlbench.intervals import PERCENT, Intervals, class_intervals, paired_intervals
from dmlbench.protocol import scored
from dmlbench.protocols import load_protocol
from dmlbench.results import load

RUNS = Path(__file__).parents[1] / "leaderboard" / "submissions"
CLASSES = (5, 10, 20, 50)
SHARES = {0.01: (0.005, 0.015), 0.02: (0.015, 0.03), 0.05: (0.03, 0.1), 0.2: (0.1, 0.3), 0.5: (0.3, 0.5)}
"""True values, and the shares (or one minus them) of measured parts whose intra-class correlation stands for each."""
SIZES = {180: ("digits", "mnist"), 20: ("omniglot-small",)}
"""Queries of a class, and the data sets whose runs say how much such classes differ."""
STRESS = 0.1
"""An intra-class correlation at which every value is tried as well."""
PAIRS = ((0.01, 0.01), (0.01, 0.02), (0.01, 0.05), (0.05, 0.05), (0.05, 0.2), (0.2, 0.2), (0.5, 0.5), (0.95, 0.99))
SHARED = ((0.0, 0.0), (0.5, 0.2), (0.9, 0.5))
"""How two models agree: correlation of their classes' rates, and share of the agreement that outcomes can have."""
MODELS = ("none", "act", "hm-lga-ics", "robust-a", "robust-n", "est")


def correlation(values: Float[np.ndarray, " q"], label: np.ndarray) -> float:
    """Intra-class correlation of hits (0 or 1) by analysis of variance."""
    _, group, n = np.unique(label, return_inverse=True, return_counts=True)
    rate = np.bincount(group, values) / n
    between = (n * (rate - values.mean()) ** 2).sum() / (len(n) - 1)
    within = (n * rate * (1 - rate)).sum() / (n.sum() - len(n))
    size = (n.sum() - (n**2).sum() / n.sum()) / (len(n) - 1)
    return float((between - within) / (between + (size - 1) * within))


def measured() -> Iterator[tuple[str, float, float]]:
    """Data set, share of hits or of misses, whichever is less, and intra-class correlation of each committed part
    whose outcomes are 0 or 100."""
    for folder in sorted(RUNS.glob("*/run")):
        run = load(folder, sample=False)
        for name, outcomes in run.arrays.items():
            if name.endswith("/value") or name == "benign/recall_at_1":
                kept = ~np.isnan(outcomes)
                values = outcomes[kept].astype(np.float64) / 100.0
                if np.isin(values, (0.0, 1.0)).all() and 0 < values.mean() < 1:
                    share = min(values.mean(), 1 - values.mean())
                    yield run.dataset.name, share, correlation(values, run.arrays["label"][kept])


def rates(z: np.ndarray, share: float, rho: float) -> np.ndarray:
    """Normal numbers to rates of classes, Beta distributed with mean ``share`` and intra-class correlation ``rho``."""
    rest = (1 - rho) / rho
    return betaincinv(share * rest, (1 - share) * rest, ndtr(z))


def held(found: Intervals, truth: float | Sequence[float]) -> np.ndarray:
    """Which of the columns' intervals hold the truth."""
    low, high = np.array(found.columns).T
    assert (low < high).all(), "an interval without width"
    return (low <= truth) & (truth <= high)


def one_model(rng: np.random.Generator, groups: int, size: int, share: float, rho: float, boards: int) -> Intervals:
    q = np.repeat(rates(rng.standard_normal((groups, boards)), share, rho), size, axis=0)
    values = 100.0 * (rng.random(q.shape) < q)
    return class_intervals(values, np.repeat(np.arange(groups), size), [PERCENT] * boards)


def two_models(
    rng: np.random.Generator,
    groups: int,
    size: int,
    shares: tuple[float, float],
    rhos: tuple[float, float],
    shared: tuple[float, float],
    boards: int,
) -> Intervals:
    z = rng.standard_normal((2, groups, boards))
    z[1] = shared[0] * z[0] + np.sqrt(1 - shared[0] ** 2) * z[1]
    p, q = (np.repeat(rates(*of), size, axis=0) for of in zip(z, shares, rhos, strict=True))
    u, alone = rng.random(p.shape), rng.random(p.shape)
    same = (
        rng.random(p.shape) < shared[1]
    )  # the same draw for both: whatever is a hit for the lower is one for the higher
    first, second = 100.0 * (u < p), 100.0 * (np.where(same, u, alone) < q)
    return paired_intervals(first, second, np.repeat(np.arange(groups), size), [PERCENT] * boards)


def real(groups: int, boards: int, rng: np.random.Generator) -> tuple[dict[str, float], float]:
    """Coverage by part, and that of ERS's difference, of boards of ``groups`` of Omniglot's classes; percent."""
    components = load_protocol("ers-28").components
    ranges = [c.limits for c in components]
    runs = [
        load(p, sample=False) for m in MODELS if (p := RUNS / f"omniglot-small-conv3-triplet-{m}-2-ers-28/run").is_dir()
    ]
    tables, label = [scored(components, run.arrays) for run in runs], runs[0].arrays["label"]
    members = [np.flatnonzero(label == c) for c in np.unique(label)]
    hits, differences = [], []
    for _ in range(boards):
        drawn = [members[c] for c in rng.integers(0, len(members), groups)]
        at, clusters = np.concatenate(drawn), np.repeat(np.arange(groups), [len(d) for d in drawn])
        for table in tables:
            found = class_intervals(table[at], clusters, ranges, PERCENT)
            ends, truth = [*found.columns, found.mean], [*table.mean(0), table.mean()]
            hits.append([low <= t <= high for (low, high), t in zip(ends, truth, strict=True)])
        for a, b in pairwise(tables):
            low, high = paired_intervals(a[at], b[at], clusters, ranges, PERCENT).mean
            differences.append(low <= b.mean() - a.mean() <= high)
    names = [*(c.name for c in components), "ERS"]
    return dict(zip(names, 100.0 * np.mean(hits, axis=0), strict=True)), float(100.0 * np.mean(differences))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---:"] * len(head), *rows):
        print("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=1000, help="simulated boards in each cell")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    found = list(measured())
    rhos: dict[tuple[int, float], list[float]] = {}
    print("Intra-class correlations of committed parts: median, 90th percentile (parts)\n")
    rows = []
    for size, names in SIZES.items():
        row: list[object] = [", ".join(names)]
        for share, (low, high) in SHARES.items():
            here = [rho for name, s, rho in found if name in names and low <= s < high]
            middle, most = np.quantile(here, [0.5, 0.9])
            rhos[size, share] = [max(0.001, float(middle)), float(most), STRESS]
            row.append(f"{middle:.3f}, {most:.3f} ({len(here)})")
        rows.append(row)
    table(["runs", *(f"{100 * s:g} %" for s in SHARES)], rows)

    print(
        f"Coverage of one model's interval, percent, at the median, the 90th percentile and {STRESS} (median width)\n"
    )
    rows = []
    for size in SIZES:
        for groups in CLASSES:
            row = [groups, size]
            for share in SHARES:
                cells, width = [], 0.0
                for rho in rhos[size, share]:
                    one = one_model(rng, groups, size, share, rho, args.boards)
                    cells.append(f"{100 * held(one, 100 * share).mean():.1f}")
                    width = width or float(np.median(np.diff(np.array(one.columns))))
                row.append(f"{' '.join(cells)} ({width:.1f})")
            rows.append(row)
    table(["classes", "queries each", *(f"{100 * s:g} %" for s in SHARES)], rows)

    print(
        "Coverage of a difference's interval, percent, over how two models agree and both kinds of classes: lowest, mean\n"
    )
    rows = []
    for groups in CLASSES:
        row = [groups]
        for pair in PAIRS:
            cells = []
            for size in SIZES:
                of = [rhos[size, min(SHARES, key=lambda s: abs(s - min(p, 1 - p)))] for p in pair]
                for i in (0, 2):
                    for shared in SHARED:
                        two = two_models(rng, groups, size, pair, (of[0][i], of[1][i]), shared, args.boards // 2)
                        cells.append(100.0 * held(two, 100 * (pair[1] - pair[0])).mean())
            row.append(f"{min(cells):.1f} {np.mean(cells):.1f}")
        rows.append(row)
    table(["classes", *(f"{100 * a:g}, {100 * b:g} %" for a, b in PAIRS)], rows)

    print("Coverage with real outcomes: classes drawn from Omniglot's, percent\n")
    rows = []
    for groups in CLASSES:
        parts, difference = real(groups, args.boards // 2, rng)
        rows.append([groups, *parts.values(), difference])
    table(["classes", *parts, "ERS difference"], rows)


if __name__ == "__main__":
    main()

"""k-means in torch, for GPUs, and the mutual information of clusters with classes when both are many.

k-means: k-means++ start (Arthur and Vassilvitskii, 2007), Lloyd's iterations until no point changes its
cluster, empty clusters put on the points that are farthest from their own centre. Expected mutual
information: Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison" (2010),
for each pair of different cluster sizes once, since it depends on sizes alone.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

BLOCK = 1 << 26
"""Distances held at once."""


def nearest_centre(points: Float[Tensor, "N D"], centres: Float[Tensor, "k D"]) -> tuple[Tensor, Tensor]:
    """(N,) the index of the nearest centre, and the squared distance to it."""
    square = centres.square().sum(1)
    nearest, far = [], []
    for part in points.split(max(1, BLOCK // len(centres))):
        d, at = torch.addmm(square, part, centres.t(), alpha=-2.0).min(1)
        nearest.append(at)
        far.append(d)
    return torch.cat(nearest), (torch.cat(far) + points.square().sum(1)).clamp_min(0.0)


def spread_start(points: Float[Tensor, "N D"], k: int, generator: torch.Generator) -> Float[Tensor, "k D"]:
    """k-means++: each further centre is a point drawn by its squared distance to the nearest centre so far."""
    n = len(points)
    draws = torch.rand(k, generator=generator, dtype=torch.float64).to(points.device)
    chosen = torch.empty(k, dtype=torch.int64, device=points.device)
    chosen[0] = (draws[0] * n).long().clamp_max(n - 1)
    length = points.square().sum(1)
    gap = torch.full_like(length, torch.inf)
    for i in range(1, k):
        centre = points[chosen[i - 1]]
        gap = torch.minimum(gap, (length - 2.0 * (points @ centre) + centre.square().sum()).clamp_min(0.0))
        total = gap.cumsum(0, dtype=torch.float64)
        chosen[i] = torch.searchsorted(total, draws[i] * total[-1]).clamp_max(n - 1)
    return points[chosen]


def lloyd(points: Float[Tensor, "N D"], k: int, seed: int, iterations: int = 100) -> Int[Tensor, " N"]:
    """The cluster of each point, deterministic for a seed but for the device's order of adding up."""
    k = min(k, len(points))
    centres = spread_start(points, k, torch.Generator().manual_seed(seed))
    assigned, gap = nearest_centre(points, centres)
    for _ in range(iterations):
        size = torch.bincount(assigned, minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, assigned, points) / size.clamp_min(1)[:, None]
        empty = (size == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = points[gap.topk(len(empty)).indices]
        before, (assigned, gap) = assigned, nearest_centre(points, centres)
        if torch.equal(before, assigned):
            break
    return assigned


def _contingency(labels: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of the cells that are not empty, the class and cluster of each, and how often each size occurs."""
    _, a = np.unique(labels, return_inverse=True)
    _, b = np.unique(clusters, return_inverse=True)
    cell, count = np.unique(a.astype(np.int64) * (b.max() + 1) + b, return_counts=True)
    return count, cell, np.bincount(a), np.bincount(b)


def entropy(sizes: Integer[np.ndarray, " k"]) -> float:
    """Of a partition into parts of these sizes, in nats."""
    p = sizes[sizes > 0] / sizes.sum()
    return float(-(p * np.log(p)).sum())


def expected_mutual_information(a: Integer[np.ndarray, " r"], b: Integer[np.ndarray, " c"]) -> float:
    """Of two random partitions with these part sizes, in nats."""
    from scipy.special import gammaln

    n = int(a.sum())
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    total = 0.0
    sizes_b, often_b = np.unique(b, return_counts=True)
    for size_a, often_a in zip(*np.unique(a, return_counts=True), strict=True):
        for size_b, often in zip(sizes_b, often_b, strict=True):
            shared = np.arange(max(1, size_a + size_b - n), min(size_a, size_b) + 1)
            if not len(shared):
                continue
            chance = (
                log_factorial[size_a] + log_factorial[size_b] + log_factorial[n - size_a] + log_factorial[n - size_b]
                - log_factorial[n] - log_factorial[shared] - log_factorial[size_a - shared]
                - log_factorial[size_b - shared] - log_factorial[n - size_a - size_b + shared]
            )  # fmt: skip
            gain = shared / n * (np.log(n * shared) - np.log(float(size_a) * size_b))
            total += float(often_a) * float(often) * float((gain * np.exp(chance)).sum())
    return total


def mutual_information(labels: Integer[np.ndarray, " N"], clusters: Integer[np.ndarray, " N"]) -> tuple[float, float]:
    """NMI (arithmetic mean) and AMI, as scikit-learn defines them."""
    count, cell, a, b = _contingency(labels, clusters)
    if len(a) == len(b) == 1:
        return 1.0, 1.0
    n = len(labels)
    outer = a[cell // len(b)].astype(np.float64) * b[cell % len(b)]
    shared = float((count / n * (np.log(count) + np.log(n) - np.log(outer))).sum())
    middle = (entropy(a) + entropy(b)) / 2
    expected = expected_mutual_information(a, b)
    rest = middle - expected
    tiny = np.finfo(np.float64).eps
    if abs(rest) <= 1e-9 * middle:  # every image is a class and a cluster of its own: chance alone gives it
        return max(shared, 0.0) / max(middle, tiny), 0.0
    adjusted = (shared - expected) / (max(rest, tiny) if rest >= 0 else min(rest, -tiny))
    return max(shared, 0.0) / max(middle, tiny), adjusted

"""The slow twins: every formula once more, in plain Python loops over numpy float64."""

import math

import numpy as np


def distance(space: str, a: np.ndarray, b: np.ndarray) -> float:
    """d(a, b) in space N, C or E."""
    if space == "C":
        return 1.0 - float(np.dot(a, b))
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def to_all(space: str, a: np.ndarray, gallery: np.ndarray) -> list[float]:
    """d(a, X) for every X."""
    return [distance(space, a, x) for x in gallery]


def relu(x: float) -> float:
    return max(0.0, x)


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def order(distances: list[float], leave_out: int) -> list[int]:
    """Gallery rows from nearest to farthest, one left out."""
    return sorted((i for i in range(len(distances)) if i != leave_out), key=lambda i: distances[i])


def ca(sign: int):
    def loss(s: str, i: int, e, X, y, chosen):
        out = []
        for q in chosen:
            c = distance(s, X[q], e)
            out += [relu(sign * (c - x)) for x in to_all(s, X[q], X)]
        return average(out)

    return loss


def qa(sign: int):
    def loss(s: str, i: int, e, X, y, chosen):
        d = to_all(s, e, X)
        return average([relu(sign * (d[c] - x)) for c in chosen for x in d])

    return loss


def ltm(own_counts: bool):
    def loss(s: str, i: int, e, X, y, chosen):
        d = to_all(s, e, X)
        far = max(d[j] for j in range(len(y)) if y[j] != y[i])
        near = min(d[j] for j in range(len(y)) if y[j] == y[i] and (own_counts or j != i))
        return relu(far - near)

    return loss


def nudged(space: str, a, b) -> float:
    """The public code's distance: 1e-6 added to each difference, but not to a cosine."""
    return distance(space, a, b) if space == "C" else float(np.linalg.norm(a - b + 1e-6))


def flip(s: str, i: int, e, X, y, chosen):
    """Without a threshold: minus the distance to a target of one's own class, the distance to another."""
    d = distance(s, e, X[chosen[0]])
    return -d if y[i] == y[chosen[0]] else d


PLAIN = {
    "flip": flip,
    "raise_candidate": ca(1),
    "lower_candidate": ca(-1),
    "raise_in_query": qa(1),
    "lower_in_query": qa(-1),
    "match": lambda s, i, e, X, y, c: 1 - np.dot(e, X[c[0]]) / np.linalg.norm(e) / np.linalg.norm(X[c[0]]),
    "shift": lambda s, i, e, X, y, c: -float(np.linalg.norm(e - X[i])),
    "shift_published": lambda s, i, e, X, y, c: -nudged("N", e, X[i]),
    "approach_published": lambda s, i, e, X, y, c: nudged(s, e, X[c[0]]),
    "approach": lambda s, i, e, X, y, c: distance(s, e, X[c[0]]),
    "spread": ltm(False),
    "spread_published": ltm(True),
}
"""Objectives by name: (space, the image's row, its embedding, gallery, labels, targets' rows) to a number."""

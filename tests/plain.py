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

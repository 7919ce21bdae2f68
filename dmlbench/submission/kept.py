"""Of how many queries a bundle keeps the adversarial images."""

import math
from collections.abc import Sequence

from dmlbench.datasets import DATASETS
from dmlbench.results import Evaluation

LEAST_SAMPLE = 32
"""Queries whose images a bundle holds at the least (or all, where the run kept fewer), ..."""
LEAST_BYTES = 1 << 19
"""... fewer where the images of all parts would be more bytes than this, but one, ..."""


def least_sample(e: Evaluation, shape: Sequence[int]) -> int:
    """... and none of a data set whose pictures may not be passed on: its runs are checked by measuring a share again (level 3).

    Args:
        e: the run.
        shape: (C, H, W) of an image.
    """
    name = e.dataset.name
    if name in DATASETS and not DATASETS[name].passed_on:
        return 0
    moved = sum(f"{m.component}/norm" in e.arrays for m in e.measurements)
    return min(LEAST_SAMPLE, max(1, LEAST_BYTES // (4 * math.prod(shape) * max(1, moved))))

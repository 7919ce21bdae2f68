"""Of how many queries a bundle keeps the adversarial images."""

import math
from collections.abc import Sequence

from dmlbench.datasets import DATASETS

LEAST_SAMPLE = 32
"""Queries whose images a bundle holds at the least (or all, where the run kept fewer), ..."""
LEAST_BYTES = 1 << 19
"""... fewer where these would be more bytes for each part, but one, ..."""


def least_sample(dataset: str, shape: Sequence[int]) -> int:
    """... and none of a data set whose pictures may not be passed on: its runs are checked by measuring a share again (level 3).

    Args:
        dataset: its name.
        shape: (C, H, W) of an image.
    """
    if dataset in DATASETS and not DATASETS[dataset].passed_on:
        return 0
    return min(LEAST_SAMPLE, max(1, LEAST_BYTES // (4 * math.prod(shape))))

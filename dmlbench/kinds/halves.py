"""Queries dealt to two halves: what is made on the one is read on the other, so each query is read once by what never saw it."""

import numpy as np
import torch
from jaxtyping import Int

from dmlbench.errors import UsageError
from dmlbench.rng import Rng, seed_of


def halves(rows: Int[np.ndarray, " Q"], seed: int) -> Int[np.ndarray, " Q"]:
    """0 or 1 for each query, by its data set row, after a shuffle that belongs to the seed; as many of each, or one more 0.

    Raises:
        UsageError: there is a single query.
    """
    if len(rows) < 2:
        raise UsageError(f"{len(rows)} query cannot be dealt to two halves: at least 2 are needed")
    drawn = Rng(seed_of(seed, "halves"), torch.from_numpy(rows.astype(np.int64))).uniform()
    place = np.lexsort((rows, drawn.numpy())).argsort()
    return place % 2

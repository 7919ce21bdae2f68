"""Queries dealt to two halves: what is made on the one is read on the other, so each query is read once by what never saw it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Int

from dmlbench.errors import UsageError
from dmlbench.protocol import Protocol
from dmlbench.rng import Rng, seed_of
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work


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


def made_on_each(
    what: str, subject: Subject, rules: Protocol, make: Callable[[str, int], Arrays], progress: Progress, work: Work
) -> dict[tuple[str, int], Arrays] | None:
    """What is made on each half at each eps of the protocol's grid, by both; None where ``work`` is a shard, whose part is then done.

    Args:
        what: is made, for messages.
        make: at an eps, on the half 0 or 1; one unit of work.
    """
    count = len(subject.rows)
    jobs = [(eps, which) for eps in rules.eps_for(subject.dataset.images.shape) for which in (0, 1)]
    progress.start(what, count * len(jobs))
    units = {i: (f"{what} of half {which} at {eps}", 0, count) for i, (eps, which) in enumerate(jobs)}
    results = work.each(what, units, lambda i: make(*jobs[i]), partial(progress.advance, what))
    return None if work.shard else {job: results[i] for i, job in enumerate(jobs)}

"""Where the positives of a query stand in its list, without sorting the list.

Recall, average precision and MAP@R depend on the ranks of the positives alone, and a positive's rank is
one more than the positives before it and the negatives that are not farther than it. So each positive
costs one comparison of a row of distances with a number; only where positives are many is the row
sorted. Ties count against the model, by the rule of :func:`dmlbench.objectives.ahead`; a test with many ties compares the two.
The query's own entry is nowhere in its list, nor is one that does not count for it.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmlbench.fast.sweep import blocks
from dmlbench.scene import Scene

MANY = 64
"""Positives a query from which sorting its list is cheaper than comparing it with each of them."""


def negatives_ahead(d: Float[Tensor, "B N"], scene: Scene) -> tuple[Float[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """For each positive, nearest first, the number of negatives that are not farther; and which are positives.

    Args:
        d: distances to the whole gallery.
    """
    rows, real = scene.kin_rows[0], scene.positive_rows
    d = d if scene.ignored is None else d.masked_fill(scene.ignored, torch.inf)
    near = d.gather(1, rows).masked_fill(~real, torch.inf).sort(1).values  # (B, P)
    real = torch.arange(near.shape[1], device=d.device) < real.sum(1, keepdim=True)
    ahead = _not_farther(d, near) if near.shape[1] <= MANY else _not_farther_sorted(d, near)
    to_self = d.gather(1, scene.row.clamp_min(0)[:, None])  # (B, 1)
    ahead -= ((to_self <= near) & (scene.row >= 0)[:, None]).float()
    ahead -= (torch.searchsorted(near, near, right=True)).float()  # the positives that are not farther
    return ahead, real


def _not_farther(d: Tensor, near: Tensor) -> Tensor:
    """(B, P) how many entries are not farther than each of ``near``, one comparison for each."""
    counts = torch.zeros_like(near)
    for s in blocks(len(d), d.shape[1], d.device):
        part = d[:, s]
        hit = torch.empty_like(part)
        for j in range(near.shape[1]):
            counts[:, j] += torch.le(part, near[:, j : j + 1], out=hit).sum(1)
    return counts


def _not_farther_sorted(d: Tensor, near: Tensor) -> Tensor:
    """The same from sorted rows."""
    if d.device.type == "cpu":  # numpy sorts floats several times as fast as torch
        ordered = torch.from_numpy(np.sort(d.numpy(), axis=1))
    else:
        ordered = d.sort(1).values
    return torch.searchsorted(ordered, near, right=True).to(near.dtype)


def recalled(ahead: Float[Tensor, "B P"], real: Bool[Tensor, "B P"], k: int) -> Float[Tensor, " B"]:
    """R@k: 100 where fewer than k negatives are before the first positive, else 0; NaN without positives."""
    return torch.where(real[:, 0], (ahead[:, 0] < k).float() * 100.0, torch.nan)


def average_precisions(
    ahead: Float[Tensor, "B P"], real: Bool[Tensor, "B P"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Average precision over the whole list, and over its first R (MAP@R), percent; NaN without positives."""
    hits = torch.arange(1, ahead.shape[1] + 1, device=ahead.device)  # (P,)
    count = real.sum(1)
    rank = hits + ahead
    precision = torch.where(real, hits / rank, 0.0)
    at_r = precision * (rank <= count[:, None])
    return 100.0 * precision.sum(1) / count, 100.0 * at_r.sum(1) / count  # 0/0 is NaN where there are none


def inverse_negative_penalty(ahead: Float[Tensor, "B P"], real: Bool[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """The number of positives as a share of the rank of the last of them, percent; NaN without positives."""
    count = real.sum(1)
    last = ahead.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0]
    return torch.where(count > 0, 100.0 * count / (count + last), torch.nan)

"""Square: a random search that sees loss values only (Andriushchenko et al., ECCV 2020, algorithms 1-3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.optimizers.base import Hunt, Loss, each, keep_rows
from dmlbench.rng import Rng
from dmlbench.threat import Threat

SHARE = 0.8
"""Share of the pixels that the first window covers."""
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, out of 10,000, at which the share is halved."""
LOOK_EVERY = 20
"""Queries between two looks at which images are settled."""


def share(query: int, queries: int) -> float:
    """Share of the pixels that the window of the ``query``-th try covers, of ``queries`` in all."""
    at = query * 10_000 / queries
    return SHARE / 2.0 ** sum(at > mark for mark in HALVINGS)


def side(query: int, queries: int, height: int, width: int) -> int:
    """Side of the square window in pixels, at least 1."""
    return max(1, min(round(math.sqrt(share(query, queries) * height * width)), height, width))


@dataclass(frozen=True)
class _State:
    """Where the search of each image stands: tensors (b, ...)."""

    row: Tensor
    clean: Tensor
    best: Tensor
    lowest: Tensor
    rng: Rng


def square(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Square: change a random window, keep what lowers the loss; ``threat.queries`` values of the loss in all.

    Returns the best image; the start is vertical stripes (Linf) or tiles (L2). Settled images of a
    :class:`~dmlbench.optimizers.base.Hunt` are left out.

    Raises:
        UsageError: the samples are not single images.
    """
    if images.dim() != 4:
        raise UsageError("square needs images (b, C, H, W)")
    first, change = (_stripes, _repaint) if threat.norm == "linf" else (_tiles, _move_mass)
    best = threat.project(first(images, threat.radius, rng), images)
    s = _State(torch.arange(len(images), device=images.device), images, best, loss(best), rng)
    out = images.clone()
    for query in range(1, threat.queries):
        if isinstance(loss, Hunt) and (query - 1) % LOOK_EVERY == 0:
            alive = loss.unsettled()
            if not bool(alive.all()):
                out[s.row] = s.best
                s, loss = keep_rows(s, alive), loss[alive]
                if not len(s.row):
                    return out
        size = side(query, threat.queries, *images.shape[2:])
        tried = threat.project(change(s.best, s.clean, size, threat.radius, s.rng), s.clean)
        value = loss(tried)
        better = value < s.lowest
        best = torch.where(each(better, tried), tried, s.best)
        s = _State(s.row, s.clean, best, torch.minimum(value, s.lowest), s.rng)
    out[s.row] = s.best
    return out


def _stripes(images: Tensor, eps: float, rng: Rng) -> Tensor:
    """Each column of each channel moved by plus or minus eps."""
    _, c, _, w = images.shape
    return images + eps * rng.signs(c, 1, w)


def _corners(like: Tensor, size: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """(b,) top and left of a random window of side ``size``."""
    h, w = like.shape[2:]
    return rng.integers(h - size + 1), rng.integers(w - size + 1)


def _inside(like: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """(b, 1, h, w) bool: the pixels of each image's window."""
    h, w = like.shape[2:]
    y = torch.arange(h, device=like.device)[None, :] - top[:, None]  # (b, h)
    x = torch.arange(w, device=like.device)[None, :] - left[:, None]  # (b, w)
    rows, columns = (y >= 0) & (y < size), (x >= 0) & (x < size)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _repaint(best: Tensor, clean: Tensor, size: int, eps: float, rng: Rng) -> Tensor:
    """Linf: a random window set to plus or minus eps around the clean image, one sign per channel."""
    window = _inside(best, *_corners(best, size, rng), size)
    return torch.where(window, clean + eps * rng.signs(best.shape[1], 1, 1), best)


def _pyramid(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width): nested rectangles around the centre, the k-th adding 1 / k^2."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    cy, cx = height // 2, width // 2
    ring = torch.maximum((y - cy).abs()[:, None], (x - cx).abs()[None, :])  # (height, width)
    grows = torch.cumsum(1.0 / torch.arange(1, height + width + 1, device=device).float() ** 2, 0)
    return grows[max(cy, cx, height - 1 - cy, width - 1 - cx)] - torch.where(
        ring > 0, grows[(ring - 1).clamp_min(0)], torch.zeros((), device=device)
    )


def _bump(size: int, device: torch.device) -> Tensor:
    """(size, size) of unit length: a positive pyramid above a negative one."""
    if size == 1:
        return torch.ones(1, 1, device=device)
    half = size // 2
    bump = torch.cat([_pyramid(half, size, device), -_pyramid(size - half, size, device)])
    return bump / bump.norm()


def _tiles(images: Tensor, eps: float, rng: Rng) -> Tensor:
    """L2: bumps of random sign and orientation on a 5 x 5 grid, eps long in all."""
    b, c, h, w = images.shape
    size = max(1, min(h, w) // 5)
    bump = _bump(size, images.device)
    down, across = -(-h // size), -(-w // size)
    signs = rng.signs(c, down, across)  # (b, c, down, across)
    turned = rng.signs(1, down, across) > 0
    tile = torch.where(turned[..., None, None], bump, bump.t())  # (b, 1, down, across, s, s)
    delta = signs[..., None, None] * tile
    delta = delta.permute(0, 1, 2, 4, 3, 5).reshape(b, c, down * size, across * size)[:, :, :h, :w]
    return images + delta * each(eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12), images)


def _move_mass(best: Tensor, clean: Tensor, size: int, eps: float, rng: Rng) -> Tensor:
    """L2: empty one window, and put what it held into a bump in another."""
    c, h, w = best.shape[1:]
    size = min(max(size, 3), h, w)
    size -= 1 - size % 2 if size > 1 else 0
    delta = best - clean
    top, left = _corners(best, size, rng)
    into = _inside(best, top, left, size)
    emptied = _inside(best, *_corners(best, size, rng), size)
    held = (delta * (into | emptied)).flatten(2).square().sum(2)  # (b, c)
    spare = (eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0.0) / c  # (b,)
    bump = _bump(size, best.device)
    turned = rng.signs() > 0
    y = (torch.arange(h, device=best.device)[None, :] - top[:, None]).clamp(0, size - 1)  # (b, h)
    x = (torch.arange(w, device=best.device)[None, :] - left[:, None]).clamp(0, size - 1)  # (b, w)
    upright, lying = bump[y[:, :, None], x[:, None, :]], bump[x[:, None, :], y[:, :, None]]
    placed = torch.where(turned[:, None, None], upright, lying)[:, None] * into  # (b, 1, h, w)
    there = delta * into
    there = there / there.flatten(2).norm(dim=2).clamp_min(1e-10)[:, :, None, None]
    fresh = there + placed * rng.signs(c, 1, 1)
    fresh = fresh / fresh.flatten(2).norm(dim=2).clamp_min(1e-10)[:, :, None, None]
    fresh = fresh * (held + spare[:, None]).sqrt()[:, :, None, None]
    return clean + torch.where(into, fresh, torch.where(emptied, torch.zeros_like(delta), delta))

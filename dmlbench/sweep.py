"""Sweeps over the gallery: what an objective needs of all N entries, in blocks that stay in cache.

The plain formulas build several (B, N) tensors a step and keep them for the backward pass. A sweep
looks at one block of entries at a time, adds up the value and its gradient together, and keeps (B, D).
So a step costs one matrix product forward, one backward and a few passes over a block, and its memory
does not grow with the gallery. Values and gradients are those of the plain formulas; at a distance of
zero the gradient is zero.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmlbench.scene import Scene

CPU_BLOCK = 1 << 18
"""(image, entry) pairs in a block on a CPU: 1 MiB of distances, about a core's cache."""
CUDA_BLOCK = 1 << 26
"""The same on a GPU: 256 MiB."""
_WIDTH = 64
_NOISE = 1e-9
"""Squared distances below this share of the gallery's mean squared length are rounding."""


def blocks(pairs: int, entries: int, device: torch.device) -> Iterator[slice]:
    """Even blocks of ``entries`` gallery rows when each costs ``pairs`` numbers; all but the last a multiple of 64."""
    budget = CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK
    count = max(1, -(-entries * pairs // budget))
    size = -(-entries // (count * _WIDTH)) * _WIDTH
    for a in range(0, entries, size):
        yield slice(a, min(a + size, entries))


def _touched(slope: Float[Tensor, "B n"], entries: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor]:
    """Both without the entries whose slope (0 or more) is 0 for every image, where leaving them out saves a product.

    Not on a GPU, which would have to wait to know their number.
    """
    if slope.device.type != "cpu":
        return slope, entries
    some = slope.amax(0).nonzero()[:, 0]
    return (slope[:, some], entries[some]) if 4 * len(some) < 3 * len(entries) else (slope, entries)


class _QueryHinge(torch.autograd.Function):
    """(B,) mean over targets k and entries X of relu(sign * (d(e, X) - d(e, t_k))), and its gradient in e."""

    @staticmethod
    def forward(ctx, e: Tensor, scene: Scene, sign: float) -> Tensor:  # type: ignore[no-untyped-def]
        gallery, euclidean = scene.gallery, scene.distance.metric == "euclidean"
        n, k = len(gallery), scene.chosen.shape[1]
        wanted = ctx.needs_input_grad[0]
        c = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
        length = e.square().sum(1, keepdim=True)  # (B, 1)
        floor = (_NOISE * gallery.scale.square()).clamp_min(1e-30)
        value, count = torch.zeros_like(length), torch.zeros_like(c)
        pull, weight = torch.zeros_like(e), torch.zeros_like(length)
        for s in blocks(len(e) * k, n, e.device):
            entries = gallery.embeddings[s]
            if euclidean:
                d = torch.addmm(gallery.square[s], e, entries.t(), alpha=-2.0)  # (B, n)
                d = torch.maximum(d.add_(length), floor, out=d).sqrt_()
            else:
                d = torch.mm(e, entries.t()).neg_().add_(1.0)
            gap = (d[:, None, :] - c[:, :, None]).mul_(sign).clamp_min_(0.0)  # (B, K, n)
            value += gap.sum((1, 2))[:, None]
            if not wanted:
                continue
            active = gap.sign_()
            count += active.sum(2)
            slope = active[:, 0] if k == 1 else active.sum(1)  # (B, n)
            if euclidean:
                slope = slope.div_(d)
                weight += slope.sum(1, keepdim=True)
            pull.addmm_(*_touched(slope, entries))
        if wanted:
            if euclidean:  # each distance pulls along (e - X) / d
                to_targets = torch.where(c > floor.sqrt(), count / c.clamp_min(1e-30), 0.0)  # (B, K)
                away = to_targets.sum(1, keepdim=True) * e - (to_targets[:, :, None] * scene.targets).sum(1)
                gradient = weight * e - pull - away
            else:
                gradient = (count[:, :, None] * scene.targets).sum(1) - pull
            ctx.save_for_backward(gradient.mul_(sign / (n * k)))
        return value[:, 0] / (n * k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None


def query_hinge(e: Float[Tensor, "B D"], scene: Scene, sign: float) -> Float[Tensor, " B"]:
    """Mean over targets and gallery of relu(sign * (d(e, X) - d(e, target))): QA+ with -1, QA- with +1."""
    return _QueryHinge.apply(e, scene, sign)  # type: ignore[no-any-return]


class _LevelHinge(torch.autograd.Function):
    """(B, K) mean over X of relu(sign * (D_kX - d_k)) for fixed D (B, K, N), and its slope in d."""

    @staticmethod
    def forward(ctx, d: Tensor, fixed: Tensor, sign: float) -> Tensor:  # type: ignore[no-untyped-def]
        n = fixed.shape[2]
        value, count = torch.zeros_like(d), torch.zeros_like(d)
        for s in blocks(d.numel(), n, d.device):
            gap = (fixed[:, :, s] - d[:, :, None]).mul_(sign).clamp_min_(0.0)  # (B, K, n)
            value += gap.sum(2)
            count += gap.sign_().sum(2)
        ctx.save_for_backward(count.mul_(-sign / n))
        return value.div_(n)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def candidate_hinge(e: Float[Tensor, "B D"], scene: Scene, sign: float) -> Float[Tensor, " B"]:
    """Mean over targets q and gallery of relu(sign * (d(q, X) - d(q, e))): CA+ with -1, CA- with +1."""
    d = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
    return _LevelHinge.apply(d, scene.target_distances, sign).mean(1)  # type: ignore[no-any-return]


def _highest(t: Float[Tensor, "B n"]) -> Int[Tensor, " B"]:
    """Where the largest value of each row is: by groups, since finding places costs far more than values."""
    even = t.shape[1] // _WIDTH * _WIDTH
    if even < 4 * _WIDTH:
        return t.argmax(1)
    table = t[:, :even].unflatten(1, (-1, _WIDTH))  # (B, lines, width)
    top, column = table.amax(1).max(1)  # (B,)
    line = table.gather(2, column[:, None, None].expand(-1, table.shape[1], 1))[:, :, 0].argmax(1)
    at = line * _WIDTH + column
    if even < t.shape[1]:
        rest, place = t[:, even:].max(1)
        at = torch.where(rest > top, place + even, at)
    return at


def extreme_entries(
    e: Float[Tensor, "B D"], scene: Scene, near: Bool[Tensor, "B P"]
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """The farthest entry of another class, and the nearest of those of ``scene.kin_rows`` where ``near`` is true.

    Without a graph. Where there is none, any entry is given. Each row's own squared length, the same for
    all entries, is left out of the distances. Entries of the image's class are few: they are looked at by
    their rows and then put out of the way, so that one pass finds the farthest of the rest.
    """
    gallery = scene.gallery
    kin, _ = scene.kin_rows
    with torch.no_grad():
        d = scene.table
        for s in blocks(len(e), len(gallery), e.device):
            entries = gallery.embeddings[s].t()
            if scene.distance.metric == "euclidean":
                torch.addmm(gallery.square[s], e, entries, alpha=-2.0, out=d[:, s])  # (B, n)
            else:
                torch.mm(e, entries, out=d[:, s]).neg_()
        at = d.gather(1, kin).masked_fill_(~near, torch.inf).argmin(1, keepdim=True)  # (B, 1)
        far = _highest(d.scatter_(1, kin, -torch.inf))
    return far, kin.gather(1, at)[:, 0]

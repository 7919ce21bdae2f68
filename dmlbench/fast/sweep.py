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

from dmlbench.fast.rounded import LEVELS, RoundedGallery
from dmlbench.scene import Scene

CPU_BLOCK = 1 << 18
"""(image, entry) pairs in a block on a CPU: 1 MiB of distances, about a core's cache."""
CUDA_BLOCK = 1 << 26
"""The same on a GPU: 256 MiB."""
ROUNDED_IMAGES = 256
"""Images that blocks of a rounded gallery are made for, whatever the batch: so the sums are added up in one order."""
PULL = 16
"""The 8-bit pull of an entry as far away as the farthest target, where pulls have no bound."""
MOST = (2**31 - 1) // LEVELS**2
"""Entries whose 8-bit pulls add up in 32 bits."""
_WIDTH = 64
_TIE = 1e-6
"""Relative difference from which two squared distances count as different; below it they may differ by rounding alone."""
_FAR = 1e30
"""A squared distance beyond every target's."""
_NOISE = 1e-9
"""Squared distances below this share of the gallery's mean squared length are rounding."""


def blocks(pairs: int, entries: int, device: torch.device) -> Iterator[slice]:
    """Even blocks of ``entries`` gallery rows when each costs ``pairs`` numbers; all but the last a multiple of 64."""
    budget = CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK
    count = max(1, -(-entries * pairs // budget))
    size = -(-entries // (count * _WIDTH)) * _WIDTH
    for a in range(0, entries, size):
        yield slice(a, min(a + size, entries))


class _Room:
    """Memory that blocks take in turn, as ``room[n]`` (rows, n): fresh memory costs more than what is done in it."""

    def __init__(self, like: Tensor, rows: int, widest: int, dtype: torch.dtype | None = None) -> None:
        self.rows = rows
        self.flat = like.new_empty(rows * widest, dtype=dtype or like.dtype)

    def __getitem__(self, n: int) -> Tensor:
        return self.flat[: self.rows * n].view(self.rows, n)


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
        pairs = scene.counted * k  # or (B, 1)
        needs_gradient = ctx.needs_input_grad[0]
        if needs_gradient and gallery.rounded:
            total, gradient = (_rounded_euclidean if euclidean else _rounded_cosine)(e, scene, gallery.rounded, sign)
            ctx.save_for_backward(gradient.mul_(sign / pairs))
            return total[:, None].mul_(sign / pairs)[:, 0].clamp_min_(0.0)
        c = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
        length = e.square().sum(1, keepdim=True)  # (B, 1)
        floor = (_NOISE * gallery.scale.square()).clamp_min(1e-30)
        value, count = torch.zeros_like(length), torch.zeros_like(c)
        pull, weight = torch.zeros_like(e), torch.zeros_like(length)
        for s in blocks((scene.abreast or len(e)) * k, n, e.device):
            entries = gallery.embeddings[s]
            if euclidean:
                d = torch.addmm(gallery.square[s], e, entries.t(), alpha=-2.0)  # (B, n)
                d = torch.maximum(d.add_(length), floor, out=d).sqrt_()
            else:
                d = torch.mm(e, entries.t()).neg_().add_(1.0)
            if scene.ignored is not None:
                d.masked_fill_(scene.ignored[:, s], -sign * torch.inf)  # where the hinge is zero
            gap = (d[:, None, :] - c[:, :, None]).mul_(sign).clamp_min_(0.0)  # (B, K, n)
            value += gap.sum((1, 2))[:, None]
            if not needs_gradient:
                continue
            active = gap.sign_()
            count += active.sum(2)
            slope = active[:, 0] if k == 1 else active.sum(1)  # (B, n)
            if euclidean:
                slope = slope.div_(d)
                weight += slope.sum(1, keepdim=True)
            pull.addmm_(*_touched(slope, entries))
        if needs_gradient:
            if euclidean:  # each distance pulls along (e - X) / d
                to_targets = torch.where(c > floor.sqrt(), count / c.clamp_min(1e-30), 0.0)  # (B, K)
                away = to_targets.sum(1, keepdim=True) * e - (to_targets[:, :, None] * scene.targets).sum(1)
                gradient = weight * e - pull - away
            else:
                gradient = (count[:, :, None] * scene.targets).sum(1) - pull
            ctx.save_for_backward(gradient.mul_(sign / pairs))
        return value.div_(pairs)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None


def _ahead(values: Tensor, level: Tensor, sign: float, out: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """``out`` (B, n) gets how many of ``level`` (B, K) each value is beyond, ``count`` (B, K) how many values are."""
    compare = torch.gt if sign > 0 else torch.lt
    for k in range(level.shape[1]):
        one = out if k == 0 else mask
        compare(values, level[:, k : k + 1], out=one)
        count[:, k] += one.sum(1, dtype=count.dtype)
        if k:
            out.add_(one)
    return out


def _rounded_cosine(e: Tensor, scene: Scene, rounded: RoundedGallery, sign: float) -> tuple[Tensor, Tensor]:
    """(B,) sum of d(e, X) - d(e, t_k) where it has the sign, (B, D) its gradient; products in integers."""
    near = rounded.query(e)
    level = near.products(rounded.codes[scene.chosen])  # (B, K)
    count, pull, more = torch.zeros_like(level), *(torch.zeros_like(e, dtype=torch.int32) for _ in range(2))
    parts = list(blocks(len(e), len(rounded), e.device))
    products, actives, masks = (
        _Room(e, len(e), parts[0].stop, dtype) for dtype in (torch.int32, torch.int8, torch.int8)
    )
    for s in parts:
        codes, n = rounded.codes[s], s.stop - s.start
        product = torch._int_mm(near.codes, codes.t(), out=products[n])  # (B, n)
        if scene.ignored is not None:
            product.masked_fill_(scene.ignored[:, s], round(sign) * torch.iinfo(torch.int32).max)  # ahead of nothing
        active = _ahead(product, level, -sign, actives[n], masks[n], count)
        pull += torch._int_mm(active, codes, out=more)
    away = count.sum(1, keepdim=True) * rounded.centre + pull * rounded.step
    away -= (count[:, :, None] * scene.targets).sum(1)
    return -(e * away).sum(1), away.neg_()


def pull_units(c: Float[Tensor, "B K"], sign: float) -> Float[Tensor, "B 1"]:
    """What one of an 8-bit pull stands for, by the distances to an image's targets (all above 0).

    An entry ahead of j targets at distance d pulls with j / d. Entries beyond targets (``sign`` 1) pull with at most
    the largest j / (j-th smallest target distance), which becomes 127. Nearer ones (-1) have no such bound: the
    farthest of them gets 16, and what one nearer than an eighth of that distance has above 127 is to be added apart.
    """
    if sign < 0:
        return 1.0 / (PULL * c.amax(1, keepdim=True))
    ahead = torch.arange(1, c.shape[1] + 1, device=c.device)
    return (ahead / c.sort(1).values).amax(1, keepdim=True) / LEVELS


def _rounded_euclidean(e: Tensor, scene: Scene, rounded: RoundedGallery, sign: float) -> tuple[Tensor, Tensor]:
    """The same for Euclidean distances: which entries count and how much each pulls, in whole numbers of a unit."""
    near, floor = rounded.query(e), float(rounded.noise)
    unit, rest = -2.0 * near.unit, e.square().sum(1, keepdim=True) - 2.0 * near.base  # (B, 1)
    level = near.products(rounded.codes[scene.chosen]) * unit + rounded.square[scene.chosen] + rest  # (B, K)
    level = level.clamp_min_(floor).mul_(1.0 + sign * _TIE)
    one = pull_units(level.sqrt(), sign)  # (B, 1)
    scale = 1.0 / one
    count, value = torch.zeros_like(level), torch.zeros_like(unit)
    pull = torch.zeros_like(e, dtype=torch.int32 if len(rounded) <= MOST else torch.int64)
    heavy, strong = torch.zeros_like(unit), torch.zeros_like(e)
    weight, more = torch.zeros_like(unit, dtype=torch.int64), torch.zeros_like(e, dtype=torch.int32)
    parts = list(blocks(ROUNDED_IMAGES, len(rounded), e.device))
    products, distances, actives, masks, pulls = (
        _Room(e, len(e), parts[0].stop, dtype) for dtype in (torch.int32, None, None, None, torch.int8)
    )
    for s in parts:
        codes, n = rounded.codes[s], s.stop - s.start
        d = distances[n].copy_(torch._int_mm(near.codes, codes.t(), out=products[n]))  # (B, n)
        d = torch.addcmul(rounded.square[s], d, unit, out=d).add_(rest).clamp_min_(floor)
        if scene.ignored is not None:
            d.masked_fill_(scene.ignored[:, s], floor if sign > 0 else _FAR)  # ahead of nothing
        active = _ahead(d, level, sign, actives[n], masks[n], count)
        value += torch.mul(d.sqrt_(), active, out=masks[n]).sum(1, keepdim=True)
        slope = active.div_(d).mul_(scale)
        if sign < 0 and not float(slope.amax()) <= LEVELS:  # so a row of NaN hides none of the others
            some = (slope > LEVELS).any(0).nonzero()[:, 0]
            above = (slope[:, some] - LEVELS).clamp_min_(0.0)
            heavy += above.sum(1, keepdim=True)
            strong.addmm_(above, codes[some].float())
            slope.clamp_max_(LEVELS)
        coarse = pulls[n].copy_(slope.round_())
        weight += coarse.sum(1, keepdim=True, dtype=torch.int32)
        pull += torch._int_mm(coarse, codes, out=more)
    c = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
    to_targets = torch.where(c > floor**0.5, count / c.clamp_min(1e-30), 0.0)  # (B, K)
    away = to_targets.sum(1, keepdim=True) * e - (to_targets[:, :, None] * scene.targets).sum(1)
    towards = ((weight + heavy) * (e - rounded.centre) - (pull + strong) * rounded.step).mul_(one)
    return value[:, 0] - (count * c).sum(1), towards - away


def query_hinge(e: Float[Tensor, "B D"], scene: Scene, sign: float) -> Float[Tensor, " B"]:
    """Mean over targets and entries that count of relu(sign * (d(e, X) - d(e, target))): QA+ with -1, QA- with +1."""
    return _QueryHinge.apply(e, scene, sign)  # type: ignore[no-any-return]


class _LevelHinge(torch.autograd.Function):
    """(B, K) mean over X of relu(sign * (D_kX - d_k)) for the D (B, K, N) of the scene's targets, and its slope in d."""

    @staticmethod
    def forward(ctx, d: Tensor, scene: Scene, sign: float) -> Tensor:  # type: ignore[no-untyped-def]
        fixed, ignored, counted = scene.target_distances, scene.target_ignored, scene.target_counted
        value, count = torch.zeros_like(d), torch.zeros_like(d)
        for s in blocks((scene.abreast or len(d)) * d.shape[1], fixed.shape[2], d.device):
            gap = (fixed[:, :, s] - d[:, :, None]).mul_(sign).clamp_min_(0.0)  # (B, K, n)
            if ignored is not None:
                gap.masked_fill_(ignored[:, :, s], 0.0)
            value += gap.sum(2)
            count += gap.sign_().sum(2)
        ctx.save_for_backward(count.mul_(-sign / counted))
        return value.div_(counted)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def candidate_hinge(e: Float[Tensor, "B D"], scene: Scene, sign: float) -> Float[Tensor, " B"]:
    """Mean over targets q and entries that count for q of relu(sign * (d(q, X) - d(q, e))): CA+ with -1, CA- with +1."""
    d = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
    return _LevelHinge.apply(d, scene, sign).mean(1)  # type: ignore[no-any-return]


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
    euclidean = scene.distance.metric == "euclidean"
    with torch.no_grad():
        d = scene.table
        rounded = gallery.rounded.query(e) if gallery.rounded else None
        for s in blocks(scene.abreast or len(e), len(gallery), e.device):
            entries = gallery.embeddings[s].t()
            if rounded and gallery.rounded:
                product = torch._int_mm(rounded.codes, gallery.rounded.codes[s].t())
                if euclidean:
                    torch.addcmul(gallery.square[s], product, -2.0 * rounded.unit, out=d[:, s])
                else:
                    torch.mul(product, -rounded.unit, out=d[:, s])
            elif euclidean:
                torch.addmm(gallery.square[s], e, entries, alpha=-2.0, out=d[:, s])  # (B, n)
            else:
                torch.mm(e, entries, out=d[:, s]).neg_()
        at = d.gather(1, kin).masked_fill_(~near, torch.inf).argmin(1, keepdim=True)  # (B, 1)
        d.scatter_(1, kin, -torch.inf)
        far = _highest(d if scene.ignored is None else d.masked_fill_(scene.ignored, -torch.inf))
    return far, kin.gather(1, at)[:, 0]


def nearest_entries(
    e: Float[Tensor, "B D"], scene: Scene, aimed: bool = False
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"] | None]:
    """The nearest positive, the nearest entry of another class and, if ``aimed``, that of the first target's class.

    Rows of the gallery, found in float32 without a graph; any entry where there is none. As in
    :func:`extreme_entries`, classes are looked at by their rows, so that one pass finds the nearest of the rest.
    """
    gallery = scene.gallery
    kin, _ = scene.kin_rows
    with torch.no_grad():
        entries, close = gallery.embeddings.t(), scene.table  # larger is nearer
        if scene.distance.metric == "euclidean":
            torch.addmm(gallery.square, e, entries, beta=-1.0, alpha=2.0, out=close)  # (B, N)
        else:
            torch.mm(e, entries, out=close)

        def nearest(rows: Tensor, among: Tensor) -> Tensor:
            at = close.gather(1, rows).masked_fill_(~among, -torch.inf).argmax(1, keepdim=True)  # (B, 1)
            return rows.gather(1, at)[:, 0]

        positive = nearest(kin, scene.positive_rows)
        of_target = nearest(*scene.target_rows) if aimed else None
        close.scatter_(1, kin, -torch.inf)
        negative = _highest(close if scene.ignored is None else close.masked_fill_(scene.ignored, -torch.inf))
    return positive, negative, of_target

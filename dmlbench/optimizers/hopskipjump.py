"""HopSkipJump: a search that sees decisions only (Chen, Jordan and Wainwright, IEEE S&P 2020, algorithms 1 and 2)."""

import itertools
import math

import torch
from torch import Tensor

from dmlbench.objectives import wrong_by
from dmlbench.optimizers.base import Hunt, Loss, Shown, each
from dmlbench.rng import Rng
from dmlbench.threat import Threat

PROBES = 100
"""Decisions that the first direction is estimated from; the t-th takes sqrt(t) times as many ..."""
PROBES_MOST = 10_000
"""... and no more than this."""
FIRST_PROBE = 0.1
"""Length of the first estimate's probes, [0, 1] scale; later it is the distance over the number of pixels and channels."""
LENGTHS = 10
"""Step lengths that are tried, each half of the one before: the longest that stays flipped is taken."""
TRIES = 20
"""Random images that are tried as long as no flipped one is known."""
FINEST = 23
"""Halvings beyond which float32 holds no nearer point."""


class _Spent(Exception):
    """The budget is used up."""


class _Search:
    """What is known of each image that is still searched, (b, ...); ``best`` is the nearest flipped image seen."""

    def __init__(self, loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> None:
        self.loss, self.clean, self.threat, self.rng = loss, images, threat, rng
        self.row = torch.arange(len(images), device=images.device)
        self.best, self.nearest = images.clone(), torch.full_like(images.flatten(1)[:, 0], torch.inf)
        self.left = threat.queries

    def flipped(self, x: Tensor) -> Tensor:
        """(b,) bool: does each image of ``x`` flip the decision? It costs one query for each image."""
        if not self.left:
            raise _Spent
        self.left -= 1
        flipped = wrong_by(self.loss(x))
        size = self.size(x)
        nearer = flipped & (size < self.nearest)
        self.best, self.nearest = (
            torch.where(each(nearer, x), x, self.best),
            torch.where(nearer, size, self.nearest),
        )
        return flipped

    def size(self, x: Tensor) -> Tensor:
        """(b,) how far from the clean images, in the threat's norm."""
        return self.threat.ball.size(x - self.clean)

    def began(self) -> Tensor:
        """A flipped image of each: the one that the loss shows, else a random one; the clean image where there is none."""
        if isinstance(self.loss, Shown):
            x = self.loss.shown()
            return torch.where(each(self.flipped(x), x), x, self.clean)
        x, known = self.clean, torch.zeros_like(self.row, dtype=torch.bool)
        for _ in range(TRIES):
            tried = self.rng.uniform(*x.shape[1:]).to(x.dtype)
            fresh = self.flipped(tried) & ~known
            x, known = torch.where(each(fresh, x), tried, x), known | fresh
        return x

    def at_boundary(self, x: Tensor) -> Tensor:
        """The flipped image nearest to the clean one on the way there from ``x``, by halving: along a line, for "linf" through
        ever smaller boxes around the clean image."""
        pixels = x[0].numel()
        line = self.threat.norm != "linf"
        high = torch.ones_like(self.nearest) if line else self.size(x)
        low = torch.zeros_like(high)
        for _ in range(min(FINEST, math.ceil(math.log2(pixels) * (1.5 if line else 2.0)))):
            middle = (low + high) / 2
            flipped = self.flipped(self._towards(x, middle))
            low, high = torch.where(flipped, low, middle), torch.where(flipped, middle, high)
        return self._towards(x, high)

    def _towards(self, x: Tensor, length: Tensor) -> Tensor:
        """``x`` brought nearer to the clean image: to this share of the way, or for "linf" into the box of this half width."""
        if self.threat.norm != "linf":
            return self.clean + each(length, x) * (x - self.clean)
        box = each(length, x)
        return torch.minimum(torch.maximum(x, self.clean - box), self.clean + box)

    def direction(self, x: Tensor, t: int) -> Tensor:
        """Which way leads deeper among the flipped, estimated from decisions around ``x``: the steepest unit step."""
        size = self.size(x)
        probe = each(torch.full_like(size, FIRST_PROBE) if t == 1 else (size / x[0].numel()).clamp_min(1e-12), x)
        count = min(int(PROBES * math.sqrt(t)), PROBES_MOST)
        signs, moved, both = torch.zeros_like(size), torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(count):
            draw = self.rng.uniform if self.threat.norm == "linf" else self.rng.normal
            u = draw(*x.shape[1:]).to(x.dtype)
            u = 2 * u - 1 if self.threat.norm == "linf" else u
            tried = (x + probe * u / each(u.flatten(1).norm(dim=1), x)).clamp(0, 1)
            step = (tried - x) / probe
            sign = 2.0 * self.flipped(tried).to(x.dtype) - 1.0
            signs, moved, both = signs + sign, moved + step, both + each(sign, x) * step
        mean = each(signs / count, x)
        slope = torch.where(mean.abs() == 1, mean * moved, both - mean * moved)
        return self.threat.ball.ascent(slope)

    def stepped(self, x: Tensor, direction: Tensor, t: int) -> Tensor:
        """``x`` after the longest step of distance / sqrt(t) and its halves that stays flipped; ``x`` where none does."""
        length, out = self.size(x) / math.sqrt(t), x
        done = torch.zeros_like(self.row, dtype=torch.bool)
        for _ in range(LENGTHS):
            tried = (x + each(length, x) * direction).clamp(0, 1)
            fresh = self.flipped(tried) & ~done
            out, done, length = torch.where(each(fresh, x), tried, out), done | fresh, length / 2
        return out


def hopskipjump(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """HopSkipJump: walk along the boundary of the decision ``loss <= 0``, of which nothing else is seen, towards the clean image.

    It serves attacks whose objective is such a decision: WM, MT, ME, and the decision on a pair under protocols that verify pairs.
    It looks for the nearest flipped image, which lies outside the ball as long as it is not found; ``queries`` decisions for each image,
    the same number at the same time for all. It starts from the image that the loss shows
    (:class:`~dmlbench.optimizers.base.Shown`), else from the first of 20 random ones that is flipped. Ten step lengths are always
    asked about, where the paper stops at the first that works, and the nearest flipped image of all that were
    looked at is returned, brought into the ball. Settled images of a :class:`~dmlbench.optimizers.base.Hunt` are left out.
    """
    s, out = _Search(loss, images, threat, rng), images.clone()
    try:
        x = s.began()
        for t in itertools.count(1):
            x = s.at_boundary(x)
            if isinstance(s.loss, Hunt) and not bool((alive := s.loss.unsettled()).all()):
                out[s.row] = s.best
                x, s.loss, s.rng = x[alive], s.loss[alive], s.rng[alive]
                s.row, s.clean, s.best, s.nearest = s.row[alive], s.clean[alive], s.best[alive], s.nearest[alive]
                if not len(s.row):
                    break
            x = s.stepped(x, s.direction(x, t), t)
    except _Spent:
        pass
    out[s.row] = s.best
    return threat.project(out, images)

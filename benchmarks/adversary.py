"""Searches for a misranked image that share nothing with dmlbench: own margin, own ball, own loops.

They check what dmlbench's own searches call robust (``strict_truth.py``), so a mistake there must not be repeated here.
``b`` images under attack, ``N`` gallery entries, ``D`` dimensions. Pixels lie in [0, 1].

The margin of an image is how much nearer (in squared distance) the nearest entry of another class is than the
nearest of its own: 2 e·(w - r) - |w|^2 + |r|^2 for its embedding e and these two entries w and r. At 0 or above the
image is misranked. Squared distances order entries as distances do, and as cosines do where lengths are one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Embed = Callable[[Tensor], Tensor]
Stop = Callable[[], None]
"""Called at every step; raises where the search is to end."""


@dataclass(frozen=True)
class Ball:
    """All images within ``eps`` of a clean one, by the largest change of a pixel ("linf") or the length of it ("l2")."""

    norm: str
    eps: float

    def project(self, images: Tensor, clean: Tensor, wider: float = 1.0) -> Tensor:
        """The images pulled back into the ball, ``wider`` times as large, and into [0, 1]."""
        moved, eps = images - clean, self.eps * wider
        if self.norm == "linf":
            moved = moved.clamp(-eps, eps)
        else:
            moved = moved * (eps / _lengths(moved).clamp_min(1e-20)).clamp_max(1.0)
        return (clean + moved).clamp(0.0, 1.0)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The step of length one that climbs most."""
        return gradient.sign() if self.norm == "linf" else gradient / _lengths(gradient).clamp_min(1e-20)

    def start(self, clean: Tensor, seeds: Sequence[int], corner: bool) -> Tensor:
        """A random image of each ball, one seed each: on its corners (its surface in "l2") or uniform inside it."""
        moved = torch.empty(clean.shape)
        for i, seed in enumerate(seeds):
            dice = torch.Generator().manual_seed(seed)
            if self.norm == "linf":
                one = torch.rand(clean.shape[1:], generator=dice) * 2 - 1
                moved[i] = one.sign() if corner else one
            else:
                one = torch.randn(clean.shape[1:], generator=dice)
                inside = 1.0 if corner else float(torch.rand((), generator=dice)) ** (1 / one.numel())
                moved[i] = one / one.norm() * inside
        return self.project(clean + self.eps * moved.to(clean.device), clean)


def _lengths(images: Tensor) -> Tensor:
    """(b, 1, 1, 1) length of each image as a vector."""
    return images.flatten(1).norm(dim=1).view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True, eq=False)
class Field:
    """The gallery and the queries in it.

    Attributes:
        embed: images (b, C, H, W) to embeddings (b, D).
        entries: (N, D) embeddings of the gallery.
        classes: (N,) their labels.
        labels: (Q,) the queries' labels.
        own: (Q,) each query's own entry, -1 where it has none.
        clean: (Q, C, H, W) the queries' images.
        groups: (Q, G) of the queries and (N, G) of the entries, whole numbers: an entry with the same number of 0 or more
            as a query in one column does not count for it.
    """

    embed: Embed
    entries: Tensor
    classes: Tensor
    labels: Tensor
    own: Tensor
    clean: Tensor
    groups: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _square(self) -> Tensor:
        return self.entries.square().sum(1)

    def near(self, e: Tensor, q: Tensor) -> Tensor:
        """(b, N) how near each entry is: minus its squared distance, but for the same |e|^2 in all of a row; -inf
        where it does not count for the query."""
        near = 2 * e @ self.entries.T - self._square
        for mine, theirs in zip(self.groups[0][q].T, self.groups[1].T, strict=True) if self.groups else ():
            near.masked_fill_((mine[:, None] == theirs) & (mine[:, None] >= 0), -math.inf)
        return near

    def margin(self, e: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of embeddings (b, D) of the queries ``q`` (b,): the margin, the nearest wrong and the nearest right entry."""
        near, kin = self.near(e, q), self.labels[q, None] == self.classes
        wrong = near.masked_fill(kin, -math.inf).max(1)
        near.masked_fill_(~kin, -math.inf)
        has_own = (self.own[q] >= 0).nonzero()[:, 0]
        near[has_own, self.own[q[has_own]]] = -math.inf
        right = near.max(1)
        return wrong.values - right.values, wrong.indices, right.indices

    def wrong_entries(self, q: Tensor, count: int) -> Tensor:
        """(b, k) the entries of other classes nearest to the clean queries, nearest first.

        k is ``count``, or as many as every query has.
        """
        with torch.no_grad():
            near = self.near(self.embed(self.clean[q]), q)
        near = near.masked_fill(self.labels[q, None] == self.classes, -math.inf)
        return near.topk(min(count, int(near.isfinite().sum(1).min())), dim=1).indices


@dataclass
class Found:
    """What a search made of its images.

    Attributes:
        broken: (b,) bool, whether it saw a misranked image; none where another image of the same query was broken first.
        images: (b, C, H, W) the misranked image, else the start.
        best: (b,) the largest margin seen inside the ball.
        passes: forward passes of one image, each with a backward one in a search along gradients.
    """

    broken: Tensor
    images: Tensor
    best: Tensor
    passes: int = 0

    def note(self, at: Tensor, margins: Tensor, images: Tensor) -> Tensor:
        """One more look at the images ``at``; which of them are misranked now."""
        self.passes += len(at)
        self.best[at] = torch.maximum(self.best[at], margins)
        hit = margins >= 0
        self.broken[at[hit]] = True
        self.images[at[hit]] = images[hit]
        return hit


def climb(
    field: Field,
    ball: Ball,
    q: Tensor,
    start: Tensor,
    *,
    steps: int,
    momentum: float = 0.75,
    first: float = 1.0,
    wider: float = 1.0,
    targets: Tensor | None = None,
    along: Field | None = None,
    stop: Stop = lambda: None,
) -> Found:
    """Projected gradient ascent of the margin from ``start`` (b, C, H, W) for the queries ``q`` (b,).

    v <- momentum·v + g/mean|g|, then a step along v whose length falls from ``first``·eps to 0 by a cosine.

    Args:
        wider: the ball begins this many times as large and shrinks to its own size within half of the steps;
            only images inside it count.
        targets: (b,) entries to come near to, in place of the nearest wrong one of each step.
        along: another model's field, whose margin is climbed; what counts is still the margin of ``field``.
    """
    found = Found(torch.zeros(len(q), dtype=torch.bool, device=q.device), start.clone(), _lowest(q))
    at, x, v = torch.arange(len(q), device=q.device), start, torch.zeros_like(start)
    for k in range(steps + 1):
        stop()
        reach = 1 + (wider - 1) * max(0.0, 1 - 2 * k / steps)
        x = x.detach().requires_grad_(k < steps)
        with torch.set_grad_enabled(along is None):
            e = field.embed(x)
        margins, wrong, right = field.margin(e.detach(), q[at])
        left = torch.ones_like(at, dtype=torch.bool)
        if reach > 1:
            found.passes += len(at)
        elif bool((hit := found.note(at, margins, x.detach())).any()):
            left = ~torch.isin(q[at], q[at[hit]])
        if k == steps or not bool(left.any()):
            break
        seen = field
        if along is not None:
            seen, e = along, along.embed(x)
            _, wrong, right = along.margin(e.detach(), q[at])
        toward = wrong if targets is None else targets[at]
        (gradient,) = torch.autograd.grad(e, x, seen.entries[toward] - seen.entries[right])
        v = momentum * v + gradient / gradient.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
        stride = first * ball.eps * (1 + math.cos(math.pi * k / steps)) / 2
        x = ball.project(x.detach() + stride * ball.steepest(v), field.clean[q[at]], reach)
        if not bool(left.all()):
            at, x, v = at[left], x[left], v[left]
    return found


def square(
    field: Field, ball: Ball, q: Tensor, seeds: Sequence[int], *, queries: int, stop: Stop = lambda: None
) -> Found:
    """Square (Andriushchenko et al., ECCV 2020): patches of random sign, kept where the margin grows; no gradient.

    From vertical stripes; the side of a patch is sqrt(p·H·W), p from 0.8, halved at 0.1, 0.5, 2, 5, 10, 20, 40, 60 and
    80 % of the queries, the published schedule. In "l2", for which the published search is another, a patch of
    length eps is added and the whole is pulled back into the ball.
    """
    c, h, w = field.clean.shape[1:]
    dice = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows, columns = torch.arange(h, device=q.device).view(1, 1, h, 1), torch.arange(w, device=q.device).view(1, 1, 1, w)

    def sign(draw: Tensor) -> Tensor:
        return torch.where(draw < 0.5, -1.0, 1.0).to(q.device)

    def draws(*shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g) for g in dice])

    stripes = sign(draws(c, 1, w)) * (1.0 if ball.norm == "linf" else 1 / math.sqrt(c * h * w))
    x = ball.project(field.clean[q] + ball.eps * stripes, field.clean[q])
    found = Found(torch.zeros(len(q), dtype=torch.bool, device=q.device), x.clone(), _lowest(q))
    at = torch.arange(len(q), device=q.device)
    block = 250
    for k in range(queries):
        stop()
        if (k - 1) % block == 0:
            random = draws(block, 2 + c)
        tried = x
        if k:
            halvings = sum(k / queries > share for share in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
            side = max(1, min(h, w, round(math.sqrt(0.8 / 2**halvings * h * w))))
            r = random[at.cpu(), (k - 1) % block].to(q.device)
            top = (r[:, 0] * (h - side + 1)).long().view(-1, 1, 1, 1)
            left = (r[:, 1] * (w - side + 1)).long().view(-1, 1, 1, 1)
            patch = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
            height = 2 * ball.eps if ball.norm == "linf" else ball.eps / math.sqrt(c) / side
            tried = ball.project(x + patch * sign(r[:, 2:]).view(-1, c, 1, 1) * height, field.clean[q[at]])
        with torch.no_grad():
            margins = field.margin(field.embed(tried), q[at])[0]
        better = margins > found.best[at]
        hit = found.note(at, margins, tried)
        x = torch.where(better.view(-1, 1, 1, 1), tried, x)[~hit]
        at = at[~hit]
        if not len(at):
            break
    return found


def likeliest(
    field: Field, ball: Ball, q: Tensor, moves: Tensor, count: int, stop: Stop = lambda: None
) -> tuple[Tensor, int]:
    """(b, count) which of the perturbations ``moves`` (m, C, H, W) of others bring each query nearest to being misranked.

    And how many forward passes that took.
    """
    table = torch.empty(len(q), len(moves), device=q.device)
    for i in range(len(q)):
        stop()
        with torch.no_grad():
            e = field.embed(ball.project(field.clean[q[i : i + 1]] + moves, field.clean[q[i : i + 1]]))
            table[i] = field.margin(e, q[i : i + 1].expand(len(moves)))[0]
    return table.topk(count, dim=1).indices, table.numel()


def _lowest(q: Tensor) -> Tensor:
    return torch.full((len(q),), -math.inf, device=q.device)


def seed_of(*parts: int) -> int:
    """A seed for a generator from some whole numbers, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Auto-PGD: a gradient search without a step length to choose (Croce and Hein, ICML 2020, algorithm 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmlbench.optimizers.base import DROP_EVERY, Hunt, Loss, autograd, each, keep_lower, keep_rows
from dmlbench.rng import Rng
from dmlbench.threat import Threat

RHO = 0.75
"""Share of improving steps below which a step length counts as too long."""
MOMENTUM = 0.75
"""Weight of the new step against the last one."""


def checkpoints(steps: int) -> list[int]:
    """Iterations at which step lengths are reconsidered: ceil(p_j steps), p = 0.22, then gaps that shrink by
    0.03 down to 0.06."""
    last, now = 0.0, 0.22
    marks: list[int] = []
    while now <= 1.0:
        mark = math.ceil(round(now * steps, 6))
        if mark > (marks[-1] if marks else 0):
            marks.append(mark)
        last, now = now, now + max(now - last - 0.03, 0.06)
    return marks


@dataclass(frozen=True)
class _State:
    """Where the search of each image stands: tensors (b, ...)."""

    row: Tensor
    clean: Tensor
    x: Tensor
    previous: Tensor
    value: Tensor
    best: Tensor
    lowest: Tensor
    best_gradient: Tensor
    stride: Tensor
    improved: Tensor
    """steps since the last checkpoint that lowered the loss"""
    halved: Tensor
    """was the step length halved at the last checkpoint?"""
    lowest_then: Tensor
    """the lowest loss at the last checkpoint"""


def apgd(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Auto-PGD: momentum, a first step of 2 eps, halved where it stops helping, restarted from the best image.

    ``threat.step`` is not used. Returns the best image of all iterates and restarts. A loss that is a
    :class:`~dmlbench.optimizers.base.Hunt` has its settled images left out as the search goes on.
    """
    best, lowest = None, None
    for restart in range(threat.restarts):
        rng_ = rng.fold("restart", restart) if restart else rng
        x, values = _run(loss, images, threat, rng_)
        best, lowest = (x, values) if best is None else keep_lower(best, lowest, x, values)
    assert best is not None
    return best


def _run(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> tuple[Tensor, Tensor]:
    """One restart: the best image of each row and its loss."""
    x = threat.begin(images, rng)
    value, gradient = autograd(loss, x, rng)
    out, out_value = x.clone(), value.clone()
    s = _State(
        row=torch.arange(len(x), device=x.device),
        clean=images,
        x=x,
        previous=x,
        value=value,
        best=x,
        lowest=value,
        best_gradient=gradient,
        stride=torch.full_like(value, 2 * threat.radius),
        improved=torch.zeros_like(value),
        halved=torch.ones_like(value, dtype=torch.bool),
        lowest_then=value,
    )
    marks = checkpoints(threat.steps)
    for i in range(1, threat.steps + 1):
        stepped = threat.project(s.x - each(s.stride, s.x) * threat.ball.ascent(gradient), s.clean)
        if i == 1:
            x = stepped
        else:
            x = s.x + MOMENTUM * (stepped - s.x) + (1 - MOMENTUM) * (s.x - s.previous)
            x = threat.project(x, s.clean)
        if i < threat.steps:
            value, gradient = autograd(loss, x, rng)
        else:
            with torch.no_grad():
                value = loss(x)
        better = value < s.lowest
        s = _State(
            row=s.row,
            clean=s.clean,
            x=x,
            previous=s.x,
            value=value,
            best=torch.where(each(better, x), x, s.best),
            lowest=torch.minimum(value, s.lowest),
            best_gradient=torch.where(each(better, x), gradient, s.best_gradient),
            stride=s.stride,
            improved=s.improved + (value < s.value),
            halved=s.halved,
            lowest_then=s.lowest_then,
        )
        if i in marks and i < threat.steps:
            s, gradient = _reconsider(s, gradient, i - max([m for m in marks if m < i], default=0))
        if isinstance(loss, Hunt) and i % DROP_EVERY == 0:
            alive = loss.unsettled()
            if not bool(alive.all()):
                out[s.row], out_value[s.row] = s.best, s.lowest
                s, loss, gradient, rng = keep_rows(s, alive), loss[alive], gradient[alive], rng[alive]
                if not len(s.row):
                    return out, out_value
    out[s.row], out_value[s.row] = s.best, s.lowest
    return out, out_value


def _reconsider(s: _State, gradient: Tensor, since: int) -> tuple[_State, Tensor]:
    """At a checkpoint, ``since`` steps after the last: halve the steps that do not help and go back to the best image."""
    too_long = s.improved < RHO * since
    stuck = ~s.halved & (s.lowest_then <= s.lowest)
    halve = too_long | stuck
    back = each(halve, s.x)
    gradient = torch.where(back, s.best_gradient, gradient)
    s = _State(
        row=s.row,
        clean=s.clean,
        x=torch.where(back, s.best, s.x),
        previous=s.previous,
        value=torch.where(halve, s.lowest, s.value),
        best=s.best,
        lowest=s.lowest,
        best_gradient=s.best_gradient,
        stride=torch.where(halve, s.stride / 2, s.stride),
        improved=torch.zeros_like(s.improved),
        halved=halve,
        lowest_then=s.lowest,
    )
    return s, gradient

"""Searches along a gradient with fixed steps: FGSM and its kin, PGD."""

import torch
from torch import Tensor

from dmlbench.optimizers.base import Gradient, Loss, Thinning, autograd, each, keep_lower, unwell
from dmlbench.rng import Rng
from dmlbench.threat import Threat

LEAST = 16
"""Images that a batch keeps whatever has left it: with very few rows a processor may multiply, and round, in another way."""
LOOK_EVERY = 4
"""Steps between two looks at which images may leave."""
SHARE = 1 / 16
"""Of a batch that must be able to leave before it is made smaller, which costs up to a step."""


def pgd(loss: Loss, images: Tensor, threat: Threat, rng: Rng, *, gradient: Gradient = autograd) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): ``steps`` steepest steps of length ``step``.

    Returns the last iterate, as the field reports it; with restarts, the best of the last iterates.
    """
    best, lowest = None, None
    for restart in range(threat.restarts):
        rng_ = rng.fold("restart", restart) if restart else rng
        x = _descended(loss, threat.begin(images, rng_), images, threat, rng_, gradient)
        if threat.restarts == 1:
            return x
        with torch.no_grad():
            values = loss(x)
        best, lowest = (x, values) if best is None else keep_lower(best, lowest, x, values)
    assert best is not None
    return best


def _descended(loss: Loss, start: Tensor, images: Tensor, threat: Threat, rng: Rng, gradient: Gradient) -> Tensor:
    """The last iterate of each image.

    An image whose loss is exactly 0 and that a step has left where it was stays there: a hinge that is satisfied has no
    gradient, and the next step sees the same image. Such images leave a :class:`~dmlbench.optimizers.base.Thinning` loss.
    """
    x, out, rows = start, start.clone(), torch.arange(len(start), device=start.device)
    may_leave = gradient is autograd and isinstance(loss, Thinning) and loss.steady
    for i in range(threat.steps):
        values, g = gradient(loss, x, rng)
        before, x = x, threat.stepped(x, g, images, threat.stride)
        if may_leave and (i + 1) % LOOK_EVERY == 0 and not unwell():
            alive = (values != 0) | (x != before).flatten(1).any(1)
            count = int(alive.sum())
            alive[(~alive).nonzero()[: max(0, LEAST - count), 0]] = True
            if len(x) - max(count, LEAST) >= SHARE * len(x):
                assert isinstance(loss, Thinning)
                out[rows] = x
                rows, x, images, loss = rows[alive], x[alive], images[alive], loss.thinned(alive)
            if not count:
                break
    out[rows] = x
    return out


def pgd_restarts(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """PGD from ten random starts (the threat's own number of restarts where it asks for more); the best last iterate."""
    return pgd(loss, images, threat.but(start="random", restarts=max(10, threat.restarts)), rng)


def fgsm(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015): one steepest step of length eps from the clean image."""
    _, g = autograd(loss, images, rng)
    return threat.stepped(images, g, images, threat.radius)


def r_fgsm(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """FGSM after a random step of eps / 2 (Tramer et al., 2018); the gradient's step is the other half.

    The random step is along random signs (Linf) or a random direction (L2).
    """
    half = threat.radius / 2
    x = threat.project(images + half * threat.ball.ascent(rng.normal(*images.shape[1:])), images)
    _, g = autograd(loss, x, rng)
    return threat.stepped(x, g, images, half)


def mi_fgsm(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Momentum iterative FGSM (Dong et al., 2018), decay 1, gradients scaled to unit L1 length.

    ``steps`` steps of length ``step``, where the paper takes eps / steps.
    """
    x = threat.begin(images, rng)
    momentum = torch.zeros_like(x)
    for _ in range(threat.steps):
        _, g = autograd(loss, x, rng)
        momentum = momentum + g / each(g.flatten(1).abs().sum(1).clamp_min(1e-30), g)
        x = threat.stepped(x, momentum, images, threat.stride)
    return x

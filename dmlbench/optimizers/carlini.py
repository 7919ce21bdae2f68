"""Carlini and Wagner's attack (IEEE S&P 2017), read for a search inside a ball."""

import torch
from torch import Tensor

from dmlbench.optimizers.base import Loss, autograd, each, keep_lower
from dmlbench.rng import Rng
from dmlbench.threat import Threat

ROUNDS = 6
"""Values of the trade-off c that are tried."""
TRAVEL = 5.0
"""Adam's learning rate times the number of steps, on the tanh scale: how far a pixel can go in a round."""
SHRINK = 0.98
"""Pixels are coded this much nearer to grey, so that black and white ones can move at all."""
BETA1, BETA2, TINY = 0.9, 0.999, 1e-8


def cw(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Carlini and Wagner: Adam on tanh-coded pixels for size + c * loss, c searched for each image.

    Size is the squared length (L2) or the sum of what passes eps in each pixel (Linf). The papers look for
    the smallest successful perturbation; a loss without a notion of success has none, so here c is raised
    tenfold where the round ended inside the ball, bisected once a round has left it, and the lowest loss
    of any iterate inside the ball is kept. ``steps`` iterations a round.
    """
    b = len(images)
    low, high = images.new_zeros(b), images.new_full((b,), torch.inf)
    trade = images.new_ones(b)
    best, lowest = images.clone(), loss(images)
    coded = torch.atanh((images * 2 - 1) * SHRINK)
    rate = TRAVEL / max(1, threat.steps)
    for _ in range(ROUNDS):
        w = coded.clone()
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        x = images
        for i in range(1, threat.steps + 1):
            x = (torch.tanh(w) + 1) / 2
            value, gradient = autograd(loss, x, rng)
            best, lowest = _keep(best, lowest, x, value, threat, images)
            total = _pull(x - images, threat) + each(trade, x) * gradient
            total = total * (1 - torch.tanh(w).square()) / 2
            mean, square = BETA1 * mean + (1 - BETA1) * total, BETA2 * square + (1 - BETA2) * total.square()
            w = w - rate * (mean / (1 - BETA1**i)) / ((square / (1 - BETA2**i)).sqrt() + TINY)
        x = (torch.tanh(w) + 1) / 2
        inside = threat.contains(x, images)
        x = threat.project(x, images)
        best, lowest = keep_lower(best, lowest, x, loss(x))
        low, high = torch.where(inside, trade, low), torch.where(inside, high, trade)
        trade = torch.where(torch.isinf(high), trade * 10, (low + high) / 2)
    return best


def _pull(delta: Tensor, threat: Threat) -> Tensor:
    """Gradient of the size of the perturbation."""
    if threat.norm == "l2":
        return 2 * delta
    return delta.sign() * (delta.abs() > threat.radius)


def _keep(
    best: Tensor, lowest: Tensor, x: Tensor, value: Tensor, threat: Threat, images: Tensor
) -> tuple[Tensor, Tensor]:
    """``keep_lower``, for iterates inside the ball only."""
    inside = threat.contains(x, images)
    return keep_lower(best, lowest, threat.project(x, images), torch.where(inside, value, torch.inf))

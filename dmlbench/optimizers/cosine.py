"""Short runs with momentum whose step length falls from eps to 0 along a cosine: what restarts are made of."""

import math

import torch
from torch import Tensor

from dmlbench.optimizers.base import DROP_EVERY, Hunt, Loss, autograd, each
from dmlbench.rng import Rng
from dmlbench.threat import Threat

DECAY = 0.9
"""Weight of the earlier gradients against the new one."""


def cosine(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """Steepest steps along a decaying sum of gradients, each of mean size 1; step i of n has length eps (1 + cos(pi i / n)) / 2.

    The sum is that of Dong et al. (CVPR 2018), with decay 0.9: where the loss is a minimum over many entries, the nearest one changes
    from step to step, and the sum follows what they have in common. ``threat.step`` is not used. Returns the last
    iterate of each image, which has been looked at; with restarts the best of them. Images that a
    :class:`~dmlbench.optimizers.base.Hunt` calls settled are left where they are.
    """
    best, lowest = _run(loss, images, threat, rng)
    for restart in range(1, threat.restarts):
        x, values = _run(loss, images, threat, rng.fold("restart", restart))
        better = values < lowest
        best, lowest = torch.where(each(better, x), x, best), torch.minimum(values, lowest)
    return best


def _run(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> tuple[Tensor, Tensor]:
    """One run: the last image (b, ...) and its loss (b,), infinite where the image was settled before."""
    x = threat.begin(images, rng)
    out, values = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    rows, momentum = torch.arange(len(x), device=x.device), torch.zeros_like(x)
    for i in range(threat.steps):
        _, gradient = autograd(loss, x, rng)
        momentum = DECAY * momentum + gradient / each(gradient.flatten(1).abs().mean(1).clamp_min(1e-30), gradient)
        stride = threat.radius * (1 + math.cos(math.pi * i / threat.steps)) / 2
        x = threat.project(x - stride * threat.ball.ascent(momentum), images)
        if isinstance(loss, Hunt) and (i + 1) % DROP_EVERY == 0:
            alive = loss.unsettled()
            if not bool(alive.all()):
                out[rows] = x
                rows, x, images, momentum = rows[alive], x[alive], images[alive], momentum[alive]
                loss, rng = loss[alive], rng[alive]
                if not len(rows):
                    return out, values
    with torch.no_grad():
        values[rows] = loss(x)
    out[rows] = x
    return out, values

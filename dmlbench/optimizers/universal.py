"""One perturbation for all images (Moosavi-Dezfooli et al., 2017), found by gradient steps on the mean loss."""

import torch
from torch import Tensor

from dmlbench.optimizers.base import Divisible, Loss, autograd
from dmlbench.rng import Rng
from dmlbench.threat import Threat

BLOCK = 256
"""Images whose gradients are made at a time, at most."""


def universal(loss: Loss, images: Tensor, threat: Threat, rng: Rng, *, block: int = BLOCK) -> Tensor:
    """Every image of the set with the one :func:`perturbation` that is made on all of them."""
    return worn(perturbation(loss, images, threat, rng, block=block), images, threat)


def perturbation(loss: Loss, images: Tensor, threat: Threat, rng: Rng, *, block: int = BLOCK) -> Tensor:
    """One perturbation (1, ...) to be added to every image of the set: ``steps`` steepest steps of length ``step`` on the sum.

    The set is all that the optimizer is given, so the evaluation hands it all queries at once. Starts
    from no perturbation. The paper gathers per-image minimal perturbations instead; the sum of losses
    is the usual later form. No more than ``block`` images go through the network at a time, where the loss can be
    asked about some of its images; another block moves the sum by float rounding.
    """
    block = min(block, BLOCK)
    shared = torch.zeros_like(images[:1])
    for _ in range(threat.steps):
        total = torch.zeros_like(shared)
        for a in range(0, len(images), block):
            part = slice(a, a + block) if isinstance(loss, Divisible) else slice(None)
            some = loss[part] if isinstance(loss, Divisible) else loss
            _, g = autograd(some, worn(shared, images[part], threat), rng)
            total += g.sum(0, keepdim=True)
            if not isinstance(loss, Divisible):
                break
        shared = shared - threat.stride * threat.ball.ascent(total)
        shared = _shortened(shared, threat)
    return shared


def worn(shared: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Every image with the shared perturbation, inside the ball and [0, 1]."""
    return threat.project(images + shared, images)


def _shortened(shared: Tensor, threat: Threat) -> Tensor:
    """The perturbation itself inside the ball around zero, whatever the range of pixels."""
    if threat.norm == "linf":
        return shared.clamp(-threat.radius, threat.radius)
    size = shared.flatten(1).norm(dim=1).view(-1, *[1] * (shared.dim() - 1))
    return shared * (threat.radius / size.clamp_min(1e-30)).clamp(max=1.0)

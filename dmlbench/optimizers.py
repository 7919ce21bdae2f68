"""How an adversary searches: (loss, images, Threat, Rng) to adversarial images.

Every optimizer minimises ``loss`` for each image alone inside the threat's ball and [0, 1]. A loss
maps images (b, ...) to (b,); the images may be of any trailing shape (a triplet is (3, C, H, W)).
A :data:`Gradient` gives the values (b,) and the gradient: :func:`autograd` for a white box.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.threat import Threat

Loss = Callable[[Tensor], Tensor]
Gradient = Callable[[Loss, Tensor, Rng], tuple[Tensor, Tensor]]


@runtime_checkable
class Optimizer(Protocol):
    """What every entry of :data:`OPTIMIZERS` is."""

    def __call__(self, loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
        """Adversarial images for clean ``images`` (b, ...), each inside the threat."""
        ...


def autograd(loss: Loss, images: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """Loss per image (b,) and its exact gradient; the sum over the batch exists only here."""
    with torch.enable_grad():
        x = images.detach().requires_grad_(True)
        values = loss(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient


def pgd(loss: Loss, images: Tensor, threat: Threat, rng: Rng, *, gradient: Gradient = autograd) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): ``steps`` steepest steps of length ``step``.

    Returns the last iterate, as the field reports it; with restarts, the best of the last iterates.
    """
    best, lowest = None, None
    for restart in range(threat.restarts):
        rng_ = rng.fold("restart", restart) if restart else rng
        x = threat.begin(images, rng_)
        for _ in range(threat.steps):
            _, g = gradient(loss, x, rng_)
            x = threat.project(x - threat.stride * threat.ball.ascent(g), images)
        if threat.restarts == 1:
            return x
        with torch.no_grad():
            values = loss(x)
        best, lowest = (x, values) if best is None else keep_lower(best, lowest, x, values)
    assert best is not None
    return best


def keep_lower(a: Tensor, a_loss: Tensor | None, b: Tensor, b_loss: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the one of ``a`` and ``b`` whose loss is lower (``a`` where they tie)."""
    assert a_loss is not None
    better = b_loss < a_loss
    return torch.where(better.view(-1, *[1] * (a.dim() - 1)), b, a), torch.minimum(a_loss, b_loss)


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", {"pgd": pgd})

"""Searches that see loss values only, but for Square: gradients estimated by NES and SPSA, and random noise.

An estimated gradient is descended by PGD's loop. Probes are clipped to [0, 1], as a black box takes images.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from dmlbench.optimizers.base import Loss, finite, keep_lower
from dmlbench.optimizers.gradient import pgd
from dmlbench.rng import Rng
from dmlbench.threat import Threat

POPULATION = 100
"""Loss values for one estimate, half of them mirrored."""
SPSA_PROBE = 0.01
"""Length of SPSA's probes in each pixel, on the [0, 1] scale."""
COARSE = 7
"""At 224x224 NES draws its noise at 32x32 and enlarges it this many times."""

Draw = Callable[[Tensor, Rng], Tensor]


def _normal(images: Tensor, rng: Rng) -> Tensor:
    """Normal noise; at 224x224 coarse noise enlarged, as published."""
    c, h, w = images.shape[-3:]
    if (h, w) == (32 * COARSE, 32 * COARSE) and images.dim() == 4:
        return F.interpolate(rng.normal(c, 32, 32), scale_factor=COARSE, mode="nearest")
    return rng.normal(*images.shape[1:])


def _signs(images: Tensor, rng: Rng) -> Tensor:
    return rng.signs(*images.shape[1:])


def estimated(loss: Loss, images: Tensor, rng: Rng, *, draw: Draw, length: float) -> tuple[Tensor, Tensor]:
    """Mean of the two values of the last probe (b,), and the gradient estimated from mirrored probes.

    The mean over probes u of (loss(x + length u) - loss(x - length u)) u / (2 length).
    """
    total = images.new_zeros(images.shape)
    middle = images.new_zeros(len(images))
    for _ in range(POPULATION // 2):
        u = draw(images, rng)
        up, down = loss((images + length * u).clamp(0, 1)), loss((images - length * u).clamp(0, 1))
        total += (up - down).view(-1, *[1] * (images.dim() - 1)) * u
        middle = (up + down) / 2
    return middle, finite(total / (POPULATION * length))


def nes(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """NES (Ilyas et al., 2018) as the field runs it: 100 mirrored normal probes of sigma 2 eps for each PGD step."""
    if threat.radius == 0:
        return images.clone()
    return pgd(loss, images, threat, rng, gradient=partial(estimated, draw=_normal, length=2 * threat.radius))


def spsa(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """SPSA (Uesato et al., 2018): 100 mirrored sign probes of 0.01 for each step; PGD's steps instead of Adam's."""
    return pgd(loss, images, threat, rng, gradient=partial(estimated, draw=_signs, length=SPSA_PROBE))


def noise(loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
    """The best of ``queries`` random images: even ones uniform in the ball, odd ones on its corners (Linf) or sphere.

    Not an attack but a yardstick: whatever it breaks, a search should have broken.
    """
    best, lowest = None, None
    for i in range(threat.queries):
        if i % 2:
            x = threat.project(images + threat.radius * threat.ball.ascent(rng.normal(*images.shape[1:])), images)
        else:
            x = threat.sample(images, rng)
        value = loss(x)
        best, lowest = (x, value) if best is None else keep_lower(best, lowest, x, value)
    assert best is not None
    return best

"""Common corruptions: what a camera, the weather or a codec does to a picture without any adversary.

The 15 corruptions of D. Hendrycks and T. Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations" (ICLR 2019), and their four extra ones, at five severities each. Every entry is a function (picture,
parameters, :class:`Size`, :class:`Draws`) to picture, where a picture is (H, W, C) float64 in [0, 1], grey or RGB.
:func:`corrupted` is the one to call: what it returns depends on the picture, the seed, the name and the severity alone.

Parameters are the published ones of ImageNet-C for 224 pixels and of CIFAR-10-C for 32; :class:`Size` says which hold for
a picture and how lengths grow or shrink with it. The operations are our own: what differs from the published code is said
at each (``frost``, ``glass_blur``, ``spatter``, ``zoom_blur`` and the rounding), so results are near the published sets and not the same.
"""

import hashlib

import numpy as np
from jaxtyping import UInt8

from dmlbench.corruptions.base import Corruption, Draws, Parameters, Size
from dmlbench.corruptions.effects import (
    brightness,
    contrast,
    defocus_blur,
    elastic_transform,
    fog,
    frost,
    gaussian_blur,
    gaussian_noise,
    glass_blur,
    impulse_noise,
    jpeg_compression,
    motion_blur,
    pixelate,
    saturate,
    shot_noise,
    snow,
    spatter,
    speckle_noise,
    zoom_blur,
)
from dmlbench.errors import UsageError
from dmlbench.registry import Registry
from dmlbench.rng import seed_of

SEVERITIES = (1, 2, 3, 4, 5)
_AFFINE = 244.0
"""ImageNet-C's elastic lengths are shares of 244, though its pictures are 224 wide."""


def corrupted(
    picture: UInt8[np.ndarray, "H W C"], name: str, severity: int, seed: int = 0
) -> UInt8[np.ndarray, "H W C"]:
    """The picture (grey or RGB) under one corruption; severity 0 is the picture itself.

    Values are rounded to the nearest of 256 levels (the published sets are cut off to the level below).

    Raises:
        UsageError: unknown name, severity outside 0 to 5, a picture too small, or one without the colours that it changes.
    """
    corruption = CORRUPTIONS[name]
    if severity not in (0, *SEVERITIES):
        raise UsageError(f"severity {severity} of corruption {name!r} must be 0 to {SEVERITIES[-1]}")
    height, width, channels = picture.shape
    if corruption.colour and channels == 1:
        raise UsageError(f"corruption {name!r} changes colours, and the picture is grey")
    size = Size.of(height, width)
    if severity == 0:
        return picture.copy()
    parameters = (corruption.small if size.small else corruption.large)[severity - 1]
    content = hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()
    draws = Draws(seed_of("corruption", seed, name, severity, picture.shape, content))
    changed = corruption.apply(picture / 255.0, parameters, size, draws)
    return np.rint(np.clip(changed, 0.0, 1.0) * 255.0).astype(np.uint8)


def _each(*values: int | float) -> tuple[Parameters, ...]:
    """Severities of a single parameter."""
    return tuple((value,) for value in values)


def _elastic(side: float, *shares: Parameters) -> tuple[Parameters, ...]:
    return tuple(tuple(side * share for share in three) for three in shares)


CORRUPTIONS: Registry[Corruption] = Registry(
    "corruption",
    {
        "gaussian_noise": Corruption(
            gaussian_noise, _each(0.08, 0.12, 0.18, 0.26, 0.38), _each(0.04, 0.06, 0.08, 0.09, 0.10)
        ),
        "shot_noise": Corruption(shot_noise, _each(60, 25, 12, 5, 3), _each(500, 250, 100, 75, 50)),
        "impulse_noise": Corruption(
            impulse_noise, _each(0.03, 0.06, 0.09, 0.17, 0.27), _each(0.01, 0.02, 0.03, 0.05, 0.07)
        ),
        "defocus_blur": Corruption(
            defocus_blur,
            ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ),
        "glass_blur": Corruption(
            glass_blur,
            ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ),
        "motion_blur": Corruption(
            motion_blur,
            ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ),
        "zoom_blur": Corruption(
            zoom_blur,
            ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
            ((0.01, 6), (0.01, 11), (0.01, 16), (0.01, 21), (0.01, 26)),
        ),
        "snow": Corruption(
            snow,
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
        ),
        "frost": Corruption(
            frost,
            ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ),
        "fog": Corruption(
            fog,
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ),
        "brightness": Corruption(brightness, _each(0.1, 0.2, 0.3, 0.4, 0.5), _each(0.05, 0.1, 0.15, 0.2, 0.3)),
        "contrast": Corruption(contrast, _each(0.4, 0.3, 0.2, 0.1, 0.05), _each(0.75, 0.5, 0.4, 0.3, 0.15)),
        "elastic_transform": Corruption(
            elastic_transform,
            _elastic(
                _AFFINE, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
            ),
            _elastic(32.0, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ),
        "pixelate": Corruption(pixelate, _each(0.6, 0.5, 0.4, 0.3, 0.25), _each(0.95, 0.9, 0.85, 0.75, 0.65)),
        "jpeg_compression": Corruption(jpeg_compression, _each(25, 18, 15, 10, 7), _each(80, 65, 58, 50, 40)),
        "speckle_noise": Corruption(
            speckle_noise, _each(0.15, 0.2, 0.35, 0.45, 0.6), _each(0.06, 0.1, 0.12, 0.16, 0.2), extra=True
        ),
        "gaussian_blur": Corruption(gaussian_blur, _each(1, 2, 3, 4, 6), _each(0.4, 0.6, 0.7, 0.8, 1), extra=True),
        "spatter": Corruption(
            spatter,
            (
                (0.65, 0.3, 4, 0.69, 0.6, 0),
                (0.65, 0.3, 3, 0.68, 0.6, 0),
                (0.65, 0.3, 2, 0.68, 0.5, 0),
                (0.65, 0.3, 1, 0.65, 1.5, 1),
                (0.67, 0.4, 1, 0.65, 1.5, 1),
            ),
            (
                (0.62, 0.1, 0.7, 0.7, 0.5, 0),
                (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                (0.65, 0.1, 0.5, 0.68, 0.6, 1),
            ),
            extra=True,
        ),
        "saturate": Corruption(
            saturate,
            ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
            ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
            extra=True,
            colour=True,
        ),
    },
)

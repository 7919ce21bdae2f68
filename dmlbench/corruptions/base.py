"""The record of a corruption, and its arguments besides the picture: random arrays, and the scale factor for its size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from dmlbench.errors import UsageError
from dmlbench.rng import Rng

SMALLEST = 8
"""The smallest side of a picture in pixels: below it one blur cannot be told from another."""
SMALL = 64
"""Pictures up to this side take the severities of 32 pixels, larger ones those of 224."""

Picture = Float[np.ndarray, "H W C"]
Parameters = tuple[int | float, ...]


class Draws:
    """Random arrays for one picture, always the same for one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = Rng(seed, torch.zeros(1, dtype=torch.int64))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 on the open interval (0, 1)."""
        return self._rng.uniform(*shape)[0].double().numpy()

    def between(self, low: int | float, high: int | float, *shape: int) -> np.ndarray:
        """float64, uniform from ``low`` to ``high``."""
        return np.asarray(low + (high - low) * self.uniform(*shape))

    def normal(self, *shape: int) -> np.ndarray:
        """float64, standard normal."""
        return self._rng.normal(*shape)[0].double().numpy()


@dataclass(frozen=True)
class Size:
    """How a picture's size enters: its ``side`` is the square root of height times width.

    Attributes:
        small: whether the severities of 32 pixels hold, else those of 224.
        share: side over 32 or 224: what lengths are multiplied by that are shares of the picture.
        pixel: the same, but at least 1 for small pictures: what lengths in pixels are multiplied by. A blur of less than
            a pixel is none, so pictures below 32 pixels are blurred by as many pixels as those of 32.
    """

    small: bool
    share: float
    pixel: float

    @staticmethod
    def of(height: int, width: int) -> "Size":
        """Of a picture of so many pixels.

        Raises:
            UsageError: a side is below :data:`SMALLEST`.
        """
        if min(height, width) < SMALLEST:
            raise UsageError(f"corruptions need pictures of at least {SMALLEST}x{SMALLEST}, not {height}x{width}")
        side = math.sqrt(height * width)
        small = side <= SMALL
        share = side / (32.0 if small else 224.0)
        return Size(small, share, max(1.0, share) if small else share)


Apply = Callable[[np.ndarray, Parameters, Size, Draws], np.ndarray]


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        apply: (picture, parameters, size, draws) to the corrupted picture; what leaves [0, 1] is clipped afterwards.
        large, small: the parameters of each severity, for 224 pixels and for 32.
        extra: one of the four that are not among the 15, and not in their mean.
        colour: changes nothing in grey pictures, so it is not run on them.
    """

    apply: Apply
    large: tuple[Parameters, ...]
    small: tuple[Parameters, ...]
    extra: bool = False
    colour: bool = False

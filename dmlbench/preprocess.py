"""From a decoded picture to the pixels that a network is fed: resize, centre crop, channels.

An attack works on what comes out here, scaled to [0, 1]; mean and std come after it, inside the model.
The field's 224-pixel setting resizes to exactly 256x256 (the aspect ratio is not kept) and crops the
centre 224x224; :meth:`Preprocess.standard` gives that for any larger network.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from dmlbench.errors import UsageError
from dmlbench.registry import Registry

INTERPOLATIONS: Registry[Image.Resampling] = Registry(
    "interpolation",
    {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    },
)

_WHOLE_PICTURE_BELOW = 128
"""Networks for smaller images are fed the whole picture; larger ones the centre of one 8/7 as large."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the (C, H, W) uint8 array that a network is fed.

    Attributes:
        size: (H, W) of the result, cut from the centre.
        resize: (H, W) that the whole picture is scaled to before the cut, aspect not kept; None for ``size``.
        shorter: scale the shorter side to this many pixels instead, aspect kept.
        interpolation: a name of :data:`INTERPOLATIONS`.
        channels: 1 for grey, 3 for colour.
        order: "rgb", or "bgr" for networks converted from Caffe.
    """

    size: tuple[int, int]
    resize: tuple[int, int] | None = None
    shorter: int | None = None
    interpolation: str = "bilinear"
    channels: int = 3
    order: str = "rgb"

    def __post_init__(self) -> None:
        INTERPOLATIONS[self.interpolation]
        if self.channels not in (1, 3):
            raise UsageError(f"images have 1 or 3 channels, not {self.channels}")
        if self.order not in ("rgb", "bgr"):
            raise UsageError(f"channel order {self.order!r} must be 'rgb' or 'bgr'")
        if self.resize is not None and self.shorter is not None:
            raise UsageError("a picture is resized to an exact size or by its shorter side, not both")
        scaled = self.resize or ((self.shorter,) * 2 if self.shorter is not None else self.size)
        if min(self.size) < 1 or any(s < c for s, c in zip(scaled, self.size, strict=True)):
            raise UsageError(f"cannot cut {self.size[0]}x{self.size[1]} from a picture of {scaled[0]}x{scaled[1]}")

    @classmethod
    def standard(cls, shape: tuple[int, int, int], interpolation: str = "bilinear") -> "Preprocess":
        """The field's preprocessing for a network fed (C, H, W): 224 is cut from 256, small sizes are not cut."""
        channels, height, width = shape
        large = min(height, width) >= _WHOLE_PICTURE_BELOW
        resize = (round(height * 8 / 7), round(width * 8 / 7)) if large else None
        return cls(size=(height, width), resize=resize, interpolation=interpolation, channels=channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out."""
        return (self.channels, *self.size)

    def describe(self) -> dict[str, Any]:
        """The record as plain values: what a cache is keyed by and a result records."""
        return asdict(self)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """(C, H, W) uint8 of one picture, in its own mode as decoded."""
        picture = eight_bit(picture).convert("L" if self.channels == 1 else "RGB")
        width, height = picture.size
        if self.shorter is not None:
            short = min(width, height)
            target = (self.shorter * height // short, self.shorter * width // short)
        else:
            target = self.resize or self.size
        if (height, width) != target:
            picture = picture.resize((target[1], target[0]), INTERPOLATIONS[self.interpolation])
        top, left = round((target[0] - self.size[0]) / 2), round((target[1] - self.size[1]) / 2)
        pixels = np.asarray(picture, dtype=np.uint8).reshape(*target, self.channels)
        pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        if self.order == "bgr":
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def eight_bit(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits per channel; 16-bit greys are scaled (Pillow's own conversion would cut them off).

    Raises:
        ValueError: floating-point pixels, whose range nobody knows.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.int64)
        return Image.fromarray((deep >> 8 if deep.max(initial=0) > 255 else deep).clip(0, 255).astype(np.uint8))
    return picture

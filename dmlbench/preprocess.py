"""From a decoded picture to the pixels that a network is fed: a fixed box, resize, centre crop or padding, channels.

An attack works on what comes out here, scaled to [0, 1]; mean and std come after it, inside the model.
The field's 224-pixel setting resizes to exactly 256x256 (the aspect ratio changes) and crops the
centre 224x224; :meth:`Preprocess.standard` gives that for any larger network.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

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

_NO_CROP_BELOW = 128
"""Networks for smaller images are fed the whole picture; larger ones the centre of one 8/7 as large."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the (C, H, W) uint8 array that a network is fed.

    Attributes:
        size: (H, W) of the result, cut from the centre.
        resize: (H, W) that the whole picture is scaled to before the cut, aspect not kept; None for ``size``.
        shorter: scale the shorter side to this many pixels instead, aspect kept.
        longest: scale the longest side to this many pixels instead, aspect kept; what lacks to ``size`` is padded
            on both sides.
        pad: the grey of the padding, 0 to 255.
        box: (left, top, right, bottom) in pixels, cut from the picture before anything else; right and bottom excluded.
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
    longest: int | None = None
    pad: int = 0
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        INTERPOLATIONS[self.interpolation]
        if self.channels not in (1, 3):
            raise UsageError(f"images have 1 or 3 channels, not {self.channels}")
        if self.order not in ("rgb", "bgr"):
            raise UsageError(f"channel order {self.order!r} must be 'rgb' or 'bgr'")
        if sum(way is not None for way in (self.resize, self.shorter, self.longest)) > 1:
            raise UsageError("a picture is resized to an exact size, by its shorter or by its longest side, not both")
        if not 0 <= self.pad <= 255:
            raise UsageError(f"padding is a grey from 0 to 255, not {self.pad}")
        if self.box is not None and not (0 <= self.box[0] < self.box[2] and 0 <= self.box[1] < self.box[3]):
            raise UsageError(f"box {self.box} is not (left, top, right, bottom) with left < right and top < bottom")
        if self.longest is not None and not 1 <= self.longest <= min(self.size):
            raise UsageError(f"a longest side of {self.longest} does not fit into {self.size[0]}x{self.size[1]}")
        scaled = self.resize or ((self.shorter,) * 2 if self.shorter is not None else self.size)
        if min(self.size) < 1 or any(s < c for s, c in zip(scaled, self.size, strict=True)):
            raise UsageError(f"cannot cut {self.size[0]}x{self.size[1]} from a picture of {scaled[0]}x{scaled[1]}")

    @classmethod
    def standard(cls, shape: tuple[int, int, int], interpolation: str = "bilinear") -> "Preprocess":
        """The field's preprocessing for a network fed (C, H, W): 224 is cut from 256, small sizes are not cut."""
        channels, height, width = shape
        large = min(height, width) >= _NO_CROP_BELOW
        resize = (round(height * 8 / 7), round(width * 8 / 7)) if large else None
        return cls(size=(height, width), resize=resize, interpolation=interpolation, channels=channels)

    def red_first(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images as a network is fed them, in the order of colours that a picture has; and back again."""
        return images.flip(1) if self.order == "bgr" else images

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out."""
        return (self.channels, *self.size)

    def describe(self) -> dict[str, Any]:
        """The record as plain values: what a cache is keyed by.

        What is not used is left out, so that a new way to prepare pictures changes no key of the others.
        """
        fields_by_name = asdict(self)
        unused = [] if self.longest is not None else ["longest", "pad"]
        return {k: v for k, v in fields_by_name.items() if k not in unused and not (k == "box" and v is None)}

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """(C, H, W) uint8 of one picture, in its own mode as decoded.

        Raises:
            ValueError: pixels without a known range, or a picture that does not hold the box.
        """
        if self.box is not None:
            if self.box[2] > picture.width or self.box[3] > picture.height:
                raise ValueError(f"a picture of {picture.width}x{picture.height} does not hold the box {self.box}")
            picture = picture.crop(self.box)
        picture = eight_bit(picture).convert("L" if self.channels == 1 else "RGB")
        target = self._target(*picture.size)
        if picture.size != target[::-1]:
            picture = picture.resize(target[::-1], INTERPOLATIONS[self.interpolation])
        pixels = np.asarray(picture, dtype=np.uint8).reshape(*target, self.channels)
        if self.longest is not None:
            pixels = self._padded(pixels)
        top, left = round((pixels.shape[0] - self.size[0]) / 2), round((pixels.shape[1] - self.size[1]) / 2)
        pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        if self.order == "bgr":
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(H, W) that a picture is scaled to."""
        if self.shorter is not None:
            short = min(width, height)
            return self.shorter * height // short, self.shorter * width // short
        if self.longest is not None:
            scale = self.longest / max(width, height)
            return max(1, round(height * scale)), max(1, round(width * scale))
        return self.resize or self.size

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, channels) of ``size``, the picture in the middle; an odd row or column more goes below or right."""
        lacks = [size - side for size, side in zip(self.size, pixels.shape[:2], strict=True)]
        around = [(lack // 2, lack - lack // 2) for lack in lacks]
        return np.pad(pixels, (*around, (0, 0)), constant_values=self.pad)


def eight_bit(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits per channel; 16-bit greys are scaled (Pillow's own conversion would cut them off).

    Raises:
        ValueError: floating-point pixels, or integers beyond 16 bits, whose range nobody knows.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.size and not 0 <= deep.min() <= deep.max() < 1 << 16:
            raise ValueError(f"pixels from {deep.min()} to {deep.max()} have no known range")
        return Image.fromarray((deep >> 8 if deep.max(initial=0) > 255 else deep).astype(np.uint8))
    return picture

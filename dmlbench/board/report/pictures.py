"""Arrays as pictures inside a page: PNG in a data address, whole pixels enlarged without blur."""

import base64
import io

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

SIDE = 96
"""What pictures are enlarged to at least, in pixels, by a whole factor."""


def data_uri(image: Shaped[np.ndarray, "c h w"]) -> str:
    """A PNG of an image, uint8 or float in [0, 1], of 1 or 3 channels."""
    pixels = image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    factor = max(1, SIDE // max(shown.size))
    if factor > 1:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def magnified(change: Float[np.ndarray, "c h w"]) -> tuple[Float[np.ndarray, "c h w"], float]:
    """A perturbation as a picture, and by how much it was magnified: no change is mid grey, the largest is full."""
    largest = float(np.abs(change).max())
    factor = 0.5 / largest if largest > 0 else 1.0
    return 0.5 + change * factor, factor

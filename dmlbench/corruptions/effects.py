"""The corruptions themselves: functions (picture, parameters, :class:`Size`, :class:`Draws`) to picture.

A picture is (H, W, C) float64 in [0, 1], grey or RGB; what leaves [0, 1] is clipped afterwards.
"""

import io
import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.ndimage import convolve1d, distance_transform_edt, gaussian_filter, gaussian_filter1d, map_coordinates
from scipy.special import pdtr

from dmlbench.corruptions.base import Draws, Parameters, Picture, Size

LUMA = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in grey (ITU-R BT.601)."""
TURQUOISE = np.array([175.0, 238.0, 238.0]) / 255.0
MUD = np.array([63.0, 42.0, 20.0]) / 255.0
ICE = np.array([0.82, 0.91, 1.0])


def gaussian_noise(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Normal noise of one standard deviation on every value."""
    return x + c[0] * draws.normal(*x.shape)


@lru_cache(maxsize=16)
def _poisson(photons: int | float) -> Float[np.ndarray, "256 n"]:
    """The distribution function of counts 0, 1, ... for each of 256 levels of brightness, of which the last has ``photons``."""
    most = math.ceil(photons + 10.0 * math.sqrt(photons) + 20.0)  # beyond what the 24 bits of a draw reach
    return pdtr(np.arange(most), np.arange(256)[:, None] / 255.0 * photons)


def shot_noise(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Poisson counts of so many photons at full brightness, by the inverse of their distribution function."""
    below, level = _poisson(c[0]), np.rint(x * 255.0).astype(np.int64)
    ascending = (below + 2.0 * np.arange(256)[:, None]).ravel()
    count = np.searchsorted(ascending, draws.uniform(*x.shape) + 2.0 * level) - level * below.shape[1]
    return count / c[0]


def impulse_noise(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """A share of all values is set to 0 or 1, half of it to each."""
    hit, white = draws.uniform(*x.shape) < c[0], draws.uniform(*x.shape) < 0.5
    return np.where(hit, white.astype(np.float64), x)


def speckle_noise(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Normal noise in proportion to the value."""
    return x + c[0] * x * draws.normal(*x.shape)


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    """Along height and width, the edge pixels repeated outside."""
    return gaussian_filter(x, (sigma, sigma, *[0.0] * (x.ndim - 2)), mode="nearest")


def gaussian_blur(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """A Gaussian of one standard deviation in pixels."""
    return _blurred(x, c[0] * size.pixel)


def defocus_blur(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """The mean over a disk of one radius, its rim softened by a Gaussian; the picture is mirrored at its edges."""
    from scipy.signal import fftconvolve  # which takes a second

    radius, soft = c[0] * size.pixel, c[1] * size.pixel
    reach = 1 if radius <= 8 else 2
    half = math.floor(radius) + reach
    at = np.arange(-half, half + 1)
    disk = (at[:, None] ** 2 + at[None, :] ** 2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / soft) ** 2)
    for axis in (0, 1):
        disk = convolve1d(disk, weights, axis=axis, mode="constant")
    wide = np.pad(x, ((half, half), (half, half), (0, 0)), mode="reflect")
    return fftconvolve(wide, (disk / disk.sum())[:, :, None], mode="valid", axes=(0, 1))


def glass_blur(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Between two Gaussian blurs every pixel, from the last to the first, changes places with one near it, several times.

    The published code copies the near pixel instead, since it assigns to views.
    """
    sigma, reach, times = c[0] * size.pixel, max(1, round(c[1] * size.pixel)), int(c[2])
    height, width, channels = x.shape
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    order = list(range(height * width))
    for _ in range(times):
        jumps = np.floor(draws.between(-reach, reach, 2, len(rows), len(columns))).astype(np.int64)
        there = (jumps[0] * width + jumps[1]).ravel().tolist()
        here = (h * width + w for h in rows for w in columns)
        for a, jump in zip(here, there, strict=True):
            b = a + jump
            order[a], order[b] = order[b], order[a]
    return _blurred(_blurred(x, sigma).reshape(-1, channels)[order].reshape(x.shape), sigma)


def _dragged(x: Picture, radius: int | float, sigma: int | float, angle: float) -> Picture:
    """The weighted mean of the picture and its copies moved along one direction, weights one side of a Gaussian.

    As ImageMagick's motion blur: 2 ceil(radius) + 1 copies, moved by 0, 1, ... pixels, rounded; edge pixels are repeated.
    ``angle`` in degrees, clockwise from the horizontal.
    """
    count = 2 * math.ceil(radius) + 1
    weights = np.exp(-0.5 * (np.arange(count) / sigma) ** 2)
    weights /= weights.sum()
    turn = math.radians(angle)
    down = np.rint(np.arange(count) * math.sin(turn)).astype(int)
    right = np.rint(np.arange(count) * math.cos(turn)).astype(int)
    height, width, _ = x.shape
    wide = np.pad(x, ((count, count), (count, count), (0, 0)), mode="edge")
    out = np.zeros_like(x)
    for w, dy, dx in zip(weights, down, right, strict=True):
        out += w * wide[count + dy : count + dy + height, count + dx : count + dx + width]
    return out


def motion_blur(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Dragged along a direction within 45 degrees of the horizontal."""
    return _dragged(x, c[0] * size.pixel, c[1] * size.pixel, float(draws.between(-45.0, 45.0)))


@lru_cache(maxsize=256)
def _zoom(count: int, factor: float) -> Float[np.ndarray, "n n"]:
    """Linear interpolation at ``count`` points that are ``factor`` times denser about the middle."""
    middle = (count - 1) / 2
    at = middle + (np.arange(count) - middle) / factor
    return np.clip(1.0 - np.abs(at[:, None] - np.arange(count)), 0.0, None)


def _zoomed(x: Picture, factor: float) -> Picture:
    """The middle of the picture enlarged to its size."""
    rows, columns = _zoom(x.shape[0], factor), _zoom(x.shape[1], factor)
    return np.stack([rows @ x[:, :, k] @ columns.T for k in range(x.shape[2])], axis=2)


def zoom_blur(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """The mean of the picture and of its enlargements by 1, 1 + step, ... up to the largest.

    At severity 1 the published code has one enlargement more, which its range of floats reaches by rounding.
    """
    step, times = c[0], int(c[1])
    return (x + sum(_zoomed(x, 1.0 + step * k) for k in range(times))) / (times + 1)


def plasma(side: int, decay: int | float, draws: Draws) -> Float[np.ndarray, "n n"]:
    """A cloud by the diamond-square algorithm on a torus, from 0 to 1; n is the power of two that holds ``side``.

    At every halving of the distance the noise is divided by decay squared, as the published code does.
    """
    n = 1 << max(1, math.ceil(math.log2(side)))
    cloud, distance, noise = np.zeros((n, n)), n, 1.0

    def set_means(rows: tuple[int, int], corners: tuple[tuple[int, int], ...]) -> None:
        """At every point that is ``rows`` from the grid: the mean of four others that lie so far from it, and noise."""
        half = (slice(rows[0], None, distance), slice(rows[1], None, distance))
        near = sum(np.roll(cloud, (-dy, -dx), (0, 1))[half] for dy, dx in corners) / 4.0
        cloud[half] = near + noise * draws.between(-1.0, 1.0, *cloud[half].shape)

    while distance >= 2:
        h = distance // 2
        square = ((-h, -h), (-h, h), (h, -h), (h, h))
        diamond = ((-h, 0), (h, 0), (0, -h), (0, h))
        set_means((h, h), square)
        set_means((0, h), diamond)
        set_means((h, 0), diamond)
        distance, noise = h, noise / decay**2
    cloud -= cloud.min()
    return cloud / cloud.max()


def _tint(colour: np.ndarray, x: Picture) -> np.ndarray:
    """A colour (3,) as the picture has it: (C,)."""
    return colour if x.shape[2] == 3 else (colour @ LUMA)[None]


def fog(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """A cloud is added, and the whole darkened to the picture's own brightest value."""
    thick, decay = c
    height, width, _ = x.shape
    cloud = plasma(max(height, width), decay, draws)[:height, :width, None]
    return (x + thick * cloud) * x.max() / (x.max() + thick)


def frost(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Ice over the picture: ``c[0]`` of the picture and ``c[1]`` of the ice.

    The published code takes photographs of frost, which we do not have: ours is drawn, bright ridges in two clouds on a pane
    that is half bright, so this corruption is not the published one.
    """
    height, width, _ = x.shape
    ridges = [
        1.0 - np.abs(2.0 * plasma(max(height, width), decay, draws)[:height, :width] - 1.0) for decay in (1.2, 1.5)
    ]
    ice = 0.25 + 0.75 * np.maximum(ridges[0] ** 4, ridges[1] ** 8)
    return c[0] * x + c[1] * ice[:, :, None] * _tint(ICE, x)


def snow(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Dragged flakes, and the same ones turned by half a turn, on a picture made whiter."""
    mean, spread, zoom, least, radius, sigma, keep = c
    flakes = mean + spread * draws.normal(*x.shape[:2], 1)
    flakes = _zoomed(flakes, max(1.0, zoom * size.pixel))
    flakes = np.where(flakes < least, 0.0, flakes).clip(0.0, 1.0)
    flakes = _dragged(flakes, radius * size.pixel, sigma * size.pixel, float(draws.between(45.0, 135.0)))
    grey = x @ LUMA[:, None] if x.shape[2] == 3 else x
    return keep * x + (1.0 - keep) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


def spatter(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Drops of water (the first severities) or of mud (the last two) on the lens, where smoothed noise is above a level.

    The noise grows with its smoothing, so that a picture of any size is covered alike. Water is as bright as the relief of
    the drops, lit from one corner; it is made from the distance to a drop's rim (the published code finds rims by Canny's
    method and equalises the histogram of distances).
    """
    from scipy.signal import correlate2d

    mean, spread, sigma, least, strength, mud = c
    liquid = _blurred(mean + spread * size.pixel * draws.normal(*x.shape[:2]), sigma * size.pixel)
    if mud:
        cover = _blurred((liquid > least).astype(np.float64), strength * size.pixel)[:, :, None]
        cover = np.where(cover < 0.8, 0.0, cover)
        return x * (1.0 - cover) + cover * _tint(MUD, x)
    wet = liquid > least
    depth = np.minimum(distance_transform_edt(np.pad(wet, 1))[1:-1, 1:-1], 20.0)
    lit = np.array([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    relief = _blurred(correlate2d(depth, lit, mode="same", boundary="symm").clip(0.0), 0.5) * np.where(wet, liquid, 0.0)
    brightest = relief.max()
    return x + (strength * relief / brightest if brightest > 0 else relief)[:, :, None] * _tint(TURQUOISE, x)


def brightness(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """So much is added to the value of hue, saturation and value."""
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + c[0], 1.0)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1.0), brighter)


def saturate(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """The saturation of hue, saturation and value is multiplied and added to; a grey's hue is red, as HSV has it."""
    value, least = x.max(2, keepdims=True), x.min(2, keepdims=True)
    reach = value - least  # saturation times value
    saturation = np.clip(c[0] * reach / np.where(value > 0, value, 1.0) + c[1], 0.0, 1.0) * value
    hue = np.where(reach > 0, (value - x) / np.where(reach > 0, reach, 1.0), np.array([0.0, 1.0, 1.0]))
    return value - hue * saturation


def contrast(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Every value is brought nearer to its channel's mean."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + c[0] * (x - mean)


@lru_cache(maxsize=64)
def _smoothing(count: int, sigma: float) -> Float[np.ndarray, "n n"]:
    """A Gaussian along ``count`` points as a matrix, mirrored at the ends and cut off at three standard deviations."""
    return gaussian_filter1d(np.eye(count), sigma, axis=0, mode="reflect", truncate=3.0) if sigma > 0 else np.eye(count)


def elastic_transform(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Three points of the picture are moved, all others with them, and then each by smoothed noise of its own.

    ``c`` is how far the noise moves before it is smoothed, its smoothing, and how far the three points are moved at the most.
    The noise grows with the square of the size, since smoothing over more pixels takes more of it. Both movements are
    made in one interpolation.
    """
    height, width, channels = x.shape
    strength, sigma, most = c[0] * size.share**2, c[1] * size.share, c[2] * size.share
    middle, arm = np.array([height // 2, width // 2], dtype=np.float64), min(height, width) // 3
    before = middle + arm * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # (3, 2) rows and columns
    after = before + draws.between(-most, most, 3, 2)
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # (3, 2): from where each pixel comes
    rows, columns = _smoothing(height, sigma), _smoothing(width, sigma)
    moved = [strength * (rows @ draws.between(-1.0, 1.0, height, width) @ columns.T) for _ in range(2)]
    at = np.stack([*(np.indices((height, width)) + moved), np.ones((height, width))], axis=2) @ back  # (H, W, 2)
    where = [at[:, :, 0], at[:, :, 1]]
    return np.stack([map_coordinates(x[:, :, k], where, order=1, mode="mirror") for k in range(channels)], axis=2)


def _as_image(x: Picture) -> Image.Image:
    pixels = np.rint(x * 255.0).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if x.shape[2] == 1 else pixels)


def _as_picture(image: Image.Image, x: Picture) -> Picture:
    return np.asarray(image, dtype=np.float64).reshape(x.shape) / 255.0


def pixelate(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Scaled to a share of its sides and back, each pixel the mean of a box."""
    height, width, _ = x.shape
    few = _as_image(x).resize((int(width * c[0]), int(height * c[0])), Image.Resampling.BOX)
    return _as_picture(few.resize((width, height), Image.Resampling.BOX), x)


def jpeg_compression(x: Picture, c: Parameters, size: Size, draws: Draws) -> Picture:
    """Written as JPEG of one quality, and read."""
    file = io.BytesIO()
    _as_image(x).save(file, "JPEG", quality=int(c[0]))
    return _as_picture(Image.open(file), x)

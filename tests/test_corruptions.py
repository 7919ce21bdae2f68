"""Corruptions against plain loops, Pillow, colorsys and scipy; each is a function of picture, seed, name and severity."""

import colorsys
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import convolve
from scipy.stats import poisson

from dmlbench.corruptions import CORRUPTIONS, SEVERITIES, corrupted, effects
from dmlbench.corruptions.base import Draws, Size
from dmlbench.errors import UsageError

UNIT = Size(small=False, share=1.0, pixel=1.0)


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth and not symmetric, with all values from dark to bright."""
    height, width, channels = shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(5 * x + 3 * y * (k + 1) + seed) + np.cos(7 * y - 2 * k) for k in range(channels)]
    stacked = np.stack(waves, axis=2)
    return np.rint((stacked - stacked.min()) / np.ptp(stacked) * 255).astype(np.uint8)


def applies(name: str, channels: int) -> bool:
    return channels == 3 or not CORRUPTIONS[name].colour


def test_there_are_the_fifteen_and_four_extra_at_five_severities() -> None:
    extra = [name for name, c in CORRUPTIONS.items() if c.extra]
    assert len(CORRUPTIONS) == 19 and extra == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    assert all(len(c.large) == len(c.small) == len(SEVERITIES) for c in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (12, 40, 3), (80, 72, 3)])
def test_a_result_depends_on_picture_seed_name_and_severity_alone(name: str, shape: tuple[int, int, int]) -> None:
    if not applies(name, shape[2]):
        with pytest.raises(UsageError, match="changes colours"):
            corrupted(picture(*shape), name, 1)
        return
    x, kept = picture(*shape), picture(*shape)
    found = [corrupted(x, name, s, seed=5) for s in SEVERITIES]
    corrupted(picture(*shape, seed=3), name, 1, seed=6)
    for severity, y in zip(reversed(SEVERITIES), reversed(found), strict=True):
        assert y.shape == x.shape and y.dtype == np.uint8
        assert (corrupted(np.asfortranarray(x), name, severity, seed=5) == y).all()
    assert (x == kept).all()
    assert (corrupted(x, name, 0, seed=5) == x).all()
    assert (found[-1] != x).any()


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow"])
def test_another_seed_another_result(name: str) -> None:
    x = picture(32, 32, 3)
    assert (corrupted(x, name, 5, seed=0) != corrupted(x, name, 5, seed=1)).any()


@pytest.mark.parametrize(
    "name",
    ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "contrast"],
)
@pytest.mark.parametrize("shape", [(32, 32, 3), (112, 96, 3)])
def test_a_higher_severity_is_farther_from_the_picture(name: str, shape: tuple[int, int, int]) -> None:
    x = picture(*shape)
    away = [float(((corrupted(x, name, s) - x.astype(float)) ** 2).mean()) for s in SEVERITIES]
    assert away == sorted(away) and away[-1] > away[0] > 0


def test_published_severities_hold_at_224_and_32_and_lengths_follow_the_side() -> None:
    assert Size.of(224, 224) == Size(False, 1.0, 1.0) and Size.of(32, 32) == Size(True, 1.0, 1.0)
    assert Size.of(112, 112) == Size(False, 0.5, 0.5)
    assert Size.of(64, 64) == Size(True, 2.0, 2.0)
    assert Size.of(8, 8) == Size(True, 0.25, 1.0)
    assert Size.of(256, 128).share == pytest.approx(math.sqrt(256 * 128) / 224)
    with pytest.raises(UsageError, match="at least 8x8, not 7x30"):
        Size.of(7, 30)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(CORRUPTIONS)),
    st.sampled_from(SEVERITIES),
    st.integers(8, 70),
    st.integers(8, 70),
    st.sampled_from([0, 255]),
)
def test_a_picture_of_one_value_stays_a_picture(name: str, severity: int, height: int, width: int, value: int) -> None:
    x = np.full((height, width, 3), value, dtype=np.uint8)
    assert corrupted(x, name, severity).shape == x.shape


def test_unknown_names_and_severities() -> None:
    x = picture(16, 16, 3)
    with pytest.raises(UsageError, match=r"unknown corruption 'fogg'; did you mean 'fog'\?"):
        corrupted(x, "fogg", 1)
    with pytest.raises(UsageError, match="severity 6"):
        corrupted(x, "fog", 6)


def test_shot_noise_inverts_the_distribution_function() -> None:
    x, photons = picture(20, 20, 1) / 255.0, 12.0
    u = Draws(3).uniform(*x.shape)
    found = effects.shot_noise(x, (photons,), UNIT, Draws(3))
    assert np.array_equal(np.rint(found * photons), poisson.ppf(u, x * photons).clip(0))


def test_impulses_are_black_or_white_at_the_stated_share() -> None:
    x = np.full((100, 100, 3), 0.4)
    found = effects.impulse_noise(x, (0.27,), UNIT, Draws(0))
    assert set(np.unique(found)) == {0.0, 0.4, 1.0}
    for value in (0.0, 1.0):
        assert (found == value).mean() == pytest.approx(0.135, abs=0.01)


def test_glass_moves_pixels_to_near_places() -> None:
    x = np.arange(20 * 24 * 3, dtype=float).reshape(20, 24, 3)
    found = effects.glass_blur(x, (1e-6, 2, 1), UNIT, Draws(0))
    assert np.array_equal(np.sort(found, axis=None), np.sort(x, axis=None))  # nothing is lost
    assert (found != x).any()
    assert (found % 3 == np.arange(3)).all()  # whole pixels change places


def test_defocus_is_a_convolution() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((30, 26, 3))
    found = effects.defocus_blur(x, (3, 0.5), UNIT, Draws(0))
    disk = np.zeros((11, 11))
    for i in range(-3, 4):
        for j in range(-3, 4):
            disk[5 + i, 5 + j] = i * i + j * j <= 9
    soft = np.array([[math.exp(-(i * i + j * j) / 0.5) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    kernel = convolve(disk, soft, mode="constant")
    for k in range(3):
        assert np.allclose(found[:, :, k], convolve(x[:, :, k], kernel / kernel.sum(), mode="mirror"))


def test_dragging_against_a_loop() -> None:
    x = np.random.default_rng(0).random((9, 11, 2))
    radius, sigma, angle = 2.0, 1.5, 30.0
    found = effects._dragged(x, radius, sigma, angle)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(5)]
    for y in range(9):
        for z in range(11):
            total = np.zeros(2)
            for i, w in enumerate(weights):
                dy = round(i * math.sin(math.radians(angle)))
                dx = round(i * math.cos(math.radians(angle)))
                total += w * x[min(max(y + dy, 0), 8), min(max(z + dx, 0), 10)]
            assert np.allclose(found[y, z], total / sum(weights))


def test_zooming_against_a_loop() -> None:
    x = np.random.default_rng(0).random((7, 9, 1))
    found = effects._zoomed(x, 1.5)
    for i in range(7):
        for j in range(9):
            y, z = 3 + (i - 3) / 1.5, 4 + (j - 4) / 1.5
            a, b = math.floor(y), math.floor(z)
            p, q = y - a, z - b
            a2, b2 = min(a + 1, 6), min(b + 1, 8)
            wanted = (1 - p) * ((1 - q) * x[a, b] + q * x[a, b2]) + p * ((1 - q) * x[a2, b] + q * x[a2, b2])
            assert np.allclose(found[i, j], wanted)
    assert np.allclose(effects._zoomed(x, 1.0), x)


def test_a_zoom_is_the_mean_of_enlargements() -> None:
    x = np.random.default_rng(0).random((16, 16, 3))
    enlarged = [effects._zoomed(x, f) for f in (1.0, 1.02, 1.04)]
    assert np.allclose(effects.zoom_blur(x, (0.02, 3), UNIT, Draws(0)), (x + sum(enlarged)) / 4)


def plain_plasma(n: int, decay: float, draws: Draws) -> np.ndarray:
    """The diamond-square algorithm point by point, with the noise in the order in which ours draws it."""
    cloud, distance, noise = np.zeros((n, n)), n, 1.0
    while distance >= 2:
        h = distance // 2
        for top, left, corners in (
            (h, h, ((-h, -h), (-h, h), (h, -h), (h, h))),
            (0, h, ((-h, 0), (h, 0), (0, -h), (0, h))),
            (h, 0, ((-h, 0), (h, 0), (0, -h), (0, h))),
        ):
            count = n // distance
            wobble = draws.between(-1.0, 1.0, count, count)
            for i in range(count):
                for j in range(count):
                    y, x = top + i * distance, left + j * distance
                    near = [cloud[(y + dy) % n, (x + dx) % n] for dy, dx in corners]
                    cloud[y, x] = sum(near) / 4 + noise * wobble[i, j]
        distance, noise = h, noise / decay**2
    return (cloud - cloud.min()) / np.ptp(cloud)


def test_clouds_against_a_loop() -> None:
    assert np.allclose(effects.plasma(13, 1.5, Draws(2)), plain_plasma(16, 1.5, Draws(2)))


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    x = np.random.default_rng(0).random((8, 8, 3))
    x[0, 0], x[0, 1], x[0, 2] = 0.0, 0.5, 1.0
    bright = effects.brightness(x, (0.3,), UNIT, Draws(0))
    strong = effects.saturate(x, (2, 0.1), UNIT, Draws(0))
    for i in range(8):
        for j in range(8):
            h, s, v = colorsys.rgb_to_hsv(*x[i, j])
            assert np.allclose(bright[i, j], colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.3)))
            assert np.allclose(strong[i, j], colorsys.hsv_to_rgb(h, min(1.0, 2 * s + 0.1), v))


def test_contrast_is_about_each_channels_mean() -> None:
    x = np.random.default_rng(0).random((8, 8, 3))
    found = effects.contrast(x, (0.1,), UNIT, Draws(0))
    assert np.allclose(found.mean((0, 1)), x.mean((0, 1))) and np.allclose(found.std((0, 1)), 0.1 * x.std((0, 1)))


def test_an_elastic_transform_that_moves_nothing_changes_nothing() -> None:
    x = np.random.default_rng(0).random((20, 24, 3))
    assert np.allclose(effects.elastic_transform(x, (0, 0, 0), UNIT, Draws(0)), x)


def test_elastic_affine_brings_three_points_where_they_are_moved_to() -> None:
    """The picture holds its own coordinates, so the result says from where each pixel came."""
    rows, columns = np.mgrid[0:40, 0:40].astype(float)
    found = effects.elastic_transform(np.stack([rows, columns], axis=2), (0, 0, 3), UNIT, Draws(4))
    before = 20 + 13 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    after = before + Draws(4).between(-3, 3, 3, 2)
    inner = found[10:30, 10:30].reshape(-1, 2)
    where = np.column_stack([np.indices((40, 40))[:, 10:30, 10:30].reshape(2, -1).T, np.ones(400)])
    affine = np.linalg.lstsq(where, inner, rcond=None)[0]  # fitted to what came out
    assert np.allclose(np.column_stack([after, np.ones(3)]) @ affine, before, atol=1e-6)


def test_codecs_are_pillows() -> None:
    x = picture(32, 32, 3)
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=58)
    assert np.array_equal(corrupted(x, "jpeg_compression", 3), np.asarray(Image.open(file)))
    few = Image.fromarray(x).resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(corrupted(x, "pixelate", 5), np.asarray(few))


EACH_VALUE = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in (*EACH_VALUE, "jpeg_compression", "saturate")])
def test_grey_and_colour_pictures_of_one_content_are_corrupted_alike(name: str) -> None:
    """But for those whose noise differs from value to value, and JPEG, which codes colours apart; tints differ in colour."""
    x = picture(32, 32, 1) / 255.0
    c, size = CORRUPTIONS[name].small[4], Size.of(32, 32)
    grey = CORRUPTIONS[name].apply(x, c, size, Draws(1))[:, :, 0]
    colour = CORRUPTIONS[name].apply(np.repeat(x, 3, axis=2), c, size, Draws(1))
    assert np.allclose(grey, colour @ effects.LUMA, atol=1e-6)


def test_more_of_a_larger_picture_is_not_spattered() -> None:
    def covered(side: int) -> float:
        blank = np.zeros((side, side, 3))
        found = [
            effects.spatter(blank, CORRUPTIONS["spatter"].large[4], Size.of(side, side), Draws(k)) for k in range(4)
        ]
        return float(np.mean([f.max(2) > 0 for f in found]))

    assert covered(224) == pytest.approx(covered(448), abs=0.05) and covered(224) > 0.02

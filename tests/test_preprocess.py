"""Resize, crop and channels, against torchvision's transforms and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dmlbench.errors import UsageError
from dmlbench.preprocess import Preprocess


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_torchvision(picture: Image.Image, *steps: object) -> np.ndarray:
    return np.asarray(T.Compose(steps)(picture.convert("RGB"))).transpose(2, 0, 1)


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 9))
def test_the_exact_resize_is_torchvisions(width: int, height: int, seed: int) -> None:
    picture = noise(width, height, seed)
    got = Preprocess(size=(28, 28), resize=(32, 32))(picture)
    assert (got == by_torchvision(picture, T.Resize((32, 32)), T.CenterCrop(28))).all()


@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from(["bilinear", "bicubic", "nearest"]))
def test_the_shorter_side_is_torchvisions(width: int, height: int, how: str) -> None:
    picture = noise(width, height)
    got = Preprocess(size=(28, 28), shorter=33, interpolation=how)(picture)
    mode = T.InterpolationMode(how)
    assert (got == by_torchvision(picture, T.Resize(33, mode), T.CenterCrop(28))).all()


@given(st.integers(5, 90), st.integers(5, 90), st.integers(0, 255))
def test_the_longest_side_is_scaled_and_the_rest_padded(width: int, height: int, pad: int) -> None:
    picture = noise(width, height)
    got = Preprocess(size=(28, 32), longest=28, pad=pad)(picture)
    scale = 28 / max(width, height)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    inside = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    top, left = (28 - h) // 2, (32 - w) // 2
    assert (got[:, top : top + h, left : left + w] == inside).all()
    outside = np.ones((28, 32), dtype=bool)
    outside[top : top + h, left : left + w] = False
    assert (got[:, outside] == pad).all()


def test_a_box_is_cut_first() -> None:
    picture = noise(60, 50)
    got = Preprocess(size=(8, 8), box=(10, 20, 40, 50))(picture)
    assert (got == by_torchvision(picture.crop((10, 20, 40, 50)), T.Resize((8, 8)))).all()
    with pytest.raises(ValueError, match=r"60x50 does not hold the box"):
        Preprocess(size=(8, 8), box=(10, 20, 61, 50))(picture)


def test_what_is_not_used_changes_no_key() -> None:
    """Caches and results are known by the description: it stays as it was for what was there before."""
    plain = {
        "size": (8, 8),
        "resize": None,
        "shorter": None,
        "interpolation": "bilinear",
        "channels": 3,
        "order": "rgb",
    }
    assert Preprocess(size=(8, 8)).describe() == plain
    assert Preprocess(size=(8, 8), longest=8, pad=3).describe() == {**plain, "longest": 8, "pad": 3}
    assert Preprocess(size=(8, 8), box=(0, 0, 4, 4)).describe() == {**plain, "box": (0, 0, 4, 4)}


def test_224_is_cut_from_256() -> None:
    standard = Preprocess.standard((3, 224, 224))
    assert standard.resize == (256, 256) and standard.shorter is None
    picture = noise(300, 100)
    assert (standard(picture) == by_torchvision(picture, T.Resize((256, 256)), T.CenterCrop(224))).all()
    assert Preprocess.standard((1, 28, 28)).resize is None


def test_the_note_tells_apart_what_is_fed_otherwise() -> None:
    from torch import nn

    from dmlbench.embedding import Embedder
    from dmlbench.models.recognised import feeding

    ways = [Preprocess((8, 8)), Preprocess((8, 8), resize=(9, 9)), Preprocess((8, 8), shorter=9)]
    ways += [Preprocess((8, 8), longest=7, pad=pad) for pad in (0, 255)]
    ways += [replace(way, box=(1, 2, 9, 9)) for way in ways] + [replace(way, order="bgr") for way in ways]
    ways += [replace(way, interpolation="bicubic") for way in ways]
    said = [feeding(Embedder(nn.Flatten(), (3, 8, 8), preprocess=way)) for way in ways]
    assert len(set(said)) == len(ways)


def test_channels_and_order() -> None:
    picture = noise(8, 8)
    rgb = Preprocess(size=(8, 8))(picture)
    assert (Preprocess(size=(8, 8), order="bgr")(picture) == rgb[::-1]).all()
    grey = Preprocess(size=(8, 8), channels=1)(picture)
    assert grey.shape == (1, 8, 8) and (grey[0] == np.asarray(picture.convert("L"))).all()


def test_other_modes() -> None:
    flat = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert (Preprocess(size=(4, 4))(flat) == 40000 >> 8).all()
    assert (Preprocess(size=(4, 4))(Image.new("CMYK", (4, 4), (0, 0, 0, 0))) == 255).all()
    assert (Preprocess(size=(4, 4))(Image.new("L", (4, 4), 7)) == 7).all()
    assert Preprocess(size=(4, 4))(Image.new("P", (4, 4))).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="floating-point"):
        Preprocess(size=(4, 4))(Image.new("F", (4, 4)))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"size": (9, 9), "resize": (8, 8)}, "cannot cut 9x9"),
        ({"size": (0, 1)}, "cannot cut"),
        ({"size": (8, 8), "channels": 2}, "1 or 3 channels"),
        ({"size": (8, 8), "interpolation": "bilinar"}, "did you mean 'bilinear'"),
        ({"size": (8, 8), "order": "rbg"}, "'rgb' or 'bgr'"),
        ({"size": (8, 8), "resize": (9, 9), "shorter": 9}, "not both"),
        ({"size": (8, 8), "longest": 8, "shorter": 9}, "not both"),
        ({"size": (8, 8), "longest": 9}, "does not fit into 8x8"),
        ({"size": (8, 8), "pad": 256}, "0 to 255"),
        ({"size": (8, 8), "box": (5, 0, 5, 9)}, "left < right"),
    ],
)
def test_nonsense_is_refused(bad: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Preprocess(**bad)

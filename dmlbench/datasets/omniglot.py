"""Omniglot at 28x28 (Lake, Salakhutdinov and Tenenbaum, Science 2015; MIT).

``omniglot``: train on the background set (964 characters), test on the evaluation set (659 characters,
13,180 drawings) of other alphabets. ``omniglot-small``: train on Korean, Early_Aramaic, Balinese, Greek
and Latin of small1, test on Sanskrit, Tagalog and Japanese_(katakana) of small2 (106 characters, 2,120
drawings). Drawings are 105x105, one bit; they are reduced to 28x28 and inverted, so that ink is 1.
"""

import io
import zipfile
from collections.abc import Container

import numpy as np
from PIL import Image

from dmlbench.datasets.base import ArrayImages, Counts, RetrievalDataset, need
from dmlbench.errors import DataError

SMALL = {
    "train": ("images_background_small1.zip", ("Korean", "Early_Aramaic", "Balinese", "Greek", "Latin")),
    "test": ("images_background_small2.zip", ("Sanskrit", "Tagalog", "Japanese_(katakana)")),
}
FULL = {"train": "images_background.zip", "test": "images_evaluation.zip"}
SMALL_COUNTS = {"train": Counts(2720, 136), "test": Counts(2120, 106)}
COUNTS = {"train": Counts(19280, 964), "test": Counts(13180, 659)}


def _drawings(name: str, split: str, archive: str, alphabets: Container[str] | None) -> RetrievalDataset:
    """The drawings of an archive, of some alphabets or of all; a class is one character of one alphabet."""
    path = need(name, f"omniglot/{archive}", archive)
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    try:
        with zipfile.ZipFile(path) as bundle:
            for member in sorted(bundle.namelist()):
                parts = member.split("/")
                if (
                    not member.endswith(".png")
                    or len(parts) < 3
                    or (alphabets is not None and parts[-3] not in alphabets)
                ):
                    continue
                character = f"{parts[-3]}/{parts[-2]}"
                if not names or names[-1] != character:
                    names.append(character)
                with Image.open(io.BytesIO(bundle.read(member))) as picture:
                    small = picture.convert("L").resize((28, 28), Image.Resampling.BILINEAR)
                images.append(np.asarray(small, dtype=np.uint8)[None])
                labels.append(len(names) - 1)
    except Exception as error:  # a broken archive or picture fails in as many ways as zlib, zipfile and Pillow have
        raise DataError(f"{path} cannot be read: {error}") from None
    if not images:
        raise DataError(f"{path} holds no drawing of data set {name!r}")
    return RetrievalDataset(
        name=name,
        split=split,
        images=ArrayImages(np.stack(images), invert=True),
        labels=np.array(labels),
        licence="MIT",
        source="https://github.com/brendenlake/omniglot",
        class_names=names,
    )


def omniglot_small(split: str) -> RetrievalDataset:
    """The split's alphabets of the two small background sets."""
    archive, alphabets = SMALL[split]
    return _drawings("omniglot-small", split, archive, alphabets)


def omniglot(split: str) -> RetrievalDataset:
    """The whole background set, or the whole evaluation set."""
    return _drawings("omniglot", split, FULL[split], None)

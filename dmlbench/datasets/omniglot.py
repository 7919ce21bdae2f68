"""Omniglot's two small background sets at 28x28 (Lake, Salakhutdinov and Tenenbaum, Science 2015; MIT).

``omniglot-small``: train on Korean, Early_Aramaic, Balinese, Greek and Latin of small1, test on
Sanskrit, Tagalog and Japanese_(katakana) of small2 (106 characters, 2,120 drawings). Drawings are
105x105, one bit; they are reduced to 28x28 and inverted, so that ink is 1.
"""

import io
import zipfile

import numpy as np
from PIL import Image

from dmlbench.datasets.base import ArrayImages, RetrievalDataset, need
from dmlbench.errors import DataError

SPLITS = {
    "train": ("images_background_small1.zip", ("Korean", "Early_Aramaic", "Balinese", "Greek", "Latin")),
    "test": ("images_background_small2.zip", ("Sanskrit", "Tagalog", "Japanese_(katakana)")),
}


def omniglot_small(split: str) -> RetrievalDataset:
    """The split's alphabets; a class is one character of one alphabet."""
    archive, alphabets = SPLITS[split]
    path = need("omniglot-small", f"omniglot/{archive}", archive)
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    try:
        with zipfile.ZipFile(path) as bundle:
            for member in sorted(bundle.namelist()):
                parts = member.split("/")
                if not member.endswith(".png") or parts[-3] not in alphabets:
                    continue
                character = f"{parts[-3]}/{parts[-2]}"
                if not names or names[-1] != character:
                    names.append(character)
                with Image.open(io.BytesIO(bundle.read(member))) as picture:
                    small = picture.convert("L").resize((28, 28), Image.Resampling.BILINEAR)
                images.append(np.asarray(small, dtype=np.uint8)[None])
                labels.append(len(names) - 1)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return RetrievalDataset(
        name="omniglot-small",
        split=split,
        images=ArrayImages(np.stack(images), invert=True),
        labels=np.array(labels),
        licence="MIT",
        source="https://github.com/brendenlake/omniglot",
        class_names=names,
    )

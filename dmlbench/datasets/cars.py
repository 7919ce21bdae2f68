"""Cars-196: 16,185 pictures of 196 models of car (Krause, Stark, Deng and Fei-Fei, 3dRR workshop 2013).

The combined annotations ``cars_annos.mat`` with the pictures under ``car_ims/``: the field trains on
classes 1-98 (8,054 images) and tests on the unseen 99-196 (8,131).
"""

from typing import Any

import numpy as np

from dmlbench.datasets.base import Counts, RetrievalDataset, need
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

COUNTS = {"train": Counts(8054, 98), "test": Counts(8131, 98)}
LAST_TRAINING_CLASS = 98
PATH_FIELD, CLASS_FIELD = 0, 5
"""where ``annotations`` holds the relative path and the class (from 1)"""


def cars(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The split's cars, in the order of the annotations."""
    from scipy.io import loadmat

    root = need("cars", "cars196/cars_annos.mat", "cars/cars_annos.mat", "CARS_196/cars_annos.mat", "cars_annos.mat")
    try:
        content = loadmat(root)
        annotations = content["annotations"].reshape(-1)
        records = [(_text(row[PATH_FIELD]), int(_scalar(row[CLASS_FIELD]))) for row in annotations]
        names = [_text(name) for name in content["class_names"].reshape(-1)] if "class_names" in content else []
    except Exception as error:  # a MATLAB file can be broken in as many ways as scipy can fail on it
        raise DataError(f"{root} is not the combined annotations of Cars-196: {error!r}") from None
    chosen = [(p, c) for p, c in records if (c <= LAST_TRAINING_CLASS) == (split == "train")]
    if not chosen:
        raise DataError(f"{root} names no image of the {split} split")
    pictures = Files(root.parent, [path for path, _ in chosen])
    first = 1 if split == "train" else LAST_TRAINING_CLASS + 1
    return RetrievalDataset(
        name="cars",
        split=split,
        images=CachedImages(pictures, preprocess),
        labels=np.array([label for _, label in chosen]) - first,
        licence="non-commercial research",
        source="J. Krause, M. Stark, J. Deng and L. Fei-Fei, 3D Object Representations for Fine-Grained Categorization, 2013",
        class_names=names[first - 1 : first - 1 + LAST_TRAINING_CLASS],
    )


def _scalar(value: Any) -> Any:
    """The single value inside MATLAB's nested arrays."""
    return value.reshape(-1)[0] if hasattr(value, "reshape") else value


def _text(value: Any) -> str:
    return str(_scalar(value))

"""CUB-200-2011: 11,788 pictures of 200 kinds of bird (Wah, Branson, Welinder, Perona and Belongie, 2011).

The field trains on classes 1-100 (5,864 images) and tests on the unseen 101-200 (5,924); the list
``train_test_split.txt`` that comes with the data is not used. The licence of the pictures is their
photographers' own; the data set is for non-commercial research.
"""

import numpy as np

from dmlbench.datasets.base import Counts, RetrievalDataset, need
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.lists import rows, whole_number
from dmlbench.datasets.pictures import Files
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

COUNTS = {"train": Counts(5864, 100), "test": Counts(5924, 100)}
LAST_TRAINING_CLASS = 100


def cub(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The split's birds, in the order of ``images.txt``."""
    root = need("cub", "CUB_200_2011", "cub", "cub200")
    files, classes = root / "images.txt", root / "image_class_labels.txt"
    label_of = {image: whole_number(label, classes, f"the class of image {image}") for image, label in rows(classes, 2)}
    paths: list[str] = []
    labels: list[int] = []
    for image, path in rows(files, 2):
        if image not in label_of:
            raise DataError(f"list file {classes} has no class for image {image} of {files.name}")
        if (label_of[image] <= LAST_TRAINING_CLASS) == (split == "train"):
            paths.append(path)
            labels.append(label_of[image] - 1)
    if not paths:
        raise DataError(f"list file {files} names no image of the {split} split")
    pictures = Files(root / "images", paths)
    first = 0 if split == "train" else LAST_TRAINING_CLASS
    return RetrievalDataset(
        name="cub",
        split=split,
        images=CachedImages(pictures, preprocess),
        labels=np.array(labels) - first,
        licence="non-commercial research",
        source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        class_names=[name for number, name in rows(root / "classes.txt", 2)][first : first + LAST_TRAINING_CLASS],
    )

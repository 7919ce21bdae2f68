"""scikit-learn's digits: 1,797 real 8x8 grey images, inside scikit-learn, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (CC BY 4.0). Pixels are 0 to 16. Train on classes 0-4, test on the unseen 5-9.
"""

from functools import lru_cache

import numpy as np

from dmlbench.datasets.base import ArrayImages, Counts, RetrievalDataset

COUNTS = {"train": Counts(901, 5), "test": Counts(896, 5)}


@lru_cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 1, 8, 8) and labels (1797,); scikit-learn reads them from text, which takes a while."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8).astype(np.uint8), labels


def digits(split: str) -> RetrievalDataset:
    """The split's classes: 901 training images of 0-4, 896 test images of 5-9."""
    images, labels = _all()
    rows = np.flatnonzero(labels < 5 if split == "train" else labels >= 5)
    return RetrievalDataset(
        name="digits",
        split=split,
        images=ArrayImages(images[rows], top=16.0),
        labels=labels[rows],
        licence="CC-BY-4.0",
        source="https://doi.org/10.24432/C50P49",
        class_names=[str(c) for c in range(10)],
    )

"""MNIST at 28x28, grey, not normalised (LeCun, Cortes and Burges, 1998).

As the field uses it: train split against test split, the same ten classes in both.
"""

import numpy as np

from dmlbench.datasets.base import ArrayImages, RetrievalDataset, need


def mnist(split: str) -> RetrievalDataset:
    """60,000 training or 10,000 test images."""
    from torchvision.datasets import MNIST

    from dmlbench.errors import DataError

    root = need("mnist", "MNIST/raw").parent.parent
    try:
        raw = MNIST(str(root), train=split == "train")
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"MNIST under {root} cannot be read: {error}") from None
    return RetrievalDataset(
        name="mnist",
        split=split,
        images=ArrayImages(np.asarray(raw.data)[:, None]),
        labels=np.asarray(raw.targets),
        licence="CC-BY-SA-3.0",
        source="https://yann.lecun.org/exdb/mnist/",
        class_names=[str(c) for c in range(10)],
    )

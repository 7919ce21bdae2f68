"""MNIST and Fashion-MNIST at 28x28, grey, not normalised.

MNIST: LeCun, Cortes and Burges, 1998. Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017. As the field uses
them: train split against test split, the same ten classes in both. The files are the four IDX files of
each, as published (``.gz``) or unpacked, in the folder that torchvision uses.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from dmlbench.datasets.base import ArrayImages, Counts, RetrievalDataset, need
from dmlbench.errors import DataError

COUNTS = {"train": Counts(60_000, 10), "test": Counts(10_000, 10)}
PREFIX = {"train": "train", "test": "t10k"}
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_MAGIC = {1: 0x801, 3: 0x803}


def idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, packed with gzip or not.

    Raises:
        DataError: it is missing, truncated or no IDX file of that many dimensions.
    """
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    header = 4 * (1 + dimensions)
    words = np.frombuffer(content[:header].ljust(header, b"\0"), dtype=">i4")
    shape = tuple(int(w) for w in words[1:])
    if words[0] != _MAGIC[dimensions] or len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} is not a whole IDX file of {dimensions} dimensions: truncated?")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _ten_classes(name: str, folder: Path, split: str, **about: object) -> RetrievalDataset:
    return RetrievalDataset(
        name=name,
        split=split,
        images=ArrayImages(idx(folder, f"{PREFIX[split]}-images-idx3-ubyte", 3)[:, None]),
        labels=idx(folder, f"{PREFIX[split]}-labels-idx1-ubyte", 1).astype(np.int64),
        **about,  # type: ignore[arg-type]
    )


def mnist(split: str) -> RetrievalDataset:
    """60,000 training or 10,000 test images of digits."""
    return _ten_classes(
        "mnist",
        need("mnist", "MNIST/raw"),
        split,
        licence="CC-BY-SA-3.0",
        source="https://yann.lecun.org/exdb/mnist/",
        class_names=[str(c) for c in range(10)],
    )


def fashion_mnist(split: str) -> RetrievalDataset:
    """60,000 training or 10,000 test images of clothes."""
    return _ten_classes(
        "fashion-mnist",
        need("fashion-mnist", "FashionMNIST/raw"),
        split,
        licence="MIT",
        source="https://github.com/zalandoresearch/fashion-mnist",
        class_names=FASHION_CLASSES,
    )

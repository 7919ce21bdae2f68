"""CIFAR-10 and CIFAR-100 at 32x32 (Krizhevsky, 2009): 50,000 training and 10,000 test images.

As with MNIST the classes of both splits are the same. The "binary version" of the published archives
is read as it is; the "python version" holds pickles, which are read by a loader that can make
nothing but numpy arrays, dictionaries, lists, numbers and bytes.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dmlbench.datasets.base import ArrayImages, Counts, RetrievalDataset, need
from dmlbench.errors import DataError

COUNTS = {
    "cifar10": {"train": Counts(50_000, 10), "test": Counts(10_000, 10)},
    "cifar100": {"train": Counts(50_000, 100), "test": Counts(10_000, 100)},
}
_BINARY = {
    ("cifar10", "train"): [f"data_batch_{i}.bin" for i in range(1, 6)],
    ("cifar10", "test"): ["test_batch.bin"],
    ("cifar100", "train"): ["train.bin"],
    ("cifar100", "test"): ["test.bin"],
}
_NAMES = {"cifar10": ("batches.meta.txt",), "cifar100": ("fine_label_names.txt",)}
_FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
_PIXELS = 3 * 32 * 32
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays and plain values; anything else is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_batch(path: Path) -> dict[bytes, Any]:
    """The dictionary of one file of the python version.

    Raises:
        DataError: it cannot be read, or holds more than arrays and plain values.
    """
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a broken pickle fails in as many ways as it can be broken
        raise DataError(f"{path} is not a CIFAR batch: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a CIFAR batch: it holds a {type(content).__name__}")
    return content


def _from_binary(name: str, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    head = 1 if name == "cifar10" else 2  # CIFAR-100 has the coarse label first
    parts = []
    for file in _BINARY[name, split]:
        try:
            content = np.fromfile(root / file, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"{root / file} cannot be read: {error.strerror}") from None
        if content.size == 0 or content.size % (head + _PIXELS):
            raise DataError(
                f"{root / file} has {content.size:,} bytes, not a multiple of {head + _PIXELS:,}: truncated?"
            )
        parts.append(content.reshape(-1, head + _PIXELS))
    records = np.concatenate(parts)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1].astype(np.int64)


def _from_pickles(name: str, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    batches = [read_batch(root / file.removesuffix(".bin")) for file in _BINARY[name, split]]
    key = b"labels" if name == "cifar10" else b"fine_labels"
    try:
        images = np.concatenate([np.asarray(b[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32) for b in batches])
        labels = np.concatenate([np.asarray(b[key], dtype=np.int64) for b in batches])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"the files under {root} are not CIFAR batches: {error!r}") from None
    return images, labels


def _class_names(name: str, root: Path) -> list[str]:
    for file in _NAMES[name]:
        if (root / file).is_file():
            return (root / file).read_text(encoding="utf-8", errors="replace").split()
    return []


def cifar(name: str, split: str) -> RetrievalDataset:
    """ "cifar10" or "cifar100" (with its 100 fine labels) from either published version."""
    root = need(name, *_FOLDERS[name])
    binary = any((root / file).exists() for file in _BINARY[name, split])
    images, labels = (_from_binary if binary else _from_pickles)(name, split, root)
    return RetrievalDataset(
        name=name,
        split=split,
        images=ArrayImages(images),
        labels=labels,
        licence="unknown",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        class_names=_class_names(name, root),
    )

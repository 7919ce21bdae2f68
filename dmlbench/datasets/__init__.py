"""The data sets, by id: :func:`load_dataset` and the :data:`DATASETS` table."""

from collections.abc import Callable
from dataclasses import dataclass

from dmlbench.datasets.base import ArrayImages, Images, RetrievalDataset, TensorImages, data_root
from dmlbench.datasets.digits import digits
from dmlbench.datasets.mnist import mnist
from dmlbench.datasets.omniglot import omniglot_small
from dmlbench.errors import UsageError
from dmlbench.registry import Registry

__all__ = [
    "DATASETS",
    "ArrayImages",
    "DatasetEntry",
    "Images",
    "RetrievalDataset",
    "TensorImages",
    "data_root",
    "load_dataset",
]


@dataclass(frozen=True)
class DatasetEntry:
    """One data set that ``load_dataset`` knows.

    Attributes:
        load: split ("train" or "test") to the data set.
        title: one line about it.
        protocol: the protocol that ``evaluate`` uses when none is named.
        packaged: True where no file beside the installed packages is needed.
    """

    load: Callable[[str], RetrievalDataset]
    title: str
    protocol: str
    packaged: bool = False


def load_dataset(name: str, split: str = "test") -> RetrievalDataset:
    """A data set by id, e.g. ``load_dataset("digits")``.

    Raises:
        UsageError: no such data set or split.
        DataError: its files are missing or broken.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r} must be 'train' or 'test'")
    return DATASETS[name].load(split)


DATASETS: Registry[DatasetEntry] = Registry(
    "data set",
    {
        "digits": DatasetEntry(digits, "scikit-learn digits, 8x8 grey, test on unseen classes 5-9", "ers-digits", True),
        "omniglot-small": DatasetEntry(
            omniglot_small, "Omniglot small, 28x28 grey, test on unseen alphabets", "ers-28"
        ),
        "mnist": DatasetEntry(mnist, "MNIST, 28x28 grey, ten classes seen in training", "ers-28"),
    },
)

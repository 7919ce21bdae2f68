"""The data sets, by id: :func:`load_dataset` and the :data:`DATASETS` table.

A user's own pictures need no entry: ``folder:PATH`` and ``csv:PATH`` are read wherever an id is, and
``python:FILE.py:FUNCTION`` is called there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from dmlbench.datasets import cars as _cars
from dmlbench.datasets import cifar as _cifar
from dmlbench.datasets import cub as _cub
from dmlbench.datasets import digits as _digits
from dmlbench.datasets import grocery as _grocery
from dmlbench.datasets import inshop as _inshop
from dmlbench.datasets import lfw as _lfw
from dmlbench.datasets import mnist as _mnist
from dmlbench.datasets import omniglot as _omniglot
from dmlbench.datasets import reid as _reid
from dmlbench.datasets import sop as _sop
from dmlbench.datasets.base import (
    ArrayImages,
    Counts,
    Images,
    RetrievalDataset,
    TensorImages,
    data_root,
    require_counts,
)
from dmlbench.datasets.cache import CachedImages, Progress, fitted
from dmlbench.datasets.folder import class_folder
from dmlbench.datasets.pictures import Files
from dmlbench.errors import DataError, UsageError
from dmlbench.preprocess import Preprocess
from dmlbench.registry import Registry
from dmlbench.user_code import PREFIX, load_user_code

__all__ = [
    "DATASETS",
    "USER_DATASETS",
    "ArrayImages",
    "CachedImages",
    "DatasetEntry",
    "Images",
    "RetrievalDataset",
    "TensorImages",
    "data_root",
    "dataset_entry",
    "decode",
    "load_dataset",
]

Loader = Callable[[str, Preprocess], RetrievalDataset]
"""From a split and how its pictures are prepared; a data set of one size ignores the latter."""


SMALL = 64
"""Pixels up to which the longer side of an image is that of a toy."""


@dataclass(frozen=True)
class DatasetEntry:
    """One data set that ``load_dataset`` knows.

    Attributes:
        load: (split, preprocess) to the data set, its counts and files not yet looked at.
        title: one line about it.
        protocol: the protocol that ``evaluate`` uses when none is named.
        packaged: True if the installed packages contain all files.
        shape: (C, H, W) that the field feeds a network.
        counts: by split, what a whole data set holds; empty where nobody knows.
        licence: on what terms the pictures come.
        copies_count: see :class:`RetrievalDataset`; the field's numbers are made so. None: what ``load`` says.
    """

    load: Loader
    title: str
    protocol: str
    packaged: bool = False
    shape: tuple[int, int, int] = (3, 224, 224)
    counts: Mapping[str, Counts] = field(default_factory=dict)
    licence: str = "unknown"
    copies_count: bool | None = True

    @property
    def pictures(self) -> bool:
        """Are its images real pictures, and not of the few pixels that a first experiment takes?"""
        return max(self.shape[1:]) > SMALL

    @property
    def passed_on(self) -> bool:
        """May copies of its pictures be passed on? Not where they are for research alone, which those of people are."""
        return "research" not in self.licence

    def read(self, split: str, preprocess: Preprocess) -> RetrievalDataset:
        """The data set, its counts and files not yet looked at.

        Raises:
            DataError: what ``load`` gave is none, or the other split.
        """
        dataset = self.load(split, preprocess)
        is_one = isinstance(dataset, RetrievalDataset)
        if not is_one or dataset.split != split:
            gave = f"the {dataset.split} split" if is_one else f"a {type(dataset).__name__}"
            raise DataError(
                f"{self.title}: its function gave {gave}, where a RetrievalDataset, the {split} split, is expected"
            )
        return dataset if self.copies_count is None else replace(dataset, copies_count=self.copies_count)


def _held(load: Callable[[str], RetrievalDataset]) -> Loader:
    """A loader of a data set that is held in memory at its one size."""
    return lambda split, preprocess: load(split)


def dataset_entry(name: str) -> DatasetEntry:
    """The entry of an id, or of what :data:`USER_DATASETS` reads; an unknown id gets a suggestion."""
    kind, colon, path = name.partition(":")
    if not colon:
        return DATASETS[name]
    read = USER_DATASETS[kind]
    if not path:
        raise UsageError(f"{name!r} needs a path after the colon")
    return DatasetEntry(
        lambda split, preprocess: read(path, split, preprocess), f"pictures of {path}", "ers-224", copies_count=None
    )


def load_dataset(name: str, split: str = "test", preprocess: Preprocess | None = None) -> RetrievalDataset:
    """A data set by id, e.g. ``load_dataset("digits")``, or what :data:`USER_DATASETS` reads: ``folder:PATH`` or ``csv:PATH``, or what
    ``python:FILE.py:FUNCTION`` gives, which runs that code.

    Args:
        name: which.
        split: "train" or "test".
        preprocess: how pictures are made ready for a network (``embedder.preprocess``); by default as
            the field does for this data set. Data sets held in memory are scaled to its size, not cut.

    Raises:
        UsageError: no such data set or split.
        DataError: its files are missing, broken or not the published ones.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r} must be 'train' or 'test'")
    entry = dataset_entry(name)
    preprocess = preprocess or Preprocess.standard(entry.shape)
    dataset = entry.read(split, preprocess)
    if ":" not in name and dataset.name != name:  # of a plugin that wraps another data set
        dataset = replace(dataset, name=name)
    if split in entry.counts:
        require_counts(dataset, entry.counts[split])
    if isinstance(dataset.images, CachedImages) and isinstance(dataset.images.source, Files):
        dataset.images.source.require(dataset.name)
    return fitted(dataset, preprocess)


def decode(dataset: RetrievalDataset, progress: Progress | None = None) -> None:
    """Decode a data set's images into the cache now, if they are files; later uses find them there.

    Raises:
        DataError: an image is broken (which, and why), or the disk is full.
    """
    if isinstance(dataset.images, CachedImages):
        dataset.images.decode(progress)


def _table(path: str, split: str, preprocess: Preprocess) -> RetrievalDataset:
    from dmlbench.datasets.table import table  # pandas is imported where a table is read

    return table(path, split, preprocess)


def _python(rest: str, split: str, preprocess: Preprocess) -> RetrievalDataset:
    """What the user's own function gives, which takes what it wants of ``split`` and ``preprocess``."""
    code, name = load_user_code(rest, PREFIX), f"{PREFIX}{rest}"
    code.called(name)
    made = code.call(**code.those_taken(split=split, preprocess=preprocess))
    code.require(isinstance(made, RetrievalDataset), f"gave a {type(made).__name__}, not a RetrievalDataset")
    if made.split != split:
        raise UsageError(f"{name} gave the {made.split} split, where the {split} split is asked for")
    return replace(made, name=name)


USER_DATASETS: Registry[Callable[[str, str, Preprocess], RetrievalDataset]] = Registry(
    "kind of data set", {"folder": class_folder, "csv": _table, "python": _python}
)
"""A user's own pictures: what stands before the colon, and (path, split, preprocess) to the data set."""


DATASETS: Registry[DatasetEntry] = Registry(
    "data set",
    {
        "digits": DatasetEntry(
            _held(_digits.digits),
            "scikit-learn digits, 8x8 grey, test on unseen classes 5-9",
            "ers-digits",
            packaged=True,
            shape=(1, 8, 8),
            counts=_digits.COUNTS,
            licence="CC-BY-4.0",
        ),
        "omniglot-small": DatasetEntry(
            _held(_omniglot.omniglot_small),
            "Omniglot small, 28x28 grey, test on unseen alphabets",
            "ers-28",
            shape=(1, 28, 28),
            counts=_omniglot.SMALL_COUNTS,
            licence="MIT",
        ),
        "omniglot": DatasetEntry(
            _held(_omniglot.omniglot),
            "Omniglot, 28x28 grey, background characters against evaluation characters",
            "ers-28",
            shape=(1, 28, 28),
            counts=_omniglot.COUNTS,
            licence="MIT",
        ),
        "mnist": DatasetEntry(
            _held(_mnist.mnist),
            "MNIST, 28x28 grey, ten classes seen in training",
            "ers-28",
            shape=(1, 28, 28),
            counts=_mnist.COUNTS,
            licence="CC-BY-SA-3.0",
        ),
        "fashion-mnist": DatasetEntry(
            _held(_mnist.fashion_mnist),
            "Fashion-MNIST, 28x28 grey, ten classes seen in training",
            "ers-28",
            shape=(1, 28, 28),
            counts=_mnist.COUNTS,
            licence="MIT",
        ),
        "cifar10": DatasetEntry(
            _held(lambda split: _cifar.cifar("cifar10", split)),
            "CIFAR-10, 32x32, ten classes seen in training",
            "ers-224",
            shape=(3, 32, 32),
            counts=_cifar.COUNTS["cifar10"],
        ),
        "cifar100": DatasetEntry(
            _held(lambda split: _cifar.cifar("cifar100", split)),
            "CIFAR-100, 32x32, a hundred classes seen in training",
            "ers-224",
            shape=(3, 32, 32),
            counts=_cifar.COUNTS["cifar100"],
        ),
        "cub": DatasetEntry(
            _cub.cub,
            "CUB-200-2011 birds, test on unseen classes 101-200",
            "ers-224",
            counts=_cub.COUNTS,
            licence="non-commercial research",
        ),
        "cars": DatasetEntry(
            _cars.cars,
            "Cars-196, test on unseen classes 99-196",
            "ers-224",
            counts=_cars.COUNTS,
            licence="non-commercial research",
        ),
        "sop": DatasetEntry(
            _sop.sop,
            "Stanford Online Products, test on 11,316 unseen products",
            "ers-224",
            counts=_sop.COUNTS,
            licence="non-commercial research",
        ),
        "inshop": DatasetEntry(
            _inshop.inshop,
            "In-Shop Clothes, queries and gallery apart, test on 3,985 unseen items",
            "ers-224",
            counts=_inshop.COUNTS,
            licence="non-commercial research",
        ),
        "grocery": DatasetEntry(
            _grocery.grocery,
            "Grocery Store photographs, 250 queries of 50 unseen products against 2,638 others",
            "ers-224",
            shape=(3, 128, 128),
            counts=_grocery.COUNTS,
            licence="MIT",
        ),
        "lfw": DatasetEntry(
            _lfw.lfw,
            "Labeled Faces in the Wild, 610 people, one query each against 2,564 others",
            "ers-224",
            counts=_lfw.COUNTS,
            licence="research",
        ),
        **{
            name: DatasetEntry(
                partial(_reid.reid, name), title, "ers-224", shape=shape, counts=_reid.COUNTS[name], licence="research"
            )
            for name, title, shape in (
                (
                    "market1501",
                    "Market-1501, 3,368 queries of 750 people; own camera and junk do not count",
                    (3, 256, 128),
                ),
                ("dukemtmc", "DukeMTMC-reID, 2,228 queries; own camera does not count", (3, 256, 128)),
                ("veri776", "VeRi-776, 1,678 queries of 200 vehicles; own camera does not count", (3, 256, 256)),
            )
        },
    },
)

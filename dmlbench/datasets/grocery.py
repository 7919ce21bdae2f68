"""Grocery Store: 5,421 photographs of 81 products, taken by phone in shops (Klasson, Zhang and Kjellström, WACV 2019; MIT).

Its own split has every product on both sides, so retrieval needs another: whatever ``train.txt``, ``val.txt`` and
``test.txt`` say, classes 0-30 are for training (2,533 photographs) and the unseen 31-80 for the test (2,888). Of each
test class the five photographs whose path has the smallest sha256 are its queries, the other 2,638 are searched.
The field has no such split; this one is dmlbench's own.
"""

import hashlib

import numpy as np

from dmlbench.datasets.base import Counts, RetrievalDataset, need
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.lists import whole_number
from dmlbench.datasets.store import Store
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

COUNTS = {"train": Counts(2533, 31), "test": Counts(2888, 50, 250)}
LAST_TRAINING_CLASS = 30
QUERIES = 5
"""Of each test class."""
LISTS = ("train.txt", "val.txt", "test.txt")
PLACES = ("grocery", "GroceryStoreDataset", "GroceryStoreDataset-master", "grocery-224.zip", "GroceryStoreDataset.zip")


def grocery(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The split's products, in the order of the three lists."""
    store = Store(need("grocery", *PLACES))
    base = store.folder_of("classes.csv")
    records: list[tuple[str, int]] = []
    for listing in LISTS:
        for number, line in enumerate(store.text(base + listing).splitlines(), 1):
            words = [word.strip() for word in line.rsplit(",", 2)]
            if len(words) != 3:
                raise DataError(f"list file {store.root / (base + listing)}, line {number}: path, class, coarse class")
            label = whole_number(words[1], store.root / (base + listing), f"line {number}: the class")
            if (label <= LAST_TRAINING_CLASS) == (split == "train"):
                records.append((words[0], label))
    if not records:
        raise DataError(f"{store.root} names no photograph of the {split} split")
    first = 0 if split == "train" else LAST_TRAINING_CLASS + 1
    labels = np.array([label for _, label in records]) - first
    names = [line.split(",")[0] for line in store.text(base + "classes.csv").splitlines()[1:]]
    asks = _queries([path for path, _ in records], labels) if split == "test" else np.zeros(len(labels), dtype=bool)
    return RetrievalDataset(
        name="grocery",
        split=split,
        images=CachedImages(store.files([base + path for path, _ in records]), preprocess),
        labels=labels,
        query=np.flatnonzero(asks),
        gallery=np.flatnonzero(~asks),
        licence="MIT",
        source="https://github.com/marcusklasson/GroceryStoreDataset",
        class_names=names[first : first + labels.max() + 1],
    )


def _queries(paths: list[str], labels: np.ndarray) -> np.ndarray:
    """(N,) bool: the :data:`QUERIES` of each class whose path has the smallest sha256."""
    digests = np.array([hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest() for path in paths])
    order = np.lexsort((digests, labels))
    sizes = np.unique(labels, return_counts=True)[1]
    place = np.concatenate([np.arange(size) for size in sizes])  # within its class, along ``order``
    asks = np.zeros(len(labels), dtype=bool)
    asks[order[place < QUERIES]] = True
    return asks

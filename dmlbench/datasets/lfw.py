"""Labeled Faces in the Wild, deep-funneled: 250x250 photographs of faces (Huang, Ramesh, Berg and Learned-Miller, 2007).

LFW itself is a list of pairs to verify. For retrieval ``lfw`` takes the 610 people with four photographs or more, of each
the first six at most: 3,174 photographs. The first of each person is the query, the other 2,564 are searched. There is no
training split: face models are trained on other sets. The list is dmlbench's own.
"""

import re
from itertools import groupby

import numpy as np

from dmlbench.datasets.base import Counts, RetrievalDataset, need
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.store import Store
from dmlbench.errors import DataError, UsageError
from dmlbench.preprocess import Preprocess

COUNTS = {"test": Counts(3174, 610, 610)}
LEAST, MOST = 4, 6
"""Photographs of a person that are needed, and that are taken."""
PLACES = ("lfw-deepfunneled", "lfw", "lfw-4plus.zip", "lfw-deepfunneled.zip")
_NAME = re.compile(r"(?:.*/)?([^/]+)/\1_(\d{4})\.jpg")


def lfw(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The people in the order of their names.

    Raises:
        UsageError: the training split.
    """
    if split == "train":
        raise UsageError("data set 'lfw' has no training split: face models are trained on other sets")
    store = Store(need("lfw", *PLACES))
    photographs_named = sorted((m[1], int(m[2]), name) for name in store.names if (m := _NAME.fullmatch(name)))
    people = [list(photographs) for _, photographs in groupby(photographs_named, key=lambda record: record[0])]
    chosen = [person[:MOST] for person in people if len(person) >= LEAST]
    if not chosen:
        raise DataError(f"{store.root} holds no person with {LEAST} photographs (Name/Name_0001.jpg)")
    place = np.concatenate([np.arange(len(person)) for person in chosen])
    return RetrievalDataset(
        name="lfw",
        split=split,
        images=CachedImages(store.files([name for person in chosen for _, _, name in person]), preprocess),
        labels=np.repeat(np.arange(len(chosen)), [len(person) for person in chosen]),
        query=np.flatnonzero(place == 0),
        gallery=np.flatnonzero(place > 0),
        licence="research",
        source="https://vis-www.cs.umass.edu/lfw/",
        class_names=[person[0][0] for person in chosen],
    )

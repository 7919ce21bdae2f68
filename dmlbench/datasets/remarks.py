"""What a person should know of a data set before anything is measured on it."""

from collections.abc import Iterator

import numpy as np

from dmlbench.datasets.base import DISTRACTOR, JUNK, RetrievalDataset
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files, shown
from dmlbench.datasets.reid import NAME

SMALL_GALLERY = 100
"""Entries that a gallery needs to have a top 1 %."""


def left_out(dataset: RetrievalDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Each query's row, and the gallery rows that do not count for it: its own, and those that share a group."""
    gallery, groups = dataset.gallery, dataset.apart
    columns = [] if groups is None else list(groups.T)
    sorted_ = [(order := np.argsort(c[gallery], kind="stable"), c[gallery][order]) for c in columns]
    for row in dataset.query:
        blocks = [np.array([row])]
        for column, (order, numbers) in zip(columns, sorted_, strict=True):
            if column[row] >= 0:
                a, b = np.searchsorted(numbers, [column[row], column[row] + 1])
                blocks.append(gallery[order[a:b]])
        yield int(row), np.unique(np.concatenate(blocks))


def remarks(dataset: RetrievalDataset) -> Iterator[str]:
    """A sentence on each thing that is not as usual; reads the pictures' hashes, decodes nothing."""
    yield from dataset.notes
    labels, gallery = dataset.labels, dataset.gallery
    if junk := int((labels == JUNK).sum()):
        yield f"{junk:,} images are junk (label {JUNK}): they count for no query"
    if distractors := int((labels[gallery] == DISTRACTOR).sum()):
        yield f"{distractors:,} gallery images are distractors: wrong for every query, and of no class"
    files = dataset.images.source if isinstance(dataset.images, CachedImages) else None
    if dataset.split == "test" and not dataset.grouped and isinstance(files, Files):
        named = [name for path in files.paths if NAME.fullmatch(name := path.rpartition("/")[2])]
        if len(named) > len(files) / 2:
            yield (
                f"files are named as those of re-identification ({shown(named[0])}), by class and camera: the camera is not "
                "read, and pictures of one class by one camera count for each other; a CSV with a column camera leaves them out"
            )
    classes = np.unique(labels[gallery][labels[gallery] >= 0])
    if len(classes) < 2 and not distractors:
        yield f"all {len(gallery):,} gallery images are of one class: every answer is right, and nothing is measured"
    if len(gallery) < SMALL_GALLERY and dataset.split == "test":
        yield f"the gallery has {len(gallery)} images, fewer than {SMALL_GALLERY}: CA- and QA- cannot be measured"
    entries = np.bincount(labels[gallery][labels[gallery] >= 0], minlength=int(labels.max()) + 1)
    lonely, copies, shared = 0, 0, 0
    twins = dataset.copies if dataset.apart is not None and not dataset.copies_count else None
    searched = np.isin(np.arange(len(dataset)), gallery)
    for row, out in left_out(dataset):
        out = out[searched[out]]
        lonely += int(entries[labels[row]] - (labels[out] == labels[row]).sum() == 0)
        others = out[out != row]
        same = twins is not None and twins[row] >= 0
        copied = int((twins[others] == twins[row]).sum()) if twins is not None and same else 0
        copies, shared = copies + (copied > 0), shared + (len(others) > copied)
    total = len(dataset.query)
    if copies:
        yield f"{copies:,} of {total:,} queries have a copy of their own picture in the gallery: it is not their answer"
    if shared:
        yield f"{shared:,} of {total:,} queries share a camera or sequence with gallery images, which do not count for them"
    if lonely and dataset.split == "test":
        yield f"{lonely:,} of {total:,} queries have no other image of their class to find: they have no recall"

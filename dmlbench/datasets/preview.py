"""A small part of a data set for a first look in minutes: never a result, since a smaller gallery is easier to search."""

from dataclasses import replace

import numpy as np

from dmlbench.datasets.base import RetrievalDataset
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files

QUERIES, ENTRIES, EACH = 64, 1000, 4
"""How many queries and gallery images a preview has at most, and how many of a class it wants at least."""


def preview(dataset: RetrievalDataset, queries: int = QUERIES, entries: int = ENTRIES) -> RetrievalDataset:
    """Some queries and some of the gallery, drawn by class: as many classes as leave each :data:`EACH` entries.

    Only the pictures that are needed are read. Distractors keep their share of the gallery. The draw is always the same.
    """
    rng = np.random.default_rng(20220601)
    labels, gallery = dataset.labels, rng.permutation(dataset.gallery)
    asks = rng.permutation(dataset.query)
    gallery = gallery[np.argsort(~np.isin(gallery, asks), kind="stable")]  # entries of queries come first
    classes = rng.permutation(np.unique(labels[asks]))
    nobody = gallery[labels[gallery] < 0]
    others = np.setdiff1d(labels[gallery], [*labels[asks], *labels[nobody]])
    classes = np.concatenate([classes, rng.permutation(others)])
    nobody = nobody[: round(entries * len(nobody) / len(gallery))]
    room = max(1, entries - len(nobody))
    classes = classes[: max(1, room // EACH)]
    searched = np.sort(np.concatenate([_spread(labels, gallery[np.isin(labels[gallery], classes)], room), nobody]))
    inside = np.isin(asks, searched) | ~np.isin(asks, dataset.gallery)  # a query that is searched too keeps its entry
    chosen = np.sort(_spread(labels, asks[inside & np.isin(labels[asks], classes)], queries))
    note = (
        f"preview: {len(chosen):,} of {len(asks):,} queries against {len(searched):,} of {len(gallery):,} gallery images, "
        f"{len(classes):,} classes; no result, as fewer images are easier to search"
    )
    part = replace(dataset, query=chosen, gallery=searched, notes=(*dataset.notes, note), preview=True)
    if not (isinstance(dataset.images, CachedImages) and isinstance(dataset.images.source, Files)):
        return part
    rows, source = np.union1d(chosen, searched), dataset.images.source
    boxes = None if source.boxes is None else source.boxes[rows]
    few = replace(source, paths=[source.paths[row] for row in rows], boxes=boxes)
    return replace(
        part,
        images=CachedImages(few, dataset.images.preprocess),
        labels=labels[rows],
        groups=dataset.groups[rows],
        query=np.searchsorted(rows, chosen),
        gallery=np.searchsorted(rows, searched),
    )


def _spread(labels: np.ndarray, rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of ``rows``: the first of each class, then the second of each, and so on."""
    order = np.argsort(labels[rows], kind="stable")
    _, sizes = np.unique(labels[rows], return_counts=True)
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.concatenate([np.arange(size) for size in sizes]) if len(sizes) else []
    return rows[np.argsort(place, kind="stable")[:most]]

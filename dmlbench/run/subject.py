"""The subject of a run: the frozen model, the queries, and the clean scene from which every search starts.

Clean images are embedded once, in blocks whose size does not depend on the batch size, so that the
embeddings, and the targets chosen from them, are exactly the same at any batch size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol as Interface
from typing import runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import DISTANCES, Embedder, require_finite
from dmlbench.errors import UsageError
from dmlbench.fast.compiled import ready as ready_to_attack
from dmlbench.fast.exact import true_float32
from dmlbench.models.defended import Front
from dmlbench.rng import Rng, seed_of
from dmlbench.run.fingerprint import exact
from dmlbench.run.loading import Loader
from dmlbench.run.units import Arrays, Work, remembered
from dmlbench.scene import Gallery, Scene
from dmlbench.version import __version__

EMBED_BLOCK = 256
"""Images embedded at a time, whatever the batch size: it fixes the rounding of the clean embeddings."""
SAMPLE = 256
"""Queries whose adversarial images a run stores, at most ..."""
SAMPLE_BYTES = 4 << 20
"""... and bytes of these images for each attack, at most."""


@runtime_checkable
class Progress(Interface):
    """Receives how far a run has come, for example to draw a progress bar."""

    def start(self, task: str, total: int) -> None:
        """``task`` begins; it has ``total`` images."""
        ...

    def advance(self, task: str, count: int) -> None:
        """``count`` more images of ``task`` are done."""
        ...


class Silent:
    """A :class:`Progress` that shows nothing."""

    def start(self, task: str, total: int) -> None:
        """Ignore."""

    def advance(self, task: str, count: int) -> None:
        """Ignore."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the images it is measured on, embedded once.

    Attributes:
        embedder: frozen, on its device.
        rows: (Q,) data set rows of the queries measured.
        scene: all of these queries, without targets.
        surrogate: another model on the same queries, on which the adversarial images are made instead (transfer).
        undefended: the model without its test-time defence, if a step of the protocol makes its images on it.
        all_queries: (Q', D) clean embeddings of every query of the data set, measured or not.
    """

    embedder: Embedder
    dataset: RetrievalDataset
    rows: np.ndarray
    scene: Scene
    surrogate: "Subject | None" = None
    undefended: "Subject | None" = None
    all_queries: Tensor | None = None

    def __getitem__(self, index: slice | np.ndarray) -> "Subject":
        """The same models with some of the queries, by position."""
        at = index if isinstance(index, slice) else torch.from_numpy(index).to(self.device)
        other = None if self.surrogate is None else self.surrogate[index]
        plain = None if self.undefended is None else self.undefended[index]
        return replace(self, rows=self.rows[index], scene=self.scene[at], surrogate=other, undefended=plain)

    @property
    def device(self) -> torch.device:
        """The device of the model, on which everything is computed."""
        return self.embedder.device

    def rng(self, *parts: object) -> Rng:
        """A random stream for every query, by data set row."""
        return Rng(seed_of(*parts), torch.from_numpy(self.rows).to(self.device))

    def images(self, a: int, b: int) -> Tensor:
        """The clean images of queries a to b."""
        images = self.dataset.images[self.rows[a:b]]
        return images.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else images


def resolve_device(device: str) -> torch.device:
    """The device named ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:n``.

    Raises:
        UsageError: no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is not auto, cpu, cuda or cuda:n") from None
    if resolved.type == "cuda" and (
        not torch.cuda.is_available() or (resolved.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(
            f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    if resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not auto, cpu, cuda or cuda:n")
    return resolved


def query_order(count: int) -> np.ndarray:
    """(count,) a fixed shuffle of the queries: ``--limit N`` takes its first N, so that classes are mixed."""
    return np.random.default_rng(20220601).permutation(count)


def measured_queries(count: int, limit: int | None = None) -> np.ndarray:
    """(n,) positions of the measured queries among ``count``, ascending: all, or the first ``limit`` of :func:`query_order`."""
    return np.sort(query_order(count)[: count if limit is None else limit])


@true_float32()
def embed(embedder: Embedder, dataset: RetrievalDataset, rows: np.ndarray, progress: Progress | None = None) -> Tensor:
    """(len(rows), D) clean embeddings, in blocks of :data:`EMBED_BLOCK`.

    Raises:
        DataError: an embedding is NaN or infinite.
    """
    progress = progress or Silent()
    progress.start("embed", len(rows))
    parts = []
    bounds = [(a, min(a + EMBED_BLOCK, len(rows))) for a in range(0, len(rows), EMBED_BLOCK)]
    with torch.no_grad(), Loader(dataset.images, rows, embedder.device, bounds) as images:
        for a, b in bounds:
            parts.append(embedder(images(a, b)))
            progress.advance("embed", b - a)
    embeddings = torch.cat(parts)
    require_finite(embeddings, embedder.name)
    return embeddings


def require_shape(embedder: Embedder, dataset: RetrievalDataset) -> None:
    """Raise unless the images have the shape that the model takes.

    Raises:
        UsageError: they do not; it names both shapes.
    """
    if tuple(dataset.images.shape) != tuple(embedder.input_shape):
        raise UsageError(
            f"model {embedder.name!r} takes images of shape {embedder.input_shape}, "
            f"data set {dataset.name!r} has {dataset.images.shape} (channels, height, width)"
        )


def unembedded(dataset: RetrievalDataset, positions: np.ndarray | None = None) -> Scene:
    """A scene of some queries, by default the first, whose embeddings are all zero: enough to see which targets an attack may have."""
    positions = np.zeros(1, dtype=np.int64) if positions is None else positions
    apart, row = dataset.apart, dataset.query[positions]
    everyone = torch.from_numpy(dataset.labels[dataset.gallery])
    return Scene(
        distance=DISTANCES["E"],
        gallery=Gallery(
            torch.zeros(len(everyone), 1),
            everyone,
            groups=None if apart is None else torch.from_numpy(apart[dataset.gallery]),
        ),
        clean=torch.zeros(len(row), 1),
        labels=torch.from_numpy(dataset.labels[row]),
        row=torch.from_numpy(dataset.position_in_gallery[positions]),
        chosen=torch.zeros(len(row), 0, dtype=torch.int64),
        groups=None if apart is None else torch.from_numpy(apart[row]),
    )


def prepare(
    embedder: Embedder,
    dataset: RetrievalDataset,
    *,
    limit: int | None = None,
    order: np.ndarray | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    work: Work | None = None,
    cache: bool = False,
    gradients: Embedder | None = None,
    part: str = "model",
    shared: dict[str, Arrays] | None = None,
) -> Subject:
    """Freeze the model, embed gallery and queries, and choose which queries are measured.

    Args:
        limit: the number of queries; None for all.
        order: positions of the queries, in this order, instead of ``limit``.
        work: where clean embeddings are saved and read again.
        cache: also keep them in the cache folder, for later runs.
        gradients: a model whose ``precision`` and ``compiled`` are used instead of those of ``embedder``.
        part: the name of this model's embeddings in ``work``, which may hold those of several models.
        shared: embeddings that earlier calls with the same models and data set have made; those of this call are added.

    Raises:
        UsageError: the model takes images of another shape, ``limit`` is not positive, or the device does not support
            the precision.
    """
    require_shape(embedder, dataset)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be 1 or more")
    where = resolve_device(device)
    ready = ready_to_attack(embedder, len(dataset.gallery), where, gradients)
    if isinstance(ready.front, Front):
        ready.front = ready.front.seeing(dataset.images, dataset.gallery)
    positions = measured_queries(len(dataset.query), limit) if order is None else order
    everyone = np.union1d(dataset.gallery, dataset.query)

    def clean() -> dict[str, np.ndarray]:
        return {"embeddings": embed(ready, dataset, everyone, progress).cpu().numpy()}

    make = clean
    if cache and (known := exact(embedder)):
        parts = (__version__, torch.__version__, known, embedder.preprocess, dataset.sha256)
        make = partial(remembered, f"embeddings {parts} {ready.device.type}", len(everyone), clean)
    clean_arrays = (work or Work()).once(f"embeddings of the {part}", len(everyone), make, shared)
    embeddings = torch.from_numpy(clean_arrays["embeddings"]).to(ready.device)

    def at(rows: np.ndarray) -> Tensor:
        return embeddings[torch.from_numpy(np.searchsorted(everyone, rows)).to(ready.device)]

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(ready.device)

    rows, apart = dataset.query[positions], dataset.apart
    scene = Scene(
        distance=ready.distance,
        gallery=Gallery.seen(
            at(dataset.gallery),
            column(dataset.labels[dataset.gallery]),
            ready.precision,
            None if apart is None else column(apart[dataset.gallery]),
        ),
        clean=at(rows),
        labels=column(dataset.labels[rows]),
        row=column(dataset.position_in_gallery[positions]),
        chosen=column(np.zeros((len(rows), 0), dtype=np.int64)),
        groups=None if apart is None else column(apart[rows]),
        query=column(rows),
    )
    return Subject(ready, dataset, rows, scene, all_queries=at(dataset.query))


def sample_positions(subject: Subject, most: int = SAMPLE) -> np.ndarray:
    """(S,) positions of the queries whose adversarial images are stored: the first ``most`` of :func:`query_order` that are measured."""
    image = 4 * int(np.prod(subject.dataset.images.shape))
    count = min(most, max(1, SAMPLE_BYTES // image), len(subject.rows))
    order = subject.dataset.query[query_order(len(subject.dataset.query))]
    order = order[np.isin(order, subject.rows)][:count]
    return np.flatnonzero(np.isin(subject.rows, order))

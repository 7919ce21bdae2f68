"""The close-up of a run: what a few queries retrieve before and after each attack, for the HTML report.

It is stored in ``adversarial_sample.npz`` with the adversarial images, under names that begin with ``closeup/``, so
that a report needs neither the model nor the data set. No score depends on it.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dmlbench.errors import DataError
from dmlbench.run.subject import Subject

QUERIES = 6
"""Queries that are shown with the images they retrieve."""
TOP = 5
"""Retrieved images shown for each of them."""
THUMBNAIL = 48
"""Longest side of a retrieved image, pixels; larger ones are scaled down."""
PLANE_QUERIES = 64
PLANE_GALLERY = 400
"""Points of the two-dimensional projection."""


def closeup(subject: Subject, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the report shows of a sample of adversarial images.

    Args:
        subject: the model, the images and the clean scene.
        sample: "rows" (S,), the data set rows of the sampled queries, and by component their
            adversarial images (S, C, H, W).

    Returns:
        With K = min(S, 6) queries, P components and U different retrieved images:

        - ``closeup/names`` (T,) uint8, the UTF-8 text of a JSON object: ``components``, the P names, ``classes``, the names of the
          classes below by label, and ``order``, that of the colours (see :class:`Names`);
        - ``closeup/place`` (K,) positions of the shown queries in the sample;
        - ``closeup/query`` (K, C, H, W) float16 clean images, ``closeup/query_label`` (K,);
        - ``closeup/top`` (1 + P, K, 5) data set rows retrieved by the clean image, then by each attacked one;
        - ``closeup/rows`` (U,), ``closeup/labels`` (U,), ``closeup/images`` (U, C, h, w) uint8 of those;
        - ``closeup/plane_gallery`` (G, 2) and ``closeup/plane_gallery_labels`` (G,): the gallery on its two principal
          axes; ``closeup/plane_labels`` (S',), ``closeup/plane`` (1 + P, S', 2): clean queries, then attacked ones.
    """
    names = [name for name, images in sample.items() if name != "rows" and images.ndim == 4 and len(images)]
    at = np.flatnonzero(np.isin(subject.rows, sample["rows"]))  # positions among the measured queries
    if not names or not len(at):
        return {}
    some = _spread(len(at), PLANE_QUERIES)  # (S',) places in the sample
    few = _varied(subject.dataset.labels[subject.rows[at[some]]], QUERIES)  # (K,) places among those
    clean = subject.scene.clean[torch.from_numpy(at[some]).to(subject.device)]
    moved = [clean, *(_embedded(subject, sample[name][some]) for name in names)]  # each (S', D)
    shown_queries = at[some[few]]
    top = np.stack(
        [_top(subject, shown_queries, embeddings[torch.from_numpy(few).to(subject.device)]) for embeddings in moved]
    )
    rows = np.unique(top)
    axes = _axes(subject.scene.gallery.embeddings)
    gallery = torch.from_numpy(_spread(len(subject.scene.gallery), PLANE_GALLERY)).to(subject.device)
    labels = subject.dataset.labels
    return {
        "closeup/names": _text(
            {
                "components": names,
                "classes": _class_names(subject, rows, shown_queries),
                "order": subject.embedder.preprocess.order,
            }
        ),
        "closeup/place": some[few],
        "closeup/query": subject.dataset.images[subject.rows[shown_queries]].numpy().astype(np.float16),
        "closeup/query_label": labels[subject.rows[shown_queries]],
        "closeup/top": top,
        "closeup/rows": rows,
        "closeup/labels": labels[rows],
        "closeup/images": _thumbnails(subject.dataset.images[rows]),
        "closeup/plane": np.stack([_on(axes, embeddings) for embeddings in moved]),
        "closeup/plane_labels": labels[subject.rows[at[some]]],
        "closeup/plane_gallery": _on(axes, subject.scene.gallery.embeddings[gallery]),
        "closeup/plane_gallery_labels": subject.scene.gallery.labels[gallery].cpu().numpy(),
    }


class Names(NamedTuple):
    """What a close-up says in words."""

    components: list[str]
    classes: dict[int, str]
    """by label"""
    order: str
    """"rgb", or "bgr" where the network, and so every array, has blue first"""


def names_of(sample: Mapping[str, np.ndarray]) -> Names:
    """What the close-up in a sample says in words; nothing without one.

    Raises:
        DataError: the text is not what :func:`closeup` writes.
    """
    if "closeup/names" not in sample:
        return Names([], {}, "rgb")
    try:
        content = json.loads(sample["closeup/names"].tobytes())
        classes = {int(k): str(v) for k, v in content["classes"].items()}
        return Names([str(name) for name in content["components"]], classes, str(content.get("order", "rgb")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the close-up of this run cannot be read: {error!r}") from None


def _text(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _class_names(subject: Subject, rows: np.ndarray, queries: np.ndarray) -> dict[int, str]:
    """The names of the classes that are shown, if the data set has names."""
    names = subject.dataset.class_names
    labels = np.unique(subject.dataset.labels[np.concatenate([rows, subject.rows[queries]])])
    return {int(label): str(names[label]) for label in labels if 0 <= label < len(names)}


def _spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of 0 ... count - 1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _varied(labels: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` positions, ascending, of as many classes as possible: first one of each class, then a second of each."""
    earlier = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    return np.sort(np.lexsort((np.arange(len(labels)), earlier))[:most])


def _embedded(subject: Subject, images: np.ndarray) -> Tensor:
    with torch.no_grad():
        parts = [
            subject.embedder(torch.from_numpy(images[a : a + 64]).to(subject.device)) for a in range(0, len(images), 64)
        ]
    return torch.cat(parts)


def _top(subject: Subject, positions: np.ndarray, embeddings: Float[Tensor, "K D"]) -> np.ndarray:
    """(K, 5) data set rows of the nearest gallery entries; the query itself is left out."""
    scene = subject.scene[torch.from_numpy(positions).to(subject.device)]
    count = min(TOP, len(scene.gallery) - 1)
    nearest = scene.ranked(embeddings).topk(count, dim=1, largest=False).indices
    rows: np.ndarray = subject.dataset.gallery[nearest.cpu().numpy()]
    return rows


def _axes(embeddings: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the two principal axes (D, 2) of the gallery; the sign of each axis is fixed by its largest coordinate."""
    centre = embeddings.mean(0)
    around = (embeddings - centre).double()
    _, vectors = torch.linalg.eigh(around.t() @ around)
    axes = vectors[:, -2:].flip(1) if vectors.shape[1] > 1 else vectors.expand(-1, 2)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return centre, (axes * signs).to(embeddings.dtype)


def _on(axes: tuple[Tensor, Tensor], embeddings: Float[Tensor, "b D"]) -> np.ndarray:
    """(b, 2) coordinates on the two axes."""
    projected: np.ndarray = ((embeddings - axes[0]) @ axes[1]).cpu().numpy().astype(np.float32)
    return projected


def _thumbnails(images: Float[Tensor, "U C H W"]) -> np.ndarray:
    """(U, C, h, w) uint8, the longer side at most :data:`THUMBNAIL` pixels."""
    scale = THUMBNAIL / max(images.shape[2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in images.shape[2:]]
        images = F.interpolate(images, size, mode="area")
    return (images * 255).round().to(torch.uint8).numpy()

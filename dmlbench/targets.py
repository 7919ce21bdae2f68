"""Whom an attack aims at: (embeddings, Scene, k, Rng) to gallery rows per image, (B, k).

Type of an entry: :data:`Targets`. ``embeddings`` are the clean ones that the ranking is made from.
Targets are chosen once, before the search, from streams that belong to the image, so they do not
depend on batch size or on which other attacks run.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.objectives import PRESERVED
from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.scene import Scene

Targets = Callable[[Scene, int, Rng], Tensor]

TOP_SHARE = 0.01
"""How much of the gallery counts as the head of a list in CA- and QA-."""


def anywhere(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """Uniform over all of the gallery that counts for the image (CA+, QA+, TMA), with replacement."""
    return scene.entry(rng.integers(scene.counted, k))


def top_percent(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """Uniform over the nearest 1 % of the gallery, the image's own entry left out (CA-, QA-), all different.

    The top 1 % is the first int(0.01 N) entries, N those that count for the image.

    Raises:
        UsageError: the gallery has fewer than 100 entries, or fewer than ``k`` in its top 1 %.
    """
    counted = torch.as_tensor(scene.counted, device=scene.row.device)  # () or (B, 1)
    heads = (TOP_SHARE * counted.double()).long()
    n, least, head = int(counted.min()), int(heads.min()), int(heads.max())
    if least < 1:
        raise UsageError(f"a gallery of {n} entries has no top 1 %: CA- and QA- need at least 100")
    if least < k:
        raise UsageError(f"the top 1 % of a gallery of {n} entries holds {least}, fewer than the {k} targets asked for")
    nearest = scene.ranked(scene.clean).topk(head, largest=False).indices  # (B, head)
    beyond = torch.arange(head, device=heads.device) >= heads
    pick = rng.uniform(head).masked_fill(beyond, torch.inf).argsort(1)[:, :k]  # (B, k)
    return nearest.gather(1, pick)


def nearest(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """The k nearest entries of any class, the image's own and the ignored ones left out (GTT)."""
    return scene.ranked(scene.clean).topk(k, largest=False).indices


def nearest_other(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """The k nearest entries of another class (GTM)."""
    d = scene.distances(scene.clean).masked_fill(~scene.other, torch.inf)
    return d.topk(k, largest=False).indices


def nearest_other_published(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """GTM's target as behind the published numbers: an arbitrary entry, easier to survive.

    The position of the nearest entry of another class is taken inside the list of such entries (in
    gallery order) and then used as a row of the whole gallery. "Another class" is another than that of
    the nearest entry, which is not always the image's. The target, and with it the score, therefore
    depends on the order of the gallery; :func:`nearest_other` does not.
    """
    ranked = scene.ranked(scene.clean)  # (B, N)
    shown = scene.gallery.labels[ranked.argmin(1)]  # (B,)
    other = scene.gallery.labels[None, :] != shown[:, None]  # (B, N)
    other = other if scene.ignored is None else other & ~scene.ignored
    closest = ranked.masked_fill(~other, torch.inf).argmin(1, keepdim=True)  # (B, 1)
    return other.long().cumsum(1).gather(1, closest) - 1


def nearest_same(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """The k nearest positives (Panum); where a query has fewer, the nearest entries of any class follow."""
    d = scene.ranked(scene.clean)
    return torch.where(scene.same, d, d + 2 * d.masked_fill(d.isinf(), 0).amax() + 1).topk(k, largest=False).indices


def nearest_classes(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """The closest member of each of the k nearest other classes, nearest class first (MT).

    Raises:
        UsageError: the gallery has k other classes or fewer.
    """
    classes, index = scene.gallery.labels.unique(return_inverse=True)  # (C,), (N,)
    if len(classes) <= k:
        raise UsageError(f"the gallery has {len(classes)} classes, so no {k} wrong ones to aim at for every query")
    d = scene.distances(scene.clean).masked_fill(~scene.other, torch.inf)  # (B, N)
    nearest = d.new_full((len(d), len(classes)), torch.inf)
    nearest.scatter_reduce_(1, index.expand(len(d), -1), d, "amin")  # (B, C)
    wrong = nearest.topk(k, largest=False).indices  # (B, k)
    return torch.stack([d.masked_fill(index != wrong[:, j, None], torch.inf).argmin(1) for j in range(k)], 1)


def guides_of_another(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B k"]:
    """The k nearest entries of one other class, that of an entry drawn uniformly from all of another class (MA+); the farthest is
    repeated where the class has fewer.

    Raises:
        UsageError: some image has no entry of another class.
    """
    other = scene.other & scene.gallery.classed  # (B, N)
    if not bool(other.any(1).all()):
        raise UsageError("the gallery has a single class for some query, so nobody else to look like")
    drawn = rng.integers(other.sum(1, keepdim=True), 1)
    place = torch.searchsorted(other.long().cumsum(1), drawn + 1)  # (B, 1)
    label = scene.gallery.labels[place]  # (B, 1)
    of_class = other & (scene.gallery.labels == label)
    order = scene.distances(scene.clean).masked_fill(~of_class, torch.inf).argsort(stable=True, dim=1)
    last = (of_class.sum(1, keepdim=True) - 1).clamp_max(order.shape[1] - 1)
    return order.gather(1, torch.minimum(torch.arange(k, device=order.device).expand(len(order), -1), last))


def anywhere_keeping_nearest(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B j"]:
    """As ``anywhere``, followed by the query's 5 nearest entries, which SPQA+ keeps near the head."""
    return torch.cat([anywhere(scene, k, rng), nearest(scene, PRESERVED, rng)], 1)


def top_percent_keeping_nearest(scene: Scene, k: int, rng: Rng) -> Int[Tensor, "B j"]:
    """As ``top_percent``, followed by the query's 5 nearest entries, which SPQA- keeps near the head."""
    return torch.cat([top_percent(scene, k, rng), nearest(scene, PRESERVED, rng)], 1)


TARGETS: Registry[Targets] = Registry(
    "target rule",
    {
        "anywhere": anywhere,
        "top_percent": top_percent,
        "nearest": nearest,
        "nearest_other": nearest_other,
        "nearest_other_published": nearest_other_published,
        "nearest_same": nearest_same,
        "nearest_classes": nearest_classes,
        "guides_of_another": guides_of_another,
        "anywhere_keeping_nearest": anywhere_keeping_nearest,
        "top_percent_keeping_nearest": top_percent_keeping_nearest,
    },
)

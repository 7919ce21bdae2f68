"""Metric-learning losses: (embeddings (b, d), labels (b,), optional triplets) to a scalar.

All of :data:`LOSSES` come from pytorch-metric-learning, set to the embedding space of the model;
triplet and contrastive are reduced by the plain mean, the others as that package does. Defences need values per sample, which that package does not give; these
are :func:`hardness`, :func:`triplet` and :func:`proxy_anchor_each`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmlbench.embedding import Distance
from dmlbench.errors import UsageError
from dmlbench.registry import Registry, suggest

MARGIN = 0.2
"""The field's triplet margin γ on the unit sphere."""


def hardness(distance: Distance, triplets: Float[Tensor, "t 3 d"]) -> Float[Tensor, " t"]:
    """H = d(a, p) - d(a, n) of embedded triplets (anchor, positive, negative); higher is harder."""
    a, p, n = triplets.unbind(1)
    return distance.paired(a, p) - distance.paired(a, n)


def triplet(hard: Float[Tensor, " t"], margin: float = MARGIN) -> Float[Tensor, " t"]:
    """max(0, H + margin) per triplet (Schroff, Kalenichenko and Philbin, CVPR 2015)."""
    return F.relu(hard + margin)


def contrastive(
    positive: Float[Tensor, " t"], negative: Float[Tensor, " t"], margin: float = 1.0
) -> Float[Tensor, " t"]:
    """d(a, p)² + max(0, margin - d(a, n))² per triplet (Hadsell, Chopra and LeCun, CVPR 2006)."""
    return positive.square() + F.relu(margin - negative).square()


def proxy_anchor_each(
    embeddings: Float[Tensor, "b d"],
    labels: Int[Tensor, " b"],
    proxies: Float[Tensor, "c d"],
    margin: float = 0.1,
    alpha: float = 32.0,
) -> Float[Tensor, " b"]:
    """Proxy-anchor (Kim et al., CVPR 2020, eq. 4) of each image as if it were a batch by itself.

    The batch loss couples images through its sums of exponentials; an adversary needs a loss that
    belongs to one image. Every class has one proxy, of which one is positive.
    """
    s = F.normalize(embeddings, dim=1) @ F.normalize(proxies, dim=1).t()  # (b, c)
    of_class = F.one_hot(labels, len(proxies)).bool()
    pull = F.softplus(-alpha * (s - margin))
    push = F.softplus(alpha * (s + margin))
    return torch.where(of_class, pull, 0.0).sum(1) + torch.where(of_class, 0.0, push).sum(1) / len(proxies)


@dataclass(frozen=True)
class LossEntry:
    """A loss of pytorch-metric-learning.

    Attributes:
        build: (number of classes, embedding dimension, Distance, parameters) to the module.
        title: one line, with the paper.
        proxies: True where it learns something per class, so that labels must be 0 … classes - 1.
    """

    build: Callable[[int, int, Distance, dict[str, Any]], nn.Module]
    title: str
    proxies: bool = False


def _space(distance: Distance) -> Any:
    """pytorch-metric-learning's object for this embedding space."""
    from pytorch_metric_learning import distances

    if distance.metric == "cosine":
        return distances.CosineSimilarity()
    return distances.LpDistance(normalize_embeddings=distance.normalized, p=2)


def _pml(
    name: str, *, space: bool = False, ours: tuple[str, ...] = (), **fixed: Any
) -> Callable[[int, int, Distance, dict[str, Any]], nn.Module]:
    """A builder of pytorch-metric-learning's loss ``name``; ``space`` where any distance will do, ``ours`` are parameters
    that would do nothing here."""

    def build(classes: int, dim: int, distance: Distance, params: dict[str, Any]) -> nn.Module:
        from pytorch_metric_learning import losses, reducers

        kind = getattr(losses, name)
        base = losses.BaseMetricLossFunction  # whose own parameters are objects, and weights of these
        own = [c for c in kind.__mro__ if issubclass(c, base) and c is not base]
        signatures = [p for c in own for p in inspect.signature(c).parameters.values()]
        takes = {p.name for p in signatures if p.default is not p.empty} - {*ours}
        for key, value in params.items():
            if key not in takes:
                raise UsageError(f"unknown parameter {key!r} of the loss{suggest(key, sorted(takes))}")
            if not isinstance(value, (int, float)):
                raise UsageError(f"loss parameter {key} = {value!r} must be a number")
        if params.get("num_classes", classes) != classes:
            raise UsageError(
                f"loss parameter num_classes = {params['num_classes']} must be {classes}, as many as are learnt"
            )
        given: dict[str, Any] = {**fixed, **params}
        if space:
            given["distance"] = _space(distance)
        if name in ("TripletMarginLoss", "ContrastiveLoss"):
            given["reducer"] = reducers.MeanReducer()
        if name in ("ProxyAnchorLoss", "ProxyNCALoss", "NormalizedSoftmaxLoss"):
            given |= {"num_classes": classes, "embedding_size": dim}
        if name == "ContrastiveLoss" and distance.metric == "cosine":
            # The package's cosine is a similarity: each margin is 1 - that of the distance.
            given |= {key: 1.0 - given.get(key, of) for key, of in (("pos_margin", 0.0), ("neg_margin", 1.0))}
        loss: nn.Module = kind(**given)
        return loss

    return build


def build_loss(name: str, classes: int, dim: int, distance: Distance, params: dict[str, Any]) -> nn.Module:
    """The loss ``name`` for ``classes`` classes and embeddings of ``dim`` numbers.

    Raises:
        UsageError: unknown loss, or a parameter that it does not take.
    """
    return LOSSES[name].build(classes, dim, distance, params)


LOSSES: Registry[LossEntry] = Registry(
    "loss",
    {
        "triplet": LossEntry(
            _pml("TripletMarginLoss", space=True, ours=("triplets_per_anchor",), margin=MARGIN),
            "triplet margin loss (Schroff et al., CVPR 2015)",
        ),
        "contrastive": LossEntry(
            _pml("ContrastiveLoss", space=True),
            "pairs pulled to 0, pushed to the margin (Hadsell et al., CVPR 2006), linear",
        ),
        "margin": LossEntry(_pml("MarginLoss", space=True), "pairs against a boundary β (Wu et al., ICCV 2017)"),
        "multi-similarity": LossEntry(_pml("MultiSimilarityLoss"), "weighted pairs (Wang et al., CVPR 2019)"),
        "proxy-anchor": LossEntry(_pml("ProxyAnchorLoss"), "proxies as anchors (Kim et al., CVPR 2020)", True),
        "proxy-nca": LossEntry(
            _pml("ProxyNCALoss"), "softmax over proxies (Movshovitz-Attias et al., ICCV 2017)", True
        ),
        "n-pairs": LossEntry(_pml("NPairsLoss"), "softmax over the batch's pairs (Sohn, NIPS 2016)"),
        "nt-xent": LossEntry(_pml("NTXentLoss"), "temperature-scaled softmax over pairs (Chen et al., ICML 2020)"),
        "circle": LossEntry(_pml("CircleLoss"), "self-paced pairs (Sun et al., CVPR 2020)"),
        "lifted-structure": LossEntry(
            _pml("LiftedStructureLoss", space=True), "all pairs of the batch (Oh Song et al., CVPR 2016)"
        ),
        "normalized-softmax": LossEntry(
            _pml("NormalizedSoftmaxLoss"), "classification on the sphere (Zhai and Wu, BMVC 2019)", True
        ),
    },
)

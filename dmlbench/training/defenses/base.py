"""What every defence works with: the learner, the batch, the inner search.

A :data:`Step` is (Learner, Batch, Inner, parameters) to a scalar loss; the training loop does the
rest. The inner search runs the same optimizers as the attacks, with the network in eval mode and its
parameters frozen, so that only the gradient to the images is computed. Every image has its own ball:
the t triplets of a step are searched as 3t images whose losses are those of their triplets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmlbench.embedding import Embedder
from dmlbench.optimizers import Run, pgd
from dmlbench.rng import Rng
from dmlbench.threat import Threat
from dmlbench.training.losses import MARGIN
from dmlbench.training.sampling import draw


class Learner(nn.Module):
    """What is being trained: the embedder, its losses, and the loss of the step before.

    Attributes:
        criteria: the losses, one for each member of an ensemble, else one.
        loss: name of the loss (of :data:`dmlbench.training.losses.LOSSES`).
        margin: the triplet margin γ, of the loss and of semihard mining.
        previous: the triplet loss of the step before, as the gradual adversaries read it; infinite
            before the first step.
    """

    previous: Tensor

    def __init__(self, embedder: Embedder, criteria: nn.ModuleList, loss: str, margin: float = MARGIN) -> None:
        super().__init__()
        self.embedder = embedder
        self.criteria = criteria
        self.loss = loss
        self.margin = margin
        self.register_buffer("previous", torch.tensor(torch.inf))

    def outer(self, embeddings: Float[Tensor, "b d"], batch: "Batch", sampling: str) -> Tensor:
        """The training loss of an embedded batch: triplets are mined on these embeddings for the
        triplet loss; the other losses choose their own pairs."""
        labels = batch.labels
        if self.loss != "triplet":
            return self.criteria[0](embeddings, labels)  # type: ignore[no-any-return]
        found = embeddings.detach()
        distances = self.embedder.distance.pairwise(found[batch.anchors], found)
        stream = batch.stream("outer", batch.anchors)
        rows = draw(sampling, distances, labels, batch.anchors, found.shape[1], stream, self.margin)
        return self.criteria[0](embeddings, labels, tuple(rows.unbind(1)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        images: (b, C, H, W) in [0, 1].
        labels: (b,) classes, 0 … number of classes - 1.
        anchors: (t,) rows of the batch that are anchors of triplets.
        rows: (b,) rows of the data set, on the host.
        seed: of this step's random numbers.
        iteration: how many steps came before.
    """

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    anchors: Int[Tensor, " t"]
    rows: np.ndarray
    seed: int
    iteration: int = 0

    def stream(self, what: str, like: Tensor) -> Rng:
        """Random numbers for ``what``, one stream for each entry of ``like``."""
        return Rng(self.seed, torch.arange(len(like), device=like.device)).fold(what)


@dataclass(frozen=True)
class Inner:
    """The adversary of training: what it may do and how it searches."""

    threat: Threat
    optimizer: Run = pgd


Step = Callable[..., Tensor]
"""(Learner, Batch, Inner, **parameters) to the scalar that is differentiated."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside, as before after."""
    training = [m for m in module.modules() if m.training]
    learnt = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for p in learnt:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learnt:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def search(learner: Learner, batch: Batch, inner: Inner, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Images that minimise ``loss`` (one value per image) inside the threat's balls."""
    with frozen(learner):
        return inner.optimizer(loss, images, inner.threat, batch.stream("search", images)).detach()


def embed(learner: Learner, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Clean embeddings to compare with: eval mode, no gradients."""
    with frozen(learner), torch.no_grad():
        return learner.embedder(images)  # type: ignore[no-any-return]


def triples(embeddings: Float[Tensor, "three_t d"]) -> Float[Tensor, "t 3 d"]:
    """Embeddings of 3t images, as they lie in memory, by triplet."""
    return embeddings.view(-1, 3, embeddings.shape[1])


class Miner:
    """Mines triplets from a batch, embedding it once and only when a sampling looks at distances."""

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.learner, self.batch = learner, batch

    @cached_property
    def embeddings(self) -> Float[Tensor, "b d"]:
        """The batch's clean embeddings."""
        return embed(self.learner, self.batch.images)

    @cached_property
    def distances(self) -> Float[Tensor, "t b"]:
        """Of each anchor to each image."""
        return self.learner.embedder.distance.pairwise(self.embeddings[self.batch.anchors], self.embeddings)

    def triplets(self, sampling: str, what: str = "mine") -> Int[Tensor, "t 3"]:
        """Batch rows of one triplet for each anchor."""
        b, anchors = self.batch, self.batch.anchors
        blind = sampling == "R"
        distances = b.images.new_zeros(len(anchors), len(b.labels)) if blind else self.distances
        dim = 1 if blind else self.embeddings.shape[1]
        return draw(sampling, distances, b.labels, anchors, dim, b.stream(what, anchors), self.learner.margin)

"""What every defence works with: the learner, the batch, the inner search.

A :data:`Step` is (Learner, Batch, Inner, parameters) to a scalar loss; the training loop does the
rest. The inner search runs the same optimizers as the attacks, with the network in eval mode and its
parameters frozen, so that only the gradient to the images is computed. Every image has its own ball:
the t triplets of a step are searched as 3t images whose losses are those of their triplets.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from dmlbench.embedding import Embedder
from dmlbench.errors import UsageError
from dmlbench.optimizers import Run, pgd
from dmlbench.rng import Rng
from dmlbench.threat import Threat
from dmlbench.training.losses import MARGIN
from dmlbench.training.sampling import draw


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The batch norms inside, by where they are."""
    return {place: m for place, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


class Learner(nn.Module):
    """What is being trained: the embedder, its losses, and the loss of the step before.

    Attributes:
        criteria: the losses, one for each member of an ensemble, else one.
        loss: name of the loss (of :data:`dmlbench.training.losses.LOSSES`).
        margin: the triplet margin γ, of the loss and of semihard mining.
        norms: further sets of the network's batch norms, of which training alone knows, each a copy of those that the
            embedder begins with, in their order; :meth:`through` is the embedder with one of them.
        previous: the triplet loss of the step before, as the gradual adversaries read it; infinite
            before the first step.

    Raises:
        UsageError: further batch norms of a network that has none.
    """

    previous: Tensor

    def __init__(
        self, embedder: Embedder, criteria: nn.ModuleList, loss: str, margin: float = MARGIN, norms: int = 0
    ) -> None:
        super().__init__()
        self.embedder = embedder
        self.criteria = criteria
        self.loss = loss
        self.margin = margin
        network_norms = list(batch_norms(embedder).values())
        if norms and not network_norms:
            raise UsageError(
                "the defence keeps separate batch norms for attacked images, and this network has no batch norm"
            )
        self.norms = nn.ModuleList(nn.ModuleList(copy.deepcopy(norm) for norm in network_norms) for _ in range(norms))
        self.register_buffer("previous", torch.tensor(torch.inf))

    def through(self, which: int, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Embeddings by the network with its batch norms' weights and statistics replaced by those of ``norms[which]``,
        which are also the ones that learn and that follow the batch."""
        state = {
            f"{place}.{key}": value
            for place, norm in zip(batch_norms(self.embedder), self.norms[which], strict=True)  # type: ignore[call-overload]
            for key, value in norm.state_dict(keep_vars=True).items()
        }
        return functional_call(self.embedder, state, (images,))  # type: ignore[no-any-return]

    def outer(self, embeddings: Float[Tensor, "b d"], batch: "Batch", sampling: str) -> Tensor:
        """The training loss of an embedded batch: triplets are mined on these embeddings for the
        triplet loss; the other losses choose their own pairs."""
        labels = batch.labels
        if self.loss != "triplet":
            return self.criteria[0](embeddings, labels)  # type: ignore[no-any-return]
        detached = embeddings.detach()
        distances = self.embedder.distance.pairwise(detached[batch.anchors], detached)
        stream = batch.stream("outer", batch.anchors)
        rows = draw(sampling, distances, labels, batch.anchors, detached.shape[1], stream, self.margin)
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

"""Defences on the proxy-anchor loss: AT, a TRADES-style variant, and the ensemble EAT.

AT follows Madry et al. (ICLR 2018), TRADES Zhang et al. (ICML 2019), both adapted from
classification; EAT is Ke (arXiv 2501.01025), of whose text only the abstract and summaries were at
hand. Searches maximise the proxy-anchor loss of each image by itself, since the batch's loss couples
the images.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmlbench.errors import UsageError
from dmlbench.training.defenses.base import Batch, Inner, Learner, embed, search
from dmlbench.training.losses import proxy_anchor_each


def _each(learner: Learner, embeddings: Tensor, labels: Tensor, member: int = 0) -> Tensor:
    """(b,) the proxy-anchor loss of each image by itself, with the criterion's own proxies, margin and alpha."""
    criterion: Any = learner.criteria[member]
    return proxy_anchor_each(embeddings, labels, criterion.proxies, float(criterion.margin), float(criterion.alpha))


def at(learner: Learner, batch: Batch, inner: Inner) -> Tensor:
    """AT: images that maximise their proxy-anchor loss; the loss on these."""
    moved = search(
        learner,
        batch,
        inner,
        batch.images,
        lambda x: -_each(learner, learner.embedder(x), batch.labels),
    )
    return learner.criteria[0](learner.embedder(moved), batch.labels)  # type: ignore[no-any-return]


def trades(learner: Learner, batch: Batch, inner: Inner, *, beta: float = 6.0) -> Tensor:
    """TRADES-style: the clean loss + β · mean d(f(x), f(x~)), x~ moved to maximise that distance.

    The search starts from a reference moved by 1e-7, as EST's does.
    """
    if not beta >= 0:
        raise UsageError(f"beta {beta} must be 0 or more")
    distance = learner.embedder.distance
    reference = embed(learner, batch.images) + 1e-7
    moved = search(learner, batch, inner, batch.images, lambda x: -distance.paired(learner.embedder(x), reference))
    clean, shifted = learner.embedder(torch.cat([batch.images, moved])).view(2, len(moved), -1)
    loss: Tensor = learner.criteria[0](clean, batch.labels) + beta * distance.paired(clean, shifted).mean()
    return loss


def eat(learner: Learner, batch: Batch, inner: Inner) -> Tensor:
    """EAT: each member of the ensemble learns from its own split of the training data, and from images
    made against every member ("self-transfer") and against the ensemble as a whole.

    Member m's split is the data set's rows r with r mod members = m. The loss is the sum over members
    of proxy-anchor on the clean split + the mean of proxy-anchor on each set of adversarial images:
    those that each member's own split gives against that member, and those that the whole batch gives
    against the sum of all members' losses. A member of whose split the batch has no image learns from
    the adversarial images alone. This is our reading of the abstract.
    """
    members = cast(nn.ModuleList, learner.embedder.network.members)
    count = len(members)
    splits = [torch.from_numpy((batch.rows % count == m).nonzero()[0]).to(batch.labels.device) for m in range(count)]

    def of(m: int, x: Tensor) -> Tensor:
        embedder = learner.embedder
        normalised = x if embedder.identity else (x - embedder.mean) / embedder.std
        return embedder.distance.finish(members[m](normalised).float())

    def against(m: int, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: -each(m, x, labels)

    def each(m: int, x: Tensor, labels: Tensor) -> Tensor:
        return _each(learner, of(m, x), labels, m)

    hard = []
    for m, split in enumerate(splits):
        if not len(split):
            continue
        labels = batch.labels[split]
        moved = search(learner, batch, inner, batch.images[split], against(m, labels))
        hard.append((moved, labels))
    whole = search(
        learner,
        batch,
        inner,
        batch.images,
        lambda x: -torch.stack([each(m, x, batch.labels) for m in range(count)]).sum(0),
    )
    hard.append((whole, batch.labels))
    sizes = [len(x) for x, _ in hard]
    stacked = torch.cat([x for x, _ in hard])
    loss = batch.images.new_zeros(())
    for m, split in enumerate(splits):
        criterion = learner.criteria[m]
        clean, *attacked = of(m, torch.cat([batch.images[split], stacked])).split([len(split), *sizes])
        if len(split):
            loss = loss + criterion(clean, batch.labels[split])
        for e, (_, labels) in zip(attacked, hard, strict=True):
            loss = loss + criterion(e, labels) / len(hard)
    return loss

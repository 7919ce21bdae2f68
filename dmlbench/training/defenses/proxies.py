"""Defences on the proxy-anchor loss: AT, a TRADES-style variant, and the ensembles of ADP and EAT.

AT follows Madry et al. (ICLR 2018), TRADES Zhang et al. (ICML 2019), both adapted from
classification; EAT is Ke (arXiv 2501.01025), of whose text only the abstract and summaries were at
hand. Searches maximise the proxy-anchor loss of each image by itself, since the batch's loss couples
the images. ADP follows Pang et al. (ICML 2019), adapted from classification too.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmlbench.errors import UsageError
from dmlbench.training.defenses.base import Batch, Inner, Learner, embed, search
from dmlbench.training.losses import proxy_anchor_each


def _each(learner: Learner, embeddings: Tensor, labels: Tensor, member: int = 0) -> Tensor:
    """(b,) the proxy-anchor loss of each image by itself, with the criterion's own proxies, margin and alpha."""
    criterion: Any = learner.criteria[member]
    return proxy_anchor_each(embeddings, labels, criterion.proxies, float(criterion.margin), float(criterion.alpha))


def _members(learner: Learner) -> nn.ModuleList:
    return cast(nn.ModuleList, learner.embedder.network.members)


def _member(learner: Learner, m: int, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Embeddings by one member of the ensemble alone."""
    embedder = learner.embedder
    return embedder.distance.finish(_members(learner)[m](embedder.normalise(images)).float())


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
    count = len(_members(learner))
    splits = [torch.from_numpy((batch.rows % count == m).nonzero()[0]).to(batch.labels.device) for m in range(count)]

    def against(m: int, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: -each(m, x, labels)

    def each(m: int, x: Tensor, labels: Tensor) -> Tensor:
        return _each(learner, _member(learner, m, x), labels, m)

    hard = []
    for m, split in enumerate(splits):
        if not len(split):
            continue
        labels = batch.labels[split]
        moved = search(learner, batch, inner, batch.images[split], against(m, labels))
        hard.append((moved, labels))
    against_ensemble = search(
        learner,
        batch,
        inner,
        batch.images,
        lambda x: -torch.stack([each(m, x, batch.labels) for m in range(count)]).sum(0),
    )
    hard.append((against_ensemble, batch.labels))
    sizes = [len(x) for x, _ in hard]
    stacked = torch.cat([x for x, _ in hard])
    loss = batch.images.new_zeros(())
    for m, split in enumerate(splits):
        criterion = learner.criteria[m]
        clean, *attacked = _member(learner, m, torch.cat([batch.images[split], stacked])).split([len(split), *sizes])
        if len(split):
            loss = loss + criterion(clean, batch.labels[split])
        for e, (_, labels) in zip(attacked, hard, strict=True):
            loss = loss + criterion(e, labels) / len(hard)
    return loss


SAME = 1e-6
"""Added to the diagonal of the products of directions, so that members that agree have a finite logarithm."""


def diversity(
    predictions: Float[Tensor, "m b c"], labels: Int[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """What ADP rewards (Pang et al., ICML 2019): of each image, the entropy of the members' mean prediction, in nats, and
    the logarithm of the ensemble diversity det(VᵀV), the squared volume that the members' directions span: V's columns are
    their predictions without the true class, scaled to length 1.

    Args:
        predictions: of each member, for each image, over the classes; they sum to 1.
        labels: the true classes.
    """
    mean = predictions.mean(0)
    entropy = -torch.xlogy(mean, mean).sum(1)
    classes = predictions.shape[2]
    wrong = ~F.one_hot(labels, classes).bool()
    others = predictions[:, wrong].view(len(predictions), len(labels), classes - 1)
    v = F.normalize(others, dim=2).transpose(0, 1)  # (b, m, c - 1)
    gram = v @ v.transpose(1, 2) + SAME * torch.eye(len(predictions), device=v.device)
    return entropy, torch.logdet(gram)


def adp(
    learner: Learner,
    batch: Batch,
    inner: Inner,
    *,
    entropy: float = 2.0,
    diverse: float = 0.5,
    temperature: float = 0.1,
) -> Tensor:
    """ADP (Pang et al., ICML 2019) for embeddings: the sum of the members' proxy-anchor losses on clean images
    - ``entropy`` · H - ``diverse`` · log ED, both of :func:`diversity` and averaged over the images.

    A member's prediction of a class is the softmax over the classes of cos(embedding, proxy) / ``temperature``, with the
    member's own proxies, which learn from it too. Nothing is searched for, as in the publication's basic form.
    """
    for name, value in (("entropy", entropy), ("diverse", diverse)):
        if not value >= 0:
            raise UsageError(f"{name} {value} must be 0 or more")
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} must be above 0")
    count = len(_members(learner))
    criteria: list[Any] = [*learner.criteria]
    classes = len(criteria[0].proxies)
    if classes <= count:
        raise UsageError(
            f"adp needs more classes than members, whose directions are among the wrong classes: {classes} and {count}"
        )
    embeddings = [_member(learner, m, batch.images) for m in range(count)]
    cosines = [
        F.normalize(e, dim=1) @ F.normalize(c.proxies, dim=1).t() for e, c in zip(embeddings, criteria, strict=True)
    ]
    uncertain, spread = diversity((torch.stack(cosines) / temperature).softmax(2), batch.labels)
    loss: Tensor = torch.stack([c(e, batch.labels) for e, c in zip(embeddings, criteria, strict=True)]).sum()
    return loss - entropy * uncertain.mean() - diverse * spread.mean()

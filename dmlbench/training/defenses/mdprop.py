"""MDProp: images moved towards one and towards several others, each kind through batch norms of its own.

Singh, Kakizaki and Araki: Advancing deep metric learning with adversarial robustness, ACML 2023 (PMLR 222), arXiv
2211.16253, after AdvProp (Xie et al., CVPR 2020). Of the text the abstract was at hand, and the public code
(github.com/intherejeet/MDProp), which this follows.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.training.defenses.base import Batch, Inner, Learner, frozen, search


def mdprop(learner: Learner, batch: Batch, inner: Inner, *, sampling: str = "R", targets: int = 5) -> Tensor:
    """MDProp: one loss over the clean batch and its adversarial images.

    The batch's first half is moved towards one target each, its second half towards ``targets`` at once: the mean distance
    to the targets' embeddings is minimised. Targets are permutations of the half, so that now and then one is an image of
    the same class, or the image itself. Clean images go through the network's own batch norms, which are those of the
    finished model; each half through its own of ``learner.norms``, in the search (running statistics) and in the loss.
    """
    if targets < 1:
        raise UsageError(f"targets {targets} must be 1 or more")
    half = len(batch.images) // 2
    embedded = [learner.embedder(batch.images)]
    for which, (images, several) in enumerate(((batch.images[:half], 1), (batch.images[half:], targets))):
        order = (
            batch.stream(f"targets {which}", images).uniform(several).argsort(0)
        )  # (b/2, T): columns are permutations
        with frozen(learner), torch.no_grad():
            aims = learner.through(which, images)[order]  # (b/2, T, d)

        def away(x: Tensor, which: int = which, aims: Tensor = aims) -> Tensor:
            return learner.embedder.distance.paired(learner.through(which, x)[:, None], aims).mean(1)

        embedded.append(learner.through(which, search(learner, batch, inner, images, away)))
    both = replace(
        batch,
        images=batch.images.repeat(2, 1, 1, 1),
        labels=batch.labels.repeat(2),
        anchors=torch.cat([batch.anchors, batch.anchors + len(batch.labels)]),
        rows=np.tile(batch.rows, 2),
    )
    return learner.outer(torch.cat(embedded), both, sampling)

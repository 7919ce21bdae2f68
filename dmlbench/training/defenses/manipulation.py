"""Hardness manipulation, HM[S,D], the gradual adversaries and ICS.

Zhou and Patel: Enhancing adversarial robustness for deep metric learning, CVPR 2022, arXiv
2203.01439. H = d(a,p) - d(a,n) of a source triplet is raised to the hardness H_D of a destination:
another triplet of the same anchor, or a number that follows the training loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.registry import Registry
from dmlbench.training.defenses.base import Batch, Inner, Learner, Miner, search, triples
from dmlbench.training.losses import hardness, triplet
from dmlbench.training.sampling import SAMPLINGS

Mined = Callable[[str], Int[Tensor, "t 3"]]
"""A sampling to the anchors' triplets mined so, rows of the batch."""
Destination = Callable[[Learner, Miner, Mined, float], Float[Tensor, "..."]]
"""(Learner, Miner, Mined, constant) to H_D, one for each anchor or one for all."""

BOOST = 0.1
"""ξ of g_B."""


def remaining(learner: Learner) -> Float[Tensor, ""]:
    """min(u, loss of the step before)/u in [0, 1], u = γ: 1 while training starts, to 0 as it is done."""
    return learner.previous.clamp(max=learner.margin) / learner.margin


def _mined(name: str) -> Destination:
    def destination(learner: Learner, miner: Miner, mined: Mined, constant: float) -> Tensor:
        return hardness(learner.embedder.distance, miner.embeddings[mined(name)])

    return destination


def _boosted(name: str) -> Destination:
    of = _mined(name)
    return lambda learner, miner, mined, constant: (
        of(learner, miner, mined, constant) + BOOST * (1.0 - remaining(learner))
    )


DESTINATIONS: Registry[Destination] = Registry(
    "destination hardness",
    {
        **{name: _mined(name) for name in SAMPLINGS},
        "LGA": lambda learner, miner, mined, constant: -learner.margin * remaining(learner),
        "square": lambda learner, miner, mined, constant: -learner.margin * remaining(learner).square(),
        "sqrt": lambda learner, miner, mined, constant: -learner.margin * remaining(learner).sqrt(),
        "constant": lambda learner, miner, mined, constant: torch.full_like(learner.previous, constant),
        **{f"B({name})": _boosted(name) for name in SAMPLINGS},
    },
)
"""R, M, S, D, H: hardness of the same anchor's triplet mined so; LGA: g_LGA = -γ·min(u, loss)/u; square
and sqrt: the same with the square and the square root of that ratio; B(D): g_B."""


def hm(
    learner: Learner,
    batch: Batch,
    inner: Inner,
    *,
    source: str = "S",
    destination: str = "LGA",
    constant: float = -0.1,
    ics: float = 0.0,
    ics_margin: float = 0.0,
) -> Tensor:
    """HM[source, destination]: minimise max(0, H_D - H)² over the perturbed source triplet, then the
    triplet loss on it; where H has reached H_D the gradient is zero and the triplet stays as it is.

    Args:
        source: sampling of the perturbed triplets.
        destination: a name of :data:`DESTINATIONS`.
        constant: H_D of destination "constant", in [-γ, 0].
        ics: λ of the intra-class structure loss, λ·max(0, d(a, a~) - d(a, p) + ics_margin); 0 is none.
        ics_margin: its margin.

    Where both are the same sampling the destination is the source triplet itself, so HM[S,S] perturbs nothing, as in the
    paper's table (η "N/A"), and HM[S,g_B(S)] raises each triplet's own hardness.

    The loss of the step before is, as we read it, the HM triplet loss without the ICS term. a and p
    of the ICS term are the clean images, embedded in the same pass as the perturbed triplet.
    """
    if destination == "constant" and not -learner.margin <= constant <= 0:
        raise UsageError(f"constant {constant} must lie in [-{learner.margin}, 0]")
    if not ics >= 0:
        raise UsageError(f"ics {ics} must be 0 (none) or more")
    miner = Miner(learner, batch)
    distance = learner.embedder.distance
    rows = miner.triplets(source)
    target = DESTINATIONS[destination](
        learner, miner, lambda name: rows if name == source else miner.triplets(name, "destination"), constant
    )

    def gap(x: Tensor) -> Tensor:
        return F.relu(target - hardness(distance, triples(learner.embedder(x)))).square().repeat_interleave(3)

    moved = search(learner, batch, inner, batch.images[rows.view(-1)], gap)  # (3t, C, H, W)
    t = len(rows)
    images = torch.cat([moved, batch.images[rows[:, :2].t().reshape(-1)]]) if ics > 0 else moved
    e = learner.embedder(images)
    perturbed = triples(e[: 3 * t])
    loss = triplet(hardness(distance, perturbed), learner.margin).mean()
    learner.previous = loss.detach()
    if ics > 0:
        a, p = e[3 * t :].view(2, t, -1)
        loss = loss + ics * F.relu(distance.paired(a, perturbed[:, 0]) - distance.paired(a, p) + ics_margin).mean()
    return loss

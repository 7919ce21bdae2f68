"""How an adversary searches: (loss, images, Threat, Rng) to adversarial images.

Every optimizer minimises ``loss`` for each image alone inside the threat's ball and [0, 1]. A loss
maps images (b, ...) to (b,); the images may be of any trailing shape (a triplet is (3, C, H, W)).
A :data:`Gradient` gives the values (b,) and the gradient: :func:`autograd` for a white box.
A new optimizer is a function and one line of :data:`OPTIMIZERS`; plan, audit and tests read that line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmlbench.optimizers.apgd import apgd
from dmlbench.optimizers.base import Divisible, Gradient, Hunt, Loss, Run, autograd, keep_lower, watched
from dmlbench.optimizers.black import POPULATION, nes, noise, spsa
from dmlbench.optimizers.carlini import ROUNDS, cw
from dmlbench.optimizers.cosine import cosine
from dmlbench.optimizers.gradient import fgsm, mi_fgsm, pgd, pgd_restarts, r_fgsm
from dmlbench.optimizers.hopskipjump import hopskipjump
from dmlbench.optimizers.square import square
from dmlbench.optimizers.universal import universal
from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.threat import Threat

__all__ = [
    "OPTIMIZERS",
    "Divisible",
    "Gradient",
    "Hunt",
    "Loss",
    "Optimizer",
    "Run",
    "apgd",
    "autograd",
    "cosine",
    "cw",
    "fgsm",
    "hopskipjump",
    "keep_lower",
    "mi_fgsm",
    "nes",
    "noise",
    "pgd",
    "pgd_restarts",
    "r_fgsm",
    "spsa",
    "square",
    "universal",
    "watched",
]

Count = Callable[[Threat], int]
"""A threat to a number of passes for one image."""


def _none(threat: Threat) -> int:
    return 0


@dataclass(frozen=True)
class Optimizer:
    """A search and all that others need to know of it. Called, it runs.

    Costs are what it spends on one image at the most; images that a hunt has settled cost less.

    Attributes:
        run: (loss, images (b, ...), Threat, Rng) to adversarial images (b, ...).
        cost: in the threat's words, the few values at the ends left out.
        gradients: forward and backward passes.
        values: forward passes alone.
        by_queries: the search is as long as the threat's queries, not its steps.
        whole_set: it finds one thing for all queries and must be given them at once; its ``block`` says how many go
            through the network at a time.
        strays: on its way it looks at images outside the ball.
        by_decisions: it sees only whether the loss is 0 or less, so it serves attacks of which that says something.
    """

    run: Run
    cost: str
    gradients: Count = _none
    values: Count = _none
    by_queries: bool = False
    whole_set: bool = False
    strays: bool = False
    by_decisions: bool = False

    def __call__(self, loss: Loss, images: Tensor, threat: Threat, rng: Rng, **options: Any) -> Tensor:
        """Adversarial images for clean ``images`` (b, ...), each inside the threat."""
        return self.run(loss, images, threat, rng, **options)

    @property
    def needs_gradients(self) -> bool:
        """Does it follow the gradient? Else the model is a black box to it."""
        return self.gradients is not _none

    def passes(self, threat: Threat) -> tuple[int, int]:
        """Gradients and values for one image, each as often as ``threat.eot`` says."""
        return self.gradients(threat) * threat.eot, self.values(threat) * threat.eot


def _probed(t: Threat) -> int:
    """Values of PGD's loop along an estimated gradient: those of the estimates, and one for each last iterate."""
    return t.restarts * t.steps * POPULATION + (t.restarts if t.restarts > 1 else 0)


OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    {
        "pgd": Optimizer(
            pgd,
            "restarts × steps gradients",
            lambda t: t.restarts * t.steps,
            lambda t: t.restarts if t.restarts > 1 else 0,
        ),
        "pgd-restarts": Optimizer(
            pgd_restarts,
            "10 × steps gradients",
            lambda t: max(10, t.restarts) * t.steps,
            lambda t: max(10, t.restarts),
        ),
        "fgsm": Optimizer(fgsm, "1 gradient", lambda t: 1),
        "r-fgsm": Optimizer(r_fgsm, "1 gradient", lambda t: 1),
        "mi-fgsm": Optimizer(mi_fgsm, "steps gradients", lambda t: t.steps),
        "apgd": Optimizer(
            apgd,
            "restarts × steps gradients, 1 value each",
            lambda t: t.restarts * max(1, t.steps),
            lambda t: t.restarts if t.steps else 0,
        ),
        "cosine": Optimizer(
            cosine, "restarts × steps gradients, 1 value each", lambda t: t.restarts * t.steps, lambda t: t.restarts
        ),
        "cw": Optimizer(
            cw, f"{ROUNDS} × steps gradients", lambda t: ROUNDS * t.steps, lambda t: 1 + ROUNDS, strays=True
        ),
        "nes": Optimizer(nes, f"{POPULATION} × steps values", values=lambda t: _probed(t) if t.radius else 0),
        "spsa": Optimizer(spsa, f"{POPULATION} × steps values", values=_probed),
        "square": Optimizer(square, "queries values", values=lambda t: t.queries, by_queries=True),
        "hopskipjump": Optimizer(
            hopskipjump,
            "queries decisions",
            values=lambda t: t.queries,
            by_queries=True,
            strays=True,
            by_decisions=True,
        ),
        "noise": Optimizer(noise, "queries values", values=lambda t: t.queries, by_queries=True),
        "universal": Optimizer(universal, "steps gradients", lambda t: t.steps, whole_set=True),
    },
)

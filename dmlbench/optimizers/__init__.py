"""How an adversary searches: (loss, images, Threat, Rng) to adversarial images.

Every optimizer minimises ``loss`` for each image alone inside the threat's ball and [0, 1]. A loss
maps images (b, ...) to (b,); the images may be of any trailing shape (a triplet is (3, C, H, W)).
A :data:`Gradient` gives the values (b,) and the gradient: :func:`autograd` for a white box.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dmlbench.optimizers.apgd import apgd
from dmlbench.optimizers.base import Divisible, Gradient, Hunt, Loss, Optimizer, autograd, keep_lower, watched
from dmlbench.optimizers.black import POPULATION, nes, noise, spsa
from dmlbench.optimizers.carlini import ROUNDS, cw
from dmlbench.optimizers.cosine import cosine
from dmlbench.optimizers.gradient import fgsm, mi_fgsm, pgd, pgd_restarts, r_fgsm
from dmlbench.optimizers.square import square
from dmlbench.optimizers.universal import universal
from dmlbench.registry import Registry
from dmlbench.threat import Threat

__all__ = [
    "BY_QUERIES",
    "COSTS",
    "OPTIMIZERS",
    "WHOLE_SET",
    "Cost",
    "Divisible",
    "Gradient",
    "Hunt",
    "Loss",
    "Optimizer",
    "apgd",
    "autograd",
    "cosine",
    "cw",
    "fgsm",
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
class Cost:
    """What an optimizer spends on one image at the most; images that a hunt has settled cost less.

    Attributes:
        text: in the threat's words, the few values at the ends left out.
        gradients: forward and backward passes.
        values: forward passes alone.

    Each is of one network: ``eot`` passes are averaged for each (:meth:`passes`).
    """

    text: str
    gradients: Count = _none
    values: Count = _none

    def passes(self, threat: Threat) -> tuple[int, int]:
        """Gradients and values for one image, each as often as ``threat.eot`` says."""
        return self.gradients(threat) * threat.eot, self.values(threat) * threat.eot


OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    {
        "pgd": pgd,
        "pgd-restarts": pgd_restarts,
        "fgsm": fgsm,
        "r-fgsm": r_fgsm,
        "mi-fgsm": mi_fgsm,
        "apgd": apgd,
        "cosine": cosine,
        "cw": cw,
        "nes": nes,
        "spsa": spsa,
        "square": square,
        "noise": noise,
        "universal": universal,
    },
)

COSTS: dict[str, Cost] = {
    "pgd": Cost(
        "restarts × steps gradients",
        lambda t: t.restarts * t.steps,
        lambda t: t.restarts if t.restarts > 1 else 0,
    ),
    "pgd-restarts": Cost(
        "10 × steps gradients", lambda t: max(10, t.restarts) * t.steps, lambda t: max(10, t.restarts)
    ),
    "fgsm": Cost("1 gradient", lambda t: 1),
    "r-fgsm": Cost("1 gradient", lambda t: 1),
    "mi-fgsm": Cost("steps gradients", lambda t: t.steps),
    "apgd": Cost(
        "restarts × steps gradients, 1 value each",
        lambda t: t.restarts * max(1, t.steps),
        lambda t: t.restarts if t.steps else 0,
    ),
    "cosine": Cost("restarts × steps gradients, 1 value each", lambda t: t.restarts * t.steps, lambda t: t.restarts),
    "cw": Cost(f"{ROUNDS} × steps gradients", lambda t: ROUNDS * t.steps, lambda t: 1 + ROUNDS),
    "nes": Cost(f"{POPULATION} × steps values", values=lambda t: _probed(t) if t.radius else 0),
    "spsa": Cost(f"{POPULATION} × steps values", values=lambda t: _probed(t)),
    "square": Cost("queries values", values=lambda t: t.queries),
    "noise": Cost("queries values", values=lambda t: t.queries),
    "universal": Cost("steps gradients", lambda t: t.steps),
}
"""What each optimizer spends on one image, by name of :data:`OPTIMIZERS`: a new one has its line here too."""


def _probed(t: Threat) -> int:
    """Values of PGD's loop along an estimated gradient: those of the estimates, and one for each last iterate."""
    return t.restarts * t.steps * POPULATION + (t.restarts if t.restarts > 1 else 0)


BY_QUERIES = frozenset({"square", "noise"})
"""Optimizers whose search is as long as the threat's queries, not its steps."""

WHOLE_SET = frozenset({"universal"})
"""Optimizers that find one thing for all queries and must be given them at once; ``block`` says how many of these go
through the network at a time."""

"""How an adversary searches: (loss, images, Threat, Rng) to adversarial images.

Every optimizer minimises ``loss`` for each image alone inside the threat's ball and [0, 1]. A loss
maps images (b, ...) to (b,); the images may be of any trailing shape (a triplet is (3, C, H, W)).
A :data:`Gradient` gives the values (b,) and the gradient: :func:`autograd` for a white box.
"""

from dmlbench.optimizers.apgd import apgd
from dmlbench.optimizers.base import Divisible, Gradient, Hunt, Loss, Optimizer, autograd, keep_lower, watched
from dmlbench.optimizers.black import nes, noise, spsa
from dmlbench.optimizers.carlini import cw
from dmlbench.optimizers.gradient import fgsm, mi_fgsm, pgd, pgd_restarts, r_fgsm
from dmlbench.optimizers.square import square
from dmlbench.optimizers.universal import universal
from dmlbench.registry import Registry

__all__ = [
    "COSTS",
    "OPTIMIZERS",
    "WHOLE_SET",
    "Divisible",
    "Gradient",
    "Hunt",
    "Loss",
    "Optimizer",
    "apgd",
    "autograd",
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

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    {
        "pgd": pgd,
        "pgd-restarts": pgd_restarts,
        "fgsm": fgsm,
        "r-fgsm": r_fgsm,
        "mi-fgsm": mi_fgsm,
        "apgd": apgd,
        "cw": cw,
        "nes": nes,
        "spsa": spsa,
        "square": square,
        "noise": noise,
        "universal": universal,
    },
)

COSTS: dict[str, str] = {
    "pgd": "restarts × steps gradients",
    "pgd-restarts": "10 × steps gradients",
    "fgsm": "1 gradient",
    "r-fgsm": "1 gradient",
    "mi-fgsm": "steps gradients",
    "apgd": "restarts × steps gradients, 1 value each",
    "cw": "6 × steps gradients",
    "nes": "100 × steps values",
    "spsa": "100 × steps values",
    "square": "queries values",
    "noise": "queries values",
    "universal": "steps gradients",
}
"""What each optimizer spends on one image; a value is a forward pass, a gradient a forward and a backward one."""

WHOLE_SET = frozenset({"universal"})
"""Optimizers that find one thing for all queries and must be given them at once; ``block`` says how many of these go
through the network at a time."""

"""Attacks: an objective aimed at chosen targets, descended by an optimizer inside a threat, read out.

The file to show a visitor. :func:`craft` searches, :func:`measure` looks at what came out (the harness
measures, never the attack). A new attack is an objective in ``objectives.py`` and a line in
:data:`ATTACKS`; another package adds its own through the entry point group ``dmlbench.attacks``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.embedding import Embedder
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS, Optimizer
from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.scene import Scene
from dmlbench.targets import TARGETS
from dmlbench.threat import Threat


@dataclass(frozen=True)
class Attack:
    """What an adversary wants and from whom.

    Attributes:
        title: one line for a person.
        objective: a name of :data:`~dmlbench.objectives.OBJECTIVES`.
        targets: a name of :data:`~dmlbench.targets.TARGETS`, or "" for an attack that aims at nobody.
        readouts: names of :data:`~dmlbench.metrics.READOUTS` that say what it achieved.
        source: the paper.
        k: targets per image.
        note: how it differs from the paper, if it does.
    """

    title: str
    objective: str
    targets: str
    readouts: tuple[str, ...]
    source: str
    k: int = 1
    note: str = ""


_ECCV = "Zhou et al., ECCV 2020, arXiv 2002.11293"
_CVPR = "Zhou and Patel, CVPR 2022, arXiv 2203.01439"
_R, _C, _Q = ("recall_at_1",), ("candidate_rank",), ("rank_in_query",)

ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "CA+": Attack("raise a candidate in a query's list", "raise_candidate", "anywhere", _C, _ECCV),
        "CA-": Attack("lower a candidate in a query's list", "lower_candidate", "top_percent", _C, _ECCV),
        "QA+": Attack("raise a candidate by changing the query", "raise_in_query", "anywhere", _Q, _ECCV),
        "QA-": Attack("lower a candidate by changing the query", "lower_in_query", "top_percent", _Q, _ECCV),
        "TMA": Attack("targeted mismatch: look like another image", "match", "anywhere", ("target_cosine",), _CVPR),
        "ES": Attack("embedding shift", "shift", "", ("embedding_shift", "recall_at_1"), _CVPR),
        "LTM": Attack("learning to misrank: negatives before the nearest positive", "spread", "", _R, _CVPR,
                      note="the image's own entry is not a positive"),
        "GTM": Attack("greedy top-1 misrank: come near the nearest negative", "approach", "nearest_other", _R, _CVPR,
                      note="the target is the nearest entry of another class, as the paper's text says"),
        "GTT": Attack("greedy top-1 translocation: push the top-1 out of the top 4", "lower_in_query", "nearest",
                      ("kept_in_top_4",), _CVPR),
        "LTM-published": Attack("LTM as behind the published numbers", "spread_published", "", _R, _CVPR,
                                note="the image's own clean entry counts as a positive"),
        "GTM-published": Attack("GTM as behind the published numbers", "approach", "nearest_other_published", _R, _CVPR,
                                note="the target is an arbitrary entry, by a slip of an index"),
    },
)  # fmt: skip


def load_plugins() -> None:
    """Add the attacks that installed packages offer in the entry point group ``dmlbench.attacks``."""
    for point in entry_points(group="dmlbench.attacks"):
        if point.name not in ATTACKS:
            ATTACKS.add(point.name, point.load())


def parse(name: str) -> tuple[str, str]:
    """``"QA+@square"`` to attack and optimizer names ("pgd" when none is given), both checked."""
    attack, _, optimizer = name.partition("@")
    ATTACKS[attack]
    OPTIMIZERS[optimizer or "pgd"]
    return attack, optimizer or "pgd"


def aim(attack: Attack, scene: Scene, rng: Rng) -> Scene:
    """The scene with this attack's targets chosen."""
    if not attack.targets:
        return scene.aimed(scene.row.new_zeros(len(scene), 0))
    return scene.aimed(TARGETS[attack.targets](scene, attack.k, rng))


def craft(
    embedder: Embedder, attack: Attack, optimizer: Optimizer, threat: Threat, images: Tensor, scene: Scene, rng: Rng
) -> Float[Tensor, "B C H W"]:
    """Adversarial images for ``images`` (B, C, H, W), which ``scene`` describes and is aimed from."""
    objective = OBJECTIVES[attack.objective]
    with torch.no_grad():
        return optimizer(lambda x: objective(embedder(x), scene), images, threat, rng)


def measure(
    embedder: Embedder, attack: Attack, threat: Threat, adversarial: Tensor, images: Tensor, scene: Scene
) -> Mapping[str, np.ndarray]:
    """Read-outs (B,) by name, and "norm" (B,), the size of each perturbation in the threat's norm.

    Raises:
        AssertionError: an image left the ball or [0, 1]; an optimizer is at fault.
    """
    with torch.no_grad():
        inside = threat.contains(adversarial, images)
        if not bool(inside.all()):
            raise AssertionError(f"{int((~inside).sum())} adversarial images are outside the threat {threat}")
        e = embedder(adversarial)
        out = {name: READOUTS[name].read(e, scene).cpu().numpy() for name in attack.readouts}
        out["norm"] = threat.ball.size(adversarial - images).cpu().numpy()
    return out

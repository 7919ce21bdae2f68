"""Defences: one training-step function each, in the :data:`DEFENSES` table.

A step searches for hard images with the optimizers of the attacks and returns the loss to be
differentiated; its keyword arguments are the defence's parameters. A new defence is a function of
the type :data:`~dmlbench.training.defenses.base.Step` and a line of the table.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.registry import Registry, suggest
from dmlbench.training.defenses.base import Batch, Inner, Learner, Step
from dmlbench.training.defenses.manipulation import DESTINATIONS, hm
from dmlbench.training.defenses.mdprop import mdprop
from dmlbench.training.defenses.proxies import adp, at, eat, trades
from dmlbench.training.defenses.triplets import act, ca_tride, est, min_max, noise, none, robust
from dmlbench.training.sampling import SAMPLINGS
from dmlbench.user_code import load_user_code

__all__ = ["DEFENSES", "DESTINATIONS", "Batch", "DefenseEntry", "Inner", "Learner", "Paper", "Step"]


@dataclass(frozen=True)
class Paper:
    """Where a defence was published."""

    title: str
    url: str
    venue: str
    year: int


@dataclass(frozen=True)
class DefenseEntry:
    """One defence.

    Attributes:
        step: the training step; its keyword-only arguments are the parameters, with their defaults.
        title: one line.
        paper: where it was published.
        losses: the losses it is defined on; empty for any.
        ensemble: True where the network must be an ensemble.
        norms: further sets of batch norms that it trains with; where there are any, the network must have batch norms.
        outer: True where its loss is :meth:`Learner.outer`'s, which mines triplets for the triplet loss alone.
        searches: False where it searches for no images: then there is no adversary of training.
    """

    step: Step
    title: str
    paper: Paper | None = None
    losses: tuple[str, ...] = ("triplet",)
    ensemble: bool = False
    norms: int = 0
    outer: bool = False
    searches: bool = True
    defaults: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.step).parameters.values()
        object.__setattr__(self, "defaults", {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY})

    def parameters(self, given: dict[str, Any]) -> dict[str, Any]:
        """The defaults with ``given`` over them.

        Raises:
            UsageError: a parameter that the defence does not have, or of another type.
        """
        for name, value in given.items():
            if name not in self.defaults:
                raise UsageError(f"unknown parameter {name!r} of the defence{suggest(name, self.defaults)}")
            kind = type(self.defaults[name])
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise UsageError(f"defence parameter {name} = {value!r} must be a {kind.__name__}")
            if name in ("sampling", "source"):
                SAMPLINGS[str(value)]
            if name == "destination":
                DESTINATIONS[str(value)]
        return {**self.defaults, **given}


_RANK = Paper("Adversarial Attack and Defense in Deep Ranking", "https://arxiv.org/abs/2106.03614", "TPAMI", 2024)
_HM = Paper(
    "Enhancing Adversarial Robustness for Deep Metric Learning", "https://arxiv.org/abs/2203.01439", "CVPR", 2022
)
_PANUM = Paper(
    "Exploring Adversarial Robustness of Deep Metric Learning", "https://arxiv.org/abs/2102.07265", "arXiv", 2021
)
_EAT = Paper(
    "Towards Adversarially Robust Deep Metric Learning",
    "https://arxiv.org/abs/2501.01025",
    "arXiv",
    2025,
)
_TRIDE = Paper(
    "Collapse-Aware Triplet Decoupling for Adversarially Robust Image Retrieval",
    "https://arxiv.org/abs/2312.07364",
    "ICML",
    2024,
)
_PGD = Paper(
    "Towards Deep Learning Models Resistant to Adversarial Attacks", "https://arxiv.org/abs/1706.06083", "ICLR", 2018
)
_MDPROP = Paper(
    "Advancing Deep Metric Learning With Adversarial Robustness",
    "https://proceedings.mlr.press/v222/singh24a.html",
    "ACML",
    2023,
)
_ADP = Paper(
    "Improving Adversarial Robustness via Promoting Ensemble Diversity",
    "https://arxiv.org/abs/1901.08846",
    "ICML",
    2019,
)
_SMOOTHING = Paper(
    "Certified Adversarial Robustness via Randomized Smoothing", "https://arxiv.org/abs/1902.02918", "ICML", 2019
)
_TRADES = Paper(
    "Theoretically Principled Trade-off between Robustness and Accuracy",
    "https://arxiv.org/abs/1901.08573",
    "ICML",
    2019,
)

DEFENSES: Registry[DefenseEntry] = Registry(
    "defence",
    {
        "none": DefenseEntry(none, "no defence: the loss on clean images", losses=(), outer=True, searches=False),
        "noise": DefenseEntry(
            noise, "the loss on images with Gaussian noise", _SMOOTHING, losses=(), outer=True, searches=False
        ),
        "est": DefenseEntry(est, "EST: the loss on images moved by embedding shift", _RANK, losses=(), outer=True),
        "act": DefenseEntry(act, "ACT: positive and negative drawn together", _RANK),
        "min-max": DefenseEntry(min_max, "Madry's min-max on the triplet loss (collapses)", _PGD),
        "hm": DefenseEntry(hm, "HM: hardness raised to a destination; with ICS where ics > 0", _HM),
        "robust": DefenseEntry(
            robust, "robust training on one element of the triplet", _PANUM, losses=("triplet", "contrastive")
        ),
        "ca-tride": DefenseEntry(ca_tride, "CA-TRIDE: anchors and candidates in turn, gentle near collapse", _TRIDE),
        "mdprop": DefenseEntry(
            mdprop,
            "MDProp: clean, single-targeted and multi-targeted images, each through batch norms of its own",
            _MDPROP,
            losses=(),
            norms=2,
            outer=True,
        ),
        "at": DefenseEntry(at, "AT: proxy-anchor on images that maximise it", _PGD, losses=("proxy-anchor",)),
        "trades": DefenseEntry(
            trades, "TRADES: clean proxy-anchor + β · embedding shift", _TRADES, losses=("proxy-anchor",)
        ),
        "eat": DefenseEntry(
            eat,
            "EAT: an ensemble on splits of the data, with self-transfer",
            _EAT,
            losses=("proxy-anchor",),
            ensemble=True,
        ),
        "adp": DefenseEntry(
            adp,
            "ADP: an ensemble whose members are rewarded for differing on the wrong classes",
            _ADP,
            losses=("proxy-anchor",),
            ensemble=True,
            searches=False,
        ),
    },
)


def user_defense(text: str) -> str:
    """The name that :data:`DEFENSES` has it by of ``FILE.py:NAME``, a :data:`Step` or a :class:`DefenseEntry`, which is
    read and added here.

    Raises:
        UsageError: no such file or name. DataError: it is neither.
    """
    code = load_user_code(text)
    if code.label in DEFENSES:
        return code.label
    defense = code.value
    if not isinstance(defense, DefenseEntry):
        code.require_takes(3, "(learner, batch, inner, *, parameters), nor a DefenseEntry")

        def step(*args: Any, **params: Any) -> Tensor:
            loss = code.call(*args, **params)
            right = isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad
            code.require(right, "did not give a loss to differentiate, a tensor of no dimensions with a gradient")
            return loss  # type: ignore[no-any-return]

        step.__signature__ = inspect.signature(defense)  # type: ignore[attr-defined]
        defense = DefenseEntry(step, f"own defence {code.name}", losses=())
    bare = [name for name, default in defense.defaults.items() if default is inspect.Parameter.empty]
    code.require(not bare, f"has a parameter without a default: {', '.join(bare)}")
    code.called(code.label)
    DEFENSES.add(code.label, defense)
    return code.label

"""Attacks: an objective aimed at chosen targets, descended by an optimizer inside a threat, read out.

The file to show a visitor. :func:`craft` searches, :func:`measure` looks at what came out (the harness
measures, never the attack). A new attack is an objective in ``objectives.py`` and a line in
:data:`ATTACKS`; another package adds its own through the entry point group ``dmlbench.plugins``, and a file
of the user's is named as it is (:func:`user_attacks`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.embedding import Embedder, passes, require_finite
from dmlbench.errors import DataError, UsageError
from dmlbench.fast.exact import true_float32
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES, Objective
from dmlbench.optimizers import OPTIMIZERS, Run
from dmlbench.registry import Registry
from dmlbench.rng import Rng
from dmlbench.scene import Scene
from dmlbench.targets import TARGETS
from dmlbench.threat import Threat
from dmlbench.user_code import UserCode, load_user_code


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
        ends: for each read-out the raw value of a model that gives in to the attack and of one that withstands it.
        decides: its objective is 0 or less where the attack has succeeded, and nowhere else.
    """

    title: str
    objective: str
    targets: str
    readouts: tuple[str, ...]
    source: str
    k: int = 1
    note: str = ""
    ends: tuple[tuple[int | float, int | float], ...] = ((0, 100),)
    decides: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.readouts, str) or len(self.ends) != len(self.readouts):
            raise UsageError(
                f"attack {self.title!r}: readouts {self.readouts!r} must be a tuple, and ends {self.ends!r} a pair for each"
            )


_ECCV = "Zhou et al., ECCV 2020, arXiv 2002.11293"
_CVPR = "Zhou and Patel, CVPR 2022, arXiv 2203.01439"
_ICCV = "Zhou et al., ICCV 2021, arXiv 2103.05248"
_PANUM = "Panum et al., arXiv 2102.07265"
_BAI = "Bai et al., arXiv 1901.10650"
_THIS_PROJECT = "dmlbench, docs/strict.md"
_GUIDES = (
    "the public code moves the gallery's pictures, with all queries of the identity as guides; here the query is moved"
)
_RM = ("recall_at_1", "map_at_r")
_R, _C, _Q = ("recall_at_1",), ("candidate_rank",), ("rank_in_query",)
_SP = ("rank_of_wanted", "rank_of_kept")
_ORDER = ("kendall_tau", "rank_in_query")
_PAIR = ("pair_accuracy", "rank_in_query")
_UP, _DOWN = ((0, 50),), ((100, 0),)
_WEIGHT = "the weight of the second term is as remembered from the paper, whose text was not at hand"
_MEAN = "relu summed over pairs in the paper, averaged here: the same steps under a sign"

ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "CA+": Attack("raise a candidate in a query's list", "raise_candidate", "anywhere", _C, _ECCV, ends=_UP),
        "CA-": Attack("lower a candidate in a query's list", "lower_candidate", "top_percent", _C, _ECCV, ends=_DOWN),
        "QA+": Attack("raise a candidate by changing the query", "raise_in_query", "anywhere", _Q, _ECCV, ends=_UP),
        "QA-": Attack("lower a candidate by changing the query", "lower_in_query", "top_percent", _Q, _ECCV,
                      ends=_DOWN),
        "TMA": Attack("targeted mismatch: look like another image", "match", "anywhere", ("target_cosine",), _CVPR,
                      ends=((1, 0),)),
        "ES": Attack("embedding shift", "shift", "", ("embedding_shift", "recall_at_1"), _CVPR,
                     ends=((2, 0), (0, 100))),
        "LTM": Attack("learning to misrank: negatives before the nearest positive", "spread", "", _R, _CVPR,
                      note="the image's own entry is not a positive"),
        "GTM": Attack("greedy top-1 misrank: come near the nearest negative", "approach", "nearest_other", _R, _CVPR,
                      note="the target is the nearest entry of another class, as the paper's text says"),
        "GTT": Attack("greedy top-1 translocation: push the top-1 out of the top 4", "lower_in_query", "nearest",
                      ("kept_in_top_4",), _CVPR),
        "ES-published": Attack("ES as behind the published numbers", "shift_published", "",
                               ("embedding_shift", "recall_at_1"), _CVPR, ends=((2, 0), (0, 100)),
                               note="the public code's distance adds 1e-6 to each difference: the first step goes the "
                                    "other way"),
        "LTM-published": Attack("LTM as behind the published numbers", "spread_published", "", _R, _CVPR,
                                note="the image's own clean entry counts as a positive"),
        "GTM-published": Attack("GTM as behind the published numbers", "approach", "nearest_other_published", _R, _CVPR,
                                note="the target is an arbitrary entry, by a slip of an index"),
        "GTM-published-2": Attack("GTM as behind the published numbers, its distance too", "approach_published",
                                  "nearest_other_published", _R, _CVPR,
                                  note="GTM-published, with the 1e-6 that the public code's distance adds"),
        "WM": Attack("misrank by the margin, positive and negative looked up at every step", "margin", "", _R, _THIS_PROJECT,
                     decides=True),
        "MT": Attack("misrank in favour of one other class", "margin_to_class", "nearest_classes", _R, _THIS_PROJECT,
                     note="alone: the nearest wrong class; in `strict`: the five nearest in turn", decides=True),
        "ME": Attack("misrank in favour of one entry of another class", "margin_to_entry", "nearest_other", _R, _THIS_PROJECT,
                     note="alone: the nearest wrong entry; in `strict`: the nearest ones in turn", decides=True),
        "Panum": Attack("move away from the nearest positive, read on the queries that are right when clean", "leave",
                        "nearest_same", ("recall_of_right", "map_at_r_of_right"), _PANUM,
                        ends=((0, 100), (0, 100)), note="the protocols panum-28 and panum-28-l2 have its threat"),
        "MA-": Attack("metric attack: move away from 5 guides of one's own class", "leave_guides", "nearest_same", _RM, _BAI, k=5,
                      ends=((0, 100), (0, 100)), note=f"the guides are the nearest positives; {_GUIDES}"),
        "MA+": Attack("metric attack, targeted: move towards 5 guides of another class", "join_guides", "guides_of_another", _RM,
                      _BAI, k=5, ends=((0, 100), (0, 100)), note=f"the class is that of a random entry; {_GUIDES}"),
        "FLIP": Attack("flip the decision on a pair: dodging of a genuine one, impersonation in one of two classes", "flip",
                       "anywhere", _R, "dmlbench, docs/verification.md",
                       note="alone: the pair of the image and a random entry; under protocols that verify pairs: the drawn one"),
        **{f"{name}{k}": Attack(f"{name} with {k} {role} at once", objective, targets, read, _ECCV, k=k, ends=ends)
           for name, role, objective, targets, read, ends in (
               ("CA+", "queries", "raise_candidate", "anywhere", _C, _UP),
               ("CA-", "queries", "lower_candidate", "top_percent", _C, _DOWN),
               ("QA+", "candidates", "raise_in_query", "anywhere", _Q, _UP),
               ("QA-", "candidates", "lower_in_query", "top_percent", _Q, _DOWN))
           for k in (2, 5, 10)},
        "SPQA+": Attack("QA+ that keeps the head of the list", "raise_and_keep", "anywhere_keeping_nearest", _SP, _ECCV,
                        ends=((0, 50), (50, 0)), note=_WEIGHT),
        "SPQA-": Attack("QA- that keeps the head of the list", "lower_and_keep", "top_percent_keeping_nearest", _SP,
                        _ECCV, ends=((100, 0), (50, 0)), note=_WEIGHT),
        **{f"{prefix}FOA{k}": Attack(f"order attack on {k} candidates{more}", objective, "top_percent",
                                     _PAIR if k == 2 else _ORDER, _ICCV, k=k,
                                     ends=((100, 50) if k == 2 else (1, 0), (50, 0)), note=note)
           for prefix, more, objective, note in (
               ("", "", "order", _MEAN),
               ("SP", ", kept at the head of the list", "order_in_place", f"{_MEAN}; {_WEIGHT}"))
           for k in (2, 5, 10)},
    },
)  # fmt: skip


def parse(name: str) -> tuple[str, str]:
    """``"QA+@square"`` to attack and optimizer names ("pgd" when none is given), both checked."""
    attack, _, optimizer = name.partition("@")
    require_decision(attack, optimizer or "pgd")
    return attack, optimizer or "pgd"


def require_decision(attack: str, optimizer: str) -> None:
    """Refuse a search by decisions for an attack whose objective is none.

    Raises:
        UsageError: it would take any image, the clean one too, for a success or for none; or an unknown name.
    """
    record, search = ATTACKS[attack], OPTIMIZERS[optimizer]
    if search.by_decisions and not record.decides:
        fit = ", ".join(name for name, a in ATTACKS.items() if a.decides)
        raise UsageError(
            f"{attack}@{optimizer}: {optimizer} sees only whether an attack has succeeded, which the objective of "
            f"{attack} by itself does not say; that of {fit} does"
        )


def user_attacks(names: Sequence[str]) -> list[str]:
    """Register the user's attacks: ``names`` with each ``FILE.py:NAME[@optimizer]`` replaced by its name in :data:`ATTACKS`.

    NAME is an :class:`Attack`, whose objective may be a function of the same file, or an objective: then the attack has no
    targets and is read by R@1.

    Raises:
        UsageError: no such file or name. DataError: it is neither, or fails.
    """
    return [_user_attack(name) if ".py:" in name and name.partition("@")[0] not in ATTACKS else name for name in names]


def _user_attack(text: str) -> str:
    where, _, rest = text.rpartition(".py:")
    if "@" in where:
        raise UsageError(f"{text}: a file whose path has an '@' cannot be told from ATTACK@OPTIMIZER")
    name, at, optimizer = rest.partition("@")
    code = load_user_code(f"{where}.py:{name}")
    if code.label in ATTACKS:
        return f"{code.label}{at}{optimizer}"
    attack = code.value
    if isinstance(attack, Attack):
        if attack.objective not in OBJECTIVES and hasattr(code.module, attack.objective):
            attack = replace(attack, objective=_objective(load_user_code(f"{where}.py:{attack.objective}")))
        (
            OBJECTIVES[attack.objective],
            attack.targets and TARGETS[attack.targets],
            [READOUTS[name] for name in attack.readouts],
        )
    else:
        attack = Attack(f"own objective {name}", _objective(code), "", ("recall_at_1",), code.label)
    ATTACKS.add(code.label, attack)
    code.called(code.label)
    return f"{code.label}{at}{optimizer}"


def _objective(code: UserCode) -> str:
    """The name of the user's own objective in its table, where whatever it does wrong ends in one line."""
    if code.label in OBJECTIVES:
        return code.label
    code.require_takes(2, "(embeddings, scene), nor an Attack")

    def guarded(e: Float[Tensor, "B D"], scene: Scene) -> Any:
        return code.call(e, scene)

    guarded.__name__, guarded.__doc__ = code.text, code.value.__doc__
    OBJECTIVES.add(code.label, guarded)
    return code.label


def choose_targets(attack: Attack, scene: Scene, rng: Rng) -> Scene:
    """The scene with this attack's targets in ``chosen``."""
    if not attack.targets:
        return scene.aimed(scene.row.new_zeros(len(scene), 0))
    return scene.aimed(TARGETS[attack.targets](scene, attack.k, rng))


class AttackLoss:
    """The objective of an attack as a function of images: what an optimizer sees.

    With ``eot`` above 1 it is the mean over that many forward passes, for models that are random.
    ``precision`` is the model's, of gradients.
    """

    def __init__(
        self, embedder: Embedder, objective: Objective, scene: Scene, eot: int = 1, calls: Tensor | None = None
    ) -> None:
        self.embedder, self.objective, self.scene, self.eot = embedder, objective, scene, eot
        self.precision = embedder.precision
        self.calls = scene.labels.new_zeros(len(scene), dtype=torch.int64) if calls is None else calls

    def __call__(self, images: Tensor) -> Float[Tensor, " B"]:
        drawn = passes(self.embedder, images, self.eot, "search", self.scene.query, self.calls)
        values = reduce(torch.add, map(self._of, drawn))
        self.calls += 1
        return values / self.eot

    def _of(self, e: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The objective of embeddings, whoever wrote it.

        Raises:
            DataError: it is not one float loss for each, or has no gradient where one is asked for.
        """
        loss, name = self.objective(e, self.scene), getattr(self.objective, "__name__", "the objective")
        if not isinstance(loss, Tensor) or loss.shape != (len(e),) or not loss.is_floating_point():
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise DataError(f"{name} gave {given}, not one float loss for each of {len(e)} images")
        if e.requires_grad and not loss.requires_grad:
            how = "of the optimizers only square, noise, nes and spsa do without"
            raise DataError(f"{name} gave a loss without a gradient: {how}")
        return loss

    def __getitem__(self, index: slice | Tensor) -> "AttackLoss":
        return AttackLoss(self.embedder, self.objective, self.scene[index], self.eot, self.calls[index])

    @property
    def steady(self) -> bool:
        """Is an image's gradient the same at every call, to the bit, whichever images are in its batch?

        True for float32 on a CPU, where matrix products do not depend on the other rows, and for a model without doubtful
        behaviour: not for one that is random, or whose outputs depend on the batch.
        """
        e = self.embedder
        plain = e.device.type == "cpu" and e.precision == "float32" and e.steps is None
        return plain and self.eot == 1 and not e.doubts

    def thinned(self, alive: Tensor) -> "AttackLoss":
        """The loss of the images that are ``alive`` (B,) alone."""
        return AttackLoss(self.embedder, self.objective, self.scene.thinned(alive), self.eot, self.calls[alive])


def craft(
    embedder: Embedder, attack: Attack, optimizer: Run, threat: Threat, images: Tensor, scene: Scene, rng: Rng
) -> Float[Tensor, "B C H W"]:
    """Adversarial images for ``images`` (B, C, H, W), which ``scene`` describes and is aimed from."""
    with torch.no_grad():
        return optimizer(AttackLoss(embedder, OBJECTIVES[attack.objective], scene, threat.eot), images, threat, rng)


@true_float32()
def measure(
    embedder: Embedder, attack: Attack, threat: Threat, adversarial: Tensor, images: Tensor, scene: Scene
) -> Mapping[str, np.ndarray]:
    """Read-outs (B,) by name, the mean over ``threat.eot`` passes, and "norm" (B,), the size of each perturbation.

    Raises:
        AssertionError: an image left the ball or [0, 1]; an optimizer is at fault.
        DataError: an embedding is NaN or infinite, so the answer is neither right nor wrong.
    """
    with torch.no_grad():
        inside = threat.contains(adversarial, images)
        if not bool(inside.all()):
            raise AssertionError(f"{int((~inside).sum())} adversarial images are outside the threat {threat}")
        draws = list(passes(embedder, adversarial, threat.eot, rows=scene.query))
        for e in draws:
            require_finite(e, embedder.name, "perturbed images")
        out = {
            name: torch.stack([READOUTS[name].read(e, scene) for e in draws]).mean(0).cpu().numpy()
            for name in attack.readouts
        }
        out["norm"] = threat.ball.size(adversarial - images).cpu().numpy()
    return out

"""What the audit's checks look at, and what they answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.doubts.unseen import Beginning, Survey, survey
from dmlbench.kinds.strict.search import SURVIVED, attempt
from dmlbench.kinds.strict.transfer import Transfer
from dmlbench.objectives import margin
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol, Step
from dmlbench.results import Flag
from dmlbench.run.subject import Subject
from dmlbench.scene import Scene
from dmlbench.threat import Threat

PAGE = "docs/audit.md"
Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        check: a name of :data:`CHECKS`.
        verdict: "pass", "warn", "fail", or "skip" where the question does not arise.
        value: what was measured, in the unit of the check; None where it was skipped.
        limit: where a pass ends.
        message: the evidence in words.
    """

    check: str
    verdict: Verdict
    value: float | None
    limit: float
    message: str

    def flag(self) -> Flag:
        """The finding as a doubt that travels with a result."""
        return Flag(flag=f"audit-{self.check}", message=f"{self.verdict}: {self.message} ({PAGE})")


def left_by(broken_by: np.ndarray, steps: int) -> np.ndarray:
    """(Q,) bool: right when clean and not broken by the first so many steps, or at a smaller eps."""
    return (broken_by == SURVIVED) | (broken_by >= 2 + steps)


def white_steps(protocol: Protocol) -> int:
    """How many of the protocol's steps, from the first, use the gradient."""
    flags = [OPTIMIZERS[s.optimizer].needs_gradients and not isinstance(s, Transfer) for s in protocol.steps]
    return flags.index(False) if False in flags else len(flags)


def last_resorts(protocol: Protocol, broken_by: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What breaks queries that the steps along the model's own gradient left, and which (Q,) bool: the steps that see values
    alone, and those along the gradient of the model without its defence."""
    left = left_by(broken_by, white_steps(protocol))
    groups: dict[str, list[int]] = {"Square": []}
    for i, step in enumerate(protocol.steps):
        name = "transfer from the undefended model" if isinstance(step, Transfer) else "Square"
        groups.setdefault(name, []).append(i + 2)
    for name, codes in groups.items():
        yield name, left & np.isin(broken_by, codes)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the checks look at: some queries that are right when clean, and a strict run on all.

    Attributes:
        subject: the model and every query measured.
        protocol: the one that was run.
        broken_by: by eps, how each query (Q,) ended.
        positions: (B,) which queries the checks attack themselves.
        images: (B, C, H, W) their clean images.
        scene: the same queries.
        seed: of the run.
        beginning: the gradient before the searches.
    """

    subject: Subject
    protocol: Protocol
    broken_by: dict[str, np.ndarray]
    positions: np.ndarray
    images: Tensor
    scene: Scene
    seed: int
    beginning: Beginning

    def loss(self) -> AttackLoss:
        """The margin of R@1 of each image."""
        return AttackLoss(self.subject.embedder, margin, self.scene)

    def left(self, eps: str, steps: int) -> np.ndarray:
        """(Q,) bool: right when clean and not broken at this eps by the first so many steps, or before."""
        return left_by(self.broken_by[eps], steps)

    @cached_property
    def surveyed(self) -> Survey:
        """What becomes of the queries near the test images."""
        return survey(self.subject, self.positions)

    def attacked(self, step: Step, threat: Threat, positions: np.ndarray) -> np.ndarray:
        """(n,) bool: which queries one more search breaks."""
        if not len(positions):
            return np.zeros(0, dtype=bool)
        return attempt(self.subject, step, threat, positions, self.seed).broken

"""What a run of one kind of protocol hands back to :func:`~dmlbench.evaluate.evaluate`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmlbench.protocol import Component


@dataclass(frozen=True)
class Outcome:
    """Everything that a protocol's own runner measured.

    Attributes:
        components: the columns, each with ``<name>/value`` (Q,) in ``arrays``.
        seconds: by component.
        arrays: per-query arrays by name.
        sample: adversarial images of the sampled queries by component.
        extras: what goes into :attr:`~dmlbench.results.Evaluation.extras`.
        broken_by: of a strict run, by eps, how each query ended; what the audit looks at.
        nonfinite: gradients of single images that were NaN or infinite in the searches, and taken as zero.
    """

    components: list[Component]
    seconds: dict[str, float]
    arrays: dict[str, np.ndarray]
    sample: dict[str, np.ndarray]
    extras: dict[str, Any]
    broken_by: dict[str, np.ndarray] = field(default_factory=dict)
    nonfinite: int = 0

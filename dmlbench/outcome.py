"""What a run of one kind of protocol hands back to :func:`~dmlbench.evaluate.evaluate`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmlbench.protocol import Component
from dmlbench.results import Flag


@dataclass(frozen=True)
class Outcome:
    """Everything that a protocol's own runner measured.

    Attributes:
        components: the columns, each with ``<name>/value`` (Q,) in ``arrays``.
        seconds: by component.
        arrays: per-query arrays by name.
        sample: adversarial images of the sampled queries by component.
        extras: what goes into :attr:`~dmlbench.results.Evaluation.extras`.
        flags: doubts.
    """

    components: list[Component]
    seconds: dict[str, float]
    arrays: dict[str, np.ndarray]
    sample: dict[str, np.ndarray]
    extras: dict[str, Any]
    flags: list[Flag] = field(default_factory=list)

"""An additional step for models with a test-time defence: transfer from the model without the defence.

A gradient through a stand-in for a derivative (BPDA), or through an average of draws, can miss what the network behind the
defence shows plainly. Images are therefore made on that network and looked at through the defence. The model decides, not the
protocol: its file, and so its hash, knows nothing of it (docs/defended.md).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dmlbench.errors import UsageError
from dmlbench.protocol import Protocol, Step
from dmlbench.run.units import Arrays

NAME = "transfer"


class Transfer(Step):
    """A step that descends the loss of the model without its defence; what counts is what the whole model says."""

    @classmethod
    def of(cls, step: Step, name: str) -> "Transfer":
        """The same search, once."""
        once = step.at(0)[0]
        return cls(name=name, attack=once.attack, optimizer=once.optimizer, threat=once.threat)


def behind(rules: Protocol) -> Protocol:
    """The protocol as it is run on a model behind a defence: after its own steps, the first of them as a :class:`Transfer`.

    Raises:
        UsageError: it has a step of that name.
    """
    if transfers(rules):
        return rules
    if any(step.name == NAME for step in rules.steps):
        raise UsageError(
            f"protocol {rules.name!r} has a step {NAME!r}, which a model behind a defence is given by itself"
        )
    return rules.model_copy(update={"steps": (*rules.steps, Transfer.of(rules.steps[0], NAME))})


def transfers(rules: Protocol) -> tuple[Transfer, ...]:
    """The steps whose images are made on the model without its defence."""
    return tuple(step for step in rules.steps if isinstance(step, Transfer))


def and_then(result: Arrays, positions: np.ndarray, search: Callable[[np.ndarray], Arrays]) -> Arrays:
    """What a search broke of the queries at ``positions``, and another one of those that it left; and what both cost."""
    left = ~result["broken"]
    if not left.any():
        return {key: result[key] for key in ("broken", *_COSTS)}
    more = search(positions[left])
    broken = result["broken"].copy()
    broken[left] = more["broken"]
    costs: dict[str, Any] = {key: result[key] + more[key] for key in _COSTS}
    return {"broken": broken, **costs}


_COSTS = ("gradients", "values", "nonfinite")

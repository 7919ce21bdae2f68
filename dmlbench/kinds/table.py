"""The kinds of protocol, and what all of them give together."""

import numpy as np

from dmlbench.kinds.base import Kind, Number
from dmlbench.kinds.certified.record import CERTIFIED
from dmlbench.kinds.clustering.record import CLUSTERING
from dmlbench.kinds.corruptions.record import CORRUPTED
from dmlbench.kinds.parts import ERS, PARTS
from dmlbench.kinds.poison.record import POISON
from dmlbench.kinds.sides.record import SIDES
from dmlbench.kinds.strict.record import STRICT
from dmlbench.kinds.universal import UNIVERSAL
from dmlbench.kinds.verification.record import VERIFICATION
from dmlbench.registry import Registry
from dmlbench.results import Evaluation

KINDS: Registry[Kind] = Registry(
    "kind of protocol",
    {
        kind.name: kind
        for kind in (ERS, PARTS, STRICT, CLUSTERING, CORRUPTED, VERIFICATION, SIDES, UNIVERSAL, POISON, CERTIFIED)
    },
)


def numbers() -> dict[str, Number]:
    """Every number that some kind gives beside its parts' scores, by its column."""
    return {number.name: number for kind in KINDS.values() for number in kind.numbers}


def kind_of(e: Evaluation) -> Kind:
    """The kind whose whole run the result holds; of components alone, :data:`PARTS`, whether or not they make an ERS."""
    return next((kind for name, kind in KINDS.items() if kind.run and name in e.extras), PARTS)


def numbers_of(e: Evaluation) -> dict[str, float]:
    """The numbers that the result's kind gives, those that there are: one of nothing, as where no query has a positive, is
    left out."""
    kind = kind_of(e)
    given = kind.read(e)
    found = {number.name: given.get(number.name) for number in kind.numbers}
    return {name: float(value) for name, value in found.items() if value is not None and np.isfinite(value)}

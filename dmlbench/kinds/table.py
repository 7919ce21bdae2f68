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
    """Every number that a kind reports besides its parts' scores, by column."""
    return {number.name: number for kind in KINDS.values() for number in kind.numbers}


def kind_of(e: Evaluation) -> Kind:
    """The kind whose whole run the result holds; of components alone, :data:`PARTS`, whether or not they make an ERS."""
    return next((kind for name, kind in KINDS.items() if kind.run and name in e.extras), PARTS)


def numbers_of(e: Evaluation) -> dict[str, float]:
    """The numbers of the result's kind that have a value; where no query has a positive, for one, they have none."""
    kind = kind_of(e)
    columns = kind.read(e)
    values = {number.name: columns.get(number.name) for number in kind.numbers}
    return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}

"""The smallest eps that breaks a query: between which two eps of a grid it lies, and where there.

All queries share one list of eps, the grid's own among them, so that those which ask about the same one are searched together.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from dmlbench.protocol import Threshold


def ladder(radii: Sequence[float], rule: Threshold) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " E"]]:
    """Every eps that is asked about, ascending, and where those of the grid stand among them.

    From the smallest of the grid / 2^octaves up, ``parts`` to each octave; then ``parts`` from one of the grid to the next.
    """
    below = radii[0] * 2.0 ** (np.arange(-rule.octaves * rule.parts, 0) / rule.parts)
    share = np.arange(rule.parts) / rule.parts
    between = [low * (high / low) ** share for low, high in pairwise(radii)]
    steps = np.concatenate([below, *between, [radii[-1]]])
    return steps, len(below) + rule.parts * np.arange(len(radii))


def halvings(rule: Threshold) -> int:
    """How many searches a query is given at the most: as many as tell one of the eps up to the smallest of the grid."""
    return (rule.octaves * rule.parts).bit_length()


def bracket(
    broken: Bool[np.ndarray, "E Q"], places: Int[np.ndarray, " E"], steps: int
) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, " Q"]]:
    """Between which places on the ladder each query's smallest eps lies: above ``low`` (-1: anywhere below), at most ``high``.

    ``broken`` says at which eps of the grid; a query that none breaks is between the last place and ``steps``, beyond it.
    """
    ends = np.concatenate([[-1], places, [steps]])
    first = np.where(broken.any(0), broken.argmax(0), len(places))
    low, high = ends[first], ends[first + 1]
    return np.where(first < len(places), low, steps - 1), high

"""What kinds share whose parts are readings of R@1 at every eps of a grid, ``NAME@EPS``, such as seen and unseen.

A run of one keeps ``{"clean": R@1, "curve": [{"eps": EPS, NAME: R@1, ...}, ...]}``, percent, and its numbers are the readings at the
largest eps: ``column`` says of which, by reading.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dmlbench.errors import Problem
from dmlbench.kinds.base import Stated, differences
from dmlbench.metrics import mean
from dmlbench.protocol import Component
from dmlbench.results import Evaluation


def summary(
    parts: Sequence[Component], clean: Float[np.ndarray, " Q"], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What the run says, from the queries' outcomes."""
    rows: dict[str, dict[str, Any]] = {}
    for part in parts:
        eps = part.threat["eps"]
        rows.setdefault(eps, {"eps": eps})[part.attack] = mean(arrays[f"{part.name}/value"])
    return {"clean": mean(clean), "curve": list(rows.values())}


def read(kind: str, column: Mapping[str, str]) -> Callable[[Evaluation], dict[str, float | None]]:
    """The numbers of a run of this kind."""
    return lambda e: {name: e.extras[kind]["curve"][-1][reading] for reading, name in column.items()}


def by_query(kind: str, column: Mapping[str, str]) -> Callable[[Evaluation], dict[str, Float[np.ndarray, " Q"]]]:
    """What each query adds to the numbers; empty without the queries' outcomes."""

    def values_of(e: Evaluation) -> dict[str, np.ndarray]:
        eps = e.extras[kind]["curve"][-1]["eps"]
        values = {name: e.arrays.get(f"{reading}@{eps}/value") for reading, name in column.items()}
        return {name: each.astype(np.float64) for name, each in values.items() if each is not None}

    return values_of


def number_problems(kind: str) -> Callable[[Stated], Iterator[Problem]]:
    """Does every number come out of the arrays again?"""

    def problems(stated: Stated) -> Iterator[Problem]:
        e = stated.evaluation
        again = summary(stated.parts, e.arrays["benign/recall_at_1"].astype(np.float64), e.arrays)
        yield from differences(f"extras.{kind}", e.extras[kind], again)

    return problems

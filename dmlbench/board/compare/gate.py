"""The gate: how far each metric may fall, and where a project keeps its own numbers.

``[tool.dmlbench.gate]`` in pyproject.toml::

    [tool.dmlbench.gate]
    fail_on_inconclusive = false
    max_drop = { ers = 1.0, recall_at_1 = 1.0, nmi = 1.0, any = 3.0, "QA+" = 5.0 }

``any`` holds for every attack part that is not named itself; any part of the two runs can be named, "PGD:R@1" as well
as "strict@40/255". Metrics that are not named are shown and
never fail the gate.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmlbench.board.row import PARTS
from dmlbench.checkpoints import first_problem
from dmlbench.errors import DataError, UsageError
from dmlbench.files import read_toml
from dmlbench.kinds.table import numbers
from dmlbench.metrics import CLEAN_METRICS
from dmlbench.registry import suggest

DEFAULT_DROPS: Mapping[str, float] = {
    "ers": 1.0,
    **{name: metric.drop for name, metric in CLEAN_METRICS.items() if metric.drop is not None},
    **{name: number.drop for name, number in numbers().items() if number.drop is not None},
    "any": 3.0,
}
"""Points that a metric may lose; ``any`` is any attack part, but for those whose R@1 is within the attacked set."""

GATED = ("ers", "any", *CLEAN_METRICS, *numbers())


class Gate(BaseModel):
    """What passes. ``max_drop`` is in points on the 0-100 scale, by metric."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_drop: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    fail_on_inconclusive: bool = False

    def allowed(self, metric: str, is_part: bool) -> float | None:
        """How far ``metric`` may fall; None where it is not gated."""
        drops = {**DEFAULT_DROPS, **self.max_drop}
        return drops.get(metric, drops["any"] if is_part else None)


def metric_name(text: str, parts: Iterable[str]) -> str:
    """A metric by the name a person writes: a part also by its column (``ca_plus``).

    Raises:
        UsageError: nothing of that name can be gated; the nearest is suggested.
    """
    parts = list(dict.fromkeys([*PARTS, *parts]))
    by_name = {n.casefold(): n for n in (*GATED, *parts)} | {v: k for k, v in PARTS.items()}
    if text.casefold() not in by_name:
        raise UsageError(f"unknown metric {text!r}{suggest(text, [*GATED, *parts])}")
    return by_name[text.casefold()]


def parse_drop(text: str) -> tuple[str, float]:
    """``"ers=1.5"`` to ("ers", 1.5).

    Raises:
        UsageError: it is not METRIC=POINTS with points of zero or more.
    """
    name, equals, points = text.partition("=")
    try:
        value = float(points)
    except ValueError:
        value = -1.0
    if not equals or not math.isfinite(value) or value < 0:
        raise UsageError(f"--max-drop {text!r} is not METRIC=POINTS with points of zero or more, e.g. ers=1.0")
    return name, value


def project_gate(start: Path, parts: Iterable[str] = ()) -> tuple[Gate, Path | None]:
    """The gate of the nearest pyproject.toml at or above the folder ``start`` that has one, and that file.

    ``parts`` are those of the runs that are compared, which it may name beside the ten parts of ERS.
    """
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file() and (section := _section(path)) is not None:
            return read_gate(path, section, parts), path
    return Gate(), None


def named_gate(path: Path, parts: Iterable[str] = ()) -> Gate:
    """The gate of the file that the user named; it must have one. ``parts`` as for :func:`project_gate`."""
    if not path.is_file():
        raise DataError(f"--config {path} does not exist")
    section = _section(path)
    if section is None:
        raise UsageError(f"--config {path} has no section [tool.dmlbench.gate]")
    return read_gate(path, section, parts)


def _section(path: Path) -> dict[str, Any] | None:
    content: Any = read_toml(path, UsageError)
    for key in ("tool", "dmlbench", "gate"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def read_gate(path: Path, section: Mapping[str, Any], parts: Iterable[str] = ()) -> Gate:
    """A checked gate; unknown keys, and metrics that are neither known nor of ``parts``, are refused with a suggestion."""
    parts = list(parts)
    for key in section:
        if key not in Gate.model_fields:
            raise UsageError(f"{path} [tool.dmlbench.gate]: unknown key {key!r}{suggest(key, Gate.model_fields)}")
    try:
        gate = Gate.model_validate(section)
        return gate.model_copy(update={"max_drop": {metric_name(k, parts): v for k, v in gate.max_drop.items()}})
    except ValidationError as error:
        raise UsageError(f"{path} [tool.dmlbench.gate] {first_problem(error)}") from None
    except UsageError as error:
        raise UsageError(f"{path} [tool.dmlbench.gate] max_drop: {error}") from None

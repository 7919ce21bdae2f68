"""Markdown for docs/protocols.md: tables, and docstrings as one line."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def text(function: Callable[..., Any]) -> str:
    """A docstring's first paragraphs as one line, without the sections on arguments and errors."""
    doc = re.split(r"\n\s*(?:Raises|Args|Returns|Attributes):", inspect.getdoc(function) or "")[0]
    plain = " ".join(doc.split()).replace("|", "\\|")
    return re.sub(r":(?:class|data|func):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", plain)


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def number(value: float | int) -> str:
    """Without a needless decimal point."""
    return f"{value:g}"


def arrow(worst: float | int, best: float | int) -> str:
    """Which raw value is more robust."""
    return "↑ robust" if best > worst else "↓ robust"


def threat(fields: Mapping[str, Any]) -> str:
    """A threat's fields as written in the protocol."""
    return ", ".join(f"{key} {value}" for key, value in fields.items())

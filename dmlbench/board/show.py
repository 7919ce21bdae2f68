"""Rows for a person: filtered, sorted, some columns, in one of five formats."""

import csv
import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dmlbench.board.row import COLUMNS, NUMBERS, Row
from dmlbench.errors import UsageError
from dmlbench.kinds.table import KINDS
from dmlbench.registry import Registry, suggest

OF_ERS = ("ers", "ers_lo", "ers_hi", "worst_part", "claimed_ers")
DEFAULT_COLUMNS = ("rank", "better_than", "model", "defense", "recall_at_1", *OF_ERS, "status", "flags")
FIRST_COLUMNS = (*OF_ERS, *(column for kind in KINDS.values() for column in kind.shown))
"""Columns that belong to protocols of one kind: shown at first where a row has a value."""
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, text: str(text).casefold() in str(value).casefold(),
}
"""Filters: ``ers>=40``, ``status=verified``, ``defense~hm``; all but ``!=`` leave out rows without a value."""


def default_columns(rows: Sequence[Row]) -> list[str]:
    """The usual columns, and in place of ERS the numbers that these rows have."""
    there = [c for c in FIRST_COLUMNS if any(getattr(r, c) is not None for r in rows)]
    if all(r.ers is None for r in rows):  # without ERS there are no parts of it
        there = [c for c in there if c != "worst_part"]
    if not there:
        return list(DEFAULT_COLUMNS)
    before = [c for c in DEFAULT_COLUMNS if c not in FIRST_COLUMNS]
    at = before.index("recall_at_1") + 1
    return [*before[:at], *there, *before[at:]]


def column(name: str) -> str:
    """A known column, or an error with a suggestion."""
    if name not in COLUMNS:
        raise UsageError(f"unknown column {name!r}{suggest(name, COLUMNS)}")
    return name


def parse_filter(text: str) -> Callable[[Row], bool]:
    """The test that a filter such as ``ers>=40`` is.

    Raises:
        UsageError: not COLUMN OPERATOR VALUE, an unknown column, or a number is needed.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9_]+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", text)
    if not match:
        raise UsageError(
            f"--filter {text!r} is not COLUMN OPERATOR VALUE, e.g. 'ers>=40', 'status=verified', 'defense~hm'"
        )
    name, sign, operand = column(match[1]), match[2], match[3]
    compare = OPERATORS[sign]
    number: float | None = None
    if name in NUMBERS and sign != "~":
        try:
            number = float(operand)
        except ValueError:
            raise UsageError(f"--filter {text!r}: {name} holds numbers, {operand!r} is none") from None

    def keep(row: Row) -> bool:
        value = getattr(row, name)
        if value is None:
            return sign == "!="
        return compare(value, number) if number is not None else compare(str(value), operand)

    return keep


def select(rows: Iterable[Row], filters: Sequence[str] = (), sort: str | None = None) -> list[Row]:
    """The rows that pass every filter, sorted by comma-separated columns, ``-`` before one for descending.

    Rows without a value come last either way; without ``sort`` the order is the board's.
    """
    tests = [parse_filter(f) for f in filters]
    selected = [row for row in rows if all(test(row) for test in tests)]
    for key in reversed([k.strip() for k in (sort or "").split(",") if k.strip()]):
        name = column(key.lstrip("-"))
        there = [r for r in selected if getattr(r, name) is not None]
        there.sort(key=lambda r: getattr(r, name), reverse=key.startswith("-"))
        selected = there + [r for r in selected if getattr(r, name) is None]
    return selected


def as_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Aligned text, numbers to the right."""
    cells = [list(columns)] + [[r.cell(c) for c in columns] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [any(isinstance(getattr(r, c), int | float) for r in rows) for c in columns]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines) + "\n"


def as_markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*_`\[\]])", r"\\\1", c) for c in cells) + " |"

    marks = ["---:" if any(isinstance(getattr(r, c), int | float) for r in rows) else "---" for c in columns]
    body = [line(r.cell(c) for c in columns) for r in rows]
    return "\n".join([line(columns), "| " + " | ".join(marks) + " |", *body]) + "\n"


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """CSV with all digits, LF."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if (v := getattr(row, c)) is None else v for c in columns])
    return stream.getvalue()


def as_json(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A list of objects with all digits; missing numbers are null."""
    return json.dumps([{c: getattr(r, c) for c in columns} for r in rows], indent=2, ensure_ascii=False) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def as_latex(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A tabular for the package booktabs."""

    def line(cells: Iterable[str]) -> str:
        return " & ".join("".join(_TEX.get(ch, ch) for ch in c) for c in cells) + r" \\"

    kind = "".join("r" if any(isinstance(getattr(r, c), int | float) for r in rows) else "l" for c in columns)
    body = [line(r.cell(c) for c in columns) for r in rows]
    return "\n".join([rf"\begin{{tabular}}{{{kind}}}", r"\toprule", line(columns), r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"  # fmt: skip


FORMATS: Registry[Callable[[Sequence[Row], Sequence[str]], str]] = Registry(
    "format", {"table": as_table, "md": as_markdown, "csv": as_csv, "json": as_json, "latex": as_latex}
)

"""The table of one board: which columns it has, what its cells show, and its drawing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from dmlbench.board.plots.draw import Figure, Series
from dmlbench.board.plots.page import inline
from dmlbench.board.row import CLEAN_COLUMNS, COLUMNS, HEADLINES, NUMBERS, PARTS, Row
from dmlbench.board.show import DEFAULT_COLUMNS
from dmlbench.board.site.overview import anchor, cell, interval, norm, text
from dmlbench.board.site.words import word_of, words
from dmlbench.kinds.table import KINDS, numbers
from dmlbench.metrics import CLEAN_METRICS
from dmlbench.protocols import load_protocol, protocol_names

TITLES = {
    "model": "Model",
    "defense": "Defence",
    **{name: f"{CLEAN_METRICS[name].title} %" for name in CLEAN_COLUMNS},
    "arch": "Network",
    "loss": "Loss",
    **{f"{column}_{end}": f"{part} {end}" for part, column in PARTS.items() for end in ("raw", "score")},
    **{name: number.title for name, number in numbers().items()},
    **{name: word.title for name, word in words().items() if name in COLUMNS},
    **{name: column.title for name, column in Row.model_fields.items() if column.title},
    "ers": "ERS",
    "claimed_ers": "Claimed ERS",
}
"""What columns are called; the others by their name in the CSV."""
_AFTER_NUMBERS = ("claimed_ers", "claim_gap", "better_than", "worst_part", "status", "flags", "defense")
FIRST = tuple(dict.fromkeys(("rank", "model", "recall_at_1", *HEADLINES, *numbers(), *_AFTER_NUMBERS)))
LEFT_OUT = ("protocol", "dataset", "schema_version")
ORDER = (*FIRST, *(c for c in COLUMNS if c not in FIRST and c not in LEFT_OUT))
SHOWN = {*DEFAULT_COLUMNS, *numbers(), "claim_gap"} - {"ers_lo", "ers_hi"}


def head(column: str) -> dict[str, Any]:
    """A column's title, its name in the CSV, and the word that explains it."""
    return {"name": column, "title": TITLES.get(column, column), "number": column in NUMBERS, "word": word_of(column)}


def board(protocol: str, dataset: str, rows: Sequence[Row]) -> dict[str, Any]:
    """All that the page shows of one board."""
    shown = {c for c in ORDER if _shown(c, rows)}
    there = [c for c in ORDER if c in shown or any(cell(r, c).value for r in rows)]
    weakest = {r.worst_part for r in rows if r.worst_part}
    return {
        "id": anchor(protocol),
        "protocol": protocol,
        "title": title(protocol),
        "kind": kind(protocol),
        "weakest": weakest.pop()
        if len(weakest) == 1 and len(rows) > 1 and any(r.ers is not None for r in rows)
        else None,
        "sha256": next((r.protocol_sha256 for r in rows if r.protocol_sha256 and r.rank), None),
        "csv": f"{protocol}/{dataset}.csv",
        "columns": [{**head(c), "shown": c in shown} for c in there],
        "rows": [
            {
                "id": row_id(protocol, n, r),
                "row": r,
                "cells": [(c, cell(r, c), c in shown, c in NUMBERS) for c in there],
                "sources": (r.source or "").split("; ") if r.source else [],
            }
            for n, r in enumerate(rows)
        ],
        "plot": plot(protocol, dataset, rows),
    }


def title(protocol: str) -> str:
    """The protocol's own, where this installation knows it."""
    return load_protocol(protocol).title if protocol in protocol_names() else "a protocol of another version"


def kind(protocol: str) -> str:
    """The protocol's kind, "" of one that this installation does not know."""
    name = load_protocol(protocol).kind if protocol in protocol_names() else ""
    return name if name in KINDS else ""


def row_id(protocol: str, n: int, row: Row) -> str:
    """The anchor of a row on the page of its data set."""
    return f"row-{anchor(protocol)}-{n}-{anchor(row.model)}"


def _shown(column: str, rows: Sequence[Row]) -> bool:
    """Is the column shown at first? The usual ones are, where any row has a value."""
    if column in ("model", "status"):
        return True
    if column == "worst_part" and (all(r.ers is None for r in rows) or len({r.worst_part for r in rows} - {None}) < 2):
        return False
    return column in SHOWN and any(cell(r, column).value for r in rows)


def plot(protocol: str, dataset: str, rows: Sequence[Row]) -> Markup | None:
    """What the board ranks by against a clean number: measured rows with their intervals, and claims."""
    y = next((c for c in HEADLINES if any(getattr(r, c) is not None for r in rows)), None)
    if y is None:
        return None
    x = numbers()[y].against if y in numbers() else "recall_at_1"
    scale = 255.0 if y in numbers() and numbers()[y].length and norm(protocol) == "linf" else 1.0
    series = []
    for name, claimed in (("measured, with its interval", False), ("claimed", True)):
        there = [
            (n, r) for n, r in enumerate(rows)
            if (r.status == "claimed") == claimed and r.status != "retracted" and None not in (getattr(r, x), getattr(r, y))
        ]  # fmt: skip
        if there:
            ends = [interval(r, y) or (np.nan, np.nan) for _, r in there]
            series.append(
                Series(
                    name,
                    np.array([getattr(r, x) for _, r in there]),
                    scale * np.array([getattr(r, y) for _, r in there]),
                    None if claimed else scale * np.array([low for low, _ in ends]),
                    None if claimed else scale * np.array([high for _, high in ends]),
                    tooltips=tuple(
                        f"{r.model} ({r.status}): {cell(r, y).text or text(r, y, getattr(r, y))}, {TITLES[x]} {text(r, x, getattr(r, x))}"
                        for _, r in there
                    ),
                    links=tuple(f"#{row_id(protocol, n, r)}" for n, r in there),
                    hollow=claimed,
                )
            )
    if not series:
        return None
    y_title = TITLES[y] if scale == 1.0 else f"{TITLES[y]}, in 1/255"
    heading = f"{TITLES[y]} against {TITLES[x]}, {dataset} under {protocol}"
    figure = Figure("board", TITLES[x], y_title, tuple(series))
    return inline(figure, f"plot-{anchor(protocol)}", heading, 6.4, 3.4)

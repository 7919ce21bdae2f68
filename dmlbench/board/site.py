"""The board as a static site: pages that need no server and load nothing from elsewhere.

One page for each protocol and data set, with its style and script inside and a content security policy
that allows only those two. Every text goes through Jinja2's escaping.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dmlbench.board.build import CLAIMS, load_boards
from dmlbench.board.row import COLUMNS, NUMBERS, STATUSES, Row
from dmlbench.board.row import shown as cell_text
from dmlbench.board.show import DEFAULT_COLUMNS
from dmlbench.checkpoints import PACKAGE
from dmlbench.doubts.audit import FLAGS
from dmlbench.files import prepare_folder, write_whole
from dmlbench.kinds.table import numbers
from dmlbench.protocol import load_protocol, protocol_names
from dmlbench.submission.record import read_submission

TEMPLATES = PACKAGE / "templates"

TITLES = {
    "rank": "Rank",
    "better_than": "Better than N rows beyond doubt",
    "model": "Model",
    "defense": "Defence",
    "recall_at_1": "R@1 %",
    "ers": "ERS measured",
    "claimed_ers": "ERS claimed",
    "claim_gap": "Gap",
    **{name: number.title for name, number in numbers().items()},
    **{name: column.title for name, column in Row.model_fields.items() if column.title},
    "worst_part": "Weakest part",
    "status": "Status",
    "flags": "Flags",
    "nmi": "NMI %",
    "map": "mAP %",
    "arch": "Network",
}
"""Titles of columns; the others are called by their name in the CSV."""

FIRST = (
    "rank",
    "model",
    "defense",
    "recall_at_1",
    "ers",
    "claimed_ers",
    "claim_gap",
    *numbers(),
    "better_than",
)
SHOWN = {*DEFAULT_COLUMNS, *numbers(), "claim_gap"} - {"ers_lo", "ers_hi"}
BESIDE = tuple(name for name, number in numbers().items() if number.beside_ers)
"""What stands beside ERS on the board of the same images."""
LEFT_OUT = ("protocol", "dataset", "schema_version")
ORDER = (*FIRST, *(c for c in COLUMNS if c not in FIRST and c not in LEFT_OUT))
_WIDTH = (40.0, 350.0)
_HEIGHT = (226.0, 14.0)


def write_site(board: Path, out: Path) -> list[str]:
    """Write the pages of the board in folder ``board`` into ``out``; their paths.

    Beside each page lie its CSV file, the run records and the checkpoint records that its rows link to.
    """
    boards = load_boards(board)
    sources = _sources(board)
    environment = _environment()
    prepare_folder(out)
    raised = sorted({f for rows in boards.values() for r in rows for f in (r.flags or "").split()})
    flags = {flag: FLAGS.get(flag, "See the run's record.") for flag in raised}
    listed = [_card(name, rows) for name, rows in boards.items()]
    shared = {"boards": listed, "statuses": STATUSES, "flags": flags}
    written = {"index.html": environment.get_template("index.html.j2").render(**shared, root="", current="index.html")}
    template = environment.get_template("board.html.j2")
    for name, rows in boards.items():
        page = _board(name, rows, boards, sources)
        written[f"{name}.html"] = template.render(**shared, **page, root="../", current=f"{name}.html")
        written[f"{name}.csv"] = (board / f"{name}.csv").read_text(encoding="utf-8")
    for folder, (card, run) in sources.items():
        written[f"checkpoints/{folder}.json"] = card
        written[f"runs/{folder}.json"] = run
    for path, content in written.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / path, content.encode())
    return [path for path in written if path.endswith(".html")]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    for name in ("style", "script"):
        text = (TEMPLATES / {"style": "site.css", "script": "site.js"}[name]).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals[name] = Markup(text)  # our own file, not data
        environment.globals[f"{name}_hash"] = f"sha256-{digest}"
    return environment


def _sources(board: Path) -> dict[str, tuple[str, str]]:
    """By submission: its checkpoint record and its run record, as JSON."""
    out = {}
    for folder in sorted((board / "submissions").glob("*")):
        if not (folder / CLAIMS).exists():
            submission = read_submission((folder / "submission.yaml").read_bytes())
            card = json.dumps(submission.checkpoint.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
            out[folder.name] = (card, (folder / "run" / "evaluation.json").read_text(encoding="utf-8"))
    return out


def _card(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    protocol, _, dataset = name.partition("/")
    ranked = [r for r in rows if r.rank is not None]
    best = f"{ranked[0].model}, {ranked[0].headline:.1f}" if ranked else None
    claimed = sum(r.status == "claimed" for r in rows)
    return {
        "path": f"{name}.html",
        "protocol": protocol,
        "dataset": dataset,
        "title": _title(protocol),
        "measured": len(rows) - claimed,
        "claimed": claimed,
        "best": best,
    }


def _title(protocol: str) -> str:
    return load_protocol(protocol).title if protocol in protocol_names() else "A protocol of another version"


def _board(
    name: str, rows: Sequence[Row], boards: Mapping[str, Sequence[Row]], sources: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    protocol, _, dataset = name.partition("/")
    beside = {column: _lowest(column, dataset, boards) for column in BESIDE}
    rows = [
        r.model_copy(update={column: found.get(r.model) for column, found in beside.items()})
        if r.ers is not None
        else r
        for r in rows
    ]
    shown = {c for c in ORDER if _shown(c, rows)}
    columns = [{"name": c, "title": TITLES.get(c, c), "shown": c in shown, "number": c in NUMBERS} for c in ORDER]
    return {
        "protocol": protocol,
        "dataset": dataset,
        "title": _title(protocol),
        "protocol_sha256": next((r.protocol_sha256 for r in rows if r.protocol_sha256), None),
        "csv": f"{dataset}.csv",
        "columns": columns,
        "rows": [_row(i, r, shown, sources) for i, r in enumerate(rows)],
        "plots": _plots(rows),
    }


def _plots(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the board ranks by against a clean number, and ERS against what stands beside it."""
    for name, number in numbers().items():
        if number.ranks and any(getattr(r, name) is not None for r in rows):
            clean = TITLES[number.against]
            return [_plot(rows, number.against, name, clean, number.title, f"{number.title} against {clean}", "")]
    clean = TITLES["recall_at_1"]
    found = [_plot(rows, "recall_at_1", "ers", clean, "ERS", "ERS against clean R@1", "No row has both ERS and R@1.")]
    for column in BESIDE:
        caption = f"ERS against {TITLES[column]}"
        empty = f"{caption}: no model here has been measured for it on this data set yet."
        found.append(_plot(rows, column, "ers", TITLES[column], "ERS", caption, empty))
    return found


def _shown(column: str, rows: Sequence[Row]) -> bool:
    """Is the column shown at first? The usual ones are, where any row has a value."""
    if column in ("model", "status"):
        return True
    if column == "worst_part" and all(r.ers is None for r in rows):
        return False
    return column in SHOWN and any(getattr(r, column) is not None for r in rows)


def _lowest(column: str, dataset: str, boards: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """By model: the lowest value of a column on this data set, of the protocols whose ball is that of ERS; Euclidean balls
    are another question."""
    found: dict[str, float] = {}
    for name, rows in boards.items():
        protocol, _, images = name.partition("/")
        if images == dataset and protocol in protocol_names() and load_protocol(protocol).threat.get("norm") == "linf":
            for r in rows:
                if r.ers is None and (value := getattr(r, column)) is not None:
                    found[r.model] = min(value, found.get(r.model, value))
    return found


def _row(index: int, row: Row, shown: set[str], sources: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    measured = row.submission if row.submission in sources else None
    return {
        "id": f"row-{index}-{re.sub(r'[^A-Za-z0-9.-]+', '-', row.model)}",
        "model": row.model,
        "status": row.status,
        "paper": row.paper,
        "paper_url": row.paper_url,
        "source": row.source,
        "cells": [_cell(row, c, c in shown) for c in ORDER],
        "checkpoint": f"checkpoints/{measured}.json" if measured else None,
        "run": f"runs/{measured}.json" if measured else None,
        "command": shlex.join(
            ["dmlbench", "evaluate", "--model", row.model, "--dataset", row.dataset, "--protocol", row.protocol]
        )
        if measured
        else None,
    }


def _cell(row: Row, column: str, shown: bool) -> dict[str, Any]:
    """One cell: what it shows, and the value it is sorted by. A claim is never shown as measured."""
    value = getattr(row, column)
    if row.status == "claimed" and column in ("ers", "claim_gap"):
        value = None
    ends = _ends(row, column) if value is not None else None
    extra = f"{ends[0]:.1f} – {ends[1]:.1f}" if ends else ""
    return {
        "name": column,
        "text": cell_text(column, value),
        "value": "" if value is None else str(value),
        "extra": extra,
        "shown": shown,
        "number": column in NUMBERS,
    }


def _scale(low: float, high: float, ends: tuple[float, float], value: float) -> float:
    return round(ends[0] + (value - low) / (high - low) * (ends[1] - ends[0]), 1)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Tens around the values, so that the axis is as short as it can be."""
    low, high = min(values) // 10 * 10, -(-max(values) // 10) * 10
    return (low, high) if high > low else (low, low + 10)


def _ticks(low: float, high: float, ends: tuple[float, float]) -> list[dict[str, Any]]:
    step = 10 if high - low <= 60 else 20
    return [
        {"at": _scale(low, high, ends, low + step * i), "text": f"{low + step * i:g}"}
        for i in range(int((high - low) // step) + 1)
    ]


def _ends(row: Row, column: str) -> tuple[float, float] | None:
    """The interval of a column, where it has one."""
    low, high = getattr(row, f"{column}_lo", None), getattr(row, f"{column}_hi", None)
    return None if low is None or high is None else (low, high)


def _plot(rows: Sequence[Row], x: str, y: str, title_x: str, title_y: str, caption: str, empty: str) -> dict[str, Any]:
    """One scatter plot as numbers for the template, in the units of its view box."""
    there = [(i, r, getattr(r, x), getattr(r, y)) for i, r in enumerate(rows)]
    there = [(i, r, a, b) for i, r, a, b in there if a is not None and b is not None and r.status != "retracted"]
    if not there:
        return {"points": [], "empty": empty, "caption": caption}
    xs, ys = (
        _range([a for _, _, a, _ in there]),
        _range([v for _, r, _, b in there for v in (b, *(_ends(r, y) or ()))]),
    )
    points = []
    for i, r, a, b in there:
        ends = _ends(r, y)
        points.append(
            {
                "row": f"row-{i}-{re.sub(r'[^A-Za-z0-9.-]+', '-', r.model)}",
                "status": r.status,
                "x": _scale(*xs, _WIDTH, a),
                "y": _scale(*ys, _HEIGHT, b),
                "low": _scale(*ys, _HEIGHT, ends[0]) if ends else None,
                "high": _scale(*ys, _HEIGHT, ends[1]) if ends else None,
                "text": f"{r.model} ({r.status}): {title_x} {a:.1f}, {title_y} {b:.1f}",
            }
        )
    points.sort(key=lambda p: p["status"] != "claimed")  # measured ones on top
    return {
        "points": points,
        "caption": caption,
        "x": title_x,
        "y": title_y,
        "ticks_x": _ticks(*xs, _WIDTH),
        "ticks_y": _ticks(*ys, _HEIGHT),
    }

"""One line for each model on a data set: what its several boards say of it, side by side."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dmlbench.board.row import LENGTHS, NUMBERS, RANKED, Row, more, shown
from dmlbench.datasets import DATASETS
from dmlbench.kinds.table import numbers
from dmlbench.protocols import load_protocol, protocol_names
from dmlbench.threat import written

Boards = Mapping[str, Sequence[Row]]
"""The rows of each protocol on one data set."""

BESIDE = tuple(name for name, number in numbers().items() if number.beside_ers)
"""Columns that are shown next to ERS."""
COLUMNS = ("recall_at_1", "ers", "claimed_ers", *BESIDE)


@dataclass(frozen=True)
class Cell:
    """What a cell of a table shows.

    Attributes:
        value: what it is sorted and filtered by, "" for a missing one.
        extra: what stands in small letters behind it: its interval.
        note: what must not be overlooked about it.
        at: the eps of the value, if the table does not state one for all cells.
    """

    value: str = ""
    text: str = ""
    extra: str = ""
    note: str = ""
    at: str = ""


@dataclass(frozen=True)
class Entry:
    """One model on a data set.

    Attributes:
        row: the row that speaks for it: of ERS where it has one.
        cells: by column of :data:`COLUMNS`.
        flags: of every row that a cell was taken from.
    """

    row: Row
    cells: Mapping[str, Cell]
    flags: tuple[str, ...] = ()
    sources: tuple[str, ...] = field(default=())


def cell(row: Row, column: str, note: str = "") -> Cell:
    """A cell of the row; a claim is never shown as measured."""
    value = getattr(row, column)
    if value is None or (row.status == "claimed" and column in ("ers", "claim_gap")):
        return Cell()
    ends = interval(row, column)
    extra = f"{text(row, column, ends[0]).removesuffix('/255')} – {text(row, column, ends[1])}" if ends else ""
    return Cell(str(value), more(vars(row), column) + text(row, column, value), extra, note)


def text(row: Row, column: str, value: Any) -> str:
    """A number of the row as a person reads it; lengths as the field writes those of its norm."""
    return written(value, norm(row.protocol)) if column in LENGTHS or column == "eps" else shown(column, value)


def norm(protocol: str) -> str:
    """The norm of the protocol's ball; "linf" of one that this installation does not know."""
    return load_protocol(protocol).norm if protocol in protocol_names() else "linf"


def interval(row: Row, column: str) -> tuple[float, float] | None:
    """The interval of a column, where it has one with both ends."""
    low, high = getattr(row, f"{column}_lo", None), getattr(row, f"{column}_hi", None)
    return None if low is None or high is None else (low, high)


def by_dataset(boards: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Row]]]:
    """The boards of ``load_boards`` by data set and protocol, real pictures first; of these measured ones, large
    ones and those of many models.

    The protocols of a data set begin with the one that it is measured by where none is named, and others that give ERS."""
    boards_of: dict[str, dict[str, list[Row]]] = {}
    for name, rows in boards.items():
        protocol, _, dataset = name.partition("/")
        boards_of.setdefault(dataset, {})[protocol] = merged(rows)

    def place(dataset: str) -> tuple[Any, ...]:
        measured = any(r.status != "claimed" for rows in boards_of[dataset].values() for r in rows)
        size = max(DATASETS[dataset].shape[1:]) if dataset in DATASETS else 0
        models = {r.model for rows in boards_of[dataset].values() for r in rows}
        return not of_pictures(dataset), not measured, -size, -len(models), dataset

    def order(dataset: str, protocol: str) -> tuple[Any, ...]:
        default = dataset in DATASETS and DATASETS[dataset].protocol == protocol
        return not default, all(r.ers is None for r in boards_of[dataset][protocol]), protocol

    return {
        dataset: {
            protocol: boards_of[dataset][protocol]
            for protocol in sorted(boards_of[dataset], key=lambda p: order(dataset, p))
        }
        for dataset in sorted(boards_of, key=place)
    }


def of_pictures(dataset: str) -> bool:
    """Is it a data set of real pictures? One that this installation does not know is taken for one."""
    return dataset not in DATASETS or DATASETS[dataset].pictures


def merged(rows: Iterable[Row]) -> list[Row]:
    """The rows, a claim that several tables of a paper repeat only once, with all its sources."""
    rows_by_key: dict[tuple[Any, ...], Row] = {}
    for n, row in enumerate(rows):
        same = tuple(getattr(row, c) for c in sorted({"arch", "loss", "defense", "paper", *NUMBERS}))
        key = same if row.status == "claimed" else (n,)
        if key in rows_by_key:
            sources = dict.fromkeys([*(rows_by_key[key].source or "").split("; "), row.source or ""])
            row = rows_by_key[key].model_copy(update={"source": "; ".join(s for s in sources if s)})
        rows_by_key[key] = row
    return list(rows_by_key.values())


def entries(boards: Boards) -> list[Entry]:
    """Every model of a data set once: measured ones by ERS, then those whose rows are all stale, then claims."""
    models = dict.fromkeys(r.model for rows in boards.values() for r in rows if r.status != "retracted")
    shown_entries = [entry for model in models if (entry := _entry(model, boards))]

    def place(e: Entry) -> tuple[Any, ...]:
        best = next((float(e.cells[c].value) for c in ("ers", *BESIDE, "claimed_ers") if e.cells[c].value), None)
        kind = 0 if e.row.status in RANKED else 2 if e.row.status == "claimed" else 1
        return kind, not e.cells["ers"].value, best is None, -(best or 0.0), e.row.model

    return sorted(shown_entries, key=place)


def filled(rows: Sequence[Entry]) -> list[str]:
    """The columns in which anything stands."""
    return [c for c in COLUMNS if any(e.cells[c].value for e in rows)]


def eps_of(rows: Iterable[Entry]) -> str:
    """The eps of the columns next to ERS; "" if it is not the same everywhere."""
    values = {c.at for e in rows for c in e.cells.values() if c.at}
    return values.pop() if len(values) == 1 else ""


def _entry(model: str, boards: Boards) -> Entry | None:
    rows = [r for board in boards.values() for r in board if r.model == model and r.status != "retracted"]
    current = sorted(
        rows, key=lambda r: r.status not in RANKED
    )  # of equal ones the first, which is of the own protocol
    scored = [r for r in current if r.ers is not None and r.status != "claimed"]
    row = next(iter(scored), None) or next(iter(current))
    claims = [r for r in rows if r.claimed_ers is not None]
    usual = row.dataset not in DATASETS or row.protocol == DATASETS[row.dataset].protocol
    under = "" if usual else f"under {row.protocol}"
    cells = {"recall_at_1": cell(row, "recall_at_1"), "ers": cell(row, "ers", under), "claimed_ers": Cell()}
    used = [row]
    for column in BESIDE:
        there = [
            r for r in current if r.ers is None and getattr(r, column) is not None and norm(r.protocol) == "linf"
        ]  # Euclidean balls are another question
        current_ones = [r for r in there if r.status in RANKED] or there
        if current_ones:
            lowest = min(current_ones, key=lambda r: getattr(r, column))
            lowest_cell = cell(lowest, column, lowest.status if lowest.status not in RANKED else "")
            cells[column] = replace(lowest_cell, at=f"eps {text(lowest, 'eps', lowest.eps)}" if lowest.eps else "")
            used.append(lowest)
        else:
            cells[column] = Cell()
    if claims:
        measured = claims[0].ers is not None and claims[0].status != "claimed"
        note = f"measured {shown('ers', claims[0].ers)} under {claims[0].protocol}" if measured else ""
        cells["claimed_ers"] = cell(claims[0], "claimed_ers", note)
    flags = dict.fromkeys(f for r in used for f in (r.flags or "").split())
    return Entry(row, cells, tuple(flags), tuple((row.source or "").split("; ")) if row.source else ())


def anchor(text: str) -> str:
    """Text as an id of a page, or a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)

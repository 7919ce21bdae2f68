"""A board as a CSV file: reading it, ranking its rows, adding one, writing it whole.

UTF-8, LF, one fixed order of columns (those of a kind of protocol only where they hold something), numbers as numbers, an empty cell where a number is missing.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmlbench.board.row import COLUMNS, OF_KINDS, RANKED, Row, from_evaluation, partial_text, superseded
from dmlbench.checkpoints import first_problem
from dmlbench.errors import DataError
from dmlbench.files import lock, write_atomic
from dmlbench.registry import suggest
from dmlbench.results import Evaluation

MOST_BYTES = 64 << 20


def rank(rows: Iterable[Row], better: Mapping[tuple[str, ...], int] | None = None) -> list[Row]:
    """The rows, board by board and best first, with their ranks.

    ``rank`` is the place by the number alone, among the rows of the same protocol and images: 1 plus how many are
    higher. Only full results that nobody disputes are ranked; the others follow by their number, then those without
    one. Rows whose protocol or model has been superseded become stale.

    Args:
        better: by :attr:`Row.key`, how many ranked rows of its board a row is better than beyond doubt
            (:func:`dmlbench.board.beyond.better_than`), where the queries' outcomes are at hand.
    """

    def order(row: Row) -> tuple[object, ...]:
        ranked = _has_rank(row)
        return (
            row.board[:3],
            not ranked,
            row.board if ranked else (),
            row.headline is None,
            -(row.headline or 0.0),
            row.model,
        )

    rows = sorted((_aged(r) for r in rows), key=order)
    numbers: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if _has_rank(row):
            numbers.setdefault(row.board, []).append(row.headline or 0.0)
    out = []
    for row in rows:
        update: dict[str, int | None] = {"rank": None, "better_than": None}
        if _has_rank(row):
            above = sum(other > (row.headline or 0.0) for other in numbers[row.board])
            update = {"rank": 1 + above, "better_than": (better or {}).get(row.key)}
        out.append(row.model_copy(update=update))
    return out


def _aged(row: Row) -> Row:
    """The row, stale where it was measured by a version of a protocol, or on a model, that has been superseded since."""
    if row.status in RANKED and superseded(row.protocol, row.protocol_sha256, row.model):
        return row.model_copy(update={"status": "stale"})
    return row


def ranked(row: Row) -> bool:
    """Does a board give the row a rank, as things are today?"""
    return _has_rank(_aged(row))


def _has_rank(row: Row) -> bool:
    return row.status in RANKED and row.partial is None and row.headline is not None


def to_csv(rows: Iterable[Row]) -> bytes:
    """The whole file: every column, but of those of a kind of protocol the ones that a row has a value in."""
    contents = [row.model_dump() for row in rows]
    columns = [c for c in COLUMNS if c not in OF_KINDS or any(content[c] is not None for content in contents)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for content in contents:
        writer.writerow(["" if content[c] is None else _cell(content[c]) for c in columns])
    return stream.getvalue().encode()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


RETIRED = ("tie_group", "surely_behind")
"""Columns of version 1, from intervals that were not paired, which are left out when its rows are read."""


def _read_1(cells: dict[str, str]) -> Row:
    return _read_2({name: value for name, value in cells.items() if name not in RETIRED} | {"schema_version": "2"})


def _read_2(cells: dict[str, str]) -> Row:
    return Row.model_validate({name: value for name, value in cells.items() if value != ""})


READERS: dict[str, Callable[[dict[str, str]], Row]] = {"1": _read_1, "2": _read_2}
"""By the row's ``schema_version``: how a row of that version becomes a :class:`Row` of today."""


def from_csv(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        DataError: the file is missing, not UTF-8, too large, of an unknown schema, or a cell is not what
            its column says; the line and the column are named.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES >> 20} MiB: not a board")
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if "\r" in text:
        raise DataError(f"{path} has CR line ends where LF are expected")
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows: list[Row] = []
    seen: dict[tuple[str, ...], int] = {}
    try:
        header = list(reader.fieldnames or [])
        if "schema_version" not in header:
            raise DataError(f"{path} is not a board: it has no column schema_version")
        if len(set(header)) != len(header):
            raise DataError(f"{path} has a column twice")
        if unknown := [c for c in header if c not in (*COLUMNS, *RETIRED)]:
            raise DataError(f"{path}: unknown column {unknown[0]!r}{suggest(unknown[0], COLUMNS)}")
        for cells in reader:
            line = reader.line_num
            if None in cells or None in cells.values():
                raise DataError(f"{path} line {line} has another number of cells than columns")
            read = READERS.get(cells["schema_version"])
            if read is None:
                raise DataError(f"{path} line {line}: schema_version {cells['schema_version']!r} is unknown")
            row = read(cells)
            if row.key in seen:
                raise DataError(f"{path} line {line}: model {row.model!r} is already in line {seen[row.key]}")
            seen[row.key] = line
            rows.append(row)
    except ValidationError as error:
        raise DataError(f"{path} line {reader.line_num}, column {first_problem(error)}") from None
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None
    return rows


def add_row(evaluation: Evaluation, path: Path) -> Row:
    """Add the evaluation's row to a CSV file, in place of an earlier one of the same :attr:`Row.key`.

    The file is made if it is not there, written whole or not at all, and ranked anew; two processes may
    add to one file. A partial result is marked as such (column ``partial``) and has no rank.

    Raises:
        DataError: the file is not a board, cannot be written, or holds a full result of this model that
            a partial one would replace; or the board takes no such row, e.g. for its model's name.
    """
    row = _allowed(path, lambda: from_evaluation(evaluation))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path):
        write_atomic(path, to_csv(rank([*_rows_that_stay(row, path), row])))
    return row


def foresee(path: Path, partial: Sequence[str], **known: Any) -> None:
    """Refuse before a run what :func:`add_row` would refuse after it.

    Args:
        path: the CSV file, which need not be there.
        partial: why the result will not be a full one; empty where it will.
        known: columns whose content is known by now; all that :attr:`Row.key` is made of at least.

    Raises:
        DataError: as for :func:`add_row`.
    """
    _rows_that_stay(_allowed(path, lambda: Row(status="local", partial=partial_text(partial), **known)), path)


def _allowed(path: Path, make: Callable[[], Row]) -> Row:
    """The row, if a board takes it."""
    try:
        return make()
    except ValidationError as error:
        raise DataError(f"{path} takes no such row: {first_problem(error)}") from None


def _rows_that_stay(row: Row, path: Path) -> list[Row]:
    """The rows of the file that stay when ``row`` is added."""
    rows = from_csv(path) if path.exists() else []
    if row.partial and any(r.partial is None for r in rows if r.key == row.key):
        raise DataError(
            f"{path} holds a full result of {row.model!r} under {row.protocol!r}; "
            f"a partial one ({row.partial}) does not replace it"
        )
    return [r for r in rows if r.key != row.key]

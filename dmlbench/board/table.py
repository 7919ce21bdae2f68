"""A board as a CSV file: reading it, ranking its rows, adding one, writing it whole.

UTF-8, LF, one fixed order of columns, numbers as numbers, an empty cell where a number is missing.
"""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmlbench.board.row import COLUMNS, RANKED, Row, from_evaluation, partial_text, superseded
from dmlbench.checkpoints import first_problem
from dmlbench.errors import DataError
from dmlbench.registry import suggest
from dmlbench.results import Evaluation, write_whole

MOST_BYTES = 64 << 20


def rank(rows: Iterable[Row]) -> list[Row]:
    """The rows, best first, with rank and tie group.

    Rows whose intervals overlap, directly or through others, form one tie group and share its rank: 1
    plus the number of ranked rows in better groups. Such a chain can be long, so ``surely_behind`` counts
    the rows that are better beyond doubt: whose interval lies wholly above. Only full results that are reproduced or verified
    are ranked; the others follow by their number, then those without one. Rows whose protocol or model has been superseded
    become stale. An interval that is missing
    (one test class) ties with nothing but the same number.
    """

    def order(row: Row) -> tuple[bool, float, str]:
        return (row.headline is None, -(row.headline or 0.0), row.model)

    rows = [_aged(r) for r in rows]
    ranked = sorted((r for r in rows if _has_rank(r)), key=order)
    others = sorted((r for r in rows if not _has_rank(r)), key=order)
    out: list[Row] = []
    group, place, floor = 0, 0, float("inf")
    # by the upper end, so that a wide interval below reaches up to those it overlaps
    by_end = sorted(ranked, key=lambda r: (-_ends(r)[1], r.model))
    assigned: dict[int, tuple[int, int]] = {}
    for position, row in enumerate(by_end):
        low, high = _ends(row)
        if high < floor:
            group, place = group + 1, position + 1
            floor = low
        floor = min(floor, low)
        assigned[id(row)] = (place, group)
    for row in ranked:
        place, group = assigned[id(row)]
        behind = sum(_ends(other)[0] > _ends(row)[1] for other in ranked)
        out.append(row.model_copy(update={"rank": place, "tie_group": group, "surely_behind": behind}))
    return out + [r.model_copy(update={"rank": None, "tie_group": None, "surely_behind": None}) for r in others]


def _aged(row: Row) -> Row:
    """The row, stale where it was measured by a version of a protocol, or on a model, that has been superseded since."""
    if row.status in RANKED and superseded(row.protocol, row.protocol_sha256, row.model):
        return row.model_copy(update={"status": "stale"})
    return row


def _has_rank(row: Row) -> bool:
    return row.status in RANKED and row.partial is None and row.headline is not None


def _ends(row: Row) -> tuple[float, float]:
    value = row.headline or 0.0
    return row.interval or (value, value)


def to_csv(rows: Iterable[Row]) -> bytes:
    """The whole file."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        content = row.model_dump()
        writer.writerow(["" if content[c] is None else _cell(content[c]) for c in COLUMNS])
    return stream.getvalue().encode()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def _read_1(cells: dict[str, str]) -> Row:
    return Row.model_validate({name: value for name, value in cells.items() if value != ""})


READERS: dict[str, Callable[[dict[str, str]], Row]] = {"1": _read_1}
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
        if unknown := [c for c in header if c not in COLUMNS]:
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


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that add rows in this folder waiting."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two writers at one moment are then the user's affair
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def add_row(evaluation: Evaluation, path: Path) -> Row:
    """Add the evaluation's row to a CSV file, in place of an earlier one of this model, data set and protocol.

    The file is made if it is not there, written whole or not at all, and ranked anew; two processes may
    add to one file. A partial result is marked as such (column ``partial``) and has no rank.

    Raises:
        DataError: the file is not a board, cannot be written, or holds a full result of this model that
            a partial one would replace; or the board takes no such row, e.g. for its model's name.
    """
    row = _allowed(path, lambda: from_evaluation(evaluation))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        write_whole(path, to_csv(rank([*_beside(row, path), row])))
    return row


def foresee(path: Path, partial: Sequence[str], **known: Any) -> None:
    """Refuse before a run what :func:`add_row` would refuse after it.

    Args:
        path: the CSV file, which need not be there.
        partial: why the result will not be a full one; empty where it will.
        known: columns whose content is known by now; ``protocol``, ``model`` and ``dataset`` at least.

    Raises:
        DataError: as for :func:`add_row`.
    """
    _beside(_allowed(path, lambda: Row(status="reproduced", partial=partial_text(partial), **known)), path)


def _allowed(path: Path, make: Callable[[], Row]) -> Row:
    """The row, if a board takes it."""
    try:
        return make()
    except ValidationError as error:
        raise DataError(f"{path} takes no such row: {first_problem(error)}") from None


def _beside(row: Row, path: Path) -> list[Row]:
    """The rows of the file that stay when ``row`` is added."""
    rows = from_csv(path) if path.exists() else []
    if row.partial and any(r.partial is None for r in rows if r.key[:3] == row.key[:3]):
        raise DataError(
            f"{path} holds a full result of {row.model!r} under {row.protocol!r}; "
            f"a partial one ({row.partial}) does not replace it"
        )
    return [r for r in rows if r.key[:3] != row.key[:3]]

"""Reading the list files that come with data sets, with errors that name the file and the line."""

from collections.abc import Iterator
from pathlib import Path

from dmlbench.datasets.pictures import shown
from dmlbench.errors import DataError


def rows(path: Path, columns: int, header: int = 0) -> Iterator[list[str]]:
    """The lines of a list file as ``columns`` words each, after ``header`` lines; empty lines are left out.

    Words are divided by white space; the last one keeps its own (file names have blanks). Bytes that are
    not UTF-8 become surrogate escapes, so that files of such names can be opened.

    Raises:
        DataError: the file is missing, or a line has fewer words.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"list file {shown(path)} cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if number <= header or not line.strip():
            continue
        words = line.strip().split(None, columns - 1)
        if len(words) != columns:
            raise DataError(f"list file {shown(path)}, line {number}: {columns} values expected, found {len(words)}")
        yield words


def whole_number(text: str, path: Path, what: str) -> int:
    """An integer of a list file, or an error that names the file."""
    try:
        return int(text)
    except ValueError:
        raise DataError(f"list file {shown(path)}: {what} {text!r} is not a whole number") from None

"""``csv:PATH``: one's own pictures, listed in a CSV in the convention of open-metric-learning.

Columns ``label`` and ``path`` (relative to the CSV's folder, or absolute), ``split`` (``train``, or
``validation``, for which ``test`` is also read), ``is_query`` and ``is_gallery`` (for the validation rows), and
optionally ``x_1, x_2, y_1, y_2``: left, right, top and bottom of a box in pixels, empty for the whole picture.
Rows of one ``sequence`` do not count for each other, and neither do rows of one label and one ``camera``; empty cells are of
none. A camera may be called ``camid``, ``cam_id`` or ``camera_id`` too. The label -1 is junk, which is left out. Any other column is ignored, with a note.
"""

import codecs
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd

from dmlbench.datasets.base import RetrievalDataset, numbered
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.folder import one_name
from dmlbench.datasets.pictures import Files, shown
from dmlbench.errors import DataError, NoSplit, UsageError
from dmlbench.preprocess import Preprocess

_SPLITS = {"train": ("train",), "test": ("validation", "test", "val")}
_BOX = ("x_1", "y_1", "x_2", "y_2")
_KNOWN = {"label", "path", "split", "is_query", "is_gallery", "camera", "sequence", *_BOX}
_CAMERA = ("camid", "cam_id", "camera_id")
"""Other names of the column ``camera``, where it has none of that name."""
_EMPTY = ("", "nan", "none", "na", "<na>", "n/a", "null")
"""An optional cell without a value, in lower case, as pandas, R and databases write it."""
_TRUTH = {
    **{"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False},
    **dict.fromkeys(_EMPTY, False),
}
_JUNK = r"-0*1(?:\.0*)?"
_NUMBER = re.compile(r"([+-]?)0*([0-9]+)(?:\.0*)?")


def table(path: str, split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The rows of the split; a class is a distinct value of ``label``.

    Raises:
        UsageError: PATH is no file.
        NoSplit: it has no row of this split.
        DataError: a column, a value or a picture is missing or cannot be understood; the row is named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"csv:{path} is not a file")
    try:
        with file.open("rb") as stream:
            encoding = "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
        rows = pd.read_csv(
            file, dtype=str, keep_default_na=False, encoding=encoding, encoding_errors="surrogateescape", skip_blank_lines=False
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise DataError(f"{shown(file)} is not a readable CSV: {error}") from None
    if not isinstance(rows.index, pd.RangeIndex):  # pandas takes the first cells for names of the rows
        raise DataError(f"{shown(file)}: the first line names {len(rows.columns)} columns, and a row has more cells")
    rows = rows[(rows != "").any(axis=1)]
    if "camera" not in rows.columns and (named := next((c for c in _CAMERA if c in rows.columns), None)):
        rows = rows.rename(columns={named: "camera"})
    if len(rows.columns) == 1 and (mark := re.search("[;\t|]", str(rows.columns[0]))):
        raise DataError(f"{shown(file)} has its cells separated by {mark[0]!r}, not by commas")
    _need(rows, ("label", "path", "split"), file)
    known = {s for group in _SPLITS.values() for s in group}
    strange = rows.index[~rows["split"].isin(known)]
    if len(strange):
        raise DataError(
            f"{shown(file)}, line {strange[0] + 2}: split {rows['split'][strange[0]]!r} is not train or validation"
        )
    rows = rows[rows["split"].isin(_SPLITS[split])]
    if rows.empty:
        raise NoSplit(f"{shown(file)} has no row of the {split} split")
    if split == "test":
        _need(rows, ("is_query", "is_gallery"), file)
    notes = []
    if strange := [str(column) for column in rows.columns if column not in _KNOWN]:
        notes.append(f"columns that are not used: {', '.join(map(shown, strange))}")
    rows = rows.assign(label=rows["label"].str.strip())
    junk = rows["label"].str.fullmatch(_JUNK)
    if junk.any():
        notes.append(f"{int(junk.sum()):,} rows with the label -1 are junk and left out: they count for no query")
        rows = rows[~junk]
        if rows.empty:
            raise DataError(f"{shown(file)} has only junk in the {split} split: every label is -1")
    for column in ("label", "path"):
        if len(empty := rows.index[rows[column] == ""]):
            raise DataError(f"{shown(file)}, line {empty[0] + 2}: {column} is empty")
    for word, count in rows["label"][rows["label"].str.lower().isin(_EMPTY)].value_counts(sort=False).items():
        notes.append(
            f"label {shown(str(word))} in {count:,} rows: taken for a class of that name, not for a missing label"
        )
    written = _as_numbers(rows["label"], notes)
    called = one_name([("", label) for label in written], notes)
    labels, names = numbered([shown(called["", label]) for label in written])
    root = file.resolve().parent
    paths = [os.path.normpath(_slashes(p, root)) for p in rows["path"]]
    query = np.empty(0, dtype=np.int64)
    gallery = np.empty(0, dtype=np.int64)
    if split == "test":
        query, gallery = (np.flatnonzero(_truth(rows, c, file)) for c in ("is_query", "is_gallery"))
        if not len(query) or not len(gallery):
            raise DataError(f"{shown(file)} marks no {'gallery' if len(query) else 'query'} row in the test split")
        if idle := len(rows) - len(np.union1d(query, gallery)):
            notes.append(f"{idle:,} rows of the test split are neither query nor gallery, and not used")
    return RetrievalDataset(
        name=f"csv:{shown(file)}",
        split=split,
        images=CachedImages(Files(root, paths, boxes=_boxes(rows, file), upright=True), preprocess),
        labels=labels,
        query=query,
        gallery=gallery,
        source=shown(file.resolve()),
        class_names=names,
        groups=_groups(rows, labels, notes),
        notes=notes,
    )


def _need(rows: pd.DataFrame, columns: tuple[str, ...], file: Path) -> None:
    if lacking := [c for c in columns if c not in rows.columns]:
        raise DataError(f"{shown(file)} has no column {', '.join(lacking)}; it has {', '.join(map(str, rows.columns))}")


def _slashes(path: str, root: Path) -> str:
    """A path as Windows writes it, with this system's slashes, where no file has the backslashes in its name."""
    return path.replace("\\", "/") if os.sep == "/" and "\\" in path and not (root / path).exists() else path


def _as_numbers(cells: pd.Series, notes: list[str]) -> pd.Series:
    """The cells of a column of whole numbers, each number spelt in one way: 1, 01 and 1.0 are the same, as open-metric-learning
    reads them. A column with any other word stays as it is. ``notes`` gets what was done."""
    spelt: dict[tuple[str, str], set[str]] = {}
    for cell in cells.unique():
        if match := _NUMBER.fullmatch(cell):
            spelt.setdefault((match[1].strip("+"), match[2]), set()).add(cell)
        elif cell.lower() not in _EMPTY:
            return cells
    if several := [sorted(forms) for forms in spelt.values() if len(forms) > 1]:
        more = f" and {len(several) - 3} more" if len(several) > 3 else ""
        text = "; ".join(map(", ".join, several[:3]))
        notes.append(f"column {cells.name}: the same number is written as {text}{more}: taken for one")
    first = {form: forms[0] for forms in several for form in forms}
    return cells.map(lambda cell: first.get(cell, cell))


def _groups(rows: pd.DataFrame, labels: np.ndarray, notes: list[str]) -> np.ndarray:
    """(N, G) the sequence of each row, and its camera with its label, as numbers; -1 where there is none."""
    columns = []
    for name in ("sequence", "camera"):
        if name in rows.columns:
            values = _as_numbers(rows[name].str.strip(), notes)
            number = pd.factorize(values)[0].astype(np.int64)
            number = number * (int(labels.max()) + 1) + labels if name == "camera" else number
            columns.append(np.where(values.str.lower().isin(_EMPTY), -1, number))
    return np.stack(columns, 1) if columns else np.empty((0, 0), dtype=np.int64)


def _truth(rows: pd.DataFrame, column: str, file: Path) -> np.ndarray:
    """(N,) bool of a yes-or-no column."""
    words = rows[column].str.strip().str.lower()
    if len(strange := rows.index[~words.isin(list(_TRUTH))]):
        raise DataError(
            f"{shown(file)}, line {strange[0] + 2}: {column} {rows[column][strange[0]]!r} is not true or false"
        )
    return np.array([_TRUTH[w] for w in words], dtype=bool)


def _boxes(rows: pd.DataFrame, file: Path) -> np.ndarray | None:
    """(N, 4) left, top, right, bottom; None where the CSV has no boxes."""
    given = [c for c in _BOX if c in rows.columns]
    if not given:
        return None
    if len(given) < 4:
        raise DataError(f"{shown(file)} has {', '.join(given)} but not all of x_1, x_2, y_1, y_2")
    numbers = np.full((len(rows), 4), np.nan)
    for column, name in enumerate(_BOX):
        for at, (index, text) in enumerate(zip(rows.index, rows[name], strict=True)):
            if text.strip().lower() in _EMPTY:
                continue
            try:
                numbers[at, column] = float(text)
            except ValueError:
                raise DataError(f"{shown(file)}, line {index + 2}: {name} {text!r} is not a number") from None
    missing = np.isnan(numbers)
    if len(part := rows.index[missing.any(1) & ~missing.all(1)]):
        raise DataError(f"{shown(file)}, line {part[0] + 2}: a box needs all of {', '.join(_BOX)}, or none")
    return numbers

"""Pairs of pictures to verify, from a file: LFW's ``pairs.txt``, or a CSV with columns probe, partner, same and optionally fold.

LFW's layout (Huang, Ramesh, Berg and Learned-Miller, 2007): a first line with the number of folds and of genuine pairs in each, then for
each fold as many lines ``name n m`` and as many ``name n other m``. A picture is named by its path, by the end of it from a folder on,
with or without its suffix, or in a data set without files by its row number.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dmlbench.datasets.base import ChosenImages, Pairs, RetrievalDataset
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files, shown
from dmlbench.errors import DataError, UsageError

COLUMNS = ("probe", "partner", "same")
FOLD = "fold"
SAME = {"1": True, "true": True, "0": False, "false": False}
"""How a CSV file says it."""


class Named(NamedTuple):
    """A pair as the file names it; ``fold`` is -1 where it has none."""

    line: int
    probe: str
    partner: str
    same: bool
    fold: int


def with_pairs(dataset: RetrievalDataset, path: str | Path) -> RetrievalDataset:
    """The data set with the file's pairs as its queries: each asks with its probe, however often that is named.

    Partners are added to the gallery; a probe's own picture does not count for it.

    Raises:
        UsageError: it names pairs that nothing can be measured on; the line is named. DataError: the file cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"pairs file {shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    where = f"pairs file {shown(path)}"
    rows = known(dataset)
    rows_of_pairs, seen = [], dict[tuple[int, int], int]()
    for pair in _read(text, where):
        at = f"{where}, line {pair.line}"
        probe, partner = (_row(rows, name, at, dataset) for name in (pair.probe, pair.partner))
        if probe == partner:
            raise UsageError(f"{at}: {pair.probe!r} is compared with itself")
        if (first := seen.setdefault((probe, partner), pair.line)) != pair.line:
            raise UsageError(f"{at}: the pair is already in line {first}")
        if pair.same != bool(dataset.labels[probe] == dataset.labels[partner]):
            claim, held = ("the same", "two classes") if pair.same else ("not the same", "one class")
            raise UsageError(f"{at}: says {claim}, data set {dataset.name!r} has the pictures in {held}")
        rows_of_pairs.append((probe, partner, pair.same, pair.fold))
    if not rows_of_pairs:
        raise UsageError(f"{where} holds no pair")
    probes, partners, same, fold = (np.array(column, dtype=np.int64) for column in zip(*rows_of_pairs, strict=True))
    if len(np.unique(dataset.labels[np.concatenate([probes, partners])])) < 2:
        raise UsageError(f"{where} has pictures of a single class: no pair of two can be told from one")
    for value, kind in ((1, "genuine pair (of one class)"), (0, "impostor pair (of two classes)")):
        if not (same == value).any():
            raise UsageError(f"{where} has no {kind}")
    n, probe_group = len(dataset), np.full(len(dataset), -1, dtype=np.int64)
    probe_group[probes] = probes
    every = np.concatenate([np.arange(n), probes])
    groups = np.concatenate([probe_group, probes])[:, None]
    if dataset.apart is not None:
        groups = np.concatenate([groups, dataset.apart[every]], axis=1)
    return replace(
        dataset,
        images=ChosenImages(dataset.images, every),
        labels=dataset.labels[every],
        query=np.arange(n, n + len(probes)),
        gallery=np.union1d(dataset.gallery, partners),
        groups=groups,
        pairs=Pairs(partners, fold, hashlib.sha256(content).hexdigest()),
    )


def known(dataset: RetrievalDataset) -> dict[str, list[int]]:
    """The rows that each name may mean."""
    images = dataset.images
    if not (isinstance(images, CachedImages) and isinstance(images.source, Files)):
        return {str(row): [row] for row in range(len(dataset))}
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(images.source.paths):
        parts = PurePosixPath(path.replace("\\", "/")).parts
        for start in range(len(parts)):
            end = PurePosixPath(*parts[start:])
            for name in {end.as_posix(), end.with_suffix("").as_posix()}:
                rows_of.setdefault(name, []).append(row)
    return rows_of


def _row(rows: dict[str, list[int]], name: str, at: str, dataset: RetrievalDataset) -> int:
    """The one row that is meant, of a class."""
    matches = rows.get(name, [])
    if len(matches) != 1:
        text = f"may be any of {len(matches)} pictures" if matches else "is no picture"
        raise UsageError(f"{at}: {name!r} {text} of data set {dataset.name!r}")
    if dataset.labels[matches[0]] < 0:
        raise UsageError(f"{at}: {name!r} is of no class")
    return matches[0]


def _read(text: str, where: str) -> Iterator[Named]:
    """The pairs of a file, in its order."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    return _csv(lines, where) if "," in first else _lfw(lines, where)


def _csv(lines: list[str], where: str) -> Iterator[Named]:
    reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        heads = reader.fieldnames or []
    except csv.Error as error:
        raise UsageError(f"{where}, line 1: {error}") from None
    if sorted(heads) not in (sorted(COLUMNS), sorted([*COLUMNS, FOLD])):
        raise UsageError(f"{where} has columns {', '.join(heads)}, where probe,partner,same[,fold] are expected")
    try:
        for cells in reader:
            at = f"{where}, line {reader.line_num}"
            if None in cells or None in cells.values():
                raise UsageError(f"{at} has another number of cells than columns")
            same, fold = SAME.get(cells["same"].strip().lower()), cells.get(FOLD, "-1").strip()
            if same is None:
                raise UsageError(f"{at}: same {cells['same']!r} must be 1 or 0")
            if FOLD in heads and not _counts(fold):
                raise UsageError(f"{at}: fold {fold!r} is not a whole number")
            yield Named(reader.line_num, cells["probe"].strip(), cells["partner"].strip(), same, int(fold))
    except csv.Error as error:
        raise UsageError(f"{where}, line {reader.line_num}: {error}") from None


def _counts(text: str) -> bool:
    """Is it a whole number of nine digits at most?"""
    return text.isdecimal() and len(text) <= 9


def _lfw(lines: list[str], where: str) -> Iterator[Named]:
    numbered = [(n, line.split()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        return
    head, *rest = numbered
    if len(head[1]) > 2 or not all(_counts(cell) and int(cell) for cell in head[1]):
        raise UsageError(
            f"{where}, line {head[0]}: neither columns probe,partner,same nor LFW's numbers of folds and pairs"
        )
    *folds, each = map(int, head[1])
    count = folds[0] if folds else 1
    if len(rest) != 2 * each * count:
        raise UsageError(f"{where} holds {len(rest)} pairs, its first line says {count} x 2 x {each}")
    for place, (line, cells) in enumerate(rest):
        same = place % (2 * each) < each
        numbers = cells[1::2] if not same else cells[1:]
        if len(cells) != (3 if same else 4) or not all(map(_counts, numbers)):
            form = "name n m" if same else "name n other m"
            raise UsageError(f"{where}, line {line}: {' '.join(cells)!r} is not '{form}'")
        other = cells[0] if same else cells[2]
        probe, partner = (f"{name}/{name}_{int(n):04d}" for name, n in zip((cells[0], other), numbers, strict=True))
        yield Named(line, probe, partner, same, place // (2 * each) if count > 1 else -1)

"""``folder:PATH``: one's own pictures, a folder of class folders.

Where PATH holds folders named ``train`` and ``test`` (or ``training``, ``testing``, ``val``, ``validation``, ``query``,
``gallery``), in any case, the classes lie below those, and ``query`` with ``gallery`` make a test split with separate
galleries, also within ``test``. Longer names with such a word (``train_set``, ``Test images``) are parts where all folders
have one. Otherwise every class folder belongs to the test split. A sole folder around all that is stepped through.
A class folder ``-1`` is junk, which counts for no query. Files that are no pictures are skipped. The notes of the data set
name them, and every decision that was not obvious.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dmlbench.datasets.base import JUNK, RetrievalDataset, numbered
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files, shown
from dmlbench.errors import DataError, NoSplit, UsageError
from dmlbench.preprocess import Preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jpe", ".jp2")
"""Taken for pictures by name; what else a file is, its first bytes say."""
KNOWN_BY_CONTENT = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "val": "test", "validation": "test", "valid": "test",
    "query": "query", "queries": "query", "probe": "query", "gallery": "gallery",
}  # fmt: skip
"""Folders that are a part of a data set, not a class, in any case, and which; of several test parts the first here is read."""
OTHERS = {
    "image_class_labels.txt": "cub",
    "Ebay_train.txt": "sop",
    "cars_annos.mat": "cars",
    "list_eval_partition.txt": "inshop",
}
"""Files by which a data set that has an id of its own is known, and the id."""
_MADE_BY_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found")


@dataclass
class Listing:
    """The contents of a folder.

    Attributes:
        pictures: (part, class, path below the root) of each, in order.
        passed: the number of files that are no pictures, by suffix.
        notes: sentences for the user.
    """

    pictures: list[tuple[str, str, str]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def class_folder(path: str, split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The pictures of a folder of class folders; a class is a folder, its name the folder's.

    Raises:
        UsageError: PATH is no folder, or has no such split (NoSplit where it has nothing for it).
        DataError: it holds no pictures in class folders, or none that can be read in one of them.
    """
    named = Path(path).expanduser()
    if not named.is_dir():
        raise UsageError(f"folder:{path} is not a folder")
    listing = Listing()
    root = _within(named, listing)
    for file, known in OTHERS.items():
        if any((folder / file).is_file() for folder in (named, root, root.parent)):
            listing.notes.append(
                f"this looks like the data set {known}, as it has {file}: --dataset {known} reads its classes and the "
                "field's test split; here each class is a folder and, without a folder 'test', all are tested on"
            )
    parts = _parts(root, listing)
    here = {part for part, _ in parts}
    apart: list[str] = [part for part in ("query", "gallery") if part in here]
    parts_read = ["train"] if split == "train" else apart or ["test"]
    if parts and (not set(parts_read) & here or parts_read in (["query"], ["gallery"])):
        kind = UsageError if set(parts_read) & here else NoSplit
        raise kind(f"folder:{path} has {', '.join(shown(f.name) for _, f in parts)}, but nothing for the {split} split")
    if not parts and split == "train":
        raise UsageError(
            f"folder:{path} has no folder 'train': all its classes are the test split; the classes to learn belong into "
            f"{shown(root)}/train, others to measure on into {shown(root)}/test"
        )
    used: list[Path] = []
    for part in parts_read if parts else [""]:
        folder = next((f for p, f in parts if p == part), root)
        used.append(folder)
        for of, top in _tops(part, folder, listing) if parts else [(part, folder)]:
            _gather(root, of, top, listing)
    if parts:
        _note(
            listing, "folders passed over", (shown(f.name) for f in _folders(root) if not _of_a_split(f, used, parts))
        )
    if listing.passed:
        counts = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(listing.passed.items()))
        listing.notes.append(f"passed over, no pictures that can be read here: {counts}")
    if not listing.pictures:
        where = " or ".join(shown(folder) for folder in used)
        raise DataError(
            f"no pictures in class folders under {where} ({', '.join(SUFFIXES[:5])} ... are looked for)"
            + (f"; {listing.notes[-1]}" if listing.passed else "")
        )
    same = one_name([(part, name) for part, name, _ in listing.pictures], listing.notes)
    called = np.array([shown(same[part, name]) for part, name, _ in listing.pictures])
    labels, known = np.full(len(called), JUNK, dtype=np.int64), called != str(JUNK)
    labels[known], names = numbered(called[known].tolist())
    part_of = np.array([part for part, _, _ in listing.pictures])
    return RetrievalDataset(
        name=f"folder:{shown(named)}",
        split=split,
        images=CachedImages(Files(root, [relative for _, _, relative in listing.pictures], upright=True), preprocess),
        labels=labels,
        query=np.flatnonzero(part_of == "query"),
        gallery=np.flatnonzero(part_of == "gallery"),
        source=shown(named.resolve()),
        class_names=names,
        notes=listing.notes,
    )


def _folders(root: Path) -> list[Path]:
    """The folders right below, links to folders among them; hidden ones and those of systems left out."""
    return sorted(
        (f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name not in _MADE_BY_SYSTEMS),
        key=os.fsencode,
    )


def _word(name: str) -> str | None:
    """The word of :data:`PARTS` in a folder's name, where it has one: that of ``train_set``, ``Test images`` or ``trainset``."""
    words = {word.removesuffix("set") for word in re.split("[^a-z]+", name.lower())} & set(PARTS)
    return words.pop() if len(words) == 1 else None


def _parts(root: Path, listing: Listing) -> list[tuple[str, Path]]:
    """(part, folder) of the folders that are one, in the order of :data:`PARTS`.

    Raises:
        DataError: two folders differ only in case, or say the same in other words.
    """
    folders = _folders(root)
    words = {f: f.name.lower() for f in folders if f.name.lower() in PARTS}
    if not words:
        loose = {f: word for f in folders if (word := _word(f.name)) is not None}
        parts = {PARTS[word] for word in loose.values()}
        if len(loose) == len(folders) and ({"train", "test"} <= parts or {"query", "gallery"} <= parts):
            words = loose
            text = ", ".join(f"{shown(f.name)} for {PARTS[word]}" for f, word in loose.items())
            listing.notes.append(f"of the folders in {shown(root)} is taken {text}")
    often = Counter(words.values())
    if twice := [f.name for f, word in words.items() if often[word] > 1]:
        raise DataError(f"{shown(root)} has {' and '.join(twice)}: which of them is meant?")
    return [(PARTS[word], f) for f, word in sorted(words.items(), key=lambda pair: list(PARTS).index(pair[1]))]


def _tops(part: str, folder: Path, listing: Listing) -> list[tuple[str, Path]]:
    """(part, folder of class folders) of a part: itself, or the ``query`` and ``gallery`` in a ``test``.

    Raises:
        UsageError: there is one of these two alone.
    """
    top = _within(folder, listing, part)
    inner = _parts(top, listing) if part == "test" else []
    apart = [(p, _within(f, listing, p)) for p, f in inner if p in ("query", "gallery")]
    if {p for p, _ in apart} == {"query", "gallery"}:
        return apart
    if inner and len(inner) == len(_folders(top)):
        raise UsageError(
            f"{shown(top)} has {', '.join(shown(f.name) for _, f in inner)}, and neither classes nor both of query and gallery"
        )
    return [(part, top)]


def _of_a_split(folder: Path, used: Iterable[Path], parts: Iterable[tuple[str, Path]]) -> bool:
    """Is the folder read, or the one that the other split reads?"""
    others = ("train",) if all(part != "train" for part, f in parts if f in used) else ("test", "query", "gallery")
    return folder in used or any(f == folder and part in others for part, f in parts)


def _within(folder: Path, listing: Listing, part: str | None = None) -> Path:
    """``folder``, or what lies in the sole folders around all of it: one class alone is no data set, so a sole folder
    that holds folders is none, unless it holds pictures and a single folder. A ``part`` may lie in one of its own name."""
    inner = folder
    while len(inside := _folders(inner)) == 1 and not _pictures_in(inner):
        if PARTS.get(inside[0].name.lower(), part) != part:
            break
        deeper = _folders(inside[0])
        if not deeper or (len(deeper) == 1 and _pictures_in(inside[0])):
            break
        inner = inside[0]
    if inner != folder:
        listing.notes.append(f"{shown(inner)} is taken for the folder of classes: it alone is in {shown(folder)}")
    return inner


def _pictures_in(folder: Path) -> bool:
    return any(f.is_file() and _is_picture(f) for f in folder.iterdir() if not f.name.startswith("."))


def _is_picture(file: Path) -> bool:
    """By its suffix, else by its first bytes."""
    if file.name.lower().endswith(SUFFIXES):
        return True
    try:
        with Image.open(file, formats=[name for name in KNOWN_BY_CONTENT if name in _can_open()]):
            return True
    except Exception:  # Pillow fails in many ways on what is no picture
        return False


def _can_open() -> dict[str, object]:
    Image.init()
    return Image.OPEN  # type: ignore[return-value]


def _gather(root: Path, part: str, top: Path, listing: Listing) -> None:
    """Add the pictures below ``top`` to ``listing``; deeper folders belong to their class.

    Raises:
        DataError: a class folder holds files, but no picture.
    """
    loose = sum(f.is_file() and _is_picture(f) for f in top.iterdir() if not f.name.startswith("."))
    if loose:
        listing.notes.append(f"{loose:,} pictures right in {shown(top)} are in no class folder and passed over")
    right_in = deeper = 0
    above = tuple(map(str, (top.resolve(), *top.resolve().parents)))
    empty = []
    for folder in _folders(top):
        before, passed = len(listing.pictures), Counter[str]()
        for file in _files(folder, above, listing):
            if not _is_picture(file):
                passed[file.suffix.lower() or "without a suffix"] += 1
                continue
            listing.pictures.append((part, folder.name, str(file.relative_to(root))))
            right_in, deeper = right_in + (file.parent == folder), deeper + (file.parent != folder)
        listing.passed += passed
        if len(listing.pictures) == before and passed:
            counts = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(passed.items()))
            raise DataError(f"class folder {shown(folder)} holds no picture that can be read here: {counts}")
        if len(listing.pictures) == before:
            empty.append(shown(folder.name))
    _note(listing, f"folders without a file in {shown(top)}, no classes", empty)
    if deeper and not right_in:
        listing.notes.append(
            f"no picture lies right in a class folder: classes are the {len(_folders(top))} folders in {shown(top)}, "
            "not those further down"
        )


def _files(folder: Path, above: tuple[str, ...], listing: Listing) -> Iterator[Path]:
    """Every file below, those of a folder after those of its folders' names in order; links are followed, not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        listing.notes.append(f"{shown(folder)} is a link to a folder that it lies in, and not followed")
        return
    entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=os.fsencode)
    yield from (e for e in entries if e.is_file() or not e.exists())  # pipes are none, links to nothing are missing
    for entry in entries:
        if entry.is_dir() and entry.name not in _MADE_BY_SYSTEMS:
            yield from _files(entry, (*above, real), listing)


def _note(listing: Listing, what: str, names: Iterable[str]) -> None:
    if listed := list(names):
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        listing.notes.append(f"{what}: {', '.join(listed[:5])}{more}")


def one_name(classes: Iterable[tuple[str, str]], notes: list[str]) -> dict[tuple[str, str], str]:
    """From (part, name) to the class's name: names that differ in Unicode form are one class, and so are those that
    differ in case, unless both stand in one part, which means that case matters there. ``notes`` gets what was done."""
    plain = {(part, name): unicodedata.normalize("NFC", name) for part, name in classes}
    spelt: dict[str, set[str]] = {}  # NFC to the names as they are
    cases: dict[str, dict[str, set[str]]] = {}  # case folded, to NFC, to the parts that have it
    for (part, name), nfc in plain.items():
        spelt.setdefault(nfc, set()).add(name)
        cases.setdefault(nfc.casefold(), {}).setdefault(nfc, set()).add(part)
    called: dict[str, str] = {}
    for names in cases.values():
        parts = [part for parts_of_name in names.values() for part in parts_of_name]
        apart = len(parts) > len(set(parts))
        called |= {name: name if apart else min(names) for name in names}
        if len(names) > 1:
            text = "different classes, since they stand side by side" if apart else "one class"
            notes.append(f"{' and '.join(shown(n) for n in sorted(names))} differ in case only: taken for {text}")
    notes += [
        f"{shown(nfc)} is written in {len(forms)} Unicode forms: taken for one class"
        for nfc, forms in sorted(spelt.items())
        if len(forms) > 1
    ]
    return {key: called[nfc] for key, nfc in plain.items()}

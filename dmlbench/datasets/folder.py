"""``folder:PATH``: one's own pictures, a folder of class folders.

Where PATH holds folders named ``train`` and ``test`` (or ``val``, ``validation``, ``query``, ``gallery``),
the classes lie below those, and ``query`` with ``gallery`` make a test split with separate galleries.
Otherwise every class folder belongs to the test split.
"""

import os
from pathlib import Path

import numpy as np

from dmlbench.datasets.base import RetrievalDataset, numbered
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.pictures import Files, shown
from dmlbench.errors import DataError, UsageError
from dmlbench.preprocess import Preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jpe", ".jp2")
_TEST_FOLDERS = ("test", "val", "validation", "valid")
PARTS = ("train", *_TEST_FOLDERS, "query", "gallery")
"""Folders that are a part of a data set, not a class."""


def class_folder(path: str, split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The pictures of a folder of class folders; a class is a folder, its name the folder's.

    Raises:
        UsageError: PATH is no folder, or has no such split.
        DataError: it holds no pictures in class folders.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UsageError(f"folder:{path} is not a folder")
    parts = [name for name in PARTS if (root / name).is_dir()]
    if split == "train":
        wanted = ["train"]
    else:
        wanted = [p for p in ("query", "gallery") if p in parts] or [p for p in _TEST_FOLDERS if p in parts][:1]
    if parts and (not set(wanted) & set(parts) or wanted in (["query"], ["gallery"])):
        raise UsageError(f"folder:{path} has {', '.join(parts)}, but nothing for the {split} split")
    if not parts and split == "train":
        raise UsageError(f"folder:{path} has no folder 'train': all its classes are the test split")
    found: list[tuple[str, str, str]] = []  # part, class, path below root
    for part in wanted if parts else [""]:
        for name, relative in _pictures(root / part):
            found.append((part, name, str(Path(part, relative))))
    if not found:
        where = " or ".join(shown(root / p) for p in wanted) if parts else shown(root)
        raise DataError(f"no pictures in class folders under {where} ({', '.join(SUFFIXES[:5])} ... are looked for)")
    labels, names = numbered([shown(name) for _, name, _ in found])
    part_of = np.array([part for part, _, _ in found])
    return RetrievalDataset(
        name=f"folder:{shown(root)}",
        split=split,
        images=CachedImages(Files(root, [relative for _, _, relative in found], upright=True), preprocess),
        labels=labels,
        query=np.flatnonzero(part_of == "query"),
        gallery=np.flatnonzero(part_of == "gallery"),
        source=shown(root.resolve()),
        class_names=names,
    )


def _pictures(root: Path) -> list[tuple[str, str]]:
    """(class, path below ``root``) of every picture, sorted; deeper folders belong to their class."""
    found = []
    for folder in sorted((f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")), key=os.fsencode):
        for where, folders, files in os.walk(folder):
            folders.sort(key=os.fsencode)
            for file in sorted(files, key=os.fsencode):
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    found.append((folder.name, str(Path(where, file).relative_to(root))))
    return found

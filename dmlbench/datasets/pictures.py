"""Where pictures come from before they are decoded: files on disk, or small arrays in memory.

A :class:`Source` gives pictures by row and the sha256 of what each is made from. A picture that cannot
be decoded raises :class:`Undecodable` with the reason; which images of a data set are broken is told by
``dmlbench datasets verify``.
"""

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from dmlbench.datasets.base import ArrayImages
from dmlbench.errors import DataError
from dmlbench.files import first_line

T = TypeVar("T")
BLOCK = 128
"""Pictures that are decoded ahead of the one that is requested."""


def shown(path: Path | str) -> str:
    """A path as printable text: bytes that are not UTF-8 are written as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Undecodable(Exception):
    """One picture that cannot be decoded; the message says which and why."""


@runtime_checkable
class Source(Protocol):
    """Pictures by row."""

    def __len__(self) -> int: ...

    def picture(self, row: int) -> Image.Image:
        """The decoded picture of a row; raises :class:`Undecodable`."""
        ...

    def called(self, row: int) -> str:
        """What a person knows the picture of a row by."""
        ...

    def state(self) -> bytes:
        """A digest that changes whenever the content may have changed, made without reading all of it."""
        ...

    def digests(self) -> np.ndarray:
        """(N, 32) uint8: the sha256 of what each picture is made from."""
        ...

    def crops(self) -> bytes:
        """What else the pixels of a row depend on, besides the file's content."""
        ...


@dataclass(frozen=True, eq=False)
class Files:
    """Image files under one folder.

    Attributes:
        root: the folder.
        paths: (N,) each image's path below it.
        boxes: (N, 4) left, top, right, bottom in pixels of the picture, after it is turned, or None; a row of NaN is all of it.
        upright: turn pictures as their EXIF orientation says. The field's public code does not, so its data sets do not.
    """

    root: Path
    paths: Sequence[str]
    boxes: np.ndarray | None = None
    upright: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.root / self.paths[row]

    def missing(self) -> list[int]:
        """Rows whose file does not exist."""
        return [row for row in range(len(self)) if not self.path(row).is_file()]

    def require(self, name: str) -> "Files":
        """The same files, if all exist.

        Raises:
            DataError: some do not; how many, and the first.
        """
        if lost := self.missing():
            raise DataError(
                f"data set {name!r}: {len(lost):,} of {len(self):,} image files are missing under {shown(self.root)}, "
                f"the first is {shown(self.paths[lost[0]])}"
            )
        return self

    def called(self, row: int) -> str:
        return shown(self.path(row))

    def read(self, row: int) -> bytes:
        """What the file of a row holds; raises OSError."""
        return self.path(row).read_bytes()

    def picture(self, row: int) -> Image.Image:
        path = self.path(row)
        try:
            picture = decoded(self.read(row))
            if self.upright:
                picture = ImageOps.exif_transpose(picture)
            return picture if self.boxes is None else boxed(picture, self.boxes[row])
        except Exception as error:  # Pillow's decoders raise many kinds; each means that this file is no usable picture
            raise Undecodable(f"{shown(path)}: {reason(error)}") from None

    def state(self) -> bytes:
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        try:
            for relative in self.paths:
                at = (self.root / relative).stat()
                digest.update(os.fsencode(relative) + b"\0")
                digest.update(f"{at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}\n".encode())
        except OSError as error:
            raise DataError(f"image file {shown(error.filename)} cannot be read: {error.strerror}") from None
        return digest.digest()

    def digests(self) -> np.ndarray:
        def one(row: int) -> bytes:
            try:
                return hashlib.sha256(self.read(row)).digest()
            except OSError as error:
                raise DataError(f"image file {shown(self.path(row))} cannot be read: {error.strerror}") from None

        return np.frombuffer(b"".join(each(one, len(self))), np.uint8).reshape(-1, 32)

    def crops(self) -> bytes:
        boxes = b"" if self.boxes is None else np.ascontiguousarray(self.boxes, dtype="<f8").tobytes()
        return (b"upright" if self.upright else b"as stored") + boxes


@dataclass(frozen=True, eq=False)
class Packed(Files):
    """Image files inside a zip archive, which is ``root``; they are read where they lie."""

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        """The archive, open; several threads may read from it."""
        return opened(self.root)

    def missing(self) -> list[int]:
        members = set(self.archive.namelist())
        return [row for row, path in enumerate(self.paths) if path not in members]

    def read(self, row: int) -> bytes:
        try:
            return self.archive.read(self.paths[row])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(None, str(error) or "truncated", str(self.path(row))) from None

    def state(self) -> bytes:
        at = self.root.stat()
        state = [os.fsencode(self.root.resolve()), f"{at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}".encode()]
        return hashlib.sha256(b"\0".join([*state, *(os.fsencode(path) for path in self.paths)])).digest()


def opened(archive: Path) -> zipfile.ZipFile:
    """A zip archive to read from.

    Raises:
        DataError: it is none, or is cut off.
    """
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"archive {shown(archive)} cannot be read: {error}") from None


@dataclass(frozen=True, eq=False)
class Arrays:
    """Pictures of a data set that is held in memory, for a network that wants another size."""

    images: ArrayImages

    def __len__(self) -> int:
        return len(self.images)

    def called(self, row: int) -> str:
        return f"image {row}"

    def picture(self, row: int) -> Image.Image:
        values = self.images.array[row].astype(np.float32) * (255.0 / self.images.top)
        pixels = (255.0 - values if self.images.invert else values).round().astype(np.uint8)  # (C, H, W)
        return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    @cached_property
    def _digest(self) -> bytes:
        return self.images.content()

    def state(self) -> bytes:
        return self._digest

    def digests(self) -> np.ndarray:
        return np.frombuffer(self._digest, np.uint8).reshape(1, 32)

    def crops(self) -> bytes:
        return f"top {self.images.top} invert {self.images.invert}".encode()


def workers() -> int:
    """How many threads decode at once: Pillow gives up the interpreter lock while it works."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def each(work: Callable[[int], T], count: int) -> Iterator[T]:
    """``work(0)`` to ``work(count - 1)`` in order, by several threads.

    Threads run ahead by one block at most, so that memory stays bounded and a failure or an interruption ends it soon.
    """
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, count, BLOCK):
            yield from pool.map(work, range(start, min(start + BLOCK, count)))


def decoded(content: bytes) -> Image.Image:
    """The picture in a file's bytes, read to its end, so that a truncated file is found here."""
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def boxed(picture: Image.Image, box: np.ndarray) -> Image.Image:
    """The part of a picture inside ``box`` (4,): left, top, right, bottom in pixels; NaN for all of it.

    Raises:
        ValueError: the box is empty or not inside the picture.
    """
    if bool(np.isnan(box).any()):
        return picture
    left, top, right, bottom = (int(v) for v in box)
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        raise ValueError(
            f"box ({left}, {top}, {right}, {bottom}) is not inside the picture of {picture.width}x{picture.height}"
        )
    return picture.crop((left, top, right, bottom))


def reason(error: Exception) -> str:
    """Why a picture cannot be decoded, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "file is missing"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)

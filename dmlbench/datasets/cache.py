"""Pictures decoded and resized once: a uint8 array on disk, memory-mapped, shared by every attack and process.

The cache lies under ``DMLBENCH_CACHE``, else ``~/.cache/dmlbench`` (``XDG_CACHE_HOME`` is honoured), and
may be deleted at any time. An array is keyed by the sha256 of every source file and by the
preprocessing; the files are hashed again whenever a size or a time on disk has changed. One
process decodes while others that want the same array wait for it; a file appears under its name
only when it is whole.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from dmlbench.datasets.base import ArrayImages, RetrievalDataset, folder_named, user_folder
from dmlbench.datasets.pictures import Arrays, Files, Source, Undecodable, each
from dmlbench.errors import DataError
from dmlbench.files import atomic_file, lock
from dmlbench.preprocess import Preprocess

REVISION = 1
"""Raised whenever decoding or preprocessing changes what comes out."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def cache_folder() -> Path:
    """The folder of decoded images."""
    return folder_named("DMLBENCH_CACHE") or user_folder()


@dataclass(frozen=True, eq=False)
class CachedImages:
    """Images of a source after preprocessing, decoded on first use and memory-mapped from then on."""

    source: Source
    preprocess: Preprocess

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.preprocess.shape

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._pixels[rows])).float() / 255.0

    def content(self) -> bytes:
        return hashlib.sha256(self._digests.tobytes() + self.source.crops() + self._preprocessing).digest()

    def digests(self) -> np.ndarray:
        """(N, 32) uint8: the same for two rows where they are cut from the same content in the same way."""
        if isinstance(self.source, Arrays):
            return self.source.images.digests()
        boxes = self.source.boxes if isinstance(self.source, Files) else None
        if boxes is None:
            return self._digests
        rows = zip(self._digests, boxes, strict=True)
        cut = [hashlib.sha256(digest.tobytes() + box.astype("<f8").tobytes()).digest() for digest, box in rows]
        return np.frombuffer(b"".join(cut), np.uint8).reshape(-1, 32)

    def decode(self, progress: Progress | None = None) -> None:
        """Make the cache now, if it is not there; ``progress`` hears of every image.

        Raises:
            DataError: an image cannot be decoded, files changed meanwhile, or the disk has no room.
        """
        path = self.path
        if not _is_complete(path, self._expected):
            with _alone(path):
                if not _is_complete(path, self._expected):  # another process may have made it meanwhile
                    self._build(path, progress or (lambda done, total: None))

    @cached_property
    def path(self) -> Path:
        """The file of this array."""
        key = hashlib.sha256(self.content() + self._decoder).hexdigest()
        return cache_folder() / "images" / f"{key[:32]}.npy"

    @property
    def _preprocessing(self) -> bytes:
        return json.dumps({"revision": REVISION, **self.preprocess.describe()}, sort_keys=True).encode()

    @property
    def _decoder(self) -> bytes:
        return f"Pillow {Image.__version__}, jpeg {features.version('jpg')}".encode()

    @property
    def _expected(self) -> tuple[int, int, int, int]:
        return (len(self), *self.shape)

    @cached_property
    def _state(self) -> bytes:
        """The source's state before its content was hashed."""
        return self.source.state()

    @cached_property
    def _digests(self) -> np.ndarray:
        """(N, 32) of the source, remembered on disk for as long as no file's size or time changes."""
        remembered = cache_folder() / "digests" / f"{self._state.hex()[:32]}.npy"
        if isinstance(self.source, Arrays):
            return self.source.digests()
        with contextlib.suppress(OSError, ValueError, EOFError):
            stored = np.load(remembered)
            if stored.shape == (len(self), 32) and stored.dtype == np.uint8:
                return stored
        digests = self.source.digests()
        _folder(remembered.parent)
        try:
            with atomic_file(remembered) as part, part.open("wb") as stream:
                np.save(stream, digests)
        except OSError as error:
            raise _unwritable(remembered.parent, error) from None
        return digests

    @cached_property
    def _pixels(self) -> np.ndarray:
        """(N, C, H, W) uint8, memory-mapped."""
        self.decode()
        return np.load(self.path, mmap_mode="r")

    def _build(self, path: Path, progress: Progress) -> None:
        needed, free = int(np.prod(self._expected)), shutil.disk_usage(path.parent).free
        if needed > free:
            raise DataError(
                f"decoded images need {needed / 1e9:.1f} GB under {path.parent}, where {free / 1e9:.1f} GB are free "
                "(DMLBENCH_CACHE names another folder)"
            )
        try:
            with atomic_file(path) as part:
                pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=self._expected)
                for done, (row, image) in enumerate(each(self._one, len(self)), 1):
                    pixels[row] = image
                    progress(done, len(self))
                pixels.flush()
                del pixels
                if self.source.state() != self._state:  # the hash that names the array may be that of other content
                    raise DataError("picture files changed while they were decoded: give the command again")
        except OSError as error:
            raise _unwritable(path.parent, error) from None
        except Undecodable as error:
            raise DataError(
                f"an image cannot be decoded: {error} ('dmlbench datasets verify' lists all such images)"
            ) from None

    def _one(self, row: int) -> tuple[int, np.ndarray]:
        picture = self.source.picture(row)
        try:
            return row, self.preprocess(picture)
        except ValueError as error:
            raise Undecodable(f"{self.source.called(row)}: {error}") from None


def fitted(dataset: RetrievalDataset, preprocess: Preprocess) -> RetrievalDataset:
    """A data set held in memory, its images scaled (not cut) to the size and channels of ``preprocess``."""
    if dataset.images.shape == preprocess.shape or not isinstance(dataset.images, ArrayImages):
        return dataset
    unresized = replace(preprocess, resize=None, shorter=None)
    return replace(dataset, images=CachedImages(Arrays(dataset.images), unresized))


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the file is an array of that shape, all of it on disk."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.uint8


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"the cache folder {folder} cannot be written: {error.strerror} (DMLBENCH_CACHE names another)")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, for one path.

    Where the file system has no locks two processes may both decode; each still writes its own file.
    """
    _folder(path.parent)
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(lock(path))
        except OSError as error:
            raise _unwritable(path.parent, error) from None
        if alone:
            for left in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
        yield

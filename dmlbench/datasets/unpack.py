"""Unpacking an archive that somebody else made: nothing outside the folder, no links, no bombs.

Zip and tar (plain, gzip, bzip2, xz). Every name is checked before it is used, sizes are counted as they
are written, not as the archive states them, and the folder appears only when all of it is there.
"""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from dmlbench.datasets.pictures import shown
from dmlbench.errors import DataError
from dmlbench.files import part_of

MOST_BYTES = 64 << 30
"""More than any data set that dmlbench knows."""
MOST_FILES = 2_000_000
MOST_RATIO = 200
"""Unpacked bytes for each byte of the archive, beyond the first hundred million."""
_PIECE = 1 << 20


def _safe(name: str, archive: Path) -> PurePosixPath:
    """The member's path, if it stays inside.

    Raises:
        DataError: an absolute path, a drive letter or ``..``.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts[0] if path.parts else "") or "\0" in name:
        raise DataError(f"archive {shown(archive)} is refused: member {shown(name)!r} points outside its folder")
    return path


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of every file in the archive.

    Raises:
        DataError: it is no archive, or holds a link or a device.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if (info.external_attr >> 16) & 0o170000 == 0o120000:
                    raise DataError(f"archive {shown(archive)} is refused: {shown(info.filename)!r} is a link")
                if not info.is_dir():
                    with bundle.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(archive) as bundle:
            for member in bundle:
                if member.isdir():
                    continue
                if not member.isfile():
                    kind = "a link" if member.issym() or member.islnk() else "not a plain file"
                    raise DataError(f"archive {shown(archive)} is refused: {shown(member.name)!r} is {kind}")
                opened = bundle.extractfile(member)
                assert opened is not None  # a plain file always opens
                with opened as stream:
                    yield member.name, stream


def unpack(archive: Path, folder: Path, heard: Callable[[int], None] = lambda files: None) -> None:
    """Unpack ``archive`` as ``folder``, which must not exist; whole or not at all.

    A single top folder is kept. ``heard`` is called with the number of finished files.

    Raises:
        DataError: no archive, a broken one, or one that is refused; the reason names the member.
    """
    if folder.exists():
        raise DataError(f"{shown(folder)} exists already")
    part = part_of(folder)
    packed = archive.stat().st_size if archive.is_file() else 0
    written = count = 0
    try:
        part.mkdir(parents=True)
        for name, stream in _members(archive):
            target = part / _safe(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            count += 1
            with target.open("xb") as out:
                while piece := stream.read(_PIECE):
                    written += len(piece)
                    _bounded(archive, packed, written, count)
                    out.write(piece)
            _bounded(archive, packed, written, count)
            heard(count)
        if not count:
            raise DataError(f"archive {shown(archive)} is empty")
        part.replace(folder)
    except FileExistsError:
        raise DataError(f"archive {shown(archive)} is refused: it names a file twice") from None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"archive {shown(archive)} cannot be read: {str(error) or 'truncated'}") from None
    except OSError as error:
        raise DataError(f"archive {shown(archive)} cannot be unpacked: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _bounded(archive: Path, packed: int, written: int, count: int) -> None:
    if written > MOST_BYTES or count > MOST_FILES or written > 10**8 + MOST_RATIO * packed:
        raise DataError(
            f"archive {shown(archive)} is refused: it unpacks to more than {written:,} bytes in {count:,} files"
        )

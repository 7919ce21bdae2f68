"""Files as dmlbench handles them: written whole or not at all, one writer at a time, TOML, and the first line of an error.

A file is written under a temporary name in its own folder, ``.<name>.<process id>.part``, flushed to disk and renamed,
so nobody ever reads half of one.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmlbench.errors import DataError, DmlbenchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ABANDONED = 60.0
"""Seconds after which an unfinished file of a process that is no more is deleted; writing one takes far less."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system answers that has no locks."""


def part_of(path: Path) -> Path:
    """The temporary name under which this process writes ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to: renamed to ``path`` when the block ends, deleted when the block raises.

    Raises:
        OSError: the file cannot be flushed or renamed.
    """
    part = part_of(path)
    try:
        yield part
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DataError: it cannot be written, for example because the disk is full.
    """
    try:
        with atomic_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def prepare_folder(folder: Path) -> None:
    """Make a folder for results, prove that it can be written, before any work is done, and sweep what killed writers left.

    Raises:
        DataError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = part_of(folder / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from None
    sweep(folder)
    sweep(folder / "units")


def sweep(folder: Path) -> None:
    """Delete the unfinished files in a folder whose writers are no more."""
    if os.name != "posix":  # elsewhere signal 0 is no question
        return
    for part in folder.glob(".*.part"):
        pid = part.name.split(".")[-2]
        with contextlib.suppress(OSError):
            if pid.isdigit() and time.time() - part.stat().st_mtime > ABANDONED:
                try:
                    os.kill(int(pid), 0)
                except ProcessLookupError:
                    part.unlink()


@contextlib.contextmanager
def lock(path: Path, busy: DmlbenchError | None = None) -> Iterator[bool]:
    """Keep every other process (and thread) that locks ``path``, a file or a folder, out of its block meanwhile.

    The lock goes with its process. It is a file ``.lock`` in the folder, or ``.<name>.lock`` next to the file, and is
    deleted after the block. The block gets False if the file system has no locks: then other writers are not kept out.

    Args:
        path: need not be there.
        busy: raised where another holds the lock; None waits for it.

    Raises:
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    place = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    guard = FileLock(place, timeout=-1 if busy is None else 0)
    try:
        guard.acquire()
    except Timeout:
        assert busy is not None  # only who does not wait runs out of time
        raise busy from None
    except NotImplementedError:
        yield False
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open, and deletes it with the lock
            place.unlink()
        guard.release()


def read_toml(path: Path, raised: type[DmlbenchError] = DataError) -> dict[str, Any]:
    """The table of a TOML file.

    Args:
        raised: the kind of error, for a file that cannot be read, is not UTF-8, not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        text = error.strerror or str(error)
    except ValueError as error:
        text = str(error)
    except RecursionError:
        text = "is nested too deeply"
    raise raised(f"{path} cannot be read: {text}")


def printable(text: str) -> str:
    """The text with a space in place of every character that is not to be seen: XML has none for control characters,
    terminals obey them, and marks of direction turn what follows."""
    return "".join(c if c.isprintable() else " " for c in text)


def first_line(text: object, otherwise: str = "") -> str:
    """The first line of what an error, or a text, says; where that is nothing ``otherwise``, else the name of its type."""
    return next(iter(str(text).strip().splitlines()), "") or otherwise or type(text).__name__


def described(error: BaseException) -> str:
    """The kind and the first line of an error of other people's code, ``"KeyError: 'name'"``; the kind alone if it has no text."""
    kind = type(error).__name__
    line = first_line(error.msg if isinstance(error, SyntaxError) else error, kind)
    return line if line == kind else f"{kind}: {line}"

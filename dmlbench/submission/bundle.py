"""A bundle: a zip file or a folder of a few known files, read with suspicion.

Nothing is unpacked to disk, unpickled or executed. Only known names are read, sizes are bounded before
and while reading, links and paths that leave the bundle are refused.

================================  ===================================================================
``submission.yaml``               who submits what (:class:`dmlbench.submission.record.Submission`)
``run/evaluation.json``           the result, with ``run/per_query.npz``, ``run/adversarial_sample.npz``
                                  and ``run/manifest.json`` beside it: the numbers of a run, in the least room
``weights.safetensors``           the model; may be left out where the registry's file is the same
``manifest.json``                 size and sha256 of every file above
================================  ===================================================================

A bundle is its submitter's. What the board's keepers say of it, the record of a full rerun, lies outside it:
``leaderboard/verifications/<id>.json``.
"""

import hashlib
import io
import lzma
import math
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dmlbench.errors import Problem
from dmlbench.files import first_line
from dmlbench.plain import read_json

MANIFEST = "manifest.json"
SUBMISSIONS = "submissions"
"""The folder of the board that holds the bundles, each in a folder called by its id."""
VERIFICATIONS = "verifications"
"""The folder of the board, beside ``submissions``, that holds what full reruns gave, ``<id>.json``."""
MIB = 1 << 20
LIMITS = {
    "submission.yaml": MIB // 4,
    MANIFEST: MIB // 4,
    "run/evaluation.json": 4 * MIB,
    "run/manifest.json": MIB // 4,
    "run/per_query.npz": 256 * MIB,
    "run/adversarial_sample.npz": 256 * MIB,
    "weights.safetensors": 2048 * MIB,
}
"""The files of a bundle and how large each may be."""
OPTIONAL = ("weights.safetensors",)
ARRAYS_MOST = 2048 * MIB
"""How large the arrays of one npz file may be in memory, each value at :data:`WIDEST`."""
WIDEST = 8
"""Bytes of the widest type that a value is read into, however small the one it is kept in."""
_DIMENSIONS_MOST = 8
_BROKEN: tuple[type[Exception], ...] = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError, EOFError,
    OSError, ValueError, IndexError,
)  # fmt: skip
"""What Python's zipfile raises for broken or strange archives."""


class Refused(Exception):
    """The bundle is refused; holds every :class:`Problem` found at the level where checking stopped."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


def refuse(level: int, field: str, reason: str) -> Refused:
    """For ``raise refuse(...)`` with a single problem."""
    return Refused([Problem(level, field, reason)])


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle, in memory; ``sha256`` is that of its manifest, which pins all of it."""

    name: str
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """The hash of the manifest."""
        return hashlib.sha256(self.files[MANIFEST]).hexdigest()


def read_bundle(path: Path) -> Bundle:
    """Read and check names, sizes and hashes; everything here is level 0.

    Raises:
        Refused: with all that is wrong with names and sizes, or else with hashes.
    """
    if path.is_symlink():
        raise refuse(0, str(path), "is a link")
    if path.is_dir():
        files = _from_folder(path)
    elif path.is_file():
        files = _from_zip(path)
    else:
        raise refuse(0, str(path), "does not exist")
    problems = [Problem(0, name, "is missing") for name in LIMITS if name not in files and name not in OPTIONAL]
    if problems:
        raise Refused(problems)
    bundle = Bundle(path.name, files)
    problems = list(_hash_problems(files))
    if problems:
        raise Refused(problems)
    return bundle


def _hash_problems(files: dict[str, bytes]) -> Iterator[Problem]:
    stated = manifest_of(files[MANIFEST])
    if stated is None:
        yield Problem(0, MANIFEST, 'is not {"schema_version": 1, "files": {name: {"bytes", "sha256"}}}')
        return
    for name in sorted(set(files) - set(stated) - {MANIFEST}):
        yield Problem(0, MANIFEST, f"does not list {name}")
    for name in sorted(set(stated) - set(files)):
        yield Problem(0, MANIFEST, f"lists {name!r}, which is not in the bundle")
    for name in sorted(set(stated) & set(files)):
        if stated[name][0] != len(files[name]):
            yield Problem(0, name, f"has {len(files[name])} bytes where the manifest says {stated[name][0]}")
        elif stated[name][1] != (digest := hashlib.sha256(files[name]).hexdigest()):
            yield Problem(0, name, f"has sha256 {digest[:12]}… where the manifest says {str(stated[name][1])[:12]}…")


def manifest_of(raw: bytes) -> dict[str, tuple[int, str]] | None:
    """By name: bytes and sha256; None where it is not a manifest of version 1."""
    try:
        content = read_json(raw)
        if content["schema_version"] != 1:
            return None
        return {str(k): (v["bytes"], v["sha256"]) for k, v in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def make_manifest(files: dict[str, bytes]) -> dict[str, Any]:
    """The manifest of these files."""
    return {
        "schema_version": 1,
        "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(files.items())},
    }


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """A zip file with the same bytes for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name], compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def name_problem(name: str) -> str | None:
    """What is wrong with a path in a bundle, if anything."""
    if name.startswith("/") or "\\" in name or ":" in name or "\0" in name:
        return "is an absolute path or one of another system"
    if ".." in PurePosixPath(name).parts:
        return "leaves the bundle"
    if name not in LIMITS:
        return f"is not a file of a bundle; it may hold {', '.join(LIMITS)}"
    return None


def _from_zip(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename != "run/"]
            if problems := list(_member_problems(members)):
                raise Refused(problems)
            return {m.filename: _read_member(archive, m) for m in members}
    except _BROKEN as error:
        raise refuse(0, path.name, f"is not a readable zip file: {error}") from None


def _member_problems(members: list[zipfile.ZipInfo]) -> Iterator[Problem]:
    seen: set[str] = set()
    for m in members:
        if m.filename in seen:
            yield Problem(0, m.filename, "is in the archive twice")
        seen.add(m.filename)
        if reason := name_problem(m.filename):
            yield Problem(0, m.filename, reason)
            continue
        mode = m.external_attr >> 16
        if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            yield Problem(0, m.filename, "is a link or another special file")
        if m.flag_bits & 1:
            yield Problem(0, m.filename, "is encrypted")
        if m.file_size > LIMITS[m.filename]:
            yield Problem(0, m.filename, f"claims {m.file_size} bytes, at most {LIMITS[m.filename]} are allowed")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    limit = LIMITS[member.filename]
    try:
        with archive.open(member) as stream:
            content = stream.read(limit + 1)
    except _BROKEN as error:
        raise refuse(0, member.filename, f"cannot be read from the archive: {error}") from None
    if len(content) > limit:
        raise refuse(0, member.filename, f"has more than the {limit} bytes that are allowed")
    return content


def _from_folder(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            problems.append(Problem(0, name, "is a link or another special file"))
        elif path.is_dir():
            if name != "run":
                problems.append(Problem(0, name, "is a folder; a bundle has only run/"))
        elif reason := name_problem(name):
            problems.append(Problem(0, name, reason))
        elif path.stat().st_size > LIMITS[name]:
            problems.append(Problem(0, name, f"has {path.stat().st_size} bytes, at most {LIMITS[name]} are allowed"))
        else:
            files[name] = path.read_bytes()
    if problems:
        raise Refused(problems)
    return files


def verification_of(folder: Path) -> Path:
    """Where the record of a full rerun of the bundle in ``<board>/submissions/<id>`` lies."""
    return folder.parent.parent / VERIFICATIONS / f"{folder.name}.json"


def read_arrays(raw: bytes, field: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file; shapes are checked against the bytes that are there before anything is made.

    Raises:
        Refused: not an npz file, an array of objects (a pickle), or sizes that do not fit.
    """
    arrays: dict[str, np.ndarray] = {}
    total = 0
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise refuse(0, field, f"holds {member.filename!r}, which is no array")
                if member.file_size > ARRAYS_MOST:
                    raise refuse(0, field, f"claims {member.file_size} bytes, at most {ARRAYS_MOST} are allowed")
                name = member.filename.removesuffix(".npy").replace("|", "/")
                if name in arrays:
                    raise refuse(0, field, f"holds array {name!r} twice")
                with archive.open(member) as stream:
                    arrays[name] = _array(stream.read(member.file_size + 1), f"{field} {name}")
                total += max(arrays[name].nbytes, WIDEST * arrays[name].size)
                if total > ARRAYS_MOST:
                    raise refuse(
                        0, field, f"holds {total} bytes of arrays when widened, at most {ARRAYS_MOST} are allowed"
                    )
    except _BROKEN as error:
        raise refuse(0, field, f"is not a readable npz file: {error}") from None
    return arrays


def _array(raw: bytes, field: str) -> np.ndarray:
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, TypeError, tokenize.TokenError, SyntaxError, MemoryError, RecursionError) as error:
        raise refuse(0, field, f"is not an array: {first_line(error)}") from None
    if dtype.hasobject or dtype.kind not in "fiubU":
        raise refuse(0, field, f"has type {dtype}, where numbers or plain text are expected; nothing is unpickled")
    if dtype.itemsize == 0:
        raise refuse(0, field, f"has type {dtype}, whose values take no bytes")
    if len(shape) > _DIMENSIONS_MOST or any(isinstance(n, bool) or not 0 <= n <= ARRAYS_MOST for n in shape):
        raise refuse(0, field, f"claims shape {str(shape)[:80]}, which no array here has")
    body = raw[stream.tell() :]
    size = math.prod(shape) * dtype.itemsize
    if size != len(body):
        raise refuse(0, field, f"claims shape {shape} ({size} bytes) and has {len(body)} bytes")
    return np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if fortran else "C")

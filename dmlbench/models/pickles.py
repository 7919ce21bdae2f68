"""Files of ``torch.save``, read with ``weights_only=True``: tensors and plain values, and nothing is run.

A checkpoint often holds more than tensors: class names, a date, the options of the program that wrote it.
Plain values of numpy are read. Any other type of another package is never imported: a stand-in takes its place,
which holds nothing and does nothing, so that the tensors beside it can be read. What only code that runs could
mean, such as a function of the operating system, ends the reading.

What takes more work, or claims more memory, than its bytes are worth is refused; ``tests/test_hostile_weights.py``
holds the rest to work that is linear in the bytes.
"""

import builtins
import importlib
import io
import pickletools
import re
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dmlbench.errors import DataError
from dmlbench.files import first_line

_DATA_MODULES = (
    "_codecs", "argparse", "array", "cmath", "collections", "configparser", "copyreg", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "ipaddress", "itertools", "json", "logging", "math", "numbers", "operator", "optparse",
    "pathlib", "random", "re", "string", "time", "typing", "uuid", "zoneinfo",
)  # fmt: skip
"""Of Python itself: what they define are values (or, as a logger, nothing that a number needs)."""
_DATA_BUILTINS = (
    "Ellipsis", "NotImplemented", "abs", "all", "any", "getattr", "iter", "len", "max", "min", "repr", "round", "sorted",
    "sum",
)  # fmt: skip
"""Constants and functions that a configuration names; ``getattr`` is how pickle writes a method, ``torch.relu`` too."""
_MOST_TYPES = 100
"""Types of other packages in one file."""
_MOST_STEPS = 3_000_000
"""Steps of the pickles in one file: a tensor takes about 36, a name two."""
_MOST_WORK = 10_000_000
"""Steps times readings: the file is read again for each type of another package."""
_MOST_DEEP = 1_000
"""Values that are begun and not yet ended."""
_MOST_CLAIMED = 16
"""Bytes that all tensors together may have for each byte of the file, beyond the first 64 MiB: views share bytes."""


class StandIn:
    """Takes the place of a value whose type is another package's: ``named`` is that type."""

    named = ""

    def __init__(self, *values: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _Mapping:
    def __new__(cls, *values: Any) -> Any:  # the reader fills plain dictionaries only
        return OrderedDict()


class _Sequence(list):  # type: ignore[type-arg]
    def __init__(self, *values: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        return


def _stand_in(name: str, base: type) -> type:
    return type(name, (base,), {"named": name, "__module__": "stand_in", "__qualname__": name})


_UNFIT = re.compile(r"<class 'stand_in\.([\w.]+)'>|^'([\w.]+)' object does not support item assignment")
"""Which stand-in the reader could not fill, and, as older versions of torch say it, that it is to be a mapping."""


def _numpy_types() -> list[tuple[Any, str]]:
    """numpy's arrays, scalars and every kind of element, under the names of both its generations."""
    allowed: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    try:
        multiarray = importlib.import_module("numpy._core.multiarray")
    except ImportError:
        multiarray = importlib.import_module("numpy.core.multiarray")

    def array(kind: type, *rest: Any) -> np.ndarray:
        return multiarray._reconstruct(np.ndarray, *rest)  # type: ignore[no-any-return]  # also for a record array

    records = ("numpy.record", "numpy.rec.record", "numpy.core.records.record", "numpy._core.records.record")
    allowed += [(np.record, name) for name in records]
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{package}.scalar"), (array, f"{package}._reconstruct")]
    return allowed + [(getattr(np.dtypes, name), f"numpy.dtypes.{name}") for name in np.dtypes.__all__]


def _runs_code(name: str) -> bool:
    """Whether a name that a file refers to belongs to Python itself and neither is nor makes a plain value."""
    module, _, rest = name.partition(".")
    if module == "builtins":
        return rest not in _DATA_BUILTINS and not isinstance(getattr(builtins, rest, None), type)
    return module in sys.stdlib_module_names and module not in _DATA_MODULES and name != "types.SimpleNamespace"


def torch_content(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What a file of ``torch.save`` holds, and the types in it that stand-ins replace.

    Raises:
        DataError: the file is broken, holds what would have to be run, or more than its bytes are worth.
    """
    standing: dict[str, type] = {}
    kinds: dict[str, list[type]] = {}
    steps, done = _steps(path), 0
    while True:
        done += steps
        if done > _MOST_WORK:
            raise _too_much(path, f"{len(standing)} types of other packages among {steps:,} values")
        try:
            names: list[Any] = [*_numpy_types(), *((kind, name) for name, kind in standing.items())]
            with torch.serialization.safe_globals(names), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
            _refuse_claims(path, content)
            return content, tuple(
                name for name in standing if name.partition(".")[0] not in ("builtins", *_DATA_MODULES)
            )
        except DataError:
            raise
        except Exception as error:  # a pickle, a zip or a tensor can be broken in many ways; each is told below
            text = str(error) or type(error).__name__
        if refused := re.search(r"GLOBAL ([\w.]+)", text):
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if _runs_code(name) or name in standing or len(standing) >= _MOST_TYPES:
                raise would_run(path, name) from None
            kinds[name] = [_Mapping, _Sequence]
            standing[name] = _stand_in(name, StandIn)
        elif (wrong := _UNFIT.search(text)) and kinds.get(name := wrong[1] or wrong[2]):
            standing[name] = _stand_in(name, kinds[name].pop(0 if wrong[2] or "SETITEM" in text else -1))
        else:
            raise DataError(f"weights file {path} cannot be read: {_what_it_is(path, text)}") from None


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Where the pickles of a file begin, each to be read to its end before the next is requested.

    Raises:
        DataError: the archive unpacks to more than it is long; torch.save does not compress.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            stream.seek(0)
            for _ in range(5):  # before torch 1.6: a magic number, the version, the machine, the values, the storages
                yield stream
            return
    with zipfile.ZipFile(path) as archive:
        if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
            return  # a TorchScript program, which torch refuses unread
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise _too_much(path, "an archive that unpacks to more than its own length")
        for member in archive.infolist():
            if member.filename.rpartition("/")[2] == "data.pkl":
                yield io.BytesIO(archive.read(member))


def _steps(path: Path) -> int:
    """How many steps reading a file's pickles takes, counted without doing any; a broken one ends at its fault.

    Raises:
        DataError: there are too many, or values are nested too deeply.
    """
    steps = 0
    try:
        for stream in _pickles(path):
            deep = 0
            for operation, _, _ in pickletools.genops(stream):
                steps += 1
                if operation.name == "MARK":
                    deep += 1
                elif pickletools.markobject in operation.stack_before:
                    deep -= 1
                if deep > _MOST_DEEP:
                    raise _too_much(path, f"values nested more than {_MOST_DEEP:,} deep")
                if steps > _MOST_STEPS:
                    raise _too_much(path, f"more than {_MOST_STEPS:,} values")
    except (ValueError, EOFError, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error):
        pass  # torch tells what is wrong
    return steps


def _refuse_claims(path: Path, content: Any) -> None:
    """Refuse tensors that are far larger than the file: one value that a step of 0 repeats can claim any number of bytes.

    Raises:
        DataError: they are.
    """
    claimed, most = 0, (64 << 20) + _MOST_CLAIMED * path.stat().st_size
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            claimed += value.numel() * value.element_size()
            if claimed > most:
                raise _too_much(path, f"tensors of more than {most:,} bytes, the last of shape {tuple(value.shape)}")
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _too_much(path: Path, what: str) -> DataError:
    return DataError(
        f"weights file {path} holds {what}, more than its {path.stat().st_size:,} bytes are worth: it is not read; "
        "save the weights alone: torch.save(model.state_dict(), ...)"
    )


def would_run(path: Path, name: str) -> DataError:
    """The error for a file whose values can only be had by running code."""
    return DataError(
        f"weights file {path} holds {name}, which would run code when it is loaded; "
        "save the weights alone: torch.save(model.state_dict(), ...)"
    )


_MAGIC = {
    b"\x89HDF": "an HDF5 file (Keras?), not one of torch.save",
    b"\x93NUMPY": "an array of numpy, not a file of torch.save",
    b"GGUF": "a GGUF file, not one of torch.save",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"version https://git-lfs": "the pointer of Git LFS to a file that was not fetched: git lfs pull",
}


def _what_it_is(path: Path, text: str) -> str:
    """What a file that torch cannot read is, as far as its content tells."""
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        return "it is empty"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {what}"
    if head[:1] == b"\x08" and re.search(rb"pytorch|onnx|\x12.{0,40}tf2onnx", head[:64]):
        return "it is an ONNX graph, not weights; its network as a Python function is --model python:FILE.py:FUNCTION"
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return "truncated: a zip archive without its end"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(("constants.pkl", "/version")) and "/code/" in "".join(names) for name in names):
            return (
                "it is a TorchScript program, not weights; torch.save(torch.jit.load(FILE).state_dict(), "
                "'weights.pth') writes the weights, where you trust FILE"
            )
        if not any(name.endswith("data.pkl") for name in names):
            return f"it is a zip archive that torch.save did not write ({', '.join(names[:3]) or 'empty'})"
        return _first(text)
    if head[:1] == b"\x80" and (head[1:2] > b"\x02" or "magic number" in text):
        return "it is a file of pickle, not of torch.save; where you trust it, torch.save(pickle.load(...), ...) writes one"
    if head.startswith(b"\x80") and ("EOF" in text or "ran out" in text.lower() or "unexpected" in text.lower()):
        return "truncated: it ends within a value"
    if head.startswith(b"\x80"):
        return _first(text)
    return "it is not a file of torch.save, nor of safetensors"


def _first(text: str) -> str:
    """What torch says is wrong, without its advice, which does not fit here."""
    match = re.search(r"WeightsUnpickler error:\s*([^\n]*)", text)
    return match[1].strip() if match else first_line(text)

"""Weights files: reading them without running anything they hold, and fitting them to a network.

safetensors, and what ``torch.save`` writes: a state dictionary, or one inside a larger dictionary (a
training checkpoint, PyTorch Lightning's ``.ckpt``). Files of torch are read with ``weights_only=True``; the
few harmless types that Lightning and numpy leave in checkpoints are allowed by name, Lightning's as
stand-ins that hold values and do nothing.
"""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmlbench.errors import DataError, UsageError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl")
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module")
"""Where training programs keep the state dictionary inside their checkpoints, in the order looked at."""
PREFIXES = ("module.", "backbone.", "model.", "net.", "network.", "encoder.", "_orig_mod.", "extractor.", "trunk.")
"""What wrappers put before a network's own names."""


class _Kept:
    """Stands in for a type of another package: holds what it is given and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values: Any = values

    def __setstate__(self, state: Any) -> None:
        self.values = state


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_DICTIONARIES = [f"{p}.utilities.{m}.AttributeDict" for p in _LIGHTNING for m in ("parsing", "data")]
_STAND_INS = [
    f"{package}.callbacks.{name}"
    for package in _LIGHTNING
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "checkpoint.ModelCheckpoint",
        "early_stopping.EarlyStopping",
        "lr_monitor.LearningRateMonitor",
        "progress.ProgressBar",
        "progress.base.ProgressBarBase",
        "progress.tqdm_progress.TQDMProgressBar",
    )
]
_STAND_INS += ["argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"]


def _numpy_types() -> list[tuple[Any, str]]:
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    allowed: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{package}.scalar"), (multiarray._reconstruct, f"{package}._reconstruct")]
    kinds = ("Float64", "Float32", "Float16", "Int64", "Int32", "Int16", "Int8", "UInt8", "UInt32", "UInt64", "Bool")
    return allowed + [(getattr(np.dtypes, f"{k}DType"), f"numpy.dtypes.{k}DType") for k in kinds]


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        path: the file.
        format: "safetensors", "torch" or "lightning".
        content: everything in it, by top-level key; for a bare state dictionary the same as ``tensors``.
        key: the top-level key (dotted for nested ones) of the state dictionary, "" for the top itself.
        tensors: the state dictionary, names as in the file.
    """

    path: Path
    format: str
    content: Mapping[str, Any] = field(repr=False)
    key: str
    tensors: Mapping[str, Tensor] = field(repr=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights file {path} is not a readable safetensors file: {error}") from None


def write_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """Write a network's tensors as safetensors, whole or not at all.

    Raises:
        DataError: it cannot be written, for example because the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, str(part), metadata)
        part.replace(path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error}") from None


def _torch_content(path: Path) -> Any:
    allowed: list[Any] = [*_numpy_types(), *((_Kept, name) for name in _STAND_INS)]
    allowed += [(OrderedDict, name) for name in _DICTIONARIES]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle, a zip or a tensor can be broken in many ways; each means this
        text = str(error)
        if refused := re.search(r"GLOBAL ([\w.]+)", text):
            raise DataError(
                f"weights file {path} holds {refused[1]}, which would run code when it is loaded; "
                "save the weights alone: torch.save(model.state_dict(), ...)"
            ) from None
        if "TorchScript" in text:
            raise DataError(f"weights file {path} is a TorchScript program, not weights") from None
        raise DataError(f"weights file {path} cannot be read: truncated, or not a file of torch.save") from None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _tensors_in(value: Any) -> dict[str, Tensor]:
    return {str(k): v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}


def read_file(path: Path, key: str | None = None) -> WeightsFile:
    """Read a weights file of any supported format; nothing in it is run.

    Args:
        path: the file.
        key: where the state dictionary is, e.g. "model" or "nested.model"; by default the first of :data:`KEYS`.

    Raises:
        DataError: missing, broken, or holding what would have to be run.
        UsageError: no state dictionary under ``key``, or none found; the keys there are are named.
    """
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist")
    with path.open("rb") as stream:
        head = stream.read(512)
    if head.lstrip().startswith(b"<"):
        raise DataError(f"weights file {path} is a web page, not weights: the download asked for a confirmation?")
    if path.suffix == ".safetensors":
        tensors = read_weights(path)
        return WeightsFile(path, "safetensors", tensors, "", tensors)
    content = _torch_content(path)
    if not isinstance(content, Mapping):
        raise DataError(f"weights file {path} holds a {type(content).__name__}, not a dictionary of tensors")
    content = {str(k): v for k, v in content.items()}
    kind = "lightning" if "pytorch-lightning_version" in content else "torch"
    if key is not None:
        found: Any = content
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not _tensors_in(found):
            raise UsageError(f"--checkpoint-key {key!r}: no tensors there in {path}; it has {', '.join(content)}")
        return WeightsFile(path, kind, content, key, _tensors_in(found))
    if _is_state(content):
        return WeightsFile(path, kind, content, "", _tensors_in(content))
    for name in KEYS:
        if _tensors_in(content.get(name)):
            return WeightsFile(path, kind, content, name, _tensors_in(content[name]))
    if _tensors_in(content):
        return WeightsFile(path, kind, content, "", _tensors_in(content))
    raise UsageError(f"no weights found in {path}: name their place with --checkpoint-key; it has {', '.join(content)}")


def strip(tensors: Mapping[str, Tensor], own: Iterable[str]) -> tuple[str, dict[str, Tensor]]:
    """The prefix under which ``tensors`` fit the names ``own`` best, and those below it without it.

    Wrappers may be nested (``module.model.``). Without any fit the prefix is "".
    """
    names = set(own)
    prefixes, fresh = {""}, {""}
    while fresh:
        fresh = {p + q for p in fresh for q in PREFIXES if any(k.startswith(p + q) for k in tensors)} - prefixes
        prefixes |= fresh
    fits = {p: sum(k.startswith(p) and k[len(p) :] in names for k in tensors) for p in prefixes}
    best = max(sorted(fits, key=len), key=lambda p: fits[p])
    return best, {k[len(best) :]: v for k, v in tensors.items() if k.startswith(best)}


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load ``tensors`` into ``network``, strictly; what does not fit is listed by name."""
    own = network.state_dict()
    missing = sorted(set(own) - set(tensors))
    extra = sorted(set(tensors) - set(own))
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in tensors and own[k].shape != tensors[k].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{what} {listed(names)}"
            for what, names in (("missing", missing), ("unexpected", extra), ("other shape:", shapes))
            if names
        ]
        raise DataError(f"{where} does not fit the architecture: {'; '.join(parts)}")
    ready = OrderedDict(tensors)
    ready._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]  # some networks ask for its version
    network.load_state_dict(ready)


def fill_from(network: nn.Module, file: WeightsFile) -> list[str]:
    """Load a file into a network, whatever prefix its names carry; sentences about what was done.

    Every tensor of the network must be in the file. What the file has beside them is left out and
    named, if it belongs to no part of the network (the centres of a loss, a head that was left out).

    Raises:
        DataError: something of the network is missing, of another shape, or the file has more of a part
            than the network has; each is listed by name.
    """
    own = network.state_dict()
    prefix, tensors = strip(file.tensors, own)
    parts = {k.partition(".")[0] for k in own}
    outside = [k for k in file.tensors if not k.startswith(prefix)]
    outside += [prefix + k for k in tensors if k not in own and k.partition(".")[0] not in parts]
    inside = {k: v for k, v in tensors.items() if prefix + k not in set(outside)}
    inside |= {k: v for k, v in own.items() if k.endswith("num_batches_tracked") and k not in inside}
    fill(network, inside, f"weights file {file.path}")
    notes = [f"{file.path.name}: {len(own)} tensors loaded" + (f" from {file.key!r}" if file.key else "")]
    if prefix:
        notes[0] += f", prefix {prefix!r} removed"
    if outside:
        notes.append(f"{file.path.name}: not used: {listed(outside)}")
    return notes

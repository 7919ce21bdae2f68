"""What people keep weights in, read by content and not by name: a file, or a folder of files.

safetensors; what ``torch.save`` writes (see :mod:`dmlbench.models.pickles`): a state dictionary, or one inside a
larger dictionary (a training checkpoint, PyTorch Lightning's ``.ckpt``); a folder of the Hugging Face hub; shards
with their index. Nothing that a file holds is run.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmlbench.checkpoints import sha256_of
from dmlbench.errors import DataError, UsageError
from dmlbench.models.pickles import StandIn, torch_content, would_run
from dmlbench.plain import read_json

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".index.json")
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module")
"""Where training programs keep the state dictionary inside their checkpoints, in the order looked at."""
AVERAGED = re.compile(r"(^|[._])(ema|teacher|swa|averaged?|shadow)(?=[._]|$)", re.IGNORECASE)
"""What names an average over training steps of the same weights, which timm takes where there is one."""
OF_A_LOSS = ("criterion", "loss", "optimizer", "scheduler", "scaler", "proxies", "proxy", "centers", "centres")
"""Other state dictionaries in training checkpoints, which are no part of the network at test time."""
_UNSHARDED = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""The weights in a folder of the hub."""
_INDEX = ".index.json"


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a weights file, or a folder of them, holds.

    Attributes:
        path: as it was named.
        format: "safetensors", "torch" or "lightning".
        content: everything in it, by top-level key; for a bare state dictionary the same as ``tensors``.
        key: the top-level key (dotted for nested ones) of the state dictionary, "" for the top itself.
        tensors: the state dictionary, names as in the file.
        parts: the files that were read.
        further: further state dictionaries in it, which are neither a copy of this one nor a loss's: names with their key.
        notes: sentences about what was chosen or passed over.
        config: the hub's ``config.json`` in the same folder; beside open_clip's weights its ``open_clip_config.json``.
    """

    path: Path
    format: str
    content: Mapping[str, Any] = field(repr=False)
    key: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    parts: tuple[Path, ...] = ()
    further: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """What notes call it."""
        return self.path.name

    @property
    def sha256(self) -> str:
        """Of the file; of several, the hash of their hashes in order."""
        hashes = [sha256_of(part) for part in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_weights(path: Path) -> bool:
    """Whether a path names weights: a file, a name that ends like one, or a folder that holds some."""
    return path.is_file() or str(path).endswith(SUFFIXES) or (path.is_dir() and _in_folder(path) is not None)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        DataError: it is broken; "truncated" where it ends before what it lists.
    """
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        text = "truncated" if _cut_off(path) else str(error)
        raise DataError(f"weights file {path} is not a readable safetensors file: {text}") from None


def _cut_off(path: Path) -> bool:
    """Whether a safetensors file ends before the last of the tensors that its head lists."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if path.stat().st_size < 8 + size:
            return True
        try:
            listed = read_json(stream.read(size))
            ends = [entry["data_offsets"][1] for name, entry in listed.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return path.stat().st_size < 8 + size + max(ends, default=0)


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By content: 8 bytes that count those of the JSON that follows."""
    size = int.from_bytes(head[:8], "little")
    return (head[8:9] == b"{" and size <= path.stat().st_size) or path.suffix.lower() == ".safetensors"


def read_file(path: Path, key: str | None = None) -> WeightsFile:
    """Read weights in any form that is understood; nothing in them is run.

    Args:
        path: the file or folder.
        key: where the state dictionary is, e.g. "model" or "nested.model"; by default an average over training
            steps where there is a whole one, else the first of :data:`KEYS`, else the only one.

    Raises:
        DataError: missing, broken, or holding what would have to be run.
        UsageError: no state dictionary under ``key``, or none at all; it names the keys that there are.
    """
    if path.is_dir():
        inside = _in_folder(path)
        if inside is None:
            raise DataError(f"weights file {path} {_what_folder(path)}")
        return replace(read_file(inside, key), path=path, config=_config(inside))
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist")
    config = _config(path) if path.name.removesuffix(_INDEX) in _UNSHARDED else {}
    return replace(_read_one(path, key), config=config if {"architecture", "preprocess_cfg"} & config.keys() else {})


def _read_one(path: Path, key: str | None) -> WeightsFile:
    """:func:`read_file` of a file that exists."""
    if path.name.endswith(_INDEX):
        return _sharded(path, key)
    with path.open("rb") as stream:
        head = stream.read(512)
    if head.lstrip().startswith(b"<"):
        raise DataError(f"weights file {path} is a web page, not weights: the download asked for a confirmation?")
    if _is_safetensors(path, head):
        tensors = read_weights(path)
        return _chosen(path, "safetensors", tensors, key, (path,))
    content, stood_in = torch_content(path)
    if isinstance(content, StandIn):
        raise would_run(path, content.named)
    if not isinstance(content, Mapping):
        raise DataError(f"weights file {path} holds a {type(content).__name__}, not a dictionary of tensors")
    content = {str(k): v for k, v in content.items()}
    kind = "lightning" if "pytorch-lightning_version" in content else "torch"
    chosen = _chosen(path, kind, content, key, (path,))
    if stood_in:
        more = f" and {len(stood_in) - 2} more" if len(stood_in) > 2 else ""
        note = f"{path.name}: values of other packages were passed over: {', '.join(stood_in[:2])}{more}"
        chosen = replace(chosen, notes=(*chosen.notes, note))
    return chosen


def _in_folder(folder: Path) -> Path | None:
    """The weights in a folder as the hub lays it out; None where there are none, or several."""
    for name in (*(n + _INDEX for n in _UNSHARDED), *_UNSHARDED):
        if (folder / name).is_file():
            return folder / name
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.lower().endswith(SUFFIXES[:-1])]
    return files[0] if len(files) == 1 and not (folder / "checkpoint.json").exists() else None


def require_run(folder: Path) -> None:
    """Refuse a folder that neither holds weights nor is a finished run of ``dmlbench train``, and say what it is.

    Raises:
        DataError: it has no ``checkpoint.json``.
    """
    if not (folder / "checkpoint.json").is_file():
        raise DataError(
            f"{folder} has no checkpoint.json, so it is not a finished training run; it {_what_folder(folder)}"
        )


def _what_folder(folder: Path) -> str:
    """What a folder without readable weights is."""
    below = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())[:1000]
    if any(str(p).endswith("_model_states.pt") for p in below):
        one = [p for p in below if str(p).endswith("_model_states.pt")]
        alone = f"; {folder / one[0]} is its only part" if len(one) == 1 else ""
        return f"is a checkpoint of DeepSpeed, in parts: its zero_to_fp32.py joins them into one file{alone}"
    if any(p.suffix == ".distcp" for p in below):
        return (
            "is a distributed checkpoint of torch, in parts: torch.distributed.checkpoint.format_utils "
            "(dcp_to_torch) joins them into one file"
        )
    weights = [str(p) for p in below if p.name.lower().endswith(SUFFIXES)]
    if weights:
        return f"is a folder with several files of weights: name one of {', '.join(weights[:4])}"
    return "is a folder without weights"


def _config(weights: Path) -> dict[str, Any]:
    """What lies beside weights of the hub, which may be there in the form of several programs."""
    path = weights.with_name("open_clip_config.json" if weights.name.startswith("open_clip") else "config.json")
    if not path.is_file():
        return {}
    try:
        config = read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _sharded(path: Path, key: str | None) -> WeightsFile:
    """The shards that an index file lists, which lie in its folder."""
    try:
        placed = read_json(path.read_bytes())["weight_map"]
        names = sorted({str(name) for name in placed.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is not an index of weights: it has no weight_map from tensors to files") from None
    if not names or any(Path(name).name != name or name.endswith(_INDEX) for name in names):
        raise DataError(f"{path}: its files are to lie beside it: {', '.join(names[:3]) or 'none is named'}")
    tensors: dict[str, Tensor] = {}
    kind = "safetensors"
    for name in names:
        if not (path.parent / name).is_file():
            raise DataError(f"weights file {path.parent / name} does not exist: {path.name} lists it")
        part = read_file(path.parent / name)
        tensors |= part.tensors
        kind = part.format
    if missing := sorted(set(placed) - set(tensors)):
        raise DataError(f"{path.parent}: its files lack {listed(missing)}, which {path.name} lists")
    return _chosen(path, kind, tensors, key, tuple(path.parent / name for name in names))


def _tensors_in(value: Any) -> dict[str, Tensor]:
    return {str(k): v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}


def _is_state(value: Any) -> bool:
    """Tensors alone, by name."""
    return isinstance(value, Mapping) and bool(value) and len(_tensors_in(value)) == len(value)


def _chosen(path: Path, kind: str, content: Mapping[str, Any], key: str | None, parts: tuple[Path, ...]) -> WeightsFile:
    """The state dictionary in a file's content."""
    states = dict(_states(content))
    if key is not None:
        state: Any = content
        for part in key.split("."):
            state = state.get(part) if isinstance(state, Mapping) else None
        if not (held := _tensors_in(state)):
            raise UsageError(f"--checkpoint-key {key!r}: no tensors there in {path}; it has {listed(content, 8)}")
        above = key.removesuffix(part)
        layers = {name: s for name, s in states.items() if all(t.dim() < 3 for t in s.tensors.values())}
        return WeightsFile(path, kind, content, key, held, parts, _beside(layers, key, _State(held, above=above)))
    top = _State(_tensors_in(content))
    if kind == "safetensors":
        return WeightsFile(path, kind, content, "", top.tensors, parts)
    plain = next((name for name in KEYS if name in states), None)
    if plain is None and len(top.tensors) > max((len(s.tensors) for s in states.values() if s.pure), default=0):
        return WeightsFile(path, kind, content, "", top.tensors, parts, _beside(states, "", top))
    plain = plain or next((name for name in states if name.rpartition(".")[2] in KEYS), None)
    others = [name for name, held in states.items() if name != plain and held.pure and not _of_a_loss(name)]
    right_in = [name for name in others if name in content] or others
    averages = [name for name in others if AVERAGED.search(name)]
    first = plain or next((few[0] for few in (right_in, averages) if len(few) == 1), None)
    if first is None:
        holds = next((v.named for v in content.values() if isinstance(v, StandIn)), None)
        if holds and not others:
            raise would_run(path, holds)
        raise UsageError(
            f"no weights found in {path}: name their place with --checkpoint-key; "
            f"it has {listed(others or content, 8) or 'nothing'}"
        )
    names = states[first].names
    copies = [name for name in others if name != first and names <= states[name].names]
    averaged = next((name for name in (first, *copies) if name in averages), None)
    chosen = averaged or first
    raw = next((n for n in (first, *others) if n not in averages and states[n].names <= states[chosen].names), None)
    some = [name for name in averages if name not in (first, *copies) and states[name].names <= names]
    further = _beside({name: s for name, s in states.items() if name not in (first, *copies)}, first, states[first])
    notes = []
    if averaged and raw:
        notes = [
            f"{path.name}: the average over training steps is taken ({averaged}), as timm does; "
            f"--checkpoint-key {raw} takes the last step's weights"
        ]
    elif again := [*copies, *some]:
        which = "the" if copies else "some of the"
        notes = [f"{path.name}: {which} same layers stand under {listed(again)} too; --checkpoint-key chooses them"]
    return WeightsFile(path, kind, content, chosen, states[chosen].tensors, parts, further, tuple(notes))


@dataclass(frozen=True, eq=False)
class _State:
    """A mapping with tensors: those by name; ``pure`` if it holds nothing else; ``above``, the place that it lies in."""

    tensors: Mapping[str, Tensor]
    pure: bool = True
    above: str = ""

    @property
    def names(self) -> set[tuple[str, torch.Size]]:
        """Names and shapes of its tensors, by which copies of a network are known."""
        return {(_bare(k), t.shape) for k, t in self.tensors.items()}


def _states(content: Mapping[Any, Any], above: str = "", depth: int = 3) -> Iterator[tuple[str, _State]]:
    """The state dictionaries in a file's content, by their dotted place; none within another."""
    for name, value in content.items():
        if not isinstance(value, Mapping):
            continue
        if held := _tensors_in(value):
            yield f"{above}{name}", _State(held, _is_state(value), above)
        elif depth > 1 and not _of_a_loss(str(name)):
            yield from _states(value, f"{above}{name}.", depth - 1)


def _beside(states: Mapping[str, _State], chosen: str, state: _State) -> dict[str, Tensor]:
    """The tensors that stand beside the chosen ``state`` dictionary and are neither copies of its own nor a loss's."""
    return {
        f"{name}.{k}": tensor
        for name, held in states.items()
        if name != chosen and held.pure and not _of_a_loss(name) and not held.names <= state.names
        and (held.above in ("", state.above) or AVERAGED.search(name))
        for k, tensor in held.tensors.items()
    }  # fmt: skip


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _of_a_loss(name: str) -> bool:
    return any(word in name.lower() for word in OF_A_LOSS)


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more

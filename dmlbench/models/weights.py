"""A network's weights: written as safetensors, and loaded strictly from tensors or from a file of any layout."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dmlbench.errors import DataError
from dmlbench.files import atomic_file
from dmlbench.models.files import WeightsFile, listed, read_file, read_weights
from dmlbench.models.layouts import Match, among, left_out, refuse_unknown, strip, unknown

__all__ = ["WeightsFile", "fill", "fill_from", "listed", "read_file", "read_weights", "strip", "write_weights"]


def write_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None, half: bool = False) -> None:
    """Write a network's tensors as safetensors, whole or not at all.

    Args:
        half: floating-point numbers as float16.

    Raises:
        DataError: it cannot be written, for example because the disk is full; a number is too large for float16.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if half:
        rounded = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        if large := [k for k, v in rounded.items() if bool((v.isinf() & ~tensors[k].isinf()).any())]:
            raise DataError(f"{path} cannot be written in float16: {listed(large)} holds numbers above 65504")
        tensors = rounded
    try:
        with atomic_file(path) as part:
            save_file(tensors, str(part), metadata)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be written: {error}") from None


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load ``tensors`` into ``network``, strictly; what does not fit is listed by name."""
    state = network.state_dict()
    missing = sorted(set(state) - set(tensors))
    extra = sorted(set(tensors) - set(state))
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(state[k].shape)}"
        for k in state
        if k in tensors and state[k].shape != tensors[k].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{what} {listed(names)}"
            for what, names in (("missing", missing), ("unexpected", extra), ("other shape:", shapes))
            if names
        ]
        raise DataError(f"{where} does not fit the architecture: {'; '.join(parts)}")
    if coded := [k for k, v in tensors.items() if state[k].is_floating_point() and not _plain_numbers(v)]:
        kinds = sorted(
            {
                str(t.dtype if t.layout == torch.strided else t.layout)[6:]
                for t in map(tensors.get, coded)
                if t is not None
            }
        )
        raise DataError(
            f"{where} holds weights as {', '.join(kinds)}, not as plain numbers: {listed(coded)}; save them as float32 "
            "(quantised ones by dequantize(), sparse ones by to_dense())"
        )
    ready = OrderedDict(tensors)
    ready._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]  # some networks ask for its version
    network.load_state_dict(ready)


def _plain_numbers(tensor: Tensor) -> bool:
    """Are its values the weights: real, dense, and no integers that a scale turns into numbers?"""
    return tensor.is_floating_point() and tensor.layout == torch.strided


def fill_from(
    network: nn.Module,
    file: WeightsFile,
    matched: Match,
    architecture: str,
    without: Sequence[str] | None = (),
    used: str | None = None,
    features: bool = False,
) -> list[str]:
    """Load the tensors that :func:`~dmlbench.models.layouts.match` recognised into a network; sentences about what was done.

    Args:
        network: filled in place.
        file: what was read.
        matched: its tensors under the network's names.
        architecture: what errors call the network.
        without: layers of the file that are left out on purpose; None for whatever is left.
        used: the layer of the file that is put after the network.
        features: whether layers after the network's features are left out on purpose.

    Raises:
        DataError: something of the network is missing, of another shape, or the file has more of a part
            than the network has; each is listed by name.
        UsageError: the file has trained layers that the network lacks and that ``without`` does not name.
    """
    state = network.state_dict()
    left = left_out(file, matched, network)
    inside = {k: v for k, v in matched.tensors.items() if matched.prefix + k not in left}
    inside |= {k: v for k, v in state.items() if k.endswith("num_batches_tracked") and k not in inside}
    fill(network, inside, f"weights file {file.path}")
    if without is not None:
        stray = list(unknown(left, matched, network, without, features))
        refuse_unknown(file, stray, left, architecture)
    notes = [f"{file.name}: {len(state)} tensors loaded" + (f" from {file.key!r}" if file.key else "")]
    if matched.prefix:
        notes[0] += f", prefix {matched.prefix!r} removed"
    if unused := [name for name in left if used is None or not among(name, (used,), "")]:
        notes.append(f"{file.name}: not used: {listed(unused)}")
    if matched.copy is not None:
        notes.append(f"{file.name}: of two copies, {matched.copy!r} is passed over; --checkpoint-prefix chooses it")
    return [*notes, *file.notes]

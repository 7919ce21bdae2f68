"""Architectures, and from a checkpoint, a file or a module to an :class:`Embedder`.

Small nets of our own for small images; other packages' networks by prefix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmlbench.checkpoints import Checkpoint, checkpoint, sha256_of, weights_path
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.registry import Registry


def smallcnn(channels: int = 1, width: int = 16, embed_dim: int = 64, size: int = 8) -> nn.Module:
    """Three 3x3 convolutions (strides 1, 2, 2) and a linear layer, for 8x8 images."""
    side = (size + 3) // 4
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * width * side * side, embed_dim),
    )


def conv3(channels: int = 1, width: int = 32, embed_dim: int = 128, size: int = 28) -> nn.Module:
    """Three 3x3 convolutions of stride 2 and a linear layer, for 28x28 images."""
    side = (size + 7) // 8
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * width * side * side, embed_dim),
    )


def c2f2(channels: int = 1, embed_dim: int = 512) -> nn.Module:
    """The field's C2F2 at 28x28: two 5x5 convolutions with max-pooling, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 1024),
        nn.ReLU(),
        nn.Linear(1024, embed_dim),
    )


class Ensemble(nn.Module):
    """Several networks as one: their L2-normalised embeddings side by side, divided by √members.

    So the squared distance of two images is the mean of the members' squared distances. (The papers
    leave open how an ensemble's embeddings are joined; members learn spaces of their own, whose axes
    do not correspond, so an average of coordinates would mean nothing.)
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        parts = [F.normalize(member(images), dim=1) for member in self.members]
        return torch.cat(parts, 1) / len(parts) ** 0.5


def ensemble(member: str = "conv3", members: int = 3, **kwargs: Any) -> nn.Module:
    """``members`` networks of the architecture ``member``; the other arguments are theirs."""
    return Ensemble([ARCHITECTURES[member](**kwargs) for _ in range(members)])


ARCHITECTURES: Registry[Callable[..., nn.Module]] = Registry(
    "architecture", {"smallcnn": smallcnn, "conv3": conv3, "c2f2": c2f2, "ensemble": ensemble}
)


def probe_images(shape: tuple[int, int, int], count: int = 4) -> Tensor:
    """(count, C, H, W): the fixed input of a checkpoint's probe, smooth waves in [0, 1]."""
    c, h, w = shape
    y = torch.linspace(0, 1, h)[None, None, :, None]
    x = torch.linspace(0, 1, w)[None, None, None, :]
    phase = torch.arange(count * c).view(count, c, 1, 1) * 0.7
    return 0.5 + 0.5 * torch.sin(6.2831853 * (x + 2 * y) + phase)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights file {path} is not a readable safetensors file: {error}") from None


def write_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """Write a network's tensors as safetensors, whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, str(part), metadata)
    part.replace(path)


def fill(network: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
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
            f"{what} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unexpected", extra), ("other shape:", shapes))
            if names
        ]
        raise DataError(f"{where} does not fit the architecture: {'; '.join(parts)}")
    network.load_state_dict(tensors)


def space_of(entry: Checkpoint) -> str:
    """The letter of the checkpoint's embedding space."""
    if entry.embedding.metric == "cosine":
        return "C"
    return "N" if entry.embedding.normalized else "E"


def build(entry: Checkpoint, name: str) -> Embedder:
    """The untrained :class:`Embedder` that a checkpoint describes."""
    network = ARCHITECTURES[entry.arch.builder](**entry.arch.kwargs)
    shape = (entry.input.channels, entry.input.size, entry.input.size)
    return Embedder(
        network,
        shape,
        mean=entry.normalize.mean,
        std=entry.normalize.std,
        distance=DISTANCES[space_of(entry)],
        name=name,
    )


def check_probe(embedder: Embedder, entry: Checkpoint, name: str) -> None:
    """Refuse a model whose embedding of the fixed input is not the registered one."""
    if entry.probe is None:
        return
    with torch.no_grad():
        found = embedder.eval()(probe_images(embedder.input_shape))[0, : len(entry.probe.embedding)]
    expected = torch.tensor(entry.probe.embedding)
    gap = float((found - expected).abs().max())
    if not gap <= entry.probe.atol:
        raise DataError(
            f"model {name!r} gives another embedding for the probe input than registered "
            f"(off by {gap:.2g}, allowed {entry.probe.atol:.2g}): wrong preprocessing or weights"
        )


def load_model(model: str | Path | nn.Module, **kwargs: Any) -> Embedder:
    """A ready :class:`Embedder` from a registry id or a module.

    Args:
        model: an id of checkpoints.json, or an ``nn.Module`` from images in [0, 1] to (b, d), which
            needs ``input_shape=(C, H, W)`` and takes the other arguments of :class:`Embedder`.

    Raises:
        UsageError: unknown id (exit code 2).
        DataError: the weights are missing, truncated, changed, or of another architecture (4).
    """
    if isinstance(model, Embedder):
        return model
    if isinstance(model, nn.Module):
        if "input_shape" not in kwargs:
            raise UsageError("a plain nn.Module needs input_shape=(channels, height, width)")
        return Embedder(model, **kwargs)
    name = str(model)
    entry = checkpoint(name)
    embedder = build(entry, name)
    path = weights_path(name, entry)
    fill(embedder.network, read_weights(path), f"weights file {path}")
    embedder.eval()
    embedder.card, embedder.weights_sha256 = entry, sha256_of(path)
    check_probe(embedder, entry, name)
    return embedder


def parameter_count(network: nn.Module) -> int:
    """How many numbers are learnt."""
    return int(np.sum([p.numel() for p in network.parameters()]))

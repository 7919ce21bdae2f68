"""Networks by name: small nets of our own, and timm's and torchvision's with a head of any width.

A builder is a name of :data:`ARCHITECTURES`, or ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:NAME``.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmlbench.errors import DataError, UsageError
from dmlbench.registry import Registry, suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEADS = ("fc", "classifier", "head", "heads", "last_linear")
"""Where networks keep their last layer."""
_C2F2_SIZE = 28
"""The images of networks that do not take a size."""


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

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        parts = [F.normalize(member(images), dim=1) for member in self.members]
        return torch.cat(parts, 1) / len(parts) ** 0.5


def ensemble(member: str = "conv3", members: int = 3, **kwargs: Any) -> nn.Module:
    """``members`` networks of the architecture ``member``; the other arguments are theirs."""
    return Ensemble([ARCHITECTURES[member](**kwargs) for _ in range(members)])


@dataclass(frozen=True, eq=False)
class Built:
    """A network and what its maker says of the images it wants.

    Attributes:
        network: the module.
        input_shape: (C, H, W) it was made for, None where nothing is said.
        mean, std: per channel, None for none.
        interpolation: how its maker resizes pictures.
        notes: sentences for the user.
    """

    network: nn.Module
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"
    notes: tuple[str, ...] = ()


def head_of(network: nn.Module) -> str | None:
    """The name of the module that holds a network's last layer."""
    return next((name for name in HEADS if isinstance(getattr(network, name, None), nn.Module)), None)


def _last_linear(module: nn.Module) -> tuple[str, nn.Linear] | None:
    """Name (below ``module``, "" for itself) and layer of the last linear layer."""
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return found[-1] if found else None


def with_head(network: nn.Module, embed_dim: int, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network with its last linear layer giving ``embed_dim`` values, or left out where that is 0.

    Where ``tensors`` hold the head as one linear layer (as RobRank's MNASNet does), the whole head
    becomes one.

    Raises:
        UsageError: the network has no last layer that we know.
    """
    if callable(reset := getattr(network, "reset_classifier", None)):  # timm's own way, which keeps the pooling
        reset(embed_dim)
        return network
    name = head_of(network)
    last = _last_linear(getattr(network, name)) if name else None
    if name is None or last is None:
        raise UsageError(f"a {type(network).__name__} has no last layer to change: leave --embed-dim out")
    inner, layer = last
    if embed_dim == 0 and inner == "":
        setattr(network, name, nn.Identity())
    elif embed_dim == 0:
        _replace(getattr(network, name), inner, nn.Identity())
    elif inner == "" or f"{name}.weight" in (tensors or {}):
        first = next(m for m in getattr(network, name).modules() if isinstance(m, nn.Linear))
        setattr(network, name, nn.Linear(first.in_features, embed_dim))
    else:
        _replace(getattr(network, name), inner, nn.Linear(layer.in_features, embed_dim))
    return network


def _replace(head: nn.Module, inner: str, layer: nn.Module) -> None:
    """Put ``layer`` at the dotted name ``inner`` below ``head``."""
    above, _, last = inner.rpartition(".")
    setattr(head.get_submodule(above), last, layer)


def head_width(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """How wide the head is in a file's tensors (already without prefix); None where they hold none.

    The width is that of the last two-dimensional weight under the head's name.
    """
    name = head_of(network)
    widths = [t.shape[0] for k, t in tensors.items() if name and k.startswith(f"{name}.") and t.dim() == 2]
    return int(widths[-1]) if widths else None


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Made from one fixed seed, so that an untrained network is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _first_line(error: Exception) -> str:
    """What an error of another package is and says, in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def _timm(name: str, embed_dim: int | None, pretrained: bool, kwargs: Mapping[str, Any]) -> Built:
    import timm

    hub = name.startswith("hf-hub:")
    if not hub and not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{suggest(name, timm.list_models())}")
    arguments = dict(kwargs) | ({} if embed_dim is None else {"num_classes": embed_dim})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = _seeded(lambda: timm.create_model(name, pretrained=pretrained, **arguments))
    except TypeError as error:
        raise UsageError(f"timm:{name} does not take these arguments: {error}") from None
    except Exception as error:  # a failed download raises whatever the hub's client raises
        if not pretrained and not hub:
            raise
        raise DataError(f"timm cannot fetch {name}: {_first_line(error)}") from None
    about = getattr(network, "pretrained_cfg", None) or {}
    return Built(
        network=network,
        input_shape=tuple(about.get("input_size") or (3, 224, 224)),
        mean=tuple(about.get("mean") or IMAGENET_MEAN),
        std=tuple(about.get("std") or IMAGENET_STD),
        interpolation=about.get("interpolation") or "bilinear",
    )


def _torchvision(name: str, embed_dim: int | None, pretrained: bool, kwargs: Mapping[str, Any]) -> Built:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}{suggest(name, known)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = "DEFAULT" if pretrained else None
            network = _seeded(lambda: models.get_model(name, weights=weights, **kwargs))
    except TypeError as error:
        raise UsageError(f"torchvision:{name} does not take these arguments: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        raise DataError(f"torchvision cannot fetch {name}: {_first_line(error)}") from None
    if embed_dim is not None:
        with_head(network, embed_dim)
    size = 299 if name == "inception_v3" else 224
    return Built(network, (3, size, size), IMAGENET_MEAN, IMAGENET_STD)


def build_network(
    builder: str,
    *,
    embed_dim: int | None = None,
    pretrained: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Built:
    """The network that a builder's name stands for, untrained unless ``pretrained``.

    Args:
        builder: a name of :data:`ARCHITECTURES`, ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:NAME``.
        embed_dim: width of the last layer, 0 to leave it out, None to keep the builder's own.
        pretrained: with the weights that timm or torchvision publish; these are downloaded.
        kwargs: further arguments of the builder.

    Raises:
        UsageError: unknown name, or arguments that the builder does not take.
        DataError: weights that cannot be fetched.
    """
    kind, colon, name = builder.partition(":")
    arguments = dict(kwargs or {})
    if not colon:
        make = ARCHITECTURES[builder]
        if pretrained:
            raise UsageError(f"architecture {builder!r} has no published weights")
        if embed_dim:
            arguments["embed_dim"] = embed_dim
        try:
            known = signature(make).bind(**arguments)
            known.apply_defaults()
            given = {**known.arguments, **known.arguments.get("kwargs", {})}
            size = given.get("size", _C2F2_SIZE)
            return Built(_seeded(lambda: make(**arguments)), (given.get("channels", 1), size, size))
        except TypeError as error:
            raise UsageError(f"architecture {builder!r} does not take these arguments: {error}") from None
    if kind == "timm":
        return _timm(name, embed_dim, pretrained, arguments)
    if kind == "hf-hub":
        return _timm(builder, embed_dim, pretrained, arguments)
    if kind == "torchvision":
        return _torchvision(name, embed_dim, pretrained, arguments)
    raise UsageError(f"unknown architecture {builder!r}: it is none of {', '.join(ARCHITECTURES)}, timm:, torchvision:")


def parameter_count(network: nn.Module) -> int:
    """How many numbers are learnt."""
    return int(np.sum([p.numel() for p in network.parameters()]))


ARCHITECTURES: Registry[Callable[..., nn.Module]] = Registry(
    "architecture", {"smallcnn": smallcnn, "conv3": conv3, "c2f2": c2f2, "ensemble": ensemble}
)

"""Networks by name: small nets of our own, and timm's and torchvision's with a head of any width.

A builder is a name of :data:`ARCHITECTURES`, or ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:NAME``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmlbench.errors import DataError, DmlbenchError, UsageError
from dmlbench.registry import Registry, suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEADS = ("fc", "classifier", "head", "heads", "last_linear")
"""Where networks keep their last layer."""
MOST_PARAMETERS = 2_000_000_000
"""Of a network that a record or a spec describes."""
MOST_WIDTH = 1 << 20
"""Values of an embedding."""
MOST_MEMBERS = 100
"""Networks of an ensemble."""
_MOST_TENSORS = 20_000
_MOST_NUMBER = 1_000_000
"""In an argument of timm's and torchvision's networks: widths, depths, sides."""
_C2F2_SIZE = 28
"""The images of networks that do not take a size."""
_NOT_OF_THE_NETWORK = (
    "checkpoint", "pretrained", "weights", "cache_dir", "scriptable", "exportable", "no_jit",
    "device", "dtype", "features_only", "feature_cfg", "model_cfg", "kwargs_filter", "progress",
)  # fmt: skip
"""How the arguments of timm and torchvision begin that read files, fetch, or change what is made, not its size."""


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
    """``members`` networks of the architecture ``member``; the other arguments are theirs.

    Raises:
        UsageError: no number of members, or more than :data:`MOST_MEMBERS`; an ensemble of ensembles.
    """
    if isinstance(members, bool) or not isinstance(members, int) or not 1 <= members <= MOST_MEMBERS:
        raise UsageError(f"an ensemble has 1 to {MOST_MEMBERS} members, not {members!r}")
    if member == "ensemble":
        raise UsageError("an ensemble has no ensembles as members")
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
    require_width(embed_dim)
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


def require_width(embed_dim: int) -> None:
    """Refuse a last layer that no embedding has.

    Raises:
        UsageError: below 0 or above :data:`MOST_WIDTH`.
    """
    if not 0 <= embed_dim <= MOST_WIDTH:
        raise UsageError(f"embed_dim {embed_dim} is not 0 (no last layer) to {MOST_WIDTH}")


@contextmanager
def _at_most(most: int, name: str) -> Iterator[None]:
    """Within it, a network with more than ``most`` parameters ends as soon as it has them, before it is filled."""
    total = tensors = 0

    def count(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        nonlocal total, tensors
        total += 0 if parameter is None else parameter.numel()
        tensors += 1
        if tensors > _MOST_TENSORS:
            raise UsageError(
                f"{name} with these arguments has too many layers: at most {_MOST_TENSORS} weights and biases"
            )
        if total > most:
            raise UsageError(f"{name} with these arguments is too large: at most {most} parameters are allowed")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _made(make: Callable[[], nn.Module], name: str, most: int | None) -> nn.Module:
    """What ``make`` gives, from the fixed seed; where its size is bounded, it is first made without memory.

    Raises:
        UsageError: more than ``most`` parameters.
    """
    if most is None:
        return _seeded(make)
    with _at_most(most, name):
        try:
            with torch.device("meta"):
                _seeded(make)
        except DmlbenchError:
            raise
        except Exception:  # some networks cannot be made so; the real one then says what is wrong
            pass
    with _at_most(most, name):
        return _seeded(make)


def _of_the_network(kind: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that name files, fetch something, or are too large for any network.

    Raises:
        UsageError: naming the first of them.
    """
    for key, value in kwargs.items():
        if key.startswith(_NOT_OF_THE_NETWORK):
            raise UsageError(f"{kind} is not given {key!r} here: arguments describe the network alone")
        if any(abs(number) > _MOST_NUMBER for number in _numbers(value)):
            raise UsageError(f"{kind}: {key!r} holds a number above {_MOST_NUMBER}")


def _numbers(value: Any) -> Iterator[float]:
    """Every number in an argument, at any depth."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def _first_line(error: Exception) -> str:
    """What an error of another package is and says, in one line."""
    return f"{type(error).__name__}: {_said(error)}"


def _said(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _timm(name: str, embed_dim: int | None, pretrained: bool, kwargs: Mapping[str, Any], most: int | None) -> Built:
    import timm

    hub = name.startswith("hf-hub:")
    if not hub and not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{suggest(name, timm.list_models())}")
    _of_the_network(f"timm:{name}", kwargs)
    arguments = dict(kwargs) | ({} if embed_dim is None else {"num_classes": embed_dim})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = _made(lambda: timm.create_model(name, pretrained=pretrained, **arguments), f"timm:{name}", most)
    except DmlbenchError:
        raise
    except TypeError as error:
        raise UsageError(f"timm:{name} does not take these arguments: {_said(error)}") from None
    except Exception as error:  # a failed download raises whatever the hub's client raises
        if not pretrained and not hub:
            raise UsageError(f"timm:{name} does not take these arguments: {_first_line(error)}") from None
        raise DataError(f"timm cannot fetch {name}: {_first_line(error)}") from None
    about = getattr(network, "pretrained_cfg", None) or {}
    return Built(
        network=network,
        input_shape=tuple(about.get("input_size") or (3, 224, 224)),
        mean=tuple(about.get("mean") or IMAGENET_MEAN),
        std=tuple(about.get("std") or IMAGENET_STD),
        interpolation=about.get("interpolation") or "bilinear",
    )


def _torchvision(
    name: str, embed_dim: int | None, pretrained: bool, kwargs: Mapping[str, Any], most: int | None
) -> Built:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}{suggest(name, known)}")
    _of_the_network(f"torchvision:{name}", kwargs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = "DEFAULT" if pretrained else None
            make = partial(models.get_model, name, weights=weights, **kwargs)
            network = _made(make, f"torchvision:{name}", most)
    except DmlbenchError:
        raise
    except TypeError as error:
        raise UsageError(f"torchvision:{name} does not take these arguments: {_said(error)}") from None
    except Exception as error:
        if not pretrained:
            raise UsageError(f"torchvision:{name} does not take these arguments: {_first_line(error)}") from None
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
    most: int | None = None,
) -> Built:
    """The network that a builder's name stands for, untrained unless ``pretrained``.

    Args:
        builder: a name of :data:`ARCHITECTURES`, ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:NAME``.
        embed_dim: width of the last layer, 0 to leave it out, None to keep the builder's own.
        pretrained: with the weights that timm or torchvision publish; these are downloaded.
        kwargs: further arguments of the builder.
        most: parameters that it may have, counted before it takes memory; None for any number.

    Raises:
        UsageError: unknown name, arguments that the builder does not take, or more than ``most`` parameters.
        DataError: weights that cannot be fetched.
    """
    kind, colon, name = builder.partition(":")
    arguments = dict(kwargs or {})
    if embed_dim is not None:
        require_width(embed_dim)
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
            network = _made(lambda: make(**arguments), f"architecture {builder!r}", most)
            return Built(network, (given.get("channels", 1), size, size))
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise UsageError(f"architecture {builder!r} does not take these arguments: {_said(error)}") from None
    if kind == "timm":
        return _timm(name, embed_dim, pretrained, arguments, most)
    if kind == "hf-hub":
        return _timm(builder, embed_dim, pretrained, arguments, most)
    if kind == "torchvision":
        return _torchvision(name, embed_dim, pretrained, arguments, most)
    raise UsageError(f"unknown architecture {builder!r}: it is none of {', '.join(ARCHITECTURES)}, timm:, torchvision:")


def parameter_count(network: nn.Module) -> int:
    """How many numbers are learnt."""
    return int(np.sum([p.numel() for p in network.parameters()]))


ARCHITECTURES: Registry[Callable[..., nn.Module]] = Registry(
    "architecture", {"smallcnn": smallcnn, "conv3": conv3, "c2f2": c2f2, "ensemble": ensemble}
)

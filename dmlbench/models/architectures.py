"""Networks by name: our own small ones, those of publications, and timm's and torchvision's with a head of any width.

A builder is a name of :data:`ARCHITECTURES`, or ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:NAME``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn

from dmlbench.errors import DataError, DmlbenchError, UsageError
from dmlbench.files import described, first_line
from dmlbench.models.heads import require_width, with_head
from dmlbench.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED, Fed, published
from dmlbench.models.small import Ensemble, c2f2, conv3, smallcnn
from dmlbench.preprocess import Preprocess
from dmlbench.registry import Registry, suggest

MOST_PARAMETERS = 2_000_000_000
"""Of a network that a record or a spec describes."""
MOST_MEMBERS = 100
"""Networks of an ensemble."""
LIBRARIES = ("timm", "torchvision")
"""Packages whose networks are built by ``PACKAGE:NAME``, without asking a hub."""
_MOST_TENSORS = 20_000
_MOST_NUMBER = 1_000_000
"""In an argument of timm's and torchvision's networks: widths, depths, sides."""
_C2F2_SIZE = 28
"""The images of networks that do not take a size."""
_HALF = (0.5, 0.5, 0.5)
"""Mean and std of GoogLeNet and Inception v3: torchvision's weights of these two undo ImageNet's within (``transform_input``)."""
_NOT_OF_THE_NETWORK = (
    "checkpoint", "pretrained", "weights", "cache_dir", "scriptable", "exportable", "no_jit",
    "device", "dtype", "features_only", "feature_cfg", "model_cfg", "kwargs_filter", "progress",
)  # fmt: skip
"""How the arguments of timm and torchvision begin that read files, fetch, or change what is made, not its size."""


def ensemble(member: str = "conv3", members: int = 3, **kwargs: Any) -> nn.Module:
    """``members`` networks of the architecture ``member``; the other arguments are theirs.

    Members that are timm's or torchvision's (``embed_dim`` is then the width of their last layer, 0 for none) start from the same weights.

    Raises:
        UsageError: no number of members, or more than :data:`MOST_MEMBERS`; an ensemble of ensembles.
    """
    if isinstance(members, bool) or not isinstance(members, int) or not 1 <= members <= MOST_MEMBERS:
        raise UsageError(f"an ensemble has 1 to {MOST_MEMBERS} members, not {members!r}")
    if member == "ensemble":
        raise UsageError("an ensemble has no ensembles as members")
    require_known(member)
    if ":" in member:
        width = kwargs.pop("embed_dim", None)
        return Ensemble([build_network(member, embed_dim=width, kwargs=kwargs).network for _ in range(members)])
    return Ensemble([ARCHITECTURES[member](**kwargs) for _ in range(members)])


@dataclass(frozen=True, eq=False)
class Built:
    """A network and what its maker says of the images it wants.

    Attributes:
        network: the module.
        input_shape: (C, H, W) it was made for, None if unknown.
        mean, std: per channel, None for none.
        interpolation: how its maker resizes pictures.
        fed: the preprocessing that its publication states; it takes precedence over the fields above.
        stated: how pictures are prepared, where its weights say so.
        notes: sentences for the user.
        takes: the arguments of one of our own networks.
    """

    network: nn.Module
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"
    fed: Fed | None = None
    stated: Preprocess | None = None
    notes: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


_DRAWN: ContextVar[bool] = ContextVar("drawn", default=False)


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Within it, untrained weights are drawn from torch's generator as it stands: other ones for each network."""
    token = _DRAWN.set(True)
    try:
        yield
    finally:
        _DRAWN.reset(token)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Made from one fixed seed, so that an untrained network is the same each time; but for :func:`drawn_weights`."""
    if _DRAWN.get():
        return make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


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
        raise UsageError(f"timm:{name} does not take these arguments: {first_line(error)}") from None
    except Exception as error:  # a failed download raises whatever the hub's client raises
        if not pretrained and not hub:
            raise UsageError(f"timm:{name} does not take these arguments: {described(error)}") from None
        raise DataError(f"timm cannot fetch {name}: {described(error)}") from None
    about = getattr(network, "pretrained_cfg", None) or {}
    channels, *sides = about.get("input_size") or (3, 224, 224)
    sides = kwargs.get("img_size", sides)
    return Built(
        network=network,
        input_shape=(channels, *((sides, sides) if isinstance(sides, int) else sides)),  # type: ignore[arg-type]
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
        raise UsageError(f"torchvision:{name} does not take these arguments: {first_line(error)}") from None
    except Exception as error:
        if not pretrained:
            raise UsageError(f"torchvision:{name} does not take these arguments: {described(error)}") from None
        raise DataError(f"torchvision cannot fetch {name}: {described(error)}") from None
    if embed_dim is not None:
        with_head(network, embed_dim)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if hasattr(network, "transform_input"):
        # a file may have side exits or not
        side_exits = {"aux1", "aux2", "AuxLogits"} & dict(network.named_children()).keys()
        plain: dict[str, bool | None] = {**dict.fromkeys(side_exits), "aux_logits": False}
        if "transform_input" not in kwargs:
            plain, mean, std = {**plain, "transform_input": False}, _HALF, _HALF
        for part, value in plain.items():
            setattr(network, part, value)
    size = kwargs.get("image_size", 299 if name == "inception_v3" else 224)
    return Built(network, (3, size, size), mean, std)


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
            if builder in PUBLISHED:
                fed = PUBLISHED[builder].fed
                return Built(network, fed.preprocess.shape, fed.mean, fed.std, fed=fed)
            return Built(network, (given.get("channels", 1), size, size), takes=tuple(signature(make).parameters))
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise UsageError(f"architecture {builder!r} does not take these arguments: {first_line(error)}") from None
    if kind == "timm":
        return _timm(name, embed_dim, pretrained, arguments, most)
    if kind == "hf-hub":
        return _timm(builder, embed_dim, pretrained, arguments, most)
    if kind == "torchvision":
        return _torchvision(name, embed_dim, pretrained, arguments, most)
    raise UsageError(
        f"unknown architecture {builder!r}: it is a name (such as {', '.join(list(ARCHITECTURES)[:3])}), timm:NAME or torchvision:NAME"
    )


def require_known(builder: str) -> None:
    """Refuse what is no architecture here: of timm's and torchvision's, the name itself is not looked at.

    Raises:
        UsageError: what it may have been meant to be is named.
    """
    kind, colon, _ = builder.partition(":")
    if colon and kind not in LIBRARIES:
        raise UsageError(
            f"unknown architecture {builder!r}: it is a name ({', '.join(list(ARCHITECTURES)[:3])}, ...), timm:NAME or "
            f"torchvision:NAME{suggest(kind, LIBRARIES).replace('; known: timm, torchvision', '')}"
        )
    if not colon and builder not in ARCHITECTURES and (also := known_as(builder)):
        raise UsageError(f"unknown architecture {builder!r}; did you mean {also!r}?")
    if not colon and builder not in ARCHITECTURES:
        raise UsageError(
            f"unknown architecture {builder!r}{suggest(builder, [*ARCHITECTURES, *(f'{lib}:NAME' for lib in LIBRARIES)])}"
        )


def sized(built: Built, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments with which a network that is made for one size of images is made for ``size`` (H, W); empty where it
    takes any."""
    network = built.network
    if built.input_shape is None or size == built.input_shape[1:]:
        return {}
    if getattr(getattr(network, "patch_embed", None), "img_size", None):
        return {"img_size": size}
    return {"image_size": size[0]} if hasattr(network, "image_size") and size[0] == size[1] else {}


def known_as(name: str) -> str | None:
    """The builder whose package has a network of this name, None for none: ``resnet50`` is ``timm:resnet50``."""
    import timm
    from torchvision import models

    if timm.is_model(name):
        return f"timm:{name}"
    return f"torchvision:{name}" if name in models.list_models(module=models) else None


def parameter_count(network: nn.Module) -> int:
    """How many numbers are learnt."""
    return int(np.sum([p.numel() for p in network.parameters()]))


ARCHITECTURES: Registry[Callable[..., nn.Module]] = Registry(
    "architecture",
    {
        "smallcnn": smallcnn,
        "conv3": conv3,
        "c2f2": c2f2,
        "smallcnn-bn": partial(smallcnn, batch_norm=True),
        "ensemble": ensemble,
        **{name: partial(published, name) for name in PUBLISHED},
    },
)

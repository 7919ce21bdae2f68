"""A network and the weights of a file, put together: at the size of its position embeddings, with the file's head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmlbench.errors import UsageError
from dmlbench.models.architectures import Built, build_network
from dmlbench.models.files import WeightsFile, listed
from dmlbench.models.heads import HEADS, head_of, head_width, last_widths, layer_of, with_head, with_layer
from dmlbench.models.layouts import Match, adapted, among, left_out, match, renamed
from dmlbench.models.published import PUBLISHED
from dmlbench.models.weights import fill, fill_from


@dataclass(frozen=True)
class Chosen:
    """What the user says of a file's layers.

    Attributes:
        embed_dim: width of the last layer, 0 to leave it out, None for the file's own.
        head: the file's layer that is put in place of the network's last one.
        without: the file's layers that are left out on purpose, besides those after the last one that ``embed_dim`` 0 leaves
            out; None for whatever is left.
        prefix: what stands before the network's names.
        size: (H, W) of the images, None for that of the file's position embeddings.
    """

    embed_dim: int | None = None
    head: str | None = None
    without: tuple[str, ...] | None = ()
    prefix: str | None = None
    size: tuple[int, int] | None = None


AS_IT_IS = Chosen()


@dataclass(frozen=True, eq=False)
class Assembled:
    """An untrained network of the shape that a file needs, and the file's tensors under its names.

    Attributes:
        built: the network, and how it is fed.
        matched: the tensors.
        features: how many values a layer that ``--head`` names is given; None where that is not known.
        after: whether such a layer comes after the network as it is, and not in place of its last one.
        notes: sentences for the user.
    """

    built: Built
    matched: Match
    features: int | None = None
    after: bool = True
    notes: tuple[str, ...] = ()


def assemble(
    builder: str,
    kwargs: Mapping[str, Any],
    file: WeightsFile,
    chosen: Chosen = AS_IT_IS,
    most: int | None = None,
) -> Assembled:
    """The network that a builder's name stands for, made ready for a file; nothing is loaded yet.

    Raises:
        UsageError: unknown name, or arguments that the builder does not take; several copies of the network in the
            file; a size that the network does not take.
    """
    kwargs = dict(kwargs)
    if builder in PUBLISHED and "embed_dim" not in kwargs:
        last = PUBLISHED[builder].last
        widths = [t.shape[0] for k, t in file.tensors.items() if f".{k}".endswith(f".{last}") and t.dim() > 1]
        kwargs |= {"embed_dim": widths[0]} if widths else {}
    built = build_network(builder, kwargs=kwargs, most=most)
    state = built.network.state_dict()
    matched = match(renamed(file.tensors, state), state, chosen.prefix)
    notes: list[str] = []
    if ":" in builder and (size := _image_size(built, matched, chosen.size)) is not None:
        name, sides, trained = size
        built = build_network(builder, kwargs=kwargs | {name: sides}, most=most)
        notes = [f"position embeddings are of images of {trained}" + (
            "" if chosen.size is None else f", resized to {chosen.size[0]}x{chosen.size[1]}"
        )]  # fmt: skip
    if any(p.is_meta for p in built.network.parameters()):  # shapes alone are compared
        matched = replace(matched, tensors={k: v.to("meta") for k, v in matched.tensors.items()})
    matched = replace(matched, tensors=adapted(matched.tensors, built.network))
    features = None
    if ":" in builder and head_of(built.network) is not None:
        width = head_width(built.network, matched.tensors) if chosen.embed_dim is None else chosen.embed_dim
        features = (last_widths(built.network) or (None,))[0]
        if chosen.head is not None:
            after = width is not None and width == _taken(file, matched, chosen.head) != features
            width, features = (width, width) if after else (0, features)
        if width is not None or (matched.tensors and features is not None):
            built = replace(built, network=with_head(built.network, width or 0, matched.tensors))
        if bias := _no_bias(built.network, matched):
            matched = replace(matched, tensors={**matched.tensors, **bias})
            notes.append("the last layer has no bias in the file")
    after = ":" not in builder or last_widths(built.network) is not None
    return Assembled(built, matched, features, after, tuple(notes))


def _no_bias(network: nn.Module, matched: Match) -> dict[str, Tensor]:
    """The bias of a network's last layer, zero, where the file has that layer without one; empty where it is otherwise."""
    state = network.state_dict()
    weight = next((k for k, v in reversed(state.items()) if k.startswith(f"{head_of(network)}.") and v.dim() == 2), "")
    bias = weight.removesuffix("weight") + "bias"
    lacks = bias in state and weight in matched.tensors and bias not in matched.tensors
    return {bias: torch.zeros_like(state[bias])} if lacks else {}


def load(
    assembled: Assembled, file: WeightsFile, architecture: str, chosen: Chosen = AS_IT_IS
) -> tuple[Built, list[str]]:
    """The network with a file's weights in it, and sentences about what was done.

    Raises:
        DataError: the file does not fit; what is missing or of another shape is listed by name.
        UsageError: the file has trained layers that the network lacks and that ``without`` does not name; no such head.
    """
    network, matched = assembled.built.network, assembled.matched
    head: tuple[nn.Module, str, dict[str, Tensor]] | None = None
    without = chosen.without
    for name in without or ():
        require_left_out("--leave-out", name, file, matched, network)
    if chosen.head is not None:
        head = _head(file, matched, chosen.head)
        replaced = () if assembled.after else _built_head(network, matched, head[1])
        without = None if without is None else (*without, head[1], *replaced)
        if assembled.after and any(among(matched.prefix + k, (head[1],), "") for k in network.state_dict()):
            raise UsageError(f"--head {chosen.head!r}: the network has that layer already")
        if (taken := head[2]["weight"].shape[-1]) != (given := assembled.features or taken):
            raise UsageError(
                f"--head {chosen.head!r} takes {taken} values, and the features have {given}: it belongs after another "
                "layer, and a network that ends in more is built by --model python:FILE.py:FUNCTION"
            )
    if assembled.features is not None:
        _refuse_other_head(network, matched, file)
    notes = fill_from(network, file, matched, architecture, without, head and head[1], chosen.embed_dim == 0)
    if head is not None:
        layer, name, tensors = head
        fill(layer, tensors, f"weights file {file.path}, layer {name},")
        notes.append(f"{file.name}: layer {name!r} is put {'after' if assembled.after else 'in place of'} the last one")
        network = with_layer(network, layer)
    return replace(assembled.built, network=network), [*notes, *assembled.notes]


def require_left_out(option: str, layer: str, file: WeightsFile, matched: Match, network: nn.Module) -> None:
    """Refuse to leave out a layer, as ``option`` says, that nothing would be left out with.

    Raises:
        UsageError: the file has no such layer, or the network is made of it.
    """
    if not any(among(name, (layer,), matched.prefix) for name in left_out(file, matched, network)):
        why = f"{file.path} has no such layer"
        if any(among(name, (layer,), matched.prefix) for name in file.tensors):
            why = "the network has that layer; an embed-dim of 0 leaves its last one out"
        raise UsageError(f"{option} {layer!r}: {why}")


def _refuse_other_head(network: nn.Module, matched: Match, file: WeightsFile) -> None:
    """Refuse a file with other layers in the place of the network's last one, and say what can be done.

    Raises:
        UsageError: the last layer of the network is linear, and the file has several there, or one of another kind.
    """
    name, state = head_of(network), network.state_dict()
    if name is None or not isinstance(getattr(network, name), nn.Linear):
        return
    there = [k for k in matched.tensors if k.startswith(f"{name}.") and k not in state]
    if there and f"{name}.weight" not in matched.tensors:
        raise UsageError(
            f"{file.path} has other last layers than the architecture: {listed([matched.prefix + k for k in there])}; "
            "--embed-dim 0 leaves them out, and a network that ends in them is built by --model python:FILE.py:FUNCTION"
        )


def _layer(file: WeightsFile, matched: Match, name: str) -> tuple[str, dict[str, Tensor]]:
    """The layer of a file that ``--head`` names, with or without the prefix: its name in the file, its tensors, none if it is not there."""
    every = {**file.tensors, **file.further}
    for full in (name, matched.prefix + name):
        if tensors := {k.removeprefix(f"{full}."): v for k, v in every.items() if k.startswith(f"{full}.")}:
            return full, tensors
    return name, {}


def _taken(file: WeightsFile, matched: Match, name: str) -> int | None:
    """How many values the layer takes that ``--head`` names."""
    weight = _layer(file, matched, name)[1].get("weight")
    return None if weight is None or weight.dim() == 0 else weight.shape[-1]


def _head(file: WeightsFile, matched: Match, name: str) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """The layer of a file that ``--head`` names, untrained, its name in the file, its tensors."""
    full, tensors = _layer(file, matched, name)
    if not tensors:
        raise UsageError(f"--head {name!r}: {file.path} has no such layer")
    layer = layer_of(tensors, full)
    if layer is None:
        raise UsageError(
            f"--head {name!r} is no linear layer and no batch norm ({', '.join(sorted(tensors))}): "
            "a network that ends in more is built by --model python:FILE.py:FUNCTION"
        )
    if isinstance(layer, nn.BatchNorm1d):
        tensors.setdefault("num_batches_tracked", layer.state_dict()["num_batches_tracked"])
    return layer, full, tensors


def _built_head(network: nn.Module, matched: Match, chosen: str) -> tuple[str, ...]:
    """The names in the file of the last layer that the ``chosen`` one replaces; none where that is a part of it."""
    name = head_of(network)
    names = (matched.prefix + name,) if name else HEADS
    return tuple(n for n in names if not chosen.startswith(f"{n}."))


def _image_size(built: Built, matched: Match, size_asked: tuple[int, int] | None) -> tuple[str, Any, str] | None:
    """(argument, sides, "HxW" of the file) where a vision transformer has to be built for another size than its own.

    Raises:
        UsageError: its position embeddings are of no square, and no size is given.
    """
    network = built.network
    state = network.state_dict()
    for name, argument in (("pos_embed", "img_size"), ("encoder.pos_embedding", "image_size")):
        mine, theirs = state.get(name), matched.tensors.get(name)
        if mine is None or theirs is None or built.input_shape is None or mine.dim() != 3 or theirs.dim() != 3:
            continue
        if theirs.shape == mine.shape and size_asked in (None, built.input_shape[1:]):
            return None
        grid = getattr(getattr(network, "patch_embed", None), "grid_size", None) or (round(mine.shape[1] ** 0.5),) * 2
        extra = mine.shape[1] - grid[0] * grid[1]
        tokens = theirs.shape[1] - (1 if extra == 0 and theirs.shape[1] != mine.shape[1] and _odd(theirs) else extra)
        side = round(tokens**0.5)
        down, right = built.input_shape[1] // grid[0], built.input_shape[2] // grid[1]
        square = side * side == tokens
        trained = f"{side * down}x{side * right}" if square else f"{tokens} patches"
        if not square and size_asked is None:
            raise UsageError(
                f"position embeddings of {tokens} patches are of no square image: --input-size HxW says which"
            )
        size = size_asked or (side * down, side * right)
        if size[0] % down or size[1] % right:
            raise UsageError(
                f"--input-size {size[0]}x{size[1]}: this network's images are cut into patches of {down}x{right}"
            )
        if square and size[0] // down * (size[1] // right) == tokens and size[0] // down != side:
            raise UsageError(
                f"--input-size {size[0]}x{size[1]}: as many patches as the file's {trained}, laid out otherwise"
            )
        if size == built.input_shape[1:] and square and (side, side) == tuple(grid):  # type: ignore[index]
            return None
        if argument == "image_size":
            if size[0] != size[1]:
                raise UsageError(f"--input-size {size[0]}x{size[1]}: torchvision's vision transformers take squares")
            return argument, size[0], trained
        return argument, size, trained
    return None


def _odd(position: Tensor) -> bool:
    """Whether one token more than a square's patches has a position."""
    return round((position.shape[1] - 1) ** 0.5) ** 2 == position.shape[1] - 1

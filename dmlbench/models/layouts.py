"""From the names in a weights file to those of a network: prefixes, wrappers, renamed layouts, what is left out.

Whoever trains a network wraps it, and the file says so: ``module.``, ``backbone.``, ``_orig_mod`` within a name, two
copies of which one is an average. The network's tensors are recognised by its own names. Every other tensor of the file must be of a known kind (a loss, a copy,
the text half of CLIP, what the authors do not use at test time): else it may be the layer that makes the embedding, and
the run ends.
"""

import importlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmlbench.errors import UsageError
from dmlbench.models.files import AVERAGED, WeightsFile, listed
from dmlbench.models.heads import head_of, layer_of

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module"}
"""What torch.compile, activation checkpointing, FSDP and Lightning's Fabric put into names, anywhere."""
_FOLLOWER = re.compile(r"(^|[._])(encoder_k|target|momentum|key)([._]|$)|momentum_|target_|_momentum")
_OF_TRAINING = re.compile(
    r"(^|[._])(criterion|criteria|loss(es)?|losses?_fn|loss_func|prox(y|ies)|cent(er|re)s?|prototypes?|queue|arcface|"
    r"cosface|margin|mask_token|logit_scale|logit_bias|optimizer|ema_updates|n_averaged|total_(ops|params)|"
    r"aux[12]|auxlogits)([._]|\d|$)",
    re.IGNORECASE,
)
"""What a training needs and a test does not."""
_OF_TEXT = re.compile(
    r"^(transformer\.resblocks\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection|text\.|text_model\.|"
    r"attn_mask$)"
)
"""The text half of CLIP, whose image half is ``visual``."""


@dataclass(frozen=True, eq=False)
class Match:
    """A file's tensors under a network's names.

    Attributes:
        prefix: what stood before them.
        tensors: those below the prefix, in the network's names as far as the layout is known.
        outside: those that are not below it, names as in the file.
        copy: the prefix of another copy of the network that was passed over, None for none.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    outside: Mapping[str, Tensor]
    copy: str | None = None


def strip(
    tensors: Mapping[str, Tensor], names: Iterable[str], prefix: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The prefix under which ``tensors`` match a network's ``names`` best, and the tensors below it, named without it.

    Wrappers may be nested (``module.model.``). Without any fit the prefix is "".
    """
    matched = match(tensors, names, prefix)
    return matched.prefix, dict(matched.tensors)


def match(tensors: Mapping[str, Tensor], network_names: Iterable[str], prefix: str | None = None) -> Match:
    """Which of a file's tensors are a network's, by the names of its state dictionary, ``network_names``.

    Raises:
        UsageError: several copies of the network fit, and which is meant is not clear.
    """
    names = set(network_names)
    around = _WRAPPERS if any("module" in name.split(".") for name in names) else {*_WRAPPERS, "module"}
    plain = {k if k in names else unwrapped(k, around): k for k in tensors}
    prefixes = _prefixes(plain, names)
    copy = None
    if prefix is None:
        prefix, copy = _prefix(prefixes, plain, tensors)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    copy = copy or next((p for p in prefixes if p != prefix and len(prefixes) > 1), None)
    below = {k[len(prefix) :]: tensors[name] for k, name in plain.items() if k.startswith(prefix)}
    outside = {name: tensors[name] for k, name in plain.items() if not k.startswith(prefix)}
    return Match(prefix, below, outside, copy)


def unwrapped(name: str, wrappers: Collection[str] = _WRAPPERS) -> str:
    """A name without the parts that ``wrappers`` put into it; a ``module`` before all of it is a prefix."""
    return ".".join(p for i, p in enumerate(name.split(".")) if p not in wrappers or (p == "module" and i == 0))


def _prefixes(plain: Iterable[str], names: set[str]) -> list[str]:
    """The prefixes that as many of a network's names follow as any: several only where each has nearly all of them."""
    counts: Counter[str] = Counter()
    for name in plain:
        start = 0
        while start >= 0:
            if name[start:] in names:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    most = max(counts.values(), default=0)
    best = sorted((p for p, count in counts.items() if count == most), key=lambda p: (len(p), p))
    return best if most >= 0.9 * len(names) else best[:1]


def _prefix(best: list[str], plain: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """Which of several copies of a network is meant, and one that is passed over: an average before what it is of."""
    if len(best) < 2:
        return (best or [""])[0], None
    ranks = {p: 2 if AVERAGED.search(p) else 0 if _FOLLOWER.search(p) else 1 for p in best}
    first = [p for p in best if ranks[p] == max(ranks.values())]
    if len(first) > 1 and not all(_same(plain, tensors, first[0], p) for p in first[1:]):
        raise UsageError(
            f"the file holds several copies of the network, below {', '.join(map(repr, best))}: "
            "choose one with --checkpoint-prefix"
        )
    return first[0], next((p for p in best if p != first[0]), None)


def _same(plain: Mapping[str, str], tensors: Mapping[str, Tensor], one: str, two: str) -> bool:
    pairs = ((name, plain.get(two + k[len(one) :])) for k, name in plain.items() if k.startswith(one))
    return all(other is not None and torch.equal(tensors[name], tensors[other]) for name, other in pairs)


def renamed(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with the names of known layouts turned into those of a network's ``state`` dictionary; prefixes stay."""
    for layout in (_clip_tower, _clip_trunk, _mobilenet_v2, _first_torchvision):
        tensors = layout(tensors, state)
    return dict(tensors)


_CLIP_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def clip_prefix(tensors: Iterable[str]) -> str | None:
    """Where a file has CLIP's vision transformer under OpenAI's names; None where it has none."""
    names = set(tensors)
    starts = (name.removesuffix("class_embedding") for name in names if name.endswith("class_embedding"))
    return next((p for p in starts if {f"{p}conv1.weight", f"{p}ln_pre.weight"} <= names), None)


def _clip_tower(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """OpenAI's and open_clip's names of CLIP's vision transformer, to timm's."""
    prefix = clip_prefix(tensors)
    if prefix is None or "blocks.0.attn.qkv.weight" not in state:
        return tensors
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            out[name] = tensor
        elif inner == "class_embedding":
            out[f"{prefix}cls_token"] = tensor.view(1, 1, -1)
        elif inner == "positional_embedding":
            out[f"{prefix}pos_embed"] = tensor[None]
        elif inner == "proj":
            out |= _projection(f"{prefix}head.", tensor.t())
        else:
            for pattern, new in _CLIP_NAMES:
                inner = re.sub(pattern, new, inner)
            out[prefix + inner] = tensor
    return out


def _clip_trunk(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """open_clip's vision halves that are timm's networks: ``trunk`` and a projection after it."""
    last = next((name for name in tensors if name.endswith("head.proj.weight")), None)
    trunk = last and last.removesuffix("head.proj.weight") + "trunk."
    into = next((k for k, v in reversed(list(state.items())) if k.startswith("head.") and v.dim() == 2), None)
    if not last or not trunk or not into or not any(name.startswith(trunk) for name in tensors):
        return tensors
    out = {name: tensor for name, tensor in tensors.items() if name != last}
    return out | _projection(trunk + into.removesuffix("weight"), tensors[last])


def _projection(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A projection without bias, as a linear layer of bias zero."""
    return {f"{name}weight": weight, f"{name}bias": torch.zeros(weight.shape[0], dtype=weight.dtype)}


def _mobilenet_v2(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of the first public MobileNetV2 (tonylins), to torchvision's, which groups layer, norm and ReLU."""
    markers = [k for k in tensors if k.endswith("features.1.conv.4.weight")]
    if not markers or "features.1.conv.0.0.weight" not in state:
        return tensors
    prefix = markers[0].removesuffix("features.1.conv.4.weight")
    wide = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
    narrow = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if parts := re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(\w+)", name.removeprefix(prefix)):
            block, layer, rest = parts.groups()
            there = wide if f"{prefix}features.{block}.conv.6.weight" in tensors else narrow
            name = f"{prefix}features.{block}.conv.{there.get(layer, layer)}.{rest}"
        out[name] = tensor
    return out


_FIRST_NAMES = (
    ("denselayer1.norm1.weight", r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    ("encoder_layer_0.mlp.0.weight", r"(encoder_layer_\d+\.mlp)\.linear_1\.", r"\1.0."),
    ("encoder_layer_0.mlp.3.weight", r"(encoder_layer_\d+\.mlp)\.linear_2\.", r"\1.3."),
)
"""How a network is known whose published weights torchvision itself renames when it reads them, and the old and the new names."""


def _first_torchvision(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The first names of DenseNet's and the vision transformer's layers, which their published files still have."""
    for telling, old, new in _FIRST_NAMES:
        if any(name.endswith(telling) for name in state):
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def adapted(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Tensors without prefix as a network's own package reads them: older names, position embeddings of another size.

    The size of a patch is not changed: another one means another network.
    """
    state = network.state_dict()
    weights = dict(tensors)
    if all(k in weights and weights[k].shape == v.shape for k, v in state.items()) or "pre_logits.fc.weight" in weights:
        return weights
    if (patch := weights.get("patch_embed.proj.weight")) is not None:
        mine = state.get("patch_embed.proj.weight")
        if mine is None or patch.shape != mine.shape:
            return weights
    package = type(network).__module__
    if package.startswith("torchvision.") and (position := weights.get("encoder.pos_embedding")) is not None:
        if position.shape == state["encoder.pos_embedding"].shape or position.shape[-1] != network.hidden_dim:
            return weights
        from torchvision.models.vision_transformer import interpolate_embeddings

        return dict(interpolate_embeddings(network.image_size, network.patch_size, weights))  # type: ignore[arg-type]
    read: Any = getattr(importlib.import_module(package), "checkpoint_filter_fn", None)
    if not package.startswith("timm.") or read is None:
        return weights
    if (position := weights.get("pos_embed")) is not None and position.shape[-1:] != state.get(
        "pos_embed", position
    ).shape[-1:]:
        return weights
    try:
        floating = {k: v.float() if k == "pos_embed" else v for k, v in weights.items()}
        made = dict(read(floating, network))
    except Exception:  # a file of another network, which it was not made for; what does not fit is told by name
        return weights
    given = {id(v) for v in floating.values()}
    resized = {k for k, v in made.items() if k in weights and id(v) not in given and v.numel() != weights[k].numel()}
    # windows of another size are those of another network
    return made | {k: weights[k] for k in resized - {"pos_embed"}}


def left_out(file: WeightsFile, matched: Match, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file that a network does not use, named as in the file."""
    state = network.state_dict()
    parts = {k.partition(".")[0] for k in state}
    removed = tuple(
        f"{name}." for name, m in network.named_modules() if isinstance(m, nn.Identity) and _in_head(name, network)
    )
    unused = (*getattr(network, "unused", ()), *removed)
    inside = {
        matched.prefix + k: v
        for k, v in matched.tensors.items()
        if k not in state and (k.partition(".")[0] not in parts or k.startswith(unused))
    }
    return {**matched.outside, **inside, **file.further}


def _after_features(name: str, tensor: Tensor, matched: Match, network: nn.Module) -> bool:
    """Whether a tensor that the network does not use is of a layer that follows features: of its last one, linear, or a norm.

    The power of a pooling, an embedding of cameras or a convolution may have its place before them.
    """
    if name not in matched.outside and _in_head(name.removeprefix(matched.prefix), network):
        return True
    return tensor.dim() < 3 and name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var")


def _in_head(name: str, network: nn.Module) -> bool:
    return name.partition(".")[0] == head_of(network)


def unknown(
    left: Mapping[str, Tensor],
    matched: Match,
    network: nn.Module,
    without: Sequence[str] = (),
    features: bool = False,
) -> Iterator[str]:
    """Of what is left out, the names that no loss, copy or other half explains: trained layers of the embedding.

    Those of the layers ``without`` are left out on purpose, and for ``features`` alone those that follow them.
    """
    state = network.state_dict()
    unused = tuple(getattr(network, "unused", ()))
    visual = "visual" in matched.prefix
    for name, tensor in left.items():
        plain = unwrapped(name)
        known = (
            not tensor.is_floating_point()
            or _OF_TRAINING.search(plain)
            or (unused and plain.removeprefix(matched.prefix).startswith(unused))
            or (matched.copy is not None and plain.removeprefix(matched.copy) in state)
            or (matched.copy is not None and plain.startswith(_branch(matched.copy, matched.prefix)))
            or among(name, without, matched.prefix)
            or (features and _after_features(name, tensor, matched, network))
            or (visual and _OF_TEXT.search(plain.removeprefix(matched.prefix.partition("visual")[0])))
        )
        if not known:
            yield name


def _branch(copy: str, prefix: str) -> str:
    """The part of a copy's prefix that tells it from the one that is used."""
    one, two = copy.split("."), prefix.split(".")
    first = next((i for i, part in enumerate(one) if i >= len(two) or part != two[i]), 0)
    return ".".join(one[: first + 1]) + "."


def refuse_unknown(file: WeightsFile, names: list[str], left: Mapping[str, Tensor], architecture: str) -> None:
    """End the run over layers that would be left out.

    Raises:
        UsageError: naming them, and the options that use them or do without.
    """
    if not names:
        return
    text = listed([f"{name} {tuple(left[name].shape)}" for name in names], 3)
    layers = list(dict.fromkeys(_layer(name) for name in names))
    single = [n for n in layers if layer_of({k.rpartition(".")[2]: t for k, t in left.items() if _layer(k) == n}, n)]
    use = f"--head {' or '.join(single[:3])} puts that layer in place of the last one or after it; " if single else ""
    raise UsageError(
        f"{file.path} holds trained layers that {architecture} would leave out: {text}. {use}"
        f"--leave-out {','.join(layers[:3])}{',...' if len(layers) > 3 else ''} does without; "
        f"'dmlbench models inspect {file.path}' tells what fits"
    )


def _layer(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0] or name


def among(name: str, layers: Sequence[str], prefix: str) -> bool:
    """Whether a tensor belongs to one of the layers, named with the file's prefix or without."""
    return any(f"{n}.".startswith(f"{layer}.") for layer in layers for n in (name, name.removeprefix(prefix)))

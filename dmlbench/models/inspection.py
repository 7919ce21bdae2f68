"""What is in a weights file, and which architecture fits it.

Candidates are compared by the names and shapes of their tensors, without prefix; none of them is
trained or downloaded, and the tensors of the larger ones are never allocated.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dmlbench.errors import UsageError
from dmlbench.models.architectures import build_network
from dmlbench.models.assembly import AS_IT_IS, Chosen, assemble
from dmlbench.models.files import WeightsFile
from dmlbench.models.heads import HEADS
from dmlbench.models.layouts import clip_prefix, left_out, match, renamed, strip, unknown, unwrapped
from dmlbench.models.published import PUBLISHED

CANDIDATES = {
    **{name: entry.telling for name, entry in PUBLISHED.items()},
    **{f"torchvision:resnet{depth}": "layer1.0.conv1.weight" for depth in (18, 34, 50, 101, 152)},
    "torchvision:mnasnet1_0": "layers.8.0.layers.0.weight",
    "torchvision:mobilenet_v2": "features.0.0.weight",
    "torchvision:mobilenet_v3_large": "features.1.block.0.0.weight",
    "torchvision:googlenet": "inception3a.branch1.conv.weight",
    "torchvision:inception_v3": "Mixed_5b.branch1x1.conv.weight",
    "torchvision:densenet121": "features.transition1.conv.weight",
    **{f"torchvision:{name}": "features.0.weight" for name in ("alexnet", "vgg16", "vgg16_bn")},
    "torchvision:efficientnet_b0": "features.1.0.block.0.0.weight",
    "torchvision:convnext_tiny": "features.1.0.block.0.weight",
    **{f"torchvision:vit_b_{n}": "encoder.layers.encoder_layer_0.ln_1.weight" for n in (16, 32)},
    "torchvision:swin_t": "features.1.0.norm1.weight",
    **{f"timm:vit_{size}_patch16_224": "blocks.0.attn.qkv.weight" for size in ("tiny", "small", "base", "large")},
    **{f"timm:vit_{size}_patch14_dinov2": "blocks.0.ls1.gamma" for size in ("small", "base", "large")},
    **{f"timm:vit_{size}_patch14_reg4_dinov2": "reg_token" for size in ("small", "base", "large")},
    "timm:vit_base_patch16_siglip_224": "attn_pool.latent",
    **{f"timm:{name}_224": "blocks.0.attn.qkv.weight" for name in ("vit_base_patch32", "deit_small_distilled_patch16")},
    "timm:inception_v4": "features.0.conv.weight",
    "timm:resnetv2_50": "stages.0.blocks.0.conv1.weight",
    "timm:convnext_tiny": "stages.0.blocks.0.conv_dw.weight",
    "timm:efficientnet_b0": "blocks.0.0.conv_dw.weight",
    "timm:mobilenetv3_large_100": "blocks.0.0.conv_dw.weight",
}
"""Which networks of other packages a file is compared with, and one name by which each is known."""

TWINS = {
    "timm:efficientnet_b0": "timm:tf_efficientnet_b0",
    "timm:mobilenetv3_large_100": "timm:tf_mobilenetv3_large_100",
}
"""Networks that compute otherwise with tensors of the same names and shapes: those from TensorFlow pad otherwise and have
another epsilon in their batch norms."""

_CLIP = {
    (768, 32): "timm:vit_base_patch32_clip",
    (768, 16): "timm:vit_base_patch16_clip",
    (1024, 14): "timm:vit_large_patch14_clip",
}
"""CLIP's vision transformers by (width, patch)."""


def clip_names(file: WeightsFile) -> list[str]:
    """timm's names for a file that holds a vision half of CLIP: OpenAI's activation first, then the exact one."""
    prefix = clip_prefix(file.tensors)
    if prefix is None:
        return []
    shape = file.tensors[f"{prefix}conv1.weight"].shape
    name = _CLIP.get((shape[0], shape[-1]))
    return [f"{name}_quickgelu_224 (OpenAI's and what was tuned from it)", f"{name}_224 (LAION's)"] if name else []


def width_of(network: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """The width of a network's embedding, by a pass on torch's meta device; None if that pass fails."""
    try:
        twin = copy.deepcopy(network).to("meta").eval()
        with torch.no_grad():
            out = twin(torch.empty(2, *shape, device="meta"))
        return int(out.shape[1]) if isinstance(out, Tensor) and out.dim() in (2, 4) else None
    except Exception:  # some networks look at values, which are not there
        return None


@dataclass(frozen=True)
class Fit:
    """How well a file fits an architecture.

    Attributes:
        builder: its name, as ``--model`` or a spec's ``arch.builder`` takes it.
        kwargs: further arguments of the builder.
        embed_dim: the width of the embedding; None if it is unknown.
        prefix: what stands before the network's own names in the file.
        matched: tensors of the network that the file has in the same shape.
        missing, unexpected, other_shape: names that keep it from fitting.
        left: trained layers of the file that the network would leave out.
    """

    builder: str
    kwargs: Mapping[str, Any]
    embed_dim: int | None
    prefix: str
    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Does the file have all tensors of the network, and no further ones of its parts or of other trained layers?"""
        return self.but_for_layers and not self.left

    @property
    def but_for_layers(self) -> bool:
        """Does it fit, were it not for trained layers that the network would leave out?"""
        return not (self.missing or self.unexpected or self.other_shape)

    @property
    def share(self) -> float:
        """Matched names among all of both, 0 to 1."""
        wrong = len(self.missing) + len(self.unexpected) + len(self.other_shape) + len(self.left)
        return self.matched / max(1, self.matched + wrong)


def _small_networks(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Our own small nets with the widths that the file's shapes imply."""
    _, plain = strip(tensors, ("0.weight", "7.weight", "9.weight", "6.weight"))
    shape = {k: tuple(v.shape) for k, v in plain.items()}
    first = shape.get("0.weight", ())
    if len(first) != 4:
        return
    if "9.weight" in shape and len(shape["9.weight"]) == 2:
        yield "c2f2", {"channels": first[1], "embed_dim": shape["9.weight"][0]}
    last = shape.get("7.weight", ())
    if len(last) == 2 and "9.weight" not in shape:
        # both have the same tensors; the linear layer tells whether images of 28 or of 8 pixels were meant
        name, size = {4: ("conv3", 28), 2: ("smallcnn", 8)}.get(round((last[1] / (4 * first[0])) ** 0.5), ("", 0))
        if name:
            yield name, {"channels": first[1], "width": first[0], "embed_dim": last[0], "size": size}


def _compare(file: WeightsFile, builder: str, kwargs: Mapping[str, Any], chosen: Chosen) -> Fit:
    with torch.device("meta"):
        made = assemble(builder, kwargs, file, chosen)
    network, matched = made.built.network, made.matched
    state = network.state_dict()
    left = left_out(file, matched, network)
    inside = {k: v for k, v in matched.tensors.items() if matched.prefix + k not in left}
    other = tuple(k for k in state if k in inside and inside[k].shape != state[k].shape)
    without = (*(chosen.without or ()), *([chosen.head] if chosen.head else ()))
    stray = () if chosen.without is None else tuple(unknown(left, matched, network, without, chosen.embed_dim == 0))
    return Fit(
        builder=builder,
        kwargs=dict(kwargs),
        embed_dim=width_of(network, made.built.input_shape or (3, 224, 224)),
        prefix=matched.prefix,
        matched=sum(k in inside for k in state) - len(other),
        missing=tuple(k for k in state if k not in inside and not k.endswith("num_batches_tracked")),
        unexpected=tuple(matched.prefix + k for k in inside if k not in state),
        other_shape=other,
        left=stray,
    )


def fits(file: WeightsFile, builders: Iterable[str] | None = None, chosen: Chosen = AS_IT_IS) -> list[Fit]:
    """How every candidate fits, the best first; those with nothing in common are left out."""
    compared = _each(file, promising(file) if builders is None else builders, chosen)
    return sorted(
        (f for f in compared if isinstance(f, Fit) and f.matched),
        key=lambda f: (-f.complete, -f.share),
    )


def _each(file: WeightsFile, builders: Iterable[str], chosen: Chosen) -> Iterator[Fit | UsageError]:
    """Every candidate that may fit, compared lazily; or the question that has to be answered before it can be."""
    for builder, kwargs in (*_small_networks(file.tensors), *((name, {}) for name in builders)):
        try:
            yield _compare(file, builder, kwargs, chosen)
        except UsageError as question:
            yield question


def promising(file: WeightsFile) -> list[str]:
    """The candidates whose telling name the file has, behind any prefix."""
    names = {f".{unwrapped(name)}".replace(".register_tokens", ".reg_token") for name in file.tensors}
    return [b for b, telling in CANDIDATES.items() if any(name.endswith(f".{telling}") for name in names)]


def best_fit(file: WeightsFile, chosen: Chosen = AS_IT_IS) -> Fit | None:
    """The first architecture that the file fits wholly, if there is one.

    Raises:
        UsageError: there is none, and with one of them that is so for the want of an option; it is named.
    """
    question: UsageError | None = None
    for fit in _each(file, filter(partial(_may_fit, file), promising(file)), chosen):
        if isinstance(fit, UsageError):
            question = question or fit
        elif fit.complete:
            return fit
    if question:
        raise question
    return None


@lru_cache(maxsize=128)
def _tensors_of(builder: str) -> Mapping[str, Tensor]:
    """A candidate's tensors, without memory."""
    with torch.device("meta"):
        return build_network(builder).network.state_dict()


def _may_fit(file: WeightsFile, builder: str) -> bool:
    """Whether a file has nearly all names of a candidate's body in its shapes: a quick look before the comparison."""
    state = {k: v for k, v in _tensors_of(builder).items() if k.partition(".")[0] not in HEADS and v.dim() > 0}
    tensors = match(renamed(file.tensors, state), state).tensors
    return (
        sum(k not in tensors or (tensors[k].shape != v.shape and "pos_embed" not in k) for k, v in state.items()) <= 3
    )


def describe(file: WeightsFile) -> dict[str, Any]:
    """What is in a file, as plain values: format, keys, tensors, sizes."""
    plain = {k: v for k, v in file.content.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)}
    floating = [t for t in file.tensors.values() if t.is_floating_point()]
    return {
        "format": file.format,
        "keys": [] if file.content is file.tensors or not file.key else list(file.content),
        "values": plain,
        "weights_under": file.key,
        "tensors": len(file.tensors),
        "parameters": sum(t.numel() for t in floating),
        "types": sorted({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()}),
        "not_finite": [
            k for k, t in file.tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())
        ],
        "first": next(iter(file.tensors), None),
        "last": next(reversed(list(file.tensors)), None),
    }

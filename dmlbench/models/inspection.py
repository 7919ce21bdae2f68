"""What is in a weights file, and which architecture fits it.

Candidates are compared by the names and shapes of their tensors, without prefix; none of them is
trained or downloaded, and the tensors of the larger ones are never allocated.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmlbench.models.architectures import Built, build_network, head_of, head_width, with_head
from dmlbench.models.weights import WeightsFile, strip

CANDIDATES = {
    **{f"torchvision:resnet{depth}": "layer1.0.conv1.weight" for depth in (18, 34, 50, 101, 152)},
    "torchvision:mnasnet1_0": "layers.8.0.layers.0.weight",
    "torchvision:mobilenet_v2": "features.1.conv.0.0.weight",
    "torchvision:mobilenet_v3_large": "features.1.block.0.0.weight",
    "torchvision:googlenet": "inception3a.branch1.conv.weight",
    "torchvision:inception_v3": "Mixed_5b.branch1x1.conv.weight",
    "torchvision:densenet121": "features.denseblock1.denselayer1.norm1.weight",
    **{f"torchvision:{name}": "features.0.weight" for name in ("alexnet", "vgg16", "vgg16_bn")},
    "torchvision:efficientnet_b0": "features.1.0.block.0.0.weight",
    "torchvision:convnext_tiny": "features.1.0.block.0.weight",
    **{f"torchvision:vit_b_{n}": "encoder.layers.encoder_layer_0.ln_1.weight" for n in (16, 32)},
    "torchvision:swin_t": "features.1.0.norm1.weight",
    **{f"timm:vit_{size}_patch16_224": "blocks.0.attn.qkv.weight" for size in ("tiny", "small", "base")},
    **{f"timm:{name}_224": "blocks.0.attn.qkv.weight" for name in ("vit_base_patch32", "deit_small_distilled_patch16")},
    "timm:inception_v4": "features.0.conv.weight",
    "timm:resnetv2_50": "stages.0.blocks.0.conv1.weight",
    "timm:convnext_tiny": "stages.0.blocks.0.conv_dw.weight",
    "timm:efficientnet_b0": "blocks.0.0.conv_dw.weight",
    "timm:mobilenetv3_large_100": "blocks.0.0.conv_dw.weight",
}
"""Which networks of other packages a file is compared with, and one name by which each is known."""


@dataclass(frozen=True)
class Fit:
    """How well a file fits an architecture.

    Attributes:
        builder: its name, as ``--model`` or a spec's ``arch.builder`` takes it.
        kwargs: further arguments of the builder.
        embed_dim: the width of the file's last layer, 0 where it has none.
        prefix: what stands before the network's own names in the file.
        matched: tensors of the network that the file has in the same shape.
        missing, unexpected, other_shape: names that keep it from fitting.
        names: the file's names without the prefix.
    """

    builder: str
    kwargs: Mapping[str, Any]
    embed_dim: int
    prefix: str
    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """The file has all of the network, and nothing more of its parts."""
        return not (self.missing or self.unexpected or self.other_shape)

    @property
    def share(self) -> float:
        """Matched names among all of both, 0 to 1."""
        return self.matched / max(1, self.matched + len(self.missing) + len(self.unexpected) + len(self.other_shape))

    def build(self) -> Built:
        """The network, untrained, with the file's head."""
        built = build_network(self.builder, kwargs=self.kwargs)
        if ":" in self.builder and head_of(built.network):
            with_head(built.network, self.embed_dim, dict.fromkeys(self.names, torch.empty(0)))
        return built


def _own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _compare(file: WeightsFile, builder: str, kwargs: Mapping[str, Any]) -> Fit:
    with torch.device("meta"):
        built = build_network(builder, kwargs=kwargs)
        network = built.network
        prefix, tensors = strip(file.tensors, network.state_dict())
        width = 0
        if ":" in builder and head_of(network):
            width = head_width(network, tensors) or 0
            network = with_head(network, width, tensors)
    own = network.state_dict()
    prefix, tensors = strip(file.tensors, own)
    parts = {k.partition(".")[0] for k in own}
    other = tuple(k for k in own if k in tensors and tensors[k].shape != own[k].shape)
    if ":" not in builder:
        width = kwargs["embed_dim"]
    return Fit(
        builder=builder,
        kwargs=dict(kwargs),
        embed_dim=width,
        prefix=prefix,
        matched=sum(k in tensors for k in own) - len(other),
        missing=tuple(k for k in own if k not in tensors and not k.endswith("num_batches_tracked")),
        unexpected=tuple(prefix + k for k in tensors if k not in own and k.partition(".")[0] in parts),
        other_shape=other,
        names=tuple(tensors),
    )


def fits(file: WeightsFile, builders: Iterable[str] | None = None) -> list[Fit]:
    """How every candidate fits, the best first; those with nothing in common are left out."""
    return sorted(
        (f for f in _each(file, promising(file) if builders is None else builders) if f.matched),
        key=lambda f: (-f.whole, -f.share),
    )


def _each(file: WeightsFile, builders: Iterable[str]) -> Iterator[Fit]:
    """Every candidate worth a comparison, compared as it is asked for."""
    for builder, kwargs in _own(file.tensors):
        yield _compare(file, builder, kwargs)
    for builder in builders:
        yield _compare(file, builder, {})


def promising(file: WeightsFile) -> list[str]:
    """The candidates whose telling name the file has, behind any prefix."""
    return [b for b, telling in CANDIDATES.items() if any(f".{name}".endswith(f".{telling}") for name in file.tensors)]


def best_fit(file: WeightsFile) -> Fit | None:
    """The first architecture that the file fits wholly, if there is one."""
    return next((fit for fit in _each(file, promising(file)) if fit.whole), None)


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
            k for k, t in file.tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
        ],
        "first": next(iter(file.tensors), None),
        "last": next(reversed(list(file.tensors)), None),
    }

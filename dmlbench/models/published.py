"""Networks of publications that neither timm nor torchvision has, under the names that their files carry.

Each keeps its authors' names of tensors, so that a file of theirs fits as it is. What else their files hold and
use in training alone is listed in ``unused``. ``fed`` says how the authors feed it: facts of the layout, not of
one file. Written from the papers and from the shapes of the public files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dmlbench.models.published_networks import FaceNet, IResNet, OSNet, ProxyAnchorResNet, Unicom, mobilefacenet
from dmlbench.preprocess import Preprocess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Fed:
    """How a publication feeds its network and compares embeddings.

    Attributes:
        preprocess: from picture to pixels.
        mean, std: per channel, of pixels in [0, 1].
        space: the letter of the embedding space.
    """

    preprocess: Preprocess
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    space: str = "N"


def _square(size: int, **how: Any) -> Preprocess:
    return Preprocess(size=(size, size), **how)


_HALF = 127.5 / 255, 128 / 255
_FACE: dict[str, Any] = {"mean": (_HALF[0],) * 3, "std": (_HALF[1],) * 3, "space": "C"}
_REID = Fed(Preprocess(size=(256, 128)), space="E")


def _clip(size: int) -> Fed:
    return Fed(_square(size, shorter=size, interpolation="bicubic"), CLIP_MEAN, CLIP_STD)


@dataclass(frozen=True)
class Publication:
    """A network of a publication.

    Attributes:
        make: what builds it, given ``arguments`` and ``embed_dim``.
        telling: a tensor by whose name its files are known.
        last: the tensor whose first side is the width of the embedding.
        fed: how its authors feed it.
        arguments: of this size.
    """

    make: Callable[..., nn.Module]
    telling: str
    last: str
    fed: Fed
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _of_proxy_anchor(depth: int) -> Publication:
    fed = Fed(_square(224, shorter=256))
    return Publication(ProxyAnchorResNet, "model.embedding.weight", "model.embedding.weight", fed, {"depth": depth})


def _of_unicom(**arguments: int) -> Publication:
    fed = _clip(arguments.get("size", 224))
    return Publication(Unicom, "feature.0.weight", "feature.2.weight", fed, arguments)


def _of_arcface(*blocks: int) -> Publication:
    half = (0.5, 0.5, 0.5)
    fed = Fed(_square(112), half, half, "C")
    return Publication(IResNet, "layer1.0.prelu.weight", "fc.weight", fed, {"blocks": blocks})


_LARGE = {"patch": 14, "width": 1024, "depth": 24, "heads": 16, "embed_dim": 768}

PUBLISHED: dict[str, Publication] = {
    "mobilefacenet": Publication(
        mobilefacenet, "dw_conv1.prelu.weight", "linear1.conv.weight", Fed(Preprocess(size=(112, 96)), **_FACE)
    ),
    "facenet": Publication(
        FaceNet, "repeat_1.0.branch0.conv.weight", "last_linear.weight", Fed(_square(160), **{**_FACE, "space": "N"})
    ),
    **{
        f"osnet-x{text}": Publication(OSNet, "conv2.0.conv2a.conv1.weight", "fc.0.weight", _REID, {"width": width})
        for text, width in (("1_0", 1.0), ("0_75", 0.75), ("0_5", 0.5), ("0_25", 0.25))
    },
    **{f"proxyanchor-resnet{depth}": _of_proxy_anchor(depth) for depth in (18, 34, 50, 101)},
    "iresnet18": _of_arcface(2, 2, 2, 2),
    "iresnet34": _of_arcface(3, 4, 6, 3),
    "iresnet50": _of_arcface(3, 4, 14, 3),
    "iresnet100": _of_arcface(3, 13, 30, 3),
    "unicom-vitb32": _of_unicom(),
    "unicom-vitb16": _of_unicom(patch=16, embed_dim=768),
    "unicom-vitl14": _of_unicom(**_LARGE),
    "unicom-vitl14-336": _of_unicom(size=336, **_LARGE),
}


def published(name: str, embed_dim: int | None = None) -> nn.Module:
    """The network of :data:`PUBLISHED` under that name; ``embed_dim`` is the width of its embedding."""
    entry = PUBLISHED[name]
    return entry.make(**{**entry.arguments, **({"embed_dim": embed_dim} if embed_dim else {})})

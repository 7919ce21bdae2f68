"""Networks of the field's published models that no library has, each as its authors' weights want it."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _layers(**named: nn.Module) -> nn.Sequential:
    """A sequence whose members have names."""
    return nn.Sequential(OrderedDict(named))


class Residual(nn.Module):
    """``conv(x)``, and x itself added where the shapes are the same."""

    def __init__(self, conv: nn.Module, added: bool) -> None:
        super().__init__()
        self.conv = conv
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.added else self.conv(x)


def _mobile(inside: int, outside: int, stride: int, widened: int) -> nn.Module:
    """MobileFaceNet's bottleneck: widened by 1x1, 3x3 each channel alone, narrowed by 1x1."""
    middle = inside * widened
    return Residual(
        nn.Sequential(
            nn.Conv2d(inside, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.PReLU(middle),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.PReLU(middle),
            nn.Conv2d(middle, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        ),
        added=stride == 1 and inside == outside,
    )


def mobilefacenet(embed_dim: int = 128) -> nn.Module:
    """MobileFaceNet (Chen et al., CCBR 2018), (b, 3, 112, 96): the first sizes and names are Xiaoccer's."""

    def block(inside: int, outside: int, kernel: Any, stride: int = 1, pad: int = 0, groups: int = 1, last: bool = False) -> nn.Module:  # fmt: skip
        conv = nn.Conv2d(inside, outside, kernel, stride, pad, groups=groups, bias=False)
        named: dict[str, nn.Module] = {"conv": conv, "bn": nn.BatchNorm2d(outside)}
        return _layers(**named) if last else _layers(**named, prelu=nn.PReLU(outside))

    stages = ((64, 2, 2, 5), (128, 2, 4, 1), (128, 1, 2, 6), (128, 2, 4, 1), (128, 1, 2, 2))
    blocks: list[nn.Module] = []
    width = 64
    for outside, stride, widened, count in stages:
        for i in range(count):
            blocks.append(_mobile(width, outside, stride if i == 0 else 1, widened))
            width = outside
    return _layers(
        conv1=block(3, 64, 3, 2, 1),
        dw_conv1=block(64, 64, 3, 1, 1, groups=64),
        blocks=nn.Sequential(*blocks),
        conv2=block(128, 512, 1),
        linear7=block(512, 512, (7, 6), groups=512, last=True),
        linear1=block(512, embed_dim, 1, last=True),
        flat=nn.Flatten(),
    )


class _Light(nn.Module):
    """OSNet's light 3x3: a 1x1 that mixes channels, then 3x3 in each alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv2(self.conv1(x))))


def _norm(inside: int, outside: int, kernel: int = 1, stride: int = 1, pad: int = 0, relu: bool = True) -> nn.Module:
    """Convolution and batch norm, and by default ReLU."""
    named: dict[str, nn.Module] = {
        "conv": nn.Conv2d(inside, outside, kernel, stride, pad, bias=False),
        "bn": nn.BatchNorm2d(outside),
    }
    return _layers(**named, relu=nn.ReLU()) if relu else _layers(**named)


class _Gate(nn.Module):
    """How much of each channel a scale lets through; one gate for all four scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 16, 1)
        self.fc2 = nn.Conv2d(width // 16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


class _OmniScale(nn.Module):
    """OSNet's block: one to four light 3x3 in parallel, gated and added, with a shortcut."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        width = outside // 4
        self.conv1 = _norm(inside, width)
        self.conv2a = _Light(width)
        self.conv2b, self.conv2c, self.conv2d = (
            nn.Sequential(*(_Light(width) for _ in range(count))) for count in (2, 3, 4)
        )
        self.gate = _Gate(width)
        self.conv3 = _norm(width, outside, relu=False)
        self.downsample = None if inside == outside else _norm(inside, outside, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        start = self.conv1(x)
        scales = [self.gate(scale(start)) for scale in (self.conv2a, self.conv2b, self.conv2c, self.conv2d)]
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv3(sum(scales)) + shortcut)


class OSNet(nn.Module):
    """OSNet (Zhou et al., ICCV 2019), names as torchreid's; ``width`` 1, 0.75, 0.5 or 0.25.

    The embedding comes after fc, batch norm and ReLU, as torchreid tests it.
    """

    unused = ("classifier.",)

    def __init__(self, width: float = 1.0, embed_dim: int = 512) -> None:
        super().__init__()
        first, *widths = (int(w * width) for w in (64, 256, 384, 512))
        self.conv1 = _norm(3, first, 7, 2, 3)
        self.conv2 = self._stage(first, widths[0], halved=True)
        self.conv3 = self._stage(widths[0], widths[1], halved=True)
        self.conv4 = self._stage(widths[1], widths[2], halved=False)
        self.conv5 = _norm(widths[2], widths[2])
        self.fc = nn.Sequential(nn.Linear(widths[2], embed_dim), nn.BatchNorm1d(embed_dim), nn.ReLU())

    def _stage(self, inside: int, outside: int, halved: bool) -> nn.Module:
        last = [nn.Sequential(_norm(outside, outside), nn.AvgPool2d(2))] if halved else []
        return nn.Sequential(_OmniScale(inside, outside), _OmniScale(outside, outside), *last)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.conv5(self.conv4(self.conv3(self.conv2(x))))
        embedding: Tensor = self.fc(x.mean((2, 3)))
        return embedding


class ProxyAnchorResNet(nn.Module):
    """Proxy-Anchor's network (Kim et al., CVPR 2020): a ResNet, average plus maximum over places, a linear layer.

    Its files hold ImageNet's ``fc`` too, which the network never uses.
    """

    unused = ("model.fc.",)

    def __init__(self, depth: int = 50, embed_dim: int = 512) -> None:
        super().__init__()
        from torchvision import models

        self.model = models.get_model(f"resnet{depth}", weights=None)
        width = self.model.fc.in_features
        del self.model.fc
        self.model.embedding = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        x = m.layer4(m.layer3(m.layer2(m.layer1(x))))
        embedding: Tensor = m.embedding(x.mean((2, 3)) + x.amax((2, 3)))
        return embedding


class _Residual(nn.Module):
    """IResNet's block: batch norm first, and none of its sums goes through a ReLU."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, outside, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(outside), nn.PReLU(outside)
        self.conv2, self.bn3 = nn.Conv2d(outside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1:
            narrowed = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(narrowed, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut  # type: ignore[no-any-return]


class IResNet(nn.Module):
    """ArcFace's network (Deng et al., CVPR 2019) for faces of 112x112, names as InsightFace's arcface_torch."""

    def __init__(self, blocks: tuple[int, int, int, int] = (3, 4, 14, 3), embed_dim: int = 512) -> None:
        super().__init__()
        self.conv1, self.bn1, self.prelu = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        inside = 64
        for i, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
            stage = [_Residual(inside, width, 2), *(_Residual(width, width, 1) for _ in range(count - 1))]
            self.add_module(f"layer{i}", nn.Sequential(*stage))
            inside = width
        self.bn2, self.fc = nn.BatchNorm2d(512), nn.Linear(512 * 7 * 7, embed_dim)
        self.features = nn.BatchNorm1d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        embedding: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return embedding


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (b, heads, n, d / heads)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = _layers(fc1=nn.Linear(width, 4 * width), act=nn.ReLU6(), fc2=nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Unicom(nn.Module):
    """UNICOM's vision transformer (An et al., ICLR 2023): no class token; all tokens side by side go into the head."""

    def __init__(
        self, size: int = 224, patch: int = 32, width: int = 768, depth: int = 12, heads: int = 12, embed_dim: int = 512
    ) -> None:
        super().__init__()
        tokens = (size // patch) ** 2
        self.patch_embed = _layers(proj=nn.Conv2d(3, width, patch, patch))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embed_dim, bias=False),
            nn.BatchNorm1d(embed_dim, eps=2e-5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        embedding: Tensor = self.feature(self.norm(self.blocks(x)).flatten(1))
        return embedding


def _thousandth(inside: int, outside: int, kernel: Any, stride: int = 1, pad: Any = 0) -> nn.Module:
    """Convolution, batch norm with TensorFlow's epsilon 0.001, ReLU."""
    conv = nn.Conv2d(inside, outside, kernel, stride, pad, bias=False)
    return _layers(conv=conv, bn=nn.BatchNorm2d(outside, eps=0.001), relu=nn.ReLU())


class _Branches(nn.Module):
    """Parallel ``branch0``, ``branch1``, ... and, where ``pooled``, a maximum; joined by channel."""

    def __init__(self, *branches: nn.Module, pooled: bool = False) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)
        self.count = len(branches)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, f"branch{i}")(x) for i in range(self.count)]
        return torch.cat([*parts, F.max_pool2d(x, 3, 2)] if self.pooled else parts, 1)


class _Scaled(_Branches):
    """x plus ``scale`` times its branches, brought back to its width by ``conv2d``."""

    def __init__(self, *branches: nn.Module, joined: int, width: int, scale: float, last: bool = False) -> None:
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(joined, width, 1)
        self.scale = scale
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.scale * self.conv2d(super().forward(x))
        return out if self.last else F.relu(out)


class FaceNet(nn.Module):
    """Inception-ResNet v1 for faces (Schroff et al., CVPR 2015), names as facenet-pytorch's."""

    unused = ("logits.",)

    def __init__(self, embed_dim: int = 512) -> None:
        super().__init__()
        c = _thousandth
        self.conv2d_1a, self.conv2d_2a, self.conv2d_2b = c(3, 32, 3, 2), c(32, 32, 3), c(32, 64, 3, pad=1)
        self.conv2d_3b, self.conv2d_4a, self.conv2d_4b = c(64, 80, 1), c(80, 192, 3), c(192, 256, 3, 2)

        def s(*layers: nn.Module) -> nn.Module:
            return nn.Sequential(*layers)

        def small() -> nn.Module:
            two, three = s(c(256, 32, 1), c(32, 32, 3, pad=1)), s(c(256, 32, 1), *(c(32, 32, 3, pad=1) for _ in "ab"))
            return _Scaled(c(256, 32, 1), two, three, joined=96, width=256, scale=0.17)

        def middle() -> nn.Module:
            long = s(c(896, 128, 1), c(128, 128, (1, 7), pad=(0, 3)), c(128, 128, (7, 1), pad=(3, 0)))
            return _Scaled(c(896, 128, 1), long, joined=256, width=896, scale=0.1)

        def large(scale: float = 0.2, last: bool = False) -> nn.Module:
            long = s(c(1792, 192, 1), c(192, 192, (1, 3), pad=(0, 1)), c(192, 192, (3, 1), pad=(1, 0)))
            return _Scaled(c(1792, 192, 1), long, joined=384, width=1792, scale=scale, last=last)

        self.repeat_1 = s(*(small() for _ in range(5)))
        self.mixed_6a = _Branches(
            c(256, 384, 3, 2), s(c(256, 192, 1), c(192, 192, 3, pad=1), c(192, 256, 3, 2)), pooled=True
        )
        self.repeat_2 = s(*(middle() for _ in range(10)))
        self.mixed_7a = _Branches(
            s(c(896, 256, 1), c(256, 384, 3, 2)),
            s(c(896, 256, 1), c(256, 256, 3, 2)),
            s(c(896, 256, 1), c(256, 256, 3, pad=1), c(256, 256, 3, 2)),
            pooled=True,
        )
        self.repeat_3 = s(*(large() for _ in range(5)))
        self.block8 = large(1.0, last=True)
        self.last_linear = nn.Linear(1792, embed_dim, bias=False)
        self.last_bn = nn.BatchNorm1d(embed_dim, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))), 3, 2)
        x = self.repeat_1(self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(x))))
        x = self.repeat_3(self.mixed_7a(self.repeat_2(self.mixed_6a(x))))
        embedding: Tensor = self.last_bn(self.last_linear(self.block8(x).mean((2, 3))))
        return embedding

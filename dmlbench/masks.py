"""Masks: layers that make a network look robust without making it so. What the audit is tried on.

Each takes an :class:`~dmlbench.embedding.Embedder` and gives one that retrieves about as well but whose
gradient, or whose determinism, is spoilt in a way that the literature has seen in published defences
(Athalye, Carlini and Wagner, ICML 2018). They are for demonstrations and tests, never for a leaderboard.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmlbench.embedding import Embedder
from dmlbench.registry import Registry


class Front(nn.Module):
    """A function of images in [0, 1] put before a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class _Spoilt(torch.autograd.Function):
    """The images themselves, with another gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.spoil = spoil
        return images.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return ctx.spoil(gradient), None


def _pixels(steps: int) -> Callable[[Tensor], Tensor]:
    """Round to so many steps."""
    return lambda x: (x * steps).round() / steps


def _binary(x: Tensor) -> Tensor:
    return (x > 0.5).float()


def _steep(x: Tensor) -> Tensor:
    return torch.sigmoid(400.0 * (x - 0.5))


def _ripples(x: Tensor) -> Tensor:
    return x + 0.04 * torch.sin(x * 2 * math.pi * 40)


def _detached(x: Tensor) -> Tensor:
    return x.detach() + 0.0 * x


def _hidden(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g * 1e-45)  # type: ignore[no-any-return]


def _noisy(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g + 20 * g.abs().amax() * _fixed_noise(g))  # type: ignore[no-any-return]


def _flipped(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, torch.neg)  # type: ignore[no-any-return]


def _shuffled(x: Tensor) -> Tensor:
    return _Spoilt.apply(x, lambda g: g.flip(-1, -2))  # type: ignore[no-any-return]


def _fixed_noise(like: Tensor) -> Tensor:
    """Noise that is the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[1:], generator=generator).to(like.device)


def _input_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def _jitter(x: Tensor) -> Tensor:
    return torch.roll(x, int(torch.randint(-1, 2, ())), dims=-1)


def _compressed(x: Tensor) -> Tensor:
    """Like JPEG: cosine transform of the whole image, coefficients rounded."""
    n = x.shape[-1]
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    basis = torch.cos(math.pi / n * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    coded = basis @ x @ basis.t()
    return basis.t() @ ((coded * 8).round() / 8) @ basis


class Winners(nn.Module):
    """k-winners-take-all (Xiao et al., ICLR 2020): only the largest tenth of the activations passes."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        kept = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= kept)).view_as(x)


class TestDropout(nn.Module):
    """Dropout that is never switched off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.05, training=True)


def before(function: Callable[[Tensor], Tensor]) -> Callable[[Embedder], Embedder]:
    """A mask that changes the images."""

    def mask(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        twin.network = nn.Sequential(Front(function), twin.network)
        return twin

    return mask


def instead_of_relu(layer: type[nn.Module]) -> Callable[[Embedder], Embedder]:
    """A mask that takes the place of (or, for dropout, follows) every ReLU."""

    def change(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Sequential(child, layer()) if layer is TestDropout else layer())
            else:
                change(child)

    def mask(embedder: Embedder) -> Embedder:
        twin = copy.deepcopy(embedder)
        change(twin.network)
        return twin

    return mask


MASKS: Registry[Callable[[Embedder], Embedder]] = Registry(
    "mask",
    {
        "quantise-8": before(_pixels(8)),
        "quantise-16": before(_pixels(16)),
        "binarise": before(_binary),
        "steep-sigmoid": before(_steep),
        "ripples": before(_ripples),
        "compress": before(_compressed),
        "detached": before(_detached),
        "underflow": before(_hidden),
        "noisy-gradient": before(_noisy),
        "flipped-gradient": before(_flipped),
        "shuffled-gradient": before(_shuffled),
        "input-noise": before(_input_noise),
        "jitter": before(_jitter),
        "test-dropout": instead_of_relu(TestDropout),
        "k-winners": instead_of_relu(Winners),
    },
)

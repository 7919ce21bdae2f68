"""Small networks of our own, and several networks as one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def smallcnn(
    channels: int = 1, width: int = 16, embed_dim: int = 64, size: int = 8, *, batch_norm: bool = False
) -> nn.Module:
    """Three 3x3 convolutions (strides 1, 2, 2), each with an optional batch norm, and a linear layer, for 8x8 images."""
    side = (size + 3) // 4
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(after), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(
        *layers,
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

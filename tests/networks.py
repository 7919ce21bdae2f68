"""Networks with weights of their own, and checkpoints as other projects write them."""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn


def seeded(network: nn.Module, seed: int = 1) -> nn.Module:
    """The network with weights that no other network has by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return network.eval()


class ModelCheckpoint:
    """Lightning's callback, as old checkpoints name it: the type itself is a key."""


class AttributeDict(dict):  # type: ignore[type-arg]
    """Lightning's kind of hyperparameters."""


def lightning(path: Path, network: nn.Module, prefix: str = "backbone.", **extra: object) -> Path:
    """A checkpoint as PyTorch Lightning 1.x writes it."""
    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"
    import sys
    import types

    made = {c.__module__: types.ModuleType(c.__module__) for c in (ModelCheckpoint, AttributeDict)}
    for c in (ModelCheckpoint, AttributeDict):
        setattr(made[c.__module__], c.__name__, c)
    packages = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities")
    sys.modules.update({**{n: types.ModuleType(n) for n in packages}, **made})
    content = {
        "epoch": 7,
        "global_step": 368,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            ModelCheckpoint: {"best_model_score": np.float64(0.5), "dirpath": Path("/logs"), "monitor": None}
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}],
        "lr_schedulers": [],
        "hyper_parameters": AttributeDict(lr=0.001),
        "args": argparse.Namespace(dataset="cub"),
        "state_dict": OrderedDict({prefix + k: v for k, v in network.state_dict().items()} | extra),
    }
    try:
        torch.save(content, path)
    finally:
        for name in (*packages, *made):
            del sys.modules[name]
    return path


def resnet18_of_robrank() -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Linear(512, 512)
    return seeded(network)

"""Networks with weights of their own, and checkpoints as other projects write them."""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn


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


def clip_names(network: nn.Module) -> dict[str, Tensor]:
    """timm's CLIP transformer under OpenAI's names, with a text half beside it."""
    out = {"transformer.resblocks.0.ln_1.weight": torch.zeros(4), "token_embedding.weight": torch.zeros(9, 4)}
    out |= {
        "logit_scale": torch.zeros(()),
        "positional_embedding": torch.zeros(7, 4),
        "text_projection": torch.zeros(4, 4),
    }
    for name, t in network.state_dict().items():
        k = name.replace("blocks.", "transformer.resblocks.").replace("patch_embed.proj", "conv1")
        for new, old in (("norm_pre", "ln_pre"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc")):
            k = k.replace(new, old)
        k = (
            k.replace("mlp.fc2", "mlp.c_proj")
            .replace("attn.qkv.", "attn.in_proj_")
            .replace("attn.proj", "attn.out_proj")
        )
        k = "ln_post." + k.removeprefix("norm.") if k.startswith("norm.") else k
        if k == "cls_token":
            k, t = "class_embedding", t[0, 0]
        elif k == "pos_embed":
            k, t = "positional_embedding", t[0]
        elif k == "head.weight":
            k, t = "proj", t.t()
        elif k == "head.bias":
            continue
        out[f"visual.{k}"] = t.contiguous()
    return out

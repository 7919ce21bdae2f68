"""Models: architectures, weights files, and from whatever names a model to an :class:`Embedder`.

Read ``forms.py`` first: it lists the ways to name a model.
"""

from pathlib import Path
from typing import Any

from torch import nn

from dmlbench.embedding import Embedder
from dmlbench.errors import UsageError
from dmlbench.models.architectures import ARCHITECTURES, build_network, parameter_count
from dmlbench.models.behaviour import probe_images, settle
from dmlbench.models.files import read_file, read_weights
from dmlbench.models.forms import FORMS, open_model
from dmlbench.models.records import build, check_probe, space_of
from dmlbench.models.spec import ModelOptions, Spec
from dmlbench.models.weights import fill, write_weights

__all__ = [
    "ARCHITECTURES",
    "FORMS",
    "ModelOptions",
    "Spec",
    "build",
    "build_network",
    "check_probe",
    "fill",
    "load_model",
    "open_model",
    "parameter_count",
    "probe_images",
    "read_file",
    "read_weights",
    "settle",
    "space_of",
    "write_weights",
]


def load_model(model: str | Path | nn.Module, **kwargs: Any) -> Embedder:
    """A ready :class:`Embedder` from anything that names a model, or from a module.

    Args:
        model: what ``--model`` takes (see :mod:`dmlbench.models.forms`), with the fields of
            :class:`ModelOptions` as further arguments; or an ``nn.Module`` from images in [0, 1] to (b, d),
            which needs ``input_shape=(C, H, W)`` and takes the other arguments of :class:`Embedder`.

    Raises:
        UsageError: unknown name, or options that do not go together (exit code 2).
        DataError: the weights are missing, truncated, changed, or of another architecture (4).
    """
    if isinstance(model, Embedder):
        return model
    if isinstance(model, nn.Module):
        if "input_shape" not in kwargs:
            raise UsageError("a plain nn.Module needs input_shape=(channels, height, width)")
        embedder = Embedder(model, **kwargs)
        settle(embedder)
        return embedder
    return open_model(str(model), ModelOptions(**kwargs))

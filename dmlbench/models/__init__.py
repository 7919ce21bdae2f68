"""Models: architectures, weights files, and from whatever names a model to an :class:`Embedder`.

Read ``forms.py`` first: it lists the ways to name a model.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dmlbench.checkpoints import normalisation_problem
from dmlbench.embedding import Distance, Embedder, modes_kept
from dmlbench.errors import UsageError
from dmlbench.models.architectures import ARCHITECTURES, build_network, parameter_count
from dmlbench.models.behaviour import probe_images, settle
from dmlbench.models.files import read_file, read_weights
from dmlbench.models.forms import FORMS, open_model
from dmlbench.models.records import build, check_probe, space_of
from dmlbench.models.spec import ModelOptions, Spec
from dmlbench.models.weights import fill, write_weights
from dmlbench.preprocess import Preprocess

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


def load_model(
    model: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    spec: Path | None = None,
    embed_dim: int | None = None,
    head: str | None = None,
    leave_out: str | None = None,
    checkpoint_key: str | None = None,
    prefix: str | None = None,
    output_key: str | None = None,
    precision: str = "auto",
    compiled: bool = False,
    input_size: tuple[int, int] | None = None,
    resize: str | None = None,
    pad: int | None = None,
    box: tuple[int, int, int, int] | None = None,
    interpolation: str | None = None,
    order: str | None = None,
    scale: float | None = None,
    channels: int | None = None,
    mean: Sequence[float] | np.ndarray | Tensor | None = None,
    std: Sequence[float] | np.ndarray | Tensor | None = None,
    distance: str | Distance | None = None,
    normalize: bool | None = None,
    name: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: Preprocess | None = None,
) -> Embedder:
    """A ready :class:`Embedder` from anything that names a model, or from a module.

    Args:
        model: what ``--model`` takes (see :mod:`dmlbench.models.forms`), with the fields of
            :class:`ModelOptions` as further arguments; or an ``nn.Module`` from images in [0, 1] to (b, d),
            which needs ``input_shape=(C, H, W)`` and takes the other arguments of :class:`Embedder`. The module is
            used, not copied, and stays in the mode that it is in; what is measured is its eval mode.

    Raises:
        UsageError: unknown name, or options that do not go together (exit code 2).
        DataError: the weights are missing, truncated, changed, or of another architecture (4).
    """
    given = {key: value for key, value in locals().items() if key != "model"}
    usual = {"precision": "auto", "compiled": False}
    options = {
        key: value for key, value in given.items() if value is not None and not (key in usual and value == usual[key])
    }
    if isinstance(model, Embedder):
        return model
    if isinstance(model, nn.Module):
        if "input_shape" not in options:
            raise UsageError("a plain nn.Module needs input_shape=(channels, height, width)")
        _only(options, ("input_shape", "mean", "std", "distance", "name", "preprocess"), "a plain nn.Module")
        if isinstance(distance, str):
            raise UsageError(f"a plain nn.Module takes a Distance, e.g. DISTANCES['N'], not distance={distance!r}")
        with modes_kept(model):
            embedder = Embedder(model, **options)
            fed = embedder.mean.flatten().tolist(), embedder.std.flatten().tolist()
            if problem := normalisation_problem(*fed, None, way="divide by 255 those of pixels of 0 to 255"):
                raise UsageError(problem)
            settle(embedder)
        return embedder
    _only(options, [field.name for field in fields(ModelOptions)], "a model by name")
    options |= {key: tuple(options[key]) for key in ("mean", "std") if key in options}
    options |= {"weights": str(weights)} if weights is not None else {}
    return open_model(str(model), ModelOptions(**options))


def _only(options: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse options that would do nothing."""
    if unknown := [key for key in options if key not in known]:
        raise UsageError(f"{what} does not take {unknown[0]}: it takes {', '.join(known)}")

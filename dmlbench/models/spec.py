"""What a user says of a model: command-line options, and a spec file that reads like a registry entry."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dmlbench.checkpoints import Arch, Checkpoint, Embedding, Input, Normalize, first_problem
from dmlbench.embedding import DISTANCES, Distance
from dmlbench.errors import DataError, UsageError
from dmlbench.models.architectures import MOST_WIDTH
from dmlbench.preprocess import Preprocess

LARGEST_SIDE = 4096
"""Pixels along one side that a picture is scaled to."""
PRECISIONS = ("auto", "float32", "tf32", "int8", "bfloat16")


class Spec(BaseModel):
    """A model in a file of its own: the parts of a registry entry that say how to build and feed it.

    A whole entry of checkpoints.json is a spec too, and so is the checkpoint.json of a training run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: Arch
    input: Input
    normalize: Normalize = Normalize()
    embedding: Embedding = Embedding()
    title: str | None = None
    checkpoint_key: str | None = None
    output_key: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Spec":
        """The spec in a JSON file.

        Raises:
            DataError: no such file, not JSON, or not a spec; the first problem is named.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"spec {path} cannot be read: {error}") from None
        if isinstance(content, dict) and len(content) == 1:
            (content,) = content.values()  # {id: entry}, as a training run writes it
        try:
            if isinstance(content, dict) and {"files", "train", "defense"} & set(content):
                entry = Checkpoint.model_validate(content)
                return cls(**{k: getattr(entry, k) for k in ("arch", "input", "normalize", "embedding", "title")})
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"spec {path}: {first_problem(error)}") from None

    def preprocess(self) -> Preprocess:
        """How pictures become images, from the spec's ``input``."""
        return preprocess_of(self.input)


def preprocess_of(given: Input) -> Preprocess:
    """The record of a registry entry's ``input``: ``resize`` is exact, or by the shorter side where it says so.

    Raises:
        UsageError: a side above :data:`LARGEST_SIDE`, or what :class:`Preprocess` refuses.
    """
    if (largest := max(given.size, given.crop or 0, given.resize or 0)) > LARGEST_SIDE:
        raise UsageError(f"input: {largest} pixels a side, at most {LARGEST_SIDE} are allowed")
    size = (given.crop or given.size,) * 2
    if given.resize is None:
        standard = Preprocess.standard((given.channels, *size), given.interpolation)
        return Preprocess(**{**standard.describe(), "order": given.order})
    return Preprocess(
        size=size,
        resize=None if given.resize_shorter_side else (given.resize, given.resize),
        shorter=given.resize if given.resize_shorter_side else None,
        interpolation=given.interpolation,
        channels=given.channels,
        order=given.order,
    )


@dataclass(frozen=True)
class ModelOptions:
    """What may be said of a model beside its name; None keeps what the form itself knows.

    Attributes:
        weights: a file, or "pretrained".
        spec: a JSON file, see :class:`Spec`.
        embed_dim: width of the last layer, 0 to leave it out.
        checkpoint_key: where in the weights file the state dictionary is.
        output_key: which of several outputs is the embedding.
        precision: one of :data:`PRECISIONS`, for gradients.
        compiled: whether gradient steps go through torch.compile.
        input_size: (H, W) of the images.
        resize: "exact:N", "shorter:N" or "none", before the centre crop.
        interpolation: see :mod:`dmlbench.preprocess`.
        order: "rgb" or "bgr".
        channels: 1 or 3.
        mean, std: per channel.
        distance: "euclidean" or "cosine".
        normalize: whether embeddings are scaled to unit length.
        name: what results call the model.
    """

    weights: str | None = None
    spec: Path | None = None
    embed_dim: int | None = None
    checkpoint_key: str | None = None
    output_key: str | None = None
    precision: str = "auto"
    compiled: bool = False
    input_size: tuple[int, int] | None = None
    resize: str | None = None
    interpolation: str | None = None
    order: str | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    distance: str | None = None
    normalize: bool | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.embed_dim is not None and not 0 <= self.embed_dim <= MOST_WIDTH:
            raise UsageError(f"--embed-dim {self.embed_dim} must be 0 (no last layer) or more, at most {MOST_WIDTH}")
        if self.input_size is not None and max(self.input_size) > LARGEST_SIDE:
            raise UsageError(f"--input-size {self.input_size[0]}x{self.input_size[1]}: at most {LARGEST_SIDE} a side")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError("--std must be above zero")

    def fed(self, plain: Preprocess, said: bool = False) -> Preprocess:
        """``plain`` with what the options change; another size has the field's resize for that size.

        ``said`` is true where ``plain`` was stated for this model, not assumed.
        """
        channels = self.channels or plain.channels
        size = self.input_size or plain.size
        new = plain if said and size == plain.size else Preprocess.standard((channels, *size))
        resize, shorter = new.resize, new.shorter
        if self.resize is not None:
            resize, shorter = _resize(self.resize)
        return Preprocess(
            size=size,
            resize=resize,
            shorter=shorter,
            interpolation=self.interpolation or plain.interpolation,
            channels=channels,
            order=self.order or plain.order,
        )

    def space(self, plain: Distance) -> Distance:
        """The embedding space: ``plain`` with what ``distance`` and ``normalize`` change.

        Raises:
            UsageError: cosine distance of embeddings that are not to be normalised.
        """
        metric = self.distance or plain.metric
        normalized = plain.normalized if self.normalize is None else self.normalize
        if metric == "cosine" and not normalized:
            raise UsageError("--distance cosine compares directions only, so it does not go with --no-normalize")
        if metric not in ("euclidean", "cosine"):
            raise UsageError(f"distance {metric!r} must be 'euclidean' or 'cosine'")
        return DISTANCES["C" if metric == "cosine" else "N" if normalized else "E"]


def _resize(text: str) -> tuple[tuple[int, int] | None, int | None]:
    """(exact size, shorter side) of "exact:256", "shorter:256", "256" (exact) or "none"."""
    if text == "none":
        return None, None
    kind, _, number = text.rpartition(":")
    if kind not in ("", "exact", "shorter") or not number.isdecimal() or not number.strip("0"):
        raise UsageError(f"--resize {text!r} must be exact:N, shorter:N or none")
    if len(number) > 9 or int(number) > LARGEST_SIDE:
        raise UsageError(f"--resize {text!r}: N is at most {LARGEST_SIDE}")
    return (None, int(number)) if kind == "shorter" else ((int(number),) * 2, None)

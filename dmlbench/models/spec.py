"""What a user says of a model: command-line options, and a spec file that reads like a registry entry."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dmlbench.checkpoints import Arch, Checkpoint, Embedding, Input, Normalize, first_problem, normalisation_problem
from dmlbench.embedding import DISTANCES, Distance
from dmlbench.errors import DataError, UsageError
from dmlbench.models.heads import MOST_WIDTH
from dmlbench.preprocess import Preprocess

LARGEST_SIDE = 4096
"""Pixels along one side that a picture is scaled to."""
PRECISIONS = ("auto", "float32", "tf32", "int8", "bfloat16")


class Spec(BaseModel):
    """A model in a file of its own: the parts of a registry entry that say how to build and feed it.

    A whole entry of checkpoints.json is a spec too, and so is the checkpoint.json of a training run. Without ``normalize`` or
    ``embedding`` the file is fed and compared as it would be without a spec; ``"normalize": {}`` feeds pixels in [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: Arch
    input: Input
    normalize: Normalize | None = None
    embedding: Embedding | None = None
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
    """The record of a registry entry's ``input``: ``resize`` is exact, or by the side that it says.

    Raises:
        UsageError: a side above :data:`LARGEST_SIDE`, or what :class:`Preprocess` refuses.
    """
    height, width = (given.size, given.size) if isinstance(given.size, int) else given.size
    if (largest := max(height, width, given.crop or 0, given.resize or 0)) > LARGEST_SIDE:
        raise UsageError(f"input: {largest} pixels a side, at most {LARGEST_SIDE} are allowed")
    size = (given.crop,) * 2 if given.crop else (height, width)
    way = "shorter" if given.resize_shorter_side else "longest" if given.resize_longest_side else "exact"
    if given.squash:
        plain = Preprocess(size, channels=given.channels)
    elif given.resize is None:
        plain = Preprocess.standard((given.channels, *size))
    else:
        plain = resized(Preprocess(size, channels=given.channels), way, given.resize, given.pad)
    return replace(plain, interpolation=given.interpolation, order=given.order, box=given.box)


def input_of(plain: Preprocess) -> Input:
    """The record that :func:`preprocess_of` reads as ``plain``, in as few words as will do.

    Raises:
        UsageError: a record has no words for it: a picture scaled to two sides of its own before the cut.
    """
    height, width = plain.size
    way: dict[str, object] = {}
    if plain.longest is not None:
        way = {"resize": plain.longest, "resize_longest_side": True, "pad": plain.pad}
    elif plain.shorter is not None:
        way = {"resize": plain.shorter, "resize_shorter_side": True}
    elif plain.resize != Preprocess.standard(plain.shape).resize:
        way = {"squash": True} if plain.resize is None else {"resize": plain.resize[0]}
    stated = Input(
        size=height if height == width else (height, width),
        channels=plain.channels,
        interpolation=plain.interpolation,
        order=plain.order,  # type: ignore[arg-type]
        box=plain.box,
        **way,  # type: ignore[arg-type]
    )
    if preprocess_of(stated) != plain:
        raise UsageError(f"no record says how these pictures are prepared: {plain}")
    return stated


def resized(plain: Preprocess, way: str, pixels: int, pad: int = 0) -> Preprocess:
    """``plain`` with another resize: "exact", "shorter" or "longest" side to ``pixels``."""
    return replace(
        plain,
        resize=(pixels, pixels) if way == "exact" else None,
        shorter=pixels if way == "shorter" else None,
        longest=pixels if way == "longest" else None,
        pad=pad,
    )


@dataclass(frozen=True)
class ModelOptions:
    """Options of a model besides its name; None keeps the default of the model's form.

    Attributes:
        weights: a file, or "pretrained".
        spec: a JSON file, see :class:`Spec`.
        embed_dim: width of the last layer, 0 to leave it out.
        checkpoint_key: where in the weights file the state dictionary is.
        output_key: which of several outputs is the embedding.
        precision: one of :data:`PRECISIONS`, for gradients.
        compiled: whether gradient steps go through torch.compile.
        input_size: (H, W) of the images.
        head: the layer of the weights file that is put in place of the network's last one.
        leave_out: parts of the weights file that the embedding is to do without, by comma.
        prefix: what stands before the network's names in the weights file.
        resize: "exact:N", "shorter:N" or "none" before the centre crop, or "longest:N" and padding.
        pad: the grey of the padding, 0 to 255.
        box: (left, top, right, bottom) cut from each picture first.
        scale: 255 for networks that are fed pixels of 0 to 255; mean and std are in the same units.
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
    head: str | None = None
    leave_out: str | None = None
    checkpoint_key: str | None = None
    prefix: str | None = None
    output_key: str | None = None
    precision: str = "auto"
    compiled: bool = False
    input_size: tuple[int, int] | None = None
    resize: str | None = None
    pad: int | None = None
    box: tuple[int, int, int, int] | None = None
    interpolation: str | None = None
    order: str | None = None
    scale: float | None = None
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
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UsageError("--scale must be above zero")
        if problem := normalisation_problem(self.mean, self.std, self.scale, "--"):
            raise UsageError(problem)

    @property
    def keeps_claims(self) -> bool:
        """Whether what an author claims of a model's embeddings is still of this one: neither its input nor its output is scaled otherwise."""
        return all(
            value is None for value in (self.mean, self.std, self.scale, self.normalize, self.distance, self.head)
        )

    def fed(self, plain: Preprocess, stated: bool = False) -> Preprocess:
        """``plain`` with what the options change; another size has the field's resize for that size.

        ``stated`` is True if ``plain`` was stated for this model, not assumed.
        """
        channels = self.channels or plain.channels
        size = self.input_size or plain.size
        new = plain if stated and size == plain.size else Preprocess.standard((channels, *size))
        if self.resize == "none":
            new = Preprocess(size)
        elif self.resize is not None:
            new = resized(new, *_resize(self.resize))
        if self.pad is not None and new.longest is None:
            raise UsageError("--pad is the grey around a picture whose longest side is scaled: --resize longest:N")
        return replace(
            new,
            size=size,
            interpolation=self.interpolation or plain.interpolation,
            channels=channels,
            order=self.order or plain.order,
            pad=new.pad if self.pad is None else self.pad,
            box=self.box or plain.box,
        )

    def normalisation(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std for pixels in [0, 1], per channel: those given, changed by the options; one number serves all.

        Raises:
            UsageError: another number of values than channels.
        """
        given = Normalize(mean=self.mean, std=self.std, scale=self.scale or 1.0).of_unit()
        fitted = []
        for what, value, default in zip(("mean", "std"), given, (mean, std), strict=True):
            values = value or default
            if values is not None and len(values) not in (1, channels):
                raise UsageError(f"--{what} has {len(values)} values for {channels} channels")
            fitted.append(values * channels if values is not None and len(values) == 1 else values)
        return fitted[0], fitted[1]

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


def _resize(text: str) -> tuple[str, int]:
    """(way, pixels) of "exact:256", "shorter:256", "longest:224" or "256" (exact)."""
    kind, _, number = text.rpartition(":")
    if kind not in ("", "exact", "shorter", "longest") or not number.isdecimal() or not number.strip("0"):
        raise UsageError(f"--resize {text!r} must be exact:N, shorter:N, longest:N or none")
    if len(number) > 9 or int(number) > LARGEST_SIDE:
        raise UsageError(f"--resize {text!r}: N is at most {LARGEST_SIDE}")
    return kind or "exact", int(number)

"""checkpoints.json: what each registered model is (never what was measured), and its files.

One JSON file at the repository root is the source; the wheel carries it. Every record is validated
and unknown keys are refused. Our own files are safetensors; other people's are what they published. Size and hash,
as far as they are known, are checked before a file is read.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmlbench.errors import DataError, UsageError
from dmlbench.registry import suggest

SCHEMA_VERSION = 1
PACKAGE = Path(__file__).resolve().parent
ID = r"^[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?$"
"""What the id of a model, and of a submission, may be: one spelling, in every alphabet, file system and command line."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Defense(_Record):
    """Which defence trained the model, and its parameters; name "none" for none."""

    name: str
    params: dict[str, Any] = {}


class Train(_Record):
    """How it was trained, as far as known, and the command that does it again.

    With the same version of torch and as many threads (on a CPU; None elsewhere) on a machine of the same kind, the
    command gives the same bytes; otherwise sums are rounded in another order, and training ends elsewhere.
    """

    loss: str
    eps: str | None = None
    steps: int | None = None
    epochs: int | None = None
    iterations: int | None = None
    seed: int | None = None
    command: str | None = None
    torch: str | None = None
    threads: int | None = None


class Arch(_Record):
    """The network: a name of :data:`dmlbench.models.ARCHITECTURES` (or ``timm:``/``torchvision:``) and its arguments."""

    builder: str
    kwargs: dict[str, Any] = {}
    embed_dim: int
    head: bool = True
    """false: the network's features, without its last layer"""
    n_params: int | None = None


class File(_Record):
    """One weights file: ``path`` inside the package's ``weights`` folder, or addresses in order.

    An address that begins with ``{base}/`` is looked for where ``DMLBENCH_CHECKPOINT_BASE`` says (an
    address or a folder), then in the repository's ``checkpoints`` folder.

    ``manual`` says how to get a file that cannot be fetched by a program.

    ``hash`` is what its publisher says of it where that is no whole sha256: a kind and the first digits or all of
    them, such as ``"sha256:f37072fd"`` or ``"md5:e82633"``. A file without ``sha256`` is trusted when it is first
    fetched: its sha256 is stored with it, and later copies must have the same.
    """

    path: str | None = None
    url: str | None = None
    mirrors: tuple[str, ...] = ()
    manual: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    hash: str | None = Field(default=None, pattern=r"^(sha256:[0-9a-f]{6,64}|md5:[0-9a-f]{6,32})$")
    bytes: int | None = None
    format: Literal["safetensors", "torch", "lightning"] = "safetensors"


class Input(_Record):
    """The image the network sees: side length and channels, and how to get there from a file."""

    size: int | tuple[int, int]
    """one side of a square, or height and width"""
    channels: int
    resize: int | None = None
    """what the whole picture is resized to before the centre crop, aspect not kept"""
    resize_shorter_side: bool = False
    """``resize`` is the shorter side instead, aspect kept"""
    resize_longest_side: bool = False
    """``resize`` is the longest side instead, aspect kept, and what lacks to ``size`` is padded"""
    pad: int = 0
    """the grey of the padding, 0 to 255"""
    squash: bool = False
    """the whole picture is scaled to ``size``, aspect not kept, and nothing is cut"""
    box: tuple[int, int, int, int] | None = None
    """left, top, right, bottom in pixels, cut from the picture first"""
    crop: int | None = None
    interpolation: str = "bilinear"
    order: Literal["rgb", "bgr"] = "rgb"

    @model_validator(mode="after")
    def _one_way(self) -> "Input":
        if sum((self.resize_shorter_side, self.resize_longest_side, self.squash)) > 1:
            raise ValueError("resize_shorter_side, resize_longest_side and squash exclude each other")
        if self.resize is None and (self.resize_shorter_side or self.resize_longest_side):
            raise ValueError("resize_shorter_side and resize_longest_side need resize, in pixels")
        if self.squash and self.resize is not None:
            raise ValueError("squash scales to size itself: leave resize out")
        if self.pad and not self.resize_longest_side:
            raise ValueError(
                "pad is the grey around a picture whose longest side is scaled: it needs resize_longest_side"
            )
        return self


def normalisation_problem(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    scale: float | None,
    dash: str = "",
    way: str = "scale 255 says that mean and std are of pixels of 0 to 255",
) -> str | None:
    """Why no network is fed by mean and std, or None.

    Args:
        scale: what white is in their units; None where nobody says it, which is 1.
        dash: what stands before the names of options.
        way: how such values of pixels of 0 to 255 are given.
    """
    if std is not None and not all(value > 0 for value in std if not math.isnan(value)):
        return f"{dash}std must be above zero"
    for what, values in (("mean", mean or ()), ("std", std or ())):
        if not all(map(math.isfinite, values)):
            return f"{dash}{what} must be finite"
        if scale is None and max(values, default=0) > 1:
            return f"{dash}{what} {max(values):g} is above 1, and pixels are in [0, 1]: {dash}{way}"
    return None


class Normalize(_Record):
    """Mean and std per channel, applied inside the model after the perturbation.

    Both are in units of pixels in [0, ``scale``]: 255 for networks (Caffe's) that are fed pixels of 0 to 255.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> "Normalize":
        scale = self.scale if "scale" in self.model_fields_set else None
        if problem := normalisation_problem(self.mean, self.std, scale):
            raise ValueError(problem)
        return self

    def of_unit(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std for pixels in [0, 1]."""
        std = self.std or (None if self.scale == 1 else (1.0,))
        mean, std = (None if v is None else tuple(value / self.scale for value in v) for v in (self.mean, std))
        return mean, std


class Embedding(_Record):
    """The embedding space."""

    normalized: bool = True
    metric: Literal["euclidean", "cosine"] = "euclidean"
    lipschitz: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """L of which its author claims that embeddings, as they are compared, are at most L times as far apart as pixels in [0, 1], L2"""


class DatasetRef(_Record):
    """What it was trained on."""

    name: str
    split: str = "train"


class Paper(_Record):
    """Where the defence was published."""

    title: str
    url: str | None = None
    venue: str | None = None
    year: int | None = None
    bibtex: str | None = None


class Claim(_Record):
    """A number somebody else reports for this model; never mixed with measured ones.

    ``protocol`` "clean" is no attack; ``dataset`` is where it was measured, by default the one it was trained on.
    """

    protocol: str
    metric: str
    dataset: str | None = None
    value: float
    source: str


class Probe(_Record):
    """A fixed input and what the model must give for it: catches wrong preprocessing in a second.

    The input is :func:`dmlbench.models.probe_images`; ``embedding`` holds the first values of its
    first embedding.
    """

    inputs_sha256: str
    embedding: tuple[float, ...]
    atol: float = 1e-4
    recall_at_1: float | None = None


class Checkpoint(_Record):
    """One registered model."""

    title: str
    status: Literal["active", "superseded", "retracted"] = "active"
    superseded_by: str | None = None
    reason: str | None = None
    defense: Defense
    train: Train
    arch: Arch
    files: tuple[File, ...] = ()
    input: Input
    normalize: Normalize = Normalize()
    embedding: Embedding = Embedding()
    dataset: DatasetRef
    extra_training_data: str | None = None
    license: str
    paper: Paper | None = None
    claims: tuple[Claim, ...] = ()
    probe: Probe | None = None

    @property
    def family(self) -> str:
        """What people call its architecture, without the package that builds it."""
        name = re.sub("^(proxyanchor|unicom)-", "", self.arch.builder.rpartition(":")[2])
        sides = re.match(r"vit_?(\w)(?:[a-z]*_patch|_?)(\d+)", name)
        return f"ViT-{sides[1].upper()}/{sides[2]}" if sides else name


class CheckpointFile(_Record):
    """The whole of checkpoints.json."""

    schema_version: Literal[1]
    checkpoints: dict[str, Checkpoint] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _successors(self) -> "CheckpointFile":
        for name, c in self.checkpoints.items():
            if (c.status == "superseded") != (c.superseded_by is not None):
                raise ValueError(f"{name}: superseded_by goes with status superseded, each needs the other")
            if c.superseded_by is not None and c.superseded_by not in self.checkpoints:
                raise ValueError(f"{name}: superseded by {c.superseded_by!r}, which is not registered")
        return self


def packaged(name: str) -> Path:
    """A file or folder that lies at the repository root and inside the wheel (one source, copied by
    the build): the wheel's copy if this is an installed package, else the repository's."""
    inside = PACKAGE / "_root" / name
    return inside if inside.exists() else PACKAGE.parent / name


def problems_of(error: ValidationError) -> list[tuple[str, str]]:
    """Where and what each problem of a pydantic error is; where is "" for one of the whole record."""
    return [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line: where, what."""
    return ": ".join(text for text in problems_of(error)[0] if text)


@lru_cache
def _read(path: Path, stamp: float) -> CheckpointFile:
    try:
        return CheckpointFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def own_registry() -> Path | None:
    """The file that ``DMLBENCH_CHECKPOINTS`` names instead of the packaged registry; None where it names none."""
    named = os.environ.get("DMLBENCH_CHECKPOINTS")
    return Path(named).expanduser() if named else None


def checkpoints() -> dict[str, Checkpoint]:
    """Every registered model by id, of the packaged registry or :func:`own_registry`."""
    path = own_registry() or packaged("checkpoints.json")
    return _read(path, path.stat().st_mtime if path.exists() else 0.0).checkpoints


def checkpoint(name: str) -> Checkpoint:
    """One registered model, or an error with a suggestion."""
    known = checkpoints()
    if name not in known:
        raise UsageError(f"unknown model {name!r}{suggest(name, known)}")
    return known[name]


def sha256_of(path: Path) -> str:
    """The file's sha256, read in pieces."""
    return _digest(path, "sha256")


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verified(path: Path, file: File) -> Path:
    """``path`` if it is the file that the registry names, as far as that says; else a clear error."""
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist")
    if file.bytes is not None and path.stat().st_size != file.bytes:
        raise DataError(
            f"weights file {path} has {path.stat().st_size} bytes where the registry says {file.bytes}: truncated?"
        )
    for stated in (file.sha256 and f"sha256:{file.sha256}", file.hash):
        if not stated:
            continue
        kind, _, digits = stated.partition(":")
        if not (digest := _digest(path, kind)).startswith(digits):
            raise DataError(f"weights file {path} has {kind} {digest[:12]}… where the registry says {digits[:12]}…")
    return path

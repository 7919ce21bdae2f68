"""The record every data set becomes: images, labels, which rows are queries and which the gallery."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.errors import DataError

JUNK, DISTRACTOR = -1, -2
"""Labels of images of no class: junk counts for no query, a distractor is a wrong answer to every one (Market-1501's
-1 and 0000). Neither asks, and no clustering metric looks at them."""

if TYPE_CHECKING:
    Numbers = np.ndarray
else:
    Numbers = Any  # what is read is an array; what is given may be anything that has the form of one


@runtime_checkable
class Images(Protocol):
    """Images by row: float32 in [0, 1], decoded on access."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> Float[Tensor, "b c h w"]: ...

    def content(self) -> bytes:
        """A digest of every pixel (or of what they are made from), for the data set's hash."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory as integers: pixel = value / ``top``, inverted where ``invert``."""

    array: np.ndarray
    """(N, C, H, W) uint8"""
    top: float = 255.0
    invert: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray) or self.array.dtype.kind not in "ui" or self.array.ndim != 4:
            raise DataError(f"images must be an array of integers (N, C, H, W), not {_form(self.array)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.array.shape
        return (c, h, w)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        images = torch.from_numpy(self.array[rows]).float() / self.top
        return 1.0 - images if self.invert else images

    def content(self) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.array).tobytes()).digest()

    def digests(self) -> np.ndarray:
        """(N, 32) uint8, the sha256 of each image."""
        return _each_digest(self.array)


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images held in memory as a float tensor (N, C, H, W) in [0, 1]: a user's own."""

    tensor: Tensor

    def __post_init__(self) -> None:
        t = self.tensor
        if not isinstance(t, Tensor) or t.dim() != 4 or not t.is_floating_point() or not t.numel():
            hint = "; torch.from_numpy makes one of an array" if isinstance(t, np.ndarray) else ""
            raise DataError(f"images must be a float tensor (N, C, H, W), not {_form(t)}{hint}")
        t = t.detach().cpu()
        object.__setattr__(self, "tensor", t)
        if not bool(torch.isfinite(t).all()) or float(t.min()) < 0 or float(t.max()) > 1:
            raise DataError("images must lie in [0, 1]; mean and std belong to the model, not the data")

    @property
    def shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.tensor.shape
        return (c, h, w)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return self.tensor[torch.from_numpy(np.asarray(rows))].float()

    def content(self) -> bytes:
        return hashlib.sha256(self.tensor.float().contiguous().numpy().tobytes()).digest()

    def digests(self) -> np.ndarray:
        """(N, 32) uint8, the sha256 of each image."""
        return _each_digest(self.tensor.float().numpy())


def _form(images: object) -> str:
    """What images are, for an error: type and shape of arrays."""
    shape = tuple(getattr(images, "shape", ()))
    return f"{getattr(images, 'dtype', '')} {type(images).__name__} {shape or ''}".strip()


def _each_digest(images: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(row.tobytes()).digest() for row in images), np.uint8).reshape(-1, 32)


@dataclass(frozen=True, eq=False)
class ChosenImages:
    """A selection of rows of other images, in any order, with repetitions."""

    images: Images
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return self.images[self.rows[rows]]

    def content(self) -> bytes:
        return hashlib.sha256(self.images.content() + self.rows.astype("<i8").tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of pictures to tell of one class or of two, as a file names them: one for each query.

    Attributes:
        partner: (Q,) the row of the picture that the query is compared with, which is in the gallery.
        fold: (Q,) the part of the file that the pair is of, from 0; -1 where the file has no parts.
        sha256: of the file.
    """

    partner: np.ndarray
    fold: np.ndarray
    sha256: str


@dataclass(frozen=True, eq=False)
class RetrievalDataset:
    """One split of a retrieval data set.

    Attributes:
        name: its id, e.g. "digits".
        split: "train" or "test".
        images: rows of images.
        labels: (N,) int64, the class of each row. Whole numbers of any kind will do, booleans are 0 and 1, and
            strings are numbered in sorted order and become ``class_names``. Beside classes from 0 on there are
            -1, :data:`JUNK`, and -2, :data:`DISTRACTOR`.
        query, gallery: rows (Q,) and (G,) of the images that ask and of those that are searched; by
            default every row is both, and a query's own entry is left out of its ranking. Junk is taken out of both.
        groups: (N, G) or (N,) whole numbers: rows with the same number of 0 or more in one column do not count for each
            other, e.g. pictures of one person by one camera; -1 is in no group.
        copies_count: whether a gallery entry of the very same content as the query may be its answer, as in the
            field's numbers on its own data sets; one's own copies are left out like one's own entry.
        notes: sentences for the user about how the images were selected.
        pairs: what each query is compared with, where a file says it (:mod:`dmlbench.datasets.pairs`).
        preview: whether this is but a part of the data set, on which nothing is a full result.
        licence, source: where the images come from and on what terms.
        class_names: optional, by label.
    """

    name: str
    split: str
    images: Images
    labels: Numbers
    query: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gallery: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    licence: str = "unknown"
    source: str = ""
    class_names: Sequence[str] = ()
    groups: Numbers = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    copies_count: bool = False
    notes: Sequence[str] = ()
    preview: bool = False
    pairs: Pairs | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(self.name))
        labels, names = _labels(self.labels, f"data set {self.name!r}: labels")
        if names and len(self.class_names) and list(self.class_names) != names:
            raise DataError(f"data set {self.name!r}: labels that are strings are the class names: leave those out")
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", names or self.class_names)
        if not isinstance(self.images, Images):
            raise DataError(
                f"data set {self.name!r}: images are {_form(self.images)}: give TensorImages(tensor) or ArrayImages(array)"
            )
        n = len(self.images)
        if n == 0:
            raise DataError(f"data set {self.name!r} has no images")
        if self.labels.shape != (n,):
            raise DataError(f"data set {self.name!r}: {n} images but labels of shape {self.labels.shape}")
        if self.labels.min() < DISTRACTOR:
            raise DataError(
                f"data set {self.name!r}: a label is {self.labels.min()}; classes count from 0, {JUNK} is junk that counts "
                f"for no query, {DISTRACTOR} a distractor that is wrong for every one"
            )
        groups = _whole_numbers(
            _array(self.groups, f"data set {self.name!r}: groups"), f"data set {self.name!r}: groups"
        )
        groups = groups.reshape(n, 0) if groups.size == 0 else groups[:, None] if groups.ndim == 1 else groups
        if groups.ndim != 2 or len(groups) != n:
            raise DataError(f"data set {self.name!r}: {n} images but groups of shape {groups.shape}")
        object.__setattr__(self, "groups", groups)
        for which in ("query", "gallery"):
            rows = _array(getattr(self, which), f"data set {self.name!r}: {which} rows")
            if rows.dtype.kind == "b":
                raise DataError(f"data set {self.name!r}: {which} must be row numbers, e.g. np.flatnonzero(mask)")
            rows = _whole_numbers(rows, f"data set {self.name!r}: {which} rows")
            rows = np.arange(n) if rows.size == 0 else rows
            if rows.min() < 0 or rows.max() >= n or len(np.unique(rows)) != len(rows):
                raise DataError(f"data set {self.name!r}: {which} rows must be distinct and below {n}")
            label = self.labels[rows]
            rows = rows[label >= 0] if which == "query" else rows[label != JUNK]
            if not len(rows):
                raise DataError(f"data set {self.name!r} has no {which} image of a class")
            object.__setattr__(self, which, rows)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape))
        classes = len(np.unique(self.labels[self.labels >= 0]))
        return (
            f"<RetrievalDataset {self.name}/{self.split}, {len(self)} images {size}, {classes} classes, "
            f"{len(self.query)} queries, {len(self.gallery)} in the gallery>"
        )

    @cached_property
    def positions(self) -> np.ndarray:
        """(N,) each row's position in the gallery, -1 where it is not there."""
        positions = np.full(len(self), -1, dtype=np.int64)
        positions[self.gallery] = np.arange(len(self.gallery))
        return positions

    @property
    def position_in_gallery(self) -> np.ndarray:
        """(Q,) each query's own position in the gallery, -1 where it is not there."""
        return self.positions[self.query]

    @cached_property
    def copies(self) -> np.ndarray:
        """(N,) a number for each content that several rows have, -1 where a row is the only one of its content."""
        digests = getattr(self.images, "digests", None)
        if digests is None:  # images of somebody else's making
            return np.full(len(self), -1, dtype=np.int64)
        _, number, count = np.unique(digests(), axis=0, return_inverse=True, return_counts=True)
        number = number.reshape(-1)
        return np.where(count[number] > 1, number, -1).astype(np.int64)

    @property
    def grouped(self) -> bool:
        """Is some row in a group, such as a camera's, whose entries do not count for one another? Copies are in none of these."""
        return bool((self.groups >= 0).any())

    @cached_property
    def apart(self) -> np.ndarray | None:
        """(N, G) the groups, with one for each content that a query shares with a gallery entry not its own; None
        where no row is in any group."""
        columns = self.groups
        if not self.copies_count and len(shared := self.copies[self.query][self.copies[self.query] >= 0]):
            entries = np.bincount(self.copies[self.gallery][self.copies[self.gallery] >= 0], minlength=shared.max() + 1)
            entry = self.position_in_gallery[self.copies[self.query] >= 0] >= 0
            if (entries[shared] > entry).any():
                columns = np.concatenate([columns, self.copies[:, None]], axis=1)
        return columns if (columns >= 0).any() else None

    @cached_property
    def sha256(self) -> str:
        """Hash of pixels, labels, query and gallery rows, and groups where there are any: what a result was measured on."""
        digest = hashlib.sha256(self.images.content())
        for rows in (self.labels, self.query, self.gallery):
            digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        if self.apart is not None:
            digest.update(np.ascontiguousarray(self.apart, dtype="<i8").tobytes())
        if self.pairs is not None:
            digest.update(np.stack([self.pairs.partner, self.pairs.fold]).astype("<i8").tobytes())
        return digest.hexdigest()


def _array(values: object, what: str) -> np.ndarray:
    """An array of anything that has the form of one."""
    try:
        return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} are no array: {' '.join(str(error).split())}") from None


def _whole_numbers(values: np.ndarray, what: str) -> np.ndarray:
    """The same numbers as int64, none of them changed.

    Raises:
        DataError: one is no whole number that fits, and is named.
    """
    wrong: list[object]
    if values.dtype.kind in "bi":
        wrong = []
    elif values.dtype.kind in "uf":
        wide = values.astype(np.float64)
        wrong = values[~((np.abs(wide) < 2.0**63) & (wide == np.trunc(wide)))].tolist()
    elif values.dtype.kind == "O":
        wrong = [v for v in values.flat if not isinstance(v, int | np.integer) or not -(2**63) <= v < 2**63]
    else:
        wrong = values.ravel().tolist()
    if wrong:
        raise DataError(f"{what} must be whole numbers, not {wrong[0]!r}")
    return values.astype(np.int64)


def _labels(labels: object, what: str) -> tuple[np.ndarray, list[str]]:
    """Labels as int64, and the names of the classes where the labels were strings."""
    given = _array(labels, what)
    if given.dtype.kind == "U" and not isinstance(labels, np.ndarray):
        given = np.asarray(labels, dtype=object)  # numpy turns numbers into strings if there is a string among them
    strings = [isinstance(v, str) for v in given.flat] if given.dtype.kind in "OU" else [False]
    if given.ndim == 1 and strings and all(strings):
        return numbered([str(v) for v in given])
    if any(strings) and not all(strings):
        raise DataError(
            f"{what} must be all strings or all whole numbers, not {given.flat[strings.index(False)]!r} too"
        )
    return _whole_numbers(given, what), []


@dataclass(frozen=True)
class Counts:
    """How many images and classes a split has when it is whole."""

    images: int
    classes: int
    queries: int | None = None
    """where queries and gallery are different images"""

    def __str__(self) -> str:
        queries = "" if self.queries is None else f", {self.queries:,} of them queries"
        return f"{self.images:,} images of {self.classes:,} classes{queries}"


def counts_of(dataset: RetrievalDataset) -> Counts:
    """What a data set holds."""
    apart = len(np.intersect1d(dataset.query, dataset.gallery)) == 0
    classes = np.unique(dataset.labels[dataset.labels >= 0])
    return Counts(len(dataset), len(classes), len(dataset.query) if apart else None)


def require_counts(dataset: RetrievalDataset, expected: Counts) -> None:
    """Refuse a data set that does not have the images and classes that the field's split has.

    Raises:
        DataError: both counts are named.
    """
    if (counts := counts_of(dataset)) != expected:
        raise DataError(
            f"data set {dataset.name!r}, {dataset.split} split: found {counts} where {expected} are expected: "
            "files are missing, or not the published ones"
        )


def numbered(labels: Sequence[object]) -> tuple[np.ndarray, list[str]]:
    """Labels of any kind as 0, 1, ... without gaps, in sorted order, and the name that each number stands for."""
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return numbers.astype(np.int64).reshape(-1), [str(name) for name in names]


def folder_named(variable: str) -> Path | None:
    """The folder that an environment variable names, if it does; ``~`` is the user's own, also where no shell says so."""
    named = os.environ.get(variable)
    return Path(named).expanduser() if named else None


def user_folder() -> Path:
    """The user's own folder for data and caches: ``~/.cache/dmlbench`` (``XDG_CACHE_HOME`` is honoured)."""
    return (folder_named("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmlbench"


def data_roots() -> list[Path]:
    """Where data sets that are not inside a package are looked for, in this order: the folder that
    ``DMLBENCH_DATA`` names; where it names none, ``~/.cache/dmlbench/data``, then ``../shared/data``
    next to the working directory. ``dmlbench datasets prepare`` puts them into the first."""
    named = folder_named("DMLBENCH_DATA")
    return [named] if named else [user_folder() / "data", Path("../shared/data")]


def data_root() -> Path | None:
    """The first of :func:`data_roots` that exists."""
    return next((root for root in data_roots() if root.is_dir()), None)


def need(name: str, *parts: str) -> Path:
    """The first of ``parts`` that exists under a data root, or a clear error."""
    for root in data_roots():
        for part in parts:
            if (root / part).exists():
                return root / part
    where = " or ".join(str(root) for root in data_roots())
    raise DataError(
        f"data set {name!r} needs {parts[0]}, which is not under {where}: "
        f"'dmlbench datasets prepare {name}' gets it or says how, and DMLBENCH_DATA names another folder"
    )

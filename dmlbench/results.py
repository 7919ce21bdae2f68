"""The result of an evaluation: records, per-query arrays, and their files on disk.

A run folder holds ``evaluation.json`` (an :class:`Evaluation`), ``per_query.npz`` (arrays over
queries), ``adversarial_sample.npz`` (a few adversarial images, losslessly) and ``manifest.json``
(sizes and sha256 of the others).
"""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from dmlbench.checkpoints import first_problem, sha256_of
from dmlbench.compact import npz_bytes, read_npz, unstacked, untabulated
from dmlbench.errors import DataError, UsageError
from dmlbench.files import lock, prepare_folder, write_atomic
from dmlbench.plain import read_json

if TYPE_CHECKING:
    import pandas

    from dmlbench.board.plots import Figure

SCHEMA = 1
QUERIES = "per_query.npz"
SAMPLE = "adversarial_sample.npz"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Flag(_Record):
    """A doubt about the result: a short ``flag`` and a sentence."""

    flag: str
    message: str


class ModelInfo(_Record):
    """Which model was measured."""

    id: str
    weights_sha256: str | None = None
    arch: str | None = None
    loss: str | None = None
    defense: str | None = None
    space: str
    embed_dim: int


class DatasetInfo(_Record):
    """On which images."""

    name: str
    split: str
    sha256: str
    n_queries: int
    """queries measured"""
    n_queries_full: int
    """queries the data set has; more than n_queries in a run with --limit"""
    n_gallery: int
    n_classes: int
    n_without_positive: int = 0
    """measured queries that have no other image of their class in the gallery: left out of recall parts"""


class ProtocolInfo(_Record):
    """By which rules; ``sha256`` is the hash of the protocol's content."""

    name: str
    version: str
    sha256: str
    seed: int
    norm: str | None = None
    """in which the adversary is bounded: a name of :data:`~dmlbench.threat.BALLS`"""
    eps: tuple[str, ...] = ()
    """how far it went, ascending, on the scale of pixels in [0, 1]; empty where nothing is perturbed within a ball, and in
    results of before this was kept"""


class Environment(_Record):
    """With which software and machine."""

    dmlbench: str
    torch: str
    numpy: str
    python: str
    device: str
    device_name: str
    gradient_precision: str = "float32"
    compiled: bool = False
    """were compiled gradient steps asked for? ``notes`` says where they were not to be had"""
    notes: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()


class Measurement(_Record):
    """One part of a score.

    ``value`` is the raw mean over queries (percent where it is a share or a rank), ``score`` its
    rescaling to 0 (worst) to 100 (best), ``interval`` the 95 % interval of ``score``.
    """

    component: str
    attack: str
    optimizer: str
    readout: str
    better: Literal["higher", "lower"]
    value: float | None
    score: float | None
    interval: tuple[float, float] | None = None
    n: int
    seconds: float = 0.0


class Conditions(_Record):
    """What makes another threat of a protocol; None where it is the protocol's own."""

    eot: int | None = None
    """forward passes averaged"""
    eps: str | None = None
    """size of the perturbation, or of a grid several, joined by commas"""
    surrogate: str | None = None
    """the model that adversarial images were made on"""
    pairs: str | None = None
    """sha256 of the file of pairs that was measured instead of drawn ones"""

    @staticmethod
    def of(partial: Iterable[str]) -> "Conditions":
        """Read from the reasons why a result is partial, with or without their hyphens: as a row of a board has them, and
        results of before the record kept them."""
        words = [reason.strip().lstrip("-").partition(" ") for reason in partial]
        known = {name: value for name, _, value in words if name in Conditions.model_fields and value}
        if not known.get("eot", "").isdigit():
            known.pop("eot", None)
        return Conditions.model_validate(known)


class Evaluation(_Record):
    """The result of ``evaluate``. ``arrays`` holds what each query gave, by name, (Q,) or (Q, ...)."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    dataset: DatasetInfo
    protocol: ProtocolInfo
    environment: Environment
    partial: tuple[str, ...] = ()
    """why this is not a full result, e.g. ("--limit 64",); empty for a full one"""
    conditions: Conditions = Conditions()
    benign: dict[str, float]
    """clean metrics by name: recall_at_1, ..., map, map_at_r, nmi, ami; percent"""
    measurements: tuple[Measurement, ...]
    ers: float | None = None
    ers_interval: tuple[float, float] | None = None
    interval_version: Literal[1, 2] = 1
    """how the intervals were made: :data:`dmlbench.intervals.VERSION` of that day, 1 for results that do not say"""
    extras: dict[str, Any] = {}
    """what a protocol of another kind adds, e.g. the curve over eps of ``strict``"""
    warnings: tuple[Flag, ...] = ()
    date: str
    seconds: float
    """wall-clock time of the run, and what the searches took that an interrupted run or shards had finished before"""
    stages: dict[str, float] = {}
    """how these seconds are spread: "loading" what is measured, "embedding" everything clean, "clean metrics", "attacks"
    (the measurements' seconds and what is between them), "checks", and "before" where part was finished earlier; they add
    up to ``seconds``. Empty for results of before they were kept."""

    @model_validator(mode="after")
    def _upgraded(self) -> "Evaluation":
        """A result of before ``conditions`` were kept has them in ``partial`` alone."""
        if "conditions" not in self.model_fields_set and self.partial:
            object.__setattr__(self, "conditions", Conditions.of(self.partial))
        return self

    _arrays: dict[str, np.ndarray] = PrivateAttr(default_factory=dict)
    _sample: dict[str, np.ndarray] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether the records agree; arrays are left out."""
        return isinstance(other, Evaluation) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Per-query outcomes; see ``per_query.npz``."""
        return self._arrays

    @property
    def sample(self) -> dict[str, np.ndarray]:
        """Adversarial images of a fixed sample of queries; see ``adversarial_sample.npz``."""
        return self._sample

    def __repr__(self) -> str:
        parts = [
            f"{self.model.id} on {self.dataset.name}/{self.dataset.split}",
            f"{self.protocol.name} {self.protocol.version}",
        ]
        parts.append(f"{self.dataset.n_queries} queries")
        if "recall_at_1" in self.benign:
            parts.append(f"R@1 {self.benign['recall_at_1']:.1f}")
        if self.ers is not None:
            ends = f" ({self.ers_interval[0]:.1f} to {self.ers_interval[1]:.1f})" if self.ers_interval else ""
            parts.append(f"ERS {self.ers:.1f}{ends}")
        parts += [f"partial: {' '.join(self.partial)}"] if self.partial else []
        parts += [f"flags: {' '.join(w.flag for w in self.warnings)}"] if self.warnings else []
        return f"<Evaluation {', '.join(parts)}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The table of parts for a notebook; every text is escaped."""

        def number(value: float | None) -> str:
            return "–" if value is None else f"{value:.1f}"

        rows = [
            (m.component, number(m.score), " to ".join(map(number, m.interval or ())), str(m.n))
            for m in self.measurements
        ]
        if self.ers is not None:
            rows.append(("ERS", number(self.ers), " to ".join(map(number, self.ers_interval or ())), ""))
        lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        head = "".join(f"<th>{title}</th>" for title in ("part", "score", "95 % interval", "queries"))
        doubts = "".join(f"<p><b>{html.escape(w.flag)}</b>: {html.escape(w.message)}</p>" for w in self.warnings)
        caption = html.escape(repr(self)[1:-1])
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{''.join(lines)}</table>{doubts}"

    def to_frame(self, what: Literal["parts", "queries", "curve"] = "parts") -> "pandas.DataFrame":
        """The numbers as a pandas DataFrame.

        Args:
            what: "parts", a row for each measurement; "queries", a row for each query, with its data set row, its class and
                every outcome that is one number; "curve", a row for each eps of a protocol with a grid, eps on the [0, 1] scale.

        Raises:
            UsageError: another ``what``, or a protocol without a grid of eps.
            DataError: the queries' outcomes are not there.
        """
        import pandas

        if what == "parts":
            rows = [m.model_dump(exclude={"interval"}) for m in self.measurements]
            ends = [m.interval or (None, None) for m in self.measurements]
            frame = pandas.DataFrame(rows)
            return frame.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
        if what == "queries":
            if not self.arrays:
                raise DataError("this result does not hold the queries' own outcomes")
            return pandas.DataFrame({name: values for name, values in self.arrays.items() if values.ndim == 1})
        if what == "curve":
            from dmlbench.board.plots import eps

            curve = eps([(self.model.id, self)]).series[0]
            return pandas.DataFrame({"eps": curve.x, "value": curve.y, "low": curve.low, "high": curve.high})
        raise UsageError(f"what={what!r} must be 'parts', 'queries' or 'curve'")

    def save(self, folder: str | Path) -> Path:
        """Write the run folder; see :func:`save`."""
        return save(self, Path(folder))

    def plot(self, kind: str = "parts", **options: Any) -> "Figure":
        """One of the figures of :data:`dmlbench.board.plots.KINDS`, which a notebook shows and ``.save("x.pdf")`` writes."""
        from dmlbench.board.plots import KINDS

        return KINDS[kind]([(self.model.id, self)], **options)

    def part(self, component: str) -> Measurement:
        """The measurement of one component."""
        for m in self.measurements:
            if m.component == component:
                return m
        raise KeyError(component)

    def with_arrays(
        self, arrays: Mapping[str, np.ndarray], sample: Mapping[str, np.ndarray] | None = None
    ) -> "Evaluation":
        """Add arrays and images to this record and return it; records that were copied from it before do not get them."""
        self._arrays = {**self._arrays, **arrays}
        self._sample = {**self._sample, **(sample or {})}
        return self


def json_bytes(value: Any) -> bytes:
    """JSON as dmlbench writes it: indented, a list of numbers on one line, UTF-8, LF, no NaN."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return (re.sub(r'\[\n([^][{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n").encode()


def held(folder: Path) -> AbstractContextManager[bool]:
    """Keep the run folder from a second run for as long as the block runs; where the file system has no locks, nothing.

    Raises:
        UsageError: another process is in it.
    """
    return lock(folder, UsageError(f"another run is writing to {folder}: wait for it, or name another --out"))


def refuse_partial(folder: Path, partial: Sequence[str]) -> None:
    """Keep a full result from being replaced by one that is ``partial`` for these reasons.

    A folder without its manifest, which is written last, holds no result: the run was killed while it was written.

    Raises:
        DataError: the folder holds a full result, or one that cannot be read.
    """
    if partial and (folder / "manifest.json").exists() and not load(folder, arrays=False).partial:
        raise DataError(f"{folder} holds a full result; a partial one ({', '.join(partial)}) does not replace it")


def save(evaluation: Evaluation, folder: Path) -> Path:
    """Write the run folder; a partial result never overwrites a full one."""
    prepare_folder(folder)
    refuse_partial(folder, evaluation.partial)
    files = {
        QUERIES: npz_bytes(evaluation.arrays),
        "evaluation.json": json_bytes(evaluation.model_dump(mode="json")),
    }
    if evaluation.sample:
        files[SAMPLE] = npz_bytes(evaluation.sample)
    (folder / "manifest.json").unlink(missing_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    manifest = {
        name: {"bytes": len(content), "sha256": sha256_of(folder / name)} for name, content in sorted(files.items())
    }
    write_atomic(folder / "manifest.json", json_bytes({"schema_version": SCHEMA, "files": manifest}))
    return folder


def load(folder: Path, arrays: bool = True, sample: bool = True) -> Evaluation:
    """Read a run folder; every file that is read is checked against the manifest.

    Args:
        arrays: whether to read the per-query arrays and the sample.
        sample: whether to read the adversarial images; the board in the wheel has none.

    Raises:
        DataError: a file is missing, changed since it was written, or not what the schema says.
    """
    try:
        manifest = read_json((folder / "manifest.json").read_bytes())
        files = dict(manifest["files"])
        evaluation = Evaluation.model_validate_json((folder / "evaluation.json").read_bytes())
    except ValidationError as error:
        raise DataError(f"{folder}/evaluation.json: {first_problem(error)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        inside = f"; did you mean {folder / 'run'}?" if (folder / "run" / "evaluation.json").is_file() else ""
        raise DataError(f"{folder} is not a readable run folder: {error}{inside}") from None
    if not sample:
        files.pop(SAMPLE, None)
    for name, stated in files.items():
        path = folder / Path(name).name
        if not isinstance(stated, dict):
            raise DataError(f"{folder}/manifest.json: files.{name} is {stated!r}, not an object with bytes and sha256")
        if not path.is_file() or sha256_of(path) != stated.get("sha256"):
            raise DataError(f"{path} is missing or differs from the manifest")
    for name, unpack in ((QUERIES, untabulated), (SAMPLE, unstacked)) if arrays else ():
        if name == QUERIES or name in files:
            try:
                arrays_read = unpack(read_npz(folder / name))
            except ValueError as error:
                raise DataError(f"{folder / name}: {error}") from None
            evaluation.with_arrays(*((arrays_read,) if name == QUERIES else ({}, arrays_read)))
    return evaluation


def finite(value: float) -> float | None:
    """The number, or None where it is not one: results hold no NaN."""
    return float(value) if math.isfinite(value) else None

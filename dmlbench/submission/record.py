"""``submission.yaml``: who submits what, under which licence, and what the submitter says it scored."""

import datetime
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from dmlbench.board.row import Percent, Row, Sha256, Text, Url, plain_text
from dmlbench.checkpoints import ID, Checkpoint, DatasetRef, checkpoints, problems_of
from dmlbench.errors import Problem, UsageError
from dmlbench.kinds.table import numbers
from dmlbench.metrics import CLEAN_METRICS
from dmlbench.models.defended import FORM, named
from dmlbench.plain import read_yaml
from dmlbench.registry import suggest
from dmlbench.results import DatasetInfo, Environment, Evaluation, Measurement, ModelInfo
from dmlbench.submission.bundle import Refused, refuse

LICENSES = (
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "ISC",
    "LGPL-3.0-only",
    "MIT",
    "MPL-2.0",
)
"""SPDX names of the licences under which weights may be submitted."""

LONG_TEXT = ("bibtex", "command", "manual")
"""Fields that hold more than a line and never reach a table."""

LEAST_PROBE = 4
MOST_ATOL = 1e-2
"""A looser probe would agree with anything."""

FILL_IN = "FILL-IN"
"""What ``submit init`` writes where a person has to say something."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Stated(_Record):
    """What is stated of a run of any kind."""

    protocol: Text
    protocol_sha256: Sha256
    dataset: Text
    dataset_sha256: Sha256
    weights_sha256: Sha256
    recall_at_1: Percent
    ers: float | None = None


RANKING = {name: number for name, number in numbers().items() if number.ranks}
"""What a submission states where its protocol has no ERS, by its column."""

if TYPE_CHECKING:
    Stated = _Stated
else:
    Stated = create_model("Stated", __base__=_Stated, __doc__="What the submitter says the run shows; checked against the run.", **{
        name: (Row.model_fields[name].annotation, None) for name in RANKING
    })  # fmt: skip

Id = Annotated[str, Field(pattern=ID)]
"""The name of a model or a submission, which is also a folder's, and is typed in commands."""


class TrainedOn(DatasetRef):
    """What a submitted model was trained on: no image of a test split."""

    split: Literal["train"] = "train"


class Submitted(Checkpoint):
    """The record of a submitted model."""

    dataset: TrainedOn


class Submission(_Record):
    """The whole of submission.yaml."""

    schema_version: Literal[1]
    id: Id
    title: Text
    authors: Annotated[tuple[Text, ...], Field(min_length=1, max_length=50)]
    code_url: Url | None = None
    retracted: Text | None = None
    """why it was withdrawn; the row stays, without a rank"""
    stated: Stated
    checkpoint: Submitted


def read_submission(raw: bytes) -> Submission:
    """A checked submission.

    Raises:
        Refused: with every field that is wrong.
    """
    file = "submission.yaml"
    try:
        content = read_yaml(raw)
    except ValueError as error:
        raise refuse(0, file, f"is not plain YAML: {error}") from None
    if not isinstance(content, dict):
        raise refuse(0, file, "is not a mapping of fields")
    try:
        submission = Submission.model_validate(content)
    except ValidationError as error:
        raise Refused(Problem(0, f"{file} {place}", text) for place, text in problems_of(error)) from None
    problems = [Problem(0, f"{file} {where}", why) for where, why in _text_problems(content)]
    license_name, sha256 = submission.checkpoint.license, submission.stated.weights_sha256
    named = {
        c.license for c in checkpoints().values() if c.files and c.files[0].sha256 == sha256
    }  # of another publisher
    if license_name not in LICENSES and license_name not in named:
        text = f"{license_name!r} is not one of the accepted SPDX names{suggest(license_name, LICENSES)}"
        problems.append(Problem(0, f"{file} checkpoint.license", text))
    probe = submission.checkpoint.probe
    if probe is None or len(probe.embedding) < LEAST_PROBE:
        problems.append(Problem(0, f"{file} checkpoint.probe", f"needs {LEAST_PROBE} or more values of the embedding"))
    elif not 0 < probe.atol <= MOST_ATOL:
        problems.append(
            Problem(0, f"{file} checkpoint.probe.atol", f"{probe.atol} is not above 0 and at most {MOST_ATOL}")
        )
    if problems:
        raise Refused(problems)
    return submission


def _moment(text: str) -> str:
    """``text`` if it is a time with its zone, of ISO 8601."""
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("has no time zone")
    return text


def _every_clean(metrics: dict[str, float]) -> dict[str, float]:
    required = {name for name, metric in CLEAN_METRICS.items() if not metric.grouped}
    if wrong := sorted((required - metrics.keys()) | (metrics.keys() - CLEAN_METRICS.keys())):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in required else 'none of the clean metrics'}")
    return metrics


def _model_name(name: str) -> str:
    """``name`` if it is an id, or one behind defences that this installation has, written as a run writes them."""
    try:
        wrappers, network = named(name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if not re.fullmatch(ID, network):
        raise ValueError(f"String should match pattern '{ID}'")
    if "".join(f"{FORM}{w}:" for w in wrappers) + network != name:
        raise ValueError(f"{name!r} is not how a run writes that defence")
    if any(w.naive for w in wrappers):
        raise ValueError("was attacked as if nobody knew its defence")
    return name


Some = Annotated[int, Field(ge=1, le=10**8)]
Seconds = Annotated[float, Field(ge=0, le=10**9)]
Note = Annotated[str, Field(max_length=1000)]


class RunModel(ModelInfo):
    """The model of a submitted run."""

    id: Annotated[str, AfterValidator(_model_name)]
    weights_sha256: Sha256
    arch: Text | None = None
    loss: Text | None = None
    defense: Text | None = None
    space: Literal["N", "C", "E"]
    embed_dim: Annotated[int, Field(ge=1, le=10**6)]


class RunImages(DatasetInfo):
    """The images of a submitted run."""

    name: Id
    split: Literal["test"]
    sha256: Sha256
    n_queries: Some
    n_queries_full: Some
    n_gallery: Some
    n_classes: Some
    n_without_positive: Annotated[int, Field(ge=0, le=10**8)] = 0


class RunMachine(Environment):
    """The software and machine of a submitted run."""

    dmlbench: Text
    torch: Text
    numpy: Text
    python: Text
    device: Text
    device_name: Text
    gradient_precision: Text = "float32"
    notes: Annotated[tuple[Note, ...], Field(max_length=100)] = ()
    argv: Annotated[tuple[Note, ...], Field(max_length=1000)] = ()


class RunPart(Measurement):
    """A part of a submitted run."""

    n: Annotated[int, Field(ge=0, le=10**8)]
    seconds: Seconds = 0.0


class SubmittedRun(Evaluation):
    """``run/evaluation.json`` as the board takes it: what :class:`~dmlbench.results.Evaluation` says, within bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: RunModel
    dataset: RunImages
    environment: RunMachine
    benign: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100.001)]], AfterValidator(_every_clean)]
    measurements: tuple[RunPart, ...]
    date: Annotated[
        str,
        Field(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}(Z|[+-][0-9]{2}:[0-9]{2})$"),
        AfterValidator(_moment),
    ]
    seconds: Seconds


def _text_problems(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file that a table could not show as it is, or that nobody has filled in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _text_problems(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from _text_problems(item, f"{where}.{n}")
    elif isinstance(value, str):
        if FILL_IN in value:
            yield where, "has not been filled in"
        leaf = where.rpartition(".")[2]
        ours = re.fullmatch(r"\{base\}/[\w.-]+", value)  # as registered weights that are fetched say it
        if leaf in ("url", "mirrors") and not ours and not value.startswith("https://"):
            yield where, "is not an https:// address"
        lines = value.splitlines() if leaf in LONG_TEXT else [value]
        for line in lines:
            try:
                plain_text(line.strip().lstrip("@") if leaf in LONG_TEXT else line)
            except ValueError as error:
                yield where, str(error)

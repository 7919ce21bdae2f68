"""``submission.yaml``: who submits what, under which licence, and what the submitter says it scored."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmlbench.board.row import Percent, Sha256, Text, Url, plain_text
from dmlbench.checkpoints import Checkpoint
from dmlbench.registry import suggest
from dmlbench.submission.bundle import Problem, Refused, refuse

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


class Stated(_Record):
    """What the submitter says the run shows; checked against the run."""

    protocol: Text
    protocol_sha256: Sha256
    dataset: Text
    dataset_sha256: Sha256
    weights_sha256: Sha256
    recall_at_1: Percent
    ers: float | None = None
    smallest_eps: float | None = None
    worst_case_area: Percent | None = None
    clustering_ami_attacked: float | None = None


STATED_EXTRA = ("smallest_eps", "worst_case_area", "clustering_ami_attacked")
"""What a submission states where its protocol has no ERS."""


class Submission(_Record):
    """The whole of submission.yaml."""

    schema_version: Literal[1]
    id: Annotated[str, Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$", max_length=80)]
    title: Text
    authors: Annotated[tuple[Text, ...], Field(min_length=1, max_length=50)]
    code_url: Url | None = None
    retracted: Text | None = None
    """why it was withdrawn; the row stays, without a rank"""
    stated: Stated
    checkpoint: Checkpoint


class _Loader(yaml.SafeLoader):
    """Plain YAML without anchors, and with each key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is there twice")
        return super().construct_mapping(node, deep)


def read_submission(raw: bytes) -> Submission:
    """A checked submission.

    Raises:
        Refused: with every field that is wrong.
    """
    file = "submission.yaml"
    try:
        content = yaml.load(raw.decode("utf-8"), Loader=_Loader)  # a SafeLoader: no tag makes an object
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise refuse(0, file, f"is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise refuse(0, file, "is not a mapping of fields")
    try:
        submission = Submission.model_validate(content)
    except ValidationError as error:
        raise Refused(
            Problem(0, f"{file} {'.'.join(map(str, e['loc']))}", e["msg"].removeprefix("Value error, "))
            for e in error.errors()
        ) from None
    problems = [Problem(0, f"{file} {where}", why) for where, why in _text_problems(content)]
    license_name = submission.checkpoint.license
    if license_name not in LICENSES:
        said = f"{license_name!r} is not one of the accepted SPDX names{suggest(license_name, LICENSES)}"
        problems.append(Problem(0, f"{file} checkpoint.license", said))
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

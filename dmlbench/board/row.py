"""One row of the board: its columns, typed and versioned, and how it is made from an evaluation.

The order of :class:`Row`'s fields is the order of the CSV's columns. Shares and ranks are percent, 0
to 100; an empty cell is a missing number, never zero. Text that a spreadsheet would execute or a
browser would read as HTML is refused, so a cell can be shown anywhere.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from dmlbench.board.adversary import sizes_of
from dmlbench.checkpoints import Checkpoint, checkpoints
from dmlbench.intervals import VERSION, Ends
from dmlbench.kinds.base import Count, Percent
from dmlbench.kinds.table import KINDS, kind_of, numbers, numbers_of
from dmlbench.metrics import CLEAN_METRICS
from dmlbench.models.defended import behind, network_of
from dmlbench.protocol import score_intervals
from dmlbench.protocols import packaged_protocol
from dmlbench.registry import PLUGINS
from dmlbench.results import Evaluation
from dmlbench.run.looks import mean_interval
from dmlbench.threat import length

PARTS = {
    "CA+": "ca_plus",
    "CA-": "ca_minus",
    "QA+": "qa_plus",
    "QA-": "qa_minus",
    "TMA": "tma",
    "ES:D": "es_d",
    "ES:R": "es_r",
    "LTM": "ltm",
    "GTM": "gtm",
    "GTT": "gtt",
}
"""The ten parts of ERS and what their columns begin with: ``<part>_raw`` and ``<part>_score``."""

STATUSES = {
    "local": "measured with this benchmark on some machine; nobody else has looked at it",
    "claimed": "stated by a paper or a README; nobody has measured it with this benchmark",
    "reproduced": "measured with this benchmark by the submitter; files, invariants and samples were checked",
    "verified": "measured again, in full, by somebody else, and it agreed",
    "disputed": "measured again, and it did not agree",
    "stale": "of a protocol or a model that has been superseded",
    "retracted": "withdrawn",
}
"""What stands behind a row, in words."""

RANKED = ("local", "reproduced", "verified")
"""The statuses that a rank is given to: measured, current and undisputed."""


EXECUTED = ("=", "+", "-", "@")
"""What a cell begins with that a spreadsheet would execute."""


def plain_text(value: str) -> str:
    """``value`` if no spreadsheet would execute it and no browser would read it as HTML."""
    if value.startswith(EXECUTED):
        raise ValueError(f"starts with {value[0]!r}, which a spreadsheet would execute")
    if re.search(r"[\x00-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]", value):
        raise ValueError("holds a control character")
    if re.search(r"[<>]", value):
        raise ValueError("holds '<' or '>', which a browser would read as HTML")
    if value != value.strip():
        raise ValueError("begins or ends with white space")
    return value


def without_at(value: str) -> str:
    """``value`` if it has no ``@``, which stands between a model and its file in ``compare MODEL@FILE.csv``."""
    if "@" in value:
        raise ValueError("holds '@', which stands before a file's name in MODEL@FILE.csv; --name gives another name")
    return value


def web_address(value: str) -> str:
    """``value`` if it is a plain https address."""
    if not re.fullmatch(r"https://[A-Za-z0-9.-]+(:[0-9]+)?(/[^\s\"'<>\\]*)?", value):
        raise ValueError("is not a plain https:// address")
    return value


Text = Annotated[str, Field(max_length=300), AfterValidator(plain_text)]
ModelName = Annotated[Text, AfterValidator(without_at)]
Url = Annotated[str, Field(max_length=500), AfterValidator(web_address)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["local", "claimed", "reproduced", "verified", "disputed", "stale", "retracted"]


class _Before(BaseModel):
    """The columns before those of the kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Annotated[Literal[2], BeforeValidator(lambda v: int(v) if str(v).isdigit() else v)] = 2
    protocol: Text
    protocol_version: Text | None = None
    protocol_sha256: Sha256 | None = None
    """empty for a claimed row: nobody knows by which code it was measured"""
    model: ModelName
    weights_sha256: Sha256 | None = None
    dataset: Text
    split: Text | None = None
    dataset_sha256: Sha256 | None = None
    arch: Text | None = None
    loss: Text | None = None
    defense: Text | None = None
    paper: Text | None = None
    paper_url: Url | None = None
    license: Text | None = None
    source: Text | None = None
    """where a claimed number was read"""
    submission: Text | None = None
    """the folder under leaderboard/submissions that the row was made from"""
    recall_at_1: Percent | None = None
    recall_at_2: Percent | None = None
    map: Percent | None = None
    map_at_r: Percent | None = None
    nmi: Percent | None = None
    ami: Annotated[float, Field(ge=-100, le=100)] | None = None
    ca_plus_raw: Percent | None = None
    ca_plus_score: float | None = None
    ca_minus_raw: Percent | None = None
    ca_minus_score: float | None = None
    qa_plus_raw: Percent | None = None
    qa_plus_score: float | None = None
    qa_minus_raw: Percent | None = None
    qa_minus_score: float | None = None
    tma_raw: Annotated[float, Field(ge=-1.0001, le=1.0001)] | None = None
    tma_score: float | None = None
    es_d_raw: Annotated[float, Field(ge=0)] | None = None
    es_d_score: float | None = None
    es_r_raw: Percent | None = None
    es_r_score: float | None = None
    ltm_raw: Percent | None = None
    ltm_score: float | None = None
    gtm_raw: Percent | None = None
    gtm_score: float | None = None
    gtt_raw: Percent | None = None
    gtt_score: float | None = None
    ers: float | None = None
    ers_lo: float | None = None
    ers_hi: float | None = None
    worst_part: Text | None = None


if TYPE_CHECKING:
    _Columns = _Before
else:
    PLUGINS.load(now=True)  # a kind that came later would have no columns
    _Columns = create_model("_Columns", __base__=_Before, **{
        name: (column.annotation, column)
        for kind in KINDS.values()
        for name, column in (kind.columns.model_fields if kind.columns else {}).items()
    })  # fmt: skip


class Row(_Columns):
    """One model under one protocol on one data set; the columns of each kind of protocol are those that its record names."""

    claimed_ers: float | None = None
    claim_gap: float | None = None
    """measured minus claimed ERS: below zero where the claim was too high"""
    status: Status
    flags: Text | None = None
    """short names of the doubts about the result, separated by spaces"""
    partial: Text | None = None
    """why this is not a full result; such a row has no rank and replaces no full one"""
    rank: Annotated[int, Field(ge=1)] | None = None
    """place by the number alone, among the ranked rows of the same protocol and images; equal numbers share it"""
    better_than: Count | None = None
    """how many ranked rows it is better than beyond doubt, query by query (:mod:`dmlbench.board.beyond`); empty where
    the queries' outcomes are not at hand"""
    n_queries: Count | None = None
    n_gallery: Count | None = None
    seed: Count | None = None
    eps: Annotated[float, Field(ge=0)] | None = None
    device: Text | None = None
    torch: Text | None = None
    dmlbench: Text | None = None
    date: Text | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None

    @property
    def board(self) -> tuple[str, ...]:
        """What rows must share to be ranked against one another: protocol and images, each with its hash."""
        return (
            self.protocol, self.dataset, self.split or "test", self.protocol_sha256 or "", self.dataset_sha256 or "",
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, ...]:
        """What a file holds once: :attr:`board`, and the model with its weights."""
        return (*self.board, self.model, self.weights_sha256 or "")

    @property
    def headline(self) -> float | None:
        """What rows are ranked by: ERS, or under a protocol without one the number that its kind ranks by."""
        return next((getattr(self, n) for n in HEADLINES if getattr(self, n) is not None), None)

    def cell(self, column: str) -> str:
        """A cell as a person reads it: a length beyond the grid as more than its largest eps."""
        return more(vars(self), column) + shown(column, getattr(self, column))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of :attr:`headline`; a length may have no upper end."""
        name = next((n for n in HEADLINES if getattr(self, n) is not None), "")
        low, high = getattr(self, f"{name}_lo", None), getattr(self, f"{name}_hi", None)
        if name in LENGTHS and low is not None and high is None:
            high = np.inf
        return None if low is None or high is None else (low, high)


def more(columns: Mapping[str, Any], name: str) -> str:
    """ "> " before a length that is beyond the largest eps that was tried, which stands in its place; nothing before others."""
    return "" if columns.get(f"{name}_beyond") is None else "> "


HEADLINES = ("ers", *(number.name for number in numbers().values() if number.ranks))
"""What a row is ranked by: the first of these that it has."""

LENGTHS = {f"{n.name}{end}" for n in numbers().values() if n.length for end in ("", "_lo", "_hi")}
"""Columns that hold lengths on the [0, 1] scale of pixels."""

COLUMNS: tuple[str, ...] = tuple(Row.model_fields)
"""Every column, in the order of the CSV."""

CLEAN_COLUMNS = tuple(name for name in CLEAN_METRICS if name in COLUMNS)
"""The clean metrics that a board has a column for."""

OF_KINDS = frozenset(name for kind in KINDS.values() if kind.columns for name in kind.columns.model_fields)
"""The columns of kinds of protocol, which a file has only where they hold something."""

NUMBERS = frozenset(
    name
    for name, spec in Row.model_json_schema()["properties"].items()
    if {"number", "integer"} & {kind.get("type") for kind in (spec, *spec.get("anyOf", ()))}
)
"""The columns that hold numbers."""

_SMALL = ("tma_raw", "es_d_raw", "eps")


def shown(column: str, value: Any) -> str:
    """A cell as a person reads it: one digit after the point, three where the whole scale is about 1, and three digits of
    a length, which lies on a log scale."""
    if value is None:
        return "–" if column == "better_than" else ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.3g}" if column in LENGTHS else f"{value:.{3 if column in _SMALL else 1}f}"


def _neat(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, digits)


def defense_text(card: Checkpoint) -> str:
    """The defence with its parameters, e.g. ``hm (source=S, ics=0.5)``."""
    params = ", ".join(f"{key}={value}" for key, value in card.defense.params.items())
    return f"{card.defense.name} ({params})" if params else card.defense.name


def superseded(protocol: str, sha256: str | None, model: str) -> str | None:
    """Why a result of this protocol's content and this model is stale; None where neither has been superseded."""
    rules = packaged_protocol(protocol, sha256) if sha256 else None
    if rules is not None and rules.superseded_by:
        return f"protocol {rules.id} is superseded by {rules.superseded_by}"
    card = checkpoints().get(network_of(model))
    if card is not None and card.status == "superseded":
        return f"model {model} is superseded by {card.superseded_by}"
    return None


def partial_text(reasons: Sequence[str]) -> str | None:
    """The column ``partial``: why this is not a full result, without the hyphens that a spreadsheet would execute."""
    return "; ".join(reason.lstrip("-") for reason in reasons) or None


def from_evaluation(
    evaluation: Evaluation,
    *,
    status: Status = "local",
    card: Checkpoint | None = None,
    submission: str | None = None,
    claimed_ers: float | None = None,
) -> Row:
    """The row of an evaluation.

    Args:
        status: what stands behind it.
        card: what the model is; by default the registry's record of that id, if there is one.
        submission: the folder it came from.
        claimed_ers: what somebody else states; by default the card's claim for this protocol.
    """
    e = evaluation
    card = card or checkpoints().get(e.model.id)
    columns: dict[str, Any] = {}
    for m in e.measurements:
        if m.component in PARTS:
            columns[f"{PARTS[m.component]}_raw"] = _neat(m.value, 6)
            columns[f"{PARTS[m.component]}_score"] = _neat(m.score)
    for name in CLEAN_COLUMNS:
        columns[name] = _neat(e.benign.get(name))
    extra = set(e.extras.get("extra_parts", ()))
    scored = [(m.score, m.component) for m in e.measurements if m.score is not None and m.component not in extra]
    if card is not None:
        columns |= {"arch": card.arch.builder, "loss": card.train.loss, "license": card.license}
        if card.paper is not None:
            columns |= {"paper": card.paper.title, "paper_url": card.paper.url}
        if claimed_ers is None:
            stated = [c.value for c in card.claims if c.metric == "ers" and c.protocol == e.protocol.name]
            claimed_ers = stated[0] if stated else None
    else:
        columns |= {"arch": e.model.arch, "loss": e.model.loss}
    trained = defense_text(card) if card else e.model.defense
    columns["defense"] = behind(trained, e.model.id) if trained else None
    columns |= {name: _neat(value, 6 if name in LENGTHS else 4) for name, value in kind_columns(e).items()}
    ends = _ers_interval(e)
    return Row(
        **columns,
        protocol=e.protocol.name,
        protocol_version=e.protocol.version,
        protocol_sha256=e.protocol.sha256,
        model=e.model.id,
        weights_sha256=e.model.weights_sha256,
        dataset=e.dataset.name,
        split=e.dataset.split,
        dataset_sha256=e.dataset.sha256,
        submission=submission,
        ers=_neat(e.ers),
        ers_lo=_neat(ends[0]) if ends else None,
        ers_hi=_neat(ends[1]) if ends else None,
        worst_part=min(scored)[1] if scored else None,
        claimed_ers=claimed_ers,
        claim_gap=None if claimed_ers is None or e.ers is None else _neat(e.ers - claimed_ers),
        status=status,
        flags=" ".join(sorted({f.flag for f in e.warnings})) or None,
        partial=partial_text(e.partial),
        n_queries=e.dataset.n_queries,
        n_gallery=e.dataset.n_gallery,
        seed=e.protocol.seed,
        eps=_neat(length(sizes[-1]), 6) if (sizes := sizes_of(e)[1]) else None,
        device=e.environment.device,
        torch=e.environment.torch,
        dmlbench=e.environment.dmlbench,
        date=e.date,
        seconds=_neat(e.seconds, 1),
    )


def headline(e: Evaluation) -> tuple[str, float] | None:
    """What the evaluation's row is ranked by: column and number; None where it has none."""
    values = {**numbers_of(e), **({} if e.ers is None else {"ers": e.ers})}
    return next(((name, values[name]) for name in HEADLINES if name in values), None)


def kind_columns(e: Evaluation) -> dict[str, float | None]:
    """The columns of the result's kind, and the intervals of those of its numbers that are means over queries."""
    kind = kind_of(e)
    if kind.columns is None:
        return {}
    columns: dict[str, float | None] = {**kind.read(e)}
    for number in kind.numbers:
        values = None if number.median else kind.by_query(e).get(number.name)
        if values is not None and f"{number.name}_lo" in kind.columns.model_fields:
            ends = mean_interval(e, values)
            columns[f"{number.name}_lo"], columns[f"{number.name}_hi"] = ends or (None, None)
    return columns


def _ers_interval(e: Evaluation) -> Ends:
    """The interval of ERS as it is made today, from the outcomes where an earlier version made the stated one: the
    rows of a board are ranked by intervals of one kind."""
    if e.ers is None or e.interval_version == VERSION or "label" not in e.arrays:
        return e.ers_interval
    rules = packaged_protocol(e.protocol.name, e.protocol.sha256)
    return e.ers_interval if rules is None else score_intervals(rules.components, e.arrays).mean

"""A kind of protocol: one record, from which all other modules read everything that depends on the kind.

It states which fields of a protocol's file it uses, what it runs, which numbers and columns it reports, how they are
shown, and what a submitted run of it must hold. An evaluation stores the kind's part of the result under its name in
:attr:`~dmlbench.results.Evaluation.extras`. Fields with a default may be left out (docs/extend.md has a short and a full kind).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dmlbench.attacks import Attack
from dmlbench.checkpoints import first_problem
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.errors import Problem, UsageError
from dmlbench.intervals import Ends
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Work
from dmlbench.scene import Scene
from dmlbench.threat import Threat

RUN = "run/evaluation.json"
QUERIES = "run/per_query.npz"
SAMPLE = "run/adversarial_sample.npz"
WHOLE_RUN = "whole/"
"""The prefix of arrays in the sample that belong to the whole run; all others have one entry for each sampled query."""

CLOSE = 1e-3
"""How far a stated number may be from the one computed again, in points: rounding of sums."""
LENGTHS_CLOSE = 1e-6
"""The same for lengths on the [0, 1] scale of pixels."""
AGREE = 1.0
"""Points by which a mean over rerun queries may always differ: other hardware rounds otherwise, and 32
signed steps turn rounding into other pixels."""
CLUSTERS_AGREE = 3.0
"""The same of NMI and AMI: k-means falls otherwise where points have moved by a rounding."""
DIFFER = 0.02
"""Share of replayed outcomes that may differ (a tie broken by rounding); one always may."""

Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=0, le=100 + CLOSE)]
"""A percentage as a run states it."""
Count = Annotated[int, Field(ge=0)]
Cost = Annotated[float, Field(ge=0)]
Shape = Sequence[int]
"""(channels, height, width)"""
Tables = Callable[[dict[str, Any]], Iterator["Sheet | Line"]]

SettingsForm = TypeVar("SettingsForm", bound="Settings")


class Form(BaseModel):
    """The form of a part of ``extras``: no field may be missing, and there are no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Settings(BaseModel):
    """``[settings]`` of a protocol: what a kind is run by that no other kind reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @classmethod
    def of(cls: type[SettingsForm], rules: Protocol) -> SettingsForm:
        """Those of a protocol.

        Raises:
            UsageError: a key or value that means nothing.
        """
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in rules.settings.items()}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UsageError(f"[settings] {first_problem(error)}") from None


def ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    """The values of a setting, refused where they do not ascend: a validator."""
    if any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{list(values)} must be in ascending order")
    return values


@dataclass(frozen=True)
class Outcome:
    """Everything that a kind's own run measured.

    Attributes:
        components: the columns, each with ``<name>/value`` (Q,) in ``arrays``.
        seconds: by component.
        arrays: per-query arrays by name.
        sample: adversarial images of the sampled queries by component.
        summary: what goes into :attr:`~dmlbench.results.Evaluation.extras` under the kind's name.
        broken_by: where the audit can look at the run: by eps, how each query ended.
        nonfinite: gradients of single images that were NaN or infinite in the searches, and taken as zero.
    """

    components: list[Component]
    seconds: dict[str, float]
    arrays: dict[str, np.ndarray]
    sample: dict[str, np.ndarray]
    summary: dict[str, Any]
    broken_by: dict[str, np.ndarray] = field(default_factory=dict)
    nonfinite: int = 0


@dataclass(frozen=True)
class Number:
    """A number that a kind reports besides its parts' scores; larger is more robust.

    Attributes:
        name: its column.
        title: what a person reads above it.
        meaning: two sentences for who reads it for the first time.
        ranks: rows are ranked by it, if they have none that stands before it.
        drop: points that a candidate may lose in ``compare``; None: it is shown and gates nothing.
        against: of a number that ranks: the column that it is drawn against.
        median: it is a median over queries; else the mean of what each adds to it, or of the whole set.
        length: a length on the [0, 1] scale of pixels; else points of 100.
        beside_ers: it is shown next to ERS on the board of the same images.
        between: of a number of the set: the interval of its difference between two runs, from the positions of the
            common queries in both, a seed and a number of resamples.
    """

    name: str
    title: str
    meaning: str = ""
    ranks: bool = False
    drop: float | None = None
    against: str = "recall_at_1"
    median: bool = False
    length: bool = False
    beside_ers: bool = False
    between: Callable[[Evaluation, Evaluation, np.ndarray, np.ndarray, int, int], Ends] | None = None


class Point(NamedTuple):
    """One point of a curve over eps; ``part`` is the component whose score it is, or the clean metric, where it is one's."""

    eps: str
    value: float | None
    part: str | None = None


@dataclass(frozen=True)
class Curve:
    """A number against eps: its title, and the points, the first of eps 0, ascending."""

    title: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sheet:
    """A table for the screen: columns of text, then ``columns`` of numbers; ``bold`` are positions of rows."""

    title: str
    names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Line:
    """A line for the screen: its head stands out."""

    text: str
    head: str = ""


@dataclass(frozen=True)
class Job:
    """A search that ``--plan`` times: what it is called, the most passes a query (gradients, values) costs, and what is timed
    for it, ``weight`` times; without an attack or a ``look`` its values alone, of noisy images."""

    name: str
    passes: tuple[int, int]
    attack: Attack | None = None
    optimizer: str = ""
    threat: Threat = field(default_factory=Threat)
    steps: int = 0
    eps: str = ""
    called: str = ""
    """the attack's name in the plan"""
    weight: float = 1.0
    batch: Callable[[int], int] = lambda size: size
    """how many images are looked at at a time, for the run's batch size"""
    look: Callable[[Embedder, Tensor, Scene], object] | None = None
    """what is timed in place of an attack: all that is done to a batch of images, whose scene this is"""
    at_most: bool = False
    """queries that an earlier search breaks leave this one"""
    undefended: bool = False
    """its gradients are of the model without its defence, and each image is looked at by the whole model besides"""

    @property
    def spent(self) -> tuple[int, int]:
        """The most passes a query costs (gradients, values), those of looking among them."""
        gradients, values = self.passes
        return gradients, values + (gradients + values if self.undefended else 0)


@dataclass(frozen=True, eq=False)
class Stated:
    """A submitted run: the result, its protocol, and the columns that such a run has."""

    evaluation: Evaluation
    rules: Protocol
    parts: tuple[Component, ...]


@dataclass(frozen=True, eq=False)
class StoredSample:
    """What the stored adversarial images of a submitted run are checked against: the model with its queries, the ``positions`` of
    the queries whose images are stored, and their clean images."""

    subject: Subject
    positions: np.ndarray
    clean: Tensor


def listed_components(rules: Protocol, shape: Shape) -> list[Component]:
    """The components that the protocol's file lists."""
    return list(rules.components)


def nothing(*_: Any, **__: Any) -> Iterator[Any]:
    """No line, no problem."""
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of protocol.

    What a file of the kind holds:
        name: what ``kind`` in the file says, and the key in ``extras``.
        title: one line for a person.
        meaning: two sentences for who reads its numbers for the first time.
        needs, reads: the protocol's fields that it must have, and may have, besides those of every kind.
        unread: keys of [threat] that would do nothing.
        check: raises UsageError where they do not fit one another.

    What is measured:
        run: the whole run, (subject, rules, seed, batch size, progress, positions of the sampled queries, work) to an
            :class:`Outcome`, or None where ``work`` is a shard; None: the components are searched one after another.
        components: the parts of a run on images of a shape.
        behind: the protocol as it is run on a model behind a defence at test time that attacks know; the same where it is run alike.
        mean: the mean of the parts' scores is ERS.
        moved: its parts are read at images that a search moved within a ball: each query has a norm, and the sample holds the
            images. Else the sample holds what ``replay`` looks at.
        within: R@1 of its parts is within the attacked set, so it may rise as well as fall.
        whole_set: what a query gives depends on which others are measured with it.
        pairs: its queries may be pairs of pictures that a file names.
        unit: it is defined only where embeddings have unit length.
        require: raises UsageError where a data set cannot be measured: (rules, data set, seed), before anything is embedded.
        averages: it can be run on a model that is random, by means over several passes (``eot``).
        optimizers: what the run searches with.
        jobs: what ``--plan`` times, for a protocol, a data set and a number of queries.

    What it gives:
        form: the type of its part of ``extras``.
        numbers: besides the parts' scores, in the order in which they are shown.
        columns: the types of its columns in a row of a board, in their order.
        read: the values of those columns, None for a missing one.
        by_query: by name of a number what each query (Q,) adds to it: the number is their mean, or their median.
        curve: what a plot over eps draws.
        roc: of decisions about pairs, (n, 2): the share of impostors and of genuine pairs that are accepted, percent, at each
            threshold that tells; empty for none.
        shown: the columns that a board shows at first.
        tables: what is printed.
        page: paragraphs of docs/protocols.md about one protocol.

    What a submitted run must hold:
        arrays: by name, for each query, the kind of number ("i" or "f") and how many of them (1: an array (Q,)).
        outcome_problems: which of its arrays do not fit one another.
        number_problems: which numbers differ from those recomputed from the arrays; called if the arrays have no problem.
        replay: what the stored images of the sample contradict.
        as_long: the protocol under which a share of the queries is searched for as long as all were.
        share: where a share of the queries says nothing: what to measure again instead, (stated, subject, random
            numbers, progress) to what it was, in words, and the problems.
        disagree: of two runs of the same queries, (stated, rerun, positions, level): what differs; by default every part,
            and the number that is ranked by.
    """

    name: str
    title: str
    meaning: str = ""
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    check: Callable[[Protocol], None] = lambda rules: None
    run: Callable[[Subject, Protocol, int, int, Progress, np.ndarray, Work], Outcome | None] | None = None
    components: Callable[[Protocol, Shape], list[Component]] = listed_components
    behind: Callable[[Protocol], Protocol] = lambda rules: rules
    mean: bool = False
    moved: bool = True
    within: bool = False
    whole_set: bool = False
    pairs: bool = False
    unit: bool = False
    require: Callable[[Protocol, RetrievalDataset, int], None] = lambda rules, dataset, seed: None
    averages: bool = True
    optimizers: Callable[[Protocol], set[str]] = lambda rules: set()
    jobs: Callable[[Protocol, RetrievalDataset, int], Iterator[Job]] = nothing
    form: type[BaseModel] | None = None
    numbers: tuple[Number, ...] = ()
    columns: type[BaseModel] | None = None
    read: Callable[[Evaluation], Mapping[str, float | None]] = lambda evaluation: {}
    by_query: Callable[[Evaluation], Mapping[str, Float[np.ndarray, " Q"]]] = lambda evaluation: {}
    curve: Callable[[Evaluation], Curve | None] = lambda evaluation: None
    roc: Callable[[Evaluation], Sequence[Sequence[float]]] = lambda evaluation: ()
    shown: tuple[str, ...] = ()
    tables: Tables = nothing
    page: Callable[[Protocol], Iterator[str]] = nothing
    arrays: Callable[[Protocol, Sequence[Component]], Mapping[str, tuple[str, int]]] = lambda rules, parts: {}
    outcome_problems: Callable[[Stated], Iterator[Problem]] = nothing
    number_problems: Callable[[Stated], Iterator[Problem]] = nothing
    replay: Callable[[Stated, StoredSample], Iterator[Problem]] = nothing
    as_long: Callable[[Protocol, Evaluation], Protocol] = lambda rules, evaluation: rules
    share: Callable[[Stated, Subject, np.random.Generator, Progress], tuple[str, Iterable[Problem]]] | None = None
    disagree: Callable[[Stated, Evaluation, np.ndarray, int], Iterator[Problem]] | None = None

    @property
    def watched(self) -> str | None:
        """The number that ``--until`` watches: ERS, or the first of its own that is a mean over queries in points of 100 and no clean
        one that others are drawn against; None where each query does not add to one by itself."""
        if self.mean:
            return "ers"
        clean = {number.against for number in self.numbers}
        means = (n.name for n in self.numbers if not (n.median or n.length or n.name in clean))
        return next(means, None) if self.run and not self.whole_set else None


def count_problems(bad: Any, field: str, text: str) -> Iterator[Problem]:
    """A problem with how many queries are ``bad`` (Q,), where any is."""
    if np.any(bad):
        yield Problem(0, f"{QUERIES} {field}", f"{int(np.sum(bad))} {text}")


def differences(where: str, stated: Any, recomputed: Any, close: float = CLOSE) -> Iterator[Problem]:
    """Where two trees of lists, mappings and values differ, numbers by more than ``close``."""
    if isinstance(stated, dict) and isinstance(recomputed, dict):
        for key in sorted({*stated, *recomputed}):
            yield from differences(f"{where}.{key}", stated.get(key), recomputed.get(key), close)
    elif isinstance(stated, list) and isinstance(recomputed, list) and len(stated) == len(recomputed):
        for n, (a, b) in enumerate(zip(stated, recomputed, strict=True)):
            yield from differences(f"{where}.{n}", a, b, close)
    elif isinstance(stated, int | float) and isinstance(recomputed, float):
        if not abs(stated - recomputed) <= close:
            yield Problem(0, f"{RUN} {where}", f"says {stated}, the queries' own outcomes give {recomputed}")
    elif stated != recomputed:
        yield Problem(0, f"{RUN} {where}", f"says {stated!r}, the queries' own outcomes give {recomputed!r}")


def outcomes_differ(
    e: Evaluation, c: Component, read_outs: Mapping[str, np.ndarray], positions: np.ndarray
) -> Iterator[Problem]:
    """A problem where too many stored images of a part score otherwise than the run states of the queries at ``positions``."""
    stated = e.arrays[f"{c.name}/value"][positions].astype(np.float64)
    again = read_outs[c.readout].astype(np.float64)
    points = np.abs(c.rescale(stated) - c.rescale(again))
    differing = (np.isnan(stated) != np.isnan(again)) | (points > AGREE)
    if differing.sum() > max(1, DIFFER * len(positions)):
        text = f"{int(differing.sum())} of {len(positions)} stored images score otherwise than stated"
        yield Problem(2, f"{QUERIES} {c.name}/value", text)


def text_of(value: float | None, digits: int = 1) -> str:
    """A number as a table shows it; a run folder holds no NaN but null."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def interval_text(ends: Ends) -> str:
    """The two ends of an interval as a table shows them; empty where there is none."""
    return "" if ends is None else f"{ends[0]:.1f} – {ends[1]:.1f}"

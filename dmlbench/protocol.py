"""Protocols: which attacks, how strong, read how. Declarative, versioned TOML files, never edited after release.

A protocol's ``sha256`` is the hash of its parsed content and lands in every result; a bug in an
attack or a changed number is a new version.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from dmlbench.attacks import ATTACKS, parse
from dmlbench.errors import UsageError
from dmlbench.intervals import ANY, LEVEL, PERCENT, Intervals, Range, class_intervals
from dmlbench.metrics import READOUTS
from dmlbench.registry import suggest
from dmlbench.rng import SEEDS
from dmlbench.threat import Threat, length

COLOUR = "colour"
"""In a grid, beside sides in pixels: images of several channels."""

FIRST_ATTACKS = ("C1", "C2", "C3", "U1", "U2", "U3")
"""What a clustering protocol runs that names no attacks, as its first version did not."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(_Record):
    """One column of a score: ``100 * (value - worst) / (best - worst)``, 0 worst to 100 best.

    ``threat`` changes fields of the protocol's threat for this component alone.
    """

    name: str
    attack: str
    readout: str
    worst: FiniteFloat
    best: FiniteFloat
    optimizer: str = "pgd"
    threat: dict[str, Any] = {}

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which raw value is more robust."""
        return "higher" if self.best > self.worst else "lower"

    def rescale(self, value: Any) -> Any:
        """Raw value, number or array, to a score."""
        return 100.0 * (value - self.worst) / (self.best - self.worst) + 0.0  # no -0.0

    @property
    def limits(self) -> Range:
        """The lowest and the highest score that there can be; infinite where nothing limits it."""
        if self.readout not in READOUTS:
            return ANY
        low, high = sorted(float(self.rescale(limit)) for limit in READOUTS[self.readout].limits)
        return low, high


def scored(components: Sequence[Component], arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "Q k"]:
    """What each query scored in each component, from its raw outcomes ``<component>/value``."""
    return np.stack([c.rescale(arrays[f"{c.name}/value"].astype(np.float64)) for c in components], axis=1)


def score_intervals(
    components: Sequence[Component], arrays: Mapping[str, np.ndarray], level: float = LEVEL
) -> Intervals:
    """Intervals of the components' scores and of their mean as it counts in ERS (:func:`counted`), classes being the
    unit; of 95 % unless another level is asked for."""
    table, ranges = scored(components, arrays), [c.limits for c in components]
    intervals, within = class_intervals(table, arrays["label"], ranges, PERCENT, level), counted(table)
    if within is table:
        return intervals
    return replace(intervals, mean=class_intervals(within, arrays["label"], ranges, PERCENT, level).mean)


def counted(scores: np.ndarray) -> np.ndarray:
    """Scores (Q, parts) as they count in ERS: a part whose mean is below 0 or above 100 is moved to there.

    The same table where none is. A mean can lie outside where a search goes the wrong way, which is no robustness.
    """
    present = ~np.isnan(scores)
    means = np.where(present, scores, 0.0).sum(0) / np.maximum(present.sum(0), 1)
    excess = means - np.clip(means, 0.0, 100.0)
    moved: np.ndarray = scores - excess if excess.any() else scores
    return moved


def ers_of(scores: Sequence[float | None]) -> float | None:
    """The mean of the parts' scores, each within 0 to 100; None where one has no value."""
    present = [min(max(score, 0.0), 100.0) for score in scores if score is not None]
    return float(np.mean(present)) if scores and len(present) == len(scores) else None


class Turn(_Record):
    """What a round changes of its step."""

    attack: str = ""
    start: str = ""


class Step(_Record):
    """One step of a worst case: an attack on the queries that survived the steps before it.

    ``aims`` says how many of the attack's targets are tried, one after another. With ``rounds`` above 1 it is
    repeated on what is left, with other random numbers, as its ``turns`` say one after another; a turn that aims
    takes one target, the next one each time. It ends early in each group of :attr:`Protocol.together` queries, once it
    has run ``fewest`` times for each query that was right when clean, so the fewer are left the more rounds they meet, and
    the last half of the rounds broke no more than ``until`` percent of them.
    """

    name: str
    attack: str
    optimizer: str
    threat: dict[str, Any] = {}
    aims: int = 1
    rounds: int = 1
    fewest: int = 1
    until: FiniteFloat = 0.0
    turns: tuple[Turn, ...] = ()

    def at(self, r: int) -> tuple["Step", int]:
        """Round ``r`` (from 0) as a step of its own, and how many rounds before it were of the same turn."""
        if not self.turns:
            return self, r
        turn = self.turns[r % len(self.turns)]
        threat = {**self.threat, **({"start": turn.start} if turn.start else {})}
        return self.model_copy(update={"attack": turn.attack or self.attack, "threat": threat}), r // len(self.turns)


class Threshold(_Record):
    """How the smallest eps that breaks a query is found between two of the grid: by halving on a log scale.

    Between two eps lie ``parts`` - 1 others, evenly on a log scale; below the smallest are ``octaves`` halves of it, with as many
    between each two. Each is tried with one search; ``parts`` is a power of two.
    """

    attack: str
    optimizer: str
    threat: dict[str, Any] = {}
    parts: int = 8
    octaves: int = 4


class Joint(_Record):
    """How the clustering attacks search that need all images at once.

    ``joint`` takes ``steps`` in each of at most ``restarts``; it reads NMI at every ``look`` steps, and ends after ``patience``
    restarts in a row that lowered the lowest NMI by less than ``least`` points of 100. ``union`` has at most
    ``rounds``, which end alike.
    """

    temperature: Annotated[FiniteFloat, Field(gt=0)]
    """of the softmax over clusters; distances are divided by it, and by the root mean square length of an embedding"""
    steps: Annotated[int, Field(ge=1)]
    restarts: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=1)]
    least: Annotated[FiniteFloat, Field(ge=0)]
    look: Annotated[int, Field(ge=1)]


FaissSeed = Annotated[int, Field(ge=0, lt=1 << 31)]
"""What faiss's k-means takes."""


class Protocol(_Record):
    """A named, versioned set of attacks and the threat they share.

    ``kind`` names a record of :data:`dmlbench.kinds.table.KINDS`, which says which of the fields it is run by.
    """

    name: str
    version: str
    kind: str = "ers"
    title: str
    seed: Annotated[int, Field(ge=0, lt=SEEDS.stop)] = 0
    threat: dict[str, Any]
    components: tuple[Component, ...] = ()
    steps: tuple[Step, ...] = ()
    grid: dict[str, tuple[str, ...]] = {}
    """what an image is to the eps in ascending order: "colour", or the side in pixels up to which these eps are meant"""
    together: int = 1
    """queries of a group, in the order of ``query_order``, that a step's rounds end for together"""
    threshold: Threshold | None = None
    """how the smallest eps that breaks a query is found; None: it is not"""
    queries: int | None = None
    """how many queries are measured, the first of ``query_order``; None: all"""
    audit: int = 0
    """queries on which the audit looks at the model as well; 0: no audit"""
    clustering_seeds: Annotated[tuple[FaissSeed, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    attacks: tuple[str, ...] = FIRST_ATTACKS
    """names of CLUSTER_ATTACKS, in the order in which they are run"""
    joint: Joint | None = None
    """how those of the attacks search that need all images at once"""
    settings: dict[str, Any] = {}
    """what a kind of another package is run by"""
    superseded_by: str | None = None

    def __repr__(self) -> str:
        count = f", {len(self.components)} parts" if self.components else ""
        eps = f", eps {self.threat['eps']}" if "eps" in self.threat else ""
        return f"<Protocol {self.id} version {self.version}, kind {self.kind}{count}{eps}, sha256 {self.sha256[:12]}>"

    __str__ = __repr__

    @property
    def sha256(self) -> str:
        """Hash of everything that can change a number: all but the title and the successor."""
        content = self.model_dump(mode="json", exclude={"title", "superseded_by"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        """What :func:`load_protocol` takes for this version: the name, with ``@version`` where it is superseded."""
        return f"{self.name}@{self.version}" if self.superseded_by else self.name

    def threat_of(self, component: Component) -> Threat:
        """The threat of one component."""
        return Threat.of({**self.threat, **component.threat})

    def eps_for(self, shape: Sequence[int]) -> tuple[str, ...]:
        """The grid's eps for images of this shape (channels, height, width): those of the smallest listed side that is not
        smaller, else of the largest. Where the grid has eps for "colour", images of several channels take them, and
        so do larger ones than any listed."""
        sides = sorted((key for key in self.grid if key != COLOUR), key=int)
        fitting = [key for key in sides if int(key) >= max(shape[1:])]
        if COLOUR in self.grid and (shape[0] > 1 or not fitting):
            return self.grid[COLOUR]
        return self.grid[fitting[0] if fitting else sides[-1]]

    @property
    def norm(self) -> str:
        """In which the adversary is bounded: a name of :data:`~dmlbench.threat.BALLS`."""
        return str(self.threat.get("norm", Threat.norm))

    def sizes(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Every eps of the adversary on images of this shape, ascending; none where nothing is perturbed within a ball."""
        if self.grid:
            return self.eps_for(shape)
        threats = [{**self.threat, **c.threat} for c in self.components] or [self.threat]
        return tuple(sorted({str(threat["eps"]) for threat in threats if "eps" in threat}, key=length))

    def measured(self, count: int, limit: int | None = None) -> int:
        """How many of ``count`` queries are measured: this protocol's number of them, or ``limit`` where that is fewer."""
        return min(n for n in (count, self.queries, limit) if n is not None)

    def threat_at(self, eps: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Threat:
        """The threat at one eps of the grid."""
        return Threat.of({**self.threat, **changes, "eps": eps})

    def at_eps(self, eps: Sequence[str]) -> "Protocol":
        """With another size of the perturbation, or with a grid of others, for images of every kind; steps of a fixed length
        are longer or shorter in proportion.

        Raises:
            UsageError: they are not above 0 and ascending, or several where the protocol has no grid.
        """
        radii = [length(one) for one in eps]
        if not radii or radii[0] <= 0 or radii != sorted(set(radii)):
            raise UsageError(f"--eps {','.join(eps)} must be above 0 and in ascending order")
        if self.grid:
            return self.model_copy(update={"grid": dict.fromkeys(self.grid, tuple(eps))})
        if "eps" not in self.threat:
            raise UsageError(f"protocol {self.name!r} has no eps to change")
        if len(eps) > 1:
            raise UsageError(f"protocol {self.name!r} has no grid: it is run at one eps at a time")
        factor = radii[0] / length(self.threat["eps"])

        def scaled(threat: dict[str, Any]) -> dict[str, Any]:
            return {
                key: factor * length(value, key) if key in ("eps", "step") else value for key, value in threat.items()
            }

        parts = tuple(c.model_copy(update={"threat": scaled(c.threat)}) for c in self.components)
        threat = {**scaled(self.threat), "eps": eps[0]}
        return self.model_copy(update={"threat": threat, "components": parts})

    def component(self, name: str) -> Component:
        """One component by name, or an error with a suggestion."""
        for component in self.components:
            if component.name == name:
                return component
        known = [*(c.name for c in self.components), *ATTACKS]
        raise UsageError(f"unknown attack {name!r} in protocol {self.name!r}{suggest(name, known)}")

    def chosen(self, names: Sequence[str] | None, shape: Sequence[int]) -> "Chosen":
        """What ``names`` ask for: components of this protocol, or any attack@optimizer under its threat.

        ``None`` and the name "all" mean everything the protocol itself measures. ``shape`` is the images'
        (channels, height, width), by which a protocol with a grid knows its eps.

        Raises:
            UsageError: a name that is neither, or two components of one name.
        """
        if twice := repeated(c.name for c in self.components):
            raise UsageError(f"protocol {self.name!r} has two components {twice!r}: one would overwrite the other")
        if names is None:
            return Chosen(self.components, (), True)
        listed: list[Component] = []
        extra: list[Component] = []
        for name in names:
            if name == "all":
                listed += self.components
            elif any(c.name == name for c in self.components):
                listed.append(self.component(name))
            elif "@" in name or name in ATTACKS:
                extra += self.combined(name, shape)
            else:
                self.component(name)
        return Chosen(_once(listed), _once(extra), "all" in names)

    def combined(self, name: str, shape: Sequence[int]) -> list[Component]:
        """The columns of any attack@optimizer under this protocol's threat: one for each read-out, and for each eps
        of the grid, where there is one (in steps of 2.5 eps / steps).

        Raises:
            UsageError: an unknown name, or the protocol has no adversary, so nothing says how strong it would be.
        """
        attack, optimizer = parse(name)
        if not self.grid and "eps" not in self.threat:
            raise UsageError(f"protocol {self.name!r} has no eps: {name} cannot be run under it")
        plain = name if "@" in name else f"{name}@{optimizer}"
        columns = []
        for eps in self.eps_for(shape) if self.grid else (None,):
            threat: dict[str, Any] = {}
            if eps is not None:
                at = self.threat_at(eps)
                threat = {"eps": eps, "step": 2.5 * at.radius / max(1, at.steps)}
            for readout, (worst, best) in zip(ATTACKS[attack].readouts, ATTACKS[attack].ends, strict=True):
                label = plain if eps is None else f"{plain}@{eps}"
                if len(ATTACKS[attack].readouts) > 1:
                    label = f"{label}:{readout}"
                named: dict[str, Any] = {"attack": attack, "readout": readout, "optimizer": optimizer, "threat": threat}
                columns.append(Component(name=label, worst=worst, best=best, **named))
        return columns


def _once(components: Sequence[Component]) -> tuple[Component, ...]:
    """Each name once, in order."""
    return tuple({c.name: c for c in components}.values())


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class Chosen(NamedTuple):
    """The parts that a run measures.

    Attributes:
        listed: components of the protocol.
        extra: other combinations of attack and optimizer, which never count in a score.
        runner: whether to call the run of the protocol's kind, if it has one.
    """

    listed: tuple[Component, ...]
    extra: tuple[Component, ...]
    runner: bool

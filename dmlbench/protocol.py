"""Protocols: which attacks, how strong, read how. Declarative, versioned TOML files, never edited after release.

A protocol's ``sha256`` is the hash of its parsed content and lands in every result; a bug in an
attack or a changed number is a new protocol with the old one's ``superseded_by`` set.
"""

import hashlib
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dmlbench.attacks import ATTACKS
from dmlbench.checkpoints import PACKAGE, first_problem
from dmlbench.errors import DataError, UsageError
from dmlbench.metrics import READOUTS
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.registry import suggest
from dmlbench.threat import Threat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = PACKAGE / "protocols"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(_Record):
    """One column of a score: ``100 * (value - worst) / (best - worst)``, 0 worst to 100 best.

    ``threat`` changes fields of the protocol's threat for this component alone.
    """

    name: str
    attack: str
    readout: str
    worst: float
    best: float
    optimizer: str = "pgd"
    threat: dict[str, Any] = {}

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which raw value is more robust."""
        return "higher" if self.best > self.worst else "lower"

    def rescale(self, value: Any) -> Any:
        """Raw value, number or array, to a score."""
        return 100.0 * (value - self.worst) / (self.best - self.worst)


class Protocol(_Record):
    """A named, versioned set of components and the threat they share."""

    name: str
    version: str
    kind: Literal["ers"] = "ers"
    title: str
    seed: int = 0
    threat: dict[str, Any]
    components: tuple[Component, ...] = ()
    clustering_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    superseded_by: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of everything that can change a number: all but the title and the successor."""
        content = self.model_dump(mode="json", exclude={"title", "superseded_by"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def threat_of(self, component: Component) -> Threat:
        """The threat of one component."""
        return Threat(**{**self.threat, **component.threat})

    def component(self, name: str) -> Component:
        """One component by name, or an error with a suggestion."""
        for component in self.components:
            if component.name == name:
                return component
        raise UsageError(
            f"unknown attack {name!r} in protocol {self.name!r}{suggest(name, [c.name for c in self.components])}"
        )


def read_protocol(path: Path) -> Protocol:
    """A protocol from a TOML file, every name in it checked."""
    try:
        protocol = Protocol.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        for c in protocol.components:
            OPTIMIZERS[c.optimizer], READOUTS[c.readout], protocol.threat_of(c)
            if c.readout not in ATTACKS[c.attack].readouts:
                raise UsageError(f"component {c.name!r}: attack {c.attack!r} is not read by {c.readout!r}")
            if c.best == c.worst:
                raise UsageError(f"component {c.name!r}: worst and best are both {c.worst}")
        return protocol
    except ValidationError as error:
        raise DataError(f"protocol {path}: {first_problem(error)}") from None
    except (OSError, tomllib.TOMLDecodeError, TypeError, UsageError) as error:
        raise DataError(f"protocol {path}: {error}") from None


def protocol_names() -> list[str]:
    """The packaged protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@lru_cache
def load_protocol(name: str) -> Protocol:
    """A packaged protocol by name, or any by the path of its TOML file.

    Raises:
        UsageError: unknown name. DataError: the file is missing or not a protocol.
    """
    if name.endswith(".toml"):
        return read_protocol(Path(name))
    if name not in protocol_names():
        raise UsageError(f"unknown protocol {name!r}{suggest(name, protocol_names())}")
    return read_protocol(FOLDER / f"{name}.toml")

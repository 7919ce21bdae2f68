"""A protocol's TOML file: read, with every name and number in it checked."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmlbench.attacks import ATTACKS, require_decision
from dmlbench.checkpoints import first_problem
from dmlbench.errors import DataError, UsageError
from dmlbench.files import read_toml
from dmlbench.kinds.table import KINDS
from dmlbench.metrics import READOUTS
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import COLOUR, Component, Protocol, Step, Threshold, repeated

OF_A_KIND = {
    "components": "[[components]]", "steps": "[[steps]]", "grid": "[grid]", "together": "together",
    "threshold": "[threshold]", "audit": "audit", "attacks": "attacks", "joint": "[joint]", "settings": "[settings]",
}  # fmt: skip
"""The fields that only some kinds are run by, and how a file writes them."""


def read_protocol(path: Path) -> Protocol:
    """A protocol from a TOML file, every name and number in it checked.

    Raises:
        DataError: it cannot be read, or holds what is wrong or would do nothing; the file and the key are named.
    """
    try:
        protocol = Protocol.model_validate(read_toml(path))
        _check_names(protocol)
        _check_kind(protocol)
        for c in protocol.components:
            _check_component(c, protocol)
        for step in protocol.steps:
            _check_step(step, protocol)
        for entries in ("components", "steps"):
            if twice := repeated(entry.name for entry in getattr(protocol, entries)):
                raise UsageError(f"two {entries} have the name {twice!r}: one would overwrite the other")
        for side, grid in protocol.grid.items():
            radii = [protocol.threat_at(eps).radius for eps in grid]
            known = side == COLOUR or side.isdigit()
            if not known or not radii or radii != sorted(radii) or radii[0] <= 0:
                raise UsageError(
                    f"grid {side!r} must be a side in pixels or {COLOUR!r}, and eps above 0 in ascending order"
                )
        return protocol
    except ValidationError as error:
        raise DataError(f"protocol {path}: {first_problem(error)}") from None
    except (ValueError, TypeError, UsageError) as error:
        raise DataError(f"protocol {path}: {error}") from None


def _check_names(protocol: Protocol) -> None:
    """That the protocol's name can be a folder's and stand in a board, and a component's stand in a board and after ``--attacks``."""
    for what, name, signs in (
        ("name", protocol.name, ",<>/\\@"),
        *(("component", c.name, ",<>") for c in protocol.components),
    ):
        if not (re.fullmatch(r"\w(.*\S)?", name) and name.isprintable()) or set(signs) & set(name):
            raise UsageError(
                f"{what} {name!r} must begin with a letter or digit and be plain text without any of {' '.join(signs)}"
            )


def _check_kind(protocol: Protocol) -> None:
    """That the file has what its kind is run by, and nothing that its kind does not look at."""
    kind = KINDS[protocol.kind]
    fields = type(protocol).model_fields
    for name, shown in OF_A_KIND.items():
        written = getattr(protocol, name) != fields[name].default
        if written and name not in (*kind.needs, *kind.reads):
            raise UsageError(f"{shown} {'do' if shown.startswith('[[') else 'does'} nothing in kind {kind.name!r}")
        if not written and name in kind.needs:
            raise UsageError(f"kind {kind.name!r} needs {shown}")
    for name in ("queries", "together"):
        if (value := getattr(protocol, name)) is not None and value < 1:
            raise UsageError(f"{name} {value} must be 1 or more")
    if protocol.threshold is not None:
        _check_threshold(protocol.threshold, protocol)
    kind.check(protocol)
    if unread := [key for key in kind.unread if key in protocol.threat]:
        raise UsageError(f"[threat] {unread[0]} does nothing in kind {kind.name!r}")


def _check_component(c: Component, protocol: Protocol) -> None:
    OPTIMIZERS[c.optimizer], READOUTS[c.readout]
    try:
        protocol.threat_of(c)
    except UsageError as error:
        raise UsageError(f"component {c.name!r}: {error}") from None
    require_decision(c.attack, c.optimizer)
    if c.readout not in ATTACKS[c.attack].readouts:
        raise UsageError(f"component {c.name!r}: attack {c.attack!r} is not read by {c.readout!r}")
    if c.best == c.worst:
        raise UsageError(f"component {c.name!r}: worst and best are both {c.worst}")


def _check_step(step: Step, protocol: Protocol) -> None:
    turns = [step.at(r)[0] for r in range(max(1, len(step.turns)))]
    for turn in turns:
        _check_search(f"step {step.name!r}", turn.attack, turn.optimizer, turn.threat, protocol)
    for name in ("aims", "rounds", "fewest"):
        if getattr(step, name) < 1:
            raise UsageError(f"step {step.name!r}: {name} {getattr(step, name)} must be 1 or more")
    if step.aims > 1 and not any(ATTACKS[turn.attack].targets for turn in turns):
        raise UsageError(f"step {step.name!r}: aims {step.aims}, but attack {step.attack!r} has no targets to choose")
    if step.rounds == 1 and (step.turns or step.fewest > 1 or step.until):
        raise UsageError(f"step {step.name!r}: turns, fewest and until do nothing in a single round")
    if step.fewest > step.rounds or not 0 <= step.until <= 100:
        raise UsageError(
            f"step {step.name!r}: fewest {step.fewest} is at most rounds {step.rounds}, and until {step.until} a percentage"
        )


def _check_search(where: str, attack: str, optimizer: str, threat: Mapping[str, Any], protocol: Protocol) -> None:
    """That a search can be run on some of the queries at any eps."""
    OPTIMIZERS[optimizer], ATTACKS[attack]
    try:
        protocol.threat_at("0", threat)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if "eps" in threat:
        raise UsageError(f"{where}: threat eps does nothing, since the [grid] has eps")
    if OPTIMIZERS[optimizer].whole_set:
        raise UsageError(f"{where}: optimizer {optimizer!r} needs all queries at once, and a step has the survivors")


def _check_threshold(t: Threshold, protocol: Protocol) -> None:
    _check_search("threshold", t.attack, t.optimizer, t.threat, protocol)
    if t.parts < 1 or t.parts & (t.parts - 1) or t.octaves < 1:
        raise UsageError(f"threshold: parts {t.parts} must be a power of two and octaves {t.octaves} 1 or more")

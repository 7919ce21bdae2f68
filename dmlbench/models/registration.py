"""From a finished training run to an entry of a registry file and its weights file."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmlbench.checkpoints import ID, SCHEMA_VERSION, Checkpoint, CheckpointFile, first_problem, verified
from dmlbench.errors import DataError, UsageError
from dmlbench.files import write_atomic
from dmlbench.models.files import require_run
from dmlbench.results import json_bytes


def read_entry(run: Path) -> tuple[str, Checkpoint]:
    """The id and the record that a finished training run wrote."""
    require_run(run)
    path = run / "checkpoint.json"
    try:
        ((name, raw),) = json.loads(path.read_text(encoding="utf-8")).items()
        if not re.fullmatch(ID, name):
            raise DataError(f"{path}: {name!r} is not an id (small letters, digits, '.', '_' and '-')")
        return name, Checkpoint.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{run} is not a finished training run: {error}") from None


def register(run: Path, registry: Path, weights: Path, *, url: str | None = None, replace: bool = False) -> str:
    """Add a run's entry to ``registry``, which is made where it does not exist, and its weights to the folder ``weights``;
    returns the id.

    Args:
        url: address pattern with ``{name}`` for weights that are fetched; None for packaged ones.
        replace: whether an entry of the same id may be replaced.

    Raises:
        UsageError: the id is taken.
        DataError: the run or the registry cannot be read, or the weights have changed since.
    """
    name, entry = read_entry(run)
    try:
        known: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        if registry.exists():
            known = json.loads(registry.read_text(encoding="utf-8"))
        CheckpointFile.model_validate(known)
        held = known.setdefault("checkpoints", {})
    except ValidationError as error:
        raise DataError(f"{registry}: {first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{registry} cannot be read: {error}") from None
    if name in held and not replace:
        raise UsageError(f"{registry} already has {name!r}; --replace overwrites it")
    (file,) = entry.files
    source = verified(run / "last.safetensors", file)
    stored = f"{name}.safetensors"
    if url is not None:
        file = file.model_copy(update={"path": None, "url": url.replace("{name}", stored)})
    entry = entry.model_copy(update={"files": (file,)})
    try:
        weights.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{weights} cannot be written: {error.strerror or error}") from None
    write_atomic(weights / stored, content)
    held[name] = entry.model_dump(mode="json", exclude_defaults=True)
    known["checkpoints"] = dict(sorted(held.items()))
    write_atomic(registry, json_bytes(known))
    return name

"""The packaged protocols and those of plugins, by name and version; any other by its file.

``NAME.toml`` in this folder is the current version of NAME; an older one stays as ``NAME@VERSION.toml`` with
``superseded_by`` set, and still runs by that name.
"""

from functools import lru_cache
from pathlib import Path

from dmlbench.checkpoints import PACKAGE
from dmlbench.errors import UsageError
from dmlbench.protocol import Protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.registry import Registry, suggest

FOLDER = PACKAGE / "protocols"


def protocol_files(where: Path) -> dict[str, Path]:
    """The protocols of a folder, or the one of a file, by what :func:`load_protocol` calls them: NAME or NAME@VERSION."""
    return {path.stem: path for path in (sorted(where.glob("*.toml")) if where.is_dir() else [where])}


PROTOCOLS: Registry[Path] = Registry("protocol", protocol_files(FOLDER))
"""The TOML file of each version, by NAME for the current one and NAME@VERSION for those before."""


def protocol_names() -> list[str]:
    """The packaged protocols, each of which stands for its current version; those of plugins too."""
    return sorted(name for name in PROTOCOLS if "@" not in name)


def protocol_versions(name: str) -> list[Protocol]:
    """Every packaged version of one protocol, the current one first; empty for an unknown name."""
    if name not in protocol_names():
        return []
    older = sorted(known for known in PROTOCOLS if known.startswith(f"{name}@"))
    return [load_protocol(name), *map(load_protocol, older)]


def packaged_protocol(name: str, sha256: str) -> Protocol | None:
    """The packaged version of ``name`` with this content; None where there is none."""
    return next((p for p in protocol_versions(name) if p.sha256 == sha256), None)


def load_protocol(name: str | Path) -> Protocol:
    """A packaged protocol by name, one version of it by ``NAME@VERSION``, or any by the path of its TOML file.

    Raises:
        UsageError: unknown name or version. DataError: the file is missing or not a protocol.
    """
    text = str(name)
    return read_protocol(Path(text)) if text.endswith(".toml") else _packaged(text)


@lru_cache
def _packaged(name: str) -> Protocol:
    base, _, version = name.partition("@")
    if base not in protocol_names():
        raise UsageError(f"unknown protocol {name!r}{suggest(name, protocol_names())}")
    current = read_protocol(PROTOCOLS[base])
    if version in ("", current.version):
        return current
    if name not in PROTOCOLS:
        raise UsageError(f"protocol {base!r} has no version {version!r}; the current one is {current.version!r}")
    return read_protocol(PROTOCOLS[name])

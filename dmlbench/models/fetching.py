"""Where a registered model's weights lie on this machine; fetched where they are not in the package.

A fetched file is renamed to its final name only if its size and hash are those of the registry. It is stored under
the cache folder's ``checkpoints``. Processes that fetch the same file at once (torchrun) each write their own.

Where the registry has no whole sha256 of a file (its publisher says the first digits, or nothing), the first one
that is fetched is trusted: its sha256 is stored with it and printed, and every later copy must have the same.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dmlbench.checkpoints import PACKAGE, Checkpoint, File, own_registry, sha256_of, verified
from dmlbench.datasets.cache import cache_folder
from dmlbench.datasets.downloads import Download
from dmlbench.datasets.downloads import fetch as download
from dmlbench.errors import DataError
from dmlbench.files import atomic_file

BASE = "DMLBENCH_CHECKPOINT_BASE"
PLACEHOLDER = "{base}/"


def addresses(file: File) -> Iterator[str]:
    """Where to look, in order: the address, then the mirrors, ``{base}`` filled in.

    ``{base}`` is what ``DMLBENCH_CHECKPOINT_BASE`` names, then the ``checkpoints`` folder of the checkout that this is or was
    installed from, else that folder of the repository that the installed release names as its source; an address with none of them is left out. A file of another
    address is looked for under what the variable names, too, by its last part, if the registry has a hash to tell it by.
    """
    named, ours = os.environ.get(BASE), _checkpoints()
    for address in filter(None, (file.url, *file.mirrors)):
        at_base = address.startswith(PLACEHOLDER)
        last = address.removeprefix(PLACEHOLDER) if at_base else address.rpartition("/")[2]
        for base in filter(None, (named, ours) if at_base else (named if file.sha256 or file.hash else None,)):
            folder = base if "://" in base else str(Path(base).expanduser())
            yield f"{folder.rstrip('/')}/{last}"
        if not at_base:
            yield address


def _checkpoints() -> str | None:
    """The repository's ``checkpoints`` folder: that of the checkout that this is or was installed from (which pip notes down,
    PEP 610), or its address where a release says it (``setup.py``)."""
    if (folder := PACKAGE.parent / "checkpoints").is_dir():
        return str(folder)
    try:
        installed = distribution("dmlbench")
    except PackageNotFoundError:
        return None
    origin = urlsplit(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
    if origin.scheme == "file" and (folder := Path(url2pathname(origin.path)) / "checkpoints").is_dir():
        return str(folder)
    links = installed.metadata.get_all("Project-URL") or []
    source = next((link.removeprefix("Source, ") for link in links if link.startswith("Source, https://")), None)
    return source and f"{source}/raw/HEAD/checkpoints"


_ENDS = {"safetensors": "safetensors", "torch": "pth", "lightning": "ckpt"}


def fetch(name: str, file: File) -> tuple[Path, tuple[str, ...]]:
    """A file with addresses, from the cache, a folder or the network; and sentences about what was trusted.

    Raises:
        DataError: no address gives the file that the registry names; it states the reason for each.
    """
    folder = cache_folder() / "checkpoints"
    target = folder / f"{(file.sha256 or file.hash or 'first').replace(':', '-')[:23]}-{name}.{_ENDS[file.format]}"
    first = target.with_suffix(".sha256")
    try:
        known = File(sha256=file.sha256 or _remembered(first), hash=file.hash, bytes=file.bytes)
    except OSError as error:
        raise DataError(f"{first} cannot be read: {error.strerror}") from None
    if target.is_file():
        try:
            return verified(target, known), ()
        except DataError:
            target.unlink(missing_ok=True)
    troubles: list[str] = []
    for address in addresses(file):
        try:
            if not address.startswith(("https://", "http://")):
                local = url2pathname(urlsplit(address).path) if address.startswith("file:") else address
                return verified(Path(local), known), ()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
                request = Download(target.name, [address], known.bytes, known.sha256)
                fetched = verified(download(request, Path(scratch)), known)
                notes = () if known.sha256 else _trusted(fetched, first, name, file)
                return fetched.replace(target), notes
        except DataError as error:
            troubles.append(str(error).removeprefix(f"{target.name} cannot be downloaded: "))
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror} (DMLBENCH_CACHE names another)") from None
    if file.manual:
        troubles.append(file.manual)
    elif file.url is not None and file.url.startswith(PLACEHOLDER) and not file.mirrors and not own_registry():
        inside = f"checkpoints/{file.url.removeprefix(PLACEHOLDER)}"
        troubles.append(f"this package is without them, the repository of dmlbench has them as {inside}")
    raise DataError(
        f"the weights of {name!r} cannot be had: {'; '.join(troubles) or 'no address of them is known'}; add --weights FILE with a copy of your own, or set "
        f"{BASE} to a folder or an address that has them"
    )


def _remembered(path: Path) -> str | None:
    """The sha256 of the file that was trusted first; None where there was none."""
    text = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _trusted(fetched: Path, path: Path, name: str, file: File) -> tuple[str, ...]:
    """Keep the sha256 of a file that is fetched for the first time, and say so."""
    sha256 = sha256_of(fetched)
    with atomic_file(path) as part:
        part.write_text(f"{sha256}\n", encoding="ascii")
    stated = f"only {file.hash}… is published" if file.hash else "no hash of it is published"
    return (f"{name}: {stated}; trusted on first use with sha256 {sha256}, which later copies have to have",)


def weights_path(name: str, entry: Checkpoint) -> tuple[Path, tuple[str, ...]]:
    """Where the weights of a registered model lie on this machine, verified; and sentences about what was trusted.

    Raises:
        DataError: there is no file, or not the one that the registry names.
    """
    for file in entry.files:
        if file.path is not None:
            return verified(PACKAGE / "weights" / file.path, file), ()
        if file.url is not None:
            return fetch(name, file)
    how = next((f.manual for f in entry.files if f.manual), "no file is registered")
    raise DataError(f"model {name!r} has no file that can be loaded: {how}")

"""Where a registered model's weights lie on this machine; fetched where they are not in the package.

A fetched file gets its name only once its size and sha256 are those of the registry. It is kept under
the cache folder's ``checkpoints``. Processes that fetch the same file at once (torchrun) each write their own.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dmlbench.checkpoints import PACKAGE, Checkpoint, File, verified
from dmlbench.datasets.cache import cache_folder
from dmlbench.downloads import Download
from dmlbench.downloads import fetch as download
from dmlbench.errors import DataError

BASE = "DMLBENCH_CHECKPOINT_BASE"
PLACEHOLDER = "{base}/"


def addresses(file: File) -> Iterator[str]:
    """Where to look, in order: the address, then the mirrors, ``{base}`` filled in.

    ``{base}`` is what ``DMLBENCH_CHECKPOINT_BASE`` names, else the checkout's ``checkpoints`` folder.
    """
    for address in (file.url, *file.mirrors):
        if address is None:
            continue
        if not address.startswith(PLACEHOLDER):
            yield address
            continue
        base = os.environ.get(BASE) or str(PACKAGE.parent / "checkpoints")
        yield f"{base.rstrip('/')}/{address.removeprefix(PLACEHOLDER)}"


def fetch(name: str, file: File) -> Path:
    """A file with addresses, from the cache, a folder or the network.

    Raises:
        DataError: no address gives the file that the registry names; each one's trouble is told.
    """
    if file.sha256 is None or file.bytes is None:
        raise DataError(f"model {name!r}: the registry gives no sha256 and size, so nothing is fetched")
    folder = cache_folder() / "checkpoints"
    kept = folder / f"{file.sha256[:16]}-{name}.{file.format}"
    if kept.is_file():
        try:
            return verified(kept, file)
        except DataError:
            kept.unlink(missing_ok=True)
    troubles: list[str] = []
    for address in addresses(file):
        try:
            if not address.startswith(("https://", "http://")):
                return verified(Path(address), file)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as own:
                return download(Download(kept.name, [address], file.bytes, file.sha256), Path(own)).replace(kept)
        except DataError as error:
            troubles.append(str(error).removeprefix(f"{kept.name} cannot be downloaded: "))
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror} (DMLBENCH_CACHE names another)") from None
    raise DataError(
        f"the weights of {name!r} cannot be had: {'; '.join(troubles)} ({BASE} names an address or a folder that has them)"
    )


def weights_path(name: str, entry: Checkpoint) -> Path:
    """Where the weights of a registered model lie on this machine, verified.

    Raises:
        DataError: there is no file, or not the one that the registry names.
    """
    for file in entry.files:
        if file.path is not None:
            return verified(PACKAGE / "weights" / file.path, file)
        if file.url is not None:
            return fetch(name, file)
    how = next((f.manual for f in entry.files if f.manual), "no file is registered")
    raise DataError(f"model {name!r} has no file that can be loaded: {how}")

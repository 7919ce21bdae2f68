"""Where a registered model's weights lie on this machine; fetched where they are not in the package.

A fetched file is written under a temporary name and renamed once its size, sha256 and format are
those of the registry. It is kept under the cache folder's ``checkpoints``.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dmlbench.checkpoints import PACKAGE, Checkpoint, File, verified
from dmlbench.datasets.cache import cache_folder
from dmlbench.errors import DataError

BASE = "DMLBENCH_CHECKPOINT_BASE"
PLACEHOLDER = "{base}/"
TIMEOUT = 30.0
PIECE = 1 << 20


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


def _looks_like_html(head: bytes) -> bool:
    start = head.lstrip()[:15].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml"))


def download(address: str, target: Path, file: File) -> Path:
    """Fetch ``address`` to ``target``, checked before it gets that name.

    Raises:
        DataError: it cannot be reached, is a web page, or is not the file that the registry names.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(address, headers={"User-Agent": "dmlbench"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, part.open("wb") as stream:
            size, head = 0, b""
            while piece := answer.read(PIECE):
                head = head or piece
                size += len(piece)
                if _looks_like_html(head):
                    raise DataError("a web page came in place of the weights (a login or download page?)")
                if file.bytes is not None and size > file.bytes:
                    raise DataError(f"more than the {file.bytes} bytes that the registry says")
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        verified(part, file)
        part.replace(target)
    except urllib.error.HTTPError as error:
        raise DataError(f"the server answered {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise DataError(str(getattr(error, "reason", error))) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def fetch(name: str, file: File) -> Path:
    """A file with addresses, from the cache, a folder or the network.

    Raises:
        DataError: no address gives the file that the registry names; each one's trouble is told.
    """
    if file.sha256 is None:
        raise DataError(f"model {name!r}: the registry gives no sha256, so nothing is fetched")
    kept = cache_folder() / "checkpoints" / f"{file.sha256[:16]}-{name}.{file.format}"
    if kept.is_file():
        try:
            return verified(kept, file)
        except DataError:
            kept.unlink()
    troubles: list[str] = []
    for address in addresses(file):
        try:
            if address.startswith(("https://", "http://")):
                return download(address, kept, file)
            return verified(Path(address), file)
        except DataError as error:
            text = str(error)
            troubles.append(text if address in text else f"{address}: {text}")
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

"""Fetching a file, going on where an interrupted download stopped; its size and sha256 are checked where they are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmlbench.errors import DataError
from dmlbench.files import first_line

PIECE = 1 << 18
TIMEOUT = 30.0
"""seconds without an answer"""

Heard = Callable[[int, int], None]
"""Called with (bytes there, bytes in all, 0 where nobody says)."""


@dataclass(frozen=True)
class Download:
    """A public file.

    Attributes:
        name: what it is called here.
        urls: where it lies, tried in order.
        bytes, sha256: what it must be; None where nobody says.
    """

    name: str
    urls: Sequence[str]
    bytes: int | None
    sha256: str | None


class _Resuming:
    """A downloader for pooch that keeps what it has in a ``.part`` file and asks for the rest."""

    def __init__(self, file: Download, part: Path, heard: Heard) -> None:
        self.file, self.part, self.heard = file, part, heard

    def __call__(self, url: str, output_file: Any, _: Any, check_only: bool = False) -> None:
        have = self.part.stat().st_size if self.part.exists() else 0
        known = self.file.bytes
        if have and (known is None or have > known):  # without a size, what is there may be of another file
            self.part.unlink()
            have = 0
        if known is None or have < known:
            self._rest(url, have)
        self.part.replace(output_file)

    def _rest(self, url: str, have: int) -> None:
        import requests

        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            if "text/html" in answer.headers.get("Content-Type", ""):
                raise DataError(f"{url} answers with a web page, not with {self.file.name}")
            goes_on = answer.status_code == requests.codes.partial_content
            done = have if goes_on else 0
            size = self.file.bytes
            if size is None and "Content-Encoding" not in answer.headers:
                stated = answer.headers.get("Content-Length", "")
                size = int(stated) if stated.isdecimal() else None
            with self.part.open("ab" if goes_on else "wb") as stream:
                for piece in answer.iter_content(PIECE):
                    stream.write(piece)
                    done += len(piece)
                    self.heard(done, size or 0)
                    if size is not None and done > size:
                        raise DataError(f"{url} gives more than the {size:,} bytes of {self.file.name}")
        if size is not None and done < size:
            raise DataError(f"{url} broke off at {done:,} of {size:,} bytes; the same command goes on from there")


def fetch(file: Download, folder: Path, heard: Heard = lambda done, total: None) -> Path:
    """The file in ``folder``, downloaded if it is not there, its size and sha256 checked where they are known.

    Raises:
        DataError: no address gives the right file; it states the last reason.
    """
    import pooch
    import requests

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from None
    pooch.get_logger().disabled = True
    reason = "no address is known"
    for url in file.urls:
        part = folder / f".{file.name}.part"
        try:
            path = pooch.retrieve(
                url,
                known_hash=f"sha256:{file.sha256}" if file.sha256 else None,
                fname=file.name,
                path=folder,
                downloader=_Resuming(file, part, heard),
            )
            return Path(path)
        except DataError as error:
            reason = str(error)
        except requests.RequestException as error:
            reason = f"{url} cannot be reached: {type(error).__name__}"
        except (ValueError, OSError) as error:
            reason = f"{url}: {first_line(error)}"
    raise DataError(f"{file.name} cannot be downloaded: {reason}")

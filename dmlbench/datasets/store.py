"""Where the files of a data set lie: a folder, or a zip archive that is read without being unpacked."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dmlbench.datasets.pictures import Files, Packed, opened, shown
from dmlbench.errors import DataError


@dataclass(frozen=True, eq=False)
class Store:
    """Files by their path below ``root``, which is a folder or a zip archive."""

    root: Path

    @property
    def packed(self) -> bool:
        """Is it an archive?"""
        return self.root.is_file()

    @cached_property
    def names(self) -> list[str]:
        """Every file, in sorted order, with "/" between folders.

        Raises:
            DataError: the archive cannot be read.
        """
        if self.packed:
            with opened(self.root) as archive:
                return sorted(info.filename for info in archive.infolist() if not info.is_dir())
        paths = [Path(where, file) for where, _, files in os.walk(self.root, followlinks=True) for file in files]
        return sorted((path.relative_to(self.root).as_posix() for path in paths), key=os.fsencode)

    def folder_of(self, marker: str) -> str:
        """The folder that holds the file ``marker``, nearest to the root, as a prefix of names: "" or "a/b/".

        Raises:
            DataError: no such file.
        """
        matches = [name for name in self.names if name == marker or name.endswith("/" + marker)]
        if not matches:
            raise DataError(f"{shown(self.root)} has no {marker}")
        return min(matches, key=lambda name: (name.count("/"), name)).removesuffix(marker)

    def text(self, name: str) -> str:
        """What a text file holds; bytes that are not UTF-8 become surrogate escapes.

        Raises:
            DataError: it cannot be read.
        """
        try:
            content = self.files([name]).read(0)
        except (OSError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"list file {shown(self.root / name)} cannot be read: {reason}") from None
        return content.decode("utf-8-sig", "surrogateescape")

    def files(self, names: list[str]) -> Files:
        """These of its files as pictures."""
        return (Packed if self.packed else Files)(self.root, names)

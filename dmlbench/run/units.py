"""Units of work: how a run is cut into pieces that are saved as they finish, and which process computes which.

A unit is one search on one batch of queries, or on all of them. ``RUN/units/`` holds ``configuration.json``, the
configuration of the run, and one npz file for each finished unit, written atomically. A run that was killed resumes
from these files; a unit whose file cannot be read is computed again. :class:`Work` assigns units to the processes of a
``torchrun``, to the shards of a job array, or to the only process.
"""

import hashlib
import json
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmlbench.compact import npz_bytes, read_npz
from dmlbench.datasets.cache import cache_folder
from dmlbench.errors import DataError, NotComparable, UsageError
from dmlbench.files import prepare_folder, write_atomic
from dmlbench.results import json_bytes
from dmlbench.run.fingerprint import differing
from dmlbench.run.parallel import World

Arrays = dict[str, np.ndarray]
Unit = tuple[str, int, int]
"""The name of the search, and the first and last + 1 query of the batch."""


def refuse_other(stored: Mapping[str, Any], expected: Mapping[str, Any], where: Path, mend: str = "") -> None:
    """Raise unless two configurations are equal; ``mend`` tells the user what to do about it.

    Raises:
        NotComparable: they differ; the message names every differing key.
    """
    if keys := differing(stored, expected):
        differences = ", ".join(
            f"{key} ({_short(stored.get(key))} there, {_short(expected.get(key))} here)" for key in keys
        )
        raise NotComparable(f"{where} holds a run of another configuration: {differences}{mend and f'; {mend}'}")


def _short(value: Any) -> str:
    """A value as an error message shows it: the items of a list, hashes shortened."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value)) or "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) > 40 else text


@dataclass(frozen=True)
class Units:
    """The units of one run on disk, in ``folder``; ``part`` of it tells apart units of one name."""

    folder: Path
    part: str = ""

    @property
    def head(self) -> Path:
        """The file of the configuration."""
        return self.folder / "configuration.json"

    @property
    def mend(self) -> str:
        """What the user can do if the folder holds another run."""
        return f"remove {self.folder} to begin anew, or name another --out"

    def configuration(self) -> dict[str, Any] | None:
        """The configuration of the run on disk; None if there is none.

        Raises:
            DataError: the file is there and cannot be read.
        """
        try:
            return dict(json.loads(self.head.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.head} cannot be read: {error}; remove {self.folder} to begin anew") from None

    def begin(self, configuration: Mapping[str, Any]) -> None:
        """Make the folder and write the run's configuration; units that lie there without one may be of any run, and go."""
        prepare_folder(self.folder)
        for path in self.folder.glob("*.npz"):
            path.unlink()
        write_atomic(self.head, json_bytes(dict(configuration)))

    def path(self, unit: Unit) -> Path:
        """The file of a unit; its name is readable and unique."""
        name, a, b = f"{self.part}{unit[0]}", *unit[1:]
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9+=-]+', '_', name)[:20]}.{digest}.{a:07d}-{b:07d}.npz"

    def get(self, unit: Unit) -> Arrays | None:
        """The arrays of a finished unit; None where it is not finished, or its file is damaged."""
        path = self.path(unit)
        if not path.exists():
            return None
        try:
            return read_npz(path)
        except DataError:
            return None

    def put(self, unit: Unit, arrays: Arrays) -> None:
        """Save a finished unit.

        Raises:
            DataError: it cannot be written, e.g. because the disk is full.
        """
        write_atomic(self.path(unit), npz_bytes(arrays))

    def searched(self) -> bool:
        """Is a unit of a search on disk? Units that are computed once for all searches (clean embeddings) do not count."""
        return next(self._seconds(), None) is not None

    def spent(self) -> float:
        """Seconds spent on the saved units of searches, summed over all processes."""
        return sum(self._seconds(), 0.0)

    def _seconds(self) -> Iterator[float]:
        """Seconds of each saved unit of a search; damaged files are skipped, since they are computed again."""
        for path in sorted(self.folder.glob("*.npz")):
            with (
                suppress(OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error),
                zipfile.ZipFile(path) as bundle,
            ):
                if "seconds.npy" in bundle.namelist():
                    with bundle.open("seconds.npy") as stream:
                        yield float(np.lib.format.read_array(stream, allow_pickle=False).sum())

    def remove(self) -> None:
        """Delete the units, once the result is written, and the folder, unless somebody else's files are in it."""
        for path in sorted(self.folder.glob("*.npz")) + sorted(self.folder.glob(".*.part")) + [self.head]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def remembered(name: str, count: int, compute: Callable[[], Arrays]) -> Arrays:
    """Arrays from the cache folder, or computed and saved there; ``name`` must state everything that they depend on.

    The cache is ``embeddings/`` under ``DMLBENCH_CACHE`` or ``~/.cache/dmlbench``. A damaged file is computed again.
    """
    store = Units(cache_folder() / "embeddings")
    arrays = store.get((name, 0, count))
    if arrays is None:
        arrays = compute()
        prepare_folder(store.folder)
        store.put((name, 0, count), arrays)
    return arrays


@dataclass(frozen=True)
class Shard:
    """The ``index``-th of ``count`` shards of the work, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """``"2/8"``: the second of eight."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard {text!r} is not i/n with 1 <= i <= n, e.g. 2/8")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Work:
    """Which process computes which unit, and where finished ones are saved.

    Attributes:
        units: the units on disk; None if nothing is saved.
        world: the processes of a ``torchrun``, which share the units among them and exchange results.
        shard: the part of the units that this run computes, the others being left to other runs; None for all of them.
        gather: only read saved units (``dmlbench merge``); a missing one is an error.
    """

    units: Units | None = None
    world: World = field(default_factory=World)
    shard: Shard | None = None
    gather: bool = False

    def agree(self, configuration: Mapping[str, Any], resume: bool) -> None:
        """Save this run's configuration, or check that the saved one is the same.

        Raises:
            NotComparable: it is not.
            UsageError: there is an unfinished run, and ``resume`` is False.
        """
        if self.units is None:
            return
        if self.world.leads:
            stored = self.units.configuration()
            if stored is None:
                self.units.begin(configuration)
            else:
                told = "tell merge the model, the data set and the protocol that the shards were told"
                refuse_other(stored, configuration, self.units.folder.parent, told if self.gather else self.units.mend)
                if not (resume or self.shard or self.gather):
                    raise UsageError(
                        f"{self.units.folder.parent} holds an unfinished run: add --resume to go on with it, "
                        f"or remove {self.units.folder} to begin anew"
                    )
        self.wait()
        if not self.world.leads:
            refuse_other(self.units.configuration() or {}, configuration, self.units.folder.parent)

    def part(self, name: str) -> "Work":
        """The same with units of its own."""
        return replace(self, units=self.units and replace(self.units, part=f"{name}: "))

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self.world.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def once(
        self, name: str, count: int, compute: Callable[[], Arrays], shared: dict[str, Arrays] | None = None
    ) -> Arrays:
        """The arrays of a unit that is not split into batches: read from disk, or computed by every process and saved by the leader.

        ``shared`` holds the arrays that other calls have computed, by name and count; those of this call are added to it.
        """
        unit = (name, 0, count)
        arrays = self.units.get(unit) if self.units else None
        if arrays is None:
            known = (shared or {}).get(f"{name} {count}")
            arrays = dict(sorted(compute().items())) if known is None else known
            if self.units and self.world.leads:
                self.units.put(unit, arrays)
        if shared is not None:
            shared[f"{name} {count}"] = arrays
        return arrays

    def mine(self, position: int) -> bool:
        """Does this process compute the unit at this position of a list?"""
        if self.shard and position % self.shard.count != self.shard.index - 1:
            return False
        position //= self.shard.count if self.shard else 1
        return position % self.world.size == self.world.rank

    def map(
        self,
        name: str,
        bounds: Sequence[tuple[int, int]],
        compute: Callable[[int, int], Arrays],
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Arrays | None]:
        """The arrays of one search's batches in order, by :meth:`each`; None for a batch that belongs to another shard.

        Args:
            name: of the search; with the bounds it identifies the unit.
            bounds: first and last + 1 query of each unit.
            compute: (a, b) to the arrays of queries a to b.
            done: called with the number of queries that have just been finished.
        """
        units = {position: (name, a, b) for position, (a, b) in enumerate(bounds)}
        results = self.each(name, units, lambda position: compute(*bounds[position]), done)
        return [results.get(position) for position in units]

    def each(
        self,
        what: str,
        units: Mapping[int, Unit],
        compute: Callable[[int], Arrays],
        done: Callable[[int], None] = lambda count: None,
    ) -> dict[int, Arrays]:
        """The arrays of every unit by position: read from disk, or computed by the process to which the unit belongs (:meth:`mine`).

        Each unit also holds ``seconds`` (1,), the time it took. With several processes all of them return all
        units; a shard leaves out the units of other shards unless they are on disk already.

        Args:
            what: name of the units in messages.
            units: by position, which decides to whom each one belongs.
            compute: a position to the arrays of its unit.
            done: called with the number of queries that have just been finished.

        Raises:
            DataError: ``gather`` is True and a unit is not on disk.
        """
        results: dict[int, Arrays] = {}
        for position, unit in units.items():
            mine = self.mine(position)
            if not mine and (self.world.size > 1 or self.units is None):
                continue
            arrays = self.units.get(unit) if self.units else None
            if arrays is None and self.gather:
                missing = sum(self.units is None or self.units.get(other) is None for other in units.values())
                raise DataError(f"{missing} of {len(units)} units of {what!r} are missing: has every shard finished?")
            if arrays is None and mine:
                began = time.monotonic()
                arrays = dict(sorted(compute(position).items()))
                arrays["seconds"] = np.array([time.monotonic() - began])
                if self.units:
                    self.units.put(unit, arrays)
            if arrays is not None:
                results[position] = arrays
                done(unit[2] - unit[1])
        for theirs in self._exchange(results):
            results.update(theirs)
        return dict(sorted(results.items()))

    def _exchange(self, results: dict[int, Arrays]) -> list[dict[int, Arrays]]:
        """The results of every process."""
        if self.world.size == 1:
            return []
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, results)
        return everyone


def shared_by(folders: Sequence[Path]) -> dict[str, Any]:
    """The configuration of several shards' run folders, which must be the same in all of them.

    Raises:
        DataError: a folder has no units.
        NotComparable: two configurations differ.
    """
    first: dict[str, Any] | None = None
    for folder in folders:
        units = Units(folder / "units")
        stored = units.configuration()
        if stored is None:
            raise DataError(f"{folder} holds no units of a shard (no {units.head.name})")
        first = stored if first is None else first
        refuse_other(stored, first, folder)
    assert first is not None
    return first


def collect(folders: Sequence[Path], into: Units) -> dict[str, Any]:
    """Copy the units of several shards' run folders into one folder.

    Returns:
        Their common configuration.

    Raises:
        DataError: a folder has no units.
        NotComparable: the configurations of two of them, or of one and ``into``, differ.
    """
    shared, held = shared_by(folders), into.configuration()
    if held is None:
        into.begin(shared)
    else:
        refuse_other(held, shared, into.folder.parent, into.mend)
    for folder in folders:
        for path in sorted(Units(folder / "units").folder.glob("*.npz")):
            target = into.folder / path.name
            if not target.exists():
                read_npz(path)
                write_atomic(target, path.read_bytes())
    return shared

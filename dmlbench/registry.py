"""An ordered table of named entries: what every extendable kind (attacks, losses, ...) ends with."""

import difflib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dmlbench.errors import DataError, UsageError

T = TypeVar("T")


def _importing() -> bool:
    """Is a module of dmlbench being imported now?"""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "dmlbench"]
    return any(getattr(module.__spec__, "_initializing", False) for module in modules)


class Plugins:
    """The modules that installed packages name in an entry-point group: imported before the first look-up in any registry.

    Each adds to the registries what it offers (docs/extend.md). A failed import raises at every later look-up,
    since entries would be missing without a word.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Look for plugins again at the next look-up."""
        self.begun, self.problem = False, ""
        self.named: dict[str, str] = {}
        """By top package of what was imported: the plugin's name."""

    def load(self, now: bool = False) -> None:
        """Import them, once; not while a file of dmlbench is itself being imported, which a plugin would find half made.

        Args:
            now: even then, for a file that no plugin imports.

        Raises:
            DataError: one of them cannot be imported.
        """
        with self.lock:
            if not self.begun and (now or not _importing()):
                self.begun = True  # a plugin may itself look something up
                for point in entry_points(group=self.group):
                    self.named[point.module.partition(".")[0]] = point.name
                    try:
                        point.load()
                    except (Exception, SystemExit) as error:  # another package's code, which can fail in any way
                        text = f"{type(error).__name__}: {' '.join(str(error).split())}"  # all its lines
                        self.problem = f"plugin {point.name!r} ({point.value}) cannot be imported: {text}"
                        break
            if self.problem:
                raise DataError(self.problem)

    def files(self) -> dict[str, str]:
        """By file that was imported of a plugin's package: the plugin's name."""
        modules = [(self.named.get(name.partition(".")[0]), module) for name, module in list(sys.modules.items())]
        return {str(module.__file__): name for name, module in modules if name and getattr(module, "__file__", None)}


PLUGINS = Plugins("dmlbench.plugins")


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, else the known names."""
    names = list(known)
    folded = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 40 else ""


class Registry(Mapping[str, T], Generic[T]):
    """Names to entries, in the order they were added.

    A second entry of the same name raises ``ValueError``; asking for an unknown name raises
    :class:`~dmlbench.errors.UsageError` with a suggestion. :data:`PLUGINS` are imported before the first look-up.
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        for name, entry in (entries or {}).items():
            self.add(name, entry)

    def add(self, name: str, entry: T) -> T:
        """Add ``entry`` under ``name`` and return it.

        Raises:
            ValueError: the name is taken. TypeError: the entry is not what the others are, functions or records of one class.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        first = next(iter(self._entries.values()), entry)
        if not (callable(entry) if callable(first) else isinstance(entry, type(first))):
            due = "callable" if callable(first) else f"of class {type(first).__name__}"
            raise TypeError(f"{self.kind} {name!r} is of type {type(entry).__name__}; entries are {due}")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Use as a decorator: ``@TABLE.register("name")``."""
        return lambda entry: self.add(name, entry)

    def __getitem__(self, name: str) -> T:
        PLUGINS.load()
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}{suggest(name, self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        PLUGINS.load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        PLUGINS.load()
        return iter(self._entries)

    def __len__(self) -> int:
        PLUGINS.load()
        return len(self._entries)

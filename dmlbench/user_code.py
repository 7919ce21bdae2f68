"""A user's own code, named as ``FILE.py:NAME`` or ``MODULE:NAME``: the one place that imports and runs it.

Only what a user names on the command line, or hands over in Python, comes here; what a file names does not
(:func:`require_named`). Nothing of torch is imported, so that the command line can ask :func:`blame` at no cost.
"""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from dmlbench import files
from dmlbench.errors import DataError, DmlbenchError, UsageError
from dmlbench.registry import PLUGINS, suggest

PREFIX = "python:"
"""What stands before own code where other names are taken too: ``--model`` and ``--dataset``."""
RUN: dict[str, str] = {}
"""What was run in this process: as results call it, to a note that says so."""
_FILES: set[str] = set()
"""The files that were run."""


def first_line(error: BaseException) -> str:
    """An error in one line; of one of dmlbench the sentence alone."""
    return files.first_line(error) if isinstance(error, DmlbenchError) else files.described(error)


def place_of(error: BaseException, paths: Iterable[str]) -> str:
    """``" (my.py, line 7)"`` for the last line in one of ``paths`` that an error went through; "" where there is none."""
    known = set(paths)
    if isinstance(error, SyntaxError) and error.filename in known:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in known:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


@dataclass(frozen=True, eq=False)
class UserCode:
    """Something in a user's file or module.

    Attributes:
        text: as the user named it.
        name: the attribute.
        path: the file that it was read from, resolved.
        sha256: of that file.
        module: what the file became.
    """

    text: str
    name: str
    path: str
    sha256: str
    module: ModuleType

    @property
    def value(self) -> Any:
        """What has the name."""
        return getattr(self.module, self.name)

    @property
    def label(self) -> str:
        """The same for the same file wherever it lies, another one once it is changed: ``my.py:fn#0123456789ab``."""
        return f"{Path(self.path).name}:{self.name}#{self.sha256[:12]}"

    def called(self, name: str) -> None:
        """Note that results call this ``name``."""
        RUN[name] = f"{name} is your own code and was run ({Path(self.path).name}, sha256 {self.sha256[:12]})"

    def require(self, right: bool, problem: str) -> None:
        """Refuse what the code is or gave.

        Raises:
            DataError: it is not ``right``.
        """
        if not right:
            raise DataError(f"{self.text} {problem}")

    def require_takes(self, count: int, what: str) -> None:
        """Refuse what cannot be called with ``count`` positional arguments, which are ``what``.

        Raises:
            DataError: it cannot.
        """
        self.require(callable(self.value), f"is of type {type(self.value).__name__}, not a function of {what}")
        try:
            takes = inspect.signature(self.value)
        except (TypeError, ValueError):  # a builtin does not always say what it takes
            return
        try:
            takes.bind(*[None] * count)
        except TypeError:
            raise DataError(f"{self.text} takes {takes}, not {what}") from None

    def those_taken(self, **given: Any) -> dict[str, Any]:
        """Those of ``given`` that the function has parameters for.

        Raises:
            DataError: it is no function, or needs others.
        """
        what = f"a function of {' and '.join(given)}, or of fewer of them"
        self.require(callable(self.value), f"is of type {type(self.value).__name__}, not {what}")
        parameters = inspect.signature(self.value).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self.require(set(needed) <= set(given), f"needs ({', '.join(needed)}): it is called as {what}")
        return {p.name: given[p.name] for p in named if p.name in given}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the code gives.

        Raises:
            DataError: it fails; kind, first line and line number are named. Want of memory is for the caller.
        """
        try:
            return self.value(*args, **kwargs)
        except (Exception, SystemExit) as error:  # anybody's code
            _failed(self.text, error, self.path)


def _failed(text: str, error: BaseException, path: str) -> NoReturn:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        raise error
    raise DataError(f"{text} failed: {first_line(error)}{place_of(error, [path])}") from error


def load_user_code(text: str, prefix: str = "") -> UserCode:
    """The code of ``WHERE:NAME``, its file or module imported now.

    Args:
        text: WHERE is a ``.py`` file, or a module; a ``#`` and the first digits of the file's sha256 may follow the name.
        prefix: what stood before it, for messages.

    Raises:
        UsageError: no such file, or nothing of that name in it.
        DataError: the import fails, or the file has another sha256.
    """
    plain, _, digest = text.partition("#")
    where, colon, name = plain.rpartition(":")
    named = prefix + plain
    if not colon or not where or not name:
        raise UsageError(f"{named} needs a module or file and a name, e.g. {prefix}mine.py:make")
    in_file = where.endswith(".py")
    path = str(Path(where).expanduser().resolve()) if in_file else ""
    if in_file and not Path(path).is_file():
        raise UsageError(f"{prefix}{where} is not a file")
    try:
        if in_file:
            source = Path(path).read_bytes()
            module = _run(source, path)
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
            path = str(getattr(module, "__file__", None) or "")
            source = Path(path).read_bytes() if path else b""
    except (Exception, SystemExit) as error:  # anybody's code
        _failed(named, error, path)
    sha256 = hashlib.sha256(source).hexdigest()
    if not sha256.startswith(digest):
        raise DataError(f"{named} has changed: the sha256 of {where} begins with {sha256[:12]}, not {digest}")
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, ModuleType)]
        raise UsageError(f"{prefix}{where} has no function {name!r}{suggest(name, public)}")
    _FILES.add(path)
    return UserCode(named, name, path, sha256, module)


def _run(source: bytes, path: str) -> ModuleType:
    """The module that the bytes of a file make: those that are hashed, not what Python keeps of the file before it changed."""
    module = ModuleType(f"dmlbench_user_{hashlib.sha256(path.encode()).hexdigest()[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def require_named(what: str, name: str | None, where: object, how: str) -> None:
    """Refuse to run what only a file names.

    Args:
        what: of which kind ``name`` is.
        where: the file, for the message.
        how: the user can name it, for the message.

    Raises:
        UsageError: it is own code.
    """
    if name and PREFIX in name:
        raise UsageError(f"{where} names the {what} {name}: own code runs only where you name it, {how}")


def blame(error: BaseException) -> str | None:
    """What to say of an error that nobody foresaw, where own code was run before it, or which came through a plugin; None
    where neither is so."""
    plugins = PLUGINS.files()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in plugins:
            where = f"plugin {plugins[frame.filename]!r} failed{place_of(error, plugins)}"
            return f"{where}: {first_line(error)}; --debug shows the traceback"
    if not RUN:
        return None
    place = place_of(error, _FILES)
    who = place.strip(" ()") or f"own code is in use ({', '.join(RUN)})"
    return f"{who}: {first_line(error)}; --debug shows the traceback"

"""``python:WHERE:NAME``: the user's own function, the one form of model that runs code."""

import hashlib
import importlib
import importlib.util
import sys
from operator import index
from pathlib import Path
from types import ModuleType

from torch import nn

from dmlbench.errors import DataError, UsageError


def _imported(where: str) -> ModuleType:
    """The module of a name or of a ``.py`` file; running it is what the user asked for."""
    path = Path(where).expanduser()
    if where.endswith(".py"):
        if not path.is_file():
            raise UsageError(f"python:{where} is not a file")
        label = f"dmlbench_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(label, path)
        assert spec is not None and spec.loader is not None  # a .py file always has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(where)


def stated_shape(module: nn.Module, name: str) -> tuple[int, int, int] | None:
    """The (C, H, W) in a module's ``input_shape``, None where it has none.

    Raises:
        UsageError: it is not three positive integers.
    """
    stated = getattr(module, "input_shape", None)
    if stated is None:
        return None
    try:
        c, h, w = (index(value) for value in stated)
    except (TypeError, ValueError):
        c = h = w = 0
    if min(c, h, w) < 1:
        raise UsageError(f"{name}: input_shape {stated!r} is not (channels, height, width), three positive integers")
    return c, h, w


def made_by(rest: str) -> nn.Module:
    """What the function that ``rest`` (``WHERE:NAME``) names gives: a module, perhaps an Embedder.

    Raises:
        UsageError: no such function.
        DataError: it fails, or gives something else.
    """
    where, colon, attribute = rest.rpartition(":")
    if not colon or not where or not attribute:
        raise UsageError("python: needs a module or file and a name, e.g. python:mynets.py:make")
    try:
        factory = getattr(_imported(where), attribute, None)
        if not callable(factory):
            raise UsageError(f"python:{where} has no function {attribute!r}")
        made = factory() if not isinstance(factory, nn.Module) else factory
    except UsageError:
        raise
    except Exception as error:  # anybody's code
        raise DataError(f"python:{rest} failed: {type(error).__name__}: {error}") from None
    if not isinstance(made, nn.Module):
        raise DataError(f"python:{rest} gave a {type(made).__name__}, not a torch.nn.Module")
    return made

"""dmlbench: how robust is an embedding model? The robustness benchmark for deep metric learning."""

import os

# Threads that wait for the next small operation give the core back soon instead of spinning on it: on a
# machine that others use too, spinning made a run several times slower. libgomp reads this when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dmlbench.version import __version__

if TYPE_CHECKING:
    from dmlbench.attacks import ATTACKS
    from dmlbench.board.compare import compare
    from dmlbench.board.report import report
    from dmlbench.datasets import RetrievalDataset, TensorImages, load_dataset
    from dmlbench.embedding import DISTANCES, Embedder
    from dmlbench.evaluate import evaluate
    from dmlbench.models import load_model
    from dmlbench.protocol import Protocol
    from dmlbench.protocols import load_protocol
    from dmlbench.results import Evaluation
    from dmlbench.training.loop import train

_HOMES = {
    "ATTACKS": "attacks",
    "DISTANCES": "embedding",
    "Embedder": "embedding",
    "Evaluation": "results",
    "Protocol": "protocol",
    "RetrievalDataset": "datasets",
    "TensorImages": "datasets",
    "compare": "board.compare",
    "evaluate": "evaluate",
    "load_dataset": "datasets",
    "load_model": "models",
    "load_protocol": "protocols",
    "report": "board.report",
    "train": "training.loop",
}
"""Public names by the module that they are in, which is imported when one of them is first accessed."""

__all__ = [
    "ATTACKS",
    "DISTANCES",
    "Embedder",
    "Evaluation",
    "Protocol",
    "RetrievalDataset",
    "TensorImages",
    "__version__",
    "compare",
    "evaluate",
    "load_dataset",
    "load_model",
    "load_protocol",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dmlbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dmlbench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """``dmlbench.evaluate`` is the function: importing the file of that name does not put the module in its place."""
        super().__setattr__(name, value.evaluate if name == "evaluate" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package

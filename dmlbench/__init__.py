"""dmlbench: how robust is an embedding model? The robustness benchmark for deep metric learning."""

import os

# Threads that wait for the next small operation give the core back soon instead of spinning on it: on a
# machine that others use too, spinning made a run several times slower. libgomp reads this when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from typing import TYPE_CHECKING, Any

from dmlbench.attacks import ATTACKS
from dmlbench.datasets import RetrievalDataset, TensorImages, load_dataset
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.evaluate import evaluate
from dmlbench.models import load_model
from dmlbench.protocol import Protocol, load_protocol
from dmlbench.results import Evaluation
from dmlbench.version import __version__

if TYPE_CHECKING:
    from dmlbench.board.compare import compare
    from dmlbench.board.report import report
    from dmlbench.training.loop import train

_LATER = {"compare": "dmlbench.board.compare", "report": "dmlbench.board.report", "train": "dmlbench.training.loop"}
"""Functions by the module that they are in, which is imported when one of them is first asked for."""

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
    if name not in _LATER:
        raise AttributeError(f"module 'dmlbench' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)

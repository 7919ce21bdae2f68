"""dmlbench: how robust is an embedding model? The robustness benchmark for deep metric learning."""

import os

# Threads that wait for the next small operation give the core back soon instead of spinning on it: on a
# machine that others use too, spinning made a run several times slower. libgomp reads this when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from dmlbench.attacks import ATTACKS
from dmlbench.datasets import RetrievalDataset, TensorImages, load_dataset
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.evaluate import evaluate
from dmlbench.models import load_model
from dmlbench.protocol import Protocol, load_protocol
from dmlbench.results import Evaluation
from dmlbench.version import __version__

__all__ = [
    "ATTACKS",
    "DISTANCES",
    "Embedder",
    "Evaluation",
    "Protocol",
    "RetrievalDataset",
    "TensorImages",
    "__version__",
    "evaluate",
    "load_dataset",
    "load_model",
    "load_protocol",
]

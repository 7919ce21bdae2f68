"""dmlbench: how robust is an embedding model? The robustness benchmark for deep metric learning."""

from dmlbench.datasets import RetrievalDataset, load_dataset
from dmlbench.embedding import Distance, Embedder
from dmlbench.models import load_model
from dmlbench.version import __version__

__all__ = ["Distance", "Embedder", "RetrievalDataset", "__version__", "load_dataset", "load_model"]

"""The parts of a result that describe the model, the data set, the protocol and the machine."""

import platform
import sys
from collections.abc import Sequence

import numpy as np
import torch

from dmlbench.datasets import RetrievalDataset
from dmlbench.datasets.base import DISTRACTOR
from dmlbench.embedding import Embedder
from dmlbench.protocol import Protocol
from dmlbench.results import DatasetInfo, Environment, ModelInfo, ProtocolInfo
from dmlbench.run.subject import Subject
from dmlbench.version import __version__


def model_info(embedder: Embedder) -> ModelInfo:
    """The record of the model."""
    card = embedder.card
    with torch.no_grad():
        shape = (2, *embedder.input_shape)
        dim = embedder.eval()(torch.zeros(shape, device=embedder.device)).shape[1]
    if card is None:
        return ModelInfo(
            id=embedder.name,
            weights_sha256=embedder.weights_sha256,
            arch=embedder.arch,
            space=embedder.distance.space,
            embed_dim=dim,
        )
    return ModelInfo(
        id=embedder.name,
        weights_sha256=embedder.weights_sha256,
        arch=card.arch.builder,
        loss=card.train.loss,
        defense=card.defense.name,
        space=embedder.distance.space,
        embed_dim=dim,
    )


def dataset_info(subject: Subject) -> DatasetInfo:
    """The record of the data set."""
    d = subject.dataset
    return DatasetInfo(
        name=d.name,
        split=d.split,
        sha256=d.sha256,
        n_queries=len(subject.rows),
        **counts(d),
        n_without_positive=int((~subject.scene.has_positive).sum()),
    )


def counts(dataset: RetrievalDataset) -> dict[str, int]:
    """The number of queries, gallery images and classes of a data set, by the record's field names."""
    return {
        "n_queries_full": len(dataset.query),
        "n_gallery": len(dataset.gallery),
        "n_classes": len(np.setdiff1d(dataset.labels[dataset.gallery], [DISTRACTOR])),
    }


def protocol_info(official: Protocol, run: Protocol, seed: int, shape: Sequence[int]) -> ProtocolInfo:
    """The record of the protocol, with the norm and eps that it uses on images of this shape."""
    sizes = run.sizes(shape)
    return ProtocolInfo(
        name=official.name,
        version=official.version,
        sha256=official.sha256,
        seed=seed,
        norm=run.norm if sizes else None,
        eps=sizes,
    )


def environment(
    device: torch.device,
    argv: Sequence[str],
    *,
    precision: str = "float32",
    compiled: bool = False,
    notes: Sequence[str] = (),
) -> Environment:
    """The record of software, device, and how gradients were computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Environment(
        dmlbench=__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        python=sys.version.split()[0],
        device=device.type,
        device_name=name,
        gradient_precision=precision,
        compiled=compiled,
        notes=tuple(notes),
        argv=tuple(word for word in argv if word != "--resume"),
    )

"""A training run on disk: everything that a resume needs, and the registry entry of the last weights."""

import hashlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmlbench import checkpoints as registry
from dmlbench.checkpoints import sha256_of
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.files import write_atomic
from dmlbench.models import fill, parameter_count, probe_images, read_weights
from dmlbench.models.spec import input_of
from dmlbench.preprocess import Preprocess
from dmlbench.results import json_bytes
from dmlbench.training.defenses import DEFENSES, Learner
from dmlbench.training.progress import Progress
from dmlbench.training.recipe import Recipe, command_of

RUN_FILES = ("state.pt", "last.safetensors", "best.safetensors", "checkpoint.json", "log.csv")
"""What a run leaves from its first check on, and no other run writes over."""


def checkpoint_entry(recipe: Recipe, preprocess: Preprocess, begun: str | None = None) -> registry.Checkpoint:
    """The registry's record of a model before its weights exist; ``begun`` says which weights it began with."""
    defense = DEFENSES[recipe.defense]
    clean = recipe.defense == "none"
    kwargs = recipe.arch_kwargs if ":" in recipe.arch else {"embed_dim": recipe.embed_dim, **recipe.arch_kwargs}
    return registry.Checkpoint(
        title=recipe.title or f"{recipe.dataset}, {recipe.arch}, {recipe.loss}, {defense.title}",
        defense=registry.Defense(
            name=recipe.defense, params={} if clean else defense.parameters(recipe.defense_params)
        ),
        train=registry.Train(
            loss=recipe.loss,
            eps=str(recipe.eps) if defense.searches else None,
            steps=recipe.steps if defense.searches else None,
            iterations=recipe.iterations,
            seed=recipe.seed,
            command=command_of(recipe),
        ),
        arch=registry.Arch(
            builder=recipe.arch,
            kwargs=kwargs,
            embed_dim=recipe.embed_dim,
            head=recipe.embed_dim > 0 or ":" not in recipe.arch,
        ),
        input=input_of(preprocess),
        normalize=registry.Normalize(mean=recipe.mean, std=recipe.std),
        embedding=registry.Embedding(
            normalized=recipe.space != "E", metric="cosine" if recipe.space == "C" else "euclidean"
        ),
        dataset=registry.DatasetRef(name=recipe.dataset, split="train"),
        extra_training_data=begun,
        license="unknown" if ":" in recipe.dataset else "Apache-2.0",
        paper=registry.Paper(**asdict(defense.paper)) if defense.paper else None,
    )


def save_state(
    folder: Path,
    recipe: Recipe,
    learner: Learner,
    optimizer: Any,
    rows: list[Progress],
    best: float,
    processes: int,
    begun: str | None,
    data: str,
) -> None:
    """Everything that a resume needs, as one file."""
    buffer = io.BytesIO()
    torch.save(
        {
            "recipe": recipe.model_dump_json(),
            "learner": learner.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rows": [asdict(row) for row in rows],
            "best": best,
            "processes": processes,
            "begun": begun,
            "data": data,
        },
        buffer,
    )
    write_atomic(folder / "state.pt", buffer.getvalue())


def read_state(folder: Path, recipe: Recipe, processes: int, data: str) -> dict[str, Any]:
    """The state of an earlier run of the same recipe, on data of the same sha256, by as many processes, on whose number the
    batches depend.

    Raises:
        DataError: there is none, or it cannot be read.
        UsageError: it belongs to another recipe, the differing keys are named; or to other data, or another number of processes.
    """
    path = folder / "state.pt"
    if not path.is_file():
        raise DataError(f"nothing to resume: {path} does not exist")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        earlier = Recipe.model_validate_json(state["recipe"])
    except Exception as error:  # torch raises many kinds for a broken file
        raise DataError(f"{path} cannot be read: {error}") from None
    if differing := recipe.differing(earlier):
        raise UsageError(f"{folder} holds a run of another recipe; differing keys: {', '.join(differing)}")
    if (before := int(state.get("processes", 1))) != processes:
        raise UsageError(
            f"{folder} was begun by {before} process(es), this run has {processes}: the batches would differ"
        )
    if state.get("data", data) != data:  # runs of before this was kept do not say it
        raise UsageError(f"{folder} was begun on other pictures or labels than data set {recipe.dataset!r} has now")
    return state


def finish(
    folder: Path, recipe: Recipe, preprocess: Preprocess, embedder: Embedder, begun: str | None, processes: int
) -> dict[str, Any]:
    """Write ``checkpoint.json``, the registry entry of the last weights as they are stored, and return it; its command
    trains by as many processes."""
    path = folder / "last.safetensors"
    entry = checkpoint_entry(recipe, preprocess, begun)
    threads = torch.get_num_threads() if embedder.device.type == "cpu" else None
    command = entry.train.command if threads is None else f"{entry.train.command} --threads {threads}"
    embedder = embedder.cpu().eval()
    fill(embedder.network, read_weights(path), str(path))
    probe = probe_images(embedder.input_shape)
    with torch.no_grad():
        embedding = embedder(probe)[0]
    done = entry.model_copy(
        update={
            "train": entry.train.model_copy(
                update={
                    "command": command if processes == 1 else f"torchrun --nproc-per-node {processes} -m {command}",
                    "torch": torch.__version__,
                    "threads": threads,
                }
            ),
            "arch": entry.arch.model_copy(
                update={"embed_dim": len(embedding), "n_params": parameter_count(embedder.network)}
            ),
            "files": (
                registry.File(path=f"{recipe.id}.safetensors", sha256=sha256_of(path), bytes=path.stat().st_size),
            ),
            "probe": registry.Probe(
                inputs_sha256=hashlib.sha256(probe.numpy().tobytes()).hexdigest(),
                embedding=tuple(round(float(v), 6) for v in embedding[:8]),
            ),
        }
    )
    table: dict[str, Any] = {recipe.id: done.model_dump(mode="json", exclude_defaults=True)}
    write_atomic(folder / "checkpoint.json", json_bytes(table))
    return table

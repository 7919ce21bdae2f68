"""Models with a record that says how they are built, fed and compared: registered ones, and runs of ``train``."""

from pathlib import Path

import torch

from dmlbench.checkpoints import Checkpoint, Embedding, File, checkpoint, sha256_of, verified
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.models.architectures import MOST_PARAMETERS, build_network
from dmlbench.models.assembly import Chosen, assemble, load
from dmlbench.models.behaviour import probe_images
from dmlbench.models.fetching import weights_path
from dmlbench.models.files import read_file
from dmlbench.models.registration import read_entry
from dmlbench.models.spec import ModelOptions, preprocess_of
from dmlbench.models.weights import fill, read_weights


def space_of(stated: Embedding) -> str:
    """The letter of the embedding space that a record states."""
    if stated.metric == "cosine":
        return "C"
    return "N" if stated.normalized else "E"


def build(entry: Checkpoint, name: str) -> Embedder:
    """The untrained :class:`Embedder` that a checkpoint describes.

    Raises:
        UsageError: it cannot be built, or has more than :data:`MOST_PARAMETERS` parameters.
    """
    small = ":" not in entry.arch.builder
    width = None if small else entry.arch.embed_dim if entry.arch.head else 0
    built = build_network(entry.arch.builder, embed_dim=width, kwargs=entry.arch.kwargs, most=MOST_PARAMETERS)
    preprocess = preprocess_of(entry.input)
    mean, std = entry.normalize.of_unit()
    embedder = Embedder(
        built.network,
        preprocess.shape,
        mean=mean,
        std=std,
        distance=DISTANCES[space_of(entry.embedding)],
        name=name,
        preprocess=preprocess,
    )
    embedder.lipschitz = entry.embedding.lipschitz
    return embedder


def check_probe(embedder: Embedder, entry: Checkpoint, name: str) -> None:
    """Refuse a model whose embedding of the fixed input is not the registered one."""
    if entry.probe is None:
        return
    with torch.no_grad():
        embedding = embedder.eval()(probe_images(embedder.input_shape))[0]
    if len(entry.probe.embedding) > len(embedding):
        raise DataError(
            f"model {name!r}: its probe has {len(entry.probe.embedding)} values, its embeddings have {len(embedding)}"
        )
    embedding = embedding[: len(entry.probe.embedding)]
    expected = torch.tensor(entry.probe.embedding)
    gap = float((embedding - expected).abs().max())
    if not gap <= entry.probe.atol:
        raise DataError(
            f"model {name!r} gives another embedding for the probe input than registered "
            f"(off by {gap:.2g}, allowed {entry.probe.atol:.2g}): wrong preprocessing or weights"
        )


_OF_THE_RECORD = (
    "embed_dim", "head", "output_key", "input_size", "resize", "pad", "box", "interpolation", "order", "channels",
    "mean", "std", "scale", "distance", "normalize", "name",
)  # fmt: skip
"""Options that a model with a record, registered or in a run folder, does not take."""


def registered(name: str, options: ModelOptions) -> Embedder:
    """A model of checkpoints.json; ``--weights`` gives the file of one that is downloaded by hand."""
    entry = checkpoint(name)
    only_the_record(f"model {name!r} is registered", options)
    embedder = build(entry, name)
    if options.weights is not None:
        path = Path(options.weights).expanduser()
        file_notes = _require_registered_file(path, entry, name)
    else:
        path, file_notes = weights_path(name, entry)
    if path.suffix == ".safetensors" and ":" not in entry.arch.builder:
        fill(embedder.network, read_weights(path), f"weights file {path}")
        embedder.weights_sha256 = sha256_of(path)
    else:
        file = read_file(path, options.checkpoint_key)
        chosen = Chosen(
            embed_dim=entry.arch.embed_dim if entry.arch.head else 0,
            without=_named(options.leave_out),
            prefix=options.prefix,
            size=embedder.preprocess.size,
        )
        made = assemble(entry.arch.builder, entry.arch.kwargs, file, chosen, most=MOST_PARAMETERS)
        built, notes = load(made, file, entry.arch.builder, chosen)
        embedder.network, embedder.weights_sha256 = built.network, file.sha256
        embedder.notes = tuple(notes)
    embedder.notes = (*file_notes, *embedder.notes)
    if entry.status != "active":
        embedder.notes = (*embedder.notes, standing(name, entry))
    embedder.card, embedder.arch = entry, entry.arch.builder
    check_probe(embedder, entry, name)
    return embedder


def _named(text: str | None) -> tuple[str, ...]:
    return tuple(part for part in (text or "").split(",") if part)


def standing(name: str, entry: Checkpoint) -> str:
    """One sentence about a registered model that is no longer current."""
    instead = f" by {entry.superseded_by}" if entry.superseded_by else ""
    return f"{name} is {entry.status}{instead}{': ' + entry.reason if entry.reason else ''}"


def _require_registered_file(path: Path, entry: Checkpoint, name: str) -> tuple[str, ...]:
    """Refuse a file that the registry's hash does not allow; a sentence where it states none.

    Raises:
        DataError: another file.
    """
    stated = [file for file in entry.files if file.sha256 or file.hash]
    if not stated or not path.is_file():
        return ()
    for file in stated:
        try:
            verified(path, File(sha256=file.sha256, hash=file.hash))
        except DataError:
            continue
        return ()
    raise DataError(
        f"--weights has sha256 {sha256_of(path)[:12]}..., which is not the file registered for model {name!r}"
    )


def only_the_record(what: str, options: ModelOptions) -> None:
    """Refuse options that a model with a record does not take."""
    if given := [key for key in _OF_THE_RECORD if getattr(options, key) is not None]:
        raise UsageError(
            f"{what}: its record says how it is fed and compared, so "
            f"--{given[0].replace('_', '-').replace('order', 'channel-order')} does not go with it (--model FILE --spec takes other settings)"
        )


def trained(run: Path, options: ModelOptions) -> Embedder:
    """The last weights of a finished run of ``dmlbench train``."""
    name, entry = read_entry(run)
    if options.weights is not None or options.spec is not None:
        raise UsageError(f"--model {run} is a training run with its own weights: leave --weights and --spec out")
    only_the_record(f"--model {run} is a training run", options)
    path = verified(run / "last.safetensors", entry.files[0])
    embedder = build(entry, name)
    fill(embedder.network, read_weights(path), f"weights file {path}")
    embedder.card, embedder.arch, embedder.weights_sha256 = entry, entry.arch.builder, entry.files[0].sha256
    check_probe(embedder, entry, str(run))
    return embedder

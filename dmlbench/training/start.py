"""What training begins with: a network that fits the images, and given weights in it (``init``).

Given weights are loaded whole or not at all, as ``dmlbench evaluate`` loads them. Only the last layer of timm's and
torchvision's networks may be another: it is what makes the embedding, and is new where the file's has another width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dmlbench.checkpoints import Checkpoint, checkpoints, verified
from dmlbench.datasets import RetrievalDataset, dataset_entry
from dmlbench.datasets.pictures import shown
from dmlbench.embedding import Embedder, digest_of
from dmlbench.errors import UsageError
from dmlbench.models import fill, read_file
from dmlbench.models.architectures import build_network, sized
from dmlbench.models.assembly import Chosen, assemble, load, require_left_out
from dmlbench.models.fetching import weights_path
from dmlbench.models.files import WeightsFile, is_weights
from dmlbench.models.heads import HEADS, head_of, head_width
from dmlbench.models.layouts import left_out, unknown
from dmlbench.models.registration import read_entry
from dmlbench.models.weights import listed
from dmlbench.preprocess import Preprocess
from dmlbench.registry import suggest
from dmlbench.training.recipe import PUBLISHER, Recipe


@dataclass(frozen=True)
class Given:
    """Weights to begin with.

    Attributes:
        path: the file, or the folder of a hub.
        called: what a record calls them.
        card: their record, where they have one.
        notes: sentences about how they were had.
    """

    path: Path
    called: str
    card: Checkpoint | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Begun:
    """What was loaded: ``origin`` for the record, ``notes`` for the user."""

    origin: str
    notes: tuple[str, ...]


def given(init: str) -> Given:
    """The weights that ``init`` names: a registered id, a run folder of ``dmlbench train``, or a file.

    Raises:
        DataError: they cannot be had, or are not those of their record.
    """
    path = Path(init).expanduser()
    if init in checkpoints():
        card = checkpoints()[init]
        weights, notes = weights_path(init, card)
        return Given(weights, f"{init}, trained on {card.dataset.name}", card, notes)
    if (path / "checkpoint.json").is_file():
        name, card = read_entry(path)
        file = verified(path / "last.safetensors", card.files[0])
        return Given(file, f"{name}, trained on {card.dataset.name}", card)
    return Given(path, f"the file {shown(path.name)}")


def record_of(init: str | None) -> Checkpoint | None:
    """The record of the weights that ``init`` names, where they have one; nothing is fetched.

    Raises:
        UsageError: it names no weights.
    """
    if init is None or init == PUBLISHER:
        return None
    if init in checkpoints():
        return checkpoints()[init]
    path = Path(init).expanduser()
    if (path / "checkpoint.json").is_file():
        return read_entry(path)[1]
    if not is_weights(path):
        raise UsageError(
            f"init {init!r} is no weights file, no run folder and no registered model{suggest(init, checkpoints())}"
        )
    return None


def architecture_of(init: str | None) -> dict[str, Any]:
    """The keys of a recipe that the record behind ``init`` answers: the network, and its last layer where it has one."""
    card = record_of(init)
    if card is None:
        return {}
    kwargs = {key: value for key, value in card.arch.kwargs.items() if key != "embed_dim"}
    width = card.arch.kwargs.get("embed_dim", card.arch.embed_dim)
    return {"arch": card.arch.builder, "arch_kwargs": kwargs} | ({"embed_dim": width} if card.arch.head else {})


def settled(recipe: Recipe) -> tuple[Recipe, Preprocess]:
    """The recipe with what it leaves to network and data filled in, and how pictures are prepared.

    Filled in are mean and std, as the record of the given weights or the maker of the network states them; channels and
    side of our own networks; the size of a vision transformer. Pictures are prepared as the field does at
    ``input_size``, by default the data set's; those of a published network as its publication says.

    Raises:
        UsageError: the network does not take its arguments, or another size than its own.
    """
    channels, *sides = dataset_entry(recipe.dataset).shape
    size = recipe.input_size or (sides[0], sides[1])
    inside = recipe.arch if recipe.arch != "ensemble" else str(recipe.arch_kwargs.get("member", "conv3"))
    kwargs = {k: v for k, v in recipe.arch_kwargs.items() if inside == recipe.arch or k not in ("member", "members")}
    built = build_network(inside, kwargs=kwargs)
    preprocess = Preprocess.standard((channels, *size))
    more: dict[str, Any] = {}
    if built.fed is not None:
        preprocess = built.fed.preprocess
        if recipe.input_size not in (None, preprocess.size):
            raise UsageError(
                f"network {inside!r} is fed {preprocess.size[0]}x{preprocess.size[1]}: leave input_size out"
            )
    elif ":" in inside:
        more = sized(built, size)
    elif built.input_shape is not None and built.takes:
        built_sizes = dict(zip(("channels", "size"), built.input_shape[:2], strict=True))
        sizes = {"channels": channels} | ({"size": size[0]} if size[0] == size[1] else {})
        more = {key: value for key, value in sizes.items() if key in built.takes and value != built_sizes[key]}
    card = record_of(recipe.init)
    mean, std = (built.mean, built.std) if card is None else card.normalize.of_unit()
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in more.items()}
    changes: dict[str, Any] = {"arch_kwargs": {**plain, **recipe.arch_kwargs}}
    if (recipe.mean, recipe.std) == (None, None) and mean and std and len(mean) == len(std) == preprocess.channels:
        changes |= {"mean": mean, "std": std}
    return recipe.model_copy(update=changes), preprocess


def learnable(dataset: RetrievalDataset, per_class: int) -> tuple[np.ndarray, list[str]]:
    """(N,) the rows to learn from, and a sentence on each kind of row that is left out, and on copies, which are not.

    Left out are images of no class, and classes with fewer than ``per_class`` images where two others remain.
    """
    labels, notes = dataset.labels, list(dataset.notes)
    rows = np.flatnonzero(labels >= 0)
    if nobody := len(labels) - len(rows):
        notes.append(f"{nobody:,} images of no class (junk, distractors) are not learnt from")
    classes, counts = np.unique(labels[rows], return_counts=True)
    short = classes[counts < per_class]
    if len(short) and len(classes) - len(short) >= 2:
        names = [shown(str(dataset.class_names[c])) if len(dataset.class_names) > c else str(c) for c in short]
        several = len(short) != 1
        notes.append(
            f"{len(short)} class{'es' * several} with fewer than {per_class} images {'are' if several else 'is'} not "
            f"learnt from: {listed(names)}"
        )
        rows = rows[~np.isin(labels[rows], short)]
    contents = np.empty(0) if dataset.copies_count else dataset.copies[rows]
    if copies := int((contents >= 0).sum()) - len(np.unique(contents[contents >= 0])):
        notes.append(f"{copies:,} images are copies of others, and learnt from: a copy is an easy positive")
    return rows, notes


def begin(embedder: Embedder, recipe: Recipe) -> Begun | None:
    """Put the weights that ``recipe.init`` names into the untrained network; None where it names none.

    Raises:
        UsageError: no such weights, weights of another architecture, or trained layers that ``init_without`` does not name.
        DataError: they are broken, or do not fit.
    """
    if recipe.init is None:
        return None
    of_ensemble = recipe.init != PUBLISHER and _of_an_ensemble(recipe.init)
    alone = recipe.arch != "ensemble" or of_ensemble
    parts = [embedder.network] if alone else list(embedder.network.members)  # type: ignore[arg-type]
    builder = recipe.arch if alone else str(recipe.arch_kwargs.get("member", "conv3"))
    kwargs = {k: v for k, v in recipe.arch_kwargs.items() if alone or k not in ("member", "members")}
    kwargs |= {} if ":" in builder else {"embed_dim": recipe.embed_dim}
    notes: list[str] = []
    if recipe.init == PUBLISHER:
        source = build_network(builder, embed_dim=0, pretrained=True, kwargs=kwargs).network
        origin = f"the published weights of {builder} (sha256 of the tensors {digest_of(source)})"
    else:
        weights = given(recipe.init)
        if weights.card is not None and weights.card.arch.builder != builder:
            raise UsageError(f"init {recipe.init!r} is a {weights.card.arch.builder}, and the network is a {builder}")
        file = read_file(weights.path)
        source, more_notes = _source(builder, kwargs, recipe, file, embedder.input_shape[1:])
        notes += [*weights.notes, *more_notes]
        origin = f"{weights.called} (sha256 {file.sha256})"
    fresh = [_take_over(part, source, recipe) for part in parts]
    if fresh[0]:
        notes.append(f"the last layer ({fresh[0]}, {recipe.embed_dim} values) is new")
    return Begun(f"begins with {origin}", tuple(notes))


def _of_an_ensemble(init: str) -> bool:
    card = record_of(init)
    return card is not None and card.arch.builder == "ensemble"


def _source(
    builder: str, kwargs: dict[str, Any], recipe: Recipe, file: WeightsFile, size: tuple[int, ...]
) -> tuple[nn.Module, list[str]]:
    """A network with all of a file in it: without its last layer where that has another width than the recipe's."""
    sides = (size[0], size[1])
    made = assemble(builder, kwargs, file, Chosen(size=sides))
    without = named = tuple(part for part in recipe.init_without.split(",") if part)
    if ":" in builder and head_width(made.built.network, made.matched.tensors) != recipe.embed_dim:
        made = assemble(builder, kwargs, file, Chosen(embed_dim=0, size=sides))
        without += HEADS
    for layer in named:
        require_left_out("init_without", layer, file, made.matched, made.built.network)
    left = left_out(file, made.matched, made.built.network)
    if stray := list(unknown(left, made.matched, made.built.network, without)):
        layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in stray))
        raise UsageError(
            f"{file.path} holds trained layers that {builder} would leave out: {listed(stray, 3)}; "
            f"--set init_without={','.join(layers)} begins without them"
        )
    built, notes = load(made, file, builder, Chosen(without=None))
    return built.network, notes


def _take_over(network: nn.Module, source: nn.Module, recipe: Recipe) -> str | None:
    """Copy the weights of ``source`` into ``network``; the name of its last layer where that is new and stays as it is."""
    state, given_state = network.state_dict(), source.state_dict()
    head = head_of(network)
    fresh = {k: v for k, v in state.items() if k not in given_state and head is not None and k.startswith(f"{head}.")}
    fill(network, {**fresh, **given_state}, f"init {recipe.init}")
    return head if fresh else None

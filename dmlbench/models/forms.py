"""The forms in which ``--model`` names a model, and from each to an :class:`Embedder`.

======================  ===========================================================================
a registered id         checkpoints.json
``timm:NAME``           timm's network; ``torchvision:NAME`` and ``hf-hub:NAME`` alike
a weights file          with ``--spec``, or of an architecture that is recognised (RobRank's ``.ckpt``)
a run folder            what ``dmlbench train`` left: its last weights
``python:WHERE:NAME``   the user's own function; WHERE is a module or a ``.py`` file. Only this form runs code
``ensemble:A,B``        several of these, their embeddings side by side
======================  ===========================================================================
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import index
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from dmlbench.checkpoints import Checkpoint, checkpoint, checkpoints, sha256_of, verified
from dmlbench.embedding import DISTANCES, Distance, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.fetching import weights_path
from dmlbench.models.architectures import (
    MOST_PARAMETERS,
    Built,
    Ensemble,
    build_network,
    head_of,
    head_width,
    with_head,
)
from dmlbench.models.behaviour import probe_images, settle
from dmlbench.models.inspection import best_fit
from dmlbench.models.spec import ModelOptions, Spec, preprocess_of
from dmlbench.models.weights import SUFFIXES, WeightsFile, fill, fill_from, read_file, read_weights, strip
from dmlbench.preprocess import Preprocess
from dmlbench.registration import read_entry
from dmlbench.registry import Registry, suggest


def space_of(entry: Checkpoint) -> str:
    """The letter of the checkpoint's embedding space."""
    if entry.embedding.metric == "cosine":
        return "C"
    return "N" if entry.embedding.normalized else "E"


def build(entry: Checkpoint, name: str) -> Embedder:
    """The untrained :class:`Embedder` that a checkpoint describes.

    Raises:
        UsageError: it cannot be built, or has more than :data:`MOST_PARAMETERS` parameters.
    """
    own = ":" not in entry.arch.builder
    width = None if own else entry.arch.embed_dim
    built = build_network(entry.arch.builder, embed_dim=width, kwargs=entry.arch.kwargs, most=MOST_PARAMETERS)
    preprocess = preprocess_of(entry.input)
    return Embedder(
        built.network,
        preprocess.shape,
        mean=entry.normalize.mean,
        std=entry.normalize.std,
        distance=DISTANCES[space_of(entry)],
        name=name,
        preprocess=preprocess,
    )


def check_probe(embedder: Embedder, entry: Checkpoint, name: str) -> None:
    """Refuse a model whose embedding of the fixed input is not the registered one."""
    if entry.probe is None:
        return
    with torch.no_grad():
        found = embedder.eval()(probe_images(embedder.input_shape))[0]
    if len(entry.probe.embedding) > len(found):
        raise DataError(
            f"model {name!r}: its probe has {len(entry.probe.embedding)} values, its embeddings have {len(found)}"
        )
    found = found[: len(entry.probe.embedding)]
    expected = torch.tensor(entry.probe.embedding)
    gap = float((found - expected).abs().max())
    if not gap <= entry.probe.atol:
        raise DataError(
            f"model {name!r} gives another embedding for the probe input than registered "
            f"(off by {gap:.2g}, allowed {entry.probe.atol:.2g}): wrong preprocessing or weights"
        )


_OF_THE_RECORD = (
    "embed_dim", "output_key", "input_size", "resize", "interpolation", "order", "channels",
    "mean", "std", "distance", "normalize", "name",
)  # fmt: skip
"""Options that a model with a record, registered or in a run folder, does not take."""


def _registered(name: str, options: ModelOptions) -> Embedder:
    """A model of checkpoints.json; ``--weights`` gives the file of one that is downloaded by hand."""
    entry = checkpoint(name)
    _only_the_record(f"model {name!r} is registered", options)
    embedder = build(entry, name)
    if options.weights is not None:
        file = _weights_file(options)
        embedder.network = _with_their_head(embedder.network, file, entry.arch.embed_dim)
        embedder.notes = tuple(fill_from(embedder.network, file))
        embedder.weights_sha256 = sha256_of(file.path)
        _require_registered_file(embedder.weights_sha256, entry, name)
    else:
        path = weights_path(name, entry)
        fill(embedder.network, read_weights(path), f"weights file {path}")
        embedder.weights_sha256 = sha256_of(path)
    if entry.status != "active":
        embedder.notes = (*embedder.notes, standing(name, entry))
    embedder.card, embedder.arch = entry, entry.arch.builder
    check_probe(embedder, entry, name)
    return embedder


def standing(name: str, entry: Checkpoint) -> str:
    """One sentence about a registered model that is no longer current."""
    instead = f" by {entry.superseded_by}" if entry.superseded_by else ""
    return f"{name} is {entry.status}{instead}{': ' + entry.reason if entry.reason else ''}"


def _require_registered_file(found: str, entry: Checkpoint, name: str) -> None:
    stated = {file.sha256 for file in entry.files if file.sha256}
    if stated and found not in stated:
        raise DataError(f"--weights has sha256 {found[:12]}..., which is not the file registered for model {name!r}")


def _weights_file(options: ModelOptions) -> WeightsFile:
    path = Path(str(options.weights)).expanduser()
    return read_file(path, options.checkpoint_key)


def _with_their_head(network: nn.Module, file: WeightsFile, embed_dim: int | None) -> nn.Module:
    """The network with a head as the file has it, or as ``embed_dim`` says."""
    _, tensors = strip(file.tensors, network.state_dict())
    width = head_width(network, tensors) if embed_dim is None else embed_dim
    if head_of(network) is None or (width is None and not tensors):
        return network
    return with_head(network, width or 0, tensors)


def _library(name: str, options: ModelOptions) -> Embedder:
    """A network of timm, torchvision or a hub, with published, given, or no weights."""
    if options.weights is None or options.weights == "pretrained":
        built = build_network(
            name, embed_dim=options.embed_dim, pretrained=options.weights == "pretrained" or name.startswith("hf-hub:")
        )
        notes, sha256 = _unweighted(built, name, options), None
    else:
        file = _weights_file(options)
        built = build_network(name)
        network = _with_their_head(built.network, file, options.embed_dim)
        notes, sha256 = fill_from(network, file), sha256_of(file.path)
        built = replace(built, network=network)
        width = head_width(network, strip(file.tensors, network.state_dict())[1])
        if options.embed_dim is None and width:
            notes.append(
                f"the last layer ({head_of(network)}, {width} values) is the embedding; --embed-dim 0 leaves it out"
            )
    embedder = _embedder(built, options, name)
    embedder.notes, embedder.weights_sha256, embedder.arch = tuple(notes), sha256, name
    return embedder


def _unweighted(built: Built, name: str, options: ModelOptions) -> list[str]:
    if options.weights is None and not name.startswith("hf-hub:"):
        return [f"{name} is untrained: name its weights with --weights FILE, or --weights pretrained"]
    if options.embed_dim:
        return [f"{name}: the last layer of width {options.embed_dim} is new and untrained"]
    if options.embed_dim is None and head_of(built.network) is not None:
        return [f"{name}: the class scores of its last layer are the embedding; --embed-dim 0 leaves that layer out"]
    return []


def _embedder(built: Built, options: ModelOptions, name: str, plain: Distance = DISTANCES["N"]) -> Embedder:
    """The Embedder of a network made from a library: its maker's facts, changed by the options."""
    shape = built.input_shape or (options.channels or 3, *(options.input_size or (224, 224)))
    preprocess = options.fed(Preprocess.standard(shape, built.interpolation))
    mean, std = _normalisation(options, built.mean, built.std, preprocess.channels)
    return Embedder(
        built.network,
        preprocess.shape,
        mean=mean,
        std=std,
        distance=options.space(plain),
        name=options.name or name,
        preprocess=preprocess,
    )


def _normalisation(
    options: ModelOptions, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std per channel; a single number serves all channels.

    Raises:
        UsageError: another number of values than channels.
    """
    fitted = []
    for what, values in (("mean", options.mean or mean), ("std", options.std or std)):
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"--{what} has {len(values)} values for {channels} channels")
        fitted.append(values * channels if values is not None and len(values) == 1 else values)
    return fitted[0], fitted[1]


def _file(path: Path, options: ModelOptions) -> Embedder:
    """A weights file: of the architecture that the spec names, or of one that is recognised."""
    if options.weights is not None:
        raise UsageError(f"--model {path} is a weights file itself: leave --weights out, or name an architecture")
    if options.spec is not None:
        return _specified(path, Spec.read(options.spec), options)
    file = read_file(path, options.checkpoint_key)
    fit = best_fit(file)
    if fit is None:
        raise UsageError(
            f"no known architecture fits {path}: name it with --model timm:NAME --weights {path} or --spec; "
            f"'dmlbench models inspect {path}' tells what is in it"
        )
    built = fit.build()
    notes = fill_from(built.network, file)
    embedder = _embedder(built, options, path.stem)
    embedder.notes = (f"{path.name} fits {fit.builder} with embeddings of {fit.embed_dim} values", *notes)
    embedder.weights_sha256, embedder.arch = sha256_of(path), fit.builder
    return embedder


def _specified(path: Path, spec: Spec, options: ModelOptions) -> Embedder:
    """A weights file with its spec; options on the command line win over the spec."""
    own = ":" not in spec.arch.builder
    built = build_network(spec.arch.builder, kwargs=spec.arch.kwargs, most=MOST_PARAMETERS)
    file = read_file(path, options.checkpoint_key or spec.checkpoint_key)
    network = built.network if own else _with_their_head(built.network, file, spec.arch.embed_dim)
    notes = fill_from(network, file)
    preprocess = options.fed(spec.preprocess(), said=True)
    mean, std = _normalisation(options, spec.normalize.mean, spec.normalize.std, preprocess.channels)
    letter = "C" if spec.embedding.metric == "cosine" else "N" if spec.embedding.normalized else "E"
    embedder = Embedder(
        network,
        preprocess.shape,
        mean=mean,
        std=std,
        distance=options.space(DISTANCES[letter]),
        name=options.name or path.stem,
        preprocess=preprocess,
    )
    settle(embedder, options.output_key or spec.output_key)
    with torch.no_grad():
        width = embedder(probe_images(embedder.input_shape, 1)).shape[1]
    if width != spec.arch.embed_dim:
        raise DataError(f"spec {options.spec} says embed_dim {spec.arch.embed_dim}, the network gives {width}")
    embedder.notes = (*embedder.notes, *notes)
    embedder.weights_sha256, embedder.arch = sha256_of(path), spec.arch.builder
    return embedder


def _only_the_record(what: str, options: ModelOptions) -> None:
    """Refuse options that a model with a record does not take."""
    if said := [key for key in _OF_THE_RECORD if getattr(options, key) is not None]:
        raise UsageError(
            f"{what}: its record says how it is fed and compared, so "
            f"--{said[0].replace('_', '-').replace('order', 'channel-order')} does not go with it (--model FILE --spec takes other settings)"
        )


def _trained(run: Path, options: ModelOptions) -> Embedder:
    """The last weights of a finished run of ``dmlbench train``."""
    if options.weights is not None or options.spec is not None:
        raise UsageError(f"--model {run} is a training run with its own weights: leave --weights and --spec out")
    _only_the_record(f"--model {run} is a training run", options)
    name, entry = read_entry(run)
    path = verified(run / "last.safetensors", entry.files[0])
    embedder = build(entry, name)
    fill(embedder.network, read_weights(path), f"weights file {path}")
    embedder.card, embedder.arch, embedder.weights_sha256 = entry, entry.arch.builder, entry.files[0].sha256
    check_probe(embedder, entry, str(run))
    return embedder


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


def _python(rest: str, options: ModelOptions) -> Embedder:
    """The user's own function: called without arguments, gives a module or an Embedder."""
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
    if isinstance(made, Embedder):
        embedder = made
        embedder.name = options.name or made.name
    elif isinstance(made, nn.Module):
        built = Built(made, stated_shape(made, f"python:{rest}"))
        embedder = _embedder(built, options, f"python:{rest}")
    else:
        raise DataError(f"python:{rest} gave a {type(made).__name__}, not a torch.nn.Module")
    notes = [f"python:{rest} is your own code and was run"]
    if options.weights is not None:
        file = _weights_file(options)
        notes += fill_from(embedder.network, file)
        embedder.weights_sha256 = sha256_of(file.path)
    embedder.notes = (*embedder.notes, *notes)
    embedder.arch = f"python:{rest}"
    return embedder


def _ensemble(rest: str, options: ModelOptions) -> Embedder:
    """Members by comma; the squared distance of the whole is the mean of the members' squared distances."""
    names = [name.strip() for name in rest.split(",") if name.strip()]
    if len(names) < 2:
        raise UsageError("ensemble: needs at least two models, e.g. ensemble:ID,ID")
    if options.weights or options.spec or options.output_key:
        raise UsageError("--weights, --spec and --output-key belong to one model, not to an ensemble")
    members = [open_model(name, replace(options, name=None, precision="auto", compiled=False)) for name in names]
    if not members[0].distance.normalized:
        raise UsageError("members of an ensemble are compared by direction, so --no-normalize does not go with it")
    for member in members[1:]:
        if member.preprocess != members[0].preprocess or member.distance != members[0].distance:
            raise UsageError(
                f"ensemble members {members[0].name!r} and {member.name!r} are fed or compared differently: "
                f"{members[0].input_shape} in space {members[0].distance.space} and "
                f"{member.input_shape} in space {member.distance.space}"
            )
    whole = Embedder(
        Ensemble(members),
        members[0].input_shape,
        distance=members[0].distance,
        name=options.name or f"ensemble:{','.join(member.name for member in members)}",
        preprocess=members[0].preprocess,
    )
    whole.notes = tuple(note for member in members for note in member.notes)
    hashes = [member.weights_sha256 or "" for member in members]
    whole.weights_sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else None
    whole.arch = "+".join(member.arch or "own" for member in members)
    return whole


def open_model(name: str, options: ModelOptions | None = None) -> Embedder:
    """A ready :class:`Embedder` from what ``--model`` says; ``notes`` and ``doubts`` tell what was found.

    Raises:
        UsageError: unknown name, or options that do not go together (exit code 2).
        DataError: weights that are missing, broken or of another architecture, or a model that does not
            behave as one (4).
    """
    options = options or ModelOptions()
    kind, colon, rest = name.partition(":")
    if colon and kind in FORMS:
        embedder = FORMS[kind](rest, options)
    elif name in checkpoints():
        embedder = _registered(name, options)
    elif Path(name).expanduser().is_file() or name.endswith(SUFFIXES):
        embedder = _file(Path(name).expanduser(), options)
    elif Path(name).expanduser().is_dir():
        embedder = _trained(Path(name).expanduser(), options)
    elif colon:
        raise UsageError(f"unknown form of model {kind + ':'!r}{suggest(kind, FORMS)}")
    else:
        checkpoint(name)  # unknown: says so, with a suggestion
        raise UsageError(f"unknown model {name!r}")
    if options.spec is not None and not name.endswith(SUFFIXES):
        raise UsageError("--spec describes a weights file: --model FILE --spec spec.json")
    embedder.precision, embedder.compiled = options.precision, options.compiled
    if embedder.card is None and options.spec is None:
        settle(embedder, options.output_key)
    embedder.eval()
    return embedder


FORMS: Registry[Callable[[str, ModelOptions], Embedder]] = Registry(
    "form of model",
    {
        "timm": lambda rest, options: _library(f"timm:{rest}", options),
        "torchvision": lambda rest, options: _library(f"torchvision:{rest}", options),
        "hf-hub": lambda rest, options: _library(f"hf-hub:{rest}", options),
        "python": _python,
        "ensemble": _ensemble,
    },
)
"""What stands before the colon, and (what stands after it, options) to the model."""

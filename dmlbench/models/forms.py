"""The forms in which ``--model`` names a model, and from each to an :class:`Embedder`.

======================  ===========================================================================
a registered id         checkpoints.json
``timm:NAME``           timm's network; likewise ``torchvision:NAME`` and ``hf-hub:NAME``
weights                 a file, or a folder of the hub: with ``--spec``, or of an architecture that is recognised
a run folder            what ``dmlbench train`` left: its last weights
``python:WHERE:NAME``   the user's own function; WHERE is a module or a ``.py`` file. Only this form runs code
``ensemble:A,B``        several of these, their embeddings side by side
``defended:WRAPPER:M``  one of these behind a test-time defence, see ``defended.py``
======================  ===========================================================================
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmlbench.checkpoints import checkpoint, checkpoints
from dmlbench.embedding import DISTANCES, Distance, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.models.architectures import (
    ARCHITECTURES,
    MOST_PARAMETERS,
    Built,
    Ensemble,
    build_network,
    known_as,
    sized,
)
from dmlbench.models.assembly import Assembled, Chosen, assemble, load
from dmlbench.models.behaviour import probe_images, settle
from dmlbench.models.defended import FORM, defended, split
from dmlbench.models.files import WeightsFile, is_weights, read_file
from dmlbench.models.heads import head_of, last_widths
from dmlbench.models.inspection import TWINS, best_fit, clip_names, fits, width_of
from dmlbench.models.layouts import match
from dmlbench.models.recognised import fed_by_record, feeding, on_record
from dmlbench.models.records import build, check_probe, only_the_record, registered, space_of, trained
from dmlbench.models.spec import ModelOptions, Spec
from dmlbench.preprocess import Preprocess
from dmlbench.registry import Registry, suggest
from dmlbench.user_code import PREFIX, RUN, load_user_code

__all__ = ["FORMS", "build", "check_probe", "open_model", "space_of"]


def _chosen(options: ModelOptions) -> Chosen:
    """What the options say of a file's layers."""
    named = tuple(part for part in (options.leave_out or "").split(",") if part)
    if options.head is not None and options.embed_dim is not None:
        raise UsageError("--head takes a layer of the file, --embed-dim makes another: only one of them")
    return Chosen(
        embed_dim=options.embed_dim,
        head=options.head,
        without=named,
        prefix=options.prefix,
        size=options.input_size,
    )


def _weights_file(options: ModelOptions) -> WeightsFile:
    return read_file(Path(str(options.weights)).expanduser(), options.checkpoint_key)


def _library(name: str, options: ModelOptions) -> Embedder:
    """A network of timm, torchvision or a hub, or one of ours by name, with published, given, or no weights."""
    if options.weights is None or options.weights == "pretrained":
        return _unweighted(name, options)
    file = _weights_file(options)
    _require_the_same(name, file, options)
    return _filled(name, {}, file, options, _named(file))


def _named(file: WeightsFile) -> str:
    """What results call a file's model, whichever architecture is named for it: its name and 8 digits of its hash, so that
    two files of one name are two models."""
    path = file.path
    return f"{path.name if path.is_dir() else path.stem}-{file.sha256[:8]}"


def _filled(builder: str, kwargs: Mapping[str, Any], file: WeightsFile, options: ModelOptions, name: str) -> Embedder:
    """A network with a file's weights, fed in one way whatever door it came through."""
    chosen = _chosen(options)
    built, notes = load(assemble(builder, kwargs, file, chosen), file, builder, chosen)
    built = fed_by_record(file, replace(built, interpolation="bilinear" if built.fed is None else built.interpolation))
    embedder = _embedder(built, options, name)
    _require_width(options, builder, width_of(built.network, embedder.input_shape))
    last = head_of(built.network) if last_widths(built.network) else None
    if options.embed_dim is None and options.head is None and ":" in builder and last is not None:
        width = width_of(built.network, embedder.input_shape)
        notes.append(f"the last layer ({last}, {width} values) is the embedding; --embed-dim 0 leaves it out")
    embedder.weights_sha256, embedder.arch = file.sha256, builder
    embedder.notes = (*notes, feeding(embedder), *on_record(embedder, file))
    return embedder


def _require_width(options: ModelOptions, builder: str, width: int | None) -> None:
    """Refuse ``--embed-dim`` for a network of ours, which is as wide as its file, unless it is that width.

    Raises:
        UsageError: it is another.
    """
    if ":" not in builder and options.embed_dim not in (None, width):
        raise UsageError(
            f"--embed-dim {options.embed_dim}: {builder} has no such last layer, its embeddings are {width} values"
        )


def _require_the_same(name: str, file: WeightsFile, options: ModelOptions) -> None:
    """Refuse a file that ``--model FILE`` would feed otherwise: the same weights have one number.

    Raises:
        UsageError: the mean or std of the architecture that is recognised is another.
    """
    if (options.mean is not None and options.std is not None) or file.config:
        return
    try:
        fit = best_fit(file)
    except UsageError:  # it is no file of those that are recognised
        return
    if fit is None or fit.builder == name or fit.builder in TWINS:  # without a name, twins are asked about
        return
    with torch.device("meta"):
        theirs, ours = (build_network(b) for b in (fit.builder, name))
    if (theirs.mean, theirs.std, theirs.fed) != (ours.mean, ours.std, ours.fed):
        raise UsageError(
            f"{file.path} is recognised as {fit.builder}, which is fed mean {theirs.mean} and std {theirs.std}; "
            f"{name} is fed mean {ours.mean} and std {ours.std}: say which with --mean and --std"
        )


def _unweighted(name: str, options: ModelOptions) -> Embedder:
    """A network without a file: its maker's weights, or none."""
    if options.head or options.leave_out or options.prefix or options.checkpoint_key:
        raise UsageError("--head, --leave-out, --checkpoint-prefix and --checkpoint-key are of a file: --weights FILE")
    hub = name.startswith("hf-hub:")
    published = options.weights == "pretrained" or hub

    def make(**kwargs: Any) -> Built:
        return build_network(name, embed_dim=options.embed_dim, pretrained=published, kwargs=kwargs)

    built = make()
    again = {} if options.input_size is None else sized(built, options.input_size)
    if "img_size" in again or (again and not published):
        built = make(**again)
    notes: tuple[str, ...] = ()
    if options.weights is None and not hub:
        notes = (f"{name} is untrained: name its weights with --weights FILE, or --weights pretrained",)
    elif options.embed_dim:
        notes = (f"{name}: the last layer of width {options.embed_dim} is new and untrained",)
    elif options.embed_dim is None and last_widths(built.network):
        notes = (f"{name}: the class scores of its last layer are the embedding; --embed-dim 0 leaves that layer out",)
    embedder = _embedder(built, options, name)
    embedder.notes, embedder.arch = (*notes, feeding(embedder)), name
    return embedder


def _embedder(built: Built, options: ModelOptions, name: str, plain: Distance = DISTANCES["N"]) -> Embedder:
    """The Embedder of a network made from a library: its maker's facts, changed by the options."""
    shape = built.input_shape or (options.channels or 3, *(options.input_size or (224, 224)))
    stated = built.fed.preprocess if built.fed else built.stated
    preprocess = options.fed(stated or Preprocess.standard(shape, built.interpolation), stated=stated is not None)
    mean, std = options.normalisation(built.mean, built.std, preprocess.channels)
    return Embedder(
        built.network,
        preprocess.shape,
        mean=mean,
        std=std,
        distance=options.space(DISTANCES[built.fed.space] if built.fed else plain),
        name=options.name or name,
        preprocess=preprocess,
    )


def _file(path: Path, options: ModelOptions) -> Embedder:
    """Weights alone: of the architecture that a spec or the hub's configuration names, or of one that is recognised."""
    if options.weights is not None:
        raise UsageError(f"--model {path} is a weights file itself: leave --weights out, or name an architecture")
    if options.spec is not None:
        return _specified(path, Spec.read(options.spec), options)
    file = read_file(path, options.checkpoint_key)
    name = _named(file)
    if "architecture" in file.config:
        arguments = file.config.get("model_args") or {}
        return _filled(f"timm:{file.config['architecture']}", arguments, file, options, name)
    chosen = _chosen(options)
    fit = best_fit(file, chosen) or next((f for f in fits(file, chosen=chosen) if f.but_for_layers), None)
    if fit is None:
        raise UsageError(f"no known architecture fits {path}: {_advice(path, file)}")
    if twin := TWINS.get(fit.builder):
        raise UsageError(
            f"{path} fits {fit.builder} and {twin}, which compute otherwise with the same tensors: name the one that it was "
            f"trained with, --model {fit.builder} --weights {path}"
        )
    embedder = _filled(fit.builder, fit.kwargs, file, options, name)
    note = (
        f"{path.name} fits {fit.builder} with embeddings of {width_of(embedder.network, embedder.input_shape)} values"
    )
    embedder.notes = (note, *embedder.notes)
    return embedder


def _advice(path: Path, file: WeightsFile) -> str:
    """What to try where nothing fits."""
    if kind := file.config.get("model_type"):
        return (
            f"its config.json is of transformers ({kind}), whose names of layers are its own: "
            "a function of yours may load it, --model python:FILE.py:FUNCTION"
        )
    if names := clip_names(file):
        return f"it is a vision half of CLIP, and its file does not say which activation: --model {' or '.join(names)}"
    return f"name it with --model timm:NAME --weights {path} or --spec; 'dmlbench models inspect {path}' tells what is in it"


def _specified(path: Path, spec: Spec, options: ModelOptions) -> Embedder:
    """A weights file with its spec; options on the command line win over the spec."""
    file = read_file(path, options.checkpoint_key or spec.checkpoint_key)
    width = None if ":" not in spec.arch.builder else spec.arch.embed_dim if spec.arch.head else 0
    width = width if options.embed_dim is None else options.embed_dim
    chosen = replace(_chosen(options), size=options.input_size or spec.preprocess().size)
    if chosen.head is None:
        chosen = replace(chosen, embed_dim=width)
    made = assemble(spec.arch.builder, spec.arch.kwargs, file, chosen, most=MOST_PARAMETERS)
    built, notes = load(made, file, spec.arch.builder, chosen)
    preprocess = options.fed(spec.preprocess(), stated=True)
    recorded = built if spec.normalize else fed_by_record(file, built)
    stated = spec.normalize.of_unit() if spec.normalize else (recorded.mean, recorded.std)
    mean, std = options.normalisation(*stated, preprocess.channels)
    letter = space_of(spec.embedding) if spec.embedding else built.fed.space if built.fed else "N"
    embedder = Embedder(
        built.network,
        preprocess.shape,
        mean=mean,
        std=std,
        distance=options.space(DISTANCES[letter]),
        name=options.name or _named(file),
        preprocess=preprocess,
    )
    if spec.embedding and options.keeps_claims and preprocess.shape == spec.preprocess().shape:
        embedder.lipschitz = spec.embedding.lipschitz
    settle(embedder, options.output_key or spec.output_key)
    with torch.no_grad():
        given = embedder(probe_images(embedder.input_shape, 1)).shape[1]
    _require_width(options, spec.arch.builder, given)
    if options.embed_dim is None and given != spec.arch.embed_dim:
        raise DataError(f"spec {options.spec} says embed_dim {spec.arch.embed_dim}, the network gives {given}")
    embedder.notes = (*embedder.notes, *notes, feeding(embedder))
    embedder.weights_sha256, embedder.arch = file.sha256, spec.arch.builder
    return embedder


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
    code = load_user_code(rest, PREFIX)
    code.called(f"{PREFIX}{rest}")
    made = code.value
    if not isinstance(made, nn.Module):
        code.require_takes(0, "no arguments")
        made = code.call()
    code.require(isinstance(made, nn.Module), f"gave a {type(made).__name__}, not a torch.nn.Module")
    if options.embed_dim is not None:
        raise UsageError("--embed-dim does not go with python:, whose function makes the network as wide as it likes")
    if isinstance(made, Embedder):
        only_the_record(f"python:{rest} gives an Embedder", replace(options, name=None, output_key=None, head=None))
        embedder = made
        embedder.name = options.name or made.name
    else:
        shape = stated_shape(made, f"python:{rest}")
        embedder = _embedder(Built(made, shape), options, f"python:{rest}")
        valid = options.keeps_claims and shape in (None, embedder.input_shape)
        embedder.lipschitz = getattr(made, "lipschitz", None) if valid else None
    claim = embedder.lipschitz
    sound = isinstance(claim, int | float) and not isinstance(claim, bool) and 0 < claim < math.inf
    code.require(claim is None or sound, f"gave a model whose lipschitz {claim!r} is no positive number")
    notes = [RUN[f"{PREFIX}{rest}"], *([] if embedder is made else [feeding(embedder)])]
    if options.weights is not None:
        file, chosen = _weights_file(options), _chosen(options)
        matched = match(file.tensors, embedder.network.state_dict(), chosen.prefix)
        made_of = Assembled(Built(embedder.network), matched)
        built, done = load(made_of, file, f"python:{rest}", chosen)
        embedder.network = built.network
        notes += done
        embedder.weights_sha256 = file.sha256
    embedder.notes = (*embedder.notes, *notes)
    embedder.arch = f"python:{rest}"
    return embedder


def _ensemble(rest: str, options: ModelOptions) -> Embedder:
    """Members by comma; the squared distance of the whole is the mean of the members' squared distances."""
    names = [name.strip() for name in rest.split(",") if name.strip()]
    if FORM in rest:
        raise UsageError(
            f"a defence stands before the ensemble, whose members see one picture: {FORM}WRAPPER:ensemble:A,B"
        )
    if len(names) < 2:
        raise UsageError("ensemble: needs at least two models, e.g. ensemble:ID,ID")
    if options.weights or options.spec or options.output_key:
        raise UsageError("--weights, --spec and --output-key belong to one model, not to an ensemble")
    members = [open_model(name, replace(options, name=None, precision="auto", compiled=False)) for name in names]
    if not members[0].distance.normalized:
        raise UsageError("members of an ensemble are compared by direction, so --no-normalize does not go with it")
    for member in members[1:]:
        if differing := _differing(members[0], member):
            raise UsageError(
                f"ensemble members {members[0].name!r} and {member.name!r} are fed or compared differently: {differing}"
            )
    ensemble = Embedder(
        Ensemble(members),
        members[0].input_shape,
        distance=members[0].distance,
        name=options.name or f"ensemble:{','.join(member.name for member in members)}",
        preprocess=members[0].preprocess,
    )
    ensemble.notes = tuple(note for member in members for note in member.notes)
    hashes = [member.weights_sha256 or "" for member in members]
    ensemble.weights_sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else None
    ensemble.arch = "+".join(member.arch or "own" for member in members)
    return ensemble


def _differing(a: Embedder, b: Embedder) -> str:
    """What two models are fed or compared by and do not share, both values of each."""
    facts = [{**vars(m.preprocess), "space": m.distance.space} for m in (a, b)]
    return ", ".join(f"{key} {facts[0][key]} and {facts[1][key]}" for key in facts[0] if facts[0][key] != facts[1][key])


def _defended(rest: str, options: ModelOptions) -> Embedder:
    """A model behind a wrapper; the options are the model's."""
    wrapper, model = split(rest)
    return defended(open_model(model, options), wrapper)


def open_model(name: str, options: ModelOptions | None = None) -> Embedder:
    """The :class:`Embedder` that ``--model`` names, ready to use; its ``notes`` and ``doubts`` are sentences for the user.

    Raises:
        UsageError: unknown name, or options that do not go together (exit code 2).
        DataError: weights that are missing, broken or of another architecture, or a model that does not
            behave as one (4).
    """
    options = options or ModelOptions()
    path = Path(name).expanduser()
    kind, colon, rest = name.partition(":")
    if colon and kind in FORMS:
        embedder = FORMS[kind](rest, options)
        if f"{kind}:" == FORM:  # what follows has been done to the model that is defended
            return embedder
    elif name.endswith(".py"):
        raise UsageError(f"{name} is code: --model python:{name}:FUNCTION calls its function that makes the model")
    elif name in checkpoints():
        embedder = registered(name, options)
    elif is_weights(path):
        embedder = _file(path, options)
    elif path.is_dir():
        embedder = trained(path, options)
    elif name in ARCHITECTURES and options.weights is not None:
        embedder = _library(name, options)
    elif colon:
        raise UsageError(f"unknown form of model {kind + ':'!r}{suggest(kind, FORMS)}")
    else:
        if also := known_as(name):
            raise UsageError(f"unknown model {name!r}; did you mean {also!r}?")
        checkpoint(name)  # unknown: says so, with a suggestion
        raise UsageError(f"unknown model {name!r}")
    if options.spec is not None and not is_weights(path):
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
        "defended": _defended,
    },
)
"""What stands before the colon, and (what stands after it, options) to the model."""

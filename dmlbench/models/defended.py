"""A model behind test-time defences: ``--model defended:WRAPPER(VALUES):MODEL``, wrappers of :mod:`dmlbench.models.wrappers`.

The whole gallery is embedded through them too. docs/defended.md.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmlbench.datasets.base import Images
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, DmlbenchError, UsageError
from dmlbench.files import described
from dmlbench.models.behaviour import probe_images
from dmlbench.models.wrappers import STAGES, WRAPPERS, Backward, Given, Values, Wrapper, nothing
from dmlbench.preprocess import Preprocess
from dmlbench.rng import Rng, streams_of_pixels

FORM = "defended:"
NAIVE = "naive"
"""The option with which a wrapper is attacked as if nobody knew it."""
POOL = 64
"""Pictures of the gallery that ``mixup`` mixes with, at most."""


class _Backward(torch.autograd.Function):
    """A function of images whose backward pass is given."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, function: Callable[[Tensor], Tensor], by: Backward, values: Any) -> Tensor:
        ctx.save_for_backward(images)
        ctx.by, ctx.values = by, values
        return function(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (images,) = ctx.saved_tensors
        return ctx.by(images, gradient, ctx.values), None, None, None


@dataclass(frozen=True)
class Applied:
    """A wrapper with its values, as ``--model`` says it.

    Attributes:
        name: of :data:`WRAPPERS`.
        naive: whether an attack is to know nothing of it.
    """

    name: str
    values: Values
    naive: bool = False

    def __str__(self) -> str:
        words = [repr(float(v)).removesuffix(".0") for v in self.values] + [NAIVE] * self.naive
        return self.name + (f"({','.join(words)})" if words else "")

    @property
    def wrapper(self) -> Wrapper:
        """Its record."""
        return WRAPPERS[self.name]

    @classmethod
    def read(cls, name: str, text: str | None) -> "Applied":
        """``jpeg`` and ``75,naive``; values that are left out, from the last, are the defaults.

        Raises:
            UsageError: an unknown wrapper, too many values, or one that it does not take.
        """
        parameters, words = WRAPPERS[name].parameters, [w.strip() for w in (text or "").split(",")] if text else []
        naive = bool(words) and words[-1] == NAIVE
        if naive and WRAPPERS[name].backward is None and WRAPPERS[name].eot == 1:
            raise UsageError(
                f"{name}({text}): every attack looks through {name} as it is, so {NAIVE} would change nothing"
            )
        words = words[:-1] if naive else words
        if len(words) > len(parameters):
            takes = ", ".join(map(str, parameters)) or "no number"
            raise UsageError(f"{name}({text}): {name} takes {takes}, and last the word {NAIVE}")
        values = [p.read(w, name) for p, w in zip(parameters, words, strict=False)]
        return cls(name, (*values, *(p.default for p in parameters[len(values) :])), naive)

    def __call__(self, images: Tensor, given: Given) -> Tensor:
        """The images after it.

        Raises:
            DataError: a transform that fails, or gives images of another shape.
        """

        def function(x: Tensor) -> Tensor:
            return self.wrapper.transform(x, self.values, given)

        way = self.wrapper.backward
        try:
            out: Tensor = (
                function(images)
                if way is None
                else _Backward.apply(images, function, nothing if self.naive else way, self.values)  # type: ignore[no-untyped-call]
            )
        except (DmlbenchError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # another package's transform, which can fail in any way
            raise DataError(f"wrapper {self} fails on {tuple(images.shape)}: {described(error)}") from error
        fits = len(out) == len(images) or (self.wrapper.stage == STAGES[-1] and len(out) % len(images) == 0)
        if not fits or out.shape[1:] != images.shape[1:]:
            raise DataError(f"wrapper {self} makes {tuple(out.shape)} of images {tuple(images.shape)}")
        return out


@dataclass(frozen=True, eq=False)
class Front:
    """Wrappers one after another, the outer one first: an :class:`~dmlbench.embedding.Embedder`'s ``front``.

    Attributes:
        preprocess: of the model, whose images may be blue first, where wrappers see red first.
        pool: (n, C, H, W) pictures, red first too.
    """

    wrappers: tuple[Applied, ...]
    preprocess: Preprocess
    pool: Tensor = field(repr=False)

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "n c h w"]:
        rng = (
            streams_of_pixels(images)
            if any(w.wrapper.eot > 1 for w in self.wrappers)
            else Rng(0, images.new_zeros(len(images)).long())
        )
        pool = self.pool.to(images.device)
        images = self.preprocess.red_first(images)
        for w in self.wrappers:
            images = w(images, Given(rng.fold(w.name), pool))
        return self.preprocess.red_first(images)

    def seeing(self, images: Images, gallery: np.ndarray) -> "Front":
        """With up to :data:`POOL` pictures, evenly spread over the gallery (rows of ``images``), as pool."""
        if not any(w.wrapper.stage == STAGES[-1] for w in self.wrappers):
            return self
        rows = gallery[np.unique(np.linspace(0, len(gallery) - 1, min(POOL, len(gallery))).astype(int))]
        return replace(self, pool=self.preprocess.red_first(images[rows]))


_FORM = re.compile(r"([^():]+)(?:\(([^()]*)\))?:(.+)")


def split(rest: str) -> tuple[Applied, str]:
    """The wrapper and the model of what stands behind ``defended:``.

    Raises:
        UsageError: not WRAPPER:MODEL or WRAPPER(VALUES):MODEL, or what :meth:`Applied.read` refuses.
    """
    match = _FORM.fullmatch(rest)
    if match is None:
        raise UsageError(
            f"{FORM}{rest} is not {FORM}WRAPPER(VALUES):MODEL, e.g. {FORM}jpeg(75):digits-smallcnn-triplet-none"
        )
    return Applied.read(match[1].strip(), match[2]), match[3].strip()


def named(model: str) -> tuple[tuple[Applied, ...], str]:
    """The wrappers that the name of a model in a result says, the outer one first, and the name of what stands behind them.

    Raises:
        UsageError: what :func:`split` refuses.
    """
    if not model.startswith(FORM):
        return (), model
    outer, rest = split(model.removeprefix(FORM))
    inner, name = named(rest)
    return (outer, *inner), name


def network_of(model: str) -> str:
    """The name of what stands behind the defences that the name of a model says, whether they are known here or not."""
    while model.startswith(FORM) and (match := _FORM.fullmatch(model.removeprefix(FORM))):
        model = match[3].strip()
    return model


def behind(text: str, model: str) -> str:
    """What is said of the network that the name of a model says, and of the defences before it: ``none, behind jpeg(75)``."""
    front = model.removesuffix(network_of(model)).split(FORM)
    return ", ".join([text, *(f"behind {wrapper.removesuffix(':')}" for wrapper in front if wrapper)])


def hashed(wrappers: Sequence[Applied], sha256: str) -> str:
    """What stands for wrappers, the outer one first, before a model whose weights have this hash: that hash where there is none."""
    for wrapper in reversed(wrappers):
        sha256 = hashlib.sha256(f"{wrapper} {sha256}".encode()).hexdigest()
    return sha256


def defended(embedder: Embedder, outer: Applied) -> Embedder:
    """The model behind one more wrapper: the same object, changed.

    Raises:
        UsageError: the wrapper comes before one that it would undo, or does not take the model's images.
    """
    front = embedder.front
    inner = front.wrappers if isinstance(front, Front) else ()
    for later in inner:
        if STAGES[0] not in (outer.wrapper.stage, later.wrapper.stage):
            _require_order(outer, later)
    pool = front.pool if isinstance(front, Front) else probe_images(embedder.input_shape, 8)
    embedder.front = Front((outer, *inner), embedder.preprocess, pool)
    embedder.lipschitz = None  # claimed of the network alone
    averaged = [w.wrapper.eot for w in embedder.front.wrappers if not w.naive and w.wrapper.eot > 1]
    embedder.eot = max(averaged, default=None)
    embedder.name, embedder.arch = f"{FORM}{outer}:{embedder.name}", f"{outer}:{embedder.arch or 'own'}"
    if embedder.weights_sha256 is not None:
        embedder.weights_sha256 = hashed((outer,), embedder.weights_sha256)
    with torch.no_grad():
        embedder.eval()(probe_images(embedder.input_shape, 2).to(embedder.device))
    notes, doubts = [], []
    if outer.naive:
        missed = "its gradient is taken as zero" if outer.wrapper.backward else "a single draw is taken for all"
        what = f"attacks do not know {outer} ({missed}), so scores are too high: leave {NAIVE!r} out"
        doubts.append(("naive-attack", what))
    elif outer.wrapper.backward is not None:
        notes.append(f"gradients go through {outer} by a stand-in for its derivative (BPDA)")
    if outer.wrapper.eot > 1:
        doubts.append(("randomised", f"{outer} draws anew at every pass: see whether passes were averaged (--eot)"))
    if outer.wrapper.eot > 1 and not outer.naive:
        notes.append(f"{outer} is random: attacks and read-outs average {embedder.eot} passes, or what --eot says")
    embedder.notes, embedder.doubts = (*embedder.notes, *notes), (*embedder.doubts, *doubts)
    return embedder


def known_to_attacks(embedder: Embedder) -> bool:
    """Whether it is behind a defence, and attacks are to know all of it."""
    return isinstance(embedder.front, Front) and not any(w.naive for w in embedder.front.wrappers)


def _require_order(outer: Applied, inner: Applied) -> None:
    """Refuse two wrappers in an order that makes no sense, and say which does."""
    first, second = (STAGES.index(w.wrapper.stage) for w in (outer, inner))
    if first == second:
        raise UsageError(f"{outer} and {inner} do the same kind of thing ({outer.wrapper.stage}): keep one of them")
    if first > second:
        order = ", then ".join(STAGES[1:])
        raise UsageError(
            f"{outer} before {inner} makes no sense: the outer wrapper comes first, and the order is {order}; "
            f"{FORM}{inner}:{FORM}{outer}:MODEL"
        )


def averaged(embedder: Embedder, eot: int | None) -> int | None:
    """How many passes an attack averages, from what the user says; None for as many as the protocol says.

    Raises:
        UsageError: a single one of a random defence, whose score would be ranked and say little.
    """
    if embedder.eot is None or (eot is not None and eot > 1):
        return eot
    if eot == 1:
        raise UsageError(
            f"model {embedder.name!r} is random, and one pass says little: --eot 2 or more, {embedder.eot} by default "
            f"({NAIVE} as the wrapper's last value attacks it with one)"
        )
    return embedder.eot

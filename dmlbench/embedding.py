"""From pixels to embeddings, and how far two embeddings are apart.

:class:`Embedder` takes images in [0, 1] and gives embeddings; mean and std are applied inside, so an
attack works on pixels. :class:`Distance` is one of the field's three spaces: ``N`` (L2-normalised,
Euclidean; the default), ``C`` (L2-normalised, 1 - cosine), ``E`` (not normalised, Euclidean).
"""

import copy
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmlbench.checkpoints import Checkpoint, normalisation_problem
from dmlbench.errors import DataError, DmlbenchError, UsageError
from dmlbench.files import described
from dmlbench.preprocess import Preprocess
from dmlbench.registry import Registry
from dmlbench.rng import Pass, passing

_TINY = 1e-12


def _euclidean(a: Tensor, b: Tensor, b_square: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(n, m) distances from one product, no graph."""
    if b_square is None:
        b_square = b.square().sum(1)
    d = torch.addmm(b_square[None, :], a, b.t(), alpha=-2.0, out=out)
    return d.add_(a.square().sum(1, keepdim=True)).clamp_min_(0.0).sqrt_()


class _Euclidean(torch.autograd.Function):
    """Euclidean distances of every a to every b: one product forward, one backward.

    The gradient at distance zero is zero, as for any norm's smallest subgradient.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, b_square: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        d = _euclidean(a, b, b_square)
        ctx.save_for_backward(a, b, d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        a, b, d = ctx.saved_tensors
        w = torch.where(d > _TINY, grad / d.clamp_min(_TINY), 0.0)  # (n, m)
        to_a = w.sum(1, keepdim=True) * a - w @ b if ctx.needs_input_grad[0] else None
        to_b = w.sum(0)[:, None] * b - w.t() @ a if ctx.needs_input_grad[1] else None
        return to_a, to_b, None


@dataclass(frozen=True)
class Distance:
    """A distance between embeddings, smaller is more similar.

    Attributes:
        space: the field's letter, ``N``, ``C`` or ``E``.
        metric: "euclidean" or "cosine" (that is, 1 - cosine).
        normalized: whether embeddings are scaled to unit length first.
    """

    space: str
    metric: str
    normalized: bool

    def finish(self, raw: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The embeddings of this space from a network's output."""
        return F.normalize(raw, dim=1) if self.normalized else raw

    def pairwise(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "m d"],
        b_square: Float[Tensor, " m"] | None = None,
        out: Float[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, "n m"]:
        """Distances of every a to every b. ``b_square``, the squared lengths of b, saves a pass.

        ``out`` is memory to write them into, without a graph; a new large table costs more than filling it.
        """
        if out is not None and self.metric == "cosine":
            return torch.mm(a, b.t(), out=out).neg_().add_(1.0)
        if out is not None:
            return _euclidean(a, b, b_square, out)
        if self.metric == "cosine":
            return 1.0 - a @ b.t()
        return _Euclidean.apply(a, b, b_square)  # type: ignore[no-any-return]

    def paired(self, a: Float[Tensor, "*#n d"], b: Float[Tensor, "*#n d"]) -> Float[Tensor, "*n"]:
        """Distances of a[i] to b[i], over any leading shape, without the rounding of a product."""
        if self.metric == "cosine":
            return 1.0 - (a * b).sum(-1)
        square = (a - b).square().sum(-1)
        return torch.where(square > 0, square.clamp_min(1e-30).sqrt(), 0.0)


DISTANCES: Registry[Distance] = Registry(
    "embedding space",
    {
        "N": Distance("N", "euclidean", True),
        "C": Distance("C", "cosine", True),
        "E": Distance("E", "euclidean", False),
    },
)


class Embedder(nn.Module):
    """A network with its preprocessing: images (b, C, H, W) in [0, 1] to embeddings (b, d) float32.

    Args:
        network: any module from normalised images (b, C, H, W) to (b, d).
        input_shape: (C, H, W) of the images it is fed.
        mean, std: per channel, applied here so that perturbations live on pixels in [0, 1].
        distance: the embedding space.
        name: what results call it.
        preprocess: how pictures become its images; by default the field's way for ``input_shape``.

    Attributes:
        card: the registry's record of this model, where it has one.
        weights_sha256: of the file that the weights were read from.
        arch: what results call its architecture.
        precision: of gradients, never of results: "float32"; "int8", which rounds the gallery that an attack
            looks at; "tf32", which lets a GPU round the factors of products; "bfloat16", which rounds inside the
            network; "auto", which chooses of the first three.
        compiled: whether gradient steps are to go through torch.compile; see :mod:`dmlbench.fast.compiled`.
        steps: the network as gradient steps run it, None for ``network`` itself.
        notes: sentences about how it was loaded.
        doubts: (flag, sentence) of what makes its numbers mean less than they say.
        front: what is done to images (b, C, H, W) in [0, 1] before mean and std: to (b, C, H, W), or to (b k, C, H, W),
            of which the network's outputs are averaged for each image. See :mod:`dmlbench.models.defended`.
        eot: passes that an attack averages by default, if ``front`` is random; else None.
        lipschitz: L of which its author claims ``|f(x) - f(x')|₂ ≤ L |x - x'|₂``, f being the embeddings as they are compared and x pixels
            in [0, 1]; None where nothing is claimed.

    Raises:
        UsageError: a shape, mean, std or distance that is none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        input_shape: tuple[int, int, int],
        *,
        mean: Sequence[float] | np.ndarray | Tensor | None = None,
        std: Sequence[float] | np.ndarray | Tensor | None = None,
        distance: Distance = DISTANCES["N"],
        name: str = "custom",
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(distance, Distance):
            raise UsageError(f"distance must be one of DISTANCES, e.g. DISTANCES['N'], not {distance!r}")
        self.network = network
        self.input_shape = _image_shape(input_shape)
        self.distance = distance
        self.name = str(name)
        self._preprocess = preprocess
        self.card: Checkpoint | None = None
        self.weights_sha256: str | None = None
        self.arch: str | None = None
        self.precision = "auto"
        self.compiled = False
        self.steps: Callable[[Tensor], Tensor] | None = None
        self.notes: tuple[str, ...] = ()
        self.doubts: tuple[tuple[str, str], ...] = ()
        self.front: Callable[[Tensor], Tensor] | None = None
        self.lipschitz: float | None = None
        self.eot: int | None = None
        self.identity = mean is None and std is None
        self.register_buffer("mean", _per_channel("mean", mean, 0.0, self.input_shape[0]))
        self.register_buffer("std", _per_channel("std", std, 1.0, self.input_shape[0]))
        if problem := normalisation_problem(self.mean.flatten().tolist(), self.std.flatten().tolist(), 1.0):
            raise UsageError(problem)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_shape))
        count = sum(p.numel() for p in self.parameters())
        of = f", {self.arch}" if self.arch else ""
        return f"<Embedder {self.name}{of}, images {size}, space {self.distance.space}, {count:,} parameters>"

    def train(self, mode: bool = True) -> "Embedder":
        """As of any module; but no part stays in training mode after :meth:`eval`, whatever its own ``train`` does."""
        super().train(mode)
        for part in () if mode else self.modules():
            if trains(part):
                part.training = False
        return self

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        stepping = torch.is_grad_enabled() and images.requires_grad
        network = self.steps if self.steps is not None and stepping else self.network
        shown = images if self.front is None else self.front(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=stepping and self.precision == "bfloat16"):
            raw = self._through(network, shown)
        if not isinstance(raw, Tensor) or raw.dim() != 2:
            what = f"shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise DataError(f"model {self.name!r} gave {what}, where embeddings (batch, d) are expected")
        raw = raw.float()
        if len(shown) != len(images):
            raw = raw.unflatten(0, (len(images), -1)).mean(1)
        return self.distance.finish(raw)

    def _through(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What the network makes of the images.

        Raises:
            torch.cuda.OutOfMemoryError: the batch is too large; who chose its size may choose another.
            DataError: the network fails on them in another way.
        """
        fed = self.normalise(images)
        try:
            return network(fed)
        except (DmlbenchError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # the network is anybody's code, which can fail in any way
            shape = "x".join(map(str, images.shape))
            raise DataError(f"model {self.name!r} fails on a batch of {shape}: {described(error)}") from error

    def normalise(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the network is fed, to which it may do what it likes: images less mean, over std; a tensor of its own."""
        return images.clone() if self.identity else (images - self.mean) / self.std

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become this model's images.

        Raises:
            UsageError: it takes neither 1 nor 3 channels, so its images are not pictures.
        """
        return self._preprocess or Preprocess.standard(self.input_shape)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.mean.device

    def frozen(self, device: torch.device | str | None = None) -> "Embedder":
        """A copy made for attacking: eval mode, no parameter gradients, batch norms folded into the
        convolutions and channels_last where that changes nothing but float rounding.

        A network that cannot be copied (a traced one, one that holds a lock) is used as it is, and only moved.
        """
        try:
            twin = copy.deepcopy(self).eval().requires_grad_(False)
        except Exception:  # the network is anybody's code; what it holds can refuse a copy for many reasons
            return self._sharing(device)
        twin.steps = None
        if device is not None:
            twin = twin.to(device)
        twin.network = _folded(twin.network, self.input_shape, twin.device)
        if any(isinstance(m, nn.Conv2d) for m in twin.modules()):
            twin = twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return twin

    def undefended(self) -> "Embedder":
        """Another Embedder around the same network, with nothing done to images before it."""
        twin = self._sharing(None)
        twin.front, twin.eot, twin.name = None, None, f"{self.name} without its defence"
        return twin

    def unrounded(self) -> "Embedder":
        """Another Embedder around the same network, whose gradient steps are no more rounded than its results."""
        twin = self._sharing(None)
        twin.precision = "float32"
        return twin

    def _sharing(self, device: torch.device | str | None) -> "Embedder":
        """Another Embedder around the same network, in eval mode."""
        twin = copy.copy(self)
        twin._modules, twin._buffers = dict(self._modules), dict(self._buffers)
        twin.steps = None
        twin.eval()
        return twin if device is None else twin.to(device)


@contextmanager
def modes_kept(*modules: object) -> Iterator[None]:
    """Within it modules may be put into eval mode; after it each of their parts is in the mode that it had."""
    parts = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    before = [(part, part.training) for part in parts if hasattr(part, "training")]
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def trains(part: nn.Module) -> bool:
    """Is it in training mode? A script that was frozen (torch.jit.freeze) has no modes."""
    return getattr(part, "training", False)


def _image_shape(given: Iterable[int]) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        UsageError: these are not three whole numbers above 0.
    """
    try:
        channels, height, width = map(operator.index, given)
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise UsageError(f"input_shape must be (channels, height, width), whole numbers above 0, not {given!r}")
    return channels, height, width


def _per_channel(what: str, given: object, default: float, channels: int) -> Float[Tensor, "1 c 1 1"]:
    """Numbers per channel, or one for all, as images are moved by.

    Raises:
        UsageError: another count than ``channels``, or no numbers.
    """
    try:
        numbers = [default] * channels if given is None else given
        values = torch.as_tensor(numbers, dtype=torch.float32, device="cpu").flatten()  # also within a meta device
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{what} must be a number for each channel, not {given!r}") from None
    if len(values) not in (1, channels):
        raise UsageError(f"{what} has {len(values)} values for images of {channels} channel{'s' * (channels != 1)}")
    return values.detach().clone().view(1, -1, 1, 1)


def _folded(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> nn.Module:
    """``network`` with batch norms folded, or ``network`` itself where that cannot be done safely."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        return network
    from torch.fx.experimental.optimization import fuse

    try:
        fused = fuse(network).requires_grad_(False)
        probe = torch.linspace(0, 1, 2 * shape[0] * shape[1] * shape[2], device=device).view(2, *shape)
        with torch.no_grad():
            before, after = network(probe), fused(probe)
        return fused if torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())) else network
    except Exception:  # tracing refuses many kinds of module for many reasons; the unfolded network is right too
        return network


def passes(
    embedder: Callable[[Tensor], Tensor],
    images: Float[Tensor, "b c h w"],
    count: int,
    purpose: str = "read",
    rows: Tensor | None = None,
    calls: Tensor | None = None,
) -> Iterator[Float[Tensor, "b d"]]:
    """The embeddings of ``count`` passes, each with draws of its own where the model's defence is random: see
    :class:`~dmlbench.rng.Pass`."""
    for turn in range(count):
        with passing(Pass(purpose, turn, rows, calls)):
            e = embedder(images)
        yield e


STEADY = 1e-5
"""Embeddings of the same images that differ by more, see :func:`disagreement`, are not those of one function of the image."""


def disagreement(embeddings: Iterable[Float[Tensor, "b d"]], scale: Tensor | None = None) -> float:
    """The largest difference of later passes from the first, as a share of ``scale``, by default the first's largest number.

    NaN where an embedding is.
    """
    first, *others = embeddings
    scale = first.abs().amax() if scale is None else scale
    largest = torch.stack([(e - first).abs().amax() for e in others]).amax()
    return float(largest / scale.clamp_min(1e-30))


def require_finite(embeddings: Float[Tensor, "b d"], name: str, images: str = "images") -> None:
    """Raise if an embedding is NaN or infinite, so that it has no distances.

    Raises:
        DataError: one of them is NaN or infinite.
    """
    broken = ~torch.isfinite(embeddings).all(1)
    if bool(broken.any()):
        raise DataError(
            f"model {name!r} gives NaN or infinite embeddings for {int(broken.sum())} of {len(broken)} {images}"
        )


def digest_of(embedder: nn.Module) -> str:
    """Hash of every parameter and buffer, for a model that has no weights file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(embedder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

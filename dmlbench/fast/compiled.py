"""Gradient steps through torch.compile, for who asks for it; and a model made ready for being attacked.

Only the passes of gradients see the compiled network: clean embeddings and read-outs never do, so a result
can differ by the rounding of the search alone. What torch cannot compile runs as it is, and the result says so.
"""

import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dmlbench.embedding import Embedder
from dmlbench.fast.rounded import settled
from dmlbench.files import described

Network = Callable[[Tensor], Tensor]

LEAST = 16
"""Images from which a batch is compiled for; torch makes graphs of their own for smaller ones, which have less to gain."""
LIMITS = {"tf32": (1e-2, 5e-2), "bfloat16": (5e-2, 3e-1)}
"""By precision of gradients, how far a compiled network may be from the eager one: see :func:`apart`."""
EXACT = (1e-4, 1e-2)
"""The same in float32. A unit whose input is nearly zero may open or close by rounding, so gradients differ by more."""


class Steps:
    """A frozen network as gradient steps run it: compiled at its first use, and compared with itself there.

    Every batch of :data:`LEAST` images or more is one graph, whose batch size is left open.

    Attributes:
        network: images (b, C, H, W) to (b, d), its parameters frozen.
        trouble: why it runs as it is, "" while nothing speaks against compiling.
    """

    def __init__(self, network: Network, precision: str = "float32") -> None:
        self.network, self.precision, self.trouble = network, precision, ""
        self._call: Network | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) < LEAST or self.trouble:
            return self.network(images)
        if self._call is None:
            self._begin(images)
        return self.network(images) if self._call is None else self._call(_plain(images))

    def _begin(self, images: Tensor) -> None:
        """Compile and compare; without success ``trouble`` says why.

        Raises:
            torch.cuda.OutOfMemoryError: the batch is too large, whatever runs it.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = torch.compile(_uncached(lambda x: self.network(x)))
                gaps = apart(self.network, call, images.detach()[:LEAST])
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler, and whatever it calls, can fail in any way
            self.trouble = f"torch.compile failed ({described(error)})"
            return
        limits = LIMITS.get(self.precision, EXACT)
        if all(value <= limit for value, limit in zip(gaps, limits, strict=True)):
            self._call = call
        else:
            self.trouble = (
                f"the compiled network is not the eager one: outputs are {gaps[0]:.1e} apart, "
                f"gradients {gaps[1]:.1e}, where {limits[0]:.0e} and {limits[1]:.0e} are allowed"
            )


def apart(network: Network, other: Network, images: Tensor) -> tuple[float, float]:
    """How far two networks are apart on (b, C, H, W) images: outputs, and gradients to the images.

    Each is the length of the difference over the length of ``network``'s own. The gradients are those of one
    fixed direction of the output. The batch size of ``other`` is marked as dynamic.
    """
    results = []
    for run in (network, other):
        with torch.enable_grad():
            leaf = images.detach().requires_grad_(True)
            x = _plain(leaf)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            y = run(x)
            towards = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype, device=y.device).expand_as(y)
            (gradient,) = torch.autograd.grad(y, leaf, towards)
        results.append((y.detach().float(), gradient.float()))
    (a, a_slope), (b, b_slope) = results
    return _relative(a, b), _relative(a_slope, b_slope)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _plain(images: Tensor) -> Tensor:
    """The same images with the strides of a new tensor: others would be another graph."""
    return images.flatten().view(images.shape)


def _uncached(call: Network) -> Network:
    """The same function with code of its own: torch counts graphs by code, and stops at 8."""
    assert isinstance(call, types.FunctionType)
    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def ready(embedder: Embedder, entries: int, device: torch.device, gradients: Embedder | None = None) -> Embedder:
    """A frozen copy of a model to attack, before a gallery of ``entries``.

    Its ``precision`` is settled, and its ``steps`` are compiled if that is asked for: as ``gradients`` says, by
    default the model itself.

    Raises:
        UsageError: the device is not made for the precision.
    """
    stated = gradients or embedder
    precision = settled(stated.precision, entries, device)
    twin = embedder.frozen(device)
    twin.precision, twin.compiled = precision, stated.compiled
    twin.steps = Steps(twin.network, precision) if stated.compiled else None
    return twin

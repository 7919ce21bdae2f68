"""What optimizers share: the loss they see, the gradient they ask for, and rows that are settled early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from dmlbench.fast.exact import gradients_in
from dmlbench.rng import Rng
from dmlbench.threat import Threat

Loss = Callable[[Tensor], Tensor]
Gradient = Callable[[Loss, Tensor, Rng], tuple[Tensor, Tensor]]
State = TypeVar("State")

DROP_EVERY = 8
"""Steps between two looks at which images are settled: a look waits for the device."""


@runtime_checkable
class Run(Protocol):
    """A search: what every entry of :data:`~dmlbench.optimizers.OPTIMIZERS` runs."""

    def __call__(self, loss: Loss, images: Tensor, threat: Threat, rng: Rng) -> Tensor:
        """Adversarial images for clean ``images`` (b, ...), each inside the threat."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A loss that can be evaluated on a subset of its images: ``loss[mask](images[mask])``."""

    def __call__(self, images: Tensor) -> Tensor:
        """(b,) the loss of each image."""
        ...

    def __getitem__(self, index: Any) -> "Divisible":
        """The same loss for a part of the batch."""
        ...


@runtime_checkable
class Thinning(Protocol):
    """A loss whose images may leave it, while the values and gradients of the others stay what they were to the bit."""

    @property
    def steady(self) -> bool:
        """Does it keep that promise here, and is it the same function of an image each time?"""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(b,) the loss of each image."""
        ...

    def thinned(self, alive: Tensor) -> "Thinning":
        """The loss of those images alone that are ``alive`` (b,) bool."""
        ...


@runtime_checkable
class Hunt(Divisible, Protocol):
    """A loss that also knows which images need no further search."""

    def unsettled(self) -> Tensor:
        """(b,) bool: which images are still worth a step."""
        ...


@runtime_checkable
class Shown(Protocol):
    """A loss that knows, for each of its images, another one at which it is 0 or less: where a search by decisions starts."""

    def shown(self) -> Tensor:
        """(b, ...) such images, in [0, 1]."""
        ...


@dataclass
class Trouble:
    """Gradients of single images that were NaN or infinite: a number where they are counted, on their device."""

    seen: Tensor | int = 0

    @property
    def count(self) -> int:
        """How many."""
        return int(self.seen)


_TROUBLE: ContextVar[Trouble | None] = ContextVar("trouble", default=None)


@contextmanager
def watched() -> Iterator[Trouble]:
    """Within it, every gradient that is NaN or infinite is counted."""
    trouble = Trouble()
    token = _TROUBLE.set(trouble)
    try:
        yield trouble
    finally:
        _TROUBLE.reset(token)


def unwell() -> bool:
    """Was some gradient NaN or infinite since :func:`watched` began?"""
    trouble = _TROUBLE.get()
    return trouble is not None and trouble.count > 0


def finite(gradient: Tensor) -> Tensor:
    """``gradient`` (b, ...), zero for every image where some of it is NaN or infinite: no step, rather than a NaN one.

    Such images are counted for :func:`watched`; nothing waits for the device.
    """
    if not len(gradient):
        return gradient
    sound = torch.isfinite(torch.linalg.vector_norm(gradient.flatten(1), torch.inf, dim=1))  # (b,)
    if (trouble := _TROUBLE.get()) is not None:
        trouble.seen = trouble.seen + (~sound).sum()
    if gradient.device.type == "cpu" and bool(sound.all()):
        return gradient
    return torch.where(each(sound, gradient), gradient, 0.0)


def autograd(loss: Loss, images: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """Loss per image (b,) and its exact gradient; the sum over the batch exists only here.

    The gradient is zero where the loss does not depend on the images through anything differentiable, and where it
    is not :func:`finite`. A loss may have a ``precision``: "tf32" lets a GPU round the products of both passes, here
    and nowhere else.
    """
    with torch.enable_grad(), gradients_in(getattr(loss, "precision", "float32")):
        x = images.detach().requires_grad_(True)
        values = loss(x)
        if not values.requires_grad:
            return values, torch.zeros_like(images)
        (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    return values.detach(), torch.zeros_like(images) if gradient is None else finite(gradient)


def each(values: Tensor, like: Tensor) -> Tensor:
    """(b,) shaped to broadcast against ``like`` (b, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def keep_lower(a: Tensor, a_loss: Tensor | None, b: Tensor, b_loss: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the one of ``a`` and ``b`` whose loss is lower (``a`` where they tie)."""
    assert a_loss is not None
    better = b_loss < a_loss
    return torch.where(each(better, a), b, a), torch.minimum(a_loss, b_loss)


def keep_rows(state: State, alive: Tensor) -> State:
    """A dataclass of tensors (b, ...) and :class:`Rng` streams with only the rows that are alive."""
    rows = {f.name: getattr(state, f.name)[alive] for f in fields(state)}  # type: ignore[arg-type]
    return replace(state, **rows)  # type: ignore[type-var]

"""The threat model: how far, in which norm, and for how long an adversary may go.

``Threat`` is the record; a :class:`Ball` holds what one norm means: ``project`` (also into [0, 1]),
``ascent`` (the steepest unit step), ``sample`` and ``corner`` (random starts) and ``size`` (how far an image has
moved). Every function takes a batch and treats each image alone. Lengths are on the [0, 1] scale of
pixels, and may be written as fractions ("8/255", "0.25/255").
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.registry import Registry, suggest
from dmlbench.rng import Rng

STARTS = ("clean", "random", "corner")
"""Where a search may begin."""
TOLERANCE = 1e-5
"""How far outside the ball float rounding may put an image, relative to max(1, eps)."""


def length(text: Any, name: str = "eps") -> float:
    """A length on the [0, 1] scale from a number or a fraction: ``length("8/255")`` = 0.03137."""
    try:
        if isinstance(text, bool):
            raise ValueError(text)
        if isinstance(text, str):
            top, slash, bottom = text.partition("/")
            if "/" in bottom:
                raise ValueError(text)
            value = float(_exact(top) / _exact(bottom)) if slash else float(_exact(top))
        else:
            value = float(text)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise UsageError(f"{name} {text!r} is not a number or a fraction such as 8/255") from None
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} {text!r} must be zero or more")
    return value


def _exact(text: str) -> Fraction:
    """A decimal number without rounding; what no float can hold is 0 or an error, as its digits could fill the memory."""
    near = float(text)
    return Fraction(text) if near and math.isfinite(near) else Fraction(near)


def written(value: float, norm: str) -> str:
    """A length as a person reads it: of "linf" in steps of a pixel of 8 bits, ``"12.3/255"``."""
    return f"{value * 255:.3g}/255" if norm == "linf" else f"{value:.3g}"


def check_counts(fields: Mapping[str, Any]) -> None:
    """Refuse counts of a threat that are not whole numbers; a bool is none.

    Raises:
        UsageError: one of steps, restarts, queries and eot is not a whole number.
    """
    for name in ("steps", "restarts", "queries", "eot"):
        if name in fields and type(fields[name]) is not int:
            raise UsageError(f"{name} {fields[name]!r} is not a whole number")


@dataclass(frozen=True)
class Threat:
    """What the adversary is allowed.

    Attributes:
        norm: "linf" or "l2" (a name of :data:`BALLS`).
        eps: radius of the ball around the clean image, as a number or a fraction, [0, 1] scale
            (for "l2" the length of the whole perturbation, which may exceed 1).
        step: step length of iterative optimizers, as ``eps``.
        steps: number of iterations.
        start: "clean" (the image itself), "random" (uniform in the ball) or "corner" (as far out as the ball goes,
            in a random direction: for "linf" eps up or down in every pixel).
        restarts: independent runs, of which each image keeps its best.
        queries: forward passes that a black-box optimizer may spend.
        eot: forward passes averaged for each value and gradient (expectation over transformations,
            Athalye et al., 2018), for models that are random; read-outs are averaged alike.
    """

    norm: str = "linf"
    eps: str | float | int = "8/255"
    step: str | float | int = "3/255"
    steps: int = 32
    start: str = "clean"
    restarts: int = 1
    queries: int = 1000
    eot: int = 1

    def __post_init__(self) -> None:
        BALLS[self.norm]
        if self.norm == "linf" and self.radius > 1:
            raise UsageError(f"eps {self.eps!r} is outside [0, 1], the range of pixels")
        length(self.step, "step")
        check_counts(vars(self))
        if self.steps < 0 or min(self.restarts, self.queries, self.eot) < 1:
            raise UsageError("steps must be 0 or more; restarts, queries and eot 1 or more")
        if self.start not in STARTS:
            raise UsageError(f"start {self.start!r} must be {', '.join(map(repr, STARTS[:-1]))} or {STARTS[-1]!r}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Threat":
        """A threat from what a file says.

        Raises:
            UsageError: an unknown key, or a value that is not of its kind.
        """
        known = [f.name for f in dataclass_fields(cls)]
        for key in fields:
            if key not in known:
                raise UsageError(f"unknown key {key!r} of a threat{suggest(key, known)}")
        for key in ("norm", "start"):
            if not isinstance(fields.get(key, ""), str):
                raise UsageError(f"{key} {fields[key]!r} is not a word in quotes")
        for key in ("eps", "step"):
            length(fields.get(key, 0), key)
        check_counts(fields)
        return cls(**fields)

    @property
    def radius(self) -> float:
        """``eps`` as a number."""
        return length(self.eps)

    @property
    def stride(self) -> float:
        """``step`` as a number."""
        return length(self.step, "step")

    @property
    def ball(self) -> "Ball":
        """The geometry of this threat's norm."""
        return BALLS[self.norm]

    def but(self, **changes: Any) -> "Threat":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The nearest images inside both the ball around ``clean`` and [0, 1]."""
        return self.ball.project(images, clean, self.radius)

    def sample(self, clean: Tensor, rng: Rng) -> Tensor:
        """Random images of the ball around ``clean``, clipped to [0, 1]."""
        return self.project(clean + self.ball.sample(clean, self.radius, rng), clean)

    def begin(self, clean: Tensor, rng: Rng) -> Tensor:
        """Where a search starts, by ``start``."""
        if self.start == "corner":
            return self.project(clean + self.ball.corner(clean, self.radius, rng), clean)
        return self.sample(clean, rng) if self.start == "random" else clean.clone()

    def stepped(self, images: Tensor, direction: Tensor, clean: Tensor, length: float) -> Tensor:
        """``images`` after a steepest step of this length against ``direction`` (b, ...), a gradient, and back into the ball."""
        return self.project(images - length * self.ball.ascent(direction), clean)

    def contains(self, images: Tensor, clean: Tensor) -> Tensor:
        """(b,) bool: is each image inside the ball and [0, 1], but for float rounding?"""
        flat = images.flatten(1)
        near = self.ball.size(images - clean) <= self.radius + TOLERANCE * max(1.0, self.radius)
        return near & (flat.amin(1) >= -TOLERANCE) & (flat.amax(1) <= 1 + TOLERANCE)


@dataclass(frozen=True)
class Ball:
    """One norm: its functions take batches of any trailing shape."""

    project: Callable[[Tensor, Tensor, float], Tensor]
    ascent: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, float, Rng], Tensor]
    corner: Callable[[Tensor, float, Rng], Tensor]
    size: Callable[[Tensor], Tensor]


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(b,) shaped to broadcast against ``like`` (b, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _linf_project(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    return torch.clamp(torch.minimum(torch.maximum(images, clean - eps), clean + eps), 0.0, 1.0)


def _linf_sample(clean: Tensor, eps: float, rng: Rng) -> Tensor:
    return (rng.uniform(*clean.shape[1:]) * 2.0 - 1.0) * eps


def _linf_corner(clean: Tensor, eps: float, rng: Rng) -> Tensor:
    return rng.signs(*clean.shape[1:]) * eps


def _l2_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_ascent(gradient: Tensor) -> Tensor:
    return gradient / _each(_l2_size(gradient), gradient).clamp_min(1e-30)


def _l2_project(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    # Clipping to [0, 1] can only bring an image nearer to a clean one that is inside [0, 1].
    delta = images - clean
    shrink = (eps / _l2_size(delta).clamp_min(1e-30)).clamp(max=1.0)
    return torch.clamp(clean + delta * _each(shrink, delta), 0.0, 1.0)


def _l2_sample(clean: Tensor, eps: float, rng: Rng) -> Tensor:
    direction = _l2_ascent(rng.normal(*clean.shape[1:]))
    size = clean[0].numel()
    return direction * _each(rng.uniform() ** (1.0 / size), clean) * eps


def _l2_corner(clean: Tensor, eps: float, rng: Rng) -> Tensor:
    return _l2_ascent(rng.normal(*clean.shape[1:])) * eps


BALLS: Registry[Ball] = Registry(
    "norm",
    {
        "linf": Ball(
            _linf_project, torch.sign, _linf_sample, _linf_corner, lambda delta: delta.flatten(1).abs().amax(1)
        ),
        "l2": Ball(_l2_project, _l2_ascent, _l2_sample, _l2_corner, _l2_size),
    },
)

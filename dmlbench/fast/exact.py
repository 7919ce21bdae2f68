"""Results in true float32, whatever torch is set to, and gradients in TF32 where they may be.

By default torch lets cuDNN round the factors of convolutions to TF32 (10 bits of mantissa), and a program
may allow the same, or bfloat16, for matrix products. A result is read with none of it; the settings are
put back afterwards. ``Embedder.precision`` sets a lower precision for gradients.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """A switch of torch that lets float32 be computed in less.

    Attributes:
        read, write: where it stands, and how it is moved.
        exact: where it stands when nothing may be rounded.
        tf32: where it stands when a GPU may round to TF32; None for what no GPU looks at.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Any
    tf32: Any = None


def _attribute(holder: Any, name: str, exact: Any, tf32: Any) -> Setting:
    return Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value), exact, tf32)


@cache
def settings() -> tuple[Setting, ...]:
    """The switches of this torch version: the old ones, then those that torch 2.9 added.

    The old ones move the new ones too, so they are written first.
    """
    old = [
        Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
        _attribute(torch.backends.cudnn, "allow_tf32", False, True),
    ]
    places: list[tuple[Any, str | None]] = [(torch.backends.cuda.matmul, "tf32")]
    for library, less in ((torch.backends.cudnn, "tf32"), (torch.backends.mkldnn, None)):
        places += [(getattr(library, what), less) for what in ("conv", "matmul", "rnn") if hasattr(library, what)]
    new = [_attribute(at, "fp32_precision", "ieee", less) for at, less in places if hasattr(at, "fp32_precision")]
    return (*old, *new)


@contextmanager
def true_float32() -> Iterator[None]:
    """Within it, float32 products and convolutions are those of IEEE float32. Also a decorator."""
    before: list[tuple[Setting, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn at the old switches
        for setting in settings():
            with suppress(RuntimeError):  # an old switch that a program has set otherwise by the new ones is not told
                before.append((setting, setting.read()))
        for setting, _ in before:
            setting.write(setting.exact)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for setting, value in before:
                setting.write(value)


@contextmanager
def in_tf32() -> Iterator[None]:
    """Within it, a GPU may round the factors of float32 products and convolutions to TF32.

    Some 50 microseconds, as it is entered at every step; what stood before is put back. Old and new
    switches say the same within it, since torch refuses to tell an old one that the new ones contradict.
    """
    before: list[tuple[Setting, Any]] = []
    for setting in settings():
        with suppress(RuntimeError):
            before.append((setting, setting.read()))
    try:
        for setting, _ in before:
            if setting.tf32 is not None:
                setting.write(setting.tf32)
        yield
    finally:
        for setting, value in before:
            setting.write(value)


def has_tf32(device: torch.device) -> bool:
    """Does this device multiply TF32 in hardware? NVIDIA GPUs of compute capability 8.0 (Ampere) and later do."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def gradients_in(precision: str) -> AbstractContextManager[None]:
    """Where both passes of a gradient are made: :func:`in_tf32` if that is the precision, else as it stands."""
    return in_tf32() if precision == "tf32" else nullcontext()

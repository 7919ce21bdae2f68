"""Results in true float32, whatever torch is set to.

By default torch lets cuDNN round the factors of convolutions to TF32 (10 bits of mantissa), and a program
may allow the same, or bfloat16, for matrix products. A result is read with none of it; the settings are
put back afterwards. Gradients in lower precision are asked for with ``Embedder.precision``.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """A switch of torch that lets float32 be computed in less, and where it stands when nothing does."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Any


def _attribute(holder: Any, name: str, exact: Any) -> Setting:
    return Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value), exact)


def settings() -> list[Setting]:
    """The switches of this torch: the old ones, then the new ones that torch 2.9 set beside them."""
    old = [
        Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _attribute(torch.backends.cudnn, "allow_tf32", False),
    ]
    places = [torch.backends.cuda.matmul]
    for library in (torch.backends.cudnn, torch.backends.mkldnn):
        places += [getattr(library, what) for what in ("conv", "matmul", "rnn") if hasattr(library, what)]
    return old + [_attribute(place, "fp32_precision", "ieee") for place in places if hasattr(place, "fp32_precision")]


@contextmanager
def true_float32() -> Iterator[None]:
    """Within it, float32 products and convolutions are those of IEEE float32. Also a decorator."""
    kept: list[tuple[Setting, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn at the old switches
        for setting in settings():
            with suppress(RuntimeError):  # an old switch that a program has set otherwise by the new ones is not told
                kept.append((setting, setting.read()))
        for setting, _ in kept:
            setting.write(setting.exact)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for setting, value in kept:
                setting.write(value)

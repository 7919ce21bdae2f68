"""The gallery in 8-bit integers, for gradients on processors that multiply those several times as fast as floats.

What an objective needs of tens of thousands of entries is which of them are ahead of a target and the sum of
their pulls: sums in which the rounding of single entries averages out. Only gradients are made with it; targets,
ranks and every other result come from the float32 embeddings. Integer products are exact, so a gradient does not
depend on the batch it is made in.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.fast.exact import has_tf32

LARGE = 1 << 14
"""Gallery entries from which "auto" rounds: below, the products are a small share of a step."""
LEVELS = 127
"""The largest 8-bit code; the smallest is its negative."""


def native() -> bool:
    """Does this processor multiply 8-bit integers in hardware, and this torch know how?"""
    asks = ("_is_vnni_supported", "_is_avx512_vnni_supported")  # of different versions of torch
    return hasattr(torch, "_int_mm") and any(getattr(torch.cpu, ask, bool)() for ask in asks)


def settled(precision: str, entries: int, device: torch.device) -> str:
    """What "auto" means for a gallery of ``entries`` on this device.

    "tf32" on a GPU that is fast at it; "int8" on a CPU that is fast at it where the gallery is large; else "float32".

    Raises:
        UsageError: "int8" or "tf32" on a device that it is not made for.
    """
    if precision == "int8" and not (device.type == "cpu" and hasattr(torch, "_int_mm")):
        raise UsageError(f"--precision int8 is for a CPU, and a torch that multiplies integers; here is {device.type}")
    if precision == "tf32" and not has_tf32(device):
        raise UsageError(
            f"--precision tf32 is for an NVIDIA GPU of compute capability 8.0 or higher; here is {_called(device)}"
        )
    if precision != "auto":
        return precision
    if has_tf32(device):
        return "tf32"
    return "int8" if entries >= LARGE and device.type == "cpu" and native() else "float32"


def _called(device: torch.device) -> str:
    """A device as an error message names it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return f"{device.type}, of {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"


@dataclass(frozen=True, eq=False)
class RoundedGallery:
    """Entries about their mean, as whole numbers of one step.

    Attributes:
        codes: (N, D) int8; an entry is about ``centre + step * code``.
        centre: (D,) the mean entry.
        step: () the largest deviation of any number from the mean, over 127.
        square: (N,) squared lengths of the float32 entries.
    """

    codes: Tensor
    centre: Tensor
    step: Tensor
    square: Tensor

    @staticmethod
    def of(embeddings: Float[Tensor, "N D"], square: Float[Tensor, " N"]) -> "RoundedGallery":
        """``embeddings`` rounded."""
        centre = embeddings.mean(0)
        around = embeddings - centre
        step = (around.abs().amax() / LEVELS).clamp_min(1e-30)
        return RoundedGallery(around.div_(step).round_().to(torch.int8), centre, step, square)

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def noise(self) -> Tensor:
        """(): squared distances below this are rounding: that of an entry's numbers, twice over."""
        return 2.0 * self.codes.shape[1] * self.step.square() / 12.0

    def query(self, e: Float[Tensor, "B D"]) -> "RoundedQuery":
        """``e`` rounded, each row by a step of its own."""
        step = (e.abs().amax(1, keepdim=True) / LEVELS).clamp_min(1e-30)  # (B, 1)
        codes = (e / step).round_().to(torch.int8)
        return RoundedQuery(codes, step * self.step, e @ self.centre[:, None])


@dataclass(frozen=True, eq=False)
class RoundedQuery:
    """A batch of embeddings and a gallery, both in 8-bit integers.

    Attributes:
        codes: (B, D) int8.
        unit: (B, 1) what one of an integer product stands for.
        base: (B, 1) the product with the gallery's mean.
    """

    codes: Int8[Tensor, "B D"]
    unit: Tensor
    base: Tensor

    def products(self, codes: Int8[Tensor, "B K D"]) -> Int32[Tensor, "B K"]:
        """With entries of each row's own: the same whole numbers as of a product with all of them."""
        return (self.codes[:, None, :].int() * codes).sum(2, dtype=torch.int32)

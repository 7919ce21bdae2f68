"""What TF32 gradients do to a score, without a GPU: TF32 is emulated on the CPU.

A GPU that multiplies in TF32 keeps 10 of the 23 bits of mantissa of both factors of a float32 product or
convolution and adds up in float32. Here every such product, in forward and backward passes alike, gets its
factors rounded in the same way, wherever torch's own switches say that a GPU may round. So a run goes
through the very code that it goes through on a GPU, read-outs in true float32 among it.

    python benchmarks/tf32.py                                              # the default model, all of ers-digits
    python benchmarks/tf32.py omniglot-small-conv3-triplet-none --limit 256
    python benchmarks/tf32.py digits-smallcnn-triplet-none --ways cut      # factors cut off instead of rounded

Prints ERS with float32 gradients, with emulated TF32 gradients, and the difference, which may be 0.3 at most.
"nearest" rounds factors as libraries do that convert them; "cut" drops the bits, as the hardware does with
factors that were not converted.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dmlbench
from dmlbench.evaluate import evaluate
from dmlbench.results import Evaluation

MODEL = "digits-smallcnn-triplet-hm-lga-ics"
LOST = 13
"""Bits of a float32 mantissa that TF32 has not."""
MASK = ~((1 << LOST) - 1)
aten = torch.ops.aten
PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten.baddbmm: (1, 2),
    aten.baddbmm_: (1, 2),
}
"""Matrix products of torch, and which arguments are the factors."""
CONVOLUTIONS = {aten.convolution: (0, 1), aten.convolution_backward: (0, 1, 2)}
"""The same for convolutions; the backward pass multiplies the incoming gradient with weights and with images."""


def nearest(x: Tensor) -> Tensor:
    """``x`` float32 with 10 bits of mantissa, to nearest, ties to even. Infinities stay; there must be no NaN."""
    bits = x.contiguous().view(torch.int32)
    even = (bits >> LOST).bitwise_and_(1)
    return even.add_(bits).add_((1 << (LOST - 1)) - 1).bitwise_and_(MASK).view(torch.float32).view_as(x)


def truncated(x: Tensor) -> Tensor:
    """``x`` float32 with the bits that TF32 has not set to 0. There must be no NaN."""
    return (x.contiguous().view(torch.int32) & MASK).view(torch.float32).view_as(x)


WAYS = {"nearest": nearest, "cut": truncated}


def allowed(convolution: bool) -> bool:
    """Do torch's switches let a GPU round the factors of a convolution, or of a matrix product?"""
    place = torch.backends.cudnn.conv if convolution and hasattr(torch.backends.cudnn, "conv") else None
    if place is not None:
        return bool(place.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32)


class Emulated(TorchDispatchMode):
    """Within it, products on the CPU are what a GPU's would be where :func:`allowed`, up to the order of sums.

    Attributes:
        rounding: what is done to factors.
        rounded: how many products have been rounded.
    """

    def __init__(self, rounding: Callable[[Tensor], Tensor] = nearest) -> None:
        super().__init__()
        self.rounding, self.rounded = rounding, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        convolution = func.overloadpacket in CONVOLUTIONS
        factors = CONVOLUTIONS.get(func.overloadpacket) or PRODUCTS.get(func.overloadpacket)
        if factors and args[factors[0]].dtype == torch.float32 and allowed(convolution):
            self.rounded += 1
            args = [self.rounding(a) if i in factors else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated(rounding: Callable[[Tensor], Tensor] = nearest) -> Iterator[Emulated]:
    """Within it, the CPU passes for a device that has TF32, and its products are rounded like one's."""
    with patch("dmlbench.fast.rounded.has_tf32", lambda device: True), Emulated(rounding) as mode:
        yield mode


def scored(model: str, rounding: Callable[[Tensor], Tensor] | None, **options: Any) -> Evaluation:
    """The model's result with float32 gradients (``rounding`` None), or with emulated TF32 ones."""
    embedder = dmlbench.load_model(model)
    if rounding is None:
        embedder.precision = "float32"
        return evaluate(embedder, device="cpu", **options)
    embedder.precision = "tf32"
    with emulated(rounding):
        return evaluate(embedder, device="cpu", **options)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[MODEL], help=f"registered ids; default: {MODEL}")
    parser.add_argument("--limit", type=int, help="only this many queries")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["nearest"], help="how factors lose their bits")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | queries | ERS, float32 | factors | ERS, TF32 | difference | largest of a part |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in args.models:
        exact = scored(model, None, limit=args.limit)
        for way in args.ways:
            rough = scored(model, WAYS[way], limit=args.limit)
            parts = zip(exact.measurements, rough.measurements, strict=True)
            name, most = max(((a.component, b.score - a.score) for a, b in parts), key=lambda part: abs(part[1]))
            print(
                f"| {model} | {exact.dataset.n_queries} | {exact.ers:.3f} | {way} | {rough.ers:.3f} "
                f"| {rough.ers - exact.ers:+.3f} | {most:+.2f} ({name}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Loading of clean images: the next batch is read and copied to the device while the current one is processed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.datasets import Images
from dmlbench.errors import DataError

Bounds = tuple[int, int]
"""First and last + 1 of a batch."""


def checked(images: Tensor, count: int, shape: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    """The images themselves, if they are what a model of pictures can be fed and an attack can move.

    Raises:
        DataError: they are another number, of another shape or type, or not in [0, 1].
    """
    is_tensor = isinstance(images, Tensor)
    if not is_tensor or images.dtype != torch.float32 or images.shape != (count, *shape):
        what = f"{images.dtype} {tuple(images.shape)}" if is_tensor else f"a {type(images).__name__}"
        raise DataError(f"the data set's images must be float32 {(count, *shape)}, and it gave {what}")
    low, high = map(float, images.aminmax())
    if not (low >= 0 and high <= 1):
        raise DataError(f"the data set's images must lie in [0, 1], and are from {low:g} to {high:g}")
    return images


class Loader:
    """Batches of images by their bounds. A thread reads one batch ahead as long as they are requested in the announced order.

    On CUDA the copy goes from pinned memory over a stream of its own. Use it in a ``with`` block.

    Args:
        images: the data set's.
        rows: (Q,) data set rows; the bounds are positions in it.
        device: the device of the batches.
        order: the bounds in the order in which they will be requested; any others are read on request.
    """

    def __init__(self, images: Images, rows: np.ndarray, device: torch.device, order: Sequence[Bounds]) -> None:
        self.images, self.rows, self.device = images, rows, device
        self.following = dict(pairwise(order))
        self.ahead: tuple[Bounds, Future[Tensor]] | None = None
        self.pool = ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, a: int, b: int) -> Float[Tensor, "b c h w"]:
        """Images a to b - 1 on the device; errors of reading them are raised here."""
        if self.ahead and self.ahead[0] == (a, b):
            (_, reading), self.ahead = self.ahead, None
            batch = reading.result()
        else:
            batch = self.pool.submit(self._read, (a, b)).result()  # so that one thread alone reads images
        following = self.following.get((a, b))
        if following and self.ahead is None:
            self.ahead = following, self.pool.submit(self._read, following)
        if self.stream:  # its memory was taken on the other stream, and must not be given away while this one works
            batch.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _read(self, bounds: Bounds) -> Tensor:
        images = checked(self.images[self.rows[slice(*bounds)]], bounds[1] - bounds[0], self.images.shape)
        if self.stream is None:
            return images
        with torch.cuda.stream(self.stream):
            moved = images.pin_memory().to(self.device, non_blocking=True)
        self.stream.synchronize()  # only the reading thread waits
        return moved

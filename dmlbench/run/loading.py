"""Clean images on their way to the device: the next batch is read and copied while the present one is worked on."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.datasets import Images

Bounds = tuple[int, int]
"""First and last + 1 of a batch."""


class Loader:
    """Batches of images by their bounds, one read ahead by a thread where they are asked for in the order announced.

    On CUDA the copy goes from pinned memory over a stream of its own. Use it in a ``with`` block.

    Args:
        images: the data set's.
        rows: (Q,) its rows, which the bounds count.
        device: where batches are wanted.
        order: the bounds as they will be asked for; others may be asked for too, and are read when they are.
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
        """Images a to b on the device; what reading them raises is raised here."""
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
        images = self.images[self.rows[slice(*bounds)]]
        if self.stream is None:
            return images
        with torch.cuda.stream(self.stream):
            moved = images.pin_memory().to(self.device, non_blocking=True)
        self.stream.synchronize()  # only the reading thread waits
        return moved

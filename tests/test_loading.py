"""Batches read ahead are the batches asked for, each read once, whatever the order."""

import threading

import numpy as np
import pytest
import torch

from dmlbench.datasets import TensorImages
from dmlbench.run.loading import Loader

CPU = torch.device("cpu")
ROWS = np.array([7, 3, 0, 9, 2, 5, 1])
BOUNDS = [(0, 3), (3, 6), (6, 7)]


class Watched:
    """Images that note which rows are read, and tell when a batch has been."""

    def __init__(self, broken=None):
        self.whole = TensorImages(torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.broken, self.reads, self.seen = broken, [], threading.Semaphore(0)

    shape = property(lambda self: self.whole.shape)

    def __len__(self):
        return len(self.whole)

    def content(self):
        return self.whole.content()

    def __getitem__(self, rows):
        self.reads.append(rows.tolist())
        self.seen.release()
        if self.broken in rows:
            raise OSError("no such picture")
        return self.whole[rows]


def test_the_next_batch_is_read_before_it_is_asked_for():
    images = Watched()
    with Loader(images, ROWS, CPU, BOUNDS) as load:
        for count, (a, b) in enumerate(BOUNDS, 1):
            torch.testing.assert_close(load(a, b), images.whole[ROWS[a:b]], atol=0, rtol=0)
            for _ in range([2, 1, 0][count - 1]):
                assert images.seen.acquire(timeout=60)
            assert len(images.reads) == min(count + 1, len(BOUNDS))
    assert images.reads == [[7, 3, 0], [9, 2, 5], [1]]


@pytest.mark.parametrize(
    "asked", [[(3, 6), (0, 3), (6, 7)], [(0, 3), (0, 1), (1, 3), (3, 6), (6, 7)], [(0, 7), (0, 7)]]
)
def test_any_order_gives_the_right_images(asked):
    """Other bounds are asked for where a batch is halved; what was read ahead is kept for its turn."""
    images = Watched()
    with Loader(images, ROWS, CPU, BOUNDS) as load:
        for a, b in asked:
            torch.testing.assert_close(load(a, b), images.whole[ROWS[a:b]], atol=0, rtol=0)


def test_what_cannot_be_read_is_an_error_of_the_batch_that_needs_it():
    with Loader(Watched(broken=2), ROWS, CPU, BOUNDS) as load:
        load(0, 3)
        with pytest.raises(OSError, match="no such picture"):
            load(3, 6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gets_the_same_pixels_while_it_is_busy():
    images = TensorImages(torch.rand(512, 3, 64, 64))
    rows = np.random.default_rng(0).permutation(512)
    bounds = [(a, a + 64) for a in range(0, 512, 64)]
    busy = torch.rand(2048, 2048, device="cuda")
    with Loader(images, rows, torch.device("cuda"), bounds) as load:
        for a, b in bounds:
            batch = load(a, b)
            for _ in range(20):
                busy = (busy @ busy).clamp(0, 1)
            assert torch.equal((batch * 1.0).cpu(), images[rows[a:b]])

"""Random numbers that belong to an image, not to a batch.

A draw depends on (seed, image row, how many draws came before, position), through a counter-based
generator (the splitmix64 finaliser of Steele, Lea and Flood, 2014). So a number is the same at any
batch size, on any device, in any order of attacks and after a resume, and a batch is drawn at once.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MUL1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL2 = 0x94D049BB133111EB - (1 << 64)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser, element by element, on int64 (which wraps)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MUL1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MUL2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


SEEDS = range(1 << 63)
"""The seeds that a run may have."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts, e.g. ``seed_of(protocol.seed, attack.name)``."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Rng:
    """A stream of random numbers for each image of a batch.

    ``rows`` (b,) says which image each stream belongs to; ``rng[mask]`` is the sub-batch with its
    streams where they stand, and ``rng.fold("name")`` starts other, independent streams.
    """

    def __init__(self, seed: int, rows: Int[Tensor, " b"]) -> None:
        self.seed = seed
        self.rows = rows
        self.drawn = 0
        self._keys = _mix(_mix(torch.full_like(rows, seed)) + (rows + 1) * _GOLDEN)  # (b,)

    def __getitem__(self, index: Tensor | slice) -> "Rng":
        sub = Rng(self.seed, self.rows[index])
        sub.drawn = self.drawn
        return sub

    def fold(self, *parts: object) -> "Rng":
        """Independent streams for the same images."""
        return Rng(seed_of(self.seed, *parts), self.rows)

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        at = torch.arange(1, count + 1, device=self.rows.device) + (self.drawn << 36)
        self.drawn += 1
        z = _mix(_mix(self._keys[:, None] + at[None, :] * _GOLDEN))  # (b, count)
        return z.view(len(self.rows), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """(b, *shape) float32, uniform on the open interval (0, 1)."""
        return (((self._bits(shape) >> 41) & 0x7FFFFF).float() + 0.5) / (1 << 23)

    def normal(self, *shape: int) -> Tensor:
        """(b, *shape) float32, standard normal (Box and Muller, 1958)."""
        radius = (-2.0 * self.uniform(*shape).log()).sqrt()
        return radius * (2.0 * math.pi * self.uniform(*shape)).cos()

    def signs(self, *shape: int) -> Tensor:
        """(b, *shape) float32, -1 or +1 with equal chance."""
        return ((self._bits(shape) >> 41) & 1).float() * 2.0 - 1.0

    def integers(self, high: int | Tensor, *shape: int) -> Tensor:
        """(b, *shape) int64, uniform on [0, high); ``high`` a number or a tensor that broadcasts."""
        u = self.uniform(*shape).double()
        return (u * high).long()


@dataclass(frozen=True, eq=False)
class Pass:
    """Which pass through a model this is: what a model that is random by the harness's streams draws from.

    Attributes:
        purpose: "read" or "search". An adversary does not know the draws that it will be read with.
        turn: which of the passes that are averaged, from 0.
        rows: (b,) data set rows of the images; None if unknown.
        calls: (b,) how many values the search has seen of each image before.
    """

    purpose: str = "read"
    turn: int = 0
    rows: Tensor | None = None
    calls: Tensor | None = None


_OUTSIDE = Pass()
_PASS: ContextVar[Pass] = ContextVar("pass", default=_OUTSIDE)


@contextmanager
def passing(now: Pass) -> Iterator[None]:
    """Within it, :func:`own_streams` are those of this pass."""
    token = _PASS.set(now)
    try:
        yield
    finally:
        _PASS.reset(token)


def streams_of_pixels(images: Float[Tensor, "b c h w"]) -> Rng:
    """A stream for each image of the pass that is going on.

    It belongs to the image's row and to how often the search has looked at it, so it is the same in any batch. Where no
    row is known it belongs to the very pixels: outside a run a model that draws from it is one function of an image.
    """
    now = _PASS.get()
    if now.rows is None:
        pixels = images.detach().float().contiguous().cpu().flatten(1).numpy()
        seeds = [
            int.from_bytes(hashlib.blake2b(p.tobytes(), digest_size=8).digest(), "big", signed=True) for p in pixels
        ]
        ids = torch.tensor(seeds, dtype=torch.int64, device=images.device)
    else:
        ids = now.rows if now.calls is None else now.rows + (now.calls << 36)
    return Rng(seed_of("own", now.purpose, now.turn, "pixels" if now.rows is None else "rows"), ids)

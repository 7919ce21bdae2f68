"""What worst-case searches share: a loss that watches each image's decision, and passes over the queries that are left.

A search evaluates images one after another; :class:`Watch` is a loss that also notes when one of them is decided wrongly, whatever
it descends. The result is read off the image at which the search stopped, by the harness.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.embedding import Embedder, passes, require_finite
from dmlbench.errors import DataError
from dmlbench.fast.exact import true_float32
from dmlbench.objectives import wrong_by
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol
from dmlbench.rng import Rng
from dmlbench.run.search import batches, halved, joined
from dmlbench.run.subject import Progress, Subject, query_order
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Scene
from dmlbench.threat import Threat

ROUGH = ("tf32", "bfloat16")
"""Precisions in which the embeddings of a gradient's forward pass are rounded."""


class Log:
    """The log of a search, by image: the first perturbed image that is decided wrongly, and when it was seen.

    Attributes:
        first_wrong: (b, ...) the first image that is decided wrongly; the clean image until there is one.
        first: (b,) the number of loss values up to that one, from 1; 0 if there is none yet.
        gradients, values: passes with and without a backward pass, summed over all images; each of the ``eot`` passes
            counts.
        unknown: () the number of embeddings that were NaN or infinite.
    """

    def __init__(self, images: Tensor) -> None:
        self.first_wrong = images.clone()
        self.first = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.calls = torch.zeros_like(self.first)
        self.gradients = self.values = 0
        self.unknown = torch.zeros((), dtype=torch.int64, device=images.device)

    def spend(self, passes: int, graph: bool) -> None:
        """Count forward passes of single images, each with a backward pass if ``graph``."""
        self.gradients, self.values = self.gradients + graph * passes, self.values + (not graph) * passes

    def note(self, at: Int[Tensor, " n"], margins: Float[Tensor, " n"], images: Tensor) -> None:
        """Log one more loss value of the images at the positions ``at``."""
        self.calls[at] += 1
        fresh = wrong_by(margins) & (self.first[at] == 0)  # (n,)
        self.first[at] = torch.where(fresh, self.calls[at], self.first[at])
        shape = (-1, *[1] * (images.dim() - 1))
        self.first_wrong[at] = torch.where(fresh.view(shape), images, self.first_wrong[at])

    def stopped(self, images: Tensor) -> Tensor:
        """``images`` (b, ...) with each replaced by its first wrong one, if it has one: where the search stops."""
        return torch.where((self.first > 0).view(-1, *[1] * (images.dim() - 1)), self.first_wrong, images)

    def calls_until(self, broken: Bool[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """(b,) the number of loss values until each image that the read-out finds ``broken`` was first wrong; 0 for the others."""
        first, calls = self.first.cpu().numpy(), self.calls.cpu().numpy()
        return np.where(broken, np.where(first > 0, first, calls), 0).astype(np.int32)


class Watch:
    """An attack's loss that also watches the margin of the decision, whatever it descends: an image is wrong by :func:`wrong_by`.

    A :class:`~dmlbench.optimizers.Hunt`: an image that was wrong once is settled. If gradient passes are rounded
    or compiled, an image counts as wrong only if a float32 pass of the plain network confirms it.
    """

    def __init__(
        self, embedder: Embedder, scene: Scene, log: Log, at: Int[Tensor, " n"] | None = None, eot: int = 1
    ) -> None:
        self.embedder, self.scene, self.log, self.eot = embedder, scene, log, eot
        self.precision = embedder.precision
        self.at = torch.arange(len(scene), device=log.first.device) if at is None else at
        self.within: tuple[Threat, Tensor] | None = None
        """a threat and clean images (b, ...), if the search evaluates images outside the ball, which do not count"""

    def __call__(self, images: Tensor) -> Float[Tensor, " n"]:
        values, margins = self._summed(images)
        self._spend(images)
        if images.requires_grad and (self.precision in ROUGH or self.embedder.steps is not None):
            margins = self._confirmed(images.detach(), margins)
        if self.within is not None:
            threat, clean = self.within
            margins = torch.where(threat.contains(images.detach(), clean[self.at]), margins, torch.inf)
        self.log.note(self.at, margins, images.detach())
        return values / self.eot

    def _spend(self, images: Tensor) -> None:
        """Count the passes of one loss value of each image."""
        self.log.spend(self.eot * len(images), images.requires_grad)

    def _confirmed(self, images: Tensor, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The margins; those of images that seem wrong for the first time are computed again in float32.

        A pass that is rounded on its way to a gradient can be wrong by more than the margin; a search that stops
        for it leaves a query that the read-out finds right, and that the rest of the search might have broken.
        """
        at = (wrong_by(margins) & self.unsettled()).nonzero()[:, 0]
        if not len(at):
            return margins
        again = self[at]
        with torch.no_grad(), true_float32():
            exact = again._summed(images[at])[1]
        self.log.spend(self.eot * len(at), False)
        return margins.index_copy(0, at, exact)

    def _summed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (n,) and the margin (n,), sums over ``eot`` passes."""
        drawn = passes(self.embedder, images, self.eot, "search", self.scene.query, self.log.calls[self.at])
        values, margins = zip(*map(self._once, drawn), strict=True)
        return reduce(torch.add, values), reduce(torch.add, margins)

    def _once(self, e: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """The loss (n,) and the margin (n,) of the embeddings of one forward pass; it also counts ``log.unknown``."""
        raise NotImplementedError

    def __getitem__(self, index: Tensor) -> "Watch":
        twin = copy.copy(self)
        twin.scene, twin.at = self.scene[index], self.at[index]
        return twin

    def unsettled(self) -> Bool[Tensor, " n"]:
        """Which images have not been wrong yet."""
        return self.log.first[self.at] == 0

    def searched(self, optimizer: str, clean: Tensor, threat: Threat, rng: Rng) -> Tensor:
        """Run an optimizer on the images (b, ...) that are not settled: its last images, and the clean images of the settled ones."""
        alive = self.unsettled()
        if not bool(alive.any()):
            return clean
        if OPTIMIZERS[optimizer].strays:
            self.within = (threat, clean)
        images = clean.clone()
        images[alive] = OPTIMIZERS[optimizer](self[alive], clean[alive], threat, rng[alive])
        return images

    def require_known(self, step: str, threat: Threat) -> None:
        """Raise if the search saw embeddings without a decision.

        Raises:
            DataError: some were NaN or infinite.
        """
        if unknown := int(self.log.unknown):
            raise DataError(
                f"model {self.embedder.name!r} gives NaN or infinite embeddings for {unknown} images that step "
                f"{step} looked at, at eps {threat.eps}: neither right nor wrong can be said of them"
            )


@dataclass(frozen=True)
class Field:
    """The arguments that every pass over the queries shares.

    Attributes:
        bounds: of the blocks of queries that shards are dealt, in the order of ``query_order``.
        keep: positions of the queries whose adversarial images are stored.
    """

    subject: Subject
    seed: int
    batch_size: int
    progress: Progress
    work: Work
    bounds: tuple[tuple[int, int], ...]
    order: np.ndarray
    keep: np.ndarray

    @staticmethod
    def of(
        subject: Subject,
        protocol: Protocol,
        seed: int,
        batch_size: int,
        progress: Progress,
        work: Work,
        keep: np.ndarray,
    ) -> "Field":
        """Blocks of a batch, but of whole groups of the protocol's."""
        order = query_order(len(subject.rows))
        size = max(1, batch_size // protocol.together) * protocol.together
        return Field(subject, seed, batch_size, progress, work, tuple(batches(len(order), size)), order, keep)

    def over(
        self, name: str, unit: str, selected: np.ndarray, search: Callable[[np.ndarray], Arrays]
    ) -> list[tuple[np.ndarray, Arrays]]:
        """``search`` of the queries that are ``selected`` (Q,) bool, in units; by unit the queries' positions and what it gave.

        A unit is a batch, filled up with those who are wanted from all over the set. A shard knows only its own queries: there
        a unit is what is wanted of a fixed block, drawn from all over the set so that blocks thin out alike. Who is
        wanted is part of a unit's name: what is kept counts for nobody else. Units of other shards are left out.
        """
        if self.work.shard or self.work.gather:
            units = [self.order[a:b][selected[self.order[a:b]]] for a, b in self.bounds]
        else:
            units = self._batches(self.order[selected[self.order]])
        left = {i: np.sort(positions) for i, positions in enumerate(units) if len(positions)}

        def compute(i: int) -> Arrays:
            def part(a: int, b: int) -> Arrays:
                return search(left[i][a:b])

            sizes = [len(batch) for batch in self._batches(left[i])]
            ends = np.cumsum([0, *sizes]).tolist()
            return joined([halved(part, a, b) for a, b in pairwise(ends)])

        named = {i: (f"{unit} of {_digest(positions)}", 0, len(positions)) for i, positions in left.items()}
        self.progress.start(name, sum(map(len, left.values())))
        results = self.work.each(name, named, compute, partial(self.progress.advance, name))
        return [(left[i], arrays) for i, arrays in results.items()]

    def _batches(self, positions: np.ndarray) -> list[np.ndarray]:
        """As few batches as there can be, of about the same size."""
        return np.array_split(positions, -(-len(positions) // self.batch_size)) if len(positions) else []


def read_out(
    embedder: Embedder, scene: Scene, threat: Threat, images: Tensor, clean: Tensor
) -> list[Float[Tensor, "n d"]]:
    """The embeddings of ``images`` in each of ``threat.eot`` passes, the ball checked.

    Raises:
        AssertionError: an image left the ball or [0, 1]; an optimizer is at fault.
        DataError: the model gives NaN or infinite embeddings for one.
    """
    inside = threat.contains(images, clean)
    if not bool(inside.all()):
        raise AssertionError(f"{int((~inside).sum())} adversarial images are outside the threat {threat}")
    embeddings = list(passes(embedder, images, threat.eot, rows=scene.query))
    for e in embeddings:
        require_finite(e, embedder.name, "perturbed images")
    return embeddings


def cost(units: Iterable[tuple[np.ndarray, Arrays]]) -> dict[str, Any]:
    """The total cost of a search's units: ``gradients``, ``values``, ``nonfinite`` and ``seconds``."""
    spent = {key: sum(int(arrays[key].sum()) for _, arrays in units) for key in ("gradients", "values", "nonfinite")}
    return {**spent, "seconds": float(sum(arrays["seconds"].sum() for _, arrays in units))}


def _digest(positions: np.ndarray) -> str:
    """A short hash of a list of queries."""
    return hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16]

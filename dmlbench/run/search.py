"""A search: an attack, an optimizer and a threat, run on all queries in batches.

Components that agree in all three share one search. Targets are chosen for all queries before the first
step, so they do not depend on batches, on other attacks or on which queries are measured.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dmlbench.attacks import ATTACKS, choose_targets, craft, measure
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError
from dmlbench.optimizers import OPTIMIZERS, watched
from dmlbench.protocol import Component, Protocol
from dmlbench.run.loading import Loader
from dmlbench.run.parallel import World
from dmlbench.run.subject import EMBED_BLOCK, Progress, Subject, sample_positions
from dmlbench.run.units import Work
from dmlbench.scene import Scene
from dmlbench.threat import Threat

LARGE = 4096
"""Values in an image (channels x height x width) above which it counts as large: 64x64 grey."""


@dataclass(frozen=True)
class Search:
    """One search, whose adversarial images one or more components read."""

    attack: str
    optimizer: str
    threat: Threat
    components: tuple[Component, ...]

    @property
    def name(self) -> str:
        """The names of its components, for messages."""
        return " ".join(c.name for c in self.components)


def searches(protocol: Protocol, components: Sequence[Component]) -> list[Search]:
    """The searches that the components need, each of them once."""
    groups: dict[tuple[str, str, Threat], list[Component]] = {}
    for c in components:
        groups.setdefault((c.attack, c.optimizer, protocol.threat_of(c)), []).append(c)
    return [Search(*key, tuple(members)) for key, members in groups.items()]


def aimed(subject: Subject, search: Search, seed: int) -> Scene:
    """The scene of all queries with the search's targets, which are chosen in blocks of fixed size."""
    rng = subject.rng(seed, "targets", search.attack)
    blocks = [slice(a, a + EMBED_BLOCK) for a in range(0, len(subject.rows), EMBED_BLOCK)]
    chosen = torch.cat([choose_targets(ATTACKS[search.attack], subject.scene[s], rng[s]).chosen for s in blocks])
    return subject.scene.aimed(chosen)


def auto_batch(
    dataset: RetrievalDataset, device: torch.device, embedder: Embedder | None = None, world: World | None = None
) -> int:
    """Queries attacked at a time: few enough for a CPU's caches, or as many as a GPU's memory holds.

    With an ``embedder`` the GPU's memory is probed once, and all processes of ``world`` use the leader's result.
    """
    large = int(np.prod(dataset.images.shape)) > LARGE
    if device.type != "cuda":
        return 32 if large else 256
    most = 512 if large else 2048
    if embedder is not None:
        most = min(most, fitting(embedder.frozen(device), dataset, device))
    return world.agree_on(most) if world else most


def fitting(ready: Embedder, dataset: RetrievalDataset, device: torch.device) -> int:
    """The largest batch size, a power of two, that takes at most half of the GPU's free memory; estimated from two batches."""
    peaks = []
    sizes = (4, 12)
    for size in sizes:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        x = torch.zeros(size, *dataset.images.shape, device=device, requires_grad=True)
        torch.autograd.grad(ready(x).sum(), x)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    each = max(1.0, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])) + 32.0 * len(dataset.gallery)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, 1 << int(np.log2(max(1.0, free / 2 / each))))


def batches(count: int, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Bounds (first, last + 1) of consecutive batches of the positions ``first`` to ``count`` - 1."""
    for a in range(first, count, size):
        yield a, min(a + size, count)


def run_search(
    subject: Subject,
    search: Search,
    seed: int,
    batch_size: int,
    progress: Progress,
    work: Work | None = None,
    *,
    first: int = 0,
    keep: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """Attack every query, or those from position ``first`` on.

    Args:
        keep: positions of the queries whose adversarial images are returned, by default
            :func:`~dmlbench.run.subject.sample_positions`.

    Returns:
        Arrays by name, and the adversarial images at ``keep``; None if ``work`` is a shard and other shards are unfinished.
        The arrays are each read-out and "norm" (Q,), "targets" (Q, k), and by batch "seconds" and "nonfinite", the number of
        images' gradients that were NaN or infinite.
    """
    attack, optimizer = ATTACKS[search.attack], OPTIMIZERS[search.optimizer]
    scene = aimed(subject, search, seed)
    rng = subject.rng(seed, search.attack, search.optimizer)
    source = subject.surrogate or subject
    together = optimizer.whole_set
    keep = sample_positions(subject) if keep is None else keep

    work = work or Work()
    bounds = [(0, len(subject.rows))] if together else list(batches(len(subject.rows), batch_size, first))
    expected = [ends for position, ends in enumerate(bounds) if work.mine(position)]

    def unit(load: Loader, size: int, a: int, b: int) -> dict[str, np.ndarray]:
        images = load(a, b)
        known = source.scene[a:b].aimed(scene.chosen[a:b])
        search_with = partial(optimizer, block=size) if together else optimizer
        with watched() as trouble:
            adversarial = craft(source.embedder, attack, search_with, search.threat, images, known, rng[a:b])

        read = [
            dict(measure(subject.embedder, attack, search.threat, adversarial[i:j], images[i:j], scene[a + i : a + j]))
            for i, j in batches(b - a, size)
        ]
        outcomes = joined(read)
        here = keep[(keep >= a) & (keep < b)] - a
        outcomes["nonfinite"] = np.array([trouble.count])
        outcomes["images"] = adversarial[torch.from_numpy(here).to(adversarial.device)].cpu().numpy()
        return outcomes

    progress.start(search.name, len(subject.rows) - first)
    name = f"{search.name} {search.attack} {search.optimizer} {search.threat}"
    with Loader(subject.dataset.images, subject.rows, subject.device, expected) as load:
        compute = partial(shrunk, partial(unit, load), batch_size)
        if not together:
            compute = partial(halved, partial(unit, load, batch_size))
        results = work.map(name, bounds, compute, lambda count: progress.advance(search.name, count))
    units = [u for u in results if u is not None]
    if len(units) < len(bounds):
        return None
    arrays = joined(units)
    arrays["targets"] = scene.chosen[first:].cpu().numpy()
    return arrays, arrays.pop("images")


@dataclass(frozen=True)
class Attacked:
    """The results of searches on consecutive queries.

    Attributes:
        arrays: ``<component>/value``, ``<component>/norm`` (Q,) and ``<component>/targets`` (Q, k).
        sample: by component the adversarial images that are stored.
        seconds: by component.
        nonfinite: the number of images' gradients that were NaN or infinite.
    """

    arrays: dict[str, np.ndarray]
    sample: dict[str, np.ndarray]
    seconds: dict[str, float]
    nonfinite: int

    def and_then(self, more: "Attacked") -> "Attacked":
        """These results followed by those of the same searches on the next queries."""

        def both(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: np.concatenate([a[name], b[name]]) for name in a}

        return Attacked(
            both(self.arrays, more.arrays),
            both(self.sample, more.sample),
            {name: self.seconds[name] + more.seconds[name] for name in self.seconds},
            self.nonfinite + more.nonfinite,
        )


def run_searches(
    subject: Subject,
    planned: Sequence[Search],
    seed: int,
    batch_size: int,
    progress: Progress,
    work: Work,
    on_search: Callable[[Search], None] | None = None,
    *,
    first: int = 0,
    keep: np.ndarray | None = None,
) -> Attacked:
    """Every search, one after another, by :func:`run_search`; if ``work`` is a shard, only those whose batches are all finished."""
    out = Attacked({}, {}, {}, 0)
    for search in planned:
        if on_search:
            on_search(search)
        done = run_search(subject, search, seed, batch_size, progress, work, first=first, keep=keep)
        if done is None:
            continue
        outcomes, images = done
        out = replace(out, nonfinite=out.nonfinite + int(outcomes["nonfinite"].sum()))
        for c in search.components:
            out.arrays[f"{c.name}/value"] = outcomes[c.readout]
            out.arrays[f"{c.name}/norm"] = outcomes["norm"]
            out.arrays[f"{c.name}/targets"] = outcomes["targets"]
            out.sample[c.name] = images
            out.seconds[c.name] = float(outcomes["seconds"].sum()) / len(search.components)
    return out


def joined(units: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of consecutive queries as one, by name."""
    return {name: np.concatenate([u[name] for u in units]) for name in units[0]}


def shrunk(unit: Callable[[int, int, int], dict[str, np.ndarray]], size: int, a: int, b: int) -> dict[str, np.ndarray]:
    """``unit(size, a, b)``, which processes ``size`` queries at a time; ``size`` is halved until the GPU's memory suffices.

    Raises:
        DataError: the memory does not hold all images and one query's pass.
    """
    try:
        return unit(size, a, b)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    if size <= 1:
        raise DataError("the GPU's memory does not hold all queries' images; use --device cpu or --limit")
    return shrunk(unit, min(size, b - a) // 2 or 1, a, b)


def halved(unit: Callable[[int, int], dict[str, np.ndarray]], a: int, b: int) -> dict[str, np.ndarray]:
    """``unit(a, b)``, computed in halves if it does not fit in the GPU's memory.

    Raises:
        DataError: not even one query fits.
    """
    try:
        return unit(a, b)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    if b - a <= 1:
        raise DataError("the GPU's memory does not hold a single query; use --device cpu or a smaller model")
    middle = (a + b) // 2
    return joined([halved(unit, a, middle), halved(unit, middle, b)])

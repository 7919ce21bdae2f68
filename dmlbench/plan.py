"""What a run will cost, from a few measured steps: seconds and memory of each search, before hours are spent.

Nothing of the data set is embedded but one batch: the gallery is random points of the right number and
dimension, which cost the same. A search is timed with one step and with several, in turn; the difference is what a
step costs, the rest is paid once a batch, and the optimizer's own count of passes (``OPTIMIZERS``) says how many
of them there will be. A machine that does something else besides is slow at times, so each is timed for a while and
the mean counts; the fastest and the slowest look give the range. A surrogate's passes are timed on the surrogate. Where
a batch is slow (large images on a CPU) a smaller one is timed and scaled.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch

from dmlbench.attacks import ATTACKS, Attack, AttackLoss, choose_targets, measure
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.fast.compiled import ready as ready_to_attack
from dmlbench.kinds.base import Job
from dmlbench.metrics import retrieval
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol
from dmlbench.rng import Rng
from dmlbench.run.search import LARGE, auto_batch
from dmlbench.run.subject import EMBED_BLOCK, query_order, resolve_device
from dmlbench.scene import Gallery, Scene
from dmlbench.task import Task
from dmlbench.threat import Threat

PROBE = 8
"""Images timed at a time where images are large and there is no GPU."""
_SHORT, _LONG = 1, 3
LOOK = 0.5
"""Seconds that a look takes at least, where the search has so many steps."""
LOOKED = 2.0
"""Seconds of looks at one thing, of which there are :data:`LOOKS` at least."""
LOOKS = 2
SPREAD = 1.25
"""What the range reaches beyond the mean at least, up and down, as a factor: a few seconds know little of an hour."""
QUERIES = 30
"""Values that stand for a step of an optimizer that counts values."""
BACKWARD = 2
"""What a gradient costs in values, where an optimizer spends both: one more pass back to the image."""
_LLOYD = 40
"""Iterations of k-means that are counted on."""


def forget_peak(device: torch.device) -> None:
    """Start a new high-water mark of memory, where the system lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return


def peak_mib(device: torch.device, field: str = "VmHWM") -> float:
    """Memory at its highest since :func:`forget_peak`, in MiB: of the GPU, or of the whole process; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field)), float("nan"))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, waiting for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Time:
    """Seconds: what is expected, and the ends of the range it is expected in."""

    seconds: float
    low: float
    high: float

    @classmethod
    def of(cls, looks: Sequence[float]) -> "Time":
        """The mean of several looks at the same thing, and the range that they span."""
        mean = sum(looks) / len(looks)
        return cls(mean, min(*looks, mean / SPREAD), max(*looks, mean * SPREAD))

    def __mul__(self, factor: float) -> "Time":
        return Time(self.seconds * factor, self.low * factor, self.high * factor)

    def __add__(self, other: "Time") -> "Time":
        return Time(self.seconds + other.seconds, self.low + other.low, self.high + other.high)


def looked(call: Callable[[], object], device: torch.device) -> Time:
    """The time of a call, from several calls; the first one, which warms up, does not count."""
    call()
    looks: list[float] = []
    while len(looks) < LOOKS or sum(looks) < LOOK:
        looks.append(timed(call, device))
    return Time.of(looks)


class FullBatchLoss(AttackLoss):
    """An attack's loss for a batch that stays full: which images would leave it early cannot be seen on a random gallery."""

    steady = False  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Stage:
    """A batch of real images before a random gallery.

    Attributes:
        images: (b, C, H, W).
        scene: its gallery has the right number of entries, classes and dimensions.
    """

    embedder: Embedder
    images: torch.Tensor
    scene: Scene
    rng: Rng
    surrogate: "Stage | None" = None
    """the same batch before another model's gallery, on which adversarial images are made instead"""

    @property
    def device(self) -> torch.device:
        """Where everything happens."""
        return self.images.device

    def __getitem__(self, part: slice) -> "Stage":
        """Some of the images, before the same gallery."""
        other = self.surrogate[part] if self.surrogate else None
        return Stage(self.embedder, self.images[part], self.scene[part], self.rng[part], other)

    def run(self, attack: Attack, optimizer: str, threat: Threat) -> None:
        """One whole batch of a search."""
        part, source = choose_targets(attack, self.scene, self.rng), self.surrogate or self
        known = source.scene.aimed(part.chosen)
        loss = FullBatchLoss(source.embedder, OBJECTIVES[attack.objective], known, threat.eot)
        with torch.no_grad():
            images = OPTIMIZERS[optimizer](loss, self.images, threat, self.rng)
        measure(self.embedder, attack, threat, images, self.images, part)

    def look(self, what: Callable[[Embedder, torch.Tensor, Scene], object]) -> tuple[Time, float]:
        """What is done to this batch, and memory in MiB at its highest."""
        forget_peak(self.device)
        with torch.no_grad():
            time = looked(lambda: what(self.embedder, self.images, self.scene), self.device)
        return time, peak_mib(self.device)

    def noise(self, passes: int) -> tuple[Time, float]:
        """So many passes forward of this batch under noise, and memory in MiB at its highest."""
        draw = partial(self.rng.normal, *self.images.shape[1:])
        time, peak = self.look(lambda embedder, images, _: embedder(images + draw()))
        return time * float(passes), peak

    def cost(self, attack: Attack, optimizer: str, threat: Threat) -> tuple[Time, float]:
        """A whole search on this batch, and memory in MiB at its highest."""

        def shortened(n: int) -> Threat:
            return threat.but(steps=min(threat.steps, n), restarts=1, queries=min(threat.queries, n * QUERIES))

        def work(t: Threat) -> int:
            return BACKWARD * OPTIMIZERS[optimizer].gradients(t) + OPTIMIZERS[optimizer].values(t)

        def look(t: Threat) -> float:
            return timed(partial(self.run, attack, optimizer, t), self.device)

        once = shortened(_SHORT)
        look(once)
        forget_peak(self.device)
        more = shortened(max(_LONG, math.ceil(LOOK / max(look(once), 1e-6))))
        short, long = list[float](), list[float]()
        while len(long) < LOOKS or sum(long) < LOOKED:
            short.append(look(once))
            long.append(look(more))
        time_long, steps = Time.of(long), work(more) - work(once)
        each = max(sum(long) - sum(short), 0.0) / len(long) / steps if steps else time_long.seconds / max(1, work(more))
        rest = each * (work(threat) - work(more))
        return time_long * (1 + rest / time_long.seconds), peak_mib(self.device)


def stage(embedder: Embedder, dataset: RetrievalDataset, device: torch.device, batch: int) -> Stage:
    """The first queries of ``query_order``, embedded, before a random gallery."""
    ready = ready_to_attack(embedder, len(dataset.gallery), device)
    rows = dataset.query[query_order(len(dataset.query))[:batch]]
    images = dataset.images[rows].to(device)
    with torch.no_grad():
        clean = ready(images)
    n, dim = len(dataset.gallery), clean.shape[1]
    points = torch.randn(n, dim, generator=torch.Generator().manual_seed(0)).to(device)
    gallery = torch.nn.functional.normalize(points, dim=1) * clean.norm(dim=1).mean()
    position = np.zeros(len(dataset), dtype=np.int64) - 1
    position[dataset.gallery] = np.arange(n)
    scene = Scene(
        distance=ready.distance,
        gallery=Gallery.seen(gallery, torch.from_numpy(dataset.labels[dataset.gallery]).to(device), ready.precision),
        clean=clean,
        labels=torch.from_numpy(dataset.labels[rows]).to(device),
        row=torch.from_numpy(position[rows]).to(device),
        chosen=torch.zeros(len(rows), 0, dtype=torch.int64, device=device),
    )
    return Stage(ready, images, scene, Rng(0, torch.from_numpy(rows).to(device)))


def plan_of(task: Task) -> list[dict[str, object]]:
    """The searches that ``evaluate`` would run, each with its expected ``seconds`` and ``peak_mib``.

    ``gradients`` (a pass forward and back) and ``values`` (a pass forward) are what the searches spend on all queries,
    on the surrogate where there is one. ``range`` are the seconds that it takes at least and at most. The first row is the
    clean metrics, the last the total. Searches on survivors alone are ``at_most`` that: as if every query survived.
    """
    embedder, dataset, protocol, queries = task.embedder, task.dataset, task.rules, task.queries
    where = resolve_device(task.options.device)
    size = task.options.batch_size or auto_batch(dataset, where, embedder)
    large = int(np.prod(dataset.images.shape)) > LARGE and where.type == "cpu"
    usual, jobs = min(size, queries), list(_jobs(task))
    most = max([usual, *(job.batch(usual) for job in jobs)])
    probe = min(PROBE, most) if large else most
    on = stage(embedder, dataset, where, probe)
    rows = [_clean(on, dataset, protocol, queries)]
    if task.surrogate is not None:
        surrogate = stage(task.surrogate, dataset, where, probe)
        on = replace(on, surrogate=surrogate)
        rows.append(_embedded(surrogate, dataset, "surrogate's embeddings"))
    plain = None if task.undefended is None else stage(task.undefended, dataset, where, probe)
    if plain is not None:
        rows.append(_embedded(plain, dataset, "embeddings without the defence"))
    before = peak_mib(where, "VmRSS") if where.type == "cpu" else 0.0
    known: dict[tuple[Attack | None, str, Threat, bool, int], tuple[Time, float]] = {}
    for job in jobs:
        batch = job.batch(usual)
        timed_at = min(batch, len(on.images))
        same_search = (
            job.attack,
            job.optimizer,
            job.threat.but(eps=1.0, step=1.0),
            job.undefended,
            timed_at,
        )  # of any size
        if same_search not in known:
            known[same_search] = _measured(job, on[:timed_at], plain[:timed_at] if plain and job.undefended else None)
        time, peak = known[same_search]
        peak = before + max(peak - before, 0.0) * batch / timed_at if where.type == "cpu" else peak
        row = _row(job.name, job.called, job.optimizer, job.eps, queries, dataset, job.steps, job.spent)
        time *= job.weight * queries / timed_at
        rows.append({**row, **_cost(replace(time, low=0.0) if job.at_most else time, peak, job.at_most)})
    total = {"id": "total", **dict.fromkeys(("attack", "optimizer", "eps"), ""), "queries": queries}
    total |= {"gallery": len(dataset.gallery), "steps": 0}
    total |= {key: sum(int(str(row[key])) for row in rows) for key in ("gradients", "values")}
    peaks = [float(str(row["peak_mib"])) for row in rows if row["peak_mib"] is not None]
    times = reduce(Time.__add__, (Time(row["seconds"], *row["range"]) for row in rows))  # type: ignore[arg-type, misc]
    return [*rows, {**total, **_cost(times, max(peaks, default=math.nan), any(bool(row["at_most"]) for row in rows))}]


def _measured(job: Job, on: Stage, plain: Stage | None) -> tuple[Time, float]:
    """What one search of a job takes on a batch, and memory in MiB at its highest; made on ``plain``, where there is one, and
    looked at on the other."""
    if job.attack is None:
        return on.look(job.look) if job.look else on.noise(job.passes[1])
    time, peak = (plain or on).cost(job.attack, job.optimizer, job.threat)
    if plain is None:
        return time, peak
    looks, most = on.noise(round(sum(job.passes) / job.weight))
    return time + looks, max(peak, most)


def _cost(time: Time, peak: float, at_most: bool = False) -> dict[str, object]:
    return {
        "seconds": round(time.seconds, 4),
        "range": [round(time.low, 4), round(time.high, 4)],
        "at_most": at_most,
        "peak_mib": None if math.isnan(peak) else round(peak),
    }


def _clean(on: Stage, dataset: RetrievalDataset, protocol: Protocol, queries: int) -> dict[str, object]:
    """The row of the clean metrics: embedding, ranking, k-means."""
    everyone = len(np.union1d(dataset.gallery, dataset.query))
    embedder, images, gallery = on.embedder, on.images, on.scene.gallery
    clusters = len(np.unique(dataset.labels[dataset.gallery]))
    forget_peak(on.device)
    with torch.no_grad():
        embed = looked(lambda: embedder(images), on.device) * (everyone / len(images))
        rank = looked(lambda: retrieval(on.scene), on.device) * (queries / len(images))
        block = gallery.embeddings[:EMBED_BLOCK]
        centres = gallery.embeddings[torch.arange(clusters, device=on.device) % len(gallery)]
        assign = looked(lambda: (block @ centres.t()).amax(1), on.device)
    means = assign * (len(gallery) / len(block) * _LLOYD * len(protocol.clustering_seeds))
    row = _row("clean metrics", "", "", "", queries, dataset, 0)
    return {**row, **_cost(embed + rank + means, peak_mib(on.device))}


def _embedded(on: Stage, dataset: RetrievalDataset, name: str) -> dict[str, object]:
    """The row of what another model that images are made on needs before any search: its own embeddings."""
    everyone, embedder = len(np.union1d(dataset.gallery, dataset.query)), on.embedder
    forget_peak(on.device)
    with torch.no_grad():
        time = looked(lambda: embedder(on.images), on.device) * (everyone / len(on.images))
    row = _row(name, "", "", "", everyone, dataset, 0)
    return {**row, **_cost(time, peak_mib(on.device))}


def _row(
    name: str,
    attack: str,
    optimizer: str,
    eps: str,
    queries: int,
    dataset: RetrievalDataset,
    steps: int,
    passes: tuple[int, int] = (0, 0),
) -> dict[str, object]:
    return {
        "id": name,
        "attack": attack,
        "optimizer": optimizer,
        "eps": eps,
        "queries": queries,
        "gallery": len(dataset.gallery),
        "steps": steps,
        "gradients": queries * passes[0],
        "values": queries * passes[1],
    }


def _jobs(task: Task) -> Iterator[Job]:
    """Every search of the protocol."""
    for s in task.planned:
        yield Job(
            name=s.name, called=s.attack, attack=ATTACKS[s.attack], optimizer=s.optimizer, threat=s.threat,
            passes=OPTIMIZERS[s.optimizer].passes(s.threat), steps=s.threat.steps, eps=str(s.threat.eps),
        )  # fmt: skip
    if task.chosen.runner and task.kind.run:
        yield from task.kind.jobs(task.rules, task.dataset, task.queries)

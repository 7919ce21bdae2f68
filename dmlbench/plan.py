"""What a run will cost, from a few measured steps: seconds and memory of each search, before hours are spent.

Nothing of the data set is embedded but one batch: the gallery is random points of the right number and
dimension, which cost the same. A search is timed with one step and with three; the difference is what a
step costs, the rest is paid once a batch, and the optimizer's own count of passes (``OPTIMIZERS``) says how many
of them there will be. A surrogate's passes are timed on the surrogate. Where a batch is slow (large images on a CPU) a smaller one is
timed and scaled.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dmlbench.attacks import ATTACKS, Attack, aim, craft, measure
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.fast.compiled import ready as ready_to_attack
from dmlbench.kinds.base import Job
from dmlbench.metrics import retrieval
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

    def run(self, attack: Attack, optimizer: str, threat: Threat) -> None:
        """One whole batch of a search."""
        part, source = aim(attack, self.scene, self.rng), self.surrogate or self
        known = source.scene.aimed(part.chosen)
        found = craft(source.embedder, attack, OPTIMIZERS[optimizer], threat, self.images, known, self.rng)
        measure(self.embedder, attack, threat, found, self.images, part)

    def cost(self, attack: Attack, optimizer: str, threat: Threat) -> tuple[float, float]:
        """Seconds of a whole search on this batch, and memory in MiB at its highest."""

        def shortened(n: int) -> Threat:
            return threat.but(steps=min(threat.steps, n), restarts=1, queries=min(threat.queries, n * QUERIES))

        def work(t: Threat) -> int:
            return BACKWARD * OPTIMIZERS[optimizer].gradients(t) + OPTIMIZERS[optimizer].values(t)

        once, thrice = shortened(_SHORT), shortened(_LONG)
        self.run(attack, optimizer, once)
        forget_peak(self.device)
        short, long = (
            min(timed(partial(self.run, attack, optimizer, t), self.device) for _ in range(2)) for t in (once, thrice)
        )
        more = work(thrice) - work(once)
        each = max(long - short, 0.0) / more if more else short / max(1, work(once))
        return max(short - each * work(once), 0.0) + each * work(threat), peak_mib(self.device)


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
    on the surrogate where there is one. The first row is the clean metrics, the last the total. Searches on
    survivors alone are taken at their most, as if every query survived.
    """
    embedder, dataset, protocol, queries = task.embedder, task.dataset, task.rules, task.queries
    where = resolve_device(task.options.device)
    size = task.options.batch_size or auto_batch(dataset, where, embedder)
    large = int(np.prod(dataset.images.shape)) > LARGE and where.type == "cpu"
    probe = min(PROBE if large else size, size, queries)
    on = stage(embedder, dataset, where, probe)
    rows = [_clean(on, dataset, protocol, queries)]
    if task.surrogate is not None:
        on = replace(on, surrogate=stage(task.surrogate, dataset, where, probe))
        rows.append(_embedded(on, dataset))
    before = peak_mib(where, "VmRSS") if where.type == "cpu" else 0.0
    for job in _jobs(task):
        seconds, peak = on.cost(job.attack, job.optimizer, job.threat)
        peak = before + (peak - before) * min(size, queries) / probe if where.type == "cpu" else peak
        row = _row(job.name, job.called, job.optimizer, job.eps, queries, dataset, job.steps, job.passes)
        rows.append({**row, **_cost(job.weight * seconds * queries / probe, peak)})
    total = {"id": "total", **dict.fromkeys(("attack", "optimizer", "eps"), ""), "queries": queries}
    total |= {"gallery": len(dataset.gallery), "steps": 0}
    total |= {key: sum(int(str(row[key])) for row in rows) for key in ("gradients", "values")}
    peaks = [float(str(row["peak_mib"])) for row in rows if row["peak_mib"] is not None]
    return [*rows, {**total, **_cost(sum(float(str(r["seconds"])) for r in rows), max(peaks, default=math.nan))}]


def _cost(seconds: float, peak: float) -> dict[str, object]:
    return {"seconds": round(seconds, 1), "peak_mib": None if math.isnan(peak) else round(peak)}


def _clean(on: Stage, dataset: RetrievalDataset, protocol: Protocol, queries: int) -> dict[str, object]:
    """The row of the clean metrics: embedding, ranking, k-means."""
    everyone = len(np.union1d(dataset.gallery, dataset.query))
    embedder, images, gallery = on.embedder, on.images, on.scene.gallery
    clusters = len(np.unique(dataset.labels[dataset.gallery]))
    forget_peak(on.device)
    with torch.no_grad():
        embed = timed(lambda: embedder(images), on.device) / len(images)
        rank = timed(lambda: retrieval(on.scene), on.device) / len(images)
        block = gallery.embeddings[:EMBED_BLOCK]
        centres = gallery.embeddings[torch.arange(clusters, device=on.device) % len(gallery)]
        assign = timed(lambda: (block @ centres.t()).amax(1), on.device) / len(block)
    means = assign * len(gallery) * _LLOYD * len(protocol.clustering_seeds)
    row = _row("clean metrics", "", "", "", queries, dataset, 0)
    return {**row, **_cost(embed * everyone + rank * queries + means, peak_mib(on.device))}


def _embedded(on: Stage, dataset: RetrievalDataset) -> dict[str, object]:
    """The row of what a surrogate needs before any search: its own embeddings."""
    assert on.surrogate is not None
    everyone, embedder = len(np.union1d(dataset.gallery, dataset.query)), on.surrogate.embedder
    forget_peak(on.device)
    with torch.no_grad():
        seconds = timed(lambda: embedder(on.images), on.device) / len(on.images) * everyone
    row = _row("surrogate's embeddings", "", "", "", everyone, dataset, 0)
    return {**row, **_cost(seconds, peak_mib(on.device))}


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

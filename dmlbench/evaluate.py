"""evaluate(model, data set, protocol) to an Evaluation: batches, devices and seeds; no mathematics.

The gallery and the queries are embedded once, in blocks whose size does not depend on the batch size,
and every target is chosen from them before the first step, so targets are exactly the same at any
batch size, for any subset of queries and any order of attacks. Components that share an attack, an
optimizer and a threat share one search.
"""

import datetime
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from dmlbench import clustering as clustering_attacks
from dmlbench import strict
from dmlbench.attacks import ATTACKS, aim, craft, measure
from dmlbench.audit import examine
from dmlbench.checks import doubts_about
from dmlbench.closeup import closeup
from dmlbench.datasets import DATASETS, RetrievalDataset, load_dataset
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, ShardDone, UsageError
from dmlbench.intervals import cluster_bootstrap
from dmlbench.metrics import RECALL_AT, agreement, assignments, mean, retrieval
from dmlbench.models import load_model
from dmlbench.optimizers import OPTIMIZERS, WHOLE_SET
from dmlbench.protocol import Component, Protocol, load_protocol
from dmlbench.results import DatasetInfo, Environment, Evaluation, Measurement, ModelInfo, ProtocolInfo, finite
from dmlbench.rng import Rng, seed_of
from dmlbench.scene import Gallery, Scene
from dmlbench.threat import Threat
from dmlbench.units import Work
from dmlbench.version import __version__

EMBED_BLOCK = 256
"""Images embedded at a time, whatever the batch size: it fixes the rounding of the clean embeddings."""
AGREEMENT = ("nmi", "ami")
"""Clean metrics of the whole gallery."""
BENIGN = (*(f"recall_at_{k}" for k in RECALL_AT), "map", "map_at_r", *AGREEMENT)
"""Clean metrics in the order that results list them."""
SAMPLE = 256
"""How many queries' adversarial images a run keeps, at most ..."""
SAMPLE_BYTES = 4 << 20
"""... and how many bytes of them an attack."""


@runtime_checkable
class Progress(Interface):
    """Who wants to know how far a run is."""

    def start(self, task: str, total: int) -> None:
        """``task`` begins and has ``total`` images to do."""
        ...

    def advance(self, task: str, count: int) -> None:
        """``count`` more images of ``task`` are done."""
        ...


class Silent:
    """Nobody wants to know."""

    def start(self, task: str, total: int) -> None:
        """Ignore."""

    def advance(self, task: str, count: int) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Search:
    """One search that one or more components read: an attack, an optimizer, a threat."""

    attack: str
    optimizer: str
    threat: Threat
    components: tuple[Component, ...]

    @property
    def name(self) -> str:
        """The components it serves, as a person reads them."""
        return " ".join(c.name for c in self.components)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the images it is measured on, embedded once.

    Attributes:
        embedder: frozen, on its device.
        rows: (Q,) data set rows of the queries measured.
        scene: all of them, aimed at nobody.
    """

    embedder: Embedder
    dataset: RetrievalDataset
    rows: np.ndarray
    scene: Scene
    surrogate: "Subject | None" = None
    """another model on the same queries, on which adversarial images are made instead"""

    @property
    def device(self) -> torch.device:
        """Where everything happens."""
        return self.embedder.device

    def rng(self, *parts: object) -> Rng:
        """Streams for every query, by data set row."""
        return Rng(seed_of(*parts), torch.from_numpy(self.rows).to(self.device))

    def images(self, a: int, b: int) -> Tensor:
        """The clean images of queries a to b."""
        return self.dataset.images[self.rows[a:b]].to(self.device)


def resolve_device(device: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:n``, checked."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is not auto, cpu, cuda or cuda:n") from None
    if wanted.type == "cuda" and (not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not auto, cpu, cuda or cuda:n")
    return wanted


def query_order(count: int) -> np.ndarray:
    """(count,) a fixed shuffle of the queries: ``--limit N`` takes its first N, so that classes are mixed."""
    return np.random.default_rng(20220601).permutation(count)


def embed(embedder: Embedder, dataset: RetrievalDataset, rows: np.ndarray, progress: Progress | None = None) -> Tensor:
    """(len(rows), D) clean embeddings, in blocks of :data:`EMBED_BLOCK`.

    Raises:
        DataError: an embedding is NaN or infinite.
    """
    progress = progress or Silent()
    progress.start("embed", len(rows))
    parts = []
    with torch.no_grad():
        for a in range(0, len(rows), EMBED_BLOCK):
            block = rows[a : a + EMBED_BLOCK]
            parts.append(embedder(dataset.images[block].to(embedder.device)))
            progress.advance("embed", len(block))
    embeddings = torch.cat(parts)
    broken = ~torch.isfinite(embeddings).all(1)
    if bool(broken.any()):
        raise DataError(
            f"model {embedder.name!r} gives NaN or infinite embeddings for {int(broken.sum())} of {len(rows)} images"
        )
    return embeddings


def prepare(
    embedder: Embedder,
    dataset: RetrievalDataset,
    *,
    limit: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    work: Work | None = None,
) -> Subject:
    """Freeze the model, embed gallery and queries, and choose which queries are measured.

    Raises:
        UsageError: the model takes images of another shape, or ``limit`` is not positive.
    """
    if tuple(dataset.images.shape) != tuple(embedder.input_shape):
        raise UsageError(
            f"model {embedder.name!r} takes images of shape {embedder.input_shape}, "
            f"data set {dataset.name!r} has {dataset.images.shape} (channels, height, width)"
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be 1 or more")
    ready = embedder.frozen(resolve_device(device))
    wanted = np.arange(len(dataset.query))
    if limit is not None and limit < len(wanted):
        wanted = np.sort(query_order(len(dataset.query))[:limit])
    everyone = np.union1d(dataset.gallery, dataset.query)
    kept = (work or Work()).once(
        f"embeddings {embedder.name} {embedder.weights_sha256}",
        len(everyone),
        lambda: {"embeddings": embed(ready, dataset, everyone, progress).cpu().numpy()},
    )
    embeddings = torch.from_numpy(kept["embeddings"]).to(ready.device)

    def at(rows: np.ndarray) -> Tensor:
        return embeddings[torch.from_numpy(np.searchsorted(everyone, rows)).to(ready.device)]

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(ready.device)

    rows = dataset.query[wanted]
    scene = Scene(
        distance=ready.distance,
        gallery=Gallery(at(dataset.gallery), column(dataset.labels[dataset.gallery])),
        clean=at(rows),
        labels=column(dataset.labels[rows]),
        row=column(dataset.own_entry[wanted]),
        chosen=column(np.zeros((len(rows), 0), dtype=np.int64)),
    )
    return Subject(ready, dataset, rows, scene)


def searches(protocol: Protocol, components: Sequence[Component]) -> list[Search]:
    """The searches that serve the components, each run once."""
    groups: dict[tuple[str, str, Threat], list[Component]] = {}
    for c in components:
        groups.setdefault((c.attack, c.optimizer, protocol.threat_of(c)), []).append(c)
    return [Search(*key, tuple(members)) for key, members in groups.items()]


def aimed(subject: Subject, search: Search, seed: int) -> Scene:
    """The whole scene with the search's targets, chosen in blocks of fixed size."""
    rng = subject.rng(seed, "targets", search.attack)
    blocks = [slice(a, a + EMBED_BLOCK) for a in range(0, len(subject.rows), EMBED_BLOCK)]
    chosen = torch.cat([aim(ATTACKS[search.attack], subject.scene[s], rng[s]).chosen for s in blocks])
    return subject.scene.aimed(chosen)


def auto_batch(dataset: RetrievalDataset, device: torch.device) -> int:
    """Queries attacked at a time: as many as keep a CPU's caches or a GPU's multiprocessors busy."""
    pixels = int(np.prod(dataset.images.shape))
    if device.type == "cuda":
        return 2048 if pixels <= 4096 else 256
    return 256 if pixels <= 4096 else 32


def benign_arrays(subject: Subject, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The clean metrics: ``benign/<name>`` (Q,) of retrieval, () of clustering, and each query's clusters."""
    scene = subject.scene
    out = {f"benign/{name}": values for name, values in retrieval(scene, RECALL_AT).items()}
    classes = scene.gallery.labels.cpu().numpy()
    clusters = assignments(scene.gallery.embeddings, len(np.unique(classes)), seeds)
    out |= {f"benign/{name}": np.array([value]) for name, value in agreement(classes, clusters).items()}
    own = scene.row.cpu().numpy()
    if (own >= 0).all():  # every query is a gallery entry, so it fell into a cluster
        out["benign/clusters"] = clusters[own]
    return out


def digest_of(embedder: Embedder) -> str:
    """Hash of every parameter and buffer, for a model that has no weights file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(embedder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive batches."""
    for a in range(0, count, size):
        yield a, min(a + size, count)


def sample_positions(subject: Subject) -> np.ndarray:
    """Which queries' adversarial images are kept: the first of :func:`query_order` that are measured."""
    image = 4 * int(np.prod(subject.dataset.images.shape))
    count = min(SAMPLE, max(1, SAMPLE_BYTES // image), len(subject.rows))
    order = subject.dataset.query[query_order(len(subject.dataset.query))]
    order = order[np.isin(order, subject.rows)][:count]
    return np.flatnonzero(np.isin(subject.rows, order))


def run_search(
    subject: Subject, search: Search, seed: int, batch_size: int, progress: Progress, work: Work | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """Attack every query: per-query arrays by name, and the adversarial images of the sample.

    "seconds" (units,) is what each batch took. None where ``work`` is a shard and others are not done.
    """
    attack, optimizer = ATTACKS[search.attack], OPTIMIZERS[search.optimizer]
    scene = aimed(subject, search, seed)
    rng = subject.rng(seed, search.attack, search.optimizer)
    source = subject.surrogate or subject
    together = search.optimizer in WHOLE_SET
    keep = sample_positions(subject)

    def unit(a: int, b: int) -> dict[str, np.ndarray]:
        images, part = subject.images(a, b), scene[a:b]
        known = source.scene[a:b].aimed(part.chosen)
        adversarial = craft(source.embedder, attack, optimizer, search.threat, images, known, rng[a:b])
        found = dict(measure(subject.embedder, attack, search.threat, adversarial, images, part))
        here = keep[(keep >= a) & (keep < b)] - a
        found["images"] = adversarial[torch.from_numpy(here).to(adversarial.device)].cpu().numpy()
        return found

    progress.start(search.name, len(subject.rows))
    bounds = [(0, len(subject.rows))] if together else list(batches(len(subject.rows), batch_size))
    name = f"{search.name} {search.attack} {search.optimizer} {search.threat}"
    found = (work or Work()).map(
        name, bounds, unit if together else partial(halved, unit), lambda count: progress.advance(search.name, count)
    )
    units = [u for u in found if u is not None]
    if len(units) < len(bounds):
        return None
    arrays = joined(units)
    arrays["targets"] = scene.chosen.cpu().numpy()
    return arrays, arrays.pop("images")


def joined(units: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of consecutive queries as one, by name."""
    return {name: np.concatenate([u[name] for u in units]) for name in units[0]}


def halved(unit: Callable[[int, int], dict[str, np.ndarray]], a: int, b: int) -> dict[str, np.ndarray]:
    """``unit(a, b)``, in halves where the GPU's memory does not hold it whole.

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


def evaluate(
    model: Embedder | torch.nn.Module | str,
    dataset: RetrievalDataset | str | None = None,
    protocol: Protocol | str | None = None,
    *,
    attacks: Sequence[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
    eot: int | None = None,
    surrogate: Embedder | torch.nn.Module | str | None = None,
    on_search: Callable[[Search], None] | None = None,
    work: Work | None = None,
    resume: bool = False,
) -> Evaluation:
    """Measure how robust a model is.

    Args:
        model: an :class:`Embedder`, a registry id, or a module with an ``input_shape`` attribute.
        dataset: a data set or its id; by default the one whose training split the model learnt from.
        protocol: a protocol, its name or its file; by default the data set's.
        attacks: only these: components of the protocol, which leaves ERS empty, and any attack@optimizer,
            which is an extra part that never counts in ERS; "all" stands for all that the protocol measures.
        limit: only this many queries, which marks the result partial.
        device: "auto", "cpu", "cuda" or "cuda:n".
        batch_size: queries attacked at a time; by default chosen for the device.
        seed: another seed than the protocol's, which marks the result partial.
        progress: who is told how far the run is.
        argv: the command, for the record.
        eot: forward passes averaged for each gradient and read-out, for models that are random; marks the
            result partial.
        surrogate: another model to make the adversarial images on (transfer); marks the result partial.
        on_search: told of each search before it begins.
        work: who does which unit of the work, and where finished ones are kept; see docs/running.md.
        resume: go on with the unfinished run that ``work`` keeps.

    Returns:
        The :class:`Evaluation`, its per-query arrays attached.

    Raises:
        UsageError: an unknown name or a combination that does not fit (exit code 2).
        DataError: files are missing or the model's output is broken (4).
        NotComparable: what ``work`` keeps is of another configuration (3).
        ShardDone: ``work`` is a shard, which is finished; the rest is for the others.
    """
    began = time.monotonic()
    progress, work = progress or Silent(), work or Work()
    embedder = load_model(model) if not isinstance(model, torch.nn.Module) else as_embedder(model)
    dataset = (
        load_dataset(dataset or default_dataset(embedder), preprocess=embedder.preprocess)
        if not isinstance(dataset, RetrievalDataset)
        else dataset
    )
    rules = protocol if isinstance(protocol, Protocol) else load_protocol(protocol or default_protocol(dataset))
    chosen = rules.chosen(attacks, max(dataset.images.shape[1:]))
    official = rules
    if eot is not None:
        rules = rules.model_copy(update={"threat": {**rules.threat, "eot": eot}})
    base = rules.seed if seed is None else seed
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} must be 1 or more")

    if work.shard and rules.kind in RUNNERS and chosen.runner:
        raise UsageError(f"protocol {rules.name!r} (kind {rules.kind!r}) cannot be run in shards: use torchrun")

    other: Embedder | None = None
    if surrogate is not None:
        if rules.kind in RUNNERS and chosen.runner:
            raise UsageError(f"protocol {rules.name!r} has no transfer: name attacks, such as WM@apgd, with --attacks")
        other = load_model(surrogate) if not isinstance(surrogate, torch.nn.Module) else as_embedder(surrogate)
    stored = work.units.configuration() if work.units else None
    size = batch_size or (stored or {}).get("batch_size") or auto_batch(dataset, resolve_device(device))
    configuration = {
        "dmlbench": __version__,
        "torch": torch.__version__,
        "model": embedder.name,
        "weights": embedder.weights_sha256 or digest_of(embedder),
        "arch": embedder.arch,
        "normalisation": [embedder.mean.flatten().tolist(), embedder.std.flatten().tolist()],
        "space": embedder.distance.space,
        "gradient_precision": embedder.precision,
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_sha256": dataset.sha256,
        "protocol": rules.name,
        "protocol_sha256": official.sha256,
        "surrogate": other and other.name,
        "surrogate_weights": other and (other.weights_sha256 or digest_of(other)),
        "attacks": list(attacks) if attacks else None,
        "limit": limit,
        "seed": base,
        "eot": eot,
        "batch_size": size,
        "device": resolve_device(device).type,
    }
    work.agree(configuration, resume)
    subject = prepare(embedder, dataset, limit=limit, device=device, progress=progress, work=work)
    if other is not None:
        known = prepare(other, dataset, limit=limit, device=device, progress=progress, work=work)
        subject = replace(subject, surrogate=known)
    scene = subject.scene
    planned = searches(rules, [*chosen.own, *chosen.extra])
    for search in planned:  # what cannot be aimed fails now, not after an hour
        aim(ATTACKS[search.attack], scene[:1], subject.rng(base)[:1])

    arrays: dict[str, np.ndarray] = {"query": subject.rows, "label": dataset.labels[subject.rows]}
    sample: dict[str, np.ndarray] = {"rows": subject.rows[sample_positions(subject)]}
    if work.world.leads and (work.shard is None or work.shard.index == 1):
        arrays |= work.once("benign", len(subject.rows), partial(benign_arrays, subject, rules.clustering_seeds))
    benign = {name: mean(arrays[f"benign/{name}"]) for name in BENIGN if f"benign/{name}" in arrays}
    for name in AGREEMENT:
        arrays.pop(f"benign/{name}", None)

    seconds: dict[str, float] = {}
    for search in planned:
        if on_search:
            on_search(search)
        done = run_search(subject, search, base, size, progress, work)
        if done is None:
            continue
        found, kept = done
        for c in search.components:
            arrays[f"{c.name}/value"] = found[c.readout]
            arrays[f"{c.name}/norm"] = found["norm"]
            arrays[f"{c.name}/targets"] = found["targets"]
            sample[c.name] = kept
            seconds[c.name] = float(found["seconds"].sum()) / len(search.components)
    if work.shard:
        raise ShardDone(f"shard {work.shard.index}/{work.shard.count} is finished")

    parts, outcome = list(chosen.own), None
    if rules.kind in RUNNERS and chosen.runner:
        outcome = RUNNERS[rules.kind](subject, rules, base, size, progress, sample_positions(subject))
        parts, seconds = outcome.components, {**seconds, **outcome.seconds}
        arrays, sample = {**arrays, **outcome.arrays}, {**sample, **outcome.sample}
    sample |= closeup(subject, sample)
    findings = examine(subject, rules, outcome.broken_by, base, rules.audit) if outcome and rules.audit else []
    whole = chosen.runner if rules.kind in RUNNERS else len(parts) == len(rules.components)

    why = [f"--limit {limit}"] if len(subject.rows) < len(dataset.query) else []
    why += [] if whole else [f"--attacks {','.join(attacks or ())}"]
    why += [f"--seed {seed}"] if base != rules.seed else []
    why += [f"--eot {eot}"] if rules != official else []
    why += [f"--surrogate {subject.surrogate.embedder.name}"] if subject.surrogate else []
    measurements, ers, ers_interval = scores(parts, arrays, seconds, complete=rules.kind == "ers" and whole)
    measurements += scores(chosen.extra, arrays, seconds, complete=False)[0]
    extras: dict[str, Any] = dict(outcome.extras) if outcome else {}
    if rules.kind != "clustering":  # whose recall is within the attacked set
        extras["retention"] = retention(measurements, benign)
    if findings:
        extras["audit"] = [asdict(f) for f in findings]
    if chosen.extra:
        extras["extra_parts"] = [c.name for c in chosen.extra]
    return Evaluation(
        model=model_info(embedder),
        dataset=dataset_info(subject),
        protocol=ProtocolInfo(name=rules.name, version=rules.version, sha256=official.sha256, seed=base),
        environment=environment(subject.device, argv, embedder.precision),
        partial=tuple(why),
        benign={name: value for name, value in benign.items() if np.isfinite(value)},
        measurements=measurements,
        ers=ers,
        ers_interval=ers_interval,
        extras=extras,
        warnings=(*doubts_about(subject, measurements), *(f.flag() for f in findings if f.verdict in ("warn", "fail"))),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
    ).with_arrays(arrays, sample)


RUNNERS = {"strict": strict.run, "clustering": clustering_attacks.run}
"""What runs the protocols of other kinds than components."""


def scores(
    components: Sequence[Component], arrays: dict[str, np.ndarray], seconds: dict[str, float], *, complete: bool
) -> tuple[tuple[Measurement, ...], float | None, tuple[float, float] | None]:
    """Measurements with intervals, and ERS (None unless ``complete`` and every part has a value)."""
    if not components:
        return (), None, None
    table = np.stack(
        [c.rescale(arrays[f"{c.name}/value"].astype(np.float64)) for c in components], axis=1
    )  # (Q, parts)
    intervals = cluster_bootstrap(table, arrays["label"])
    measured = []
    for i, c in enumerate(components):
        raw = arrays[f"{c.name}/value"]
        value = finite(mean(raw))
        measured.append(
            Measurement(
                component=c.name,
                attack=c.attack,
                optimizer=c.optimizer,
                readout=c.readout,
                better=c.better,
                value=value,
                score=None if value is None else c.rescale(value),
                interval=intervals.columns[i],
                n=int((~np.isnan(raw)).sum()),
                seconds=seconds.get(c.name, 0.0),
            )
        )
    parts = [m.score for m in measured]
    if not complete or any(p is None for p in parts):
        return tuple(measured), None, None
    return tuple(measured), float(np.mean([p for p in parts if p is not None])), intervals.mean


def retention(measurements: Sequence[Measurement], benign: dict[str, float]) -> dict[str, float]:
    """By part that reads R@1: how much of the clean R@1 is left, percent.

    ERS compares absolute values of models whose clean recall differs (criticised in arXiv 2312.07364);
    this is the same outcome relative to each model's own. Higher is more robust.
    """
    clean = benign.get("recall_at_1", 0.0)
    if not clean > 0:
        return {}
    return {
        m.component: 100.0 * m.value / clean for m in measurements if m.readout == "recall_at_1" and m.value is not None
    }


def as_embedder(module: torch.nn.Module) -> Embedder:
    """The module itself if it is an Embedder, else wrapped by its own ``input_shape``."""
    if isinstance(module, Embedder):
        return module
    shape = getattr(module, "input_shape", None)
    if shape is None:
        raise UsageError("a plain nn.Module needs an input_shape: dmlbench.load_model(module, input_shape=(C, H, W))")
    return load_model(module, input_shape=tuple(shape))


def default_dataset(embedder: Embedder) -> str:
    """The data set that the model's checkpoint names."""
    if embedder.card is None:
        raise UsageError(f"model {embedder.name!r} is not registered with a data set: name one with --dataset")
    return embedder.card.dataset.name


def default_protocol(dataset: RetrievalDataset) -> str:
    """The data set's own protocol, else by the size of its images."""
    if dataset.name in DATASETS:
        return DATASETS[dataset.name].protocol
    return "ers-28" if dataset.images.shape[1] <= 64 else "ers-224"


def model_info(embedder: Embedder) -> ModelInfo:
    """What the record says of the model."""
    card = embedder.card
    with torch.no_grad():
        shape = (2, *embedder.input_shape)
        dim = embedder.eval()(torch.zeros(shape, device=embedder.device)).shape[1]
    if card is None:
        return ModelInfo(
            id=embedder.name,
            weights_sha256=embedder.weights_sha256,
            arch=embedder.arch,
            space=embedder.distance.space,
            embed_dim=dim,
        )
    return ModelInfo(
        id=embedder.name,
        weights_sha256=embedder.weights_sha256,
        arch=card.arch.builder,
        loss=card.train.loss,
        defense=card.defense.name,
        space=embedder.distance.space,
        embed_dim=dim,
    )


def dataset_info(subject: Subject) -> DatasetInfo:
    """What the record says of the images."""
    d = subject.dataset
    return DatasetInfo(
        name=d.name,
        split=d.split,
        sha256=d.sha256,
        n_queries=len(subject.rows),
        n_queries_full=len(d.query),
        n_gallery=len(d.gallery),
        n_classes=len(np.unique(d.labels[d.gallery])),
        n_without_positive=int((~subject.scene.has_positive).sum()),
    )


def environment(device: torch.device, argv: Sequence[str], precision: str = "float32") -> Environment:
    """Software and machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Environment(
        dmlbench=__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        python=sys.version.split()[0],
        device=device.type,
        device_name=name,
        gradient_precision=precision,
        argv=tuple(word for word in argv if word != "--resume"),
    )

"""evaluate(model, data set, protocol) to an Evaluation: what is run, in which order, and the record of it.

The file to read first is ``run/subject.py`` (what is measured), then ``run/search.py`` (how one attack is run).
"""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dmlbench.attacks import ATTACKS, aim, own_attacks
from dmlbench.datasets import DATASETS, RetrievalDataset, load_dataset
from dmlbench.doubts.audit import examine, glance
from dmlbench.doubts.checks import doubts_about
from dmlbench.embedding import Embedder, digest_of
from dmlbench.errors import ShardDone, UsageError
from dmlbench.fast.compiled import Steps
from dmlbench.fast.exact import true_float32
from dmlbench.fast.rounded import settled
from dmlbench.intervals import VERSION, Intervals
from dmlbench.kinds.table import KINDS
from dmlbench.metrics import CLEAN, RECALL_AT, agreement, assignments, mean, retrieval
from dmlbench.models import load_model
from dmlbench.models.defended import averaged
from dmlbench.own_code import RUN, require_named
from dmlbench.protocol import Chosen, Component, Protocol, ers_of, load_protocol, score_intervals
from dmlbench.results import Evaluation, Measurement, ProtocolInfo, finite
from dmlbench.rng import Rng
from dmlbench.run.closeup import closeup
from dmlbench.run.fingerprint import fingerprint
from dmlbench.run.looks import even_order, require_stoppable, sure_intervals, until_sure
from dmlbench.run.record import dataset_info, environment, model_info
from dmlbench.run.search import Attacked, Search, auto_batch, run_searches, searches
from dmlbench.run.subject import (
    Progress,
    Silent,
    Subject,
    prepare,
    require_shape,
    resolve_device,
    sample_positions,
    unembedded,
)
from dmlbench.run.units import Arrays, Work
from dmlbench.version import __version__

AGREEMENT = ("nmi", "ami")
"""Clean metrics of the whole gallery."""


def benign_arrays(subject: Subject, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The clean metrics: ``benign/<name>`` (Q,) of retrieval, () of clustering, and each query's clusters."""
    scene = subject.scene
    out = {f"benign/{name}": values for name, values in retrieval(scene, RECALL_AT).items()}
    classed = scene.gallery.classed
    classes = scene.gallery.labels[classed].cpu().numpy()
    clusters = assignments(scene.gallery.embeddings[classed], len(np.unique(classes)), seeds)
    out |= {f"benign/{name}": np.array([value]) for name, value in agreement(classes, clusters).items()}
    own = scene.row.cpu().numpy()
    if (own >= 0).all():  # every query is a gallery entry, so it fell into a cluster
        out["benign/clusters"] = clusters[(classed.cumsum(0) - 1).cpu().numpy()[own]]
    return out


@true_float32()
def evaluate(
    model: Embedder | torch.nn.Module | str,
    dataset: RetrievalDataset | str | None = None,
    protocol: Protocol | str | None = None,
    *,
    attacks: Sequence[str] | None = None,
    limit: int | None = None,
    until: float | None = None,
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
    cache: bool = False,
    shared: dict[str, Arrays] | None = None,
) -> Evaluation:
    """Measure how robust a model is.

    Args:
        model: an :class:`Embedder`, a registry id, or a module with an ``input_shape`` attribute.
        dataset: a data set or its id; by default the one whose training split the model learnt from.
        protocol: a protocol, its name or its file; by default the data set's.
        attacks: only these: components of the protocol, which leaves ERS empty, and any ``attack@optimizer``,
            which is an extra part that never counts in ERS; "all" stands for all that the protocol measures,
            and ``FILE.py:NAME`` for one's own.
        limit: only this many queries, which marks the result partial.
        until: only as many queries as bring the 95 % interval of ERS within this many points of it, in the order of
            :func:`~dmlbench.run.looks.even_order`, looked at more than once and made up for (:mod:`dmlbench.run.looks`);
            marks the result partial.
        device: "auto", "cpu", "cuda" or "cuda:n".
        batch_size: queries attacked at a time; by default chosen for the device.
        seed: another seed than the protocol's, which marks the result partial.
        progress: who is told how far the run is.
        argv: the command, for the record.
        eot: forward passes averaged for each gradient and read-out, for models that are random; marks the
            result partial, unless it is the protocol's own number.
        surrogate: another model to make the adversarial images on (transfer); marks the result partial.
        on_search: told of each search before it begins.
        work: who does which unit of the work, and where finished ones are kept; see docs/running.md.
        resume: go on with the unfinished run that ``work`` keeps.
        cache: keep the clean embeddings under the cache folder, for later runs of this model on this data set.
        shared: a dict that is handed to several calls with the same model, data set, surrogate and device, so that
            everything clean is embedded once for all of them.

    Returns:
        The :class:`Evaluation`, its per-query arrays attached.

    Raises:
        UsageError: an unknown name or a combination that does not fit (exit code 2).
        DataError: files are missing or the model's output is broken (4).
        NotComparable: what ``work`` keeps is of another configuration (3).
        ShardDone: ``work`` is a shard, which is finished; the rest is for the others.
    """
    clock = Clock()
    progress, work = progress or Silent(), work or Work()
    embedder = load_model(model) if not isinstance(model, torch.nn.Module) else as_embedder(model)
    dataset = (
        load_dataset(dataset or default_dataset(embedder), preprocess=embedder.preprocess)
        if not isinstance(dataset, RetrievalDataset)
        else dataset
    )
    rules = protocol if isinstance(protocol, Protocol) else load_protocol(protocol or default_protocol(dataset))
    kind = KINDS[rules.kind]
    attacks = own_attacks(attacks) if attacks else attacks
    chosen = rules.chosen(attacks, dataset.images.shape)
    official = rules
    if embedder.eot is not None and rules.kind == "clustering":
        raise UsageError(
            f"model {embedder.name!r} is random: protocol {rules.name!r} has no attack that averages its draws"
        )
    eot = averaged(embedder, eot)
    eot = None if eot == rules.threat.get("eot", 1) else eot  # what it would be anyway
    if eot is not None:
        rules = rules.model_copy(update={"threat": {**rules.threat, "eot": eot}})
    base = rules.seed if seed is None else seed
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} must be 1 or more")

    other: Embedder | None = None  # whose gradients are made as is said of the model
    if surrogate is not None:
        if kind.run and chosen.runner:
            raise UsageError(f"protocol {rules.name!r} has no transfer: name attacks, such as WM@apgd, with --attacks")
        other = load_model(surrogate) if not isinstance(surrogate, torch.nn.Module) else as_embedder(surrogate)
        if other.eot is not None and eot is None:
            raise UsageError(
                f"surrogate {other.name!r} is random: say how many passes its gradients average, --eot {other.eot}"
            )
    if until is not None:
        others = {"--limit": limit, "--attacks": attacks, "--shard": work.shard}
        require_stoppable(rules, kind.mean, dataset.labels[dataset.query], until, others)
    stored = work.units.configuration() if work.units else None
    size = (
        batch_size
        or (stored or {}).get("batch_size")
        or auto_batch(dataset, resolve_device(device), embedder, work.world)
    )
    configuration = {
        **essentials(embedder, dataset, official, seed, device),
        "weights": embedder.weights_sha256 or digest_of(embedder),
        "surrogate": other and other.name,
        "surrogate_weights": other and (other.weights_sha256 or digest_of(other)),
        "attacks": list(attacks) if attacks else None,
        "limit": limit,
        "eot": eot,
        "batch_size": size,
        **({} if until is None else {"until": until}),
    }
    known = fingerprint(embedder) if work.units or embedder.card is None else {}
    if work.units:
        theirs = fingerprint(other) if other else {}
        configuration |= {**known, **{f"surrogate_{key}": value for key, value in theirs.items()}}
    work.agree(configuration, resume)
    earlier = work.units.spent() if work.units else 0.0
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be 1 or more")
    measured = rules.measured(len(dataset.query), limit)
    require_shape(embedder, dataset)
    planned, nowhere = searches(rules, [*chosen.own, *chosen.extra]), unembedded(dataset)
    for search in planned:  # what cannot be aimed fails now, before anything is embedded
        aim(ATTACKS[search.attack], nowhere, Rng(base, torch.from_numpy(dataset.query[:1])))
    clock.done("loading")
    order = None if until is None else even_order(dataset.labels[dataset.query])
    prepared = partial(
        prepare, dataset=dataset, limit=measured, order=order, device=device, progress=progress, work=work, cache=cache,
        shared=shared,
    )  # fmt: skip
    subject = prepared(embedder)
    if other is not None:
        source = prepared(other, gradients=embedder, part="surrogate")
        subject = replace(subject, surrogate=source)

    clock.done("embedding")
    attacked = partial(
        run_searches, planned=planned, seed=base, batch_size=size, progress=progress, work=work, on_search=on_search
    )
    found: Attacked | None = None
    looked: dict[str, Any] = {}
    if until is not None:
        subject, found, looked = until_sure(subject, chosen.own, until, attacked)
        clock.done("attacks")
    arrays: dict[str, np.ndarray] = {"query": subject.rows, "label": dataset.labels[subject.rows]}
    sample: dict[str, np.ndarray] = {"rows": subject.rows[sample_positions(subject)]}
    if work.world.leads and (work.shard is None or work.shard.index == 1):
        arrays |= work.once("benign", len(subject.rows), partial(benign_arrays, subject, rules.clustering_seeds))
    benign = {name: mean(arrays[f"benign/{name}"]) for name in CLEAN if f"benign/{name}" in arrays}
    for name in AGREEMENT:
        arrays.pop(f"benign/{name}", None)

    clock.done("clean metrics")
    found = attacked(subject) if found is None else found
    seconds, nonfinite = found.seconds, found.nonfinite
    arrays, sample = {**arrays, **found.arrays}, {**sample, **found.sample}
    parts, outcome = list(chosen.own), None
    if kind.run and chosen.runner:
        outcome = kind.run(subject, rules, base, size, progress, sample_positions(subject), work)
    if work.shard:
        told = [
            *notes_of(subject, [*chosen.own, *chosen.extra]),
            f"shard {work.shard.index}/{work.shard.count} is finished",
        ]
        raise ShardDone("; ".join(told))
    if outcome:
        parts, seconds, nonfinite = outcome.components, {**seconds, **outcome.seconds}, nonfinite + outcome.nonfinite
        arrays, sample = {**arrays, **outcome.arrays}, {**sample, **outcome.sample}
    clock.done("attacks")
    sample |= closeup(subject, sample)
    findings = (
        examine(subject, rules, outcome.broken_by, base, rules.audit)
        if outcome and rules.audit and work.world.leads
        else []
    )
    used = {search.optimizer for search in planned} | (kind.optimizers(rules) if outcome else set())
    doubts = [f.flag() for f in findings if f.verdict in ("warn", "fail")]
    if used and work.world.leads and not (outcome and rules.audit):
        doubts += glance(subject, arrays["benign/recall_at_1"], used, size)
    why = reasons(official, chosen, dataset, attacks, limit, seed, eot, other.name if other else None, until)
    whole = complete(rules, chosen)
    sure = sure_intervals(parts, arrays, looked["looks"][-1]["level"]) if looked else None
    measurements, ers, ers_interval = scores(parts, arrays, seconds, complete=kind.mean and whole, sure=sure)
    measurements += scores(chosen.extra, arrays, seconds, complete=False)[0]
    extras: dict[str, Any] = {kind.name: outcome.summary} if outcome else {}
    if looked:
        extras["until"] = looked
    if not kind.within:
        extras["retention"] = retention(measurements, benign)
    if findings:
        extras["audit"] = [asdict(f) for f in findings]
    if chosen.extra:
        extras["extra_parts"] = [c.name for c in chosen.extra]
    if own := {
        c.name: [c.worst, c.best] for c in chosen.extra if c.attack in RUN
    }:  # no table has them where it is read
        extras["own_ends"] = own
    if embedder.card is None:  # nothing else says what it was
        extras["fingerprint"] = known
    warnings = (*doubts_about(subject, measurements, nonfinite), *doubts)
    clock.done("checks")
    stages = {**({"before": earlier} if earlier else {}), **clock.seconds}
    return Evaluation(
        model=model_info(embedder),
        dataset=dataset_info(subject),
        protocol=ProtocolInfo(name=rules.name, version=rules.version, sha256=official.sha256, seed=base),
        environment=environment(
            subject.device,
            argv,
            precision=configuration["gradient_precision"],
            compiled=embedder.compiled,
            notes=notes_of(subject, [*chosen.own, *chosen.extra]),
        ),
        partial=why,
        benign={name: value for name, value in benign.items() if np.isfinite(value)},
        measurements=measurements,
        ers=ers,
        ers_interval=ers_interval,
        interval_version=VERSION,
        extras=extras,
        warnings=warnings,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=sum(stages.values()),
        stages=stages,
    ).with_arrays(arrays, sample)


class Clock:
    """Wall-clock seconds of the stages of a run, which follow one another: so they add up to the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def done(self, stage: str) -> None:
        """What was done since the last call belongs to ``stage``."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def notes_of(subject: Subject, components: Sequence[Component]) -> tuple[str, ...]:
    """How the run differed from what was asked for, where that changes no more than its speed, what did not count, and
    which of the user's own code was run."""
    models = [subject.embedder, *([subject.surrogate.embedder] if subject.surrogate else [])]
    apart = "gallery images that share a group with a query (camera, sequence or the very same picture) did not count for it"
    trouble = [m.steps.trouble for m in models if isinstance(m.steps, Steps) and m.steps.trouble]
    named = [*(part for m in models for part in (m.arch or "").split("+")), subject.dataset.name]
    named += [component.attack for component in components]
    return (
        *(RUN[name] for name in dict.fromkeys(named) if name in RUN),
        *(f"--compile: gradient steps ran uncompiled, since {why}" for why in trouble),
        *([apart] if subject.scene.groups is not None else []),
    )


def complete(rules: Protocol, chosen: Chosen) -> bool:
    """Is everything chosen that the protocol itself measures?"""
    return chosen.runner if KINDS[rules.kind].run else len(chosen.own) == len(rules.components)


def reasons(
    rules: Protocol,
    chosen: Chosen,
    dataset: RetrievalDataset,
    attacks: Sequence[str] | None,
    limit: int | None,
    seed: int | None,
    eot: int | None,
    surrogate: str | None,
    until: float | None = None,
) -> tuple[str, ...]:
    """Why a result is not a full one; empty where it is. ``surrogate`` is that model's name."""
    full = rules.measured(len(dataset.query))
    why = ["--preview"] if dataset.preview else []
    why += [f"--limit {limit}"] if limit is not None and limit < full else []
    why += [f"--until {until:g}"] if until is not None else []
    why += [] if complete(rules, chosen) else [f"--attacks {','.join(attacks or ())}"]
    why += [f"--seed {seed}"] if seed not in (None, rules.seed) else []
    why += [f"--eot {eot}"] if eot not in (None, rules.threat.get("eot", 1)) else []
    return (*why, *([f"--surrogate {surrogate}"] if surrogate else []))


def asked(
    embedder: Embedder,
    dataset: RetrievalDataset,
    rules: Protocol,
    *,
    attacks: Sequence[str] | None = None,
    limit: int | None = None,
    until: float | None = None,
    device: str = "auto",
    seed: int | None = None,
    eot: int | None = None,
    surrogate: str | None = None,
) -> dict[str, Any]:
    """What :func:`~dmlbench.run.record.told` says of the finished result of :func:`evaluate` with these arguments."""
    chosen = rules.chosen(attacks, dataset.images.shape)
    other = load_model(surrogate) if surrogate is not None else None
    return {
        **essentials(embedder, dataset, rules, seed, device),
        "partial": list(
            reasons(rules, chosen, dataset, attacks, limit, seed, eot, other.name if other else None, until)
        ),
        "extra_parts": [c.name for c in chosen.extra],
        **(fingerprint(embedder) if embedder.card is None else {}),
    }


def essentials(
    embedder: Embedder, dataset: RetrievalDataset, rules: Protocol, seed: int | None, device: str
) -> dict[str, Any]:
    """What a run and its finished result both say of what is measured."""
    return {
        "dmlbench": __version__,
        "torch": torch.__version__,
        "model": embedder.name,
        "weights": embedder.weights_sha256,
        "space": embedder.distance.space,
        "gradient_precision": settled(embedder.precision, len(dataset.gallery), resolve_device(device)),
        "compiled": embedder.compiled,
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_sha256": dataset.sha256,
        "protocol": rules.name,
        "protocol_sha256": rules.sha256,
        "seed": rules.seed if seed is None else seed,
        "device": resolve_device(device).type,
    }


def scores(
    components: Sequence[Component],
    arrays: dict[str, np.ndarray],
    seconds: dict[str, float],
    *,
    complete: bool,
    sure: Intervals | None = None,
) -> tuple[tuple[Measurement, ...], float | None, tuple[float, float] | None]:
    """Measurements with intervals, and ERS (None unless ``complete`` and every part has a value), see :func:`counted`.

    ``sure`` are the intervals, where they are not the ordinary ones.
    """
    if not components:
        return (), None, None
    intervals = sure or score_intervals(components, arrays)
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
    return tuple(measured), ers_of(parts), intervals.mean


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
    require_named("data set", embedder.card.dataset.name, f"model {embedder.name!r}", "with --dataset")
    return embedder.card.dataset.name


def default_protocol(dataset: RetrievalDataset) -> str:
    """The data set's own protocol; else that of small grey pictures (77/255) or, whatever their size, of others (8/255)."""
    if dataset.name in DATASETS:
        return DATASETS[dataset.name].protocol
    channels, height, _ = dataset.images.shape
    return "ers-28" if channels == 1 and height <= 64 else "ers-224"

"""evaluate(model, data set, protocol) to an Evaluation: what is run, in which order, and the record of it.

The file to read first is ``task.py`` (what is to be measured, and how), then ``run/subject.py`` (everything clean, embedded
once) and ``run/search.py`` (how one attack is run).
"""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmlbench.datasets import RetrievalDataset
from dmlbench.doubts.audit import examine, follow_gradients, glance
from dmlbench.doubts.checks import doubts_about
from dmlbench.doubts.evidence import Finding
from dmlbench.doubts.unseen import Beginning
from dmlbench.embedding import Embedder, modes_kept
from dmlbench.errors import ShardDone, UsageError
from dmlbench.fast.compiled import Steps
from dmlbench.fast.exact import true_float32
from dmlbench.intervals import VERSION, Ends, Intervals
from dmlbench.kinds.base import Outcome
from dmlbench.metrics import CLEAN_METRICS, OF_THE_GALLERY, RECALL_AT, agreement, assignments, mean, retrieval
from dmlbench.protocol import Component, Protocol, ers_of, score_intervals
from dmlbench.results import Evaluation, Flag, Measurement, finite
from dmlbench.run.closeup import closeup
from dmlbench.run.fingerprint import fingerprint
from dmlbench.run.looks import even_order, searched_until_sure, sure_intervals, sure_mean, until_sure
from dmlbench.run.record import dataset_info, environment, model_info, protocol_info
from dmlbench.run.search import Attacked, run_searches
from dmlbench.run.subject import Progress, Silent, Subject, measured_queries, prepare, sample_positions
from dmlbench.run.units import Work
from dmlbench.task import Options, Task
from dmlbench.user_code import RUN


def retrieved(subject: Subject) -> dict[str, np.ndarray]:
    """The clean metrics of retrieval, ``benign/<name>`` (Q,)."""
    clean = retrieval(subject.scene, RECALL_AT, grouped=subject.dataset.grouped)
    return {f"benign/{name}": values for name, values in clean.items()}


def benign_arrays(subject: Subject, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The clean metrics: ``benign/<name>`` (Q,) of retrieval, () of clustering, and each query's clusters."""
    scene, out = subject.scene, retrieved(subject)
    classed = scene.gallery.classed
    classes = scene.gallery.labels[classed].cpu().numpy()
    clusters = assignments(scene.gallery.embeddings[classed], len(np.unique(classes)), seeds)
    out |= {f"benign/{name}": np.array([value]) for name, value in agreement(classes, clusters).items()}
    entry = scene.row.cpu().numpy()
    if (entry >= 0).all():  # every query is a gallery entry, so it fell into a cluster
        out["benign/clusters"] = clusters[(classed.cumsum(0) - 1).cpu().numpy()[entry]]
    return out


def evaluate(
    model: Embedder | torch.nn.Module | str,
    dataset: RetrievalDataset | str | None = None,
    protocol: Protocol | Path | str | None = None,
    options: Options | None = None,
    **changes: Any,
) -> Evaluation:
    """Measure how robust a model is.

    Args:
        model: an :class:`Embedder`, a registry id, or a module with an ``input_shape`` attribute.
        dataset: a data set or its id; by default the one whose training split the model learnt from.
        protocol: a protocol, its name or its file; by default the data set's.
        options: how; see :class:`~dmlbench.task.Options`.
        changes: single options by name, e.g. ``limit=64``.

    Returns:
        The :class:`Evaluation`, its per-query arrays attached.

    Raises:
        UsageError: an unknown name or a combination that does not fit (exit code 2).
        DataError: files are missing or the model's output is broken (4).
        NotComparable: what ``work`` keeps is of another configuration (3).
        ShardDone: ``work`` is a shard, which is finished; the rest is for the others.
    """
    o = replace(options or Options(), **changes)
    with modes_kept(model, o.surrogate), torch.inference_mode(False), true_float32():
        return measured(model, dataset, protocol, o)


def measured(
    model: Embedder | torch.nn.Module | str,
    dataset: RetrievalDataset | str | None,
    protocol: Protocol | Path | str | None,
    o: Options,
) -> Evaluation:
    """:func:`evaluate`, within the surroundings that it makes."""
    clock = Clock()
    progress, work = o.progress or Silent(), o.work or Work()
    task = Task.of(model, dataset, protocol, o)
    size, earlier = task.agree(work), work.units.spent() if work.units else 0.0
    task.check_targets()
    clock.done("loading")
    subject = embedded(task, progress, work)
    beginning = Beginning.of(subject.surrogate or subject, size) if follow_gradients(searched_with(task)) else None
    clock.done("embedding")
    attacked = partial(
        run_searches, planned=task.planned, seed=task.seed, batch_size=size, progress=progress, work=work,
        on_search=o.on_search,
    )  # fmt: skip
    kind_run = partial(run_of_the_kind, task, size, progress)
    attacked_parts, outcome, looked = None, None, dict[str, Any]()
    if o.until is not None:
        subject, attacked_parts, outcome, looked = measured_until_sure(task, subject, o.until, attacked, kind_run, work)
        clock.done("attacks")
    clean = clean_arrays(task, subject, work)
    clock.done("clean metrics")
    attacked_parts = attacked(subject) if attacked_parts is None else attacked_parts
    outcome = kind_run(subject, work) if outcome is None else outcome
    if work.shard:
        finished = f"shard {work.shard.index}/{work.shard.count} is finished"
        raise ShardDone("; ".join([*notes_of(subject, task), finished]))
    clock.done("attacks")
    found = Measured(task, subject, clean, attacked_parts, outcome, looked)
    doubts, audit = found.doubts(size, beginning) if work.world.leads else ((), [])
    evaluation = found.evaluation(doubts, audit)
    clock.done("checks")
    stages = {**({"before": earlier} if earlier else {}), **clock.seconds}
    return evaluation.model_copy(update={"seconds": sum(stages.values()), "stages": stages}).with_arrays(
        found.arrays, found.sample
    )


def searched_with(task: Task) -> set[str]:
    """Names of the optimizers that a task searches with."""
    own = task.kind.run and task.chosen.runner
    return {s.optimizer for s in task.planned} | (task.kind.optimizers(task.rules) if own else set())


def embedded(task: Task, progress: Progress, work: Work) -> Subject:
    """The subject with all clean images embedded once, and those of the surrogate and of the undefended model, if there are any."""
    o = task.options
    order = None if o.only is None else np.sort(np.asarray(o.only, dtype=np.int64))
    if o.until is not None:
        wanted = measured_queries(len(task.dataset.query), task.queries)
        order = wanted[even_order(task.dataset.labels[task.dataset.query[wanted]])]
    prepared = partial(
        prepare, dataset=task.dataset, limit=task.queries, order=order, device=o.device, progress=progress, work=work,
        cache=o.cache, shared=o.shared,
    )  # fmt: skip
    subject = prepared(task.embedder)
    surrogate, undefended = (
        None if model is None else prepared(model, gradients=task.embedder, part=name)
        for name, model in (("surrogate", task.surrogate), ("undefended", task.undefended))
    )  # fmt: skip
    return replace(subject, surrogate=surrogate, undefended=undefended)


def clean_arrays(task: Task, subject: Subject, work: Work) -> dict[str, np.ndarray]:
    """The measured queries, their classes and clean metrics; the leader of the first shard alone computes the metrics."""
    arrays = {"query": subject.rows, "label": task.dataset.labels[subject.rows]}
    if work.world.leads and (work.shard is None or work.shard.index == 1):
        arrays |= work.once("benign", len(subject.rows), partial(benign_arrays, subject, task.rules.clustering_seeds))
    return arrays


def run_of_the_kind(task: Task, batch_size: int, progress: Progress, subject: Subject, work: Work) -> Outcome | None:
    """The outcome of the run of the protocol's kind; None where the kind has none, or it is not among the chosen parts."""
    if not (task.kind.run and task.chosen.runner):
        return None
    return task.kind.run(subject, task.rules, task.seed, batch_size, progress, sample_positions(subject), work)


def measured_until_sure(
    task: Task,
    subject: Subject,
    points: float,
    attacked: Callable[..., Attacked],
    kind_run: Callable[[Subject, Work], Outcome | None],
    work: Work,
) -> tuple[Subject, Attacked | None, Outcome | None, dict[str, Any]]:
    """The queries measured until the number that ``--until`` watches is sure, their results, and all looks: by the run of the
    protocol's kind if it has one, else by the searches of its components."""
    if task.kind.run:
        subject, outcome, looked = run_until_sure(task, subject, points, kind_run, work)
        return subject, None, outcome, looked
    subject, results, looked = searched_until_sure(subject, task.chosen.listed, points, attacked)
    return subject, results, None, looked


def run_until_sure(
    task: Task, subject: Subject, points: float, run: Callable[[Subject, Work], Outcome | None], work: Work
) -> tuple[Subject, Outcome, dict[str, Any]]:
    """The kind's own run on more and more of the queries, in the subject's order, until its number is sure.

    Returns:
        The queries measured, by ascending row, and what a run of these alone gives; and :func:`until_sure`'s, with the ``number``.

    Raises:
        UsageError: the kind does not tell what each query adds to its number.
    """
    name = str(task.kind.watched)
    here, outcome = subject, Outcome([], {}, {}, {}, {})

    def look(n: int, level: float) -> tuple[float | None, Ends]:
        nonlocal here, outcome
        here = subject[np.argsort(subject.rows[:n])]
        done = run(here, work.part(f"{n} queries"))
        assert done is not None  # no shard: Task refuses it
        outcome, clean = done, {"query": here.rows, "label": task.dataset.labels[here.rows], **retrieved(here)}
        measured = Measured(task, here, clean, Attacked({}, {}, {}, 0), outcome, {})
        values = task.kind.by_query(measured.evaluation((), ()).with_arrays(measured.arrays)).get(name)
        if values is None:
            raise UsageError(f"--until: kind {task.kind.name!r} does not tell what each query adds to {name}")
        return finite(mean(values)), sure_mean(values, clean["label"], level)

    stopped = until_sure(len(subject.rows), points, look)
    return here, outcome, {"number": name, **stopped}


class Measured:
    """The measurements of a run, from which its :class:`Evaluation` is made.

    Attributes:
        arrays: per-query outcomes; sample: adversarial images of some queries.
        outcome: of the run of the protocol's kind, if it has one.
    """

    def __init__(
        self,
        task: Task,
        subject: Subject,
        clean: Mapping[str, np.ndarray],
        attacked: Attacked,
        outcome: Outcome | None,
        looked: Mapping[str, Any],
    ) -> None:
        self.task, self.subject, self.outcome, self.looked = task, subject, outcome, looked
        metrics = {name: mean(clean[f"benign/{name}"]) for name in CLEAN_METRICS if f"benign/{name}" in clean}
        self.benign = {name: value for name, value in metrics.items() if np.isfinite(value)}
        scalars = {f"benign/{name}" for name in OF_THE_GALLERY}
        self.arrays = {key: values for key, values in clean.items() if key not in scalars} | attacked.arrays
        self.sample = {"rows": subject.rows[sample_positions(subject)], **attacked.sample}
        self.parts, self.seconds, self.nonfinite = list(task.chosen.listed), attacked.seconds, attacked.nonfinite
        if outcome:
            self.parts, self.seconds = outcome.components, {**self.seconds, **outcome.seconds}
            self.arrays, self.sample = {**self.arrays, **outcome.arrays}, {**self.sample, **outcome.sample}
            self.nonfinite += outcome.nonfinite
        self.sample |= closeup(subject, self.sample) if task.kind.moved else {}
        level = looked["looks"][-1]["level"] if looked else None
        sure = None if level is None else sure_intervals(self.parts, self.arrays, level)
        score = task.kind.mean and task.complete
        listed, self.ers, self.ers_interval = scores(self.parts, self.arrays, self.seconds, complete=score, sure=sure)
        extra = scores(task.chosen.extra, self.arrays, self.seconds, complete=False)[0]
        self.measurements = (*listed, *extra)

    def doubts(self, batch_size: int, beginning: Beginning | None) -> tuple[tuple[Flag, ...], list[Finding]]:
        """Flags of doubtful numbers: the audit's findings if the protocol has one, else those of a short check of the model."""
        rules, used = self.task.rules, searched_with(self.task)
        if self.outcome and rules.audit:
            audit = examine(self.subject, rules, self.outcome.broken_by, self.task.seed, rules.audit, beginning)
            return tuple(f.flag() for f in audit if f.verdict in ("warn", "fail")), audit
        if not used:
            return (), []
        return tuple(glance(self.subject, self.arrays["benign/recall_at_1"], used, batch_size, beginning)), []

    def extras(self, audit: Sequence[Finding]) -> dict[str, Any]:
        """The ``extras`` of the record; entries that would be empty are left out."""
        task = self.task
        extras = {
            task.kind.name: self.outcome and self.outcome.summary,
            "until": self.looked,
            "retention": None if task.kind.within else retention(self.measurements, self.benign),
            "audit": [asdict(f) for f in audit],
            "extra_parts": [c.name for c in task.chosen.extra],
            "own_ends": {
                c.name: [c.worst, c.best] for c in task.chosen.extra if c.attack in RUN
            },  # in no table where it is read
            "fingerprint": fingerprint(task.embedder)
            if task.embedder.card is None
            else None,  # nothing else says what it was
        }
        return {key: value for key, value in extras.items() if value or (key == "retention" and value is not None)}

    def evaluation(self, doubts: Sequence[Flag], audit: Sequence[Finding]) -> Evaluation:
        """The record, without its times."""
        task = self.task
        return Evaluation(
            model=model_info(task.embedder),
            dataset=dataset_info(self.subject),
            protocol=protocol_info(task.official, task.rules, task.seed, task.dataset.images.shape),
            environment=environment(
                self.subject.device,
                task.options.argv,
                precision=task.precision,
                compiled=task.embedder.compiled,
                notes=notes_of(self.subject, task),
            ),
            partial=task.partial,
            conditions=task.conditions,
            benign=self.benign,
            measurements=self.measurements,
            ers=self.ers,
            ers_interval=self.ers_interval,
            interval_version=VERSION,
            extras=self.extras(audit),
            warnings=(*doubts_about(self.subject, self.measurements, self.nonfinite), *doubts),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=0.0,
        )


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


def notes_of(subject: Subject, task: Task) -> tuple[str, ...]:
    """Notes for the record: how the run differed from the options where this affects its speed alone, which entries did not
    count, and which user code was run."""
    models = [subject.embedder, *([subject.surrogate.embedder] if subject.surrogate else [])]
    apart = "gallery images that share a group with a query (camera, sequence or the very same picture) did not count for it"
    trouble = [m.steps.trouble for m in models if isinstance(m.steps, Steps) and m.steps.trouble]
    named = [*(part for m in models for part in (m.arch or "").split("+")), subject.dataset.name]
    named += [component.attack for component in (*task.chosen.listed, *task.chosen.extra)]
    return (
        *(RUN[name] for name in dict.fromkeys(named) if name in RUN),
        *(f"--compile: gradient steps ran uncompiled, since {why}" for why in trouble),
        *([apart] if subject.scene.groups is not None else []),
    )


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

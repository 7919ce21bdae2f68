"""The task of a run: model, data set, protocol and options, resolved and checked; and the identity of its result.

A :class:`Task` is made before anything is embedded, so that what cannot be measured is refused at once. :data:`IDENTITY` has
for each field of the identity how to read it from a task and from a finished result: a resumed run compares the two.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmlbench.attacks import ATTACKS, choose_targets, user_attacks
from dmlbench.datasets import DATASETS, RetrievalDataset, load_dataset
from dmlbench.datasets.pairs import with_pairs
from dmlbench.embedding import Embedder, digest_of
from dmlbench.errors import UsageError
from dmlbench.fast.rounded import settled
from dmlbench.kinds.base import Kind
from dmlbench.kinds.table import KINDS
from dmlbench.models import load_model
from dmlbench.models.defended import averaged, known_to_attacks
from dmlbench.protocol import Chosen, Protocol
from dmlbench.protocols import load_protocol
from dmlbench.results import Conditions, Evaluation
from dmlbench.rng import SEEDS, Rng
from dmlbench.run.fingerprint import fingerprint
from dmlbench.run.looks import require_stoppable
from dmlbench.run.search import Search, auto_batch, searches
from dmlbench.run.subject import Progress, require_shape, resolve_device, unembedded
from dmlbench.run.units import Arrays, Work
from dmlbench.user_code import require_named
from dmlbench.version import __version__


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run.

    Those that change the result:
        attacks: only these: components of the protocol, which leaves ERS empty, and any ``attack@optimizer``,
            which is an extra part that never counts in ERS; "all" stands for all that the protocol measures,
            and ``FILE.py:NAME`` for one's own.
        limit: only this many queries, which marks the result partial.
        until: only as many queries as bring the 95 % interval of ERS, or of the kind's own number
            (:attr:`~dmlbench.kinds.base.Kind.watched`), within this many points of it, in the order of :func:`~dmlbench.run.looks.even_order`, looked at more than once and made up for (:mod:`dmlbench.run.looks`);
            marks the result partial.
        eps: another size of the perturbation than the protocol's, or of a protocol with a grid several in ascending order, with
            steps that are longer or shorter in proportion; marks the result partial.
        seed: another seed than the protocol's, which marks the result partial.
        eot: forward passes averaged for each gradient and read-out, for models that are random; marks the
            result partial, unless it is the protocol's own number.
        surrogate: another model to make the adversarial images on (transfer); marks the result partial.
        pairs: a file of pairs to verify in place of drawn ones (:mod:`dmlbench.datasets.pairs`); marks the result partial.
        only: positions of the queries to measure, of those of the data set, instead of ``limit``; marks the result partial.
        device: "auto", "cpu", "cuda" or "cuda:n".

    Those that do not:
        batch_size: queries attacked at a time; by default chosen for the device.
        progress: receives how far the run has come.
        argv: the command line, for the record.
        on_search: called with each search before it begins.
        work: which process computes which unit, and where finished ones are saved; see docs/running.md.
        resume: continue the unfinished run that ``work`` has saved.
        cache: save the clean embeddings in the cache folder, for later runs of this model on this data set.
        shared: a dict passed to several calls with the same model, data set, surrogate and device, so that
            clean images are embedded once for all of them.
    """

    attacks: Sequence[str] | None = None
    limit: int | None = None
    until: float | None = None
    eps: Sequence[str] | None = None
    seed: int | None = None
    eot: int | None = None
    surrogate: Embedder | torch.nn.Module | str | None = None
    pairs: Path | str | None = None
    only: Sequence[int] | None = None
    device: str = "auto"
    batch_size: int | None = None
    progress: Progress | None = None
    argv: Sequence[str] = ()
    on_search: Callable[[Search], None] | None = None
    work: Work | None = None
    resume: bool = False
    cache: bool = False
    shared: dict[str, Arrays] | None = None

    def __post_init__(self) -> None:
        for name, such in (("attacks", ["CA+"]), ("eps", ["8/255"])):
            value = getattr(self, name)
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if value is not None and not (listed and all(isinstance(one, str) for one in value)):
                raise UsageError(f"{name} must be a list of strings such as {such}, not {value!r}")
        for name in ("batch_size", "limit", "seed", "eot"):
            if (value := getattr(self, name)) is None:
                continue
            try:
                value = operator.index(value)
            except TypeError:
                raise UsageError(f"{name} must be a whole number, not {value!r}") from None
            object.__setattr__(self, name, value)
            if name in ("batch_size", "limit") and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be 1 or more")
        if self.seed is not None and self.seed not in SEEDS:
            raise UsageError(f"--seed {self.seed} must be from 0 to {SEEDS.stop - 1}")


@dataclass(frozen=True, eq=False)
class Task:
    """A model, a data set, and a protocol as it is run.

    Attributes:
        official: the protocol as published, whose hash the result has.
        rules: the protocol as it is run, with the options' eps and ``eot``, and the steps that its kind adds for this model.
        surrogate: the model on which adversarial images are made, if it is another one.
        undefended: the model without its test-time defence, if a step of ``rules`` makes its images on it.
    """

    embedder: Embedder
    dataset: RetrievalDataset
    official: Protocol
    rules: Protocol
    options: Options
    surrogate: Embedder | None = None
    undefended: Embedder | None = None

    @staticmethod
    def of(
        model: Embedder | torch.nn.Module | str,
        dataset: RetrievalDataset | str | None,
        protocol: Protocol | Path | str | None,
        options: Options,
    ) -> "Task":
        """The task, with everything loaded and checked, but nothing embedded.

        Raises:
            UsageError: an unknown name or a combination that does not fit. DataError: files are missing.
        """
        if options.attacks:
            options = replace(options, attacks=user_attacks(options.attacks))
        embedder = as_embedder(model)
        if not isinstance(dataset, RetrievalDataset):
            dataset = images_for(embedder, dataset)
        if options.pairs is not None and dataset.pairs is None:
            dataset = with_pairs(dataset, options.pairs)
        rules = protocol if isinstance(protocol, Protocol) else load_protocol(protocol or default_protocol(dataset))
        run = rules if options.eps is None else rules.at_eps(options.eps)
        if embedder.eot is not None and not KINDS[rules.kind].averages:
            raise UsageError(
                f"model {embedder.name!r} is random: nothing in protocol {rules.name!r} averages its draws"
            )
        if KINDS[rules.kind].unit and not embedder.distance.normalized:
            raise UsageError(
                f"model {embedder.name!r} has space {embedder.distance.space!r}: protocol {rules.name!r} needs embeddings of unit "
                "length, space 'N' or 'C'"
            )
        options = replace(options, eot=averaged(embedder, options.eot))
        if options.eot == rules.threat.get("eot", 1):  # what it would be anyway
            options = replace(options, eot=None)
        if options.eot is not None:
            run = run.model_copy(update={"threat": {**run.threat, "eot": options.eot}})
        other = None if options.surrogate is None else as_embedder(options.surrogate)
        if other is not None and other.eot is not None and options.eot is None:
            text = f"surrogate {other.name!r} is random: say how many passes its gradients average, --eot {other.eot}"
            raise UsageError(text)
        task = Task(embedder, dataset, rules, run, options, other)
        task._check()
        if task.chosen.runner and known_to_attacks(embedder) and (more := task.kind.behind(run)) is not run:
            task = replace(task, rules=more, undefended=embedder.undefended())
        return task

    def _check(self) -> None:
        o, rules = self.options, self.rules
        if self.surrogate is not None and self.kind.run and self.chosen.runner:
            raise UsageError(f"protocol {rules.name!r} has no transfer: name attacks, such as WM@apgd, with --attacks")
        if self.dataset.pairs is not None and not (self.kind.pairs and self.chosen.runner):
            why = "without the protocol's own run: add all to --attacks"
            under = f"under protocol {rules.name!r}, which verifies no pairs"
            raise UsageError(f"--pairs does nothing {why if self.kind.pairs else under}")
        if o.eot is not None and self.chosen.runner and "eot" in self.kind.unread:
            raise UsageError(f"--eot does nothing under protocol {rules.name!r}: nothing there averages passes")
        if self.kind.run and self.chosen.runner:
            self.kind.require(rules, self.dataset, self.seed)
        if o.only is not None:
            if o.limit is not None or o.until is not None:
                raise UsageError("only names the queries that are measured: leave limit and until out")
            if not len(o.only) or len(set(o.only)) < len(o.only) or not {*o.only} <= {*range(len(self.dataset.query))}:
                raise UsageError(f"only must name queries from 0 to {len(self.dataset.query) - 1}, each once")
        if o.until is not None:
            others = {"--limit": o.limit, "--attacks": o.attacks, "--shard": o.work and o.work.shard}
            labels = self.dataset.labels[self.dataset.query]
            require_stoppable(rules, self.kind.watched, labels, o.until, others)

    @property
    def kind(self) -> Kind:
        """The kind of the protocol."""
        return KINDS[self.rules.kind]

    @cached_property
    def chosen(self) -> Chosen:
        """The parts that are measured."""
        return self.rules.chosen(self.options.attacks, self.dataset.images.shape)

    @property
    def planned(self) -> list[Search]:
        """The searches that these parts need."""
        return searches(self.rules, [*self.chosen.listed, *self.chosen.extra])

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.rules.seed if self.options.seed is None else self.options.seed

    @property
    def queries(self) -> int:
        """The number of queries that are measured, unless ``until`` stops the run earlier."""
        if self.options.only is not None:
            return len(self.options.only)
        return self.rules.measured(len(self.dataset.query), self.options.limit)

    @property
    def complete(self) -> bool:
        """Are all parts of the protocol measured?"""
        return self.chosen.runner if self.kind.run else len(self.chosen.listed) == len(self.rules.components)

    @property
    def precision(self) -> str:
        """The precision of gradients."""
        return settled(self.embedder.precision, len(self.dataset.gallery), resolve_device(self.options.device))

    @property
    def conditions(self) -> Conditions:
        """The options that change the protocol's threat."""
        o = self.options
        return Conditions(
            eot=o.eot,
            eps=None if o.eps is None else ",".join(o.eps),
            surrogate=None if self.surrogate is None else self.surrogate.name,
            pairs=None if self.dataset.pairs is None else self.dataset.pairs.sha256,
        )

    @property
    def partial(self) -> tuple[str, ...]:
        """The options that make the result partial; empty for a full one."""
        o, full = self.options, self.official.measured(len(self.dataset.query))
        why = {
            "--preview": "" if self.dataset.preview else None,
            "--limit": o.limit if o.limit is not None and o.limit < full else None,
            "--only": None if o.only is None else f"{len(o.only)} queries",
            "--until": None if o.until is None else f"{o.until:g}",
            "--attacks": None if self.complete else ",".join(o.attacks or ()),
            "--seed": o.seed if o.seed != self.official.seed else None,
            **{f"--{name}": value for name, value in self.conditions.model_dump().items()},
        }
        return tuple(f"{option} {value}".rstrip() for option, value in why.items() if value is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the result: :data:`IDENTITY`, and the fingerprint of a model that is not registered."""
        prints = fingerprint(self.embedder) if self.embedder.card is None else {}
        return {**{name: of_task(self) for name, (of_task, _) in IDENTITY.items()}, **prints}

    def agree(self, work: Work) -> int:
        """Compare the configuration with the one that ``work`` has saved, or save it.

        Returns:
            The batch size: the saved one, where there are saved units.

        Raises:
            NotComparable: the saved configuration is another one.
        """
        o, stored = self.options, work.units.configuration() if work.units else None
        size = (
            o.batch_size
            or (stored or {}).get("batch_size")
            or auto_batch(self.dataset, resolve_device(o.device), self.embedder, work.world)
        )
        identity = {
            name: of_task(self) for name, (of_task, _) in IDENTITY.items() if name not in ("partial", "extra_parts")
        }
        other = self.surrogate
        configuration = {
            **identity,
            "weights": self.embedder.weights_sha256 or digest_of(self.embedder),
            "surrogate": other and other.name,
            "surrogate_weights": other and (other.weights_sha256 or digest_of(other)),
            "attacks": list(o.attacks) if o.attacks else None,
            "limit": o.limit,
            "eot": o.eot,
            "batch_size": size,
            **({} if o.until is None else {"until": o.until}),
            **({} if o.eps is None else {"eps": list(o.eps)}),
            **({} if o.only is None else {"only": list(map(int, o.only))}),
        }
        if work.units:
            theirs = fingerprint(other) if other else {}
            configuration |= fingerprint(self.embedder) | {f"surrogate_{key}": value for key, value in theirs.items()}
        work.agree(configuration, o.resume)
        return int(size)

    def check_targets(self) -> None:
        """Check before anything is embedded that images fit the model and attacks find targets.

        Raises:
            UsageError: images of another shape than the model takes, or an attack without a target.
        """
        require_shape(self.embedder, self.dataset)
        nowhere = unembedded(self.dataset)
        for search in self.planned:
            choose_targets(ATTACKS[search.attack], nowhere, Rng(self.seed, torch.from_numpy(self.dataset.query[:1])))


IDENTITY: Mapping[str, tuple[Callable[[Task], Any], Callable[[Evaluation], Any]]] = {
    "dmlbench": (lambda t: __version__, lambda e: e.environment.dmlbench),
    "torch": (lambda t: torch.__version__, lambda e: e.environment.torch),
    "model": (lambda t: t.embedder.name, lambda e: e.model.id),
    "weights": (lambda t: t.embedder.weights_sha256, lambda e: e.model.weights_sha256),
    "space": (lambda t: t.embedder.distance.space, lambda e: e.model.space),
    "gradient_precision": (lambda t: t.precision, lambda e: e.environment.gradient_precision),
    "compiled": (lambda t: t.embedder.compiled, lambda e: e.environment.compiled),
    "dataset": (lambda t: t.dataset.name, lambda e: e.dataset.name),
    "split": (lambda t: t.dataset.split, lambda e: e.dataset.split),
    "dataset_sha256": (lambda t: t.dataset.sha256, lambda e: e.dataset.sha256),
    "pairs": (lambda t: t.conditions.pairs, lambda e: e.conditions.pairs),
    "protocol": (lambda t: t.official.name, lambda e: e.protocol.name),
    "protocol_sha256": (lambda t: t.official.sha256, lambda e: e.protocol.sha256),
    "seed": (lambda t: t.seed, lambda e: e.protocol.seed),
    "device": (lambda t: resolve_device(t.options.device).type, lambda e: e.environment.device),
    "partial": (lambda t: list(t.partial), lambda e: list(e.partial)),
    "extra_parts": (lambda t: [c.name for c in t.chosen.extra], lambda e: list(e.extras.get("extra_parts", ()))),
}
"""By field: its value in a task, and in a finished result. What a result does not state, such as the batch size, is no part of it."""


def identity_of(e: Evaluation) -> dict[str, Any]:
    """The identity of a finished result, to compare with :attr:`Task.identity`."""
    return {**{name: of_result(e) for name, (_, of_result) in IDENTITY.items()}, **e.extras.get("fingerprint", {})}


def as_embedder(model: Embedder | torch.nn.Module | str) -> Embedder:
    """The model itself if it is an Embedder, one by its id, or a module wrapped by its own ``input_shape``."""
    if isinstance(model, Embedder):
        return model
    if not isinstance(model, torch.nn.Module):
        return load_model(model)
    shape = getattr(model, "input_shape", None)
    if shape is None:
        raise UsageError("a plain nn.Module needs an input_shape: dmlbench.load_model(module, input_shape=(C, H, W))")
    return load_model(model, input_shape=tuple(shape))


def images_for(embedder: Embedder, name: str | None, split: str = "test") -> RetrievalDataset:
    """The data set of that name, else the one that the model's checkpoint names, as the model is fed."""
    if name:
        return load_dataset(name, split, embedder.preprocess)
    known = default_dataset(embedder)
    try:
        return load_dataset(known, split, embedder.preprocess)
    except UsageError as error:  # a path, which is of where the model was trained
        raise UsageError(f"{error}; model {embedder.name!r} was trained on it: name it with --dataset") from None


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

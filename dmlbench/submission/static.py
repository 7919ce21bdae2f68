"""Level 0: what can be known without running anything. Schema, hashes, names, and sums that must come out.

The numbers of a run are sums over its per-query arrays, so every stated number is computed again from
them; who edits one has to invent 896 outcomes that fit, and those are measured again from level 2 on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from dmlbench.board.row import Row, Status, from_evaluation
from dmlbench.checkpoints import checkpoints, problems_of
from dmlbench.compact import unstacked, untabulated
from dmlbench.datasets import DATASETS, load_dataset
from dmlbench.doubts.audit import FLAGS
from dmlbench.errors import Problem
from dmlbench.kinds.base import CLOSE, LENGTHS_CLOSE, QUERIES, RUN, SAMPLE, Stated
from dmlbench.kinds.table import KINDS, numbers_of
from dmlbench.models.defended import Applied, hashed, named
from dmlbench.plain import read_json
from dmlbench.protocol import Component, Protocol
from dmlbench.protocols import load_protocol, packaged_protocol, protocol_names
from dmlbench.registry import suggest
from dmlbench.results import Conditions, Evaluation
from dmlbench.run.record import counts
from dmlbench.run.subject import measured_queries
from dmlbench.submission import extras
from dmlbench.submission.bundle import SUBMISSIONS, Bundle, Refused, manifest_of, read_arrays, read_bundle
from dmlbench.submission.kept import least_sample
from dmlbench.submission.record import LICENSES, RANKING, Submission, SubmittedRun, read_submission
from dmlbench.submission.sums import sum_problems

WEIGHTS = "weights.safetensors"
HEADER_MOST = 4 << 20
TENSORS_MOST = 20_000
"""Bytes and entries of the list of tensors in a weights file: the largest networks have a few thousand."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A bundle whose files are whole and of the right form."""

    bundle: Bundle
    submission: Submission
    evaluation: Evaluation

    @property
    def wrappers(self) -> tuple[Applied, ...]:
        """The defences at test time before the network that the bundle holds, the outer one first."""
        return named(self.evaluation.model.id)[0]

    @property
    def network(self) -> str:
        """What that network is called."""
        return named(self.evaluation.model.id)[1]


@dataclass(frozen=True, eq=False)
class Checked(Opened):
    """A bundle that passed level 0; ``parts`` are the columns of its run."""

    protocol: Protocol
    parts: tuple[Component, ...]
    row: Row

    @property
    def stated(self) -> Stated:
        """What the kind of its protocol looks at."""
        return Stated(self.evaluation, _as_run(self.protocol, self.evaluation), self.parts)


def open_bundle(path: Path) -> Opened:
    """The first half of level 0: names, sizes, hashes, forms.

    Raises:
        Refused: with what is wrong.
    """
    bundle = read_bundle(path)
    submission = read_submission(bundle.files["submission.yaml"])
    if problems := list(_weights_look(bundle)):
        raise Refused(problems)
    return Opened(bundle, submission, _evaluation(bundle))


def check_static(path: Path, board: Path | None = None, aged: bool = False) -> Checked:
    """All of level 0.

    Args:
        path: a zip file or a folder.
        board: the folder ``leaderboard`` whose submissions it must not repeat.
        aged: whether its protocol may have been superseded, as that of a row which is on the board already.

    Raises:
        Refused: with all problems up to the step after which checking cannot continue.
    """
    opened = open_bundle(path)
    submission, evaluation = opened.submission, opened.evaluation
    rules = _protocol(evaluation, aged)
    parts = extras.parts_of(rules, evaluation)
    stated = Stated(evaluation, _as_run(rules, evaluation), tuple(parts))
    shapes = [*_shape_problems(evaluation, rules, parts), *extras.shape_problems(stated)]
    problems = [*shapes, *_identity_problems(submission, evaluation), *_flag_problems(evaluation)]
    problems += [] if aged else _other_record(submission, evaluation)
    if not shapes:
        problems += sum_problems(stated)
    if path.is_dir() and path.resolve().parent.name == SUBMISSIONS and path.resolve().name != submission.id:
        text = f"is {submission.id!r}, its folder is called {path.resolve().name!r}"
        problems.append(Problem(0, "submission.yaml id", text))
    if WEIGHTS in opened.bundle.files and submission.checkpoint.license not in LICENSES:
        problems.append(
            Problem(0, WEIGHTS, f"may not be passed on: their licence is {submission.checkpoint.license!r}")
        )
    if board is not None:
        problems += _repeats(submission, evaluation, board, path)
    if problems:
        raise Refused(problems)
    return Checked(opened.bundle, submission, evaluation, rules, tuple(parts), _row(submission, evaluation))


def _as_run(rules: Protocol, e: Evaluation) -> Protocol:
    """The protocol as its kind runs it on the run's model."""
    return KINDS[rules.kind].behind(rules) if named(e.model.id)[0] else rules


def _row(submission: Submission, evaluation: Evaluation) -> Row:
    """The row it would have on the board: the last check of every text that is shown."""
    try:
        status: Status = "retracted" if submission.retracted else "reproduced"
        return from_evaluation(evaluation, status=status, card=submission.checkpoint, submission=submission.id)
    except ValidationError as error:
        raise Refused(Problem(0, f"{RUN} {place}", text) for place, text in problems_of(error)) from None


def _weights_look(bundle: Bundle) -> Iterator[Problem]:
    """Is the weights file a safetensors file by its first bytes?"""
    raw = bundle.files.get(WEIGHTS)
    if raw is None:
        return
    if raw[:1] == b"\x80":
        yield Problem(0, WEIGHTS, "is a pickle, which could run code; save the tensors as safetensors")
    elif raw[:2] == b"PK":
        yield Problem(0, WEIGHTS, "is a zip file (as torch.save writes), which may hold a pickle; save as safetensors")
    elif raw[:15].lstrip().lower().startswith((b"<!doctype", b"<html")):
        yield Problem(0, WEIGHTS, "is an HTML page: the download did not give the file")
    elif len(raw) < 8 or not 2 <= int.from_bytes(raw[:8], "little") <= len(raw) - 8 or raw[8:9] != b"{":
        yield Problem(0, WEIGHTS, "is not a safetensors file: its header does not fit its size")
    elif (size := int.from_bytes(raw[:8], "little")) > HEADER_MOST:
        yield Problem(0, WEIGHTS, f"lists its tensors in {size} bytes, at most {HEADER_MOST} are allowed")
    else:
        try:
            listed = read_json(raw[8 : 8 + size])
        except ValueError as error:
            yield Problem(0, WEIGHTS, f"is not a safetensors file: its header {error}")
            return
        if len(listed) > TENSORS_MOST:
            yield Problem(0, WEIGHTS, f"holds {len(listed)} tensors, at most {TENSORS_MOST} are allowed")


def _evaluation(bundle: Bundle) -> Evaluation:
    files = {
        name: bundle.files[f"run/{name}"] for name in ("evaluation.json", "per_query.npz", "adversarial_sample.npz")
    }
    stated = manifest_of(bundle.files["run/manifest.json"])
    outer = manifest_of(bundle.files["manifest.json"]) or {}
    if stated is None:
        raise Refused([Problem(0, "run/manifest.json", "is not a manifest")])
    differing = [
        Problem(0, f"run/manifest.json {name}", "differs from the file beside it")
        for name in sorted({*files, *stated})
        if stated.get(name) != outer.get(f"run/{name}")
    ]
    if differing:
        raise Refused(differing)
    try:
        read_json(files["evaluation.json"])
        evaluation: Evaluation = SubmittedRun.model_validate_json(files["evaluation.json"], strict=True)
    except ValidationError as error:
        raise Refused(Problem(0, f"{RUN} {place}", text) for place, text in problems_of(error)) from None
    except ValueError as error:
        raise Refused([Problem(0, RUN, f"is not JSON: {error}")]) from None
    if problems := list(extras.form_problems(evaluation)):
        raise Refused(problems)
    arrays = []
    for field, unpack in ((QUERIES, untabulated), (SAMPLE, unstacked)):
        try:
            arrays.append(unpack(read_arrays(bundle.files[field], field)))
        except ValueError as error:
            raise Refused([Problem(0, field, str(error))]) from None
    return evaluation.with_arrays(*arrays)


def _protocol(e: Evaluation, aged: bool) -> Protocol:
    name = e.protocol.name
    if name not in protocol_names():
        raise Refused(
            [Problem(0, f"{RUN} protocol.name", f"unknown protocol {name!r}{suggest(name, protocol_names())}")]
        )
    rules = packaged_protocol(name, e.protocol.sha256) or load_protocol(name)
    problems = []
    if e.protocol.sha256 != rules.sha256:
        text = f"{e.protocol.sha256[:12]}… is not the content of protocol {name!r} here ({rules.sha256[:12]}…)"
        problems.append(Problem(0, f"{RUN} protocol.sha256", text))
    if e.protocol.version != rules.version:
        problems.append(Problem(0, f"{RUN} protocol.version", f"{e.protocol.version!r}, here it is {rules.version!r}"))
    if e.protocol.seed != rules.seed:
        problems.append(Problem(0, f"{RUN} protocol.seed", f"{e.protocol.seed}, the protocol's is {rules.seed}"))
    threats = {(rules.norm, sizes) for sizes in rules.grid.values() or [rules.sizes(())]}
    if (e.protocol.norm or e.protocol.eps) and (e.protocol.norm, e.protocol.eps) not in threats:
        text = f"{e.protocol.norm or 'no norm'}, eps {', '.join(e.protocol.eps)} is not an adversary of {rules.id!r}"
        problems.append(Problem(0, f"{RUN} protocol.eps", text))
    if rules.superseded_by and not aged:
        problems.append(Problem(0, f"{RUN} protocol.name", f"{rules.id!r} is superseded by {rules.superseded_by!r}"))
    if problems:
        raise Refused(problems)
    return rules


def _identity_problems(s: Submission, e: Evaluation) -> Iterator[Problem]:
    """Do the submission, the run and the registry speak of one model and one result?"""
    file = "submission.yaml"
    stated = s.stated
    pairs = {
        "protocol": (stated.protocol, e.protocol.name),
        "protocol_sha256": (stated.protocol_sha256, e.protocol.sha256),
        "dataset": (stated.dataset, e.dataset.name),
        "dataset_sha256": (stated.dataset_sha256, e.dataset.sha256),
        "weights_sha256": (stated.weights_sha256, e.model.weights_sha256),
    }
    for name, (stated_value, measured_value) in pairs.items():
        if stated_value != measured_value:
            yield Problem(0, f"{file} stated.{name}", f"says {stated_value!r}, the run {measured_value!r}")
    ran = numbers_of(e)
    numbers = {"recall_at_1": e.benign.get("recall_at_1"), "ers": e.ers, **{name: ran.get(name) for name in RANKING}}
    for name, number in numbers.items():
        number_stated = getattr(stated, name)
        close = LENGTHS_CLOSE if name in RANKING and RANKING[name].length else CLOSE
        if (number_stated is None) != (number is None) or abs((number_stated or 0.0) - (number or 0.0)) > close:
            yield Problem(0, f"{file} stated.{name}", f"says {number_stated}, the run {number}")
    card = s.checkpoint
    wrappers, network = named(e.model.id)
    files = [hashed(wrappers, file.sha256) for file in card.files[:1] if file.sha256]
    if files != [e.model.weights_sha256]:
        stated_value = "is missing" if not card.files else f"says {str(card.files[0].sha256)[:12]}…"
        yield Problem(
            0,
            f"{file} checkpoint.files",
            f"{stated_value}, the run was made with {str(e.model.weights_sha256)[:12]}…"
            + (", which stands for its defence too" if wrappers else ""),
        )
    if card.arch.embed_dim != e.model.embed_dim:
        yield Problem(
            0, f"{file} checkpoint.arch.embed_dim", f"says {card.arch.embed_dim}, the run {e.model.embed_dim}"
        )
    known = checkpoints().get(network)
    if known is not None and known.files and card.files and known.files[0].sha256 != card.files[0].sha256:
        yield Problem(0, f"{RUN} model.id", f"{network!r} is registered with other weights; an id is never used again")


def _other_record(s: Submission, e: Evaluation) -> Iterator[Problem]:
    """Where what a board shows of a registered model is not what the registry says of it."""
    network = named(e.model.id)[1]
    if (known := checkpoints().get(network)) is None:
        return
    for field in ("title", "defense", "train.loss", "arch", "license", "paper", "claims"):
        stated, registered = (attrgetter(field)(card) for card in (s.checkpoint, known))
        if stated != registered:
            text = f"is not what the registry says of {network!r}"
            yield Problem(0, f"submission.yaml checkpoint.{field}", text)


def _flag_problems(e: Evaluation) -> Iterator[Problem]:
    for f in e.warnings:
        if f.flag not in FLAGS:
            yield Problem(0, f"{RUN} warnings.{f.flag}", f"is none of the flags{suggest(f.flag, FLAGS)}")


def _repeats(s: Submission, e: Evaluation, board: Path, path: Path) -> Iterator[Problem]:
    """Does the board already hold this id, or this model under this protocol?"""
    here = path.resolve()
    for folder in sorted((board / SUBMISSIONS).glob("*")):
        if folder.resolve() == here or not (folder / "submission.yaml").is_file():
            continue
        if folder.name == s.id:
            yield Problem(0, "submission.yaml id", f"{s.id!r} is already on the board")
            continue
        try:
            other = read_submission((folder / "submission.yaml").read_bytes())
        except Refused:
            continue
        if other.id == s.id:
            yield Problem(0, "submission.yaml id", f"{s.id!r} is already that of submissions/{folder.name}")
        same = (other.stated.weights_sha256, other.stated.protocol_sha256, other.stated.dataset)
        if same == (s.stated.weights_sha256, s.stated.protocol_sha256, s.stated.dataset):
            text = f"these weights are already on the board under {other.stated.protocol!r} as {other.id!r}"
            yield Problem(0, "submission.yaml stated.weights_sha256", text)


def _shape_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    """Is it a full run of this protocol on this data set, with every array that it must have?"""
    d = e.dataset
    if e.partial:
        yield Problem(0, f"{RUN} partial", f"a partial run ({', '.join(e.partial)}) has no place on the board")
    if e.conditions != Conditions():
        yield Problem(
            0, f"{RUN} conditions", "a run under another threat than the protocol's has no place on the board"
        )
    if d.n_queries != (due := rules.measured(d.n_queries_full)):
        of = f", of which {rules.name!r} measures {due}" if due != d.n_queries_full else ""
        yield Problem(0, f"{RUN} dataset.n_queries", f"{d.n_queries} of {d.n_queries_full} queries{of}")
    if d.name not in DATASETS:
        yield Problem(0, f"{RUN} dataset.name", f"unknown data set {d.name!r}{suggest(d.name, DATASETS)}")
        return
    query = e.arrays.get("query")
    if query is None or query.shape != (d.n_queries,) or query.dtype.kind not in "iu":
        yield Problem(0, f"{QUERIES} query", f"is not one integer for each of {d.n_queries} queries")
        return
    if len(np.unique(query)) != len(query):
        yield Problem(0, f"{QUERIES} query", "holds a row twice")
    label = e.arrays.get("label")
    if label is None or label.shape != query.shape or label.dtype.kind not in "iu":
        yield Problem(0, f"{QUERIES} label", "is not one class for each query")
        return
    if DATASETS[d.name].packaged:
        images = load_dataset(d.name, "test")
        if images.sha256 != d.sha256:
            yield Problem(
                0, f"{RUN} dataset.sha256", f"{d.sha256[:12]}…, data set {d.name!r} here is {images.sha256[:12]}…"
            )
        elif wrong := {k: n for k, n in counts(images).items() if getattr(d, k) != n}:
            for name, count in wrong.items():
                yield Problem(0, f"{RUN} dataset.{name}", f"says {getattr(d, name)}, data set {d.name!r} has {count}")
        elif not np.array_equal(query, images.query[measured_queries(len(images.query), rules.queries)]):
            yield Problem(0, f"{QUERIES} query", "are not the queries of the data set that are to be measured")
        elif not np.array_equal(label, images.labels[query]):
            yield Problem(0, f"{QUERIES} label", "are not the classes of the data set")
    names = [m.component for m in e.measurements]
    expected = [c.name for c in parts]
    if names != expected:
        yield Problem(0, f"{RUN} measurements", f"are {', '.join(names)}; the protocol has {', '.join(expected)}")
    for c in parts:
        for kind in ("value", "norm") if KINDS[rules.kind].moved else ("value",):
            values = e.arrays.get(f"{c.name}/{kind}")
            if values is None or values.shape != query.shape or values.dtype.kind != "f":
                yield Problem(0, f"{QUERIES} {c.name}/{kind}", "is not one number for each query")
    rows = e.sample.get("rows")
    if rows is None or rows.ndim != 1 or not np.isin(rows, query).all() or (not len(rows) and least_sample(e, ())):
        yield Problem(0, f"{SAMPLE} rows", "are not rows of queries")

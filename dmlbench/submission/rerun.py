"""Levels 1, 3 and 4: the model is loaded and made to do again what the bundle says it did.

1 the weights fit the architecture and the probe agrees; 3 a random share of the queries is attacked
again, or under a clustering protocol, where a share of the images would cluster otherwise, all of them
by one attack that is drawn; 4 all of it. Level 2 is in ``replay.py``.
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dmlbench.board.row import headline
from dmlbench.checkpoints import PACKAGE, checkpoints, sha256_of
from dmlbench.datasets import RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, DmlbenchError, Problem
from dmlbench.evaluate import evaluate
from dmlbench.files import first_line
from dmlbench.intervals import ANY, PERCENT, Ends, paired_intervals
from dmlbench.kinds.base import AGREE, LENGTHS_CLOSE, QUERIES, RUN, Stated
from dmlbench.kinds.table import KINDS
from dmlbench.models import ModelOptions, build, check_probe, fill, open_model, parameter_count
from dmlbench.models.defended import defended
from dmlbench.models.fetching import fetch as fetched
from dmlbench.models.spec import preprocess_of
from dmlbench.protocol import Protocol, scored
from dmlbench.results import Evaluation
from dmlbench.run.record import model_info
from dmlbench.run.subject import Progress, Silent, measured_queries, prepare
from dmlbench.submission.bundle import LIMITS, Refused, refuse
from dmlbench.submission.replay import dataset_of
from dmlbench.submission.static import WEIGHTS, Checked

OCTAVES = 0.125
"""How far the smallest eps may differ on a log scale with base 2: one step between two eps of the search."""
SHARE = 0.05
"""Share of the queries that level 3 attacks again ..."""
LEAST = 64
"""... and how many at the least."""


def load_submitted(checked: Checked, weights: Path | None = None, fetch: bool = False) -> Embedder:
    """Level 1: the model, from the bundle's weights, the registry's or a named file.

    Raises:
        Refused: no weights, another hash, not safetensors, another architecture, or the probe disagrees.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = checked.submission.checkpoint
    stated = str(card.files[0].sha256)  # of the network alone, which level 0 compared with the run's
    raw = checked.bundle.files.get(WEIGHTS)
    if raw is None:
        path = _elsewhere(checked, weights, fetch)
        known = checkpoints().get(checked.network)
        if known and known.files and known.files[0].format != "safetensors":
            return _behind(checked, _published(checked, path))
        raw = path.read_bytes()
    if (digest := hashlib.sha256(raw).hexdigest()) != stated:
        raise refuse(1, WEIGHTS, f"has sha256 {digest[:12]}…, the run was made with {stated[:12]}…")
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise refuse(1, WEIGHTS, f"is not a readable safetensors file: {error}") from None
    embedder = _described(checked)
    try:
        fill(embedder.network, tensors, WEIGHTS)
    except DataError as error:
        raise refuse(1, WEIGHTS, str(error)) from None
    embedder.eval()
    embedder.card, embedder.weights_sha256 = card, stated
    try:
        check_probe(embedder, card, checked.submission.id)
    except DataError as error:
        raise refuse(1, "submission.yaml checkpoint.probe", str(error)) from None
    except Exception as error:  # a network says in any way that it does not take its own images
        text = f"cannot be compared, the network does not take images of {_sides(embedder.input_shape)}: {first_line(error)}"
        raise refuse(1, "submission.yaml checkpoint.probe", text) from None
    return _behind(checked, embedder)


def _behind(checked: Checked, embedder: Embedder) -> Embedder:
    """The network behind the run's defences.

    Raises:
        Refused: one that does not take its images, an order of them that makes no sense, or another model than the run's.
    """
    try:
        for wrapper in reversed(checked.wrappers):
            embedder = defended(embedder, wrapper)
    except DmlbenchError as error:
        raise refuse(1, f"{RUN} model.id", str(error)) from None
    here = model_info(embedder).model_dump()
    # a run of a weights file knows neither loss nor defence
    said = checked.evaluation.model.model_dump(exclude_none=True)
    differ = {k: v for k, v in said.items() if v != here[k]}
    if differ:
        raise Refused(Problem(1, f"{RUN} model.{k}", f"says {v!r}, the model {here[k]!r}") for k, v in differ.items())
    return embedder


def _published(checked: Checked, path: Path) -> Embedder:
    """The registered model of another publisher, from its file in the publisher's own layout.

    Raises:
        Refused: another file, another record than the registry's, or the probe disagrees.
    """
    name, stated = checked.network, checked.submission.checkpoint.files[0].sha256
    if checked.submission.checkpoint.model_dump() != checkpoints()[name].model_dump():
        raise refuse(1, "submission.yaml checkpoint", f"is not what the registry says of {name!r}")
    try:
        embedder = open_model(name, ModelOptions(weights=str(path)))
    except DmlbenchError as error:
        raise refuse(1, WEIGHTS, str(error)) from None
    if embedder.weights_sha256 != stated:
        raise refuse(1, WEIGHTS, f"{path} is not the file that the run was made with (sha256 differs)")
    return embedder


def _described(checked: Checked) -> Embedder:
    """The untrained network of the submission's record; nothing is fetched, and its size is known before it is made.

    Raises:
        Refused: it is fed other images than the run's, cannot be built, or is too large.
    """
    card = checked.submission.checkpoint
    if "hf-hub:" in card.arch.builder:
        raise refuse(1, "submission.yaml checkpoint.arch.builder", f"{card.arch.builder!r} would be fetched from a hub")
    try:
        shape = preprocess_of(card.input).shape
    except DmlbenchError as error:
        raise refuse(1, "submission.yaml checkpoint.input", str(error)) from None
    held = {images.shape[1:] for images in checked.evaluation.sample.values() if images.ndim == 4}
    if shape not in held:
        text = f"says {_sides(shape)}, the run's images are {' or '.join(map(_sides, sorted(held))) or 'none'}"
        raise refuse(1, "submission.yaml checkpoint.input", f"{text} (channels, height, width)")
    for what, values in (("mean", card.normalize.mean), ("std", card.normalize.std)):
        if values is not None and len(values) not in (1, shape[0]):
            text = f"has {len(values)} values for images of {shape[0]} channel{'s' * (shape[0] != 1)}"
            raise refuse(1, f"submission.yaml checkpoint.normalize.{what}", text)
    try:
        embedder = build(card, checked.network)
    except DmlbenchError as error:
        raise refuse(1, "submission.yaml checkpoint.arch", str(error)) from None
    except Exception as error:  # what the record says is anybody's
        raise refuse(1, "submission.yaml checkpoint.arch", f"cannot be built: {first_line(error)}") from None
    count = parameter_count(embedder.network)
    if card.arch.n_params not in (None, count):
        raise refuse(
            1, "submission.yaml checkpoint.arch.n_params", f"says {card.arch.n_params}, the network has {count}"
        )
    return embedder


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _elsewhere(checked: Checked, weights: Path | None, fetch: bool) -> Path:
    """The weights where the bundle has none."""
    if weights is not None:
        if not weights.is_file():
            raise refuse(1, WEIGHTS, f"{weights} does not exist")
        return weights
    sha256 = checked.submission.checkpoint.files[0].sha256
    for file in checked.submission.checkpoint.files:
        if file.path is not None:
            folder = (PACKAGE / "weights").resolve()
            path = (folder / file.path).resolve()
            if not path.is_relative_to(folder):
                raise refuse(1, "submission.yaml checkpoint.files", f"{file.path!r} leaves the package")
            if path.is_file() and sha256_of(path) == sha256:
                return path
    file = checked.submission.checkpoint.files[0]
    if fetch and file.url is not None:
        if file.bytes is None or not 0 < file.bytes <= LIMITS[WEIGHTS]:
            text = f"is {file.bytes}; weights that are fetched say how many they have, at most {LIMITS[WEIGHTS]}"
            raise refuse(1, "submission.yaml checkpoint.files.0.bytes", text)
        try:
            return fetched(checked.submission.id, file)[0]
        except DataError as error:
            raise refuse(1, WEIGHTS, str(error)) from None
    raise refuse(1, WEIGHTS, "is not in the bundle and not in this package: name the file with --weights, or --fetch")


@dataclass(frozen=True)
class Rerun:
    """What attacking queries again gave."""

    what: str
    """what was attacked again, in words"""
    seed: int | None
    """of the choice of queries; None where all were"""
    headline: tuple[str, float] | None
    """the number that the board ranks by, of what was attacked again"""
    problems: tuple[Problem, ...]


def rerun_share(
    checked: Checked,
    embedder: Embedder,
    *,
    share: float = SHARE,
    least: int = LEAST,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Rerun:
    """Level 3: attack a random share of the queries again.

    Args:
        seed: which ones; by default the machine's own randomness, so that nobody knows beforehand.
    """
    dataset = dataset_of(checked, embedder, 3)
    chosen = secrets.randbits(32) if seed is None else seed
    draw = np.random.default_rng(chosen)
    kind = KINDS[checked.protocol.kind]
    if kind.share is not None:
        limit = checked.protocol.measured(len(dataset.query))
        subject = prepare(embedder, dataset, limit=limit, device=device)
        sentence, problems = kind.share(checked.stated, subject, draw, progress or Silent())
        return Rerun(sentence, chosen, None, tuple(problems))
    measured = measured_queries(len(dataset.query), checked.protocol.queries)
    count = min(len(measured), max(least, int(np.ceil(share * len(measured)))))
    picked = np.sort(draw.choice(measured, size=count, replace=False))
    rules = checked.protocol.model_copy(update={"audit": 0})  # a share is too few for it
    rules = kind.as_long(rules, checked.evaluation)
    return _rerun(checked, embedder, dataset, rules, 3, chosen, device, progress, picked.tolist())


def rerun_all(checked: Checked, embedder: Embedder, *, device: str = "auto", progress: Progress | None = None) -> Rerun:
    """Level 4: attack every query again."""
    dataset = dataset_of(checked, embedder, 4)
    return _rerun(checked, embedder, dataset, checked.protocol, 4, None, device, progress)


def _rerun(
    checked: Checked,
    embedder: Embedder,
    dataset: RetrievalDataset,
    rules: Protocol,
    level: int,
    seed: int | None,
    device: str,
    progress: Progress | None,
    only: Sequence[int] | None = None,
) -> Rerun:
    rerun = evaluate(embedder, dataset, rules, device=device, progress=progress, only=only)
    at = np.searchsorted(checked.evaluation.arrays["query"], rerun.arrays["query"])
    compare = KINDS[rules.kind].disagree or _disagreements
    problems = [*compare(checked.stated, rerun, at, level), *(_of_all(checked, rerun) if level == 4 else ())]
    sentence = f"attacked {len(at)} queries again"
    return Rerun(sentence, seed, headline(rerun), tuple(problems))


def _of_all(checked: Checked, rerun: Evaluation) -> Iterator[Problem]:
    """What all queries together say: doubts that the run does not have, and another cost of the searches than is stated."""
    stated, kind = {f.flag for f in checked.evaluation.warnings}, KINDS[checked.protocol.kind].name
    stated |= {"random"} if "randomised" in stated else set()
    for f in rerun.warnings:
        if f.flag not in stated:
            yield Problem(4, f"{RUN} warnings.{f.flag}", f"is missing; the run again says: {f.message}")
    first, second = (
        sum(n for key, n in e.extras.get(kind, {}).items() if key.startswith(("gradients_per_", "values_per_")))
        for e in (checked.evaluation, rerun)
    )
    if first != second and not (first and second and abs(np.log2(second / first)) <= OCTAVES):
        text = f"says {first:.1f} gradients and values for each that is attacked, it takes {second:.1f}"
        yield Problem(4, f"{RUN} extras.{kind}", text)


def _beside(checked: Stated, e: Evaluation, level: int) -> Iterator[tuple[str, np.ndarray]]:
    """What each query gives besides the parts' outcomes, by name, percent: other metrics of the parts, and of all queries which
    step broke them."""
    parts = {c.name for c in checked.parts}
    for name, (number, _) in KINDS[checked.rules.kind].arrays(checked.rules, checked.parts).items():
        if name.rpartition("/")[0] not in parts:
            continue
        if number == "f":
            yield name, e.arrays[name].astype(np.float64)
        elif name.endswith("/broken_by") and level == 4:
            yield from ((f"{name} {i + 2}", 100.0 * (e.arrays[name] == i + 2)) for i in range(len(checked.rules.steps)))


def _disagreements(checked: Stated, rerun: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Parts and all else that is a mean over the same queries, where it differs by more than :data:`AGREE` points, ERS and a kind's
    own numbers by half of that (a length by :data:`OCTAVES`), and its paired interval excludes zero."""
    stated, parts, kind = checked.evaluation, checked.parts, KINDS[checked.rules.kind]
    first, second = scored(parts, stated.arrays)[at], scored(parts, rerun.arrays)
    # single queries, not classes, are the unit: the model is the same, only rounding can differ
    single = np.arange(len(at))
    intervals = paired_intervals(first, second, single, [c.limits for c in parts], PERCENT)
    means = np.nanmean(second - first, axis=0)
    rows = [
        (f"{RUN} measurements.{c.name}", mean, ends, AGREE, "score")
        for c, mean, ends in zip(parts, means, intervals.columns, strict=True)
    ]
    if kind.mean:
        rows.append((f"{RUN} ers", float(means.mean()), intervals.mean, AGREE / 2, "ERS"))

    def row(field: str, sides: np.ndarray, allowed: float, of: str) -> None:
        """Of percentages (2, q)."""
        ends = paired_intervals(sides[0][:, None], sides[1][:, None], single, [PERCENT]).columns[0]
        rows.append((field, float(np.nanmean(sides[1] - sides[0])), ends, allowed, of))

    for (name, values), (_, again) in zip(_beside(checked, stated, level), _beside(checked, rerun, level), strict=True):
        row(f"{QUERIES} {name}", np.stack([values[at], again]), AGREE, name)
    before, after = kind.by_query(stated), kind.by_query(rerun)
    for number in kind.numbers:
        if number.name not in before or number.name not in after:
            continue
        sides = np.stack([before[number.name][at], after[number.name]])
        field = f"{RUN} extras.{kind.name}.{number.name}"
        if number.length:
            ends = paired_intervals(np.log2(sides[0])[:, None], np.log2(sides[1])[:, None], single, [ANY]).columns[0]
            octaves = float(np.nanmean(np.diff(np.log2(sides), axis=0)))
            if abs(octaves) > OCTAVES and _sure(ends):
                text = f"attacking {len(at)} queries again gave {2**octaves:.2f} times the {number.name} that is stated"
                yield Problem(level, field, text)
        if number.median:
            beyond = np.where(np.isnan(sides), np.nan, 100.0 * (sides > np.nanmedian(sides[0]) * (1 - LENGTHS_CLOSE)))
            row(field, beyond, AGREE, f"queries that are not below the stated {number.name}")
        if not (number.length or number.median):
            row(field, sides, AGREE / 2, number.name)
    for field, mean, ends, allowed, of in rows:
        if abs(mean) > allowed and _sure(ends):
            yield Problem(level, field, _deviation(mean, len(at), f"points of {of}"))


def _sure(ends: Ends) -> bool:
    """Whether zero is no part of the interval; where there is none, nothing says that it is."""
    return ends is None or ends[0] > 0 or ends[1] < 0


def _deviation(mean: float, queries: int, unit: str) -> str:
    return f"attacking {queries} queries again gave {mean:+.2f} {unit} over what is stated"


class Verification(BaseModel):
    """``verification.json``: what a full rerun gave. It speaks of the bundle with that manifest and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    bundle_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    agreed: bool
    ers_stated: float | None
    ers_measured: float | None
    headline: str | None = None
    """what a protocol without an ERS is ranked by: its column on the board, and ..."""
    stated: float | None = None
    measured: float | None = None
    problems: tuple[str, ...] = ()
    dmlbench: str
    torch: str
    device: str
    date: str

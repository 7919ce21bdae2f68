"""Levels 1, 3 and 4: the model is loaded and made to do again what the bundle says it did.

1 the weights fit the architecture and the probe agrees; 3 a random share of the queries is attacked
again, or under a clustering protocol, where a share of the images would cluster otherwise, all of them
by one attack that is drawn; 4 all of it. Level 2 is in ``replay.py``.
"""

import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dmlbench.board.row import headline
from dmlbench.checkpoints import PACKAGE, sha256_of
from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.datasets import RetrievalDataset
from dmlbench.doubts.audit import GLANCES
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, DmlbenchError
from dmlbench.evaluate import evaluate
from dmlbench.fast.exact import true_float32
from dmlbench.intervals import ANY, PERCENT, paired_intervals
from dmlbench.kinds import clustering, strict
from dmlbench.models import build, check_probe, fill, parameter_count
from dmlbench.models.fetching import fetch as fetched
from dmlbench.models.spec import preprocess_of
from dmlbench.protocol import Component, Protocol, Step, scored
from dmlbench.results import Evaluation
from dmlbench.run.subject import Progress, Silent, Subject, measured_queries, prepare
from dmlbench.submission.bundle import LIMITS, Problem, refuse
from dmlbench.submission.replay import AGREE, clusters_differ, dataset_of
from dmlbench.submission.static import RUN, WEIGHTS, Checked

OCTAVES = 0.125
"""How far the smallest eps may differ on a log scale with base 2: one step between two eps that are asked about."""
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

    card, stated = checked.submission.checkpoint, checked.submission.stated
    raw = checked.bundle.files.get(WEIGHTS)
    if raw is None:
        raw = _elsewhere(checked, weights, fetch).read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != stated.weights_sha256:
        raise refuse(1, WEIGHTS, f"has sha256 {found[:12]}…, the run was made with {stated.weights_sha256[:12]}…")
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
    embedder.card, embedder.weights_sha256 = card, stated.weights_sha256
    try:
        check_probe(embedder, card, checked.submission.id)
    except DataError as error:
        raise refuse(1, "submission.yaml checkpoint.probe", str(error)) from None
    except Exception as error:  # a network says in any way that it does not take its own images
        said = f"cannot be compared, the network does not take images of {_sides(embedder.input_shape)}: {_line(error)}"
        raise refuse(1, "submission.yaml checkpoint.probe", said) from None
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
        said = f"says {_sides(shape)}, the run's images are {' or '.join(map(_sides, sorted(held))) or 'none'}"
        raise refuse(1, "submission.yaml checkpoint.input", f"{said} (channels, height, width)")
    for what, values in (("mean", card.normalize.mean), ("std", card.normalize.std)):
        if values is not None and len(values) not in (1, shape[0]):
            said = f"has {len(values)} values for images of {shape[0]} channel{'s' * (shape[0] != 1)}"
            raise refuse(1, f"submission.yaml checkpoint.normalize.{what}", said)
    try:
        embedder = build(card, checked.evaluation.model.id)
    except DmlbenchError as error:
        raise refuse(1, "submission.yaml checkpoint.arch", str(error)) from None
    except Exception as error:  # what the record says is anybody's
        raise refuse(1, "submission.yaml checkpoint.arch", f"cannot be built: {_line(error)}") from None
    count = parameter_count(embedder.network)
    if card.arch.n_params not in (None, count):
        raise refuse(
            1, "submission.yaml checkpoint.arch.n_params", f"says {card.arch.n_params}, the network has {count}"
        )
    return embedder


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _elsewhere(checked: Checked, weights: Path | None, fetch: bool) -> Path:
    """The weights where the bundle has none."""
    if weights is not None:
        if not weights.is_file():
            raise refuse(1, WEIGHTS, f"{weights} does not exist")
        return weights
    wanted = checked.submission.stated.weights_sha256
    for file in checked.submission.checkpoint.files:
        if file.path is not None:
            folder = (PACKAGE / "weights").resolve()
            path = (folder / file.path).resolve()
            if not path.is_relative_to(folder):
                raise refuse(1, "submission.yaml checkpoint.files", f"{file.path!r} leaves the package")
            if path.is_file() and sha256_of(path) == wanted:
                return path
    file = checked.submission.checkpoint.files[0]
    if fetch and file.url is not None:
        if file.bytes is None or not 0 < file.bytes <= LIMITS[WEIGHTS]:
            said = f"is {file.bytes}; weights that are fetched say how many they have, at most {LIMITS[WEIGHTS]}"
            raise refuse(1, "submission.yaml checkpoint.files.0.bytes", said)
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
    if checked.protocol.kind == "clustering":
        part = checked.parts[draw.integers(len(checked.parts))]
        return _one_cluster_attack(checked, prepare(embedder, dataset, device=device), part, chosen, progress)
    measured = dataset.query[measured_queries(len(dataset.query), checked.protocol.queries)]
    count = min(len(measured), max(least, int(np.ceil(share * len(measured)))))
    picked = np.sort(draw.choice(measured, size=count, replace=False))
    few = dataclasses.replace(dataset, query=picked)
    rules = checked.protocol.model_copy(update={"audit": 0})  # a share is too few for it
    rules = rules.model_copy(update={"steps": _as_long(rules, checked.evaluation)})
    return _rerun(checked, embedder, few, rules, 3, chosen, device, progress)


def _as_long(rules: Protocol, stated: Evaluation) -> tuple[Step, ...]:
    """The protocol's steps, with as many rounds as the run took at the most: some queries do not say when all have had enough."""
    curve = stated.extras.get("strict", {}).get("curve", [])
    out = []
    for index, step in enumerate(rules.steps):
        if step.rounds > 1:
            most = max([2, *(len(row["steps"][index]["rounds"]) for row in curve)])
            step = step.model_copy(update={"rounds": most, "fewest": most})
        out.append(step)
    return tuple(out)


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
) -> Rerun:
    found = evaluate(embedder, dataset, rules, device=device, progress=progress)
    at = np.searchsorted(checked.evaluation.arrays["query"], found.arrays["query"])
    compare = _cluster_disagreements if rules.kind == "clustering" else _disagreements
    problems = [*compare(checked, found, at, level), *(_new_flags(checked, found) if level == 4 else ())]
    said = f"attacked {len(at)} queries again"
    return Rerun(said, seed, headline(found), tuple(problems))


@true_float32()
def _one_cluster_attack(
    checked: Checked, subject: Subject, part: Component, seed: int, progress: Progress | None
) -> Rerun:
    """One attack at one eps on all images, and its clusters."""
    rules, labels, progress = checked.protocol, subject.scene.labels.cpu().numpy(), progress or Silent()
    own = clustering.groups(subject, rules)

    def again(part: Component) -> dict[str, np.ndarray]:
        if CLUSTER_ATTACKS[part.attack].way == "union":
            return clustering.union(subject, rules, own[True], list(map(again, clustering.before(checked.parts, part))))
        progress.start(part.name, len(labels) * rules.threat_of(part).steps * clustering.restarts(rules, part))
        return clustering.measured(subject, rules, part, own, rules.seed, partial(progress.advance, part.name))[1]

    found = again(part)
    problems = clusters_differ(3, part.name, checked.evaluation, found, labels)
    return Rerun(f"attacked all {len(labels)} images again by {part.name}", seed, None, tuple(problems))


def _cluster_disagreements(checked: Checked, found: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Attacks whose clusters are not the stated ones within the tolerance."""
    for name in ("clustering/clean", *(c.name for c in checked.parts)):
        again = {key: found.arrays[f"{name}/{key}"] for key in ("clusters", "value")}
        yield from clusters_differ(level, name, checked.evaluation, again, checked.evaluation.arrays["label"][at])


def _new_flags(checked: Checked, found: Evaluation) -> Iterator[Problem]:
    """What the audit, or the look that every result is given, doubts now and did not doubt in the run."""
    stated = {f.flag for f in checked.evaluation.warnings}
    stated |= {"random"} if "randomised" in stated else set()
    for f in found.warnings:
        if (f.flag.startswith("audit-") or f.flag in GLANCES) and f.flag not in stated:
            yield Problem(4, f"{RUN} warnings.{f.flag}", f"is missing; the audit says again: {f.message}")


def _disagreements(checked: Checked, found: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Parts (and ERS, or the area of the worst-case curve, or the smallest eps) whose mean over the same queries differs by
    more than :data:`AGREE` points (:data:`OCTAVES`) and whose paired interval excludes zero."""
    stated, rules, parts = checked.evaluation, checked.protocol, checked.parts
    first, second = scored(parts, stated.arrays)[at], scored(parts, found.arrays)
    # single queries, not classes, are the unit: the model is the same, only rounding can differ
    single = np.arange(len(at))
    intervals = paired_intervals(first, second, single, [c.limits for c in parts], PERCENT)
    means = np.nanmean(second - first, axis=0)
    whole, ends, name, unit = float(means.mean()), intervals.mean, "ers", "ERS"
    if rules.threshold is not None:
        largest = rules.threat_of(parts[-1]).radius
        smallest = [  # beyond the largest counts as a little more than that
            np.log2(np.minimum(e.arrays[strict.SMALLEST][rows], largest * 2**OCTAVES))
            for e, rows in ((stated, at), (found, np.arange(len(at))))
        ]
        ends = paired_intervals(smallest[0][:, None], smallest[1][:, None], single, [ANY]).columns[0]
        whole = float(np.nanmean(smallest[1] - smallest[0]))
        if abs(whole) > OCTAVES and (ends is None or ends[0] > 0 or ends[1] < 0):
            said = f"attacking {len(at)} queries again gave {2**whole:.2f} times the smallest eps that is stated"
            yield Problem(level, f"{RUN} extras.strict.smallest_eps", said)
    if rules.kind == "strict" and rules.threshold is None:
        radii = [0.0, *(rules.threat_of(c).radius for c in parts)]
        share = np.array([strict.area(radii, [0.0, *one]) for one in np.eye(len(parts))])  # the area is linear
        of_area = paired_intervals((first @ share)[:, None], (second @ share)[:, None], single, [PERCENT]).columns[0]
        whole, ends, name, unit = float(means @ share), of_area, "extras.strict.area", "the area"
    rows = [
        (f"measurements.{c.name}", mean, of_part, AGREE, "score")
        for c, mean, of_part in zip(parts, means, intervals.columns, strict=True)
    ]
    if rules.threshold is None:
        rows.append((name, whole, ends, AGREE / 2, unit))
    for field, mean, found_ends, allowed, of in rows:
        if abs(mean) > allowed and (found_ends is None or found_ends[0] > 0 or found_ends[1] < 0):
            yield Problem(level, f"{RUN} {field}", _said(mean, len(at), f"points of {of}"))


def _said(mean: float, queries: int, unit: str) -> str:
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

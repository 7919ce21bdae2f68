"""Levels 1 to 4: the model is loaded and made to do again what the bundle says it did.

1 the weights fit the architecture and the probe agrees; 2 the stored adversarial images lie where they
must and score the same, and the clean outcomes come out again; 3 a random share of the queries is
attacked again; 4 all of them.
"""

import dataclasses
import hashlib
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from dmlbench.attacks import ATTACKS, measure
from dmlbench.checkpoints import PACKAGE, sha256_of
from dmlbench.datasets import RetrievalDataset, load_dataset
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, DmlbenchError
from dmlbench.evaluate import evaluate
from dmlbench.intervals import cluster_bootstrap
from dmlbench.metrics import RECALL_AT, agreement, assignments, retrieval
from dmlbench.models import build, check_probe, fill, parameter_count
from dmlbench.protocol import Component
from dmlbench.results import Evaluation
from dmlbench.search import aimed, searches
from dmlbench.subject import Progress, Subject, prepare, sample_positions
from dmlbench.submission.bundle import LEAST_SAMPLE, Problem, Refused, refuse
from dmlbench.submission.static import QUERIES, RUN, SAMPLE, WEIGHTS, Checked
from dmlbench.threat import Threat

MOST_PARAMETERS = 2_000_000_000
SHARE = 0.05
"""Share of the queries that level 3 attacks again ..."""
LEAST = 64
"""... and how many at the least."""
AGREE = 1.0
"""Points by which a mean over rerun queries may always differ: other hardware rounds otherwise, and 32
signed steps turn rounding into other pixels."""
DIFFER = 0.02
"""Share of replayed outcomes that may differ (a tie broken by rounding); one always may."""


def load_submitted(checked: Checked, weights: Path | None = None) -> Embedder:
    """Level 1: the model, from the bundle's weights, the registry's or a named file.

    Raises:
        Refused: no weights, another hash, not safetensors, another architecture, or the probe disagrees.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    card, stated = checked.submission.checkpoint, checked.submission.stated
    raw = checked.bundle.files.get(WEIGHTS)
    if raw is None:
        raw = _elsewhere(checked, weights).read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != stated.weights_sha256:
        raise refuse(1, WEIGHTS, f"has sha256 {found[:12]}…, the run was made with {stated.weights_sha256[:12]}…")
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise refuse(1, WEIGHTS, f"is not a readable safetensors file: {error}") from None
    try:
        with torch.device("meta"):
            count = parameter_count(build(card, checked.submission.id).network)
    except DmlbenchError as error:
        raise refuse(1, "submission.yaml checkpoint.arch", str(error)) from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(1, "submission.yaml checkpoint.arch", f"cannot be built: {error}") from None
    if count > MOST_PARAMETERS:
        raise refuse(1, "submission.yaml checkpoint.arch", f"has {count} parameters, at most {MOST_PARAMETERS}")
    if card.arch.n_params not in (None, count):
        raise refuse(
            1, "submission.yaml checkpoint.arch.n_params", f"says {card.arch.n_params}, the network has {count}"
        )
    embedder = build(card, checked.evaluation.model.id)
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
    return embedder


def _elsewhere(checked: Checked, weights: Path | None) -> Path:
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
    raise refuse(1, WEIGHTS, "is not in the bundle and not in this package: name the file with --weights")


def dataset_of(checked: Checked, level: int) -> RetrievalDataset:
    """The images, which must be those of the run.

    Raises:
        DataError: they are not on this machine. Refused: they are others.
    """
    d = checked.evaluation.dataset
    dataset = load_dataset(d.name, d.split)
    if dataset.sha256 != d.sha256:
        raise refuse(
            level, f"{RUN} dataset.sha256", f"{d.sha256[:12]}…, data set {d.name!r} here is {dataset.sha256[:12]}…"
        )
    return dataset


def replay(checked: Checked, embedder: Embedder, device: str = "auto") -> None:
    """Level 2: look at the stored adversarial images again.

    Raises:
        Refused: an image outside the ball or [0, 1], a norm or an outcome that is not the stated one.
    """
    e, rules = checked.evaluation, checked.protocol
    dataset = dataset_of(checked, 2)
    subject = prepare(embedder, dataset, device=device)
    if not np.array_equal(subject.rows, e.arrays["query"]):
        raise refuse(2, f"{QUERIES} query", "are not the queries of the data set, in its order")
    problems = list(_clean_problems(e, subject, rules.clustering_seeds))
    keep = sample_positions(subject, max(LEAST_SAMPLE, len(e.sample["rows"])))
    if not np.array_equal(e.sample["rows"], subject.rows[keep]):
        raise refuse(2, f"{SAMPLE} rows", f"are not the fixed sample of queries, or its first {LEAST_SAMPLE} or more")
    for search in searches(rules, rules.components):
        scene = aimed(subject, search, rules.seed)[torch.from_numpy(keep).to(subject.device)]
        clean = subject.dataset.images[subject.rows[keep]].to(subject.device)
        for c in search.components:
            images = e.sample.get(c.name)
            if images is None or images.shape != tuple(clean.shape) or images.dtype != np.float32:
                problems.append(
                    Problem(2, f"{SAMPLE} {c.name}", f"is not float32 images of shape {tuple(clean.shape)}")
                )
                continue
            adversarial = torch.from_numpy(images.copy()).to(subject.device)
            if reason := _outside(adversarial, clean, search.threat):
                problems.append(Problem(2, f"{SAMPLE} {c.name}", reason))
                continue
            found = measure(subject.embedder, ATTACKS[search.attack], search.threat, adversarial, clean, scene)
            problems += _replay_problems(e, c, found, keep)
    if problems:
        raise Refused(problems)


def _outside(adversarial: torch.Tensor, clean: torch.Tensor, threat: Threat) -> str | None:
    flat = adversarial.flatten(1)
    if not bool(torch.isfinite(flat).all()):
        return "holds pixels that are NaN or infinite"
    if float(flat.min()) < -1e-5 or float(flat.max()) > 1 + 1e-5:
        return f"holds pixels outside [0, 1]: {float(flat.min()):.4f} to {float(flat.max()):.4f}"
    inside = threat.contains(adversarial, clean)
    if not bool(inside.all()):
        far = float(threat.ball.size(adversarial - clean).max())
        return f"{int((~inside).sum())} images are outside the {threat.norm} ball of {threat.eps} (up to {far:.4f})"
    return None


def _replay_problems(
    e: Evaluation, c: Component, found: Mapping[str, np.ndarray], keep: np.ndarray
) -> Iterator[Problem]:
    stated = e.arrays[f"{c.name}/value"][keep].astype(np.float64)
    again = found[c.readout].astype(np.float64)
    points = np.abs(c.rescale(stated) - c.rescale(again))
    differing = (np.isnan(stated) != np.isnan(again)) | (points > AGREE)
    if differing.sum() > max(1, DIFFER * len(keep)):
        said = f"{int(differing.sum())} of {len(keep)} stored images score otherwise than stated"
        yield Problem(2, f"{QUERIES} {c.name}/value", said)
    if np.abs(found["norm"] - e.arrays[f"{c.name}/norm"][keep]).max() > 1e-4:
        yield Problem(2, f"{QUERIES} {c.name}/norm", "are not the norms of the stored images")


def _clean_problems(e: Evaluation, subject: Subject, seeds: tuple[int, ...]) -> Iterator[Problem]:
    """The clean outcomes of every query, and the clustering metrics."""
    for name, values in retrieval(subject.scene, RECALL_AT).items():
        stated = e.arrays[f"benign/{name}"].astype(np.float64)
        differing = (np.isnan(stated) != np.isnan(values)) | (np.abs(stated - values) > AGREE)
        if differing.mean() > DIFFER:
            said = f"{int(differing.sum())} of {len(stated)} queries have another clean outcome than stated"
            yield Problem(2, f"{QUERIES} benign/{name}", said)
    gallery = subject.scene.gallery
    labels = gallery.labels.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = agreement(labels, assignments(gallery.embeddings.cpu().numpy(), len(np.unique(labels)), seeds))
    for name, value in found.items():
        if abs(value - e.benign.get(name, value)) > 3 * AGREE:
            yield Problem(2, f"{RUN} benign.{name}", f"says {e.benign[name]:.2f}, k-means here gives {value:.2f}")


@dataclass(frozen=True)
class Rerun:
    """What attacking queries again gave."""

    queries: int
    seed: int | None
    """of the choice of queries; None where all were"""
    ers: float | None
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
    dataset = dataset_of(checked, 3)
    chosen = secrets.randbits(32) if seed is None else seed
    count = min(len(dataset.query), max(least, int(np.ceil(share * len(dataset.query)))))
    picked = np.sort(np.random.default_rng(chosen).choice(dataset.query, size=count, replace=False))
    return _rerun(checked, embedder, dataclasses.replace(dataset, query=picked), 3, chosen, device, progress)


def rerun_all(checked: Checked, embedder: Embedder, *, device: str = "auto", progress: Progress | None = None) -> Rerun:
    """Level 4: attack every query again."""
    return _rerun(checked, embedder, dataset_of(checked, 4), 4, None, device, progress)


def _rerun(
    checked: Checked,
    embedder: Embedder,
    dataset: RetrievalDataset,
    level: int,
    seed: int | None,
    device: str,
    progress: Progress | None,
) -> Rerun:
    found = evaluate(embedder, dataset, checked.protocol, device=device, progress=progress)
    at = np.searchsorted(checked.evaluation.arrays["query"], found.arrays["query"])
    return Rerun(len(at), seed, found.ers, tuple(_disagreements(checked, found, at, level)))


def _disagreements(checked: Checked, found: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Parts (and ERS) whose mean over the same queries differs by more than :data:`AGREE` points and whose
    paired interval excludes zero."""
    stated, rules = checked.evaluation, checked.protocol
    sides = [
        np.stack([c.rescale(e.arrays[f"{c.name}/value"][rows].astype(np.float64)) for c in rules.components], axis=1)
        for e, rows in ((stated, at), (found, np.arange(len(at))))
    ]
    difference = sides[1] - sides[0]
    # single queries, not classes, are the unit: the model is the same, only rounding can differ
    intervals = cluster_bootstrap(difference, np.arange(len(at)))
    means = np.nanmean(difference, axis=0)
    for c, mean, ends in zip(rules.components, means, intervals.columns, strict=True):
        if abs(mean) > AGREE and (ends is None or ends[0] > 0 or ends[1] < 0):
            yield Problem(level, f"{RUN} measurements.{c.name}", _said(mean, len(at), "points of score"))
    whole, ends = float(means.mean()), intervals.mean
    if abs(whole) > AGREE / 2 and (ends is None or ends[0] > 0 or ends[1] < 0):
        yield Problem(level, f"{RUN} ers", _said(whole, len(at), "points of ERS"))


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
    problems: tuple[str, ...] = ()
    dmlbench: str
    torch: str
    device: str
    date: str

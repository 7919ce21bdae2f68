"""Level 2: the stored adversarial images are looked at again, and everything clean is measured again.

What an image shows is another thing for each kind of protocol, whose record says it.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from dmlbench.datasets import RetrievalDataset, load_dataset
from dmlbench.doubts.checks import doubts_about
from dmlbench.embedding import Embedder
from dmlbench.errors import Problem
from dmlbench.kinds.base import AGREE, CLUSTERS_AGREE, DIFFER, QUERIES, RUN, SAMPLE, StoredSample
from dmlbench.kinds.table import KINDS
from dmlbench.metrics import OF_THE_GALLERY, RECALL_AT, agreement, assignments, retrieval
from dmlbench.results import Evaluation
from dmlbench.run.record import dataset_info
from dmlbench.run.subject import Subject, prepare, sample_positions
from dmlbench.submission.bundle import Refused, refuse
from dmlbench.submission.kept import least_sample
from dmlbench.submission.static import Checked
from dmlbench.threat import Threat


def dataset_of(checked: Checked, embedder: Embedder, level: int) -> RetrievalDataset:
    """The images, which must be those of the run.

    Raises:
        DataError: they are not on this machine. Refused: they are others.
    """
    d = checked.evaluation.dataset
    dataset = load_dataset(d.name, d.split, embedder.preprocess)
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
    dataset = dataset_of(checked, embedder, 2)
    subject = prepare(embedder, dataset, limit=rules.measured(len(dataset.query)), device=device)
    if not np.array_equal(subject.rows, e.arrays["query"]):
        raise refuse(2, f"{QUERIES} query", "are not the queries of the data set, in its order")
    if not np.array_equal(dataset.labels[subject.rows], e.arrays["label"]):
        raise refuse(2, f"{QUERIES} label", "are not the classes of the data set")
    problems = [*_record_problems(e, subject), *_clean_problems(e, subject, rules.clustering_seeds)]
    least = least_sample(e, dataset.images.shape)
    keep = sample_positions(subject, max(least, len(e.sample["rows"])))
    if not np.array_equal(e.sample["rows"], subject.rows[keep]):
        raise refuse(2, f"{SAMPLE} rows", f"are not the fixed sample of queries, or its first {least} or more")
    if not len(keep):
        if problems:
            raise Refused(problems)
        return
    clean = subject.dataset.images[subject.rows[keep]].to(subject.device)
    images = list(_image_problems(checked, clean, keep)) if KINDS[rules.kind].moved else []
    problems += images
    sound = not any(p.field.startswith(SAMPLE) for p in images)
    if sound:  # no image outside its ball is embedded
        problems += KINDS[rules.kind].replay(checked.stated, StoredSample(subject, keep, clean))
    if problems:
        raise Refused(problems)


def _record_problems(e: Evaluation, subject: Subject) -> Iterator[Problem]:
    """Counts that are not those of the data set, and doubts that the clean embeddings raise and the run does not have."""
    here = dataset_info(subject).model_dump()
    for name, value in e.dataset.model_dump().items():
        if value != here[name]:
            yield Problem(2, f"{RUN} dataset.{name}", f"says {value}, it is {here[name]}")
    stated = {f.flag for f in e.warnings}
    for f in doubts_about(subject, e.measurements):
        if f.flag not in stated:
            yield Problem(2, f"{RUN} warnings.{f.flag}", f"is missing; looked at again: {f.message}")


def _image_problems(checked: Checked, clean: torch.Tensor, keep: np.ndarray) -> Iterator[Problem]:
    """Are the stored images there, in the ball and in [0, 1], and as far away as stated?"""
    e, rules = checked.evaluation, checked.protocol
    for c in checked.parts:
        images, threat = e.sample.get(c.name), rules.threat_of(c)
        if images is None or images.shape != tuple(clean.shape) or images.dtype != np.float32:
            yield Problem(2, f"{SAMPLE} {c.name}", f"is not float32 images of shape {tuple(clean.shape)}")
            continue
        adversarial = torch.from_numpy(images.copy()).to(clean.device)
        if reason := _outside(adversarial, clean, threat):
            yield Problem(2, f"{SAMPLE} {c.name}", reason)
        elif (
            np.abs(threat.ball.size(adversarial - clean).cpu().numpy() - e.arrays[f"{c.name}/norm"][keep]).max() > 1e-4
        ):
            yield Problem(2, f"{QUERIES} {c.name}/norm", "are not the norms of the stored images")


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


def _clean_problems(e: Evaluation, subject: Subject, seeds: tuple[int, ...]) -> Iterator[Problem]:
    """The clean outcomes of every query, and the clustering metrics."""
    metrics = retrieval(subject.scene, RECALL_AT, grouped=subject.dataset.grouped)
    for name in sorted(metrics.keys() ^ (e.benign.keys() - set(OF_THE_GALLERY))):
        text = "is missing" if name in metrics else f"is not read of data set {e.dataset.name!r}, which has no groups"
        yield Problem(2, f"{RUN} benign.{name}", text)
    for name, values in metrics.items():
        if name not in e.benign:
            continue
        stated = e.arrays[f"benign/{name}"].astype(np.float64)
        missing = np.isnan(stated) != np.isnan(values)
        differing = missing | (np.abs(stated - values) > AGREE)
        if missing.any() or differing.mean() > DIFFER:
            text = f"{int(differing.sum())} of {len(stated)} queries have another clean outcome than stated"
            yield Problem(2, f"{QUERIES} benign/{name}", text)
        elif abs(off := float(np.nanmean(stated) - np.nanmean(values))) > AGREE:
            yield Problem(2, f"{QUERIES} benign/{name}", f"have a mean {off:+.2f} points from what is measured here")
    gallery = subject.scene.gallery
    labels = gallery.labels[gallery.classed].cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        clusters = agreement(
            labels, assignments(gallery.embeddings[gallery.classed].cpu().numpy(), len(np.unique(labels)), seeds)
        )
    for name, value in clusters.items():
        if abs(value - e.benign.get(name, value)) > CLUSTERS_AGREE:
            yield Problem(2, f"{RUN} benign.{name}", f"says {e.benign[name]:.2f}, k-means here gives {value:.2f}")

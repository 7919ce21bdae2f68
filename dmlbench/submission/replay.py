"""Level 2: the stored adversarial images are looked at again, and everything clean is measured again.

Under a strict protocol each stored image is the one that a query's last search stopped at, so it shows
whether the query was broken. Under a clustering protocol an image's outcome hangs on where all others
went, so only ball, range and norm can be seen of an attacked one, and the clean clusters are made again.
"""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from dmlbench.attacks import ATTACKS, measure
from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.datasets import RetrievalDataset, load_dataset
from dmlbench.embedding import Embedder
from dmlbench.kinds import clustering, strict
from dmlbench.metrics import RECALL_AT, agreement, assignments, retrieval
from dmlbench.protocol import Component
from dmlbench.results import Evaluation
from dmlbench.run.search import aimed, searches
from dmlbench.run.subject import Subject, prepare, sample_positions
from dmlbench.submission.bundle import LEAST_SAMPLE, Problem, Refused, refuse
from dmlbench.submission.static import QUERIES, RUN, SAMPLE, Checked
from dmlbench.threat import Threat

AGREE = 1.0
"""Points by which a mean over rerun queries may always differ: other hardware rounds otherwise, and 32
signed steps turn rounding into other pixels."""
CLUSTERS_AGREE = 3.0
"""The same of NMI and AMI: k-means falls otherwise where points have moved by a rounding."""
RECALL_AGREE = 2.0
"""The same of R@1 within an attacked set, where every image moves and not the query alone."""
DIFFER = 0.02
"""Share of replayed outcomes that may differ (a tie broken by rounding); one always may."""


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
    subject = prepare(embedder, dataset, device=device)
    if not np.array_equal(subject.rows, e.arrays["query"]):
        raise refuse(2, f"{QUERIES} query", "are not the queries of the data set, in its order")
    problems = list(_clean_problems(e, subject, rules.clustering_seeds))
    keep = sample_positions(subject, max(LEAST_SAMPLE, len(e.sample["rows"])))
    if not np.array_equal(e.sample["rows"], subject.rows[keep]):
        raise refuse(2, f"{SAMPLE} rows", f"are not the fixed sample of queries, or its first {LEAST_SAMPLE} or more")
    clean = subject.dataset.images[subject.rows[keep]].to(subject.device)
    images = list(_image_problems(checked, clean, keep))
    problems += images
    sound = not any(p.field.startswith(SAMPLE) for p in images)
    if rules.kind == "clustering" and sound:
        problems += _cluster_problems(checked, subject)
    elif sound:  # no image outside its ball is embedded
        look = _strict_problems if rules.kind == "strict" else _part_problems
        problems += look(checked, subject, clean, keep)
    if problems:
        raise Refused(problems)


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


def _part_problems(checked: Checked, subject: Subject, clean: torch.Tensor, keep: np.ndarray) -> Iterator[Problem]:
    """Do the stored images of each attack score the same?"""
    e, rules = checked.evaluation, checked.protocol
    for search in searches(rules, rules.components):
        scene = aimed(subject, search, rules.seed)[torch.from_numpy(keep).to(subject.device)]
        for c in search.components:
            adversarial = torch.from_numpy(e.sample[c.name].copy()).to(subject.device)
            found = measure(subject.embedder, ATTACKS[search.attack], search.threat, adversarial, clean, scene)
            yield from _replay_problems(e, c, found, keep)


def _strict_problems(checked: Checked, subject: Subject, clean: torch.Tensor, keep: np.ndarray) -> Iterator[Problem]:
    """Is each stored image misranked exactly where its query is broken, and the last of a smaller eps where that
    broke it? R@2 to MAP@R are the lowest over all searches, so never above those of the stored image."""
    e, rules = checked.evaluation, checked.protocol
    scene = subject.scene[torch.from_numpy(keep).to(subject.device)]
    before: np.ndarray | None = None
    for c in checked.parts:
        images, by = e.sample[c.name], e.arrays[f"{c.name}/broken_by"][keep]
        if before is not None:
            changed = (by == strict.CARRIED) & (images != before).reshape(len(images), -1).any(1)
            if changed.any():
                said = f"{int(changed.sum())} images are not those of the smaller eps that broke the query"
                yield Problem(2, f"{SAMPLE} {c.name}", said)
        before = images
        found = strict.read(subject, scene, rules.threat_of(c), torch.from_numpy(images.copy()).to(clean.device), clean)
        yield from _replay_problems(e, c, found, keep)
        for proxy in strict.PROXIES:
            above = e.arrays[f"{c.name}/{proxy}"][keep] > found[proxy] + AGREE
            if above.sum() > max(1, DIFFER * len(keep)):
                said = f"{int(above.sum())} of {len(keep)} stored images score lower than stated"
                yield Problem(2, f"{QUERIES} {c.name}/{proxy}", said)


def _cluster_problems(checked: Checked, subject: Subject) -> Iterator[Problem]:
    """The clusters of the clean embeddings, and R@1 among them; the images of a union are those that it chose."""
    e, labels = checked.evaluation, subject.scene.labels.cpu().numpy()
    found = clustering.readings(subject, subject.scene.clean, labels, checked.protocol.clustering_seeds)
    yield from clusters_differ(2, "clustering/clean", e, found, labels)
    kept = np.isin(e.arrays["query"], e.sample["rows"])
    for c in checked.parts:
        if CLUSTER_ATTACKS[c.attack].way == "union":
            others = np.stack([e.sample[other.name] for other in clustering.before(checked.parts, c)])
            wanted = others[e.arrays[f"{c.name}/choice"][kept], np.arange(others.shape[1])]
            if not np.array_equal(wanted, e.sample[c.name]):
                yield Problem(2, f"{SAMPLE} {c.name}", "holds other images than those that were chosen")


def clusters_differ(
    level: int, name: str, e: Evaluation, found: Mapping[str, np.ndarray], labels: np.ndarray
) -> Iterator[Problem]:
    """Numbers of one set of clusters that are not the stated ones within the tolerance."""
    stated, again = (
        clustering.numbers(labels, arrays["clusters"], arrays["value"])
        for arrays in ({k: e.arrays[f"{name}/{k}"] for k in ("clusters", "value")}, found)
    )
    for key, allowed in (("nmi", CLUSTERS_AGREE), ("ami", CLUSTERS_AGREE), ("recall_at_1", RECALL_AGREE)):
        if not abs(again[key] - stated[key]) <= allowed:
            file = f"{QUERIES} {name}/{'value' if key == 'recall_at_1' else 'clusters'}"
            said = (
                f"give {key} {stated[key]:.2f}, measured again it is {again[key]:.2f} ({allowed:g} points are allowed)"
            )
            yield Problem(level, file, said)


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


def _clean_problems(e: Evaluation, subject: Subject, seeds: tuple[int, ...]) -> Iterator[Problem]:
    """The clean outcomes of every query, and the clustering metrics."""
    for name, values in retrieval(subject.scene, RECALL_AT).items():
        stated = e.arrays[f"benign/{name}"].astype(np.float64)
        differing = (np.isnan(stated) != np.isnan(values)) | (np.abs(stated - values) > AGREE)
        if differing.mean() > DIFFER:
            said = f"{int(differing.sum())} of {len(stated)} queries have another clean outcome than stated"
            yield Problem(2, f"{QUERIES} benign/{name}", said)
    gallery = subject.scene.gallery
    labels = gallery.labels[gallery.classed].cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = agreement(
            labels, assignments(gallery.embeddings[gallery.classed].cpu().numpy(), len(np.unique(labels)), seeds)
        )
    for name, value in found.items():
        if abs(value - e.benign.get(name, value)) > CLUSTERS_AGREE:
            yield Problem(2, f"{RUN} benign.{name}", f"says {e.benign[name]:.2f}, k-means here gives {value:.2f}")

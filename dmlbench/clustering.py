"""Clustering when every image is perturbed: k-means on attacked embeddings (after Ke, arXiv 2501.01025).

All measured images are moved, then k-means with as many clusters as there are classes runs on what the
model makes of them. An objective here sees a :class:`~dmlbench.scene.Scene` whose gallery is the class
centroids, ``row`` the image's own class and ``chosen`` a wrong one drawn for it. C1 to C3 know the
labels; U1 to U3 are the same with the clusters of the clean embeddings in place of labels. NMI of many
small clusters is far from 0 for random ones, so AMI stands beside it. No objective is best everywhere,
so what counts is the lowest NMI and the lowest AMI over C1 to C3 (docs/strict.md).
The text of the paper was not at hand; the objectives are our own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.embedding import require_finite
from dmlbench.errors import UsageError
from dmlbench.metrics import agreement, assignments, kmeans, mean, retrieval
from dmlbench.objectives import Objective
from dmlbench.optimizers import autograd, watched
from dmlbench.outcome import Outcome
from dmlbench.protocol import Component, Protocol
from dmlbench.registry import Registry
from dmlbench.scene import Gallery, Scene
from dmlbench.subject import Progress, Subject
from dmlbench.threat import Threat
from dmlbench.units import Arrays, Work

TEMPERATURE = 0.1
"""Of the cross-entropy of C2: logits are minus the distances over this."""
STEP = 2.5
"""A step is this many times eps / steps."""
BLOCK = 256
"""Images embedded at a time."""
READ = ("value", "clusters", "norm")
"""What is kept of each image."""


def push(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C1, U1: away from the image's own centroid. -d(f(x~), own centroid)."""
    return -scene.distance.paired(e, scene.gallery.embeddings[scene.row])


def confuse(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C2, U2: raise the cross-entropy to the centroids. log softmax over centroids of -d(f(x~), centroid) / 0.1, at the own one."""
    logits = -scene.distances(e) / TEMPERATURE  # (B, C)
    return F.log_softmax(logits, 1).gather(1, scene.row[:, None])[:, 0]


def swap(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C3, U3: from the own centroid to a wrong one drawn for the image. d(f(x~), wrong) - d(f(x~), own)."""
    own = scene.distance.paired(e, scene.gallery.embeddings[scene.row])
    return scene.distance.paired(e, scene.targets[:, 0]) - own


@dataclass(frozen=True)
class ClusterAttack:
    """One way to spoil clusters.

    Attributes:
        title: one line for a person.
        objective: (embeddings, Scene of centroids) to a loss per image.
        labelled: centroids of the true classes, else of the clean clusters.
        moving: centroids of the current adversarial embeddings at each step, else of the clean ones.
    """

    title: str
    objective: Objective
    labelled: bool
    moving: bool


CLUSTER_ATTACKS: Registry[ClusterAttack] = Registry(
    "clustering attack",
    {
        "C1": ClusterAttack("push from the class's current centroid", push, True, True),
        "C2": ClusterAttack("cross-entropy to the current class centroids", confuse, True, True),
        "C3": ClusterAttack("from the class's clean centroid to a random wrong one", swap, True, False),
        "U1": ClusterAttack("push from the current centroid of the clean cluster", push, False, True),
        "U2": ClusterAttack("cross-entropy to the current centroids of the clean clusters", confuse, False, True),
        "U3": ClusterAttack("from the clean cluster's centroid to a random other one", swap, False, False),
    },
)


def centroids(e: Float[Tensor, "N D"], groups: Integer[Tensor, " N"], k: int) -> Float[Tensor, "k D"]:
    """The mean embedding of each group 0 to k-1; zero for a group without members."""
    total = e.new_zeros(k, e.shape[1]).index_add_(0, groups, e)
    size = e.new_zeros(k).index_add_(0, groups, torch.ones_like(e[:, 0]))
    return total / size.clamp_min(1.0)[:, None]


def pairwise_f1(labels: Integer[np.ndarray, " N"], clusters: Integer[np.ndarray, " N"]) -> float:
    """Harmonic mean of pair precision and pair recall, percent: pairs of one cluster against pairs of one class."""
    _, a = np.unique(labels, return_inverse=True)
    _, b = np.unique(clusters, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1), dtype=np.int64)
    np.add.at(table, (a, b), 1)

    def pairs(n: np.ndarray) -> float:
        return float((n * (n - 1) // 2).sum())

    both, by_cluster, by_class = pairs(table), pairs(table.sum(0)), pairs(table.sum(1))
    return 200.0 * both / (by_cluster + by_class) if by_cluster + by_class else 0.0


def _embedded(subject: Subject, images: Tensor, eot: int) -> Tensor:
    """(N, D) embeddings of ``images`` (N, C, H, W), means over ``eot`` passes.

    Raises:
        DataError: one is NaN or infinite.
    """
    with torch.no_grad():
        parts = [torch.stack([subject.embedder(x) for _ in range(eot)]).mean(0) for x in images.split(BLOCK)]
    e = torch.cat(parts)
    require_finite(e, subject.embedder.name, "perturbed images")
    return e


def attacked(
    subject: Subject,
    attack: ClusterAttack,
    threat: Threat,
    groups: Tensor,
    wrong: Tensor,
    progress: Callable[[int], None] = lambda count: None,
) -> Float[Tensor, "N C H W"]:
    """Every measured image after ``threat.steps`` steps; ``groups`` (N,) own centroid, ``wrong`` (N, 1) another."""
    count, k = len(groups), int(groups.max()) + 1
    scene, rng = subject.scene, subject.rng("clustering")
    blocks = [slice(a, min(a + BLOCK, count)) for a in range(0, count, BLOCK)]
    x = torch.empty((count, *subject.dataset.images.shape), device=subject.device)
    for part in blocks:
        x[part] = subject.images(part.start, part.stop)
    middle = centroids(scene.clean, groups, k)
    for _ in range(threat.steps):
        if attack.moving:
            middle = centroids(_embedded(subject, x, threat.eot), groups, k)
        gallery = Gallery(middle, torch.arange(k, device=middle.device))
        around = Scene(scene.distance, gallery, scene.clean, groups, groups, wrong)
        for part in blocks:
            loss = AttackLoss(subject.embedder, attack.objective, around[part], threat.eot)
            _, g = autograd(loss, x[part], rng)
            clean = subject.images(part.start, part.stop)
            x[part] = threat.project(x[part] - threat.stride * threat.ball.ascent(g), clean)
        progress(count)
    return x


def sizes(subject: Subject, threat: Threat, x: Float[Tensor, "N C H W"]) -> Float[np.ndarray, " N"]:
    """How far each image was moved, the ball checked.

    Raises:
        AssertionError: an image left the ball or [0, 1].
    """
    found = []
    for a in range(0, len(x), BLOCK):
        part = x[a : a + BLOCK]
        clean = subject.images(a, a + len(part))
        inside = threat.contains(part, clean)
        if not bool(inside.all()):
            raise AssertionError(f"{int((~inside).sum())} adversarial images are outside the threat {threat}")
        found.append(threat.ball.size(part - clean))
    return torch.cat(found).cpu().numpy()


def readings(subject: Subject, e: Tensor, labels: np.ndarray, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What is read of a set of embeddings (N, D): ``clusters`` (N, seeds) and ``value`` (N,), R@1 within the set."""
    clusters = assignments(e.cpu().numpy(), len(np.unique(labels)), seeds)
    return {"clusters": clusters, "value": retrieval(subject.scene.among_themselves(e), (1,))["recall_at_1"]}


def numbers(
    labels: Integer[np.ndarray, " N"], clusters: Integer[np.ndarray, "N seeds"], recall: Float[np.ndarray, " N"]
) -> dict[str, float]:
    """NMI, AMI and pair F1 (means over the k-means seeds) and R@1 within the set, percent."""
    f1 = float(np.mean([pairwise_f1(labels, c) for c in clusters.T]))
    return {**agreement(labels, clusters), "f1": f1, "recall_at_1": mean(recall)}


def run(
    subject: Subject,
    protocol: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    kept: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Every clustering attack at every eps of the grid; None where ``work`` is a shard, whose part is then done.

    A unit is one attack at one eps on all images, since current centroids need the whole set.

    Raises:
        UsageError: fewer than two classes are measured.
    """
    work = work or Work()
    labels, shape = subject.scene.labels.cpu().numpy(), subject.dataset.images.shape
    own = groups(subject, protocol, work)
    parts = components(protocol, shape)

    def unit(i: int) -> Arrays:
        if i == 0:
            return readings(subject, subject.scene.clean, labels, protocol.clustering_seeds)
        part = parts[i - 1]
        progress.start(part.name, len(labels) * protocol.threat_of(part).steps)
        with watched() as trouble:
            x, found = measured(subject, protocol, part, own, seed, partial(progress.advance, part.name))
        found["nonfinite"] = np.array([trouble.count])
        return {**found, "images": x[torch.from_numpy(kept).to(x.device)].cpu().numpy()}

    names = ["clustering/clean", *(part.name for part in parts)]
    done = work.each("clustering", {i: (name, 0, len(labels)) for i, name in enumerate(names)}, unit)
    if work.shard:
        return None
    arrays = {f"{name}/{key}": done[i][key] for i, name in enumerate(names) for key in READ if key in done[i]}
    sample = {name: done[i]["images"] for i, name in enumerate(names) if i}
    seconds = {name: float(done[i]["seconds"].sum()) for i, name in enumerate(names) if i}
    extras = {"clustering": summary(protocol, protocol.eps_for(shape), labels, arrays)}
    nonfinite = sum(int(done[i]["nonfinite"].sum()) for i, _ in enumerate(names) if i)
    return Outcome(parts, seconds, arrays, sample, extras, nonfinite=nonfinite)


def components(protocol: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each eps of the grid and each attack, for images of this shape (channels, height, width)."""
    return [
        Component(name=f"{name}@{eps}", attack=name, readout="recall_at_1", worst=0, best=100, threat={"eps": eps})
        for eps in protocol.eps_for(shape)
        for name in CLUSTER_ATTACKS
    ]


def groups(subject: Subject, protocol: Protocol, work: Work | None = None) -> dict[bool, np.ndarray]:
    """(N,) the group of each image, from 0: True by class, False by cluster of the clean embeddings.

    Raises:
        UsageError: fewer than two classes are measured.
    """
    names, true = np.unique(subject.scene.labels.cpu().numpy(), return_inverse=True)
    if len(names) < 2:
        raise UsageError(f"data set {subject.dataset.name!r} has a single class: there is nothing to cluster")

    def found() -> Arrays:
        return {"clusters": kmeans(subject.scene.clean.cpu().numpy(), len(names), protocol.clustering_seeds[0])}

    kept = (work or Work()).once("clean clusters", len(true), found)
    return {True: true, False: np.unique(kept["clusters"], return_inverse=True)[1]}


def measured(
    subject: Subject,
    protocol: Protocol,
    part: Component,
    own: dict[bool, np.ndarray],
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Float[Tensor, "N C H W"], dict[str, np.ndarray]]:
    """One attack at one eps: the adversarial images, and ``value``, ``clusters`` and ``norm`` of each."""
    attack, threat = CLUSTER_ATTACKS[part.attack], protocol.threat_of(part)
    threat = threat.but(step=STEP * threat.radius / max(1, threat.steps))
    mine = torch.from_numpy(own[attack.labelled]).to(subject.device)
    last = int(mine.max())
    drawn = subject.rng(seed, "clustering", part.attack).integers(max(1, last), 1)
    wrong = (drawn + (drawn >= mine[:, None]).long()).clamp(max=last)
    x = attacked(subject, attack, threat, mine, wrong, progress)
    labels = subject.scene.labels.cpu().numpy()
    found = readings(subject, _embedded(subject, x, threat.eot), labels, protocol.clustering_seeds)
    return x, {**found, "norm": sizes(subject, threat, x)}


def summary(
    protocol: Protocol, grid: Sequence[str], labels: Integer[np.ndarray, " N"], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """All that a run says of its images' clusters: what goes into ``extras.clustering``.

    Args:
        arrays: ``clusters`` (N, seeds) and ``value`` (N,) of ``clustering/clean/`` and of each ``<attack>@<eps>/``.
    """

    def of(name: str) -> dict[str, float]:
        return numbers(labels, arrays[f"{name}/clusters"], arrays[f"{name}/value"])

    table = [
        {"eps": eps, "attack": name, "labelled": attack.labelled, **of(f"{name}@{eps}")}
        for eps in grid
        for name, attack in CLUSTER_ATTACKS.items()
    ]
    seeds = list(protocol.clustering_seeds)
    return {"clean": of("clustering/clean"), "attacks": table, "worst": worst(table), "seeds": seeds}


def worst(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each eps the lowest of every number, over C1 to C3 and over U1 to U3 apart."""
    out = []
    for eps in dict.fromkeys(row["eps"] for row in table):
        for labelled in (True, False):
            rows = [r for r in table if r["eps"] == eps and r["labelled"] == labelled]
            low = {key: min(r[key] for r in rows) for key in ("nmi", "ami", "f1", "recall_at_1")}
            out.append({"eps": eps, "labelled": labelled, **low})
    return out

"""Clustering when every image is perturbed: k-means on attacked embeddings (after Ke, arXiv 2501.01025).

All measured images are moved, then k-means with as many clusters as there are classes runs on what the
model makes of them; :mod:`dmlbench.cluster_attacks` says by what. NMI of many small clusters is far from 0 for random ones, so
AMI is reported too. What counts is the lowest NMI and the lowest AMI over the attacks that know the labels.
The images go through the model in blocks, between two of which nothing changes: what a step descends is of the set
as it was before the step.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.cluster_attacks import CLUSTER_ATTACKS, ClusterAttack, SharedInformation, choose_as_a_set
from dmlbench.embedding import require_finite
from dmlbench.errors import UsageError
from dmlbench.fast.kmeans import nearest_centre
from dmlbench.kinds.base import Outcome
from dmlbench.kinds.clustering.summary import before, components, restarts, summary
from dmlbench.metrics import agreement, assignments, kmeans, retrieval
from dmlbench.objectives import Objective
from dmlbench.optimizers import autograd, watched
from dmlbench.protocol import Component, Joint, Protocol
from dmlbench.rng import Rng
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Gallery, Scene
from dmlbench.threat import Threat

STEP = 2.5
"""A step is this many times eps / steps."""
BLOCK = 256
"""Images embedded at a time."""
READ = ("value", "clusters", "norm", "choice")
"""The arrays that a run stores for each image."""
LLOYD = 2
"""Iterations of k-means between two steps, from the centroids of the step before."""


def centroids(e: Float[Tensor, "N D"], groups: Integer[Tensor, " N"], k: int) -> Float[Tensor, "k D"]:
    """The mean embedding of each group 0 to k-1; zero for a group without members."""
    total = e.new_zeros(k, e.shape[1]).index_add_(0, groups, e)
    size = e.new_zeros(k).index_add_(0, groups, torch.ones_like(e[:, 0]))
    return total / size.clamp_min(1.0)[:, None]


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


def _start(subject: Subject, threat: Threat, rng: Rng) -> Float[Tensor, "N C H W"]:
    """Where every measured image begins."""
    x = torch.empty((len(subject.rows), *subject.dataset.images.shape), device=subject.device)
    for part in _blocks(len(x)):
        x[part] = threat.begin(subject.images(part.start, part.stop), rng[part])
    return x


def _blocks(count: int) -> list[slice]:
    return [slice(a, min(a + BLOCK, count)) for a in range(0, count, BLOCK)]


def _step(
    subject: Subject,
    threat: Threat,
    x: Float[Tensor, "N C H W"],
    objective: Objective,
    scene: Scene,
    length: float,
    rng: Rng,
) -> None:
    """One steepest step of every image, in place."""
    for part in _blocks(len(x)):
        loss = AttackLoss(subject.embedder, objective, scene[part], threat.eot)
        _, g = autograd(loss, x[part], rng)
        x[part] = threat.stepped(x[part], g, subject.images(part.start, part.stop), length)


def attacked(
    subject: Subject,
    attack: ClusterAttack,
    threat: Threat,
    groups: Tensor,
    wrong: Tensor,
    progress: Callable[[int], None] = lambda count: None,
) -> Float[Tensor, "N C H W"]:
    """Every measured image after ``threat.steps`` steps; ``groups`` (N,) own centroid, ``wrong`` (N, 1) another."""
    k = int(groups.max()) + 1
    scene, rng = subject.scene, subject.rng("clustering")
    x = _start(subject, threat, rng)
    middle = centroids(scene.clean, groups, k)
    for _ in range(threat.steps):
        if attack.moving:
            middle = centroids(_embedded(subject, x, threat.eot), groups, k)
        gallery = Gallery(middle, torch.arange(k, device=middle.device))
        around = Scene(scene.distance, gallery, scene.clean, groups, groups, wrong)
        _step(subject, threat, x, attack.formula, around, threat.stride, rng)
        progress(len(x))
    return x


def jointly(
    subject: Subject,
    rules: Joint,
    threat: Threat,
    classes: Integer[np.ndarray, " N"],
    seeds: tuple[int, ...],
    rng: Rng,
    progress: Callable[[int], None] = lambda count: None,
) -> Float[Tensor, "N C H W"]:
    """The images of the lowest NMI that was seen while the soft mutual information of ``classes`` (N,) and clusters descended.

    One k-means for each of ``seeds`` starts anew with each restart and follows the images from step to step. Steps begin at
    eps and end at 0 along a cosine. The first start is the clean images, the others are random. What was seen is what
    k-means of ``seeds`` makes of the set at every ``rules.look`` steps and at the end of a restart.
    """
    mine, k = torch.from_numpy(classes).to(subject.device), int(classes.max()) + 1
    scene, temperature = replace(subject.scene, row=mine), rules.temperature * float(subject.scene.gallery.scale)
    lowest, least, idle = torch.empty(0), math.inf, 0
    for restart in range(rules.restarts):
        before, draws = least, rng.fold("restart", restart)
        x = _start(subject, threat.but(start="random" if restart else "clean"), draws)
        centres: Tensor | None = None
        for step in range(threat.steps + 1):
            e = _embedded(subject, x, threat.eot)
            if step == threat.steps or (step and step % rules.look == 0):
                seen = agreement(classes, assignments(e, k, seeds))["nmi"]
                if seen < least:
                    lowest, least = x.clone(), seen
            if step == threat.steps:
                break
            centres = _started(e, k, seeds) if centres is None else _followed(e, centres)
            objective = SharedInformation.of(e, mine, centres, temperature, BLOCK)
            length = threat.radius * (1 + math.cos(math.pi * step / threat.steps)) / 2
            _step(subject, threat, x, objective, scene, length, draws)
            progress(len(x))
        idle = idle + 1 if least > before - rules.least else 0
        if idle == rules.patience:
            progress(len(x) * threat.steps * (rules.restarts - restart - 1))
            break
    return lowest


def _started(e: Float[Tensor, "N D"], k: int, seeds: tuple[int, ...]) -> Float[Tensor, "S k D"]:
    """Centroids of a fresh k-means for each seed."""
    labels = torch.from_numpy(assignments(e, k, seeds)).long().to(e.device)
    return torch.stack([centroids(e, clusters, k) for clusters in labels.T])


def _followed(e: Float[Tensor, "N D"], centres: Float[Tensor, "S k D"]) -> Float[Tensor, "S k D"]:
    """Each k-means a few iterations further; a cluster without members stays where it was."""
    followed = []
    for middle in centres:
        for _ in range(LLOYD):
            at, _ = nearest_centre(e, middle)
            some = torch.bincount(at, minlength=len(middle)) > 0
            middle = torch.where(some[:, None], centroids(e, at, len(middle)), middle)
        followed.append(middle)
    return torch.stack(followed)


def united(
    rules: Joint,
    classes: Integer[np.ndarray, " N"],
    embeddings: Float[Tensor, "N A D"],
    clusters: Sequence[Integer[np.ndarray, "N seeds"]],
    seeds: tuple[int, ...],
) -> Integer[np.ndarray, " N"]:
    """Which of the A images found for each image it takes, so that NMI is lowest.

    It begins with the attack of the lowest NMI. Each round k-means is read anew, and one image after another takes
    what lowers NMI most if the centroids stay where they are. The round of the lowest NMI counts.

    Args:
        clusters: of each attack, by k-means seed.
    """
    k, n, at = int(classes.max()) + 1, len(classes), np.arange(len(classes))
    values = [agreement(classes, labels)["nmi"] for labels in clusters]
    first = int(np.argmin(values))
    choice = best = np.full(n, first)
    lowest, idle, now = values[first], 0, clusters[first]
    for turn in range(rules.rounds):
        e = embeddings[torch.from_numpy(at), torch.from_numpy(choice)]
        if turn:
            now = assignments(e, k, seeds)
            value = agreement(classes, now)["nmi"]
            idle = idle + 1 if value > lowest - rules.least else 0
            if value < lowest:
                lowest, best = value, choice
            if idle == rules.patience:
                break
        middles = [centroids(e, torch.from_numpy(assigned).long(), k) for assigned in now.T]
        falls = np.stack([
            torch.stack([nearest_centre(embeddings[:, a], middle)[0] for a in range(len(clusters))], 1).numpy()
            for middle in middles
        ])  # fmt: skip
        after = choose_as_a_set(classes, falls, choice, np.random.default_rng(turn).permutation(n))
        if (after == choice).all():
            break
        choice = after
    return best


def sizes(subject: Subject, threat: Threat, x: Float[Tensor, "N C H W"]) -> Float[np.ndarray, " N"]:
    """How far each image was moved, the ball checked.

    Raises:
        AssertionError: an image left the ball or [0, 1].
    """
    norms = []
    for a in range(0, len(x), BLOCK):
        part = x[a : a + BLOCK]
        clean = subject.images(a, a + len(part))
        inside = threat.contains(part, clean)
        if not bool(inside.all()):
            raise AssertionError(f"{int((~inside).sum())} adversarial images are outside the threat {threat}")
        norms.append(threat.ball.size(part - clean))
    return torch.cat(norms).cpu().numpy()


def readings(subject: Subject, e: Tensor, labels: np.ndarray, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What is read of a set of embeddings (N, D): ``clusters`` (N, seeds) and ``value`` (N,), R@1 within the set."""
    clusters = assignments(e.cpu().numpy(), len(np.unique(labels)), seeds)
    return {"clusters": clusters, "value": retrieval(subject.scene.among_themselves(e), (1,))["recall_at_1"]}


def run(
    subject: Subject,
    protocol: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Every clustering attack at every eps of the grid; None where ``work`` is a shard, whose part is then done.

    A unit is one attack at one eps on all images, since current centroids need the whole set. What chooses of the
    others' images comes after all of them, and is done once.

    Raises:
        UsageError: the classes cannot be found by clustering.
    """
    work = work or Work()
    labels, shape = subject.scene.labels.cpu().numpy(), subject.dataset.images.shape
    image_groups = groups(subject, protocol, work)
    parts = components(protocol, shape)
    alone = [part for part in parts if CLUSTER_ATTACKS[part.attack].way != "union"]

    def unit(i: int) -> Arrays:
        if i == 0:
            return readings(subject, subject.scene.clean, labels, protocol.clustering_seeds)
        part = alone[i - 1]
        progress.start(part.name, len(labels) * protocol.threat_of(part).steps * restarts(protocol, part))
        with watched() as trouble:
            x, outcomes = measured(subject, protocol, part, image_groups, seed, partial(progress.advance, part.name))
        if len(alone) == len(parts):
            del outcomes["embeddings"]
        outcomes["nonfinite"] = np.array([trouble.count])
        return {**outcomes, "images": x[torch.from_numpy(sampled).to(x.device)].cpu().numpy()}

    names = ["clustering/clean", *(part.name for part in alone)]
    each = work.each("clustering", {i: (name, 0, len(labels)) for i, name in enumerate(names)}, unit)
    if work.shard:
        return None
    done = {name: each[i] for i, name in enumerate(names)}
    for part in parts:
        if part not in alone:
            others = [done[other.name] for other in before(parts, part)]

            def chosen(others: list[Arrays] = others) -> Arrays:
                began = time.monotonic()
                outcomes = union(subject, protocol, image_groups[True], others)
                at = outcomes["choice"][sampled]
                images = np.stack([other["images"] for other in others])[at, np.arange(len(sampled))]
                return {**outcomes, "images": images, "seconds": np.array([time.monotonic() - began])}

            done[part.name] = work.once(part.name, len(labels), chosen)
    arrays = {f"{name}/{key}": done[name][key] for name in done for key in READ if key in done[name]}
    sample = {part.name: done[part.name]["images"] for part in parts}
    seconds = {part.name: float(done[part.name]["seconds"].sum()) for part in parts}
    extras = summary(protocol, protocol.eps_for(shape), labels, arrays)
    nonfinite = sum(int(done[part.name]["nonfinite"].sum()) for part in alone)
    return Outcome(parts, seconds, arrays, sample, extras, nonfinite=nonfinite)


def class_numbers(dataset: str, labels: np.ndarray) -> np.ndarray:
    """(N,) the classes of the measured images, from 0.

    Raises:
        UsageError: they are all alike, or all different, so that any clusters would be right.
    """
    names, true = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        raise UsageError(f"data set {dataset!r} has a single class: there is nothing to cluster")
    if len(names) == len(labels):
        raise UsageError(
            f"data set {dataset!r}: each of the {len(labels)} queries that would be clustered is a class of its own, so there is "
            "nothing to cluster"
        )
    return true


def groups(subject: Subject, protocol: Protocol, work: Work | None = None) -> dict[bool, np.ndarray]:
    """(N,) the group of each image, from 0: True by class, False by cluster of the clean embeddings.

    Raises:
        UsageError: the classes cannot be found by clustering.
    """
    true = class_numbers(subject.dataset.name, subject.scene.labels.cpu().numpy())

    def clean_clusters() -> Arrays:
        count = int(true.max()) + 1
        return {"clusters": kmeans(subject.scene.clean.cpu().numpy(), count, protocol.clustering_seeds[0])}

    clean = (work or Work()).once("clean clusters", len(true), clean_clusters)
    return {True: true, False: np.unique(clean["clusters"], return_inverse=True)[1]}


def measured(
    subject: Subject,
    protocol: Protocol,
    part: Component,
    image_groups: dict[bool, np.ndarray],
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Float[Tensor, "N C H W"], dict[str, np.ndarray]]:
    """One attack at one eps: the adversarial images, and ``value``, ``clusters``, ``norm`` and ``embeddings`` of each."""
    attack, threat, seeds = CLUSTER_ATTACKS[part.attack], protocol.threat_of(part), protocol.clustering_seeds
    rng = subject.rng(seed, "clustering", part.attack)
    if attack.way == "joint":
        assert protocol.joint is not None
        x = jointly(subject, protocol.joint, threat, image_groups[True], seeds, rng, progress)
    else:
        threat = threat.but(step=STEP * threat.radius / max(1, threat.steps))
        mine = torch.from_numpy(image_groups[attack.labelled]).to(subject.device)
        last = int(mine.max())
        drawn = rng.integers(max(1, last), 1)
        wrong = (drawn + (drawn >= mine[:, None]).long()).clamp(max=last)
        x = attacked(subject, attack, threat, mine, wrong, progress)
    e = _embedded(subject, x, threat.eot)
    outcomes = readings(subject, e, subject.scene.labels.cpu().numpy(), seeds)
    return x, {**outcomes, "norm": sizes(subject, threat, x), "embeddings": e.cpu().numpy()}


def union(
    subject: Subject, protocol: Protocol, classes: Integer[np.ndarray, " N"], others: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The images of ``others``, as :func:`measured` says of each, chosen as a set: ``value``, ``clusters``, ``norm`` and
    ``choice`` (N,), which of the others each image takes."""
    assert protocol.joint is not None
    embeddings, seeds = (
        torch.from_numpy(np.stack([outcomes["embeddings"] for outcomes in others], 1)),
        protocol.clustering_seeds,
    )
    choice = united(protocol.joint, classes, embeddings, [outcomes["clusters"] for outcomes in others], seeds)
    at = np.arange(len(choice))
    e = embeddings[torch.from_numpy(at), torch.from_numpy(choice)].to(subject.device)
    norm = np.stack([outcomes["norm"] for outcomes in others])[choice, at]
    return {**readings(subject, e, subject.scene.labels.cpu().numpy(), seeds), "norm": norm, "choice": choice}

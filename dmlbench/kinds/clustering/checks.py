"""What a submitted run of kind clustering must hold, and what measuring it again contradicts.

NMI, AMI, pair F1 and R@1 are computed again from the clusters that each image fell into, and what a union chose fits the
others' norms. An image's outcome hangs on where all others went, so of a stored one only ball, range and norm can be seen;
the clean clusters are made again, and a share of the images would cluster otherwise, so it is one whole attack that is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.errors import Problem
from dmlbench.fast.exact import true_float32
from dmlbench.kinds.base import CLUSTERS_AGREE, QUERIES, SAMPLE, Stated, StoredSample, count_problems, differences
from dmlbench.kinds.clustering.search import groups, measured, readings, union
from dmlbench.kinds.clustering.summary import before, numbers, restarts, summary
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.run.subject import Progress, Subject

AGREE = {
    "alone": {"clusters": CLUSTERS_AGREE, "value": 2.0},
    "joint": {"clusters": 8.0, "value": 15.0},
    "union": {"clusters": 5.0, "value": 15.0},
}
"""Points by which NMI, AMI and pair F1 of clusters, and R@1 within the set, may differ, by the attack's way. What looks at the set as a
whole ends at other images when something is rounded otherwise (``benchmarks/clustering_rounding.py``)."""


def arrays(rules: Protocol, parts: Sequence[Component]) -> dict[str, tuple[str, int]]:
    """Clusters by k-means seed, of the clean images too, and what a union chose."""
    seeds = len(rules.clustering_seeds)
    clusters = {f"{name}/clusters": ("i", seeds) for name in (CLEAN, *(c.name for c in parts))}
    choices = {f"{c.name}/choice": ("i", 1) for c in parts if CLUSTER_ATTACKS[c.attack].way == "union"}
    return {**clusters, f"{CLEAN}/value": ("f", 1), **choices}


CLEAN = "clustering/clean"
"""What the arrays of the clean images are called."""


def outcome_problems(stated: Stated) -> Iterator[Problem]:
    """Clusters from 0 to classes - 1; R@1 within the set for every image whose class has another one."""
    e, parts = stated.evaluation, stated.parts
    _, at, sizes = np.unique(e.arrays["label"], return_inverse=True, return_counts=True)
    for name in (CLEAN, *(c.name for c in parts)):
        clusters, value = e.arrays[f"{name}/clusters"], e.arrays[f"{name}/value"]
        bad = ((clusters < 0) | (clusters >= len(sizes))).any(1)
        yield from count_problems(bad, f"{name}/clusters", f"images are in clusters other than 0 to {len(sizes) - 1}")
        text = "outcomes are missing where the class has another image, or there where it has none"
        yield from count_problems(np.isnan(value) != (sizes[at] == 1), f"{name}/value", text)
        present = ~np.isnan(value)
        yield from count_problems(
            present & ~np.isin(value, (0.0, 100.0)), f"{name}/value", "outcomes are other than 0 and 100"
        )
    for c in parts:
        if CLUSTER_ATTACKS[c.attack].way == "union":
            choice, norms = (
                e.arrays[f"{c.name}/choice"],
                [e.arrays[f"{o.name}/norm"] for o in before(parts, c)],
            )
            bad = (choice < 0) | (choice >= len(norms))
            yield from count_problems(bad, f"{c.name}/choice", f"are other than 0 to {len(norms) - 1}")
            expected = np.choose(choice, norms, mode="clip")
            yield from count_problems(
                e.arrays[f"{c.name}/norm"] != expected, f"{c.name}/norm", "are not those of the chosen images"
            )


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number come out of the arrays again?"""
    e, grid = stated.evaluation, list(dict.fromkeys(c.threat["eps"] for c in stated.parts))
    again = summary(stated.rules, grid, e.arrays["label"], e.arrays)
    yield from differences("extras.clustering", e.extras["clustering"], again)


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """The clusters of the clean embeddings, and R@1 among them; the images of a union are those that it chose."""
    e, subject = stated.evaluation, stored.subject
    labels = subject.scene.labels.cpu().numpy()
    recomputed = readings(subject, subject.scene.clean, labels, stated.rules.clustering_seeds)
    yield from clusters_differ(2, CLEAN, e, recomputed, labels)
    for c in stated.parts:
        if CLUSTER_ATTACKS[c.attack].way == "union":
            others = np.stack([e.sample[other.name] for other in before(stated.parts, c)])
            expected = others[e.arrays[f"{c.name}/choice"][stored.positions], np.arange(others.shape[1])]
            if not np.array_equal(expected, e.sample[c.name]):
                yield Problem(2, f"{SAMPLE} {c.name}", "holds other images than those that were chosen")


@true_float32()
def share(
    stated: Stated, subject: Subject, draw: np.random.Generator, progress: Progress
) -> tuple[str, Iterable[Problem]]:
    """One attack at one eps, drawn, on all images, and its clusters."""
    rules, labels = stated.rules, subject.scene.labels.cpu().numpy()
    part, image_groups = stated.parts[draw.integers(len(stated.parts))], groups(subject, rules)

    def again(part: Component) -> dict[str, np.ndarray]:
        if CLUSTER_ATTACKS[part.attack].way == "union":
            return union(subject, rules, image_groups[True], list(map(again, before(stated.parts, part))))
        progress.start(part.name, len(labels) * rules.threat_of(part).steps * restarts(rules, part))
        return measured(subject, rules, part, image_groups, rules.seed, partial(progress.advance, part.name))[1]

    way = CLUSTER_ATTACKS[part.attack].way
    problems = [*clusters_differ(3, part.name, stated.evaluation, again(part), labels, way)]
    return f"attacked all {len(labels)} images again by {part.name}", problems


def disagree(stated: Stated, rerun: Evaluation, at: np.ndarray, level: int) -> Iterator[Problem]:
    """Attacks whose clusters are not the stated ones within the tolerance."""
    ways = {CLEAN: "alone", **{c.name: CLUSTER_ATTACKS[c.attack].way for c in stated.parts}}
    for name, way in ways.items():
        again = {key: rerun.arrays[f"{name}/{key}"] for key in ("clusters", "value")}
        yield from clusters_differ(level, name, stated.evaluation, again, stated.evaluation.arrays["label"][at], way)


def clusters_differ(
    level: int, name: str, e: Evaluation, recomputed: Mapping[str, np.ndarray], labels: np.ndarray, way: str = "alone"
) -> Iterator[Problem]:
    """Numbers of one set of clusters that are not the stated ones within the tolerance of the attack's way."""
    stated, again = (
        numbers(labels, arrays["clusters"], arrays["value"])
        for arrays in ({k: e.arrays[f"{name}/{k}"] for k in ("clusters", "value")}, recomputed)
    )
    for key, of in (("nmi", "clusters"), ("ami", "clusters"), ("f1", "clusters"), ("recall_at_1", "value")):
        allowed = AGREE[way][of]
        if not abs(again[key] - stated[key]) <= allowed:
            file = f"{QUERIES} {name}/{of}"
            text = (
                f"give {key} {stated[key]:.2f}, measured again it is {again[key]:.2f} ({allowed:g} points are allowed)"
            )
            yield Problem(level, file, text)

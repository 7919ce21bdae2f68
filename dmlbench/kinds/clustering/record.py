"""The record of kind clustering: all images moved before k-means by each of ``attacks``, at every eps of the ``grid``."""

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, Field

from dmlbench.attacks import ATTACKS
from dmlbench.cluster_attacks import CLUSTER_ATTACKS
from dmlbench.datasets import RetrievalDataset
from dmlbench.errors import UsageError
from dmlbench.intervals import Ends, nmi_interval
from dmlbench.kinds import page as md
from dmlbench.kinds.base import CLOSE, Curve, Form, Job, Kind, Line, Number, Percent, Point, Points, Sheet, text_of
from dmlbench.kinds.clustering import checks
from dmlbench.kinds.clustering.search import class_numbers, run
from dmlbench.kinds.clustering.summary import components, restarts
from dmlbench.protocol import Protocol, repeated
from dmlbench.results import Evaluation
from dmlbench.run.subject import measured_queries


class NumbersForm(Form):
    """What is read of one set of clusters."""

    nmi: Points
    ami: Annotated[float, Field(ge=-100, le=100 + CLOSE)]
    f1: Points
    recall_at_1: Points


class LowestForm(NumbersForm):
    """The lowest at one eps."""

    eps: str
    labelled: bool


class AttackForm(LowestForm):
    """One attack at one eps."""

    attack: str


def _known(rows: tuple[LowestForm, ...]) -> tuple[LowestForm, ...]:
    if not any(row.labelled for row in rows):
        raise ValueError("has no row of the attacks that know the labels")
    return rows


class ClusteringForm(Form):
    """``extras.clustering``."""

    clean: NumbersForm
    attacks: tuple[AttackForm, ...]
    worst: Annotated[tuple[LowestForm, ...], Field(min_length=1), AfterValidator(_known)]
    seeds: tuple[int, ...]


class Columns(BaseModel):
    """In a row of a board."""

    clustering_nmi: Percent | None = None
    clustering_nmi_attacked: Percent | None = None
    clustering_ami: float | None = None
    clustering_ami_attacked: float | None = None


def between(base: Evaluation, candidate: Evaluation, i: np.ndarray, j: np.ndarray, seed: int, draws: int) -> Ends:
    """The interval of the difference in NMI of the worst attacks, which are not chosen anew on every resample."""
    arrays = base.arrays.get(worst_clusters(base)), candidate.arrays.get(worst_clusters(candidate))
    if arrays[0] is None or arrays[1] is None:
        return None
    return nmi_interval(base.arrays["label"][i], arrays[0][i], arrays[1][j], seed, draws)


def worst_clusters(e: Evaluation) -> str:
    """The per-query array of the clusters after the attack of lowest NMI at the largest eps, labels known."""
    rows = [row for row in e.extras["clustering"]["attacks"] if row["labelled"]]
    low = min((row for row in rows if row["eps"] == rows[-1]["eps"]), key=lambda row: float(row["nmi"]))
    return f"{low['attack']}@{low['eps']}/clusters"


NUMBERS = (
    Number(
        "clustering_nmi",
        "NMI clean %",
        "How well the groups that k-means finds among the clean images fit their classes: normalised mutual information, 0 to "
        "100. Many small groups reach a high value by chance; AMI makes up for that.",
    ),
    Number(
        "clustering_nmi_attacked",
        "NMI attacked %",
        "The same after every image was moved by an attack, at the largest eps of the grid. It is the lowest that the attacks "
        "which know the labels reach, and the truth is at most this.",
        drop=3.0,
        beside_ers=True,
        between=between,
    ),
    Number(
        "clustering_ami",
        "AMI clean %",
        "How well the groups that k-means finds among the clean images fit their classes: mutual information adjusted for "
        "chance. 0 is what random groups reach, 100 the classes themselves.",
    ),
    Number(
        "clustering_ami_attacked",
        "AMI attacked %",
        "The same after every image was moved by an attack, at the largest eps of the grid. It is the lowest that the attacks "
        "which know the labels reach, and the truth is at most this.",
        ranks=True,
        against="clustering_ami",
    ),
)


def read(e: Evaluation) -> dict[str, float | None]:
    """NMI and AMI, clean and at the largest eps, the lowest of the attacks that know the labels."""
    extras = e.extras["clustering"]
    last = [row for row in extras["worst"] if row["labelled"]][-1]
    return {
        f"clustering_{name}{suffix}": row[name]
        for name in ("nmi", "ami")
        for suffix, row in (("", extras["clean"]), ("_attacked", last))
    }


def curve(e: Evaluation) -> Curve:
    """The lowest NMI of the attacks that know the labels against eps."""
    extras = e.extras["clustering"]
    points = (Point(row["eps"], row["nmi"]) for row in extras["worst"] if row["labelled"])
    return Curve("NMI under attack, %", (Point("0", extras["clean"]["nmi"]), *points))


def check(p: Protocol) -> None:
    """That its attacks are known, each once, what chooses of others' images after some, and the search of all at once said.

    Raises:
        UsageError: they are not.
    """
    ways = [CLUSTER_ATTACKS[name].way for name in p.attacks]
    if not any(CLUSTER_ATTACKS[name].labelled for name in p.attacks) or ways[0] == "union":
        raise UsageError("attacks must hold one that knows the labels, and begin with one that makes images")
    if twice := repeated(p.attacks):
        raise UsageError(f"attacks hold {twice!r} twice: one would overwrite the other")
    if ways.count("union") > 1:
        raise UsageError("attacks hold two that choose of the others' images, which stand before a single one")
    if (p.joint is not None) != any(way != "alone" for way in ways):
        raise UsageError("[joint], and attacks that need all images at once, do nothing without each other")


def require(rules: Protocol, dataset: RetrievalDataset, seed: int) -> None:
    """That the queries are of two classes or more, and not each of its own.

    Raises:
        UsageError: they are not.
    """
    measured = measured_queries(len(dataset.query), rules.queries)
    class_numbers(dataset.name, dataset.labels[dataset.query[measured]])


def jobs(p: Protocol, dataset: RetrievalDataset, queries: int) -> Iterator[Job]:
    """Every attack at every eps but unions, which are k-means alone."""
    for part in components(p, dataset.images.shape):
        threat, way = p.threat_of(part), CLUSTER_ATTACKS[part.attack]
        if way.way != "union":
            often = restarts(p, part)
            gradients = often * threat.steps * threat.eot
            yield Job(
                name=part.name, called=part.attack, eps=str(threat.eps), optimizer="pgd", threat=threat, attack=ATTACKS["ES"],
                passes=(gradients, gradients if way.moving else 0), steps=often * threat.steps,
                weight=often * (1.5 if way.moving else 1.0),
            )  # fmt: skip


def tables(extras: dict[str, Any]) -> Iterator[Sheet | Line]:
    """Every attack, and the lowest of each number."""
    names = {"nmi": "NMI", "ami": "AMI", "f1": "pair F1", "recall_at_1": "R@1 within"}

    def row(eps: str, what: str, numbers_of: dict[str, Any]) -> tuple[str, ...]:
        return eps, what, *(text_of(numbers_of[key]) for key in names)

    rows = [row("0", "none", extras["clean"]), *(row(r["eps"], r["attack"], r) for r in extras["attacks"])]
    lowest = [
        row(r["eps"], "lowest, labels known" if r["labelled"] else "lowest, label-free", r) for r in extras["worst"]
    ]
    bold = frozenset(range(len(rows), len(rows) + len(lowest)))
    title = "k-means on attacked images, %"
    yield Sheet(title, ("eps", "attack"), tuple(names.values()), (*rows, *lowest), bold)


def page(p: Protocol) -> Iterator[str]:
    """The attacks, what they cost, and how those search that need all images at once."""
    rows = [
        [
            name,
            a.title,
            md.text(a.formula),
            "labels" if a.labelled else "clean clusters",
            "at every step" if a.moving else "clean",
        ]
        for name, a in ((name, CLUSTER_ATTACKS[name]) for name in p.attacks)
    ]
    yield from md.table(["attack", "title", "formula", "groups", "centroids"], rows)
    yield (
        f"PGD, {p.threat.get('steps')} gradients an image, attack and eps (and as many values where centroids "
        "move), step 2.5 eps / steps. Scores: NMI, AMI, pairwise F1 and R@1 within the attacked set, percent, "
        f"↑ robust; k-means seeds {', '.join(map(str, p.clustering_seeds))}. Reported: the lowest over the attacks "
        "that know the labels, and over the others apart. After Ke, arXiv 2501.01025, whose text was not at hand; "
        "the objectives are ours.\n"
    )
    if j := p.joint:
        yield (
            f"`joint`: temperature {j.temperature:g}, {j.steps} steps that shorten from eps to 0 along a cosine, at most {j.restarts} "
            f"restarts of them (the first from the clean images, the others random): at most {j.steps * j.restarts} gradients "
            f"and as many values an image and eps. NMI is read every {j.look} steps, the images of the lowest count, and "
            f"{j.patience} restarts in a row that lower it by less than {j.least:g} points are the last. `union`: at most "
            f"{j.rounds} rounds of choices and k-means, which end alike; no gradients.\n"
        )


CLUSTERING = Kind(
    name="clustering",
    title="all images moved before k-means by each of attacks, at every eps of the grid",
    meaning="All images are moved before k-means groups them, and what is read is how well the groups still fit the classes. What "
    "counts is the lowest value that the attacks which know the labels reach.",
    needs=("grid",),
    reads=("attacks", "joint", "queries"),
    unread=("eps", "step", "start", "restarts", "queries"),
    check=check,
    run=run,
    components=components,
    within=True,
    whole_set=True,
    require=require,
    averages=False,
    optimizers=lambda p: {"pgd"},
    jobs=jobs,
    form=ClusteringForm,
    numbers=NUMBERS,
    columns=Columns,
    read=read,
    curve=curve,
    shown=("clustering_ami", "clustering_ami_attacked", "clustering_nmi", "clustering_nmi_attacked"),
    tables=tables,
    page=page,
    arrays=checks.arrays,
    outcome_problems=checks.outcome_problems,
    number_problems=checks.number_problems,
    replay=checks.replay,
    share=checks.share,
    disagree=checks.disagree,
)

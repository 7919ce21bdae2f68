"""How the clusters of a set of images can be spoilt: what each attack descends (after Ke, arXiv 2501.01025).

An objective of an image alone sees a :class:`~dmlbench.scene.Scene` whose gallery is the centroids of its groups,
``row`` the image's own group and ``chosen`` a wrong one drawn for it. C1 to C3 know the labels; U1 to U3 are the
same with the clusters of the clean embeddings in place of labels. ``joint`` descends what k-means is read by, and
``union`` chooses for each image one of the images that all the others found. No objective is best everywhere, so
what counts is the lowest NMI and the lowest AMI over the attacks that know the labels (docs/strict.md). The text of
the paper was not at hand; the objectives are our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dmlbench.embedding import DISTANCES
from dmlbench.fast.kmeans import entropy
from dmlbench.registry import Registry
from dmlbench.scene import Scene

TEMPERATURE = 0.1
"""Of the cross-entropy of C2: logits are minus the distances over this."""
LEAST = 1e-9
"""Share of images that a class and a cluster have in common, at the least: an empty cell's logarithm is finite."""
EUCLIDEAN = DISTANCES["E"]
"""The distance that k-means looks at, whatever the embedding space."""


def push(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C1, U1: away from the image's own centroid. -d(f(x~), own centroid)."""
    return -scene.distance.paired(e, scene.gallery.embeddings[scene.row])


def confuse(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C2, U2: raise the cross-entropy to the centroids. log softmax over centroids of -d(f(x~), centroid) / 0.1, at the own one."""
    logits = -scene.distances(e) / TEMPERATURE  # (B, C)
    return F.log_softmax(logits, 1).gather(1, scene.row[:, None])[:, 0]


def swap(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """C3, U3: from the own centroid to a wrong one drawn for the image. d(f(x~), wrong) - d(f(x~), own)."""
    to_own_centroid = scene.distance.paired(e, scene.gallery.embeddings[scene.row])
    return scene.distance.paired(e, scene.targets[:, 0]) - to_own_centroid


@dataclass(frozen=True, eq=False)
class SharedInformation:
    """joint: mean over several k-means of the sum over clusters c of p(c|x~) (log(P(c|class of x) / P(c)) + NMI/2 log P(c)),
    where p(c|x~) is the softmax of -d(f(x~), centroid of c) / temperature, and P its means over all images as they are now.

    Its gradient, summed over the images, is that of the soft NMI of classes and clusters but for a positive factor: the
    first term is mutual information, the second what spreads the clusters, and what the tables change by cancels out.

    Attributes:
        centres: (S, k, D) the centroids of S k-means.
        gain: (S, classes, k) the factor of p(c|x~) above.
        temperature: in units of distance.
    """

    centres: Tensor
    gain: Tensor
    temperature: float

    @staticmethod
    def of(
        e: Float[Tensor, "N D"],
        classes: Int[Tensor, " N"],
        centres: Float[Tensor, "S k D"],
        temperature: float,
        block: int,
    ) -> "SharedInformation":
        """With the tables of the embeddings ``e``, of which ``block`` are looked at together.

        The tables are S x classes x clusters numbers.
        """
        count = int(classes.max()) + 1
        table = e.new_zeros(len(centres), count, centres.shape[1])
        for a in range(0, len(e), block):
            for j, middle in enumerate(centres):
                table[j].index_add_(0, classes[a : a + block], shares(e[a : a + block], middle, temperature))
        table = (table / len(e)).clamp_min_(LEAST)  # P(class, c)
        of_cluster, of_class = table.sum(1, keepdim=True), table.sum(2, keepdim=True)
        gain = (table / of_class).div_(of_cluster).log_()
        shared = table.mul_(gain).sum((1, 2), keepdim=True)  # (S, 1, 1)
        spread = -sum((p * p.log()).sum((1, 2), keepdim=True) for p in (of_class, of_cluster))  # both entropies
        return SharedInformation(centres, gain.add_(shared / spread * of_cluster.log()), temperature)

    def __call__(self, e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
        """``scene.row`` (B,) is the class of each image, from 0."""
        each = [
            (shares(e, middle, self.temperature) * gain[scene.row]).sum(1)
            for middle, gain in zip(self.centres, self.gain, strict=True)
        ]
        return torch.stack(each).mean(0)


def shares(e: Float[Tensor, "B D"], centres: Float[Tensor, "k D"], temperature: float) -> Float[Tensor, "B k"]:
    """p(c|x~): how much of each embedding falls into each cluster."""
    return F.softmax(-EUCLIDEAN.pairwise(e, centres) / temperature, 1)


def choose_as_a_set(
    classes: Integer[np.ndarray, " N"],
    clusters: Integer[np.ndarray, "S N A"],
    choice: Integer[np.ndarray, " N"],
    order: Sequence[int] | np.ndarray,
) -> Integer[np.ndarray, " N"]:
    """union: image after image takes, of the A images found for it, the one that lowers the mean over S k-means of NMI most, the
    others and the centroids as they are; its own where none lowers it.

    Args:
        clusters: where each of the A images falls under each k-means.
        choice: which one each image has now.
        order: the images in the order in which they choose.
    """
    s, n = len(clusters), len(classes)
    k, every = int(clusters.max()) + 1, np.arange(s)
    cells, cell = np.unique(classes[None, :, None] * np.int64(k) + clusters, return_inverse=True)
    cell = cell.reshape(clusters.shape)  # which (class, cluster) each falls into, only those that occur
    choice = choice.copy()
    at = np.arange(n)
    by_cluster = np.stack([np.bincount(clusters[j, at, choice], minlength=k) for j in every])
    by_cell = np.stack([np.bincount(cell[j, at, choice], minlength=len(cells)) for j in every])
    sizes = np.arange(n + 2, dtype=np.float64)
    term = sizes * np.log(np.maximum(sizes, 1.0))  # n log n
    more = np.diff(term)  # what one more adds to it
    of_clusters, of_cells = term[by_cluster].sum(1), term[by_cell].sum(1)  # (S,)
    of_classes = entropy(np.bincount(classes))
    for i in order:
        c, z, now = clusters[:, i], cell[:, i], choice[i]  # (S, A)
        if (c == c[:, :1]).all():
            continue
        by_cluster[every, c[:, now]] -= 1
        by_cell[every, z[:, now]] -= 1
        of_clusters -= more[by_cluster[every, c[:, now]]]
        of_cells -= more[by_cell[every, z[:, now]]]
        h = (
            np.log(n) - (of_clusters[:, None] + more[by_cluster[every[:, None], c]]) / n
        )  # entropy of the clusters (S, A)
        both = np.log(n) - (of_cells[:, None] + more[by_cell[every[:, None], z]]) / n
        nmi = ((of_classes + h - both) / (of_classes + h)).mean(0)  # half of it (A,)
        best = int(nmi.argmin())
        now = best if nmi[best] < nmi[now] - 1e-12 else now
        choice[i] = now
        of_clusters += more[by_cluster[every, c[:, now]]]
        of_cells += more[by_cell[every, z[:, now]]]
        by_cluster[every, c[:, now]] += 1
        by_cell[every, z[:, now]] += 1
    return choice


@dataclass(frozen=True)
class ClusterAttack:
    """One way to spoil clusters.

    Attributes:
        title: one line for a person.
        formula: what is descended. Of an image "alone" it is an objective: (embeddings, Scene of centroids) to a loss per image.
        labelled: it knows the classes, else the clean clusters alone.
        moving: centroids of the current adversarial embeddings at each step, else of the clean ones.
        way: whether each image descends for itself, all of them "joint", or they choose of what the attacks before found.
    """

    title: str
    formula: Callable[..., Any]
    labelled: bool
    moving: bool
    way: Literal["alone", "joint", "union"] = "alone"


CLUSTER_ATTACKS: Registry[ClusterAttack] = Registry(
    "clustering attack",
    {
        "C1": ClusterAttack("push from the class's current centroid", push, True, True),
        "C2": ClusterAttack("cross-entropy to the current class centroids", confuse, True, True),
        "C3": ClusterAttack("from the class's clean centroid to a random wrong one", swap, True, False),
        "U1": ClusterAttack("push from the current centroid of the clean cluster", push, False, True),
        "U2": ClusterAttack("cross-entropy to the current centroids of the clean clusters", confuse, False, True),
        "U3": ClusterAttack("from the clean cluster's centroid to a random other one", swap, False, False),
        "joint": ClusterAttack("soft mutual information of classes and current k-means clusters", SharedInformation,
                               True, True, "joint"),
        "union": ClusterAttack("for each image one of those that the attacks before found, chosen as a set", choose_as_a_set,
                               True, True, "union"),
    },
)  # fmt: skip

"""What is read from embeddings: read-outs after an attack, retrieval and clustering metrics.

Read-outs are per image, (embeddings, Scene) to (B,), and end in the :data:`READOUTS` table; benign
retrieval metrics are per query too and reduced at the edge. Shares and ranks are percent. A query
without another image of its class in the gallery has no recall: its outcome is NaN, and means leave
it out. Ties count against the model (:func:`~dmlbench.objectives.ahead`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.errors import UsageError
from dmlbench.fast.kmeans import lloyd, mutual_information
from dmlbench.fast.ranking import average_precisions, inverse_negative_penalty, negatives_ahead, recalled
from dmlbench.objectives import PRESERVED, ahead, flip, right_by
from dmlbench.registry import Registry, suggest
from dmlbench.scene import Scene

RECALL_AT = (1, 2, 4, 8)
CMC_AT = (5, 10)
"""Ranks at which re-identification reads its cumulative match characteristic besides rank 1: R@k under another name."""


@dataclass(frozen=True)
class CleanMetric:
    """A metric of clean embeddings: a percentage, higher is better, written with one decimal.

    Attributes:
        title: what a table calls it.
        grouped: read only of a data set with groups that do not count for one another, such as cameras.
        by_query: the mean of what each query has; else read of the whole gallery at once.
        lowest: percent.
        drop: points that a candidate may lose in ``compare``; None: it is shown and gates nothing.
    """

    title: str
    grouped: bool = False
    by_query: bool = True
    lowest: float = 0.0
    drop: float | None = None


CLEAN_METRICS = {
    "recall_at_1": CleanMetric("R@1", drop=1.0),
    **{f"recall_at_{k}": CleanMetric(f"R@{k}") for k in RECALL_AT[1:]},
    "map": CleanMetric("mAP"),
    "map_at_r": CleanMetric("MAP@R"),
    "nmi": CleanMetric("NMI", by_query=False, drop=1.0),
    "ami": CleanMetric("AMI", by_query=False, lowest=-100.0),
    **{f"recall_at_{k}": CleanMetric(f"R@{k}", grouped=True) for k in CMC_AT},
    "minp": CleanMetric("mINP", grouped=True),
}
"""Every clean metric that a run may have, in the order in which results list and tables show them."""
OF_THE_GALLERY = tuple(name for name, metric in CLEAN_METRICS.items() if not metric.by_query)
BLOCK = 256
"""Queries ranked at a time; ranks need (BLOCK, N) distances."""


def never(right: Float[np.ndarray, " Q"]) -> Bool[np.ndarray, " Q"]:
    """Every query has a value."""
    return np.zeros(len(right), dtype=bool)


def wrong_when_clean(right: Float[np.ndarray, " Q"]) -> Bool[np.ndarray, " Q"]:
    """Those whose nearest entry is of another class, and those without another image of their class."""
    return right != 100.0


@dataclass(frozen=True)
class Readout:
    """What is read off each attacked embedding (a protocol's component says which end is robust)."""

    read: Callable[[Tensor, Scene], Tensor]
    unit: str
    missing: Callable[[Float[np.ndarray, " Q"]], Bool[np.ndarray, " Q"]] | None = never
    """which queries have no value, by the clean R@1 of each (NaN without another image of its class); None: it hangs on something else"""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"unknown unit {self.unit!r} of a read-out{suggest(self.unit, UNITS)}")

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that there can be."""
        return UNITS[self.unit][:2]


UNITS = {
    "percent": (0.0, 100.0, 1),
    "cosine": (-1.0, 1.0, 3),
    "correlation": (-1.0, 1.0, 3),
    "distance": (0.0, float("inf"), 3),
}
"""The units of read-outs: between what their values lie, and with how many decimals these are written."""


def decimals(readout: str) -> int:
    """With how many decimals the values of a read-out are written; one of a plugin that is not installed as percent."""
    return UNITS[READOUTS[readout].unit if readout in READOUTS else "percent"][2]


def right_within(d: Tensor, scene: Scene, k: int = 1) -> Tensor:
    """(B,) 100 where a positive is among the k nearest by the distances d (B, N), else 0, NaN without positives."""
    best = d.masked_fill(~scene.same, torch.inf).amin(1, keepdim=True)  # (B, 1)
    before = (ahead(d, best) & scene.other).sum(1)
    return torch.where(scene.has_positive, (before < k).float() * 100.0, torch.nan)


def recall_at_1(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """R@1: is the nearest entry (own left out) of the image's class? Percent."""
    return right_within(scene.distances(e), scene)


def _rank(
    d: Float[Tensor, "B K"],
    to_all: Float[Tensor, "B k N"],
    ignored: Bool[Tensor, "B k N"] | None,
    counted: int | Int[Tensor, "B k"],
) -> Float[Tensor, " B"]:
    """Mean over K of the share of the entries that count which are nearer than ``d``, percent: the papers' indicator, by which an
    entry as near is not nearer. No answer is right or wrong by it, so the rule of ties has no say."""
    nearer = d[:, :, None] > to_all
    if ignored is None:
        return 100.0 * nearer.float().mean((1, 2))
    return 100.0 * ((nearer & ~ignored).sum(2) / counted).mean(1)


def candidate_rank(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """CA: normalised rank of the candidate in its queries' lists, 100 * mean over X of [d(q,c~) > d(q,X)]."""
    d = scene.distance.paired(e[:, None, :], scene.targets)  # (B, K)
    return _rank(d, scene.target_distances, scene.target_ignored, scene.target_counted)


def rank_in_query(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """QA: normalised rank of the candidates in the query's list, 0-based position / N, percent."""
    d = scene.distances(e)  # (B, N)
    ignored = None if scene.ignored is None else scene.ignored[:, None, :]
    return _rank(d.gather(1, scene.chosen), d[:, None, :], ignored, scene.counted)


def target_cosine(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """TMA: cosine between the attacked embedding and its target, -1 to 1."""
    return F.cosine_similarity(e, scene.targets[:, 0], dim=1)


def embedding_shift(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """ES:D: Euclidean length of the shift, 0 to 2 on the unit sphere.

    Where embeddings are not normalised (space E) the unit is the root mean square length of the gallery,
    so that the same scale fits; this is our reading, the papers define the score on the sphere.
    """
    return (e - scene.clean).norm(dim=1) / scene.gallery.scale


def kept_in_top_4(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """GTT: is the target, the clean top-1, still among the 4 nearest (own entry left out)? Percent."""
    d = scene.ranked(e)  # (B, N)
    c = d.gather(1, scene.chosen[:, :1])  # (B, 1)
    before = ahead(d, c).sum(1) - 1
    return (before < 4).float() * 100.0


def target_not_first(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """Is the nearest entry (own left out) none of the targets? Percent. Ties count against the model."""
    d = scene.ranked(e)  # (B, N)
    of_target = d.gather(1, scene.chosen).amin(1)  # (B,)
    others = d.scatter(1, scene.chosen, torch.inf).amin(1)
    return (~ahead(of_target, others) | of_target.isinf()).float() * 100.0


def map_at_r(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """MAP@R of the attacked query (own entry left out), percent, NaN without positives."""
    return average_precisions(*negatives_ahead(scene.distances(e), scene))[1]


def _right_when_clean(values: Tensor, scene: Scene) -> Tensor:
    """``values`` where the clean query's nearest entry is of its class, NaN elsewhere."""
    return torch.where(right_within(scene.distances(scene.clean), scene) == 100.0, values, torch.nan)


def recall_of_right(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """Panum: R@1 after the attack, of the queries that are right before it. Percent."""
    return _right_when_clean(recall_at_1(e, scene), scene)


def map_at_r_of_right(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """Panum: MAP@R after the attack, of the queries that are right before it. Percent."""
    return _right_when_clean(map_at_r(e, scene), scene)


def decided(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """FLIP: is the decision on the pair of the image and its target still right (one class or two)? Percent; NaN without a
    threshold. Ties count against the model."""
    if scene.threshold is None:
        return torch.full_like(e[:, 0], torch.nan)
    return right_by(flip(e, scene)).float() * 100.0


def kendall_tau(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """FOA: Kendall's tau-a between the prescribed order of the candidates and their order in the list, -1 to 1."""
    d = scene.distance.paired(e[:, None, :], scene.targets)  # (B, M)
    first, second = torch.triu_indices(d.shape[1], d.shape[1], 1, device=d.device)
    return (d[:, second] - d[:, first]).sign().mean(1)


def pair_accuracy(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """FOA: share of pairs of candidates that stand in the prescribed order, percent."""
    return 50.0 * (kendall_tau(e, scene) + 1.0)


def rank_of_wanted(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """SPQA: normalised rank of the candidate, as in QA, percent."""
    return rank_in_query(e, scene.aimed(scene.chosen[:, :-PRESERVED]))


def rank_of_kept(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """SPQA: mean normalised rank of the 5 clean nearest entries, which should stay near 0, percent."""
    return rank_in_query(e, scene.aimed(scene.chosen[:, -PRESERVED:]))


READOUTS: Registry[Readout] = Registry(
    "read-out",
    {
        "recall_at_1": Readout(recall_at_1, "percent", missing=np.isnan),
        "candidate_rank": Readout(candidate_rank, "percent"),
        "rank_in_query": Readout(rank_in_query, "percent"),
        "target_cosine": Readout(target_cosine, "cosine"),
        "embedding_shift": Readout(embedding_shift, "distance"),
        "kept_in_top_4": Readout(kept_in_top_4, "percent"),
        "target_not_first": Readout(target_not_first, "percent"),
        "map_at_r": Readout(map_at_r, "percent"),
        "recall_of_right": Readout(recall_of_right, "percent", missing=wrong_when_clean),
        "map_at_r_of_right": Readout(map_at_r_of_right, "percent", missing=wrong_when_clean),
        "decided": Readout(decided, "percent", missing=None),
        "kendall_tau": Readout(kendall_tau, "correlation"),
        "pair_accuracy": Readout(pair_accuracy, "percent"),
        "rank_of_wanted": Readout(rank_of_wanted, "percent"),
        "rank_of_kept": Readout(rank_of_kept, "percent"),
    },
)


def retrieval(scene: Scene, ks: Sequence[int] = RECALL_AT, *, grouped: bool = False) -> dict[str, np.ndarray]:
    """Clean retrieval metrics of every query of ``scene``, percent, (B,) each, NaN without positives.

    ``recall_at_k``; ``map``: average precision over the whole ranking; ``map_at_r`` (Musgrave, Belongie
    and Lim, "A Metric Learning Reality Check", 2020): over the first R, R the number of positives. With ``grouped`` the
    grouped ones of :data:`CLEAN_METRICS` too; ``minp``, the inverse negative penalty (Ye et al., "Deep Learning for Person Re-identification: A
    Survey and Outlook", 2021): the number of positives / the rank of the last of them.
    """
    ks = (*ks, *CMC_AT) if grouped else ks
    table = scene.clean.new_empty(min(BLOCK, len(scene)), len(scene.gallery))
    parts = []
    with torch.no_grad():
        for a in range(0, len(scene), BLOCK):
            part = scene[a : a + BLOCK]
            parts.append(_retrieval_block(part.distances(part.clean, table[: len(part)]), part, ks, grouped))
    return {name: torch.cat([p[name] for p in parts]).cpu().numpy() for name in parts[0]}


def _retrieval_block(d: Tensor, scene: Scene, ks: Sequence[int], grouped: bool) -> dict[str, Tensor]:
    before, real = negatives_ahead(d, scene)
    out = {f"recall_at_{k}": recalled(before, real, k) for k in ks}
    out["map"], out["map_at_r"] = average_precisions(before, real)
    if grouped:
        out["minp"] = inverse_negative_penalty(before, real)
    return out


def mean(values: np.ndarray) -> float:
    """Mean over queries in float64, those without an outcome (NaN) left out; NaN if none has one."""
    present = values[~np.isnan(values)]
    return float(present.mean(dtype=np.float64)) if len(present) else float("nan")


def kmeans(embeddings: np.ndarray, k: int, seed: int, iterations: int = 40) -> np.ndarray:
    """(N,) the cluster of each embedding by k-means (faiss), deterministic for a seed."""
    import faiss

    points = np.ascontiguousarray(embeddings, dtype=np.float32)
    means = faiss.Kmeans(
        points.shape[1], k, niter=iterations, seed=seed + 1, min_points_per_centroid=1, max_points_per_centroid=1 << 30
    )
    means.train(points)
    return np.asarray(means.index.search(points, 1)[1][:, 0])


def assignments(embeddings: np.ndarray | Tensor, k: int, seeds: Sequence[int]) -> np.ndarray:
    """(N, seeds) int32: the cluster that each embedding falls into, by k-means seed.

    On the CPU by faiss; a tensor on a GPU stays there.
    """
    if isinstance(embeddings, Tensor):
        if embeddings.device.type == "cuda":
            return np.stack([lloyd(embeddings, k, seed).cpu().numpy() for seed in seeds], axis=1).astype(np.int32)
        embeddings = embeddings.numpy()
    return np.stack([kmeans(embeddings, k, seed) for seed in seeds], axis=1).astype(np.int32)


def clustering(embeddings: np.ndarray, labels: np.ndarray, seeds: Sequence[int]) -> dict[str, float]:
    """NMI and AMI of k-means with as many clusters as classes; see :func:`agreement`."""
    return agreement(labels, assignments(embeddings, len(np.unique(labels)), seeds))


def agreement(labels: np.ndarray, assigned: np.ndarray) -> dict[str, float]:
    """NMI (arithmetic mean) and AMI of clusters (N, seeds) with the labels (N,), percent, mean over seeds.

    AMI is corrected for chance; NMI of many small clusters is far above 0 for random ones.
    """
    nmi, ami = np.array([mutual_information(labels, clusters) for clusters in assigned.T]).T  # (seeds,) each
    return {"nmi": 100.0 * float(nmi.mean()), "ami": 100.0 * float(ami.mean())}

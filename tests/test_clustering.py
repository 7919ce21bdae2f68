"""Clustering under attack: objectives, centroids and scores against plain loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from plain import distance
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix

import dmlbench
from dmlbench.clustering import CLUSTER_ATTACKS, attacked, centroids, pairwise_f1, worst
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.metrics import agreement
from dmlbench.protocol import load_protocol
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene
from dmlbench.subject import prepare
from dmlbench.threat import Threat

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def short():
    p = load_protocol("clustering")
    return p.model_copy(update={"threat": {**p.threat, "steps": 8}, "clustering_seeds": (0, 1)})


@pytest.fixture(scope="module")
def found(model, short):
    return evaluate(model, "digits", short, limit=200)


def around(space: str) -> tuple[Scene, torch.Tensor]:
    """Six embeddings among four centroids."""
    rng, d = Rng(4, torch.arange(6)), DISTANCES[space]
    e = d.finish(rng.normal(5))
    middle = Rng(5, torch.arange(4)).normal(5)
    own = torch.tensor([0, 1, 2, 3, 0, 1])
    wrong = torch.tensor([[1], [2], [3], [0], [2], [3]])
    return Scene(d, Gallery(middle, torch.arange(4)), e, own, own, wrong), e


@pytest.mark.parametrize("space", ["N", "E"])
def test_objectives_against_plain_loops(space: str) -> None:
    scene, e = around(space)
    X = scene.gallery.embeddings.double().numpy()
    push, confuse, swap = (CLUSTER_ATTACKS[n].objective(e, scene) for n in ("C1", "C2", "C3"))
    for i in range(6):
        d = [distance(space, e[i].double().numpy(), x) for x in X]
        own, wrong = int(scene.row[i]), int(scene.chosen[i, 0])
        assert float(push[i]) == pytest.approx(-d[own], abs=1e-5)
        assert float(swap[i]) == pytest.approx(d[wrong] - d[own], abs=1e-5)
        share = math.exp(-d[own] / 0.1) / sum(math.exp(-x / 0.1) for x in d)
        assert float(confuse[i]) == pytest.approx(math.log(share), abs=1e-4)


def test_centroids_are_means() -> None:
    e, groups = Rng(0, torch.arange(9)).normal(3), torch.tensor([0, 2, 2, 0, 3, 3, 3, 2, 0])
    middle = centroids(e, groups, 4)
    for g in (0, 2, 3):
        plain = np.mean([e[i].numpy() for i in range(9) if groups[i] == g], axis=0)
        np.testing.assert_allclose(middle[g], plain, atol=1e-6)
    assert bool((middle[1] == 0).all())


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 60)
    clusters = np.where(rng.random(60) < 0.2 * seed, labels, rng.integers(0, 5, 60))
    (_, fp), (fn, tp) = pair_confusion_matrix(labels, clusters)
    assert pairwise_f1(labels, clusters) == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    scores = agreement(labels, clusters[:, None])
    assert scores["ami"] == pytest.approx(100 * adjusted_mutual_info_score(labels, clusters))
    assert scores["nmi"] == pytest.approx(100 * normalized_mutual_info_score(labels, clusters))


def test_pairwise_f1_by_counting_pairs() -> None:
    labels, clusters = np.array([0, 0, 0, 1, 1, 2]), np.array([5, 5, 6, 6, 6, 6])
    pairs = [(i, j) for i in range(6) for j in range(i)]
    both = sum(labels[i] == labels[j] and clusters[i] == clusters[j] for i, j in pairs)
    precision = both / sum(clusters[i] == clusters[j] for i, j in pairs)
    recall = both / sum(labels[i] == labels[j] for i, j in pairs)
    assert pairwise_f1(labels, clusters) == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert pairwise_f1(labels, labels) == 100 and pairwise_f1(np.arange(3), np.arange(3)) == 0


def test_every_attack_lowers_what_it_should(found) -> None:
    extras = found.extras["clustering"]
    assert [r["attack"] for r in extras["attacks"]] == 2 * list(CLUSTER_ATTACKS)
    known = [r for r in extras["attacks"] if r["labelled"] and r["eps"] == "40/255"]
    for row in known:
        for key in ("nmi", "ami", "f1", "recall_at_1"):
            assert row[key] < extras["clean"][key], (row["attack"], key)
    low = {(r["eps"], r["labelled"]): r for r in extras["worst"]}
    assert low["40/255", True]["nmi"] == min(r["nmi"] for r in known)
    assert low["40/255", True]["ami"] < low["10/255", True]["ami"] < extras["clean"]["ami"]
    assert low["40/255", True]["nmi"] < low["40/255", False]["nmi"], "labels help the adversary"
    assert found.ers is None and "retention" not in found.extras


def test_worst_takes_the_lowest_of_each_number() -> None:
    rows = [
        {"eps": "1", "attack": a, "labelled": True, "nmi": n, "ami": m, "f1": 0.0, "recall_at_1": 1.0}
        for a, n, m in (("C1", 5.0, 9.0), ("C2", 7.0, 2.0))
    ]
    with_free = [*rows, {**rows[0], "labelled": False, "nmi": 1.0}]
    low = worst(with_free)
    assert (low[0]["nmi"], low[0]["ami"], low[1]["nmi"]) == (5.0, 2.0, 1.0)


def test_images_stay_in_the_ball_and_are_recorded(found) -> None:
    for eps, radius in (("10/255", 10 / 255), ("40/255", 40 / 255)):
        for name in CLUSTER_ATTACKS:
            norm = found.arrays[f"{name}@{eps}/norm"]
            assert norm.shape == (200,) and 0 < norm.max() <= radius + 1e-5
            assert found.arrays[f"{name}@{eps}/clusters"].shape == (200, 2)
            np.testing.assert_allclose(
                found.part(f"{name}@{eps}").value, found.arrays[f"{name}@{eps}/value"].mean(), rtol=1e-6
            )


def test_recall_within_the_attacked_set_by_a_plain_loop(model, found) -> None:
    limited = evaluate(model, "digits", load_protocol("clustering").model_copy(
        update={"threat": {"norm": "linf", "steps": 2}, "clustering_seeds": (0,), "grid": {"8": ("40/255",)}}), limit=24)  # fmt: skip
    with torch.no_grad():
        e = model(torch.from_numpy(limited.sample["C1@40/255"])).numpy()
    y = limited.arrays["label"]
    for i in range(24):
        d = [np.linalg.norm(e[i] - e[j]) if j != i else np.inf for j in range(24)]
        right = y[int(np.argmin(d))] == y[i]
        value = limited.arrays["C1@40/255/value"][i]
        assert np.isnan(value) if (y == y[i]).sum() == 1 else (value == 100) == right


def test_centroids_that_move_with_the_attack_differ_from_fixed_ones(model) -> None:
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=60)
    _, groups = np.unique(subject.scene.labels.numpy(), return_inverse=True)
    groups = torch.from_numpy(groups)
    threat = Threat(eps="40/255", step="10/255", steps=4)
    wrong = (groups[:, None] + 1) % 5
    moving = attacked(subject, CLUSTER_ATTACKS["C1"], threat, groups, wrong)
    still = attacked(subject, CLUSTER_ATTACKS["C1"].__class__("", CLUSTER_ATTACKS["C1"].objective, True, False),
                     threat, groups, wrong)  # fmt: skip
    assert not torch.equal(moving, still)


def test_k_means_seeds_are_the_protocols() -> None:
    assert load_protocol("clustering").clustering_seeds == (0, 1, 2, 3, 4)


def test_a_single_class_is_refused(model, short) -> None:
    images = TensorImages(Rng(0, torch.arange(5)).uniform(1, 8, 8))
    lonely = RetrievalDataset("lonely", "test", images, np.zeros(5, dtype=np.int64))
    with pytest.raises(UsageError, match="single class"):
        evaluate(model, lonely, short)


def test_from_the_command_line(typed) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--protocol", "clustering", "--limit", "20")
    assert "lowest, labels known" in done.out and "AMI" in done.out and "pair F1" in done.out and "ERS" not in done.out

"""Clustering under attack: objectives, centroids and scores against plain loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from plain import distance
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix

import dmlbench
from dmlbench.cluster_attacks import CLUSTER_ATTACKS, SharedInformation, choose_as_a_set
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.clustering import search as clustering
from dmlbench.kinds.clustering.search import attacked, centroids
from dmlbench.kinds.clustering.summary import pairwise_f1, worst
from dmlbench.metrics import agreement, assignments
from dmlbench.protocol import Joint
from dmlbench.protocols import FOLDER, load_protocol
from dmlbench.rng import Rng
from dmlbench.run.subject import prepare
from dmlbench.scene import Gallery, Scene
from dmlbench.threat import Threat

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def short():
    p = load_protocol("clustering")
    joint = p.joint.model_copy(update={"steps": 20, "restarts": 2})
    return p.model_copy(update={"threat": {**p.threat, "steps": 8}, "joint": joint, "clustering_seeds": (0, 1)})


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
    push, confuse, swap = (CLUSTER_ATTACKS[n].formula(e, scene) for n in ("C1", "C2", "C3"))
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
        update={"threat": {"norm": "linf", "steps": 2}, "clustering_seeds": (0,), "grid": {"8": ("40/255",)}, "attacks": ("C1",), "joint": None}), limit=24)  # fmt: skip
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
    still = attacked(subject, CLUSTER_ATTACKS["C1"].__class__("", CLUSTER_ATTACKS["C1"].formula, True, False),
                     threat, groups, wrong)  # fmt: skip
    assert not torch.equal(moving, still)


def test_shared_information_against_a_plain_loop() -> None:
    """Per image: sum over clusters of p(c|x) (log(P(c|class) / P(c)) + NMI/2 log P(c)), by softmax of minus Euclidean distances."""
    e, centres = Rng(0, torch.arange(9)).normal(3), Rng(1, torch.arange(2)).normal(4, 3)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
    objective = SharedInformation.of(e, classes, centres, 0.5, 4)
    scene = Scene(DISTANCES["E"], Gallery(e, classes), e, classes, classes, classes[:, None])
    wanted = np.zeros(9)
    for middle in centres.double().numpy():
        p = np.zeros((9, 4))
        for i in range(9):
            d = [np.linalg.norm(e[i].double().numpy() - c) for c in middle]
            p[i] = [math.exp(-x / 0.5) for x in d] / np.sum([math.exp(-x / 0.5) for x in d])
        cluster = [p[:, c].mean() for c in range(4)]
        share = [np.mean([int(y) == k for y in classes]) for k in range(3)]
        both = [[sum(p[i, c] for i in range(9) if int(classes[i]) == k) / 9 for c in range(4)] for k in range(3)]
        pairs = [(k, c) for k in range(3) for c in range(4)]
        shared = sum(both[k][c] * math.log(both[k][c] / (share[k] * cluster[c])) for k, c in pairs)
        nmi = shared / ((-sum(q * math.log(q) for q in cluster) - sum(q * math.log(q) for q in share)) / 2)
        for i, y in enumerate(classes.tolist()):
            wanted[i] += sum(
                p[i, c] * (math.log(both[y][c] / share[y] / cluster[c]) + nmi / 2 * math.log(cluster[c])) for c in range(4)
            ) / 2  # fmt: skip
    np.testing.assert_allclose(objective(e, scene), wanted, atol=1e-5)


def test_shared_information_leads_where_the_soft_nmi_falls() -> None:
    """Its gradient is that of the soft NMI itself, tables and all, but for one positive factor a k-means."""
    e, centres = Rng(2, torch.arange(12)).normal(3), Rng(3, torch.arange(1)).normal(4, 3)
    classes = torch.arange(12) % 3
    scene = Scene(DISTANCES["E"], Gallery(e, classes), e, classes, classes, classes[:, None])

    def slope(of) -> torch.Tensor:
        x = e.clone().requires_grad_(True)
        return torch.autograd.grad(of(x), x)[0]

    def soft_nmi(x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(-torch.cdist(x, centres[0]) / 0.5, 1)
        both = torch.stack([p[classes == k].sum(0) for k in range(3)]) / 12
        rows, columns = both.sum(1), both.sum(0)
        information = (both * (both / rows[:, None] / columns).log()).sum()
        return 2 * information / -((rows * rows.log()).sum() + (columns * columns.log()).sum())

    fixed = slope(lambda x: SharedInformation.of(e, classes, centres, 0.5, 5)(x, scene).sum())
    true = slope(soft_nmi)
    ratio = float(fixed.norm() / true.norm())
    np.testing.assert_allclose(fixed, ratio * true, atol=1e-4 * float(fixed.abs().max()))


def mean_nmi(classes: np.ndarray, clusters: np.ndarray, choice: np.ndarray) -> float:
    """Of the chosen images, mean over k-means, by scikit-learn."""
    return float(np.mean([normalized_mutual_info_score(classes, c[np.arange(len(c)), choice]) for c in clusters]))


@pytest.mark.parametrize("seed", range(6))
def test_choosing_as_a_set_is_the_plain_greedy_choice_and_never_raises_nmi(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, clusters = rng.integers(0, 4, 30), rng.integers(0, 4, (2, 30, 3))
    clusters[:, :, 0] = np.where(rng.random(30) < 0.7, classes, clusters[:, :, 0])
    start, order = rng.integers(0, 3, 30), rng.permutation(30)
    found = choose_as_a_set(classes, clusters, start, order)
    plain = start.copy()
    for i in order:
        now = mean_nmi(classes, clusters, plain)
        tried = [mean_nmi(classes, clusters, np.where(np.arange(30) == i, a, plain)) for a in range(3)]
        plain[i] = int(np.argmin(tried)) if min(tried) < now - 1e-12 else plain[i]
    assert mean_nmi(classes, clusters, found) == pytest.approx(mean_nmi(classes, clusters, plain), abs=1e-9)
    assert mean_nmi(classes, clusters, found) < mean_nmi(classes, clusters, start)
    np.testing.assert_array_equal(choose_as_a_set(classes, clusters[:, :, :1], np.zeros(30, int), order), 0)


def test_the_joint_attack_ends_when_nmi_stops_falling_and_keeps_the_lowest_seen(model, monkeypatch) -> None:
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=100)
    classes = np.unique(subject.scene.labels.numpy(), return_inverse=True)[1]
    rules = Joint(temperature=0.05, steps=4, restarts=9, rounds=1, patience=2, least=200.0, look=2)
    seen, steps, threat = [], [], Threat(eps="20/255", steps=4)
    real = clustering.agreement
    monkeypatch.setattr(clustering, "agreement", lambda *a: seen.append(real(*a)["nmi"]) or real(*a))
    x = clustering.jointly(subject, rules, threat, classes, (0,), subject.rng(0), steps.append)
    assert len(seen) == 3 * 2, "two looks in each of three restarts: the last two lowered NMI by less than 200 points"
    assert sum(steps) == 100 * 4 * 9, "the bar is full"
    monkeypatch.undo()
    with torch.no_grad():
        e = model(x)
    assert real(classes, assignments(e, 5, (0,)))["nmi"] == pytest.approx(min(seen), abs=1e-6)


def test_the_union_leaves_no_more_than_the_others(found) -> None:
    for eps in ("10/255", "40/255"):
        rows = {r["attack"]: r for r in found.extras["clustering"]["attacks"] if r["eps"] == eps}
        assert rows["union"]["nmi"] <= min(r["nmi"] for n, r in rows.items() if n != "union") + 1e-6


def test_the_images_of_the_union_are_the_chosen_ones(model, found) -> None:
    names = [n for n in CLUSTER_ATTACKS if n != "union"]
    choice, rows = found.arrays["union@10/255/choice"], np.isin(found.arrays["query"], found.sample["rows"])
    assert len(set(choice.tolist())) > 1
    norms = np.stack([found.arrays[f"{n}@10/255/norm"] for n in names])
    np.testing.assert_array_equal(found.arrays["union@10/255/norm"], norms[choice, np.arange(200)])
    for place, i in enumerate(np.flatnonzero(rows)):
        np.testing.assert_array_equal(
            found.sample["union@10/255"][place], found.sample[f"{names[choice[i]]}@10/255"][place]
        )


def test_version_1_gives_what_its_board_says_and_the_joint_attack_less(model) -> None:
    """Numbers of the run of version 1 that was on the board, and what the attacks of version 2 make of the same images."""
    first, second = load_protocol("clustering@1"), load_protocol("clustering")
    assert first.sha256 == "93d6ae711b7a666db962bac2cb0f62020cd21b80ec53f9b86112cde223715d25"
    assert first.attacks == ("C1", "C2", "C3", "U1", "U2", "U3") and first.superseded_by == "clustering@2"
    grid = {"8": ("10/255",)}
    found = evaluate(model, "digits", first.model_copy(update={"grid": grid, "attacks": ("C1", "U3")}))
    rows = {r["attack"]: r for r in found.extras["clustering"]["attacks"]}
    for name, nmi, ami in (("C1", 26.798, 26.375), ("U3", 33.702, 33.320)):
        assert rows[name]["nmi"] == pytest.approx(nmi, abs=1.0) and rows[name]["ami"] == pytest.approx(ami, abs=1.0)
    short = {"grid": grid, "attacks": ("joint",), "joint": second.joint.model_copy(update={"restarts": 1})}
    joint = evaluate(model, "digits", second.model_copy(update=short)).extras["clustering"]["attacks"][0]
    assert joint["nmi"] < 24.5 and joint["ami"] < 24.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("attacks = [", 'attacks = ["C9", '), "unknown clustering attack 'C9'"),
        (('"C1", "C2"', '"C1", "C1"'), "'C1' twice"),
        (('"C1", "C2", "C3", "U1", "U2", "U3", "joint", "union"', '"U1"'), "one that knows the labels"),
        (('"joint", "union"', '"C1"'), "'C1' twice"),
        ((', "joint", "union"', ""), "do nothing without each other"),
        (('"C1", "C2"', '"union", "C2"'), "begin with one that makes images"),
        (("patience = 3", "patience = 0"), "greater than or equal to 1"),
        (("temperature = 0.05", "temperature = 0"), "greater than 0"),
        (('kind = "clustering"', 'kind = "ers"'), "needs"),
    ],
)
def test_a_file_that_would_do_nothing_is_refused(tmp_path, change, said) -> None:
    text = (FOLDER / "clustering.toml").read_text()
    assert change[0] in text
    (tmp_path / "mine.toml").write_text(text.replace(*change))
    with pytest.raises(DataError, match=said):
        load_protocol(str(tmp_path / "mine.toml"))


def test_k_means_seeds_are_the_protocols() -> None:
    assert load_protocol("clustering").clustering_seeds == (0, 1, 2, 3, 4)


def test_a_single_class_is_refused(model, short) -> None:
    images = TensorImages(Rng(0, torch.arange(5)).uniform(1, 8, 8))
    lonely = RetrievalDataset("lonely", "test", images, np.zeros(5, dtype=np.int64))
    with pytest.raises(UsageError, match="single class"):
        evaluate(model, lonely, short)


def test_queries_that_are_each_a_class_are_refused_before_anything_is_embedded(model, short, monkeypatch) -> None:
    """Any clusters of them are right: NMI would be 100 whatever the attack does."""
    images = TensorImages(Rng(0, torch.arange(10)).uniform(1, 8, 8))
    people = RetrievalDataset("people", "test", images, np.arange(10, dtype=np.int64) % 5, query=np.arange(5))
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("embedded"))
    with pytest.raises(UsageError, match=r"'people': each of the 5 queries .* a class of its own"):
        evaluate(model, people, short)


def test_from_the_command_line(typed, tmp_path) -> None:
    text = (FOLDER / "clustering.toml").read_text()
    for long, few in (("steps = 50", "steps = 5"), ("restarts = 8", "restarts = 2"), ("look = 10", "look = 5")):
        assert long in text
        text = text.replace(long, few)
    (tmp_path / "short.toml").write_text(text)
    done = typed("evaluate", "--model", DEFAULT, "--protocol", str(tmp_path / "short.toml"), "--limit", "20")
    assert "lowest, labels known" in done.out and "AMI" in done.out and "pair F1" in done.out and "ERS" not in done.out
    assert "joint@40/255" in done.out and "union@40/255" in done.out

"""What makes large galleries cheap against the plain formulas: sweeps, ranks of positives, k-means, mutual information."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from dmlbench import metrics
from dmlbench.embedding import DISTANCES
from dmlbench.fast import kmeans, ranking, sweep
from dmlbench.fast.sweep import nearest_entries
from dmlbench.objectives import OBJECTIVES
from dmlbench.scene import Gallery, Scene


def scene_of(space="N", entries=300, images=7, dims=5, k=1, classes=6, seed=0):
    """A random scene in float64, whose images are the first gallery entries."""
    g = torch.Generator().manual_seed(seed)
    gallery = torch.randn(entries, dims, generator=g, dtype=torch.float64)
    gallery = F.normalize(gallery, dim=1) if DISTANCES[space].normalized else gallery
    labels = torch.randint(classes, (entries,), generator=g)
    return Scene(
        distance=DISTANCES[space],
        gallery=Gallery(gallery, labels),
        clean=gallery[:images],
        labels=labels[:images],
        row=torch.arange(images),
        chosen=torch.randint(entries, (images, k), generator=g),
    )


def moved(scene, seed=1):
    """Embeddings somewhere near the clean ones, which want a gradient."""
    g = torch.Generator().manual_seed(seed)
    e = scene.clean + 0.3 * torch.randn(scene.clean.shape, generator=g, dtype=torch.float64)
    return (F.normalize(e, dim=1) if scene.distance.normalized else e).requires_grad_(True)


def apart(space, a, b):
    """One distance, in the open."""
    return 1 - (a * b).sum() if space == "C" else ((a - b) ** 2).sum().sqrt()


def plain(name, space, e, scene):
    """The objectives written out entry by entry."""
    gallery, n = scene.gallery.embeddings, len(scene.gallery)
    values = []
    for i in range(len(e)):
        terms = []
        for target in scene.targets[i]:
            for x in gallery:
                if name in ("raise_in_query", "lower_in_query"):
                    gap = apart(space, e[i], target) - apart(space, e[i], x)
                else:
                    gap = apart(space, target, e[i]) - apart(space, target, x)
                terms.append(F.relu(gap if name.startswith("raise") else -gap))
        values.append(torch.stack(terms).sum() / (n * scene.chosen.shape[1]))
    return torch.stack(values)


def plain_spread(space, e, scene, published):
    """LTM written out entry by entry."""
    values = []
    for i in range(len(e)):
        near, far = [], []
        for j, x in enumerate(scene.gallery.embeddings):
            if scene.gallery.labels[j] != scene.labels[i]:
                far.append(apart(space, e[i], x))
            elif published or j != scene.row[i]:
                near.append(apart(space, e[i], x))
        gap = torch.stack(far).max() - torch.stack(near).min() if near and far else e[i].sum() * 0
        values.append(F.relu(gap))
    return torch.stack(values)


@pytest.mark.parametrize("space", ["N", "C", "E"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ["raise_candidate", "lower_candidate", "raise_in_query", "lower_in_query"])
def test_hinges_are_the_plain_formula(name, space, k, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", 7 * k * 64)  # several blocks, the last one short
    scene = scene_of(space, entries=100, k=k)
    e = moved(scene)
    weights = torch.linspace(-1, 2, len(e), dtype=torch.float64)
    fast, slow = OBJECTIVES[name](e, scene), plain(name, space, e, scene)
    torch.testing.assert_close(fast, slow)
    (g_fast,) = torch.autograd.grad((fast * weights).sum(), e)
    (g_slow,) = torch.autograd.grad((slow * weights).sum(), e)
    torch.testing.assert_close(g_fast, g_slow)


@pytest.mark.parametrize("space", ["N", "C", "E"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("entries", [70, 300])
def test_spread_is_the_plain_formula(space, published, entries, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", 7 * 256)
    scene = scene_of(space, entries=entries)
    e = moved(scene)
    fast = OBJECTIVES["spread_published" if published else "spread"](e, scene)
    slow = plain_spread(space, e, scene, published)
    torch.testing.assert_close(fast, slow)
    (g_fast,), (g_slow,) = (torch.autograd.grad(v.sum(), e) for v in (fast, slow))
    torch.testing.assert_close(g_fast, g_slow)


@pytest.mark.parametrize("space", ["N", "C", "E"])
@pytest.mark.parametrize("entries", [40, 700])  # with few and with many entries the last is found in different ways
@given(classes=st.sampled_from([1, 2, 6, 900]), seed=st.integers(0, 999))
@settings(max_examples=8, deadline=None)
def test_nearest_entries_and_their_gap_are_those_a_loop_finds(space, entries, classes, seed):
    scene = scene_of(space, entries, classes=classes, seed=seed)
    scene = replace(scene, row=torch.where(torch.arange(len(scene)) == 2, -1, scene.row))
    e, labels = moved(scene, seed).detach(), scene.gallery.labels.tolist()
    found = nearest_entries(e, scene, aimed=True)
    margins, to_class = OBJECTIVES["margin"](e, scene), OBJECTIVES["margin_to_class"](e, scene)
    for i, y in enumerate(scene.labels.tolist()):
        d = [float(apart(space, e[i], x)) for x in scene.gallery.embeddings]
        groups = (
            [j for j, c in enumerate(labels) if c == y and j != scene.row[i]],
            [j for j, c in enumerate(labels) if c != y],
            [j for j, c in enumerate(labels) if c == labels[scene.chosen[i, 0]]],
        )
        nearest = [min(group, key=d.__getitem__) if group else None for group in groups]
        for rows, wanted in zip(found, nearest, strict=True):
            assert wanted is None or int(rows[i]) == wanted
        positive, negative, target = (float("inf") if j is None else d[j] for j in nearest)
        if groups[0] or groups[1]:
            torch.testing.assert_close(float(margins[i]), negative - positive)
        if groups[1] and labels[scene.chosen[i, 0]] != y:
            torch.testing.assert_close(float(to_class[i]), target - positive)


def test_no_gradient_at_the_clean_place_is_infinite():
    """Every image stands exactly on its own entry, and on its target."""
    for space in ("N", "C", "E"):
        scene = scene_of(space)
        scene = scene.aimed(scene.row[:, None])
        e = scene.clean.clone().requires_grad_(True)
        for name in ("raise_candidate", "lower_candidate", "raise_in_query", "lower_in_query"):
            (g,) = torch.autograd.grad(OBJECTIVES[name](e, scene).sum(), e)
            assert torch.isfinite(g).all() and g.norm(dim=1).max() <= 2, (space, name)


def test_a_lone_image_and_a_single_class_give_spread_nothing_to_do():
    alone = scene_of(classes=1000)
    e = moved(alone)
    values = OBJECTIVES["spread"](e, alone)
    assert (values[~alone.has_positive] == 0).all() and (values[alone.has_positive] > 0).all()
    assert 0 < int(alone.has_positive.sum()) < len(e)
    one = scene_of(classes=1)
    assert (OBJECTIVES["spread"](moved(one), one) == 0).all()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(-1, 6), min_size=1, max_size=5),
    st.data(),
)
def test_rows_of_a_class_are_those_a_loop_finds(classes, asked, data):
    """Padding repeats a row; classes the gallery lacks have none; the image's own entry is no positive."""
    row = [data.draw(st.sampled_from([-1, *(i for i, c in enumerate(classes) if c == y)])) for y in asked]
    gallery = Gallery(torch.zeros(len(classes), 2), torch.tensor(classes))
    scene = replace(scene_of(), gallery=gallery, labels=torch.tensor(asked), row=torch.tensor(row))
    rows, real = scene.kin_rows
    for i, y in enumerate(asked):
        kin = [j for j, c in enumerate(classes) if c == y]
        assert rows[i][real[i]].tolist() == kin
        assert rows[i][scene.positive_rows[i]].tolist() == [j for j in kin if j != row[i]]
        assert not kin or set(rows[i].tolist()) == set(kin)
        assert bool(scene.has_negative[i]) == (len(kin) < len(classes))


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_entries_that_no_image_wants_are_left_out_of_the_product(space, monkeypatch):
    """QA+ close to its end: few entries are nearer than the candidate; both ways give the plain gradient."""
    monkeypatch.setattr(sweep, "CPU_BLOCK", 7 * 64)
    scene = scene_of(space, entries=200)
    e = moved(scene)
    nearest = scene.distances(e.detach()).topk(3, largest=False).indices[:, 2:]
    scene = scene.aimed(nearest)
    slow = plain("raise_in_query", space, e, scene)
    (g_slow,) = torch.autograd.grad(slow.sum(), e)
    widths = []
    pruned = sweep._touched
    monkeypatch.setattr(sweep, "_touched", lambda a, b: widths.append((out := pruned(a, b))[0].shape[1]) or out)
    fast = OBJECTIVES["raise_in_query"](e, scene)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast.sum(), e)[0], g_slow)
    assert 0 < sum(widths) <= 3 * len(e)  # a candidate counts before itself where its distance is rounded


@pytest.mark.parametrize("pairs, entries", [(1, 1), (7, 70), (256, 60502), (3, 1 << 20)])
def test_blocks_cover_the_gallery_once(pairs, entries):
    seen = [i for s in sweep.blocks(pairs, entries, torch.device("cpu")) for i in (s.start, s.stop)]
    assert seen[0] == 0 and seen[-1] == entries and seen[1:-1:2] == seen[2::2]
    assert all(b > a for a, b in zip(seen[::2], seen[1::2], strict=True))
    widest = max(b - a for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert (widest - 64) * pairs <= sweep.CPU_BLOCK


def plain_retrieval(scene, ks):
    """R@k, mAP and MAP@R of each query, entry by entry; ties count against the model."""
    table = []
    for i in range(len(scene)):
        listed = []
        for j, x in enumerate(scene.gallery.embeddings):
            if j != scene.row[i]:
                good = bool(scene.gallery.labels[j] == scene.labels[i])
                listed.append((float(apart(scene.distance.space, scene.clean[i], x)), good))
        listed.sort()  # False before True: a negative goes first where distances tie
        right = [good for _, good in listed]
        positives = sum(right)
        if not positives:
            table.append([np.nan] * (len(ks) + 2))
            continue
        precision = [sum(right[: r + 1]) / (r + 1) for r in range(len(right)) if right[r]]
        within = [sum(right[: r + 1]) / (r + 1) for r in range(positives) if right[r]]
        recalls = [100.0 * any(right[:k]) for k in ks]
        table.append([*recalls, 100 * sum(precision) / positives, 100 * sum(within) / positives])
    return np.array(table)


@pytest.mark.parametrize("many", [0, 1000])
@pytest.mark.parametrize("space, classes", [("N", 3), ("E", 3), ("C", 40)])
def test_ranks_of_positives_give_the_metrics_of_the_whole_list(space, classes, many, monkeypatch):
    monkeypatch.setattr(ranking, "MANY", many)
    monkeypatch.setattr(metrics, "BLOCK", 5)
    monkeypatch.setattr(sweep, "CPU_BLOCK", 5 * 64)
    scene = scene_of(space, entries=110, images=12, classes=classes)
    scene = replace(scene, row=torch.tensor([*range(10), -1, -1]), labels=torch.tensor([*scene.labels[:11], 999]))
    ks = (1, 2, 8)
    found = metrics.retrieval(scene, ks)
    np.testing.assert_allclose(np.stack(list(found.values()), 1), plain_retrieval(scene, ks), atol=1e-4)


def test_kmeans_in_torch_finds_what_faiss_finds():
    """NMI within one point over seeds, on clusters that overlap."""
    rng = np.random.default_rng(0)
    middles = rng.normal(0, 1, (40, 16))
    labels = np.repeat(np.arange(40), 30)
    points = (middles[labels] + rng.normal(0, 0.55, (1200, 16))).astype(np.float32)
    by_faiss = metrics.agreement(labels, metrics.assignments(points, 40, range(5)))
    ours = np.stack([kmeans.lloyd(torch.from_numpy(points), 40, seed).numpy() for seed in range(5)], 1)
    by_torch = metrics.agreement(labels, ours)
    assert 50 < by_faiss["nmi"] < 99
    assert abs(by_faiss["nmi"] - by_torch["nmi"]) <= 1.0
    assert by_torch["ami"] >= by_faiss["ami"] - 1.0
    assert (ours[:, 0] == kmeans.lloyd(torch.from_numpy(points), 40, 0).numpy()).all()


def test_kmeans_fills_empty_clusters_and_blocks_do_not_matter(monkeypatch):
    """Copies of two points and three others: a start on copies leaves clusters empty."""
    points = torch.tensor([[0.0, 0], [10, 0], [0, 30], [0, 31], [9, 9]]).repeat_interleave(
        torch.tensor([50, 50, 1, 1, 1]), 0
    )
    monkeypatch.setattr(kmeans, "spread_start", lambda points, k, generator: points[:k].clone())
    whole = kmeans.lloyd(points, 5, 0)
    assert len(whole.unique()) == 5
    monkeypatch.setattr(kmeans, "BLOCK", 20)
    assert (kmeans.lloyd(points, 5, 0) == whole).all()
    assert len(kmeans.lloyd(points[:3], 5, 0)) == 3


@pytest.mark.parametrize("classes, clusters, n", [(1, 1, 9), (1, 4, 30), (5, 7, 60), (300, 280, 900), (4, 4, 4)])
def test_mutual_information_is_that_of_scikit_learn(classes, clusters, n):
    rng = np.random.default_rng(classes)
    labels = np.arange(n) % classes
    found = np.where(rng.random(n) < 0.5, labels % clusters, rng.integers(0, clusters, n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = normalized_mutual_info_score(labels, found), adjusted_mutual_info_score(labels, found)
    assert kmeans.mutual_information(labels, found) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    """Hinges, extremes, ranks and k-means on the GPU."""
    scene = scene_of("N", entries=3000, images=32, dims=16)
    on = replace(
        scene,
        gallery=Gallery(scene.gallery.embeddings.float().cuda(), scene.gallery.labels.cuda()),
        **{name: getattr(scene, name).cuda() for name in ("labels", "row", "chosen")},
        clean=scene.clean.float().cuda(),
    )
    e = moved(scene).detach()
    for name in ("raise_candidate", "lower_candidate", "raise_in_query", "lower_in_query", "spread"):
        mine, theirs = e.clone().requires_grad_(True), e.float().cuda().requires_grad_(True)
        a, b = OBJECTIVES[name](mine, scene), OBJECTIVES[name](theirs, on)
        torch.testing.assert_close(b.double().cpu(), a, atol=1e-4, rtol=1e-4)
        (ga,), (gb,) = torch.autograd.grad(a.sum(), mine), torch.autograd.grad(b.sum(), theirs)
        torch.testing.assert_close(gb.double().cpu(), ga, atol=1e-3, rtol=1e-3)
    for name, values in metrics.retrieval(scene).items():
        assert np.nanmean(np.abs(values - metrics.retrieval(on)[name])) < 0.1
    points = scene.gallery.embeddings.float()
    labels = scene.gallery.labels.numpy()
    mine, theirs = (metrics.agreement(labels, metrics.assignments(p, 20, range(3))) for p in (points, points.cuda()))
    assert abs(mine["nmi"] - theirs["nmi"]) <= 1.0

"""Sweeps over the gallery against the plain formulas: value and gradient, blocks, ties, missing classes."""

import pytest
import torch
import torch.nn.functional as F

from dmlbench import sweep
from dmlbench.embedding import DISTANCES
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
    scene = scene_of(space, entries=200, k=k)
    e = moved(scene)
    weights = torch.linspace(-1, 2, len(e), dtype=torch.float64)
    fast, slow = OBJECTIVES[name](e, scene), plain(name, space, e, scene)
    torch.testing.assert_close(fast, slow)
    (g_fast,) = torch.autograd.grad((fast * weights).sum(), e)
    (g_slow,) = torch.autograd.grad((slow * weights).sum(), e)
    torch.testing.assert_close(g_fast, g_slow)


@pytest.mark.parametrize("space", ["N", "C", "E"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("entries", [70, 300, 640])
def test_spread_is_the_plain_formula(space, published, entries, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", 7 * 256)
    scene = scene_of(space, entries=entries)
    e = moved(scene)
    fast = OBJECTIVES["spread_published" if published else "spread"](e, scene)
    slow = plain_spread(space, e, scene, published)
    torch.testing.assert_close(fast, slow)
    (g_fast,), (g_slow,) = (torch.autograd.grad(v.sum(), e) for v in (fast, slow))
    torch.testing.assert_close(g_fast, g_slow)


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


@pytest.mark.parametrize("pairs, entries", [(1, 1), (7, 70), (256, 60502), (3, 1 << 20)])
def test_blocks_cover_the_gallery_once(pairs, entries):
    seen = [i for s in sweep.blocks(pairs, entries, torch.device("cpu")) for i in (s.start, s.stop)]
    assert seen[0] == 0 and seen[-1] == entries and seen[1:-1:2] == seen[2::2]
    assert all(b > a for a, b in zip(seen[::2], seen[1::2], strict=True))
    widest = max(b - a for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert (widest - 64) * pairs <= sweep.CPU_BLOCK

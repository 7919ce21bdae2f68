"""Each objective against a plain loop, in every embedding space, and its gradient against differences."""

import math

import numpy as np
import pytest
import torch
from plain import PLAIN
from scenes import B, D, scene_of

from dmlbench.embedding import DISTANCES
from dmlbench.objectives import OBJECTIVES
from dmlbench.scene import Gallery, Scene


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("name", list(PLAIN))
def test_value_is_that_of_the_plain_loop(name: str, space: str) -> None:
    scene, moved = scene_of(space)
    found = OBJECTIVES[name](moved, scene)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    expected = [PLAIN[name](space, i, moved[i].double().numpy(), X, y, scene.chosen[i].tolist()) for i in range(B)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("space", list(DISTANCES))
@pytest.mark.parametrize("name", list(PLAIN))
def test_gradient_is_that_of_differences(name: str, space: str) -> None:
    scene, moved = scene_of(space, seed=1)
    e = moved.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(OBJECTIVES[name](e, scene).sum(), e)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    h = 1e-5
    for i in range(B):
        at, chosen = moved[i].double().numpy(), scene.chosen[i].tolist()
        slope = [
            (PLAIN[name](space, i, at + h * u, X, y, chosen) - PLAIN[name](space, i, at - h * u, X, y, chosen))
            / (2 * h)
            for u in np.eye(D)
        ]
        np.testing.assert_allclose(found[i].numpy(), slope, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", list(PLAIN))
def test_an_image_has_the_same_loss_in_any_batch(name: str) -> None:
    scene, moved = scene_of("N")
    whole = OBJECTIVES[name](moved, scene)
    for i in range(B):
        torch.testing.assert_close(OBJECTIVES[name](moved[i : i + 1], scene[i : i + 1])[0], whole[i])


def test_shift_leaves_the_clean_image() -> None:
    scene, _ = scene_of("N")
    jitter = scene.clean + 1e-8 * torch.sign(torch.arange(D) - 2.0)
    for start in (scene.clean, jitter):
        e = start.clone().requires_grad_(True)
        loss = OBJECTIVES["shift"](e, scene)
        (g,) = torch.autograd.grad(loss.sum(), e)
        torch.testing.assert_close(loss.detach(), torch.zeros(B), atol=1e-6, rtol=0)
        torch.testing.assert_close(g, torch.full_like(g, D**-0.5))


@pytest.mark.parametrize("space", list(DISTANCES))
def test_the_published_shift_takes_torchs_first_step(space: str) -> None:
    """Torch's own distances on the clean embedding and the reference moved by 1e-7, as the public code has them."""
    scene, _ = scene_of(space)
    e = scene.clean.clone().requires_grad_(True)
    if space == "C":
        theirs = 1 - torch.nn.functional.cosine_similarity(e.double(), scene.clean.double() + 1e-7)
    else:
        theirs = torch.nn.functional.pairwise_distance(e, scene.clean + 1e-7)
    (expected,) = torch.autograd.grad(-theirs.sum(), e)
    jitter = (scene.clean + 1e-8 * torch.sign(torch.arange(D) - 2.0)).requires_grad_(True)
    for start in (e, jitter):
        (g,) = torch.autograd.grad(OBJECTIVES["shift_published"](start, scene).sum(), start)
        if space == "C":  # what is left of it on the sphere
            g = g - (g * scene.clean).sum(1, keepdim=True) * scene.clean
        cosine = torch.nn.functional.cosine_similarity(g, expected)
        assert bool((cosine > 0.999).all()), cosine
        if space != "C":
            torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["shift", "shift_published", "approach_published"])
@pytest.mark.parametrize("length", [0.01, 100.0])
@pytest.mark.parametrize("share", [0.1, 10.0])
def test_rounding_is_as_large_as_embeddings_are_long(name: str, length: float, share: float) -> None:
    """Space E: only a shift below 1e-5 of the gallery's root mean square length counts as none."""
    scene, moved = scene_of("E")
    X = scene.gallery.embeddings * length
    rms = math.sqrt(sum(float(v) ** 2 for v in X.flatten()) / len(X))
    scene = Scene(scene.distance, Gallery(X, scene.gallery.labels), X[:B], scene.labels, scene.row, scene.row[:, None])
    away = torch.nn.functional.normalize(moved, dim=1) * share * 1e-5 * rms
    e = (scene.clean + away).requires_grad_(True)
    (found,) = torch.autograd.grad(OBJECTIVES[name](e, scene).sum(), e)
    for g, image, reference in zip(found.numpy(), e.detach().numpy(), scene.clean.numpy(), strict=True):
        moved_by = np.float32(1e-7 if name == "shift_published" else 0)
        difference = image - reference if share > 1 else reference - (reference + moved_by)
        along = difference + (0 if name == "shift" else 1e-6)
        if name == "shift" and share < 1:
            along = -np.ones(D)
        expected = along / np.linalg.norm(along) * (1 if name == "approach_published" else -1)
        np.testing.assert_allclose(g, expected, atol=5e-3)


@pytest.mark.parametrize("space", ["N", "E"])
def test_the_published_gtm_leaves_an_image_that_is_its_own_target(space: str) -> None:
    scene, _ = scene_of(space)
    own = scene.aimed(scene.row[:, None])
    for name, expected in (("approach", 0.0), ("approach_published", D**-0.5)):
        e = scene.clean.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(OBJECTIVES[name](e, own).sum(), e)
        torch.testing.assert_close(g, torch.full_like(g, expected))


def test_a_lonely_image_has_no_ltm_loss() -> None:
    scene, moved = scene_of("N")
    alone = scene.gallery.labels.clone()
    alone[0] = 99
    lonely = Scene(
        scene.distance, Gallery(scene.gallery.embeddings, alone), scene.clean, alone[:B], scene.row, scene.chosen
    )
    e = moved.clone().requires_grad_(True)
    loss = OBJECTIVES["spread"](e, lonely)
    (g,) = torch.autograd.grad(loss.sum(), e)
    assert float(loss[0].detach()) == 0 and float(g[0].abs().sum()) == 0 and float(g[1:].abs().sum()) > 0

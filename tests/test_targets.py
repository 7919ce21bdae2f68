"""Each target rule against a plain loop, and that targets belong to images."""

from dataclasses import replace

import pytest
import torch
from plain import order, to_all
from scenes import big_scene, scene_of

from dmlbench.embedding import DISTANCES
from dmlbench.errors import UsageError
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene
from dmlbench.targets import TARGETS


@pytest.mark.parametrize("space", list(DISTANCES))
def test_rules_against_plain_loops(space: str) -> None:
    scene = big_scene(space)
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    rng = Rng(0, scene.row)
    near = TARGETS["nearest"](scene, 3, rng)
    other = TARGETS["nearest_other"](scene, 2, rng)
    top = TARGETS["top_percent"](scene, 2, rng)
    for i in range(len(scene)):
        ranking = order(to_all(space, X[i], X), leave_out=i)
        assert near[i].tolist() == ranking[:3]
        assert other[i].tolist() == [j for j in ranking if y[j] != y[i]][:2]
        assert set(top[i].tolist()) == set(ranking[:2]), "int(0.01 * 230) = 2"


def test_published_gtm_target_against_its_description() -> None:
    scene = big_scene("N")
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    found = TARGETS["nearest_other_published"](scene, 1, Rng(0, scene.row))[:, 0].tolist()
    for i in range(len(scene)):
        ranking = [*order(to_all("N", X[i], X), leave_out=i), i]
        rank = {row: r for r, row in enumerate(ranking)}
        kept = [rank[j] for j in range(len(y)) if y[j] != y[ranking[0]]]
        assert found[i] == kept.index(min(kept))


def test_only_the_published_gtm_target_depends_on_the_order_of_the_gallery() -> None:
    scene = big_scene("N")
    order_ = torch.cat([torch.arange(0, 230, 3), torch.arange(1, 230, 3), torch.arange(2, 230, 3)])
    place = order_.argsort()  # where each row went
    turned = replace(
        scene,
        gallery=Gallery(scene.gallery.embeddings[order_], scene.gallery.labels[order_]),
        row=place[scene.row],
    )
    rng = Rng(0, scene.row)

    def images(of: Scene, name: str) -> torch.Tensor:
        return of.gallery.embeddings[TARGETS[name](of, 1, rng)[:, 0]]

    assert torch.equal(images(scene, "nearest_other"), images(turned, "nearest_other"))
    X, y = turned.gallery.embeddings.double().numpy(), turned.gallery.labels.tolist()
    for i, target in enumerate(images(turned, "nearest_other_published")):
        ranking = order(to_all("N", scene.clean[i].double().numpy(), X), leave_out=int(place[i]))
        closest = next(j for j in ranking if y[j] != y[ranking[0]])
        skipped = sum(y[j] == y[ranking[0]] for j in range(closest))  # the slip: entries before it that were masked
        assert torch.equal(target, turned.gallery.embeddings[closest - skipped])
    moved = images(scene, "nearest_other_published") != images(turned, "nearest_other_published")
    assert moved.any(1).float().mean() > 0.5


def test_random_targets_cover_the_gallery_evenly() -> None:
    scene = big_scene("N")
    found = TARGETS["anywhere"](scene, 500, Rng(1, scene.row))
    counts = torch.bincount(found.flatten(), minlength=230).float()
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


@pytest.mark.parametrize("name", list(TARGETS))
def test_targets_belong_to_the_image_not_the_batch(name: str) -> None:
    scene = big_scene("N")
    whole = TARGETS[name](scene, 1, Rng(7, scene.row))
    for a, b in ((0, 1), (5, 12), (39, 40)):
        assert torch.equal(TARGETS[name](scene[a:b], 1, Rng(7, scene.row[a:b])), whole[a:b])


def test_a_small_gallery_has_no_top_percent() -> None:
    scene, _ = scene_of("N")
    with pytest.raises(UsageError, match="at least 100"):
        TARGETS["top_percent"](scene, 1, Rng(0, scene.row))
    with pytest.raises(UsageError, match="fewer than the 5"):
        TARGETS["top_percent"](big_scene("N"), 5, Rng(0, torch.arange(40)))

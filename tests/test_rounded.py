"""The gallery in 8 bits: its sums against a plain loop, ties, when it is used, and what it does to a score."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmlbench
from dmlbench.embedding import DISTANCES
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.fast import rounded, sweep
from dmlbench.fast.rounded import RoundedGallery, settled
from dmlbench.fast.sweep import extreme_entries, query_hinge
from dmlbench.scene import Gallery, Scene

MODEL = "digits-smallcnn-triplet-hm-lga-ics"


def scene_of(space, seed, n=150, b=6, k=1, d=16):
    """A scene whose gallery is rounded, and embeddings somewhat away from the clean ones."""
    g = torch.Generator().manual_seed(seed)
    distance = DISTANCES[space]
    x = distance.finish(torch.randn(n, d, generator=g) + 0.5)
    y = torch.arange(n) % 10
    scene = Scene(distance, Gallery(x, y, True), x[:b], y[:b], torch.arange(b), torch.randint(n, (b, k), generator=g))
    return scene, distance.finish(x[:b] + 0.2 * torch.randn(b, d, generator=g))


def whole_pull(slope, near, sign):
    """``slope`` in whole numbers of a unit that the distances to the targets set, where it is at most 127 of them."""
    if sign < 0:
        unit = 1 / (16 * max(near))
    else:
        unit = max(j / d for j, d in enumerate(sorted(near), start=1)) / 127
    return unit * round(slope / unit) if slope <= 127 * unit else slope


def looped(e, scene, sign):
    """Value and gradient of the hinge with rounded numbers, one image and entry at a time, in float64."""
    gallery = scene.gallery.rounded
    codes, centre, step = gallery.codes.double(), gallery.centre.double(), float(gallery.step)
    values, gradients = [], []
    for image, targets in zip(e.double(), scene.chosen.tolist(), strict=True):
        unit = float(image.abs().max()) / 127
        whole = torch.round(image / unit)

        def far(j, whole=whole, unit=unit, image=image):
            product = float(image @ centre) + unit * step * float(whole @ codes[j])
            if scene.distance.metric == "cosine":
                return 1.0 - product
            square = float(image @ image) - 2 * product + float(scene.gallery.square[j])
            return max(square, float(gallery.noise)) ** 0.5

        near = [far(t) for t in targets]
        exact = [float(scene.distance.paired(image, scene.gallery.embeddings[t].double())) for t in targets]
        value, gradient = 0.0, torch.zeros_like(image)
        for j in range(len(gallery)):
            entry, d = centre + step * codes[j], far(j)
            ahead = [k for k in range(len(targets)) if sign * (d - near[k]) > 1e-6]
            if not ahead:
                continue
            if scene.distance.metric == "cosine":
                pull = -len(ahead) * entry
                value += sign * sum(1.0 - float(image @ entry) - exact[k] for k in ahead)
            else:
                pull = whole_pull(len(ahead) / d, near, sign) * (image - entry)
                value += sign * sum(d - exact[k] for k in ahead)
            for k in ahead:
                target = scene.gallery.embeddings[targets[k]].double()
                pull += target if scene.distance.metric == "cosine" else (target - image) / exact[k]
            gradient += sign * pull
        values.append(value / len(gallery) / len(targets))
        gradients.append(gradient / len(gallery) / len(targets))
    return torch.tensor(values).clamp_min(0.0), torch.stack(gradients)


@pytest.mark.parametrize("space", ["N", "C", "E"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 3]), sign=st.sampled_from([-1.0, 1.0]))
def test_sums_are_those_of_a_loop_over_rounded_numbers(space, seed, k, sign):
    scene, e = scene_of(space, seed, k=k)
    e.requires_grad_()
    value = query_hinge(e, scene, sign)
    (gradient,) = torch.autograd.grad(value.sum(), e)
    wanted, slope = looped(e.detach(), scene, sign)
    torch.testing.assert_close(value.detach().double(), wanted.double(), rtol=1e-3, atol=1e-4)
    assert float((gradient - slope).norm(dim=1).max()) <= 0.005 * max(1e-2, float(slope.norm(dim=1).max()))


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_gradients_point_where_those_of_float32_do(space):
    scene, e = scene_of(space, 1, n=2000, b=40, d=128)
    exact = replace(scene, gallery=Gallery(scene.gallery.embeddings, scene.gallery.labels))
    e.requires_grad_()
    for sign in (-1.0, 1.0):
        a, b = (torch.autograd.grad(query_hinge(e, s, sign).sum(), e)[0] for s in (exact, scene))
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=1).min()) > 0.997
        with torch.no_grad():  # a value without a gradient is that of float32
            torch.testing.assert_close(*(query_hinge(e.detach(), s, sign) for s in (scene, exact)), rtol=0, atol=0)


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_a_gradient_does_not_depend_on_the_batch_it_is_made_in(space):
    """Beyond float rounding, though every pull is rounded to 8 bits."""
    scene, e = scene_of(space, 2, n=5000, b=96, d=64)

    def gradient(part, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(query_hinge(x, part, 1.0).sum(), x)[0]

    whole = gradient(scene, e)
    for size in (1, 7, 40):
        parts = torch.cat([gradient(scene[a : a + size], e[a : a + size]) for a in range(0, len(e), size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def gradient_of(scene, e, sign):
    e = e.clone().requires_grad_()
    return torch.autograd.grad(query_hinge(e, scene, sign).sum(), e)[0]


def test_what_a_very_near_entry_pulls_above_8_bits_is_not_lost():
    scene, _ = scene_of("E", 4)
    e = scene.clean + 0.02  # each image's own entry is at a fiftieth of its target's distance or so
    nearest = scene.distances(e).amin(1) * 8 < scene.distance.paired(e[:, None, :], scene.targets)[:, 0]
    assert nearest.all()
    gradient, (_, wanted) = gradient_of(scene, e, -1.0), looped(e, scene, -1.0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=0.005 * float(wanted.norm(dim=1).max()))
    hurt = e.clone()
    hurt[2] = torch.nan  # a row without numbers changes no other
    rest = torch.arange(len(e)) != 2
    torch.testing.assert_close(gradient_of(scene, hurt, -1.0)[rest], gradient[rest], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_pulls_of_more_entries_than_32_bits_hold_add_up_in_64(monkeypatch, sign):
    scene, e = scene_of("N", 6, n=3000)
    few = gradient_of(scene, e, sign)
    monkeypatch.setattr(sweep, "MOST", 0)
    torch.testing.assert_close(gradient_of(scene, e, sign), few, rtol=0, atol=0)


@pytest.mark.parametrize("space", ["N", "C"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_target_and_its_copies_are_not_ahead_of_it(space, sign):
    scene, e = scene_of(space, 3)
    copies = scene.gallery.embeddings[:1].expand(40, -1).contiguous()
    among = Scene(
        scene.distance, Gallery(copies, torch.arange(40), True), scene.clean, scene.labels, scene.row, scene.chosen % 40
    )
    e.requires_grad_()
    value = query_hinge(e, among, sign)
    (gradient,) = torch.autograd.grad(value.sum(), e)
    assert not value.any() and not gradient.any()


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_extreme_entries_are_as_far_as_the_extreme_ones(space):
    scene, e = scene_of(space, 5, n=3000, b=30, d=64)
    exact = replace(scene, gallery=Gallery(scene.gallery.embeddings, scene.gallery.labels))
    found, wanted = (extreme_entries(e, s, s.positive_rows) for s in (scene, exact))
    for near, true in zip(found, wanted, strict=True):
        a, b = (scene.distance.paired(e, scene.gallery.embeddings[rows]) for rows in (near, true))
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)


@given(st.integers(2, 60), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_an_entry_is_within_half_a_step_of_its_code(n, d, size):
    x = size * torch.randn(n, d, generator=torch.Generator().manual_seed(n * d))
    found = RoundedGallery.of(x, x.square().sum(1))
    assert float((found.centre + found.step * found.codes - x).abs().max()) <= 0.51 * float(found.step)


def test_auto_rounds_large_galleries_on_processors_that_are_fast_at_it(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(rounded, "native", lambda: True)
    assert [settled("auto", n, cpu) for n in (rounded.LARGE - 1, rounded.LARGE)] == ["float32", "int8"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # with one it is "tf32": tests/test_tf32.py
    assert settled("auto", 10**6, cuda) == "float32"
    assert [settled(p, 10**6, cpu) for p in ("float32", "int8", "bfloat16")] == ["float32", "int8", "bfloat16"]
    with pytest.raises(UsageError, match="int8 is for a CPU"):
        settled("int8", 10, cuda)
    monkeypatch.setattr(rounded, "native", lambda: False)
    assert settled("auto", 10**6, cpu) == "float32"


@pytest.fixture(scope="module")
def measured():
    """The default model as the leaderboard has it, and with its gallery rounded, in batches of two sizes."""

    def run(precision, batch):
        embedder = dmlbench.load_model(MODEL)
        embedder.precision = precision
        return evaluate(embedder, device="cpu", batch_size=batch)

    return run("float32", 256), run("int8", 256), run("int8", 100)


def test_the_ers_of_a_shipped_model_moves_by_less_than_a_third_of_a_point(measured):
    exact, rough, _ = measured
    assert (exact.environment.gradient_precision, rough.environment.gradient_precision) == ("float32", "int8")
    assert exact.benign == rough.benign
    assert abs(exact.ers - rough.ers) < 0.3
    for part in exact.measurements:
        np.testing.assert_array_equal(
            exact.arrays[f"{part.component}/targets"], rough.arrays[f"{part.component}/targets"]
        )


def test_rounded_scores_do_not_depend_on_the_batch(measured):
    _, a, b = measured
    for one, other in zip(a.measurements, b.measurements, strict=True):
        assert abs(one.score - other.score) <= 0.12, one.component  # one query of 896

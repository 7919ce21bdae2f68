"""Gradients in TF32: where the switch is on and where it is off, what rounding does to a score, and who decides.

No GPU is needed: ``benchmarks/tf32.py`` rounds the factors of products on the CPU wherever torch's switches let a
GPU do so, and its rounding is held to a slow twin here. Tests marked ``cuda`` ask a real one.
"""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tf32 import WAYS, Emulated, emulated, scored
from torch import nn

import dmlbench
from dmlbench.attacks import AttackLoss
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.fast import rounded
from dmlbench.fast.compiled import ready
from dmlbench.fast.exact import in_tf32, settings, true_float32
from dmlbench.fast.rounded import settled
from dmlbench.kinds.hunting import Log
from dmlbench.kinds.strict.search import Misrank
from dmlbench.objectives import margin, shift
from dmlbench.optimizers import autograd
from dmlbench.rng import Rng
from dmlbench.run.subject import prepare
from dmlbench.scene import Gallery, Scene

MODEL = "digits-smallcnn-triplet-hm-lga-ics"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RNG = Rng(0, torch.arange(4))


def standing():
    return [setting.read() for setting in settings()]


def wanted():
    """Where every switch is to stand while a gradient is made in TF32; mkldnn, which is no GPU's, may stand anywhere."""
    return [setting.tf32 for setting in settings() if setting.tf32 is not None]


def found():
    return [setting.read() for setting in settings() if setting.tf32 is not None]


def slow(x, way):
    """The nearest number with 11 significant bits (ties to even), or the one towards zero, by exact fractions."""
    if x == 0 or math.isinf(x):
        return x
    unit = Fraction(2) ** (max(math.frexp(x)[1] - 1, -126) - 10)
    whole = Fraction(x) / unit
    return float((round(whole) if way == "nearest" else math.trunc(whole)) * unit)


@pytest.mark.parametrize("way", WAYS)
@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**126), max_value=2.0**126), min_size=1, max_size=30)
)
def test_rounding_is_that_of_fractions(way, numbers):
    x = torch.tensor([*numbers, math.inf, -math.inf, 1 + 2**-11, 1 + 3 * 2**-11, 2**-140])
    assert WAYS[way](x).tolist() == [slow(v, way) for v in x.tolist()]


@pytest.mark.parametrize("network,shape", [
    (nn.Linear(12, 5), (12,)), (nn.Conv2d(3, 6, 3, padding=1), (3, 5, 5)), (nn.Linear(12, 5, bias=False), (12,)),
])  # fmt: skip
def test_both_passes_of_a_product_get_rounded_factors_and_float32_sums(network, shape):
    x = torch.randn(4, *shape, requires_grad=True)
    towards = torch.randn_like(network(x))
    with Emulated() as mode, in_tf32():
        y = network(x)
        (slope,) = torch.autograd.grad(y, x, towards)
    assert mode.rounded == 2
    with torch.no_grad():
        network.weight.copy_(WAYS["nearest"](network.weight))
    z = WAYS["nearest"](x.detach()).requires_grad_()
    torch.testing.assert_close(y, network(z), rtol=1e-5, atol=1e-5)
    (exact,) = torch.autograd.grad(network(z), z, WAYS["nearest"](towards))
    torch.testing.assert_close(slope, exact, rtol=1e-5, atol=1e-5)


def test_the_switch_is_on_in_both_passes_of_a_gradient_and_nowhere_else():
    seen = {}

    class Watched:
        precision = "tf32"

        def __call__(self, x):
            seen["forward"] = found()
            y = 2 * x
            y.register_hook(lambda g: seen.update(backward=found()))
            return y.sum(1)

    with true_float32():
        autograd(Watched(), torch.rand(4, 3), RNG)
        assert seen == {"forward": wanted(), "backward": wanted()}
        assert standing() == [setting.exact for setting in settings()]
        Watched.precision = "float32"
        autograd(Watched(), torch.rand(4, 3), RNG)
        assert wanted() not in seen.values()


def test_settings_are_put_back_after_an_error_whatever_a_program_has_set():
    class Broken:
        precision = "tf32"

        def __call__(self, x):
            raise KeyError

    before = standing()
    mixed = torch.backends.cuda.matmul
    try:
        if hasattr(mixed, "fp32_precision"):
            mixed.fp32_precision = "tf32"  # which the old switch does not know of, so it will not be told
        with pytest.raises(KeyError):
            autograd(Broken(), torch.rand(4, 3), RNG)
        assert getattr(mixed, "fp32_precision", "tf32") == "tf32"
    finally:
        if hasattr(mixed, "fp32_precision"):
            mixed.fp32_precision = before[2]
    assert standing() == before


def test_auto_is_tf32_on_gpus_that_have_it_and_asking_elsewhere_is_an_error(monkeypatch, typed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, precision in (((7, 5), "float32"), ((8, 0), "tf32"), ((9, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert settled("auto", 10**6, CUDA) == precision
        assert settled("float32", 10, CUDA) == "float32"
    assert settled("tf32", 10, CUDA) == "tf32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"capability 8.0 or higher; here is cuda, of 7.5"):
        settled("tf32", 10, CUDA)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert settled("auto", 10, CUDA) == "float32"
    monkeypatch.undo()
    refused = typed("evaluate", "--model", MODEL, "--precision", "tf32", "--device", "cpu", code=2)
    assert "--precision tf32 is for an NVIDIA GPU of compute capability 8.0 or higher; here is cpu" in refused.err


@pytest.fixture(scope="module")
def measured():
    """The default model as the leaderboard has it, and with emulated TF32 gradients."""
    return scored(MODEL, None), scored(MODEL, WAYS["nearest"])


@pytest.mark.slow
def test_the_ers_of_a_shipped_model_moves_by_less_than_a_third_of_a_point(measured):
    exact, rough = measured
    assert (exact.environment.gradient_precision, rough.environment.gradient_precision) == ("float32", "tf32")
    assert 0 < abs(exact.ers - rough.ers) < 0.3


@pytest.mark.slow
def test_clean_numbers_and_targets_are_those_of_float32(measured):
    exact, rough = measured
    assert exact.benign == rough.benign
    for part in exact.measurements:
        a, b = (e.arrays[f"{part.component}/targets"] for e in measured)
        np.testing.assert_array_equal(a, b)


def test_read_outs_and_searches_without_gradients_are_those_of_float32():
    options = {"attacks": ["QA+@square", "TMA@nes"], "limit": 16}
    short = dmlbench.load_protocol("ers-digits")
    short = short.model_copy(update={"threat": {**short.threat, "steps": 2, "queries": 20}, "clustering_seeds": (0,)})
    exact, rough = (scored(MODEL, way, protocol=short, **options) for way in (None, WAYS["nearest"]))
    for name, values in exact.arrays.items():
        np.testing.assert_array_equal(values, rough.arrays[name], err_msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_a_shift_begins_as_the_papers_mean_it(way):
    """Without ``Gallery.blur`` the first step goes along the rounding of the embeddings: ERS moved by up to a point."""
    model, data = dmlbench.load_model(MODEL), dmlbench.load_dataset("digits")
    slopes = []
    for precision in ("float32", "tf32"):
        model.precision = precision
        with emulated(WAYS[way]), true_float32():
            subject = prepare(model, data, limit=48, device="cpu")
            loss = AttackLoss(subject.embedder, shift, subject.scene)
            slopes.append(autograd(loss, subject.images(0, 48), subject.rng(0))[1])
    alike = torch.cosine_similarity(*(slope.flatten(1) for slope in slopes), dim=1)
    assert float(alike.min()) > 0.98


class Wrong(nn.Module):
    """Two numbers of an image, the other way round where a gradient is asked for: the roughest rounding there is."""

    def forward(self, x):
        e = x.flatten(1)
        return e.flip(1) if x.requires_grad else e


@pytest.mark.parametrize("precision,believed", [("tf32", False), ("bfloat16", False), ("float32", True)])
def test_an_image_is_settled_by_a_pass_in_float32_only(precision, believed):
    model = Embedder(Wrong(), (1, 1, 2), distance=DISTANCES["E"]).eval()
    model.precision = precision
    entries = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 1.0], [0.0, 0.9]])
    rows = torch.tensor([0, 2])
    labels = torch.tensor([0, 0, 1, 1])
    scene = Scene(model.distance, Gallery(entries, labels), entries[rows], labels[rows], rows, rows[:, None])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.1]]).view(2, 1, 1, 2)  # the first is right, the second misranked
    log = Log(images)
    autograd(Misrank(model, "margin", scene, log), images, RNG)
    assert log.first.tolist() == ([1, 0] if believed else [0, 0])
    for objective in ("margin", "shift"):  # the reverse: rounded passes that agree are confirmed
        log = Log(images)
        autograd(Misrank(model, objective, scene, log), images.flip(3), RNG)
        assert log.first.tolist() == ([0, 1] if believed else [0, 0])
        with torch.no_grad():
            Misrank(model, objective, scene, log)(images)
        assert bool(log.first[1])


def test_a_strict_search_breaks_only_what_a_read_out_confirms():
    strict = dmlbench.load_protocol("strict")
    few = tuple(s.model_copy(update={"threat": {**s.threat, "steps": 8, "queries": 8}}) for s in strict.steps)
    strict = strict.model_copy(update={"steps": few, "audit": 0, "clustering_seeds": (0,), "grid": {"8": ("20/255",)}})
    done = scored(MODEL, WAYS["cut"], protocol=strict, limit=24)
    assert done.environment.gradient_precision == "tf32"
    by, first = (done.arrays[f"strict@20/255/{what}"] for what in ("broken_by", "iteration"))
    assert bool((by >= 2).any()) and bool((first[by >= 2] > 0).all())


def test_a_surrogate_makes_gradients_as_is_said_of_the_model():
    model = dmlbench.load_model("digits-smallcnn-triplet-none")
    data = dmlbench.load_dataset("digits")
    model.precision = "bfloat16"
    other = ready(dmlbench.load_model(MODEL), len(data), CPU, model)
    assert (other.precision, other.name, len(data) < rounded.LARGE) == ("bfloat16", MODEL, True)


needs_tf32 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with TF32"
)


@pytest.mark.cuda
@needs_tf32
def test_cuda_rounds_gradients_and_nothing_else():
    network = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6400, 64))
    model = dmlbench.load_model(network, input_shape=(64, 12, 12)).eval()
    images = torch.rand(8, 64, 12, 12, device="cuda")
    on = {p: ready(_asking(model, p), 8, CUDA) for p in ("float32", "tf32")}
    with torch.no_grad(), true_float32():
        clean = on["float32"](images)
        torch.testing.assert_close(on["tf32"](images), clean, rtol=0, atol=0)
        labels = torch.arange(8, device="cuda") % 2
        rows = torch.arange(8, device="cuda")
        scene = Scene(model.distance, Gallery(clean, labels), clean, labels, rows, rows[:, None])
        rng = Rng(0, rows)
        values, slopes = zip(
            *(autograd(AttackLoss(on[p], margin, scene), images, rng) for p in ("float32", "tf32")), strict=True
        )
        torch.testing.assert_close(on["tf32"](images), clean, rtol=0, atol=0)
    off = float((slopes[0] - slopes[1]).norm() / slopes[0].norm())
    assert 1e-5 < off < 5e-2, "TF32 was not on within the gradient, or far too rough"
    assert not torch.equal(*values)


def _asking(model, precision):
    model.precision = precision
    return model


@pytest.mark.cuda
@needs_tf32
@pytest.mark.parametrize("model", [MODEL, "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-est"])
def test_cuda_gives_the_ers_of_float32_gradients(model):
    run = partial(evaluate, device="cuda")
    exact, rough = (run(_asking(dmlbench.load_model(model), p)) for p in ("float32", "auto"))
    assert (exact.environment.gradient_precision, rough.environment.gradient_precision) == ("float32", "tf32")
    assert exact.benign == rough.benign
    assert abs(exact.ers - rough.ers) < 0.3

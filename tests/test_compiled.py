"""Compiled gradient steps: the same numbers, one graph whatever the batch, and a run that goes on where they fail."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

import dmlbench
from dmlbench.errors import NotComparable
from dmlbench.evaluate import evaluate
from dmlbench.fast.compiled import LEAST, Steps, apart, ready
from dmlbench.run.units import Units, Work

MODEL = "digits-smallcnn-triplet-hm-lga-ics"
NOTE = "--compile: gradient steps ran uncompiled, since "


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a backend that counts graphs and runs them as they are; no C++ compiler is waited for."""
    seen = Counter()
    real = torch.compile

    def counting(graph, inputs):
        seen["graphs"] += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend=counting))
    return seen


def small(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).requires_grad_(False).to(memory_format=torch.channels_last)


def gradient(run, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(run(x).sum(), x)[0]


def test_a_batch_that_shrinks_is_one_graph(graphs):
    network = small()
    steps = Steps(network)
    for size in (256, 250, 131, 77, LEAST, 200, LEAST - 1, 1, 33):
        x = torch.rand(size, 3, 8, 8)
        for like in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(gradient(steps, like), gradient(network, like))
    assert graphs["graphs"] == 1 and not steps.trouble


def test_many_models_in_one_process_are_all_compiled(graphs):
    """torch stops at 8 graphs of a function, so each model has a function of its own."""
    for seed in range(12):
        steps = Steps(small(seed))
        steps.network[-1].out_features = seed
        gradient(steps, torch.rand(20, 3, 8, 8))
        assert not steps.trouble
    assert graphs["graphs"] == 12


def test_networks_are_compared_by_outputs_and_by_gradients():
    network, x = small(), torch.rand(LEAST, 3, 8, 8)
    assert apart(network, network, x) == (0.0, 0.0)
    assert apart(network, lambda x: 1.5 * network(x), x) == pytest.approx((0.5, 0.5), rel=1e-5)
    off = apart(network, lambda x: network(x.detach()) + 0 * x.sum(), x)
    assert off == pytest.approx((0.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_compiled_network_that_is_another_one_is_not_used(precision, monkeypatch):
    network, x = small(), torch.rand(LEAST, 3, 8, 8)
    monkeypatch.setattr(torch, "compile", lambda run: lambda x: run(x) + x.flatten(1)[:, :4])
    steps = Steps(network, precision)
    assert torch.equal(gradient(steps, x), gradient(network, x))
    assert steps.trouble.startswith("the compiled network is not the eager one: outputs are ")


def test_memory_that_runs_out_is_not_taken_for_a_failure(monkeypatch):
    def full(network):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Steps(small())(torch.rand(LEAST, 3, 8, 8))


def test_read_outs_and_clean_embeddings_do_not_depend_on_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: pytest.fail("a read-out was compiled"))
    model = dmlbench.load_model(MODEL, compiled=True)
    twin = ready(model, 10, torch.device("cpu"))
    images = torch.rand(32, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model.frozen()(images), rtol=0, atol=0)
    assert twin.steps is not None and model.steps is None and model.frozen().steps is None
    assert not any("steps" in name for name in twin.state_dict())
    options = {"limit": 20, "attacks": ["TMA@square"], "device": "cpu"}
    assert evaluate(model, **options).environment.notes == ()


def test_where_torch_cannot_compile_the_run_goes_on_and_says_so(monkeypatch, typed, tmp_path):
    def broken(network):
        raise RuntimeError("no C++ compiler is here\nand more lines")

    words = ["evaluate", "--model", MODEL, "--limit", "40", "--attacks", "TMA,ES", "--device", "cpu"]
    plain = typed(*words, "--out", tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", broken)
    done = typed(*words, "--compile", "--out", tmp_path / "compiled")
    said = f"{NOTE}torch.compile failed (RuntimeError: no C++ compiler is here)"
    assert f"note: {said}" in done.err.splitlines() and "note:" not in plain.err
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("plain", "compiled"))
    assert [m["value"] for m in a["measurements"]] == [m["value"] for m in b["measurements"]]
    assert [e["environment"][key] for e in (a, b) for key in ("compiled", "notes")] == [False, [], True, [said]]
    refused = typed(*words, "--resume", "--out", tmp_path / "compiled", code=3)
    assert "compiled (true there, false here)" in refused.err
    assert "nothing is done again" in typed(*words, "--compile", "--resume", "--out", tmp_path / "compiled").err


def test_an_unfinished_run_is_not_resumed_with_another_setting(graphs, tmp_path):
    work = Work(Units(tmp_path / "units"))
    options = {"limit": 20, "attacks": ["TMA@fgsm"], "device": "cpu", "work": work}
    evaluate(dmlbench.load_model(MODEL), **options)
    with pytest.raises(NotComparable, match=r"compiled \(false there, true here\)"):
        evaluate(dmlbench.load_model(MODEL, compiled=True), resume=True, **options)


def test_a_strict_search_shrinks_without_a_new_graph(graphs):
    strict = dmlbench.load_protocol("strict-fast")
    step = strict.steps[0].model_copy(update={"threat": {"steps": 24, "start": "clean"}})
    strict = strict.model_copy(update={"steps": (step,), "grid": {"8": ("10/255", "20/255")}, "clustering_seeds": (0,)})
    done = evaluate(dmlbench.load_model(MODEL, compiled=True), "digits", strict, limit=64, device="cpu", batch_size=48)
    plain = evaluate(dmlbench.load_model(MODEL), "digits", strict, limit=64, device="cpu", batch_size=48)
    assert graphs["graphs"] == 1 and not done.environment.notes
    for a, b in zip(done.measurements, plain.measurements, strict=True):
        assert a.value == pytest.approx(b.value, abs=1.6)  # one query


@pytest.mark.slow
def test_the_real_compiler_gives_the_ers_of_eager_steps():
    options = {"limit": 64, "device": "cpu", "batch_size": 40}
    a, b = (evaluate(dmlbench.load_model(MODEL, compiled=on), **options) for on in (False, True))
    assert b.environment.compiled
    if b.environment.notes:
        pytest.skip(f"torch does not compile here: {b.environment.notes[0]}")
    assert a.benign == b.benign and abs(a.ers - b.ers) <= 0.3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_compiles_to_the_ers_of_eager_steps():
    a, b = (evaluate(dmlbench.load_model(MODEL, compiled=on), device="cuda") for on in (False, True))
    assert b.environment.notes == () and a.benign == b.benign and abs(a.ers - b.ers) <= 0.3

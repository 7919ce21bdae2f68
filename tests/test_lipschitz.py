"""A Lipschitz constant that a model declares: what it proves against a closed form and a search, and what refutes it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.checkpoints import PACKAGE, Embedding, checkpoints
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.base import Stated, StoredSample
from dmlbench.kinds.certified import record
from dmlbench.kinds.certified.lipschitz import PLAIN, broken, proven, seen, slopes
from dmlbench.kinds.certified.measure import components
from dmlbench.models import ModelOptions, build
from dmlbench.models.defended import defended, split
from dmlbench.protocols import load_protocol
from dmlbench.run.subject import prepare

OWN = """
import torch
from torch import nn

class Affine(nn.Module):
    input_shape = (1, 8, 8)
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.turn = nn.Parameter(torch.randn(16, 64, generator=g) / 8)
        self.constant = 2.0
        # the last value never falls below 2, and outside a ball of radius 2 scaling to unit length moves points by half at the most
        self.lipschitz = FACTOR * float(torch.linalg.matrix_norm(self.turn.detach(), 2)) / self.constant

    def forward(self, x):
        return torch.cat([x.flatten(1) @ self.turn.t(), x.new_full((len(x), 1), self.constant)], 1)

def make():
    return Affine()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    def written(factor, name="mine"):
        path = tmp_path_factory.mktemp("own") / f"{name}.py"
        path.write_text(OWN.replace("FACTOR", str(factor)), encoding="utf-8")
        return f"python:{path}:make"

    return written


POOLED = """
import torch

class Pooled(torch.nn.Module):
    input_shape, lipschitz = (1, 8, 8), 1.0

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))
"""


def rules(queries=40):
    p = load_protocol("certified")
    few = {"samples": 60, "alpha": 0.9, "radius": 0.02}
    return p.model_copy(update={"settings": {**p.settings, **few}, "queries": queries, "clustering_seeds": (0,)})


@pytest.fixture(scope="module")
def model(file):
    return dmlbench.load_model(file(1.0))


@pytest.fixture(scope="module")
def digits():
    return dmlbench.load_dataset("digits")


@pytest.fixture(scope="module")
def done(model, digits):
    return evaluate(model, digits, rules(), device="cpu")


def exact(model, digits, rows):
    """The least change in the picture, of any pixels, that brings some negative as near as the positive that holds out longest.

    The network is affine and its scaling moves nothing across the plane between two entries, so distances to planes are exact.
    """
    network = model.network
    gallery = digits.images[digits.gallery].flatten(1).double()
    turn = network.turn.detach().double()
    whole = torch.cat([gallery @ turn.t(), torch.full((len(gallery), 1), network.constant, dtype=torch.float64)], 1)
    entries, labels = F.normalize(whole, dim=1), digits.labels[digits.gallery]
    found = []
    for row in rows:
        at = int(np.flatnonzero(digits.gallery == row)[0])
        best = -math.inf
        for p in np.flatnonzero(labels == digits.labels[row]):
            if p != at:
                v = entries[p] - entries[labels != digits.labels[row]]  # (M, 17)
                best = max(best, float(((v @ whole[at]) / (v[:, :16] @ turn).norm(dim=1)).min()))
        found.append(best)
    return np.array(found)


def test_radii_are_below_the_exact_ones(done, model, digits) -> None:
    margin, truth = done.arrays[PLAIN], exact(model, digits, done.arrays["query"])
    right = margin > 0
    assert np.array_equal(right, done.arrays["benign/recall_at_1"] == 100) and right.sum() > 20
    assert np.array_equal(truth > 0, right)
    assert (margin[right] / model.lipschitz <= truth[right]).all()
    assert np.median(margin[right] / model.lipschitz / truth[right]) > 0.05, "far from vacuous"


def test_it_is_never_below_the_bound_by_two_distances(done, model, digits) -> None:
    """(nearest negative - nearest positive) / 2 L, which the triangle inequality gives, distances by loops."""
    subject = prepare(model, digits, limit=8, device="cpu")
    gallery, labels = subject.scene.gallery.embeddings, digits.labels[digits.gallery]
    for i in range(8):
        d = [float((subject.scene.clean[i] - g).double().norm()) for g in gallery]
        own, label = int(subject.scene.row[i]), int(subject.scene.labels[i])
        same = min(d[j] for j in range(len(d)) if labels[j] == label and j != own)
        gap = min(d[j] for j in range(len(d)) if labels[j] != label) - same
        at = int(np.flatnonzero(done.arrays["query"] == subject.rows[i])[0])
        assert gap <= 0 or done.arrays[PLAIN][at] >= gap / 2 - 1e-6


def searched(subject, positions, radius):
    """(n,) bool: does a climb along the margin, normalised steps from three starts, break a query within an L2 radius?"""
    scene = subject.scene[torch.from_numpy(positions)]
    clean, size = subject.images(0, len(subject.rows))[positions], torch.tensor(radius).float().view(-1, 1, 1, 1)
    hit = torch.zeros(len(positions), dtype=torch.bool)
    for start in range(3):
        g = torch.Generator().manual_seed(start)
        delta = torch.randn(clean.shape, generator=g) * (start > 0)
        delta = size * F.normalize(delta.flatten(1), dim=1).view_as(delta)
        for turn in range(60):
            delta.requires_grad_(True)
            d = scene.distances(subject.embedder(clean + delta))
            same = d.masked_fill(~scene.same, torch.inf).amin(1)
            gap = d.masked_fill(~scene.other, torch.inf).amin(1) - same
            hit |= gap.detach() <= 0
            (slope,) = torch.autograd.grad(gap.sum(), delta)
            step = size * (1 + math.cos(math.pi * turn / 60)) / 2
            moved = delta.detach() - step * F.normalize(slope.flatten(1), dim=1).view_as(slope)
            length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = moved * (size / length.clamp_min(1e-12)).clamp(max=1)
    return hit.numpy()


def test_a_search_breaks_none_of_them(done, model, digits) -> None:
    subject = prepare(model, digits, limit=40, device="cpu")
    certified = np.flatnonzero(done.arrays[PLAIN] > 0)
    radius = done.arrays[PLAIN][certified] / model.lipschitz
    assert not searched(subject, certified, radius * (1 - 1e-4)).any()
    truth = exact(model, digits, done.arrays["query"][certified])
    assert searched(subject, certified, truth * 1.5).mean() > 0.8, "the search is no weak one"


def test_what_a_run_says(done) -> None:
    said, margin = done.extras["certified"]["lipschitz"], done.arrays[PLAIN]
    assert 0.2 * said["constant"] < said["seen"] <= said["constant"]
    for row in said["curve"]:
        wanted = 100 * np.mean([m > said["constant"] * float(row["eps"]) for m in margin])
        assert row["recall_at_1"] == pytest.approx(wanted)
    assert said["recall_at_1"] == pytest.approx(100 * np.mean(margin > 0.02 * said["constant"]))
    assert said["median"] == pytest.approx(np.median(np.maximum(margin, 0)) / said["constant"])
    row = from_evaluation(done)
    assert row.lipschitz_recall_at_1 == pytest.approx(said["recall_at_1"], abs=1e-3)
    assert row.lipschitz_recall_at_1_lo <= row.lipschitz_recall_at_1 <= row.lipschitz_recall_at_1_hi
    assert record.by_query(done)["lipschitz_recall_at_1"].mean() == pytest.approx(said["recall_at_1"])


def test_nothing_is_said_where_nothing_is_declared(digits) -> None:
    e = evaluate("digits-smallcnn-triplet-none", digits, rules(8), device="cpu")
    assert "lipschitz" not in e.extras["certified"] and PLAIN not in e.arrays
    assert from_evaluation(e).lipschitz_recall_at_1 is None and "lipschitz_recall_at_1" not in record.by_query(e)


@pytest.mark.parametrize("factor", [0.02, 0.3])
def test_a_false_constant_is_refused(file, typed, factor) -> None:
    said = ["--dataset", "digits", "--protocol", "certified", "--limit", "8", "--device", "cpu"]
    done = typed("evaluate", "--model", file(factor, "false"), *said, code=4)
    assert "declares the Lipschitz constant" in done.err and "it certifies nothing" in done.err
    assert len([line for line in done.err.splitlines() if "Lipschitz" in line]) == 1


def test_as_a_user_types_it(file, typed, tmp_path) -> None:
    path = tmp_path / "short.toml"
    p = rules(12)
    path.write_text(
        'name = "short"\nversion = "1"\nkind = "certified"\ntitle = "few samples"\nqueries = 12\n[threat]\nnorm = "l2"\n'
        f"[settings]\nsigma = 0.25\nsamples = 60\nalpha = 0.9\nradius = 0.02\n[grid]\n8 = {list(p.grid['8'])!r}\n",
        encoding="utf-8",
    )
    said = ["--dataset", "digits", "--protocol", str(path), "--device", "cpu"]
    out = typed("evaluate", "--model", file(1.0, "typed"), *said).out
    assert "Lipschitz constant" in out and "not verified" in out


@pytest.mark.parametrize("value", ["-1.0", "0", "float('nan')", "float('inf')", "True", "'much'"])
def test_a_constant_that_is_none(tmp_path, typed, value) -> None:
    path = tmp_path / "odd.py"
    path.write_text(OWN.split("# the last")[0] + f"self.lipschitz = {value}\n\ndef make():\n    return Affine()\n")
    done = typed("evaluate", "--model", f"python:{path}:make", "--dataset", "digits", "--limit", "4", code=4)
    assert "is no positive number" in done.err


def test_a_claim_is_of_the_model_as_it_was_claimed(file, model, tmp_path) -> None:
    """Not of one that is fed or scaled otherwise, nor of one behind a wrapper."""
    (tmp_path / "pooled.py").write_text(POOLED)
    any_size = f"python:{tmp_path / 'pooled.py'}:Pooled"
    assert model.lipschitz == pytest.approx(float(torch.linalg.matrix_norm(model.network.turn.detach(), 2)) / 2)
    assert ModelOptions(name="x", input_size=(8, 8)).keeps_claims
    for options in ({"std": (0.5,)}, {"mean": (0.5,)}, {"normalize": False}, {"scale": 255.0}, {"distance": "cosine"}):
        assert dmlbench.load_model(file(1.0, "other"), **options).lipschitz is None
    assert dmlbench.load_model(any_size).lipschitz == 1.0
    assert dmlbench.load_model(any_size, input_size=(8, 8)).lipschitz == 1.0
    assert dmlbench.load_model(any_size, input_size=(16, 16)).lipschitz is None
    twin = dmlbench.load_model(file(1.0, "behind"))
    assert defended(twin, split("bits(3):x")[0]).lipschitz is None
    assert Embedding(lipschitz=2.5).lipschitz == 2.5
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="lipschitz"):
            Embedding(lipschitz=wrong)


def test_a_spec_and_a_record_declare_one(tmp_path, typed) -> None:
    name = "digits-smallcnn-triplet-none"
    entry, weights = checkpoints()[name], PACKAGE / "weights" / f"{name}.safetensors"
    entry = entry.model_copy(update={"embedding": Embedding(lipschitz=0.01)})
    assert build(entry, name).lipschitz == 0.01
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({name: entry.model_dump(mode="json", exclude_none=True)}))
    for changes, claim in (({}, 0.01), ({"input_size": (8, 8)}, 0.01), ({"mean": (0.5,)}, None)):
        assert dmlbench.load_model(str(weights), spec=spec, **changes).lipschitz == claim
    said = ("--model", weights, "--spec", spec, "--dataset", "digits", "--protocol", "certified", "--limit", "4")
    assert "declares the Lipschitz constant 0.01, and two pictures show" in typed("evaluate", *said, code=4).err


def test_what_is_stored_is_looked_at_again(done, model, digits) -> None:
    rule = rules()
    stated = Stated(done, rule, tuple(components(rule, (1, 8, 8))))
    subject = prepare(model, digits, limit=40, device="cpu")
    at = np.arange(40)
    kept = StoredSample(subject, at, subject.images(0, 40))
    record.CERTIFIED.form.model_validate(done.extras["certified"])

    def problems(arrays=None, **claim):
        said = {**done.extras["certified"], "lipschitz": {**done.extras["certified"]["lipschitz"], **claim}}
        e = done.model_copy(update={"extras": {**done.extras, "certified": said}})
        e = e.with_arrays({**done.arrays, **(arrays or {})}, done.sample)
        s = replace(stated, evaluation=e)
        try:
            return [*record.outcome_problems(s), *record.number_problems(s), *record.replay(s, kept)]
        except KeyError:
            raise AssertionError("a missing array is a problem and no crash") from None

    assert not problems()
    assert any("constant" in p.field and "record" in p.reason for p in problems(constant=50.0))
    assert any("recall_at_1" in p.field for p in problems(recall_at_1=100.0))
    assert any("steepest" in p.reason for p in problems(seen=10 * model.lipschitz))
    assert any("are others" in p.reason for p in problems({PLAIN: done.arrays[PLAIN] * 0.9}))
    wrong = np.where(done.arrays[PLAIN] <= 0, 0.5, done.arrays[PLAIN])
    assert not (wrong > 0).all() or any("clean answer is wrong" in p.reason for p in problems({PLAIN: wrong}))
    assert any("one number for each" in p.reason for p in record.outcome_problems(
        replace(stated, evaluation=done.model_copy().with_arrays({**done.arrays, PLAIN: done.arrays[PLAIN][:3]}, {}))
    ))  # fmt: skip
    twin = dmlbench.load_model("digits-smallcnn-triplet-none")
    other = StoredSample(replace(subject, embedder=twin), at, kept.clean)
    assert any("the model's record None" in p.reason for p in record.replay(stated, other))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_a_linear_map_is_never_refuted_by_its_norm(seed, scale) -> None:
    g = torch.Generator().manual_seed(seed)
    turn = scale * torch.randn(3, 12, generator=g)
    a, b = torch.rand(20, 12, generator=g), torch.rand(20, 12, generator=g)
    slope = float(slopes(a, b, a @ turn.t(), b @ turn.t()).max())
    norm = float(torch.linalg.matrix_norm(turn, 2))
    assert not broken(norm, slope) and broken(norm / 20, slope)


def test_the_steepest_change_is_found() -> None:
    """A map that is steep along one direction alone, which no pair of pictures lies in."""
    torch.manual_seed(0)
    wave = F.normalize(torch.randn(64), dim=0)

    class Steep(nn.Module):
        def forward(self, x):
            along = x.flatten(1) @ wave
            return torch.stack([torch.cos(2.5 * along), torch.sin(2.5 * along)], 1)

    model = Embedder(Steep(), (1, 8, 8))
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=16, device="cpu")
    assert 2.0 < seen(subject) <= 2.5 * (1 + 1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(0.1, 9), st.floats(0, 1))
def test_proven_is_a_comparison(margin, constant, size) -> None:
    found = proven(np.array([*margin, math.nan]), constant, size)
    assert found[:-1].tolist() == [100.0 if m > constant * size else 0.0 for m in margin] and math.isnan(found[-1])


def test_a_constant_that_a_pair_contradicts_ends_the_run(model, digits) -> None:
    subject = prepare(model, digits, limit=16, device="cpu")
    subject.embedder.lipschitz = seen(subject) / 1.1
    with pytest.raises(DataError, match="it certifies nothing"):
        dmlbench.kinds.certified.lipschitz.claimed(subject)

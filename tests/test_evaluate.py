"""The whole path: numbers do not depend on batches, limits or order, and say what they are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dmlbench
from dmlbench.datasets import DATASETS, ArrayImages, RetrievalDataset, TensorImages
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate, scores
from dmlbench.metrics import mean
from dmlbench.models import ARCHITECTURES
from dmlbench.protocol import Component
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, load, save
from dmlbench.rng import Rng
from dmlbench.run.search import aimed, searches
from dmlbench.run.subject import prepare
from dmlbench.task import default_protocol

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


@pytest.fixture(scope="module")
def short():
    """The digits protocol with fewer steps: the same code paths in a tenth of the time."""
    p = load_protocol("ers-digits")
    return p.model_copy(update={"threat": {**p.threat, "steps": 6, "step": "8/255"}})


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def whole(model, short) -> Evaluation:
    return evaluate(model, "digits", short, batch_size=128)


@pytest.mark.parametrize("batch_size", [1, 7, 896])
def test_numbers_do_not_depend_on_batch_size(model, short, whole, batch_size: int) -> None:
    limit = {1: 16, 7: 112, 896: None}[batch_size]
    other = evaluate(model, "digits", short, batch_size=batch_size, limit=limit)
    at = np.searchsorted(whole.arrays["query"], other.arrays["query"])
    for c in short.components:
        np.testing.assert_array_equal(other.arrays[f"{c.name}/targets"], whole.arrays[f"{c.name}/targets"][at])
        per_query = whole.arrays[f"{c.name}/value"][at]
        scale = 1.0 if c.readout in ("target_cosine", "embedding_shift") else 100.0
        gap = abs(mean(other.arrays[f"{c.name}/value"]) - mean(per_query)) * 100 / scale
        assert gap <= 0.2, (c.name, gap)


def test_the_same_run_gives_the_same_bits(model, short, whole) -> None:
    again = evaluate(model, "digits", short, batch_size=128)
    for name, values in whole.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values)
    assert again.ers == whole.ers and again.ers_interval == whole.ers_interval


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_are_made_whatever_the_caller_has_turned_off(mode) -> None:
    def value(network: torch.nn.Module) -> float | None:
        model = dmlbench.load_model(network, input_shape=(1, 8, 8))
        return evaluate(model, "digits", "ers-digits", attacks=["CA+"], limit=4).measurements[0].value

    with mode():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
        within = value(network)
    assert within == value(network)


def test_a_protocol_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for eps in ("8/255", "16/255"):
        path.write_text(
            f'''name = "mine"\nversion = "1"\nkind = "parts"\ntitle = "t"\nthreat = {{ norm = "linf", eps = "{eps}" }}
[[components]]\nname = "A"\nattack = "CA+"\nreadout = "candidate_rank"\nworst = 0\nbest = 50\n'''
        )
        for named in (str(path), path):
            assert load_protocol(named).threat["eps"] == eps


def test_order_and_choice_of_attacks_change_nothing(model, short, whole) -> None:
    few = evaluate(model, "digits", short, attacks=["QA-", "ES:R", "CA+"], batch_size=128)
    assert [m.component for m in few.measurements] == ["QA-", "ES:R", "CA+"]
    for m in few.measurements:
        np.testing.assert_array_equal(few.arrays[f"{m.component}/value"], whole.arrays[f"{m.component}/value"])
        assert m.value == whole.part(m.component).value
    assert few.ers is None and few.partial == ("--attacks QA-,ES:R,CA+",)


def test_limit_is_partial_and_its_queries_mix_classes(model, short, whole) -> None:
    some = evaluate(model, "digits", short, limit=40, batch_size=128)
    assert some.partial == ("--limit 40",) and some.dataset.n_queries == 40 and some.dataset.n_queries_full == 896
    assert set(some.arrays["label"].tolist()) == {5, 6, 7, 8, 9}
    fewer = evaluate(model, "digits", short, limit=20, attacks=["GTT"], batch_size=128)
    assert set(fewer.arrays["query"].tolist()) < set(some.arrays["query"].tolist())


def test_ers_is_the_mean_of_the_rescaled_parts(whole) -> None:
    by_hand = {
        "CA+": lambda v: 2 * v, "QA+": lambda v: 2 * v, "CA-": lambda v: 100 - v, "QA-": lambda v: 100 - v,
        "TMA": lambda v: 100 * (1 - v), "ES:D": lambda v: 50 * (2 - v),
        "ES:R": float, "LTM": float, "GTM": float, "GTT": float,
    }  # fmt: skip
    scores = [rescale(whole.part(name).value) for name, rescale in by_hand.items()]
    assert [m.component for m in whole.measurements] == [c.name for c in load_protocol("ers-digits").components]
    assert whole.ers == pytest.approx(np.mean(scores))
    low, high = whole.ers_interval
    assert low < whole.ers < high
    for m in whole.measurements:
        assert m.score == pytest.approx(by_hand[m.component](m.value))
        assert m.interval[0] <= m.score <= m.interval[1]


def test_every_adversarial_image_kept_replays(model, short, whole) -> None:
    """The sample alone is enough to check ball, range and score again."""
    dataset = dmlbench.load_dataset("digits")
    subject = prepare(model, dataset, device="cpu")
    rows = whole.sample["rows"]
    clean = dataset.images[rows]
    at = torch.from_numpy(np.searchsorted(dataset.query, rows))
    for search in searches(short, short.components):
        scene = aimed(subject, search, short.seed)[at]
        for c in search.components:
            adversarial = torch.from_numpy(whole.sample[c.name])
            assert search.threat.contains(adversarial, clean).all()
            from dmlbench.metrics import READOUTS

            with torch.no_grad():
                read = READOUTS[c.readout].read(subject.embedder(adversarial), scene).numpy()
            kept = whole.arrays[f"{c.name}/value"][np.searchsorted(whole.arrays["query"], rows)]
            np.testing.assert_allclose(read, kept, atol=0.12 if "rank" in c.readout else 1e-4)
    assert len(rows) == 256


def test_no_budget_is_no_attack(model) -> None:
    p = load_protocol("ers-digits")
    still = p.model_copy(update={"threat": {**p.threat, "eps": 0, "steps": 3}})
    e = evaluate(model, "digits", still)
    assert e.part("ES:R").value == e.part("LTM").value == e.part("GTM").value == e.benign["recall_at_1"]
    assert e.part("ES:D").value == pytest.approx(0, abs=1e-6) and e.part("GTT").value == 100
    assert max(e.arrays["LTM/norm"]) == 0


def test_attacks_hurt_and_stay_in_the_ball(whole) -> None:
    assert whole.part("LTM").value < whole.benign["recall_at_1"] - 10
    assert whole.arrays["GTM/norm"].max() <= 40 / 255 + 1e-5
    assert whole.arrays["GTM/norm"].max() > 39 / 255


def test_run_folder_round_trip(whole, tmp_path: Path) -> None:
    save(whole, tmp_path / "run")
    back = load(tmp_path / "run")
    assert back == whole
    for name, values in whole.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], values)
    np.testing.assert_array_equal(back.sample["GTM"], whole.sample["GTM"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"evaluation.json", "per_query.npz", "adversarial_sample.npz"}
    path = tmp_path / "run" / "per_query.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="differs from the manifest"):
        load(tmp_path / "run")


def test_a_partial_result_does_not_replace_a_full_one(whole, tmp_path: Path) -> None:
    save(whole, tmp_path)
    partial = whole.model_copy(update={"partial": ("--limit 8",)}).with_arrays(whole.arrays)
    with pytest.raises(DataError, match="holds a full result"):
        save(partial, tmp_path)
    assert load(tmp_path) == whole


def tiny(n: int = 120, classes: int = 6, seed: int = 0) -> RetrievalDataset:
    rng = Rng(seed, torch.arange(n))
    centres = Rng(9, torch.arange(classes)).uniform(1, 8, 8)
    y = torch.arange(n) % classes
    images = (0.7 * centres[y] + 0.3 * rng.uniform(1, 8, 8)).clamp(0, 1)
    return RetrievalDataset("tiny", "test", TensorImages(images), y.numpy())


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_every_space_works_on_a_users_own_module_and_tensors(space: str, short) -> None:
    torch.manual_seed(0)
    model = dmlbench.load_model(
        ARCHITECTURES["smallcnn"](), input_shape=(1, 8, 8), distance=dmlbench.DISTANCES[space], name="mine"
    )
    e = evaluate(model, tiny(), short)
    assert e.model.space == space and e.model.id == "mine" and e.ers is not None and -50 < e.ers < 100
    assert e.protocol.sha256 == short.sha256 and e.dataset.name == "tiny"


def test_separate_query_and_gallery(short) -> None:
    d = tiny()
    split = RetrievalDataset("split", "test", d.images, d.labels, query=np.arange(20), gallery=np.arange(20, 120))
    torch.manual_seed(0)
    e = evaluate(dmlbench.load_model(ARCHITECTURES["smallcnn"](), input_shape=(1, 8, 8)), split, short)
    assert e.dataset.n_queries == 20 and e.dataset.n_gallery == 100
    assert e.arrays["GTT/targets"].max() < 100


def test_lonely_queries_are_counted_and_left_out(short) -> None:
    d = tiny()
    labels = d.labels.copy()
    labels[[3, 50]] = [100, 101]
    torch.manual_seed(0)
    e = evaluate(
        dmlbench.load_model(ARCHITECTURES["smallcnn"](), input_shape=(1, 8, 8)),
        RetrievalDataset("l", "test", d.images, labels),
        short,
    )
    assert e.dataset.n_without_positive == 2 and [w.flag for w in e.warnings] == ["no-positive"]
    assert e.part("LTM").n == 118 and e.part("CA+").n == 120
    assert e.ers == pytest.approx(np.mean([m.score for m in e.measurements]))


class Fixed(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value + 0 * x.flatten(1)[:, :4]


class NumbOnGrid(torch.nn.Module):
    """A network without a gradient at pixels as they are stored: exactly on the grid of sixteenths."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = (x * 16 - (x * 16).round()).abs() > 1e-4
        return self.network(torch.where(off, x, x.detach()))


def test_embedding_shift_is_not_stopped_by_a_gradient_that_vanishes_at_the_clean_image(model) -> None:
    numb = dmlbench.load_model(NumbOnGrid(model.network), input_shape=(1, 8, 8))
    shift = {
        name: [evaluate(m, "digits", name, attacks=["ES:D"], limit=64).part("ES:D").value for m in (model, numb)]
        for name in ("ers-digits@1", "ers-digits")
    }
    honest, stopped = shift["ers-digits@1"]
    assert stopped < 0.01 < 0.5 < honest
    honest, stopped = shift["ers-digits"]
    assert stopped > 0.8 * honest  # pixels clipped at black or white are on the grid again


def test_a_collapsed_model_is_not_robust(short) -> None:
    e = evaluate(dmlbench.load_model(Fixed(1.0), input_shape=(1, 8, 8)), tiny(), short)
    assert e.warnings[0].flag == "collapsed" and e.part("LTM").value == 0


class Offset(torch.nn.Module):
    """The pixels, beside a constant in every number."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + self.constant


@pytest.mark.parametrize("space", ["N", "C", "E"])
def test_embeddings_whose_distances_float32_cannot_tell_are_flagged(short, space: str) -> None:
    def flags(constant: float) -> set[str]:
        found = dmlbench.load_model(Offset(constant), input_shape=(1, 8, 8), distance=dmlbench.DISTANCES[space])
        return {w.flag for w in evaluate(found, "digits", short, attacks=["ES:R"], limit=16).warnings}

    assert "rounded-distances" not in flags(8.0)
    assert "rounded-distances" in flags(250.0)  # R@1 is 81.3 in space N, 99.0 from distances in float64
    assert not {"rounded-distances"} & flags(2000.0) and "collapsed" in flags(2000.0)


def test_nan_embeddings_are_refused(short) -> None:
    with pytest.raises(DataError, match="NaN or infinite embeddings for 120 of 120"):
        evaluate(dmlbench.load_model(Fixed(float("nan")), input_shape=(1, 8, 8)), tiny(), short)


def test_small_galleries_and_other_shapes_are_refused(model, short) -> None:
    with pytest.raises(UsageError, match="at least 100"):
        evaluate(model, tiny(90), short)
    big = RetrievalDataset("b", "test", ArrayImages(np.zeros((120, 1, 9, 9), np.uint8)), np.arange(120) % 5)
    with pytest.raises(UsageError, match=r"takes images of shape \(1, 8, 8\)"):
        evaluate(model, big, short)
    with pytest.raises(UsageError, match="input_shape"):
        evaluate(ARCHITECTURES["smallcnn"](), tiny(), short)
    with pytest.raises(UsageError, match="did you mean 'QA-'"):
        evaluate(model, tiny(), short, attacks=["QA_-"])


def test_a_component_knows_which_scores_there_can_be() -> None:
    part = Component(name="x", attack="LTM", readout="recall_at_1", worst=0, best=100)
    rank = Component(name="x", attack="CA+", readout="candidate_rank", worst=0, best=50)
    shift = Component(name="x", attack="ES", readout="embedding_shift", worst=2, best=0)
    unknown = Component(name="x", attack="LTM", readout="of_another_package", worst=0, best=100)
    assert part.limits == (0, 100) and rank.limits == (0, 200) and shift.limits == (-math.inf, 100)
    assert unknown.limits == (-math.inf, math.inf)


def test_a_part_at_the_end_of_its_range_has_an_interval_with_width_and_ers_stays_in_its_own() -> None:
    part = Component(name="x", attack="LTM", readout="recall_at_1", worst=0, best=100)
    arrays = {"x/value": np.zeros(60, np.float32), "label": np.arange(60) % 5}
    found, ers, ends = scores([part], arrays, {}, complete=True)
    assert found[0].interval[0] == 0 == ers and found[0].interval == ends and 0 < ends[1] < 100


@pytest.mark.parametrize(("shape", "named"), [
    ((3, 32, 32), "ers-224"), ((3, 8, 8), "ers-224"), ((3, 224, 224), "ers-224"),
    ((1, 28, 28), "ers-28"), ((1, 64, 64), "ers-28"), ((1, 128, 128), "ers-224"),
])  # fmt: skip
def test_colour_pictures_have_one_threat_whatever_their_size_and_door(shape, named):
    mine = RetrievalDataset("folder:mine", "test", TensorImages(torch.zeros(2, *shape)), np.array([0, 0]))
    assert default_protocol(mine) == named
    colour = {entry.protocol for entry in DATASETS.values() if entry.shape[0] == 3}
    assert {load_protocol(name).threat["eps"] for name in (*colour, "ers-224")} == {"8/255"}

"""The worst case over searches: nothing is missed, nothing is double counted, and the protocol is what the page says."""

import numpy as np
import pytest
import torch
from plain import to_all
from quick import DEFAULT, shortened

import dmlbench
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.strict import search as strict
from dmlbench.kinds.strict.search import CARRIED, CLEAN_WRONG, SURVIVED, attempt
from dmlbench.kinds.strict.summary import area
from dmlbench.models import ARCHITECTURES
from dmlbench.protocols import load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.results import load, save
from dmlbench.rng import Rng
from dmlbench.run.subject import prepare


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def whole(model):
    return evaluate(model, "digits", shortened(), limit=64)


def test_the_packaged_protocols_are_the_ones_described() -> None:
    full, fast = load_protocol("strict"), load_protocol("strict-fast")
    assert [(s.name, s.attack, s.optimizer, s.threat) for s in full.steps] == [
        ("W1", "WM", "apgd", {"steps": 100, "start": "clean"}),
        ("RS", "WM", "cosine", {"steps": 50}),
        ("SQ", "WM", "square", {"queries": 1000}),
    ]
    turns = [full.steps[1].at(r) for r in range(9)]
    assert [(s.attack, s.threat["start"], before) for s, before in turns] == [
        ("WM", "corner", 0), ("WM", "random", 0), ("WM", "corner", 0), ("ME", "corner", 0),
        ("WM", "corner", 1), ("WM", "random", 1), ("WM", "corner", 1), ("ME", "corner", 1), ("WM", "corner", 2),
    ]  # fmt: skip
    assert fast.steps == full.steps[:1] and (fast.grid, fast.threshold) == (full.grid, full.threshold)
    assert full.eps_for((1, 28, 28)) == ("8/255", "16/255", "32/255", "77/255")
    assert full.eps_for((1, 8, 8))[-1] == "40/255"
    colour = full.eps_for((3, 224, 224))
    assert [round(eval(eps) * 255, 6) for eps in colour] == [0.25, 0.5, 1, 2, 4, 8]
    for shape in ((3, 32, 32), (3, 112, 96), (1, 64, 64), (4, 8, 8)):
        assert full.eps_for(shape) == colour
    assert (full.measured(896), full.measured(10_000), full.measured(10_000, 64)) == (896, 1000, 64)
    for name in ("strict-l2", "strict-fast-l2"):
        assert load_protocol(name).threat["norm"] == "l2"
        assert load_protocol(name).steps == load_protocol(name.removesuffix("-l2")).steps


def test_the_first_version_is_the_one_described() -> None:
    full, fast = load_protocol("strict@1"), load_protocol("strict-fast@1")
    assert [(s.name, s.attack, s.optimizer, s.aims, s.threat) for s in full.steps] == [
        ("W1", "WM", "apgd", 1, {"steps": 100, "start": "clean"}),
        ("W2", "WM", "apgd", 1, {"steps": 100, "start": "random"}),
        ("MT", "MT", "apgd", 5, {"steps": 32, "start": "clean"}),
        ("SQ", "WM", "square", 1, {"queries": 1000}),
    ]
    assert fast.steps == full.steps[:1] and fast.grid == full.grid
    assert full.eps_for((1, 28, 28)) == ("8/255", "16/255", "32/255", "77/255")
    assert full.eps_for((3, 224, 224)) == full.eps_for((1, 500, 500)) == ("2/255", "4/255", "8/255")
    assert full.eps_for((3, 8, 8))[-1] == "40/255" and full.eps_for((1, 32, 32)) == full.eps_for((3, 224, 224))
    assert full.measured(10_000) == 10_000 and full.threshold is None
    for name in ("strict-l2", "strict-fast-l2"):
        assert load_protocol(f"{name}@1").threat["norm"] == "l2"
        assert load_protocol(f"{name}@1").steps == load_protocol(f"{name.removesuffix('-l2')}@1").steps
    gradients = sum(s.aims * s.threat["steps"] for s in full.steps if "steps" in s.threat)
    assert gradients <= 13 * 32, "within thirteen PGD-32 runs, Square apart"


def test_the_curve_counts_queries_once(whole) -> None:
    strict, right = whole.extras["strict"], whole.arrays["benign/recall_at_1"] == 100
    before = right
    for row in strict["curve"]:
        name = f"strict@{row['eps']}"
        by, value = whole.arrays[f"{name}/broken_by"], whole.arrays[f"{name}/value"]
        survived = by == SURVIVED
        np.testing.assert_array_equal(value == 100, survived)
        np.testing.assert_array_equal(by == CLEAN_WRONG, ~right)
        np.testing.assert_array_equal(by == CARRIED, right & ~before)
        assert bool((survived <= before).all()), "broken at one eps is broken at every larger one"
        assert row["recall_at_1"] == pytest.approx(100 * survived.mean()) == whole.part(name).value
        points = [s["points"] for s in row["steps"]]
        assert row["recall_at_1"] + row["carried"] + sum(points) == pytest.approx(strict["clean"])
        assert [s["attacked"] for s in row["steps"]] == [
            int((survived | (by >= 2 + i)).sum()) for i in range(len(points))
        ]
        assert bool((whole.arrays[f"{name}/iteration"][by >= CARRIED] > 0).all())
        assert bool((whole.arrays[f"{name}/iteration"][survived | ~right] == 0).all())
        radius = eval(row["eps"])
        assert bool((whole.arrays[f"{name}/norm"] <= radius + 1e-5).all())
        before = survived
    assert strict["curve"][-1]["recall_at_1"] < strict["curve"][0]["recall_at_1"] <= strict["clean"]
    assert strict["codes"]["SQ"] == 4 and whole.ers is None


def test_area_is_the_mean_height() -> None:
    assert area([0.0, 1.0, 3.0], [60.0, 40.0, 0.0]) == pytest.approx((50 * 1 + 20 * 2) / 3)
    assert area([0.0, 0.5], [30.0, 30.0]) == 30


def test_proxies_only_fall(whole) -> None:
    for proxy in ("recall_at_2", "recall_at_8", "map_at_r"):
        last = whole.arrays[f"benign/{proxy}"]
        for row in whole.extras["strict"]["curve"]:
            found = whole.arrays[f"strict@{row['eps']}/{proxy}"]
            assert bool((found <= last).all()) and row[proxy] == pytest.approx(float(found.mean()))
            last = found


def test_broken_queries_are_misranked_by_a_plain_loop(model, whole) -> None:
    """The kept images, embedded here and ranked in Python: wrong exactly where the record says so."""
    dataset = dmlbench.load_dataset("digits")
    scene = prepare(model, dataset, limit=64).scene
    X, y = scene.gallery.embeddings.double().numpy(), scene.gallery.labels.tolist()
    for row in whole.extras["strict"]["curve"][1::2]:
        name = f"strict@{row['eps']}"
        with torch.no_grad():
            e = model(torch.from_numpy(whole.sample[name])).double().numpy()
        positions = np.flatnonzero(np.isin(whole.arrays["query"], whole.sample["rows"]))
        for i, p in enumerate(positions[:24]):
            own = int(scene.row[p])
            d = to_all("N", e[i], X)
            best = {
                same: min(d[j] for j in range(len(y)) if j != own and (y[j] == y[own]) == same)
                for same in (True, False)
            }
            right = best[True] < best[False]
            by = whole.arrays[f"{name}/broken_by"][p]
            if by != CLEAN_WRONG:
                assert right == (by == SURVIVED)


def test_strict_is_no_weaker_than_the_fast_one_or_the_field(model, whole) -> None:
    fast = evaluate(model, "digits", shortened("strict-fast"), limit=64)
    for eps in ("10/255", "20/255"):
        worst = whole.part(f"strict@{eps}").value
        assert worst <= fast.part(f"strict@{eps}").value
    ball = load_protocol("ers-digits")
    field = evaluate(model, "digits", ball.model_copy(update={"threat": {**ball.threat, "eps": "20/255"}}),
                     attacks=["GTM", "LTM", "ES:R"], limit=64)  # fmt: skip
    assert whole.part("strict@20/255").value < min(m.value for m in field.measurements)


@pytest.mark.parametrize("space", ["C", "E"])
def test_other_spaces_and_l2(space: str) -> None:
    torch.manual_seed(0)
    net = Embedder(ARCHITECTURES["smallcnn"](width=4), (1, 8, 8), distance=DISTANCES[space])
    found = evaluate(net, "digits", shortened("strict-l2", steps=6, queries=20, rounds=4), limit=24)
    curve = [r["recall_at_1"] for r in found.extras["strict"]["curve"]]
    assert found.extras["strict"]["norm"] == "l2" and curve[-1] < curve[0] <= found.extras["strict"]["clean"]
    norms = found.arrays["strict@0.25/norm"]
    assert 0 < norms.max() <= 0.25 + 1e-5


def test_every_wrong_class_is_tried_in_turn(model) -> None:
    """MT with all four wrong classes of digits breaks what each class alone breaks."""
    subject, p = prepare(model, dmlbench.load_dataset("digits"), limit=48), shortened("strict@1", steps=16)
    step, at = p.steps[2], np.arange(48)
    threat = p.threat_at("20/255", step.threat)
    right = attempt(subject, step, threat.but(eps="0", steps=0), at, 0)
    alive = at[~right.broken]
    many, one = (attempt(subject, step.model_copy(update={"aims": n}), threat, alive, 0) for n in (5, 1))
    assert many.broken.sum() >= one.broken.sum() > 0
    assert many.gradients > one.gradients
    assert bool((many.broken == (many.readouts["recall_at_1"] == 0)).all())


def blobs(labels: list[int]) -> RetrievalDataset:
    """Random images of the given classes."""
    n = len(labels)
    images = Rng(0, torch.arange(n)).uniform(1, 8, 8)
    return RetrievalDataset("blobs", "test", TensorImages(images), np.array(labels))


def test_two_classes_are_enough_and_one_is_refused(model) -> None:
    found = evaluate(model, blobs([0] * 6 + [1] * 6), shortened(steps=4, queries=8, rounds=2))
    assert found.extras["strict"]["curve"][-1]["recall_at_1"] <= found.extras["strict"]["clean"]
    with pytest.raises(UsageError, match="'blobs' has a single class"):
        evaluate(model, blobs([0] * 6), shortened())


def test_a_class_without_a_second_image_is_left_out(model) -> None:
    found = evaluate(model, blobs([0] * 5 + [1] * 5 + [2]), shortened(steps=4, queries=8, rounds=2))
    values = found.arrays["strict@10/255/value"]
    assert np.isnan(values[10]) and not np.isnan(values[:10]).any()
    assert found.part("strict@10/255").n == 10 and "no-positive" in {w.flag for w in found.warnings}


def test_a_collapsed_model_is_flagged() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3) + 1e-9 * x.flatten(1)[:, :3]

    found = evaluate(Embedder(Flat(), (1, 8, 8)), "digits", shortened(audit=16), limit=16)
    assert "collapsed" in {w.flag for w in found.warnings}
    assert {f["check"]: f["verdict"] for f in found.extras["audit"]}["H3"] == "fail"


@pytest.mark.parametrize("change,message", [
    (("[grid]", "[grd]"), "grd"),
    (('optimizer = "apgd"', 'optimizer = "apdg"'), "did you mean 'apgd'"),
    (('attack = "WM"', 'attack = "VM"'), "unknown attack 'VM'"),
    (('"10/255", "20/255"', '"20/255", "10/255"'), "ascending"),
    (("8 = [", "eight = ["), "side in pixels"),
    (("parts = 8", "parts = 6"), "power of two"),
    (("parts = 8", "parts = 8\nsteps = 3"), "threshold.steps"),
    (("queries = 1000", "queries = 0"), "must be 1 or more"),
    (("queries = 1000", "together = 9"), "nothing without each other"),
    (('start = "random"', 'start = "edge"'), "'clean', 'random' or 'corner'"),
])  # fmt: skip
def test_a_broken_protocol_file_is_one_line(tmp_path, change, message) -> None:
    text = (dmlbench.protocols.FOLDER / "strict-fast.toml").read_text()
    assert change[0] in text
    (tmp_path / "p.toml").write_text(text.replace(*change, 1))
    with pytest.raises(DataError, match=message) as error:
        read_protocol(tmp_path / "p.toml")
    assert "\n" not in str(error.value)


def test_it_is_kept_on_disk_whole(whole, tmp_path) -> None:
    again = load(save(whole, tmp_path / "run"))
    assert again == whole and again.extras["strict"] == whole.extras["strict"]
    np.testing.assert_array_equal(again.arrays["strict@5/255/broken_by"], whole.arrays["strict@5/255/broken_by"])


def test_strict_fast_from_the_command_line(typed, brief_plan, tmp_path) -> None:
    done = typed("evaluate", "--model", DEFAULT, "--protocol", "strict-fast", "--limit", "8", "--out", "run")
    assert "smallest eps that breaks a query, median" in done.out and "40/255" in done.out and "retention" in done.out
    assert "ERS" not in done.out
    plan = typed("evaluate", "--model", DEFAULT, "--protocol", "strict", "--plan", "--json").json
    total, plan = plan[-1], [row for row in plan if "@" in row["id"]]
    assert [row["at_most"] for row in plan] == [False] + [True] * (len(plan) - 1) and total["at_most"]
    assert [row["range"][0] == 0 for row in plan] == [row["at_most"] for row in plan] and total["range"][0] > 0
    rounds = dmlbench.load_protocol("strict").steps[1].rounds
    assert [row["id"] for row in plan[:4]] == ["W1@5/255", "RS@5/255", "SQ@5/255", "W1@10/255"]
    assert plan[1]["gradients"] == 896 * 50 * rounds and plan[2]["gradients"] == 0
    assert plan[0]["values"] == 896 and plan[2]["values"] == 896 * 1000


@pytest.mark.parametrize("name", [DEFAULT, "digits-smallcnn-triplet-none"])
@pytest.mark.parametrize("eot", [1, 2])
def test_a_search_stops_for_nothing_that_is_not_misranked_in_float32(name: str, eot: int, monkeypatch) -> None:
    """In bfloat16 some margins cross zero that do not in float32; float32 gradients take no pass more."""
    logs: list[strict.Log] = []

    class Kept(strict.Log):
        def __init__(self, images) -> None:
            super().__init__(images)
            logs.append(self)

    monkeypatch.setattr(strict, "Log", Kept)
    p, embedder = load_protocol("strict-fast"), dmlbench.load_model(name)
    threat = p.threat_at("5/255", {"steps": 12, "eot": eot})
    spent = {}
    for precision in ("float32", "bfloat16"):
        embedder.precision = precision
        subject = prepare(embedder, dmlbench.load_dataset("digits"), limit=300, device="cpu")
        right = np.flatnonzero(strict.begin(subject).alive)
        found = attempt(subject, p.steps[0], threat, right, 0)
        stopped = (logs[-1].first > 0).numpy()
        assert stopped.any() and not (stopped & ~found.broken).any()
        spent[precision] = found.values
    assert spent["bfloat16"] > spent["float32"] and spent["float32"] % eot == 0


def test_each_pass_of_eot_is_counted(model) -> None:
    few = shortened(steps=6, queries=10, rounds=3)
    once, four = (evaluate(model, "digits", few, limit=16, eot=eot).extras["strict"] for eot in (1, 4))
    assert [r["recall_at_1"] for r in once["curve"]] == [r["recall_at_1"] for r in four["curve"]]
    for key in ("gradients_per_query", "values_per_query"):
        assert four[key] == pytest.approx(4 * once[key]) and once[key] > 0

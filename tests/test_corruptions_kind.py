"""The kind of protocol that measures retrieval under common corruptions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dmlbench
from dmlbench.board import from_evaluation
from dmlbench.corruptions import CORRUPTIONS, corrupted
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.kinds.base import Stated, StoredSample
from dmlbench.kinds.corruptions import record
from dmlbench.kinds.corruptions.measure import CLEAN, components, embedded, parsed
from dmlbench.kinds.table import numbers_of
from dmlbench.protocols import load_protocol
from dmlbench.protocols.reading import read_protocol
from dmlbench.results import load, save
from dmlbench.run.subject import prepare

MODEL = "digits-smallcnn-triplet-none"
FEW = {"severities": [1, 5]}


def rules(**settings):
    return load_protocol("corruptions").model_copy(update={"settings": {**FEW, **settings}})


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(MODEL)


@pytest.fixture(scope="module")
def digits():
    return dmlbench.load_dataset("digits")


@pytest.fixture(scope="module")
def done(model, digits):
    return evaluate(model, digits, rules(), limit=24, device="cpu")


def hits(model, digits, rows, name, severity, gallery=False):
    """R@1 and MAP@R of the queries by plain loops: one picture at a time, one gallery entry at a time."""

    def embed(row, changed):
        image = digits.images[np.array([row])]
        if changed:
            eight = np.rint(image[0].numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
            image = torch.from_numpy(corrupted(eight, name, severity, 0).transpose(2, 0, 1))[None].float() / 255
        with torch.no_grad():
            return model(image)[0].double().numpy()

    entries = {int(row): embed(row, gallery) for row in digits.gallery}
    found = []
    for row in rows:
        own = embed(row, True)
        order = sorted(
            (np.linalg.norm(own - e), digits.labels[r] == digits.labels[row]) for r, e in entries.items() if r != row
        )
        right = [same for _, same in order]
        first = sum(right)
        precision = [sum(right[: k + 1]) / (k + 1) for k in range(first) if right[k]]
        found.append((100.0 * right[0], 100.0 * sum(precision) / first))
    return np.array(found)


@pytest.mark.parametrize("name", ["gaussian_noise@5", "fog@1", "pixelate@5"])
def test_each_query_against_plain_loops(done, model, digits, name) -> None:
    corruption, severity = name.split("@")
    rows = done.arrays["query"][:6]
    wanted = hits(model, digits, rows, corruption, int(severity))
    np.testing.assert_allclose(done.arrays[f"{name}/value"][:6], wanted[:, 0])
    np.testing.assert_allclose(done.arrays[f"{name}/map_at_r"][:6], wanted[:, 1], atol=1e-3)


def test_with_the_gallery_every_picture_is_corrupted_in_its_own_way(model, digits) -> None:
    subject = prepare(model, digits, limit=4, device="cpu")
    found = record.readings(subject, rules(gallery=True), "shot_noise", 5, 0)
    wanted = hits(model, digits, subject.rows, "shot_noise", 5, gallery=True)
    np.testing.assert_allclose(found["value"], wanted[:, 0])
    np.testing.assert_allclose(found["map_at_r"], wanted[:, 1], atol=1e-3)


def test_the_headline_is_the_mean_over_the_fifteen(done) -> None:
    said = done.extras["corruptions"]
    usual = [name for name, c in CORRUPTIONS.items() if not c.extra]
    assert len(usual) == 15
    by_hand = np.mean([np.mean(done.arrays[f"{name}@{s}/value"]) for name in usual for s in (1, 5)])
    assert said["mean"]["recall_at_1"] == pytest.approx(by_hand)
    assert said["retention"] == pytest.approx(100 * by_hand / done.benign["recall_at_1"])
    everyone = {
        n: np.mean([np.mean(done.arrays[f"{n}@{s}/value"]) for s in (1, 5)])
        for n, c in CORRUPTIONS.items()
        if not c.colour
    }
    assert said["worst"]["recall_at_1"] == pytest.approx(min(everyone.values()))
    assert np.mean(record.by_query(done)["corruption_recall_at_1"]) == pytest.approx(by_hand)
    assert numbers_of(done)["corruption_recall_at_1"] == pytest.approx(by_hand)


def test_where_nothing_can_be_found_the_stored_result_is_printed_all_the_same(model, tmp_path) -> None:
    alone = RetrievalDataset("alone", "test", TensorImages(torch.rand(4, 1, 8, 8)), np.arange(4))
    save(evaluate(model, alone, rules(severities=[1]), device="cpu"), tmp_path / "run")
    *sheets, line = record.tables(load(tmp_path / "run").extras["corruptions"])
    assert {cell for sheet in sheets for row in sheet.rows for cell in row[1:]} == {"–"} and "–" in line.head


def test_every_metric_is_printed_for_each_corruption_and_severity(done) -> None:
    first, of_clean, precision, _ = record.tables(done.extras["corruptions"])
    for name, c in CORRUPTIONS.items():
        if c.colour:
            continue
        outcomes = [[np.mean(done.arrays[f"{name}@{s}/{key}"]) for s in (1, 5)] for key in ("value", "map_at_r")]
        wanted = outcomes[0], np.divide(outcomes[0], done.benign["recall_at_1"] / 100), outcomes[1]
        for sheet, values in zip((first, of_clean, precision), wanted, strict=True):
            (row,) = (row for row in sheet.rows if row[0].split()[0] == name)
            assert row[1:] == tuple(f"{value:.1f}" for value in (*values, np.mean(values)))


def test_grey_pictures_have_no_colours_to_saturate() -> None:
    grey, colour = ({parsed(c)[0] for c in components(rules(), (n, 32, 32))} for n in (1, 3))
    assert colour - grey == {"saturate"} and len(colour) == 19


@pytest.mark.parametrize("name", ["frost", "jpeg_compression"])
def test_a_network_that_takes_blue_first_sees_the_same_corruption(name) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16))).float() / 255
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    model = Embedder(network, (3, 16, 16))

    class BlueFirst(torch.nn.Module):
        def forward(self, x):
            return network(x.flip(1))

    twin = Embedder(BlueFirst(), (3, 16, 16), preprocess=replace(model.preprocess, order="bgr"))
    places = np.arange(12)
    sets = [
        RetrievalDataset("made", "test", TensorImages(x), places % 4, places, places) for x in (images, images.flip(1))
    ]
    plain, other = (prepare(m, d, device="cpu") for m, d in zip((model, twin), sets, strict=True))
    assert torch.equal(embedded(plain, places, name, 5, 0), embedded(other, places, name, 5, 0))


def test_the_row_ranks_by_it(done) -> None:
    row = from_evaluation(done)
    assert row.headline == pytest.approx(numbers_of(done)["corruption_recall_at_1"], abs=1e-3)
    low, high = row.interval
    assert low <= row.headline <= high and row.ers is None


def test_neither_batch_nor_the_other_queries_matter(model, digits, done) -> None:
    more = evaluate(model, digits, rules(), limit=40, batch_size=7, device="cpu")
    at = np.searchsorted(more.arrays["query"], done.arrays["query"])
    for name in ("fog@5", "glass_blur@1"):
        np.testing.assert_array_equal(more.arrays[f"{name}/value"][at], done.arrays[f"{name}/value"])


def test_what_is_stored_is_looked_at_again(done, model, digits) -> None:
    rule = rules()
    stated = Stated(done, rule, tuple(components(rule, (1, 8, 8))))
    subject = prepare(model, digits, limit=24, device="cpu")
    kept = StoredSample(subject, np.arange(24), subject.images(0, 24))
    assert not list(record.outcome_problems(stated)) and not list(record.number_problems(stated))
    assert not list(record.replay(stated, kept))
    lie = done.model_copy().with_arrays({"fog@5/value": 100.0 - done.arrays["fog@5/value"]})
    told = Stated(lie, rule, stated.parts)
    assert any("fog@5" in p.field for p in record.replay(told, kept)) and list(record.number_problems(told))
    other = done.model_copy().with_arrays({}, {CLEAN: done.sample[CLEAN] * 0.5})
    assert [p.field for p in record.replay(Stated(other, rule, stated.parts), kept)] == [
        "run/adversarial_sample.npz clean"
    ]
    missing = done.model_copy().with_arrays({"fog@5/map_at_r": np.full(24, np.nan, np.float32)})
    assert list(record.outcome_problems(Stated(missing, rule, stated.parts)))


def test_the_packaged_protocol_of_queries_and_gallery(model, digits) -> None:
    few = np.flatnonzero(np.isin(digits.labels, digits.labels[:1]) | (np.arange(len(digits)) % 16 == 0))[:20]
    small = RetrievalDataset("few", "test", TensorImages(digits.images[few]), digits.labels[few])
    both = evaluate(model, small, "corruptions-everything", device="cpu")
    alone = evaluate(model, small, "corruptions", device="cpu")
    assert not both.partial and len(both.measurements) == len(alone.measurements) == 18 * 5
    assert both.benign == alone.benign and both.extras["corruptions"]["mean"] != alone.extras["corruptions"]["mean"]


HEAD = 'name = "x"\nversion = "1"\nkind = "corruptions"\ntitle = "t"\n[threat]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[settings]\nseverity = [1]\n", "[settings] severity"),
        ("[settings]\nseverities = [0, 1]\n", "[settings] severities.0"),
        ("[settings]\nseverities = [2, 1]\n", "ascending"),
        ("[settings]\nseverities = []\n", "[settings] severities"),
        ("[settings]\nseverities = [true]\n", "[settings] severities.0"),
        ('[settings]\ngallery = "yes"\n', "[settings] gallery"),
        ('eps = "8/255"\n', "eps does nothing"),
        ('[grid]\n8 = ["8/255"]\n', "[grid] does nothing"),
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path, text, words) -> None:
    (tmp_path / "mine.toml").write_text(HEAD + text)
    with pytest.raises(DataError) as error:
        read_protocol(tmp_path / "mine.toml")
    assert words in str(error.value)


def test_what_has_no_threat_has_no_eps(model, digits) -> None:
    with pytest.raises(UsageError, match="no eps"):
        evaluate(model, digits, "corruptions", eps=["1/255"], device="cpu")
    with pytest.raises(UsageError, match="no eps"):
        evaluate(model, digits, "corruptions", attacks=["CA+"], limit=4, device="cpu")


def test_as_a_user_types_it(typed, brief_plan, tmp_path) -> None:
    out = typed(
        "evaluate", "--model", MODEL, "--protocol", "corruptions", "--limit", "8", "--out", str(tmp_path / "run")
    ).out
    assert "glass_blur" in out and "severity 5" in out and "retained" in out and "under attack" not in out
    typed("report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"))
    plan = typed("evaluate", "--model", MODEL, "--protocol", "corruptions", "--plan").out
    assert "total" in plan

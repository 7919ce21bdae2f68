"""Which adversarial images a bundle keeps, and how models of other publishers are submitted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import arrays_of, edit_arrays, edit_json, edit_yaml, put, sealed, valid, zipped
from conftest import shared

from dmlbench.datasets import DATASETS
from dmlbench.errors import UsageError
from dmlbench.results import load
from dmlbench.submission import kept
from dmlbench.submission.bundle import read_bundle
from dmlbench.submission.kept import least_sample
from dmlbench.submission.pack import pack
from dmlbench.submission.validate import validate

SAMPLE = "run/adversarial_sample.npz"
FACES = Path(__file__).resolve().parent.parent / "leaderboard" / "submissions" / "mobilefacenet-strict-fast"


@pytest.mark.parametrize(
    ("dataset", "shape", "parts", "count"),
    [
        ("digits", (1, 8, 8), 10, 32),
        ("omniglot-small", (1, 28, 28), 4, 32),
        ("omniglot-small", (1, 28, 28), 10, 16),
        ("cifar10", (3, 32, 32), 10, 4),
        ("grocery", (3, 128, 128), 0, 2),
        ("folder:/mine", (3, 224, 224), 10, 1),
        ("lfw", (3, 112, 96), 10, 0),
        ("market1501", (3, 256, 128), 10, 0),
        ("cub", (3, 224, 224), 10, 0),
    ],
)
def test_how_many(dataset: str, shape: tuple[int, ...], parts: int, count: int) -> None:
    """By the bytes of all parts whose images a search moved; where none were moved, a query has one image."""
    e = load(FACES / "run", arrays=False)
    measured = [e.measurements[0].model_copy(update={"component": f"part {i}"}) for i in range(parts)]
    norms = {f"part {i}/norm": np.zeros(0) for i in range(parts)}
    named = e.dataset.model_copy(update={"name": dataset})
    run = e.model_copy(update={"dataset": named, "measurements": measured}).with_arrays(norms)
    assert least_sample(run, shape) == count


@pytest.fixture
def research(monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence of digits is for research alone."""
    entry = replace(DATASETS["digits"], licence="research")
    monkeypatch.setattr(kept, "DATASETS", {"digits": entry})


def test_pictures_that_may_not_be_passed_on_are_in_no_bundle(research: None, tmp_path: Path) -> None:
    valid(tmp_path)
    given = tmp_path / "run", tmp_path / "submission.yaml", tmp_path / "weights.safetensors"
    with pytest.raises(UsageError, match="may not be passed on"):
        pack(*given, sample=4)
    files = pack(*given)
    held = arrays_of(files[SAMPLE], tmp_path)
    assert all(len(values) == 0 for values in held.values()) and held["ES:R"].shape == (0, 1, 8, 8)
    path = zipped(files, tmp_path / "none.zip")
    report = validate(path, 3, device="cpu", seed=0)
    assert report.status == "accepted" and any("no adversarial image" in note for note in report.notes)


def test_a_bundle_of_other_data_cannot_leave_them_out(tmp_path: Path) -> None:
    files = valid(tmp_path)

    def emptied(arrays: dict[str, np.ndarray]) -> None:
        for name in arrays:
            arrays[name] = arrays[name][:0]

    report = validate(zipped(edit_arrays(files, SAMPLE, tmp_path, emptied), tmp_path / "x.zip"), 0)
    assert report.status == "refused" and any(SAMPLE in p.field for p in report.problems)


def test_metrics_of_groups_that_the_data_set_does_not_have(tmp_path: Path) -> None:
    """They come out of their arrays, so it takes the data set to know."""
    files = valid(tmp_path)

    def invent(arrays: dict[str, np.ndarray]) -> None:
        arrays["benign/minp"] = np.full(len(arrays["query"]), 99.0, dtype=np.float32)

    files = edit_arrays(files, "run/per_query.npz", tmp_path, invent)
    files = edit_json(files, "run/evaluation.json", put(("benign", "minp"), 99.0))
    report = validate(zipped(files, tmp_path / "x.zip"), 2, device="cpu")
    assert report.passed == (0, 1) and [p.field for p in report.problems] == ["run/evaluation.json benign.minp"]


def test_a_model_of_another_publisher(tmp_path: Path) -> None:
    """From its own file, in its own layout; what the registry says of it is not edited, and its weights are not passed on."""
    weights = shared("weights", "mobilefacenet-068.ckpt")
    files = dict(read_bundle(FACES).files)
    assert validate(FACES, 1, weights=weights).status == "accepted"
    other = validate(
        zipped(edit_yaml(files, put(("checkpoint", "input", "box"), None)), tmp_path / "a.zip"), 1, weights=weights
    )
    assert other.status == "refused" and "registry" in str(other.problems[0])
    wrong = validate(FACES, 1, weights=shared("weights", "mobilenetv2_imagenet.pt"))
    assert wrong.status == "refused" and wrong.passed == (0,)
    inside = sealed({**files, "weights.safetensors": b"\x10\0\0\0\0\0\0\0{}" + b" " * 14})
    assert any("passed on" in str(p) for p in validate(zipped(inside, tmp_path / "b.zip"), 0).problems)

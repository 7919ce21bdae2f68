"""A first look in minutes: a part of the data set that is never a result, and how far a run is."""

import numpy as np
import pytest
import torch
from trees import class_tree

from dmlbench.cli.output import EVERY, Bar, Lines
from dmlbench.datasets import RetrievalDataset, TensorImages, load_dataset
from dmlbench.datasets.preview import preview
from dmlbench.errors import UsageError
from dmlbench.evaluate import evaluate
from dmlbench.preprocess import Preprocess


def many(apart: bool, classes: int = 300, each: int = 10) -> RetrievalDataset:
    n = classes * each
    y = np.arange(n) // each
    y[::50] = -2
    rows = np.flatnonzero(y >= 0)
    split = {"query": rows[::5], "gallery": np.setdiff1d(np.arange(n), rows[::5])} if apart else {}
    return RetrievalDataset("mine", "test", TensorImages(torch.zeros(n, 1, 2, 2)), y, copies_count=True, **split)


@pytest.mark.parametrize("apart", [False, True])
def test_a_preview_is_drawn_by_class(apart: bool) -> None:
    whole = many(apart)
    part = preview(whole, queries=64, entries=400)
    assert len(part.query) == 64 and len(part.gallery) <= 400 and part.sha256 != whole.sha256
    assert set(part.query) <= set(whole.query) and set(part.gallery) <= set(whole.gallery)
    asked, searched = np.bincount(part.labels[part.query]), part.labels[part.gallery]
    assert asked.max() == 1, "one of each class while there are classes"
    counts = np.unique(searched[searched >= 0], return_counts=True)[1]
    assert counts.min() >= 3 and set(part.labels[part.query]) <= set(searched)
    share = [(d.labels[d.gallery] == -2).mean() for d in (part, whole)]
    assert share[0] == pytest.approx(share[1], abs=0.01)
    assert ((part.position_in_gallery >= 0) == (not apart)).all()
    np.testing.assert_array_equal(preview(whole, queries=64, entries=400).query, part.query)


def test_a_preview_of_files_reads_only_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    tree = class_tree(tmp_path / "mine", classes=5, each=6)
    small = Preprocess(size=(8, 8))
    whole = load_dataset(f"folder:{tree}", preprocess=small)
    part = preview(whole, queries=3, entries=12)
    assert len(part) == 12 == len(part.gallery) and len(part.query) == 3
    names = whole.images.source.paths  # type: ignore[attr-defined]
    for row in range(12):
        there = names.index(part.images.source.paths[row])  # type: ignore[attr-defined]
        assert whole.labels[there] == part.labels[row]
        assert torch.equal(whole.images[np.array([there])], part.images[np.array([row])])
    everything = preview(whole)
    assert len(everything.query) == len(everything.gallery) == 30


@pytest.mark.parametrize("seed", range(6))
def test_a_preview_keeps_the_few_that_ask_and_other_classes(seed: int) -> None:
    """All are searched, two of one class ask: both do in the preview too, before entries of every class."""
    y = np.arange(900) % 3
    asks = np.random.default_rng(seed).choice(np.flatnonzero(y == 1), 2, replace=False)
    whole = RetrievalDataset("mine", "test", TensorImages(torch.zeros(900, 1, 2, 2)), y, query=asks, copies_count=True)
    part = preview(whole, entries=30)
    assert set(part.query) == set(asks) <= set(part.gallery)
    assert np.bincount(y[part.gallery]).tolist() == [10, 10, 10]


def test_a_preview_is_never_a_full_result() -> None:
    result = evaluate("digits-smallcnn-triplet-hm-lga-ics", preview(load_dataset("digits")), attacks=["all"])
    assert result.partial == ("--preview",) and result.dataset.n_gallery == 896 and result.dataset.n_queries == 64


def test_a_preview_as_typed(run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    words = ("evaluate", "--model", "digits-smallcnn-triplet-hm-lga-ics", "--preview", "--attacks", "GTM")
    done = run(*words, "--out", str(tmp_path / "run"))
    assert "note: preview: 64 of 896 queries" in done.err and "(partial: --preview, --attacks GTM)" in done.out


def test_lines_say_how_far_a_long_task_is(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    lines.start("embed", 1000)
    for _ in range(5):
        now += EVERY / 2 + 0.5
        lines.advance("embed", 100)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0] == "embed: 200 of 1,000, 3.3 a second, about 4 min left"
    now += 1000
    lines.advance("embed", 500)
    assert not capsys.readouterr().err, "what is done needs no line"


def test_a_bar_that_is_not_drawn_lets_lines_through(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training") as bar:
        bar.say("before [the] first step")
        bar.at(1, 3)
        bar.say("between " + 30 * "words ")
        bar.at(3, 3)
    assert capsys.readouterr().err.splitlines() == ["before [the] first step", "between " + 30 * "words "]


def test_what_cannot_be_aimed_is_said_before_anything_is_embedded() -> None:
    class Never(torch.nn.Module):
        input_shape = (1, 2, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) <= 4, "the gallery was embedded"
            return images.flatten(1)

    few = RetrievalDataset("mine", "test", TensorImages(torch.rand(40, 1, 2, 2)), np.arange(40) % 4)
    with pytest.raises(UsageError, match="a gallery of 40 entries has no top 1 %"):
        evaluate(Never(), few, "ers-28")

"""What a person meets in a notebook: representations, frames, plots, and functions whose arguments complete."""

import html.parser
import inspect
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import dmlbench
from dmlbench.errors import DataError, UsageError
from dmlbench.models import ModelOptions
from dmlbench.results import Evaluation, Flag, load

ROOT = Path(__file__).resolve().parent.parent


def bundled(protocol: str) -> Evaluation:
    return load(ROOT / "leaderboard" / "submissions" / f"digits-smallcnn-triplet-act-{protocol}" / "run")


def test_one_line(data: Path) -> None:
    e = bundled("ers-digits")
    shown = [e, dmlbench.load_protocol("ers-digits"), dmlbench.load_dataset("digits"), dmlbench.load_model(e.model.id)]
    for value, said in zip(shown, ("ERS 35.3", "10 parts", "896 queries", "1x8x8"), strict=True):
        assert said in repr(value) and "\n" not in repr(value) and len(repr(value)) < 200
    partial = e.model_copy(update={"partial": ("--limit 9",), "warnings": (Flag(flag="random", message="x"),)})
    assert "partial: --limit 9" in repr(partial) and "flags: random" in repr(partial)


class Cells(html.parser.HTMLParser):
    """Texts of cells, and the names of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.cells += [""] if tag == "td" else []

    def handle_data(self, text: str) -> None:
        if self.cells:
            self.cells[-1] += text


def test_html_table_is_escaped() -> None:
    e = bundled("ers-digits")
    bad = "<script>alert(1)</script>&"
    hostile = e.model_copy(
        update={
            "model": e.model.model_copy(update={"id": bad}),
            "measurements": (e.measurements[0].model_copy(update={"component": bad}), *e.measurements[1:]),
            "warnings": (Flag(flag="<b>", message=bad),),
        }
    )
    found = Cells()
    found.feed(hostile._repr_html_())
    assert found.tags == {"table", "caption", "tr", "th", "td", "p", "b"}
    assert found.cells[0] == bad and found.cells[1] == f"{e.measurements[0].score:.1f}"
    assert found.cells[-4:-2] == ["ERS", f"{e.ers:.1f}"]


def test_frames() -> None:
    e = bundled("strict")
    parts = e.to_frame()
    assert parts["component"].tolist() == [m.component for m in e.measurements]
    assert parts["score"].tolist() == [m.score for m in e.measurements]
    assert parts["low"].tolist() == [m.interval[0] for m in e.measurements]
    queries = e.to_frame("queries")
    assert len(queries) == e.dataset.n_queries and "benign/clusters" not in queries
    assert queries["strict@5/255/value"].mean() == pytest.approx(e.part("strict@5/255").value)
    curve = e.to_frame("curve")
    assert curve["value"].tolist()[1:] == [row["recall_at_1"] for row in e.extras["strict"]["curve"]]
    with pytest.raises(UsageError, match="curve"):
        bundled("ers-digits").to_frame("curve")
    with pytest.raises(DataError, match="outcomes"):
        e.model_copy(update={"ers": None}).model_validate(e.model_dump()).to_frame("queries")


def test_save_and_plot(tmp_path: Path) -> None:
    e = bundled("ers-digits")
    assert load(e.save(tmp_path / "run")) == e
    figure = e.plot("classes", part="ES:R")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.save(tmp_path / "x" / "f.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UsageError, match="did you mean"):
        e.plot("part")


def test_public_functions(tmp_path: Path) -> None:
    a, b = bundled("ers-digits"), bundled("ers-digits")
    assert dmlbench.compare(a, b).exit_code == 0
    assert "35.3" in dmlbench.report([a], tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "recipe" in inspect.signature(dmlbench.train).parameters
    with pytest.raises(UsageError, match="unknown recipe"):
        dmlbench.train("digits-nothing", tmp_path / "run")
    with pytest.raises(AttributeError, match="nothing"):
        dmlbench.nothing  # noqa: B018
    for name in dmlbench.__all__:
        assert getattr(dmlbench, name) is not None


def test_load_model_names_every_option(data: Path) -> None:
    taken = inspect.signature(dmlbench.load_model).parameters
    for field in fields(ModelOptions):
        assert taken[field.name].default == field.default, field.name
    own = set(inspect.signature(dmlbench.Embedder).parameters) - {"network"}
    assert set(taken) == {"model"} | {f.name for f in fields(ModelOptions)} | own
    flat = nn.Flatten()
    made = dmlbench.load_model(flat, input_shape=(1, 2, 2), mean=[0.5], std=[0.5], name="flat")
    assert made.name == "flat" and np.isclose(float(made.mean), 0.5)
    with pytest.raises(UsageError, match="does not take compiled"):
        dmlbench.load_model(flat, input_shape=(1, 2, 2), compiled=True)
    with pytest.raises(UsageError, match="does not take input_shape"):
        dmlbench.load_model("digits-smallcnn-triplet-none", input_shape=(1, 8, 8))
    assert dmlbench.load_model("digits-smallcnn-triplet-none", precision="float32").precision == "float32"

"""What is refused is refused before the run, and neither loses a result nor leaves a folder that is in the way."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import SUBMISSIONS
from PIL import Image
from synthetic import evaluation

import dmlbench
from dmlbench.board import add_row, from_csv
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError
from dmlbench.kinds.table import numbers_of
from dmlbench.results import load, save

MODEL = "digits-smallcnn-triplet-none"
FULL = evaluation(model=MODEL, protocol="ers-digits")
SHORT = ["evaluate", "--model", MODEL, "--attacks", "CA+", "--limit", "8"]


@pytest.fixture
def idle(monkeypatch):
    """A dmlbench that must not be asked to measure anything."""

    def never(*args, **options):
        raise AssertionError("the run was begun")

    monkeypatch.setattr(dmlbench, "evaluate", never)


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Options for a model that is not registered."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Flatten):\n    input_shape = (3, 8, 8)\n"
        "class Small(Own):\n    def forward(self, x):\n        if len(x) > 3:\n"
        "            raise RuntimeError('too many\\nmore about it')\n        return x.flatten(1)\n"
    )
    return ["--model", f"python:{tmp_path / 'own.py'}:Own"]


@pytest.mark.parametrize("content, words", [
    ("junk\n", "is not a board"), ("", "is not a board"), ("item,price\nmilk,2\n", "is not a board"),
    (None, "holds a full result"),
])  # fmt: skip
def test_a_row_that_cannot_be_added_is_refused_before_the_run(content, words, typed, tmp_path, idle) -> None:
    file = tmp_path / "b.csv"
    if content is None:
        add_row(load(SUBMISSIONS / f"{MODEL}-ers-digits" / "run", sample=False), file)
    else:
        file.write_text(content)
    before = file.read_bytes()
    assert words in typed(*SHORT, "--csv", file, "--out", "run", code=4).err
    assert file.read_bytes() == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, words", [
    ("=x", "a spreadsheet would execute"), ("@x", "a spreadsheet would execute"), ("<b>", "HTML"), ("x ", "white space"),
    ("a\nb", "control character"), ("x" * 301, "300 characters"),
])  # fmt: skip
def test_a_name_that_no_board_takes_is_refused_before_the_run(name, words, typed, own, tmp_path, idle) -> None:
    images = ["--dataset", pictures(tmp_path / "pics"), "--protocol", "ers-28"]
    refused = typed("evaluate", *own, *images, "--name", name, "--csv", "n.csv", code=4).err.splitlines()[-1]
    assert refused.startswith("Error: n.csv takes no such row: model: ") and words in refused


def test_a_data_set_that_no_board_takes_is_refused_before_the_run(typed, own, tmp_path, idle) -> None:
    images = ["--dataset", pictures(tmp_path / "pi<c>s"), "--protocol", "ers-28"]
    assert "n.csv takes no such row: dataset: " in typed("evaluate", *own, *images, "--csv", "n.csv", code=4).err


def test_add_row_refuses_a_name_in_one_line(tmp_path) -> None:
    with pytest.raises(DataError, match=r"takes no such row: model: .*HTML"):
        add_row(evaluation(model="<b>"), tmp_path / "b.csv")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_row_that_fails_after_the_run_loses_no_table(form, typed, tmp_path, monkeypatch) -> None:
    def fails(*args):
        raise DataError("the disk is full")

    monkeypatch.setattr("dmlbench.board.add_row", fails)
    done = typed(*SHORT, "--csv", "b.csv", *form, code=4)
    assert "CA+" in done.out and "the disk is full" in done.err


def test_a_table_that_nobody_reads_loses_no_row(typed, tmp_path, monkeypatch) -> None:
    def fails(*args):
        raise DataError("nobody listens")

    monkeypatch.setattr("dmlbench.cli.evaluate.print_evaluation", fails)
    typed(*SHORT, "--csv", "b.csv", code=4)
    assert [row.model for row in from_csv(tmp_path / "b.csv")] == [MODEL]


def test_a_partial_result_over_a_full_one_is_refused_before_the_run(typed, tmp_path, idle) -> None:
    save(FULL, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert "holds a full result; a partial one" in typed(*SHORT, "--out", "run", code=4).err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_merge_that_is_refused_touches_nothing(typed, tmp_path, idle) -> None:
    head = tmp_path / "1" / "units" / "configuration.json"
    head.parent.mkdir(parents=True)
    asked = {"attacks": ["CA+"], "limit": 8, "seed": 0, "eot": None, "surrogate": None}
    head.write_text(
        json.dumps({"model": MODEL, "dataset": "digits", "split": "test", "protocol": "ers-digits", **asked})
    )
    save(FULL, tmp_path / "run")
    assert "holds a full result" in typed("merge", "1", "--out", "run", code=4).err
    (tmp_path / "b.csv").write_text("junk\n")
    assert "is not a board" in typed("merge", "1", "--out", "new", "--csv", "b.csv", code=4).err
    assert not (tmp_path / "run" / "units").exists() and not (tmp_path / "new").exists()


def pictures(folder: Path, classes: int = 3, each: int = 4) -> str:
    """A data set of small pictures."""
    draw = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{c}" / f"{i}.png")
    return f"folder:{folder}"


def test_a_run_that_is_refused_at_once_leaves_its_folder_free(typed, own, tmp_path) -> None:
    words = ["evaluate", *own, "--dataset", pictures(tmp_path / "pics"), "--protocol", "ers-28", "--out", "run"]
    assert "has no top 1 %" in typed(*words, code=2).err
    assert not (tmp_path / "run" / "units").exists()
    typed(*words, "--attacks", "ES:D", "--limit", "4")
    assert load(tmp_path / "run").partial == ("--limit 4", "--attacks ES:D")


def test_somebody_elses_file_among_the_units_stays_and_loses_no_result(typed, tmp_path) -> None:
    (tmp_path / "run" / "units").mkdir(parents=True)
    (tmp_path / "run" / "units" / ".DS_Store").touch()
    done = typed(*SHORT, "--out", "run", "--csv", "b.csv")
    assert "CA+" in done.out and len(from_csv(tmp_path / "b.csv")) == 1
    assert [path.name for path in (tmp_path / "run" / "units").iterdir()] == [".DS_Store"]
    assert "finished result" in typed(*SHORT, "--out", "run", "--resume").err


def test_a_refusal_of_another_configuration_says_what_can_be_done(typed, tmp_path) -> None:
    head = tmp_path / "run" / "units" / "configuration.json"
    head.parent.mkdir(parents=True)
    head.write_text("{}")
    assert "units to begin anew, or name another --out" in typed(*SHORT, "--out", "run", code=3).err
    assert head.read_text() == "{}"


def test_what_searches_found_is_kept_by_a_run_that_is_refused_later(typed, tmp_path, monkeypatch) -> None:
    def fails(*args):
        raise DataError("the model is broken")

    monkeypatch.setattr(sys.modules["dmlbench.evaluate"], "doubts_about", fails)
    typed(*SHORT, "--out", "run", code=4)
    assert list((tmp_path / "run" / "units").glob("CA+*.npz"))


def test_numbers_of_no_query_are_empty_wherever_they_are_read(typed, own, tmp_path) -> None:
    images = ["--dataset", pictures(tmp_path / "pics", each=1), "--protocol", "strict-fast", "--limit", "2"]
    words = ["evaluate", *own, *images, "--csv", "b.csv", "--out", "run"]
    assert "median –" in " ".join(typed(*words).out.split())
    (row,) = from_csv(tmp_path / "b.csv")
    assert row.worst_case_area is None and row.headline is None and row.nmi is not None
    assert "median –" in " ".join(typed(*words, "--resume").out.split())
    typed("compare", "run", "run")
    typed("report", "run", "--out", "run.html")
    unread = evaluation(extras={"strict": {"curve": [{"recall_at_1": None}], "area": float("nan")}})
    assert numbers_of(unread) == {}


def test_a_network_that_fails_on_a_batch_is_told_in_one_line(typed, own, tmp_path) -> None:
    images = ["--dataset", pictures(tmp_path / "pics"), "--protocol", "strict-fast"]
    refused = typed("evaluate", "--model", f"{own[1][:-3]}Small", *images, code=4).err
    assert "fails on a batch of 12x3x8x8: RuntimeError: too many" in refused
    assert "Traceback" not in refused and "more about it" not in refused


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError, DataError])
def test_what_the_engine_or_the_user_handles_comes_through_a_network(error) -> None:
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise error("as it is")

    with pytest.raises(error, match=r"^as it is$"):
        Embedder(Fails(), (1, 8, 8))(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("files", [{"evaluation.json": 5}, {"evaluation.json": None}, {"evaluation.json": ["sha256"]}])
def test_a_manifest_of_another_form_is_an_error(files, tmp_path) -> None:
    save(FULL, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(DataError, match=r"manifest\.json: files\.evaluation\.json is "):
        load(tmp_path)


@pytest.mark.parametrize("env, whole", [({"COLUMNS": "70"}, True), ({"COLUMNS": "60", "FORCE_COLOR": "1"}, False)])
def test_no_name_of_a_part_is_cut(env, whole, typed) -> None:
    out = typed("evaluate", "--model", MODEL, "--attacks", "ES@pgd", "--limit", "8", env=env).out
    table = out[out.index("\nES@pgd") : out.index("\nERS")].splitlines()
    name = "ES@pgd:embedding_shift"
    assert any(line.startswith(f"{name} ") for line in table) == whole
    assert name in "".join(line.split()[0] for line in table if line[:1].strip())  # folded where it must be


OTHER_TYPES = """
import numpy as np
import torch
from torch import nn
from dmlbench import RetrievalDataset, TensorImages, evaluate, load_model
from dmlbench.datasets import ArrayImages
from dmlbench.errors import DataError, UsageError
from dmlbench.task import Options

cases = [
    (Options, dict(seed=1.5), "seed must be a whole number, not 1.5"),
    (Options, dict(limit=8.0), "limit must be a whole number, not 8.0"),
    (Options, dict(batch_size="auto"), "batch_size must be a whole number, not 'auto'"),
    (Options, dict(eot=2.5), "eot must be a whole number, not 2.5"),
    (Options, dict(attacks="CA+"), "attacks must be a list of strings such as ['CA+'], not 'CA+'"),
    (Options, dict(attacks=[3]), "attacks must be a list of strings such as ['CA+'], not [3]"),
    (Options, dict(eps="8/255"), "eps must be a list of strings such as ['8/255'], not '8/255'"),
    (Options, dict(eps=[0.03]), "eps must be a list of strings such as ['8/255'], not [0.03]"),
    (Options, dict(eps=0.03), "eps must be a list of strings such as ['8/255'], not 0.03"),
]
for shape in ((8, 8), (1, 8, 8, 1), (1.0, 8, 8), "1x8x8", 8):
    said = f"input_shape must be (channels, height, width), whole numbers above 0, not {shape!r}"
    cases.append((load_model, dict(input_shape=shape), said))
for given, said in ((dict(mean=["a"]), "mean must be a number for each channel, not ['a']"),
                    (dict(distance=3), "distance must be one of DISTANCES, e.g. DISTANCES['N'], not 3")):
    cases.append((load_model, {"input_shape": (1, 8, 8), **given}, said))
for call, given, said in cases:
    try:
        call(*([nn.Flatten()] if call is load_model else []), **given)
    except UsageError as error:
        assert str(error) == said, error
    else:
        raise AssertionError(given)
def images(given):
    class Given:
        shape = (1, 8, 8)
        __len__ = lambda self: 120
        __getitem__ = lambda self, rows: given[rows]
        content = lambda self: b""
    return Given()

def measured(images):
    labels = np.arange(120) % 4
    return evaluate("digits-smallcnn-triplet-none", RetrievalDataset("mine", "test", images, labels), "ers-digits", limit=4)

x = np.random.default_rng(0).random((120, 1, 8, 8)).astype(np.float32)
t = torch.from_numpy(x)
for make, given, said in (
    (TensorImages, x, "images must be a float tensor (N, C, H, W), not float32 ndarray (120, 1, 8, 8)"),
    (TensorImages, t[:0], "images must be a float tensor (N, C, H, W), not torch.float32 Tensor (0, 1, 8, 8)"),
    (ArrayImages, x, "images must be an array of integers (N, C, H, W), not float32 ndarray (120, 1, 8, 8)"),
    (ArrayImages, t.byte(), "images must be an array of integers (N, C, H, W), not torch.uint8 Tensor"),
    (lambda x: x, t, "data set 'mine': images are torch.float32 Tensor (120, 1, 8, 8): give TensorImages(tensor)"),
    (images, t * 2 - 0.5, "the data set's images must lie in [0, 1], and are from -0.4"),
    (images, t.double(), "the data set's images must be float32 (120, 1, 8, 8), and it gave torch.float64"),
    (images, x, "the data set's images must be float32 (120, 1, 8, 8), and it gave a ndarray"),
    (images, t.repeat(1, 1, 2, 1), "and it gave torch.float32 (120, 1, 16, 8)"),
    (lambda x: ArrayImages(x, top=16), (255 * x).astype(np.uint8), "the data set's images must lie in [0, 1]"),
):
    try:
        measured(make(given))
    except DataError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
assert TensorImages(t.clone().requires_grad_()).content() == TensorImages(t).content()
assert Options(seed=np.int64(2**62), limit=np.int32(8)) == Options(seed=2**62, limit=8)
assert load_model(nn.Flatten(), input_shape=np.array([1, 8, 8])).input_shape == (1, 8, 8)
"""


def test_arguments_of_another_type_are_told_in_one_line() -> None:
    """In a process of its own: the types that pytest checks are checked for no user. A seed of 1.5 never ended."""
    done = subprocess.run([sys.executable, "-c", OTHER_TYPES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

"""Entries of one's own: the examples of docs/extend.md as an installed package, and files named on the command line."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dmlbench
from dmlbench.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")
MODEL = "digits-smallcnn-triplet-none"
SHORT = ("evaluate", "--model", MODEL, "--limit", "16")


def files_of_the_page() -> dict[str, str]:
    """The complete examples by the file's name, which their first line says."""
    blocks = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len({name for name, _ in blocks}) == len(blocks)
    return dict(blocks)


def commands_of_the_page() -> list[list[str]]:
    """The commands, as words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("dmlbench ")]


TYPED = """
import contextlib, io, json, sys
from dmlbench.cli import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code or 0
    print(json.dumps([words, code, out.getvalue(), err.getvalue()]))
"""


def in_one_process(folder: Path, commands: list[list[str]]) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, with ``folder`` on the path of a fresh interpreter and as its place."""
    path = os.pathsep.join([str(Path(dmlbench.__file__).parent.parent), str(folder)])
    done = subprocess.run(
        [sys.executable, "-c", TYPED, json.dumps(commands)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {shlex.join(words): (code, out, err) for words, code, out, err in map(json.loads, done.stdout.splitlines())}


def test_the_examples_are_short_and_of_every_kind() -> None:
    files = files_of_the_page()
    assert all(text.count("\n") < 20 for text in files.values())
    text = "".join(files.values())
    for table in ("OBJECTIVES", "TARGETS", "OPTIMIZERS", "READOUTS", "ATTACKS", "PROTOCOLS", "DATASETS", "ARCHITECTURES",
                  "LOSSES", "DEFENSES", "KINDS"):  # fmt: skip
        assert re.search(rf"^@?{table}\.(add|register)\(", text, re.MULTILINE), table


def test_the_page_is_a_package_that_runs_as_it_says(tmp_path: Path) -> None:
    for name, text in files_of_the_page().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["dmlbench.plugins"]
    (info / "entry_points.txt").write_text(
        "\n".join(["[dmlbench.plugins]", *(f"{k} = {v}" for k, v in points.items())])
    )
    modules = {f"mypackage.{path.stem}" for path in (tmp_path / "mypackage").glob("*.py")}
    assert set(points.values()) == modules

    page = commands_of_the_page()
    as_json = [[*words, "--json"] for words in page if words[0] != "train"]
    trained = [words for words in page if words[0] == "train"]
    more = [["datasets", "prepare", "odd-digits"], ["attacks", "list", "--json"], ["datasets", "show", "odd-digits"]]
    done = in_one_process(tmp_path, [*trained, *as_json, *more])
    wrong = {words: (code, err) for words, (code, _, err) in done.items() if code and "prepare" not in words}
    assert not wrong

    found = {words: json.loads(out) for words, (_, out, _) in done.items() if words.endswith("--json")}
    parts = {
        words: {m["component"]: m for m in result["measurements"]}
        for words, result in found.items()
        if "measurements" in result
    }
    everything = {name: m for named in parts.values() for name, m in named.items()}
    assert {"jitter", "median", "far", "MO@shrinking", "FAR@pgd:target_cosine", "FAR@pgd:recall_at_4"} <= set(
        everything
    )
    assert everything["far"]["optimizer"] == everything["MO@shrinking"]["optimizer"] == "shrinking"
    (mine,) = (r for words, r in found.items() if "--protocol mine " in words)
    assert mine["protocol"]["name"] == "mine" and everything["median"]["value"] < mine["benign"]["recall_at_1"]
    noisy, jittered = (r for words, r in found.items() if "runs/noisy" in words)
    assert jittered["protocol"]["name"] == "jitter" and jittered["measurements"][0]["readout"] == "recall_at_1"
    assert (noisy["dataset"]["name"], noisy["model"]["loss"], noisy["model"]["defense"]) == (
        "odd-digits",
        "supcon",
        "noisy",
    )
    assert noisy["dataset"]["n_queries_full"] == 906
    (own,) = (r for words, r in found.items() if "mine.py:off_centre" in words)
    assert all(
        re.fullmatch(r"mine\.py:off_centre#[0-9a-f]{12}@(pgd|apgd)", m["component"]) for m in own["measurements"]
    )
    assert any("is your own code and was run" in note for note in own["environment"]["notes"])
    code, _, err = done["datasets prepare odd-digits"]
    assert code == 2 and "is of a plugin" in err
    assert {"MO", "FAR"} <= {a["id"] for a in found["attacks list --json"]}


MINE = """
import torch
from dmlbench.attacks import Attack
from dmlbench.datasets import ArrayImages, RetrievalDataset
from dmlbench.datasets.digits import digits
RAN = open(__file__ + ".ran", "w").close()

def misrank(e, scene):
    "The nearest entry of another class nearer than the nearest of one's own."
    d = scene.distances(e)
    own = d.masked_fill(~scene.same, torch.inf).amin(1)
    return d.masked_fill(~scene.other, torch.inf).amin(1) - own
def to_target(e, scene):
    return (e - scene.targets[:, 0]).norm(dim=1)
near = Attack("come near", "to_target", "nearest_other", ("recall_at_1",), "a test")
lost = Attack("come near", "nowhere", "", ("recall_at_1",), "a test")
def fails(e, scene):
    return e.nothing
def wide(e, scene):
    return e
def flat(e, scene):
    return e.detach().sum(1)
def in_place(e, scene):
    d = e.exp()
    loss = (d * d).sum(1)
    d.zero_()
    return loss
def nothing():
    return 3
number = 3
def some_digits(split):
    whole = digits(split)
    return RetrievalDataset("digits", split, whole.images, whole.labels, query=range(40))
def only_test():
    return digits("test")
def short():
    return RetrievalDataset("short", "test", digits("test").images, [0, 1])
def size(preprocess):
    raise KeyError(preprocess.shape)
def step(learner, batch, inner, *, weight: float = 1.0):
    return weight * learner.outer(learner.embedder(batch.images), batch, "R")
def no_loss(learner, batch, inner):
    pass
def bad_step(learner, batch, inner):
    return 1 / 0
def needs(learner, batch, inner, *, weight):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file ``mine.py`` in the working folder; what it adds to the tables is gone after the test."""
    from dmlbench.attacks import ATTACKS
    from dmlbench.objectives import OBJECTIVES
    from dmlbench.training.defenses import DEFENSES

    for table in (ATTACKS, OBJECTIVES, DEFENSES):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def line_of(text: str) -> int:
    return MINE[: MINE.index(text)].count("\n") + 1


def test_an_objective_of_ones_own_finds_what_the_same_formula_of_ours_does(typed, own: Path) -> None:
    done = typed(*SHORT, "--attacks", "mine.py:misrank@apgd,WM@apgd,mine.py:near,GTM", "--json")
    values = {m["attack"]: m["value"] for m in done.json["measurements"]}
    mine, near = (
        next(v for name, v in values.items() if name.startswith(f"mine.py:{n}#")) for n in ("misrank", "near")
    )
    assert mine == values["WM"] and near == values["GTM"] and done.json["ers"] is None
    assert sum("mine.py, sha256" in note for note in done.json["environment"]["notes"]) == 2
    assert "note: mine.py:misrank#" in done.err


def test_a_part_of_ones_own_never_counts(typed, own: Path) -> None:
    few = ("evaluate", "--model", MODEL, "--limit", "4", "--json")
    alone, both = typed(*few).json, typed(*few, "--attacks", "all,mine.py:misrank", "--out", "run").json
    assert both["ers"] == alone["ers"] and both["extras"]["extra_parts"] == [both["measurements"][-1]["component"]]
    forget("attacks.ATTACKS")  # another process knows nothing of it, and compares and draws it as it was scored
    said = {m["metric"]: m for m in typed("compare", "run", "run", "--json").json["metrics"]}
    assert said["ers"]["base"] == pytest.approx(alone["ers"])
    assert said[both["measurements"][-1]["component"]]["base"] == pytest.approx(both["measurements"][-1]["score"])


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("mine.py:misrnak", 2, "mine.py has no function 'misrnak'; did you mean 'misrank'?"),
        ("other.py:misrank", 2, "other.py is not a file"),
        ("a@b/mine.py:misrank", 2, "cannot be told from ATTACK@OPTIMIZER"),
        ("mine.py:misrank@pdg", 2, "unknown optimizer 'pdg'; did you mean"),
        ("mine.py:misrank#0000", 4, "has changed: the sha256 of mine.py begins with"),
        ("mine.py:number", 4, "is of type int, not a function of (embeddings, scene), nor an Attack"),
        ("mine.py:nothing", 4, "takes (), not (embeddings, scene)"),
        ("mine.py:lost", 2, "unknown objective 'nowhere'"),
        ("mine.py:fails", 4, "AttributeError: 'Tensor' object has no attribute 'nothing' (mine.py, line {e.nothing})"),
        ("mine.py:wide", 4, "gave shape (16, 64), not one float loss for each of 16 images"),
        ("mine.py:flat", 4, "gave a loss without a gradient"),
        ("mine.py:in_place", 4, "modified by an inplace operation"),
    ],
)
def test_what_is_wrong_with_an_attack_of_ones_own_is_one_line(
    typed, own: Path, name: str, code: int, said: str
) -> None:
    done = typed(*SHORT, "--attacks", name, "--out", "run", code=code)
    said = re.sub(r"\{(.*)\}", lambda found: str(line_of(found[1])), said)
    assert said in done.err and done.err.count("\n") == 1 + done.err.count("note:"), done.err
    assert not Path("run/units").exists()  # the next run has the folder to itself


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("\nimport nowhere_at_all\n", "No module named 'nowhere_at_all' (bad.py, line 2)"),
        ("raise SystemExit('no\\nway')", "SystemExit: no (bad.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(typed, own: Path, text: str, said: str) -> None:
    Path("bad.py").write_text(text)
    for words in (("--attacks", "bad.py:f"), ("--dataset", "python:bad.py:f")):
        done = typed(*SHORT, *words, code=4)
        assert said in done.err and done.err.count("\n") == 1, done.err


def test_results_of_a_file_that_has_changed_are_other_results(typed, own: Path) -> None:
    command = (*SHORT, "--attacks", "mine.py:misrank", "--out", "run")
    before = typed(*command, "--json").json
    assert typed(*command, "--resume", "--json").json == before
    own.write_text(MINE.replace("amin(1) - own", "amin(1) - 2 * own"))  # of the same second and size, to Python's cache
    done = typed(*command, "--resume", code=3)
    assert "another configuration" in done.err and "extra_parts" in done.err
    own.write_text(MINE.replace("amin(1) - own", "amin(1) + own"))
    assert typed(*command, "--json").json["measurements"][0]["component"] != before["measurements"][0]["component"]


def test_shards_of_ones_own_code_are_merged_where_it_is_named(typed, own: Path) -> None:
    data = ("--dataset", "python:mine.py:some_digits")
    command = (*SHORT, *data, "--attacks", "mine.py:near", "--batch-size", "8")
    for i in (1, 2):
        typed(*command, "--shard", f"{i}/2", "--out", f"part{i}")
    merge = ("merge", "part1", "part2", "--out", "whole", "--json")
    for table in ("attacks.ATTACKS", "objectives.OBJECTIVES"):  # as in another process
        forget(table)
    Path("mine.py.ran").unlink()
    assert "names the dataset python:mine.py:some_digits" in typed(*merge, code=2).err
    assert not Path("mine.py.ran").exists()
    assert "was made with the attack mine.py:near#" in typed(*merge, *data, code=2).err
    whole = typed(*merge, *data, "--attacks", "mine.py:near").json
    assert whole["measurements"][0]["value"] == typed(*command, "--json").json["measurements"][0]["value"]


def forget(table: str) -> None:
    """Take a user's own entries out of a table."""
    module, name = table.split(".")
    entries = getattr(importlib.import_module(f"dmlbench.{module}"), name)._entries
    for label in [label for label in entries if ".py:" in label]:
        del entries[label]


PLUGIN = """
from dmlbench.attacks import ATTACKS, Attack
from dmlbench.datasets import DATASETS, DatasetEntry
from dmlbench.datasets.digits import digits
from dmlbench.objectives import OBJECTIVES

for name, objective in {
    "fails": lambda e, scene: 1 / 0,
    "wide": lambda e, scene: e.sum(),
    "flat": lambda e, scene: e.detach().sum(1),
}.items():
    OBJECTIVES.add(name, objective)
    ATTACKS.add(name, Attack("a test", name, "", ("recall_at_1",), "a test"))
DATASETS.add("number", DatasetEntry(lambda split, preprocess: 3, "a number", "ers-digits", shape=(1, 8, 8)))
DATASETS.add("test", DatasetEntry(lambda split, preprocess: digits("test"), "digits again", "ers-digits", shape=(1, 8, 8)))
"""


def test_what_is_wrong_with_a_plugin_is_one_line_that_blames_it(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(PLUGIN)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmlbench.plugins]\nmine = theirs\n")
    attacks, data = [[*SHORT, "--attacks", name] for name in ("fails", "wide", "flat")], [*SHORT, "--attacks", "CA+"]
    train = [
        "train",
        "--dataset",
        "test",
        "--arch",
        "smallcnn",
        "--iterations",
        "1",
        "--defense",
        "none",
        "--out",
        "run",
    ]
    commands = [*attacks, [*data, "--dataset", "number"], train, [*data, "--dataset", "test", "--json"]]
    done = list(in_one_process(tmp_path, commands).values())
    for (code, _, err), said in zip(
        done,
        (
            "plugin 'mine' failed (theirs.py, line 8): ZeroDivisionError: division by zero",
            "<lambda> gave shape (), not one float loss for each of 16 images",
            "<lambda> gave a loss without a gradient",
            "a number: its function gave a int, where a RetrievalDataset, the test split, is expected",
            "digits again: its function gave the test split, where a RetrievalDataset, the train split, is expected",
        ),
        strict=False,
    ):
        assert code == 4 and said in err and err.count("\n") == 1, err
    assert json.loads(done[-1][1])["dataset"]["name"] == "test"


def test_a_data_set_of_ones_own_is_never_one_of_ours(typed, own: Path) -> None:
    command = (*SHORT, "--dataset", "python:mine.py:some_digits", "--attacks", "CA+", "--out", "run")
    first = typed(*command, "--json").json
    assert (first["dataset"]["name"], first["dataset"]["n_queries_full"]) == ("python:mine.py:some_digits", 40)
    assert any(note.startswith("python:mine.py:some_digits is your own code") for note in first["environment"]["notes"])
    own.write_text(MINE.replace("whole.labels,", "whole.labels[::-1].copy(),"))
    assert "dataset_sha256" in typed(*command, "--resume", code=3).err
    with pytest.raises(UsageError, match="gave the test split, where the train split is asked for"):
        dmlbench.load_dataset("python:mine.py:only_test", "train")
    done = typed("datasets", "verify", "python:mine.py:only_test")
    assert "896 images" in done.out


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("mine.py:som_digits", 2, "no function 'som_digits'; did you mean 'some_digits'?"),
        ("mine.py", 2, "needs a module or file and a name, e.g. python:mine.py:make"),
        ("mine.py:number", 4, "is of type int, not a function of split and preprocess"),
        ("mine.py:misrank", 4, "needs (e, scene)"),
        ("mine.py:nothing", 4, "gave a int, not a RetrievalDataset"),
        ("mine.py:short", 4, '896 images but labels of shape (2,) (mine.py, line {"short", "test"})'),
        ("mine.py:size", 4, "KeyError: (1, 8, 8) (mine.py, line {raise KeyError})"),
    ],
)
def test_what_is_wrong_with_a_data_set_of_ones_own_is_one_line(
    typed, own: Path, name: str, code: int, said: str
) -> None:
    done = typed(*SHORT, "--dataset", f"python:{name}", code=code)
    said = re.sub(r"\{(.*)\}", lambda found: str(line_of(found[1])), said)
    assert said in done.err and done.err.count("\n") == 1 + done.err.count("note:"), done.err


TRAIN = ("train", "--dataset", "digits", "--arch", "smallcnn", "--iterations", "3", "--defense")


def test_a_defence_of_ones_own_trains_as_the_same_step_of_ours(typed, own: Path) -> None:
    mine = typed(*TRAIN, "mine.py:step", "--set", "defense_params.weight=0.5", "--out", "a", "--json")
    ours = typed(*TRAIN, "none", "--out", "b", "--json")
    losses = [done.json["log"][-1]["loss"] for done in (mine, ours)]
    assert losses[0] == pytest.approx(losses[1] / 2, rel=0.05) and "is your own code and was run" in mine.err
    (entry,) = json.loads(Path("a/checkpoint.json").read_text()).values()
    assert re.fullmatch("mine.py:step#[0-9a-f]{12}", entry["defense"]["name"])
    again = shlex.split(entry["train"]["command"])[1:]
    typed(*again[: again.index("--out")], "--out", "c")
    assert Path("a/last.safetensors").read_bytes() == Path("c/last.safetensors").read_bytes()

    own.write_text(MINE + "\n")
    assert "has changed" in typed(*again, code=4).err
    done = typed(*TRAIN, "mine.py:step", "--set", "defense_params.weight=0.5", "--out", "a", "--resume", code=2)
    assert "differing keys: " in done.err and "defense (" in done.err


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("mine.py:stp", 2, "no function 'stp'; did you mean 'step'?"),
        ("mine.py:number", 4, "is of type int, not a function of (learner, batch, inner"),
        ("mine.py:needs", 4, "weight), not (learner, batch, inner"),
        ("mine.py:no_loss", 4, "did not give a loss to differentiate"),
        ("mine.py:bad_step", 4, "ZeroDivisionError: division by zero (mine.py, line {return 1 / 0})"),
    ],
)
def test_what_is_wrong_with_a_defence_of_ones_own_is_one_line(
    typed, own: Path, name: str, code: int, said: str
) -> None:
    done = typed(*TRAIN, name, "--out", "run", code=code)
    said = re.sub(r"\{(.*)\}", lambda found: str(line_of(found[1])), said)
    assert said in done.err and done.err.count("\n") == 1 + done.err.count("note:"), done.err


def test_only_what_the_user_names_is_run(typed, own: Path) -> None:
    """Not what a training run, a recipe or a protocol names."""
    typed(*TRAIN, "none", "--out", "theirs")
    path = Path("theirs/checkpoint.json")
    table = json.loads(path.read_text())
    next(iter(table.values()))["dataset"]["name"] = "python:mine.py:only_test"
    path.write_text(json.dumps(table))
    Path("recipe.toml").write_text('dataset = "digits"\narch = "smallcnn"\ndefense = "mine.py:step"\n')
    Path("data.toml").write_text('dataset = "python:mine.py:some_digits"\narch = "smallcnn"\n')
    protocol = """name = "x"\nversion = "1"\nkind = "parts"\ntitle = "t"\nthreat = {norm = "linf", eps = "8/255"}
[[components]]\nname = "A"\nattack = "mine.py:misrank"\nreadout = "recall_at_1"\nworst = 0\nbest = 100\n"""
    Path("x.toml").write_text(protocol)
    assert "own code runs only where you name it" in typed("evaluate", "--model", "theirs", code=2).err
    assert "unknown defence" in typed("train", "recipe.toml", "--out", "r", code=2).err
    assert "own code runs only where you name it" in typed("train", "data.toml", "--out", "r", code=2).err
    assert "unknown attack" in typed(*SHORT, "--protocol", "x.toml", code=4).err
    assert not Path("mine.py.ran").exists()


def test_t_sne_does_not_run_what_a_run_folder_names(own: Path) -> None:
    from dmlbench.board.plots import tsne

    e = dmlbench.evaluate(MODEL, protocol="ers-digits", attacks=["CA+"], limit=4)
    strange = e.model_copy(update={"model": e.model.model_copy(update={"id": "python:mine.py:nothing"})})
    strange.with_arrays(dict(e.arrays), dict(e.sample))
    with pytest.raises(UsageError, match="own code runs only where you name it"):
        tsne([("theirs", strange)])
    assert not Path("mine.py.ran").exists()


def test_from_python_too(own: Path) -> None:
    e = dmlbench.evaluate(MODEL, "python:mine.py:some_digits", "ers-digits", attacks=["mine.py:misrank"], limit=4)
    assert e.measurements[0].attack.startswith("mine.py:misrank#") and len(e.environment.notes) == 2
    again = dmlbench.evaluate(MODEL, "python:mine.py:some_digits", "ers-digits", attacks=["mine.py:misrank"], limit=4)
    assert np.isfinite(again.measurements[0].value) and again.measurements[0].value == e.measurements[0].value


def test_entries_that_cannot_be_read_are_refused_when_they_are_made() -> None:
    from dmlbench.attacks import ATTACKS, Attack
    from dmlbench.datasets import DATASETS
    from dmlbench.metrics import READOUTS, Readout
    from dmlbench.objectives import OBJECTIVES

    with pytest.raises(UsageError, match="unknown unit 'percnt' of a read-out; did you mean 'percent'"):
        Readout(lambda e, scene: e, "percnt")
    for table in (READOUTS, OBJECTIVES, ATTACKS, DATASETS):
        with pytest.raises(TypeError, match="'of-another-type' is of type int; entries are"):
            table.add("of-another-type", 5)
        assert "of-another-type" not in table
    with pytest.raises(UsageError, match="must be a tuple, and ends"):
        Attack("x", "shift", "", ("recall_at_1", "map_at_r"), "a test")

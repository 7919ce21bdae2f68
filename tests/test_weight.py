"""What a bundle and the wheel hold: nothing lost, nothing that is not needed."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import repack
from bundles import sealed
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmlbench.board.table import from_csv
from dmlbench.compact import COLUMNS, narrowed, npz_bytes, stacked, tabulated, unstacked, untabulated, widened
from dmlbench.datasets import DATASETS
from dmlbench.errors import DataError
from dmlbench.results import json_bytes, load
from dmlbench.submission.bundle import LIMITS
from dmlbench.submission.pack import repacked, write_folder
from dmlbench.submission.static import check_static

ROOT = Path(__file__).parents[1]

NUMBERS = st.one_of(
    hnp.arrays(np.int64, st.integers(0, 6), elements=st.integers(-(2**40), 2**40)),
    hnp.arrays(np.int32, st.integers(0, 6), elements=st.integers(-200, 70_000)),
    hnp.arrays(np.float32, st.integers(0, 6), elements=st.floats(width=32)),
    hnp.arrays(np.float32, st.integers(0, 6), elements=st.sampled_from([0.0, 100.0, np.nan, np.inf, -0.5])),
)


@given(NUMBERS)
def test_the_smallest_type_loses_nothing(values: np.ndarray) -> None:
    small = narrowed({"a": values})["a"]
    assert small.dtype.kind == values.dtype.kind or (values.dtype.kind == "i" and small.dtype.kind == "u")
    assert small.nbytes <= values.nbytes
    wide = widened({"a": small})["a"]
    np.testing.assert_array_equal(wide, values)
    assert wide.dtype in (np.int32, np.int64, np.float32) and widened({"a": values})["a"] is values


def test_whole_numbers_and_shares_get_small() -> None:
    arrays = {"label": np.array([0, 255]), "value": np.array([0, 100, np.nan], np.float32), "by": np.array([-1, 3])}
    assert [str(a.dtype) for a in narrowed(arrays).values()] == ["uint8", "float16", "int64"]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_a_record_is_read_as_it_was_written(value: object) -> None:
    assert json.loads(json_bytes(value)) == value


def test_a_list_of_numbers_is_one_line_of_a_record() -> None:
    said = {"curve": [[0.5, 1.0], [2, None]], "names": ["[\n 1, 2 ]"], "none": []}
    assert json_bytes(said).decode().splitlines()[1:5] == [' "curve": [', "  [0.5, 1.0],", "  [2, null]", " ],"]
    assert json.loads(json_bytes(said)) == said


def run_of(labels: np.ndarray, columns: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Outcomes of a run whose queries are rows 3, 5, 7, ... of a data set."""
    return {
        "label": labels,
        "query": 3 + 2 * np.arange(len(labels)),
        **{f"{i}/value": c for i, c in enumerate(columns)},
    }


@given(st.data())
def test_a_table_is_read_as_arrays_by_themselves_are(data: st.DataObject) -> None:
    """The old way of keeping outcomes is what the new one has to agree with, bit for bit and type for type."""
    q = data.draw(st.integers(1, 7))
    shares = hnp.arrays(np.int64, q, elements=st.integers(0, 37)).map(
        lambda k: np.where(k > 30, np.float32(np.nan), k.astype(np.float32) / np.float32(30) * np.float32(100))
    )
    kinds = st.one_of(
        shares,
        hnp.arrays(np.float32, q, elements=st.floats(width=32, allow_nan=False) | st.just(np.float32(np.nan))),
        hnp.arrays(np.float64, q, elements=st.sampled_from([0.0, 100.0, np.nan, 1 / 3, np.inf])),
        hnp.arrays(np.float32, q, elements=st.sampled_from([0.0, -0.0, 100.0, 50.0, np.nan])),
        hnp.arrays(np.int16, q, elements=st.integers(-1, 300)),
        hnp.arrays(np.int64, (q, 2), elements=st.integers(0, 70_000)),
        hnp.arrays(np.float32, 9, elements=st.floats(width=32, allow_nan=False)),
    )
    arrays = run_of(
        data.draw(hnp.arrays(np.int64, q, elements=st.integers(0, 3))), data.draw(st.lists(kinds, max_size=5))
    )
    before, after = widened(narrowed(arrays)), untabulated(tabulated(arrays))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == values.dtype, name
        assert after[name].tobytes() == values.tobytes(), name


def test_ranks_and_yes_or_no_take_one_or_two_bytes() -> None:
    rank = np.arange(1000, dtype=np.float32) / np.float32(2120) * np.float32(100)
    yes = np.where(np.arange(1000) % 3 == 0, np.float32(100), np.float32(np.nan))
    members = tabulated(run_of(np.arange(1000) % 7, [rank, yes, yes]))
    assert {k: (v.dtype, v.shape) for k, v in members.items() if k[6:].startswith("uint")} == {
        "table/uint16": (np.uint16, (1, 1000)),
        "table/uint8": (np.uint8, (2, 1000)),
    }


def test_without_queries_there_is_no_table() -> None:
    assert set(tabulated({"a": np.zeros(3, np.float32)})) == {"a"}


TABLE = tabulated(run_of(np.array([1, 0, 1]), [np.array([0, 100, 50], np.float32), np.array([0.1, 0.2, 0.3])]))


@pytest.mark.parametrize(
    "change",
    [
        {COLUMNS: None},
        {"table/steps": None},
        {"table/uint8": None},
        {"table/uint8": np.zeros((1, 2), np.uint8)},
        {"table/uint8": np.zeros((2, 3), np.uint8)},
        {"table/uint8": np.zeros((1, 3), np.float32)},
        {"table/steps": np.zeros(3, np.float32)},
        {"table/label": np.zeros((3, 1), np.uint8)},
        {"label": np.zeros(3, np.uint8)},
        *(
            {COLUMNS: np.frombuffer(text, np.uint8)}
            for text in (
                b"{}",
                b"[",
                b'[["a"]]',
                b'[["0/value", "table/uint8", 0]]',
                b'[["0/value", "table/uint8", true]]',
                b'[["0/value", "table/uint8", 2], ["0/value", "table/float64", null]]',
                b'[["query", "table/uint8", 2], ["1/value", "table/float64", null]]',
                b'[["a", "table/uint8", 2], ["b", "table/uint8", 2]]',
            )
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change: dict[str, np.ndarray | None]) -> None:
    assert set(untabulated(TABLE)) == {"label", "query", "0/value", "1/value"}
    broken = {name: values for name, values in {**TABLE, **change}.items() if values is not None}
    with pytest.raises(ValueError, match=r"table/|JSON|Expecting"):
        untabulated(broken)


@given(
    hnp.arrays(np.float32, (3, 2, 1, 2, 2), elements=st.sampled_from([0.0, -0.0, 0.1, 1.0, np.float32(1 / 3)])),
    st.integers(1, 3),
)
def test_stacked_images_come_back_bit_for_bit(images: np.ndarray, parts: int) -> None:
    sample = {"rows": np.arange(2), **{f"part {i}@8/255": images[i] for i in range(parts)}}
    again = unstacked(stacked(sample))
    assert set(again) == set(sample)
    for name, values in sample.items():
        assert again[name].dtype == values.dtype and again[name].tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"stack/index": np.full((2, 1, 2, 2, 2), 9, np.uint8)},
        {"stack/index": np.zeros((2, 1, 2, 2, 3), np.uint8)},
        {"stack/index": np.zeros((2, 1, 2, 2, 2), np.int64)},
        {"stack/values": np.zeros((2, 2), np.float32)},
        {"stack/names": np.frombuffer(b'{"a": 1}', np.uint8)},
        {"stack/names": np.frombuffer(b"[", np.uint8)},
    ],
)
def test_a_stack_that_does_not_fit_is_refused(change: dict[str, np.ndarray]) -> None:
    part = np.zeros((2, 1, 2, 2), np.float32)
    with pytest.raises(ValueError, match=r"stack|JSON|Expecting"):
        unstacked({**stacked({"a": part, "b": part + 1}), **change})


def test_a_bundle_of_the_old_way_is_repacked_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-smallcnn-triplet-none-strict"
    folder = tmp_path / "submissions" / name
    shutil.copytree(ROOT / "leaderboard" / "submissions" / name, folder)
    before = load(folder / "run")
    kept = {n: (folder / n).read_bytes() for n in LIMITS if (folder / n).exists()}
    write_folder(sealed({**kept, "run/per_query.npz": npz_bytes(narrowed(before.arrays))}), folder)
    assert check_static(folder, aged=True).evaluation == before
    files = repacked(folder)
    assert files is not None and files["run/evaluation.json"] == kept["run/evaluation.json"]
    write_folder(files, folder)
    assert repacked(folder) is None
    for old, new in ((before.arrays, load(folder / "run").arrays), (before.sample, load(folder / "run").sample)):
        assert old.keys() == new.keys()
        assert all(old[k].dtype == new[k].dtype and old[k].tobytes() == new[k].tobytes() for k in old)
    monkeypatch.setattr("dmlbench.submission.pack.superseded", lambda *_: "superseded")
    stale = repacked(folder)
    assert stale is not None
    (tmp_path / "verifications").mkdir()
    (tmp_path / "verifications" / f"{name}.json").write_text("{}")
    with pytest.raises(DataError, match="manifest"):
        repacked(folder)
    write_folder(stale, folder)
    after = check_static(folder, aged=True).evaluation
    assert after == before and len(after.sample["rows"]) == 1
    assert np.isin(after.sample["rows"], before.sample["rows"]).all() and repacked(folder) is None


def test_a_bundle_of_more_images_than_are_kept_today_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of an 8×8 query are 256 bytes a part."""
    name = "digits-smallcnn-triplet-none-strict"
    folder = tmp_path / "submissions" / name
    shutil.copytree(ROOT / "leaderboard" / "submissions" / name, folder)
    before = load(folder / "run")
    monkeypatch.setattr("dmlbench.submission.kept.LEAST_BYTES", 5 * 256 * len(before.measurements))
    files = repacked(folder)
    assert files is not None
    write_folder(files, folder)
    after = check_static(folder, aged=True).evaluation
    assert after == before and len(after.sample["rows"]) == 5 < len(before.sample["rows"])
    stay = np.isin(before.sample["rows"], after.sample["rows"])
    assert all((before.sample[k][stay] == values).all() for k, values in after.sample.items())


def test_a_board_is_repacked_and_read_back(tmp_path: Path, monkeypatch, capsys) -> None:
    """With images that belong to a whole run, which are not one for each query."""
    name = "digits-smallcnn-triplet-none-poison"
    folder = tmp_path / "submissions" / name
    shutil.copytree(ROOT / "leaderboard" / "submissions" / name, folder)
    kept = {n: (folder / n).read_bytes() for n in LIMITS if (folder / n).exists()}
    written = json.dumps(json.loads(kept["run/evaluation.json"]), indent=2).encode()
    write_folder(sealed({**kept, "run/evaluation.json": written}), folder)
    monkeypatch.setattr("sys.argv", ["repack", "--board", str(tmp_path)])
    repack.main()
    assert f"{name}: " in capsys.readouterr().out
    assert {n: (folder / n).read_bytes() for n in kept} == kept
    repack.main()
    assert f"{name}: " not in capsys.readouterr().out


def test_the_wheel_carries_the_runs_that_compare_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.USUAL) == {d.protocol for d in DATASETS.values()}
    folder = ROOT / "leaderboard" / "submissions"
    names = [p.name for p in folder.iterdir()]
    kept = set(names) - module.left_out(ROOT)(str(folder), names)
    assert "digits-smallcnn-triplet-act-ers-digits" in kept and "digits-smallcnn-triplet-act-strict" not in kept
    assert {f"{r.submission}" for r in from_csv(ROOT / "leaderboard/ers-28/mnist.csv") if r.status != "stale"} == {
        name for name in kept if name.startswith("mnist")
    }
    assert module.left_out(ROOT)(str(folder / "x" / "run"), ["adversarial_sample.npz", "per_query.npz"]) == {
        "adversarial_sample.npz"
    }

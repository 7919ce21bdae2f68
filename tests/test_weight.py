"""What a bundle and the wheel hold: nothing lost, nothing that is not needed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmlbench.datasets import DATASETS
from dmlbench.results import narrowed, stacked, unstacked, widened

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
    assert module.left_out(ROOT)(str(folder / "x" / "run"), ["adversarial_sample.npz", "per_query.npz"]) == {
        "adversarial_sample.npz"
    }

"""What a stranger wrote takes work that is linear in its bytes, or is refused: calls are counted, not seconds."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.compact import unstacked
from dmlbench.errors import DataError
from dmlbench.plain import MOST_NODES, read_json, read_yaml
from dmlbench.results import load
from dmlbench.submission import bundle
from dmlbench.submission.bundle import Refused, manifest_of, read_arrays


def work(read, raw):
    """How many calls, of Python's and of C functions, ``read(raw)`` makes, refused or not."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        read(raw)
    except (ValueError, Refused):
        pass
    finally:
        sys.setprofile(None)
    return count


SHAPES = {
    "keys": lambda n: b"".join(b"k%d: 1\n" % i for i in range(n)),
    "one key": lambda n: b"k: 1\n" * n,
    "list": lambda n: b"[" + b"1," * n + b"1]",
    "nested list": lambda n: b"[" * n,
    "nested mapping": lambda n: b'{"a":' * n,
    "nested blocks": lambda n: b"".join(b" " * i + b"a:\n" for i in range(min(n, 120))),
    "digits": lambda n: b"a: " + b"9" * n,
    "hexadecimal": lambda n: b"a: 0x" + b"f" * n,
    "base 60": lambda n: b"a: 1" + b":59" * n,
    "quotes": lambda n: b'a: "' + b"\\n" * n,
    "anchors": lambda n: b"".join(b"- &a%d x\n" % i for i in range(n)),
    "aliases": lambda n: b"a: &a x\n" + b"b: *a\n" * n,
    "tags": lambda n: b"- !!binary aGk=\n" * n,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("read", [read_yaml, read_json, manifest_of])
def test_work_grows_no_faster_than_the_bytes(read, shape):
    sizes = (100, 200, 400, 800)
    counts = [work(read, SHAPES[shape](n)) for n in sizes]
    assert all(b <= 3 * a + 500 for a, b in pairwise(counts)), counts


def test_thirty_thousand_keys_are_refused():
    with pytest.raises(ValueError, match=f"more than {MOST_NODES} values"):
        read_yaml(SHAPES["keys"](30_000))


@given(st.recursive(st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_json_reads_as_python_reads_it(value):
    assert read_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[1e400]", "[NaN]", "[-Infinity]", "9" * 19, "[" * 100_000, "\ufeff{}"]
)
def test_json_that_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_yaml_holds_what_json_could():
    raw = b"a: [1, -2.5e-05, true, null]\nb: {c: yes, d: 2020-01-01, e: .nan, f: 0x10, g: '7'}\n"
    wanted = {"a": [1, -2.5e-05, True, None], "b": {"c": "yes", "d": "2020-01-01", "e": ".nan", "f": "0x10", "g": "7"}}
    assert read_yaml(raw) == wanted


def test_small_types_are_counted_at_the_widest(monkeypatch):
    from dmlbench.compact import npz_bytes

    raw = npz_bytes({"a": np.zeros(1000, np.uint8)})
    monkeypatch.setattr(bundle, "ARRAYS_MOST", 8000)
    assert read_arrays(raw, "x")["a"].nbytes == 1000
    monkeypatch.setattr(bundle, "ARRAYS_MOST", 7999)
    with pytest.raises(Refused, match="8000 bytes"):
        read_arrays(raw, "x")


def stack(names, **changed):
    index = np.zeros((1, 1, 1, 1, 2), np.uint8)
    found = {"stack/names": names, "stack/values": np.zeros(1, np.float32), "stack/index": index, "rows": np.zeros(1)}
    found |= changed
    found["stack/names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
    return {name: values for name, values in found.items() if values is not None}


@pytest.mark.parametrize(
    "sample",
    [
        stack(["a", 1]),
        stack(["a", "a"]),
        stack(["a", "rows"]),
        stack({"a": 1, "b": 2}),
        stack(["a", "b"], **{"stack/values": None}),
        stack(["a", "b"], **{"stack/index": np.zeros((), np.uint8)}),
        stack(["a", "b"], **{"stack/index": np.zeros((1, 2), np.uint8)}),
    ],
)
def test_a_stack_that_does_not_fit(sample):
    with pytest.raises(ValueError, match="stack/"):
        unstacked(sample)


def test_a_deeply_nested_manifest_of_a_run(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        load(tmp_path)

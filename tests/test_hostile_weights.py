"""Files of torch.save that ask for more work or memory than their bytes are worth; calls are counted, not seconds."""

import io
import sys
import zipfile
from itertools import pairwise

import pytest
import torch

from dmlbench.errors import DataError
from dmlbench.models import pickles
from dmlbench.models.pickles import torch_content


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def work(path) -> int:
    """How many calls, of Python's and of C functions, reading the file takes, refused or not."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        torch_content(path)
    except DataError:
        pass
    finally:
        sys.setprofile(None)
    return count


SHAPES = {
    "marks": lambda n: zipped(b"\x80\x02" + b"(" * n + b"."),
    "marks before torch 1.6": lambda n: b"\x80\x02" + b"(" * n + b".",
    "tuples": lambda n: zipped(b"\x80\x02N" + b"\x85" * n + b"."),
    "lists": lambda n: zipped(b"\x80\x02" + b"]" * n + b"."),
    "types": lambda n: zipped(b"\x80\x02" + b"".join(b"cother.part\nT%d\n" % i for i in range(n)) + b"."),
    "empty tensors": lambda n: saved({f"t{i}": torch.zeros(0) for i in range(n)}),
    "one tensor by many names": lambda n: saved(dict.fromkeys(map(str, range(n)), torch.zeros(1))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_work_grows_no_faster_than_the_bytes(shape, tmp_path):
    path, counts = tmp_path / "x.pth", []
    for n in (100, 200, 400, 800):
        path.write_bytes(SHAPES[shape](n))
        counts.append(work(path))
    assert all(b <= 3 * a + 2000 for a, b in pairwise(counts)), counts


@pytest.mark.parametrize(
    "content,said",
    [
        (lambda: zipped(b"\x80\x02" + b"(" * 3_000_000 + b"."), "nested more than"),
        (lambda: b"\x80\x02" + b"(" * 3_000_000 + b".", "nested more than"),
        (lambda: saved({"a": torch.zeros(1).expand(25 * 10**12)}), "tensors of more than"),
        (lambda: saved([[torch.zeros(1).expand(10**6)]] * 20 + [torch.zeros(1).expand(10**8)]), "tensors of more than"),
        (lambda: zipped(b"\x80\x02" + b"N0" * 100_000 + b".", zipfile.ZIP_DEFLATED), "unpacks to more"),
    ],
)
def test_what_its_bytes_are_not_worth_is_refused_in_one_line(content, said, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content())
    with pytest.raises(DataError, match=rf"x\.pth holds .*{said}") as stop:
        torch_content(path)
    assert "\n" not in str(stop.value) and stop.value.exit_code == 4


def test_many_values_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(saved({f"t{i}": torch.zeros(0) for i in range(100)}))
    assert len(torch_content(path)[0]) == 100
    monkeypatch.setattr(pickles, "_MOST_STEPS", 1000)
    with pytest.raises(DataError, match="more than 1,000 values"):
        torch_content(path)


def test_shared_and_broadcast_tensors_of_real_checkpoints_are_read(tmp_path):
    path, tied = tmp_path / "x.pth", torch.ones(8, 4)
    state = {"a": tied, "b": tied, "mask": torch.zeros(1).expand(64, 64), "nested": [{"ema": tied}]}
    torch.save(state, path)
    assert torch.equal(torch_content(path)[0]["b"], tied)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(torch_content(path)[0]["b"], tied)

"""The cache of decoded images: made once, made again when content changes, safe under two processes."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import class_tree, picture

from dmlbench.datasets import CachedImages, decode, load_dataset
from dmlbench.datasets.pictures import BLOCK, Files, each
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

SMALL = Preprocess(size=(14, 14), resize=(16, 16))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(root: Path, preprocess: Preprocess = SMALL) -> CachedImages:
    found = load_dataset(f"folder:{root}", preprocess=preprocess).images
    assert isinstance(found, CachedImages)
    return found


def test_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = class_tree(tmp_path / "mine")
    calls: list[int] = []
    plain = Files.picture
    monkeypatch.setattr(Files, "picture", lambda self, row: calls.append(row) or plain(self, row))
    heard: list[tuple[int, int]] = []
    first = images(tree)
    first.decode(lambda done, total: heard.append((done, total)))
    assert sorted(calls) == list(range(12)) and heard == [(i, 12) for i in range(1, 13)]
    again = images(tree)
    torch.testing.assert_close(first[np.arange(12)], again[np.arange(12)], rtol=0, atol=0)
    assert len(calls) == 12 and again.path == first.path
    assert isinstance(again._pixels, np.memmap)


@pytest.mark.parametrize("taken", ["images", "digests"])
def test_a_cache_that_cannot_be_written_is_one_line(taken: str, tmp_path: Path, cache: Path) -> None:
    found = images(class_tree(tmp_path / "mine"))
    found.decode()
    again = images(tmp_path / "mine")
    for file in (cache / taken).iterdir():  # a folder where a file should be: nobody can write it, root neither
        file.unlink()
        file.mkdir()
    with pytest.raises(DataError, match="DMLBENCH_CACHE names another"):
        again.decode()


def test_keyed_by_content_and_preprocessing(tmp_path: Path, cache: Path) -> None:
    tree = class_tree(tmp_path / "mine")
    before = images(tree)
    assert images(tree, Preprocess(size=(14, 14))).path != before.path
    assert images(tree, Preprocess(size=(14, 14), resize=(16, 16), interpolation="bicubic")).path != before.path
    os.utime(tree / "class0" / "000.png", (1, 1))
    assert images(tree).path == before.path  # another time, the same content
    (tmp_path / "copy").mkdir()
    tree.rename(tmp_path / "copy" / "mine")
    assert images(tmp_path / "copy" / "mine").path == before.path
    changed = tmp_path / "copy" / "mine" / "class0" / "000.png"
    stamp = changed.stat()
    picture(changed, seed=77)
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = images(tmp_path / "copy" / "mine")
    assert after.path != before.path and after.content() != before.content()


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    tree = class_tree(tmp_path / "mine")
    expected = images(tree)[np.arange(12)].clone()
    path = images(tree).path
    path.write_bytes(path.read_bytes()[:-100])
    torch.testing.assert_close(images(tree)[np.arange(12)], expected)
    path.with_name(f".{path.name}.999999.part").write_bytes(b"left by a killed process")
    path.unlink()
    torch.testing.assert_close(images(tree)[np.arange(12)], expected)
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".part")] == []


def test_pictures_that_change_while_they_are_decoded_are_kept_under_no_hash(tmp_path: Path, cache: Path) -> None:
    tree = class_tree(tmp_path / "mine", classes=2, each=BLOCK)
    last = sorted(tree.rglob("*.png"))[-1]
    whole, row = last.read_bytes(), np.array([2 * BLOCK - 1])

    def meanwhile(done: int, total: int) -> None:
        if done == 1:
            picture(last, seed=99)

    with pytest.raises(DataError, match="changed"):
        images(tree).decode(meanwhile)
    other = images(tree)[row].clone()
    last.write_bytes(whole)
    expected = torch.from_numpy(SMALL(Image.open(last))[None]).float() / 255.0
    torch.testing.assert_close(images(tree)[row], expected, rtol=0, atol=0)
    assert not torch.equal(other, expected)


def _decode(root: str, cache: str, ready, out) -> None:  # type: ignore[no-untyped-def]
    os.environ["DMLBENCH_CACHE"] = cache
    plain, count = Files.picture, []
    Files.picture = lambda self, row: count.append(row) or plain(self, row)  # type: ignore[method-assign]
    found = load_dataset(f"folder:{root}", preprocess=SMALL)
    ready.wait()
    decode(found)
    out.put((len(count), float(found.images[np.arange(len(found))].sum())))


@pytest.mark.slow
def test_two_processes_decode_once_between_them(tmp_path: Path, cache: Path) -> None:
    tree = class_tree(tmp_path / "mine", classes=5, each=20)
    spawn = multiprocessing.get_context("spawn")
    ready, out = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=_decode, args=(str(tree), str(cache), ready, out)) for _ in range(2)]
    for process in both:
        process.start()
    got = [out.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert sorted(count for count, _ in got) == [0, 100]
    assert got[0][1] == got[1][1] == float(images(tree)[np.arange(100)].sum())


def test_grey_cmyk_and_turned_pictures(tmp_path: Path, cache: Path) -> None:
    for mode in ("L", "CMYK", "RGB"):
        picture(tmp_path / "mine" / "a" / f"{mode}.jpg", seed=3, mode=mode)
    with Image.open(tmp_path / "mine" / "a" / "RGB.jpg") as upright:
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # "turn me clockwise"
        (tmp_path / "mine" / "b").mkdir()
        turned.save(tmp_path / "mine" / "b" / "turned.png", exif=exif)
        upright.save(tmp_path / "mine" / "b" / "upright.png")
    a = images(tmp_path / "mine")[np.arange(5)]  # a/CMYK, a/L, a/RGB, b/turned, b/upright
    torch.testing.assert_close(a[3], a[4], rtol=0, atol=0)
    assert (a[1] == a[1][:1]).all()
    assert float((a[0] - a[2]).abs().max()) < 0.1
    as_stored = CachedImages(Files(tmp_path / "mine", ["b/turned.png", "b/upright.png"]), SMALL)[np.arange(2)]
    assert not torch.equal(as_stored[0], as_stored[1])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_broken_picture_is_named(kind: str, tmp_path: Path, cache: Path) -> None:
    tree = class_tree(tmp_path / "mine", suffix=".jpg")
    broken = tree / "class1" / "002.jpg"
    content = broken.read_bytes()
    broken.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[kind])
    with pytest.raises(DataError, match=r"class1/002.jpg: .*datasets verify"):
        decode(load_dataset(f"folder:{tree}", preprocess=SMALL))
    assert not list((cache / "images").glob("*.npy"))


def test_threads_do_not_run_ahead_of_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    got = each(lambda row: begun.append(row) or row, 10 * BLOCK)
    assert [next(got) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(begun) <= BLOCK
    assert list(got) == list(range(5, 10 * BLOCK)) and sorted(begun) == list(range(10 * BLOCK))


def test_no_room_is_said_before_work_begins(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = class_tree(tmp_path / "mine")
    found = images(tree)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(DataError, match=r"DMLBENCH_CACHE names another folder"):
        found.decode()

"""Every data set in its real layout, whole and broken."""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from trees import (
    cars_tree,
    class_tree,
    cub_from_lists,
    cub_tree,
    grocery_tree,
    idx_file,
    inshop_tree,
    lfw_tree,
    picture,
    reid_tree,
    sop_tree,
    zipped,
)

from dmlbench.datasets import DATASETS, RetrievalDataset, load_dataset
from dmlbench.datasets.base import Counts, TensorImages, counts_of, data_roots
from dmlbench.datasets.remarks import remarks
from dmlbench.datasets.verify import verify
from dmlbench.errors import DataError, UsageError
from dmlbench.preprocess import Preprocess

SMALL = Preprocess(size=(14, 14), resize=(16, 16))


@pytest.fixture(scope="session")
def real() -> Path:
    """The shared real data, found before a test points DMLBENCH_DATA elsewhere."""
    return shared()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root, and a cache of the test's own."""
    monkeypatch.setenv("DMLBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def unchecked(name: str, split: str) -> RetrievalDataset:
    """The data set as its files are, whatever their number."""
    return DATASETS[name].load(split, SMALL)


def by_hand(path: Path) -> torch.Tensor:
    with Image.open(path) as stored:
        pixels = np.asarray(stored.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))[1:15, 1:15]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def test_cub(root: Path) -> None:
    base = cub_tree(root, {1: 2, 100: 1, 101: 3, 200: 2})
    test = unchecked("cub", "test")
    assert test.labels.tolist() == [0, 0, 0, 99, 99] and test.class_names[99] == "200.Bird_200"
    assert unchecked("cub", "train").labels.tolist() == [0, 0, 99]
    torch.testing.assert_close(test.images[np.array([3])][0], by_hand(base / "images/200.Bird_200/Bird_200_0000.jpg"))
    with pytest.raises(DataError, match=r"found 5 images of 2 classes where 5,924 images of 100 classes are expected"):
        load_dataset("cub")


def test_cub_of_the_real_lists(real: Path, root: Path) -> None:
    base = cub_from_lists(root, real / "CUB_200_2011")
    train, test = load_dataset("cub", "train", SMALL), load_dataset("cub", "test", SMALL)
    assert counts_of(train) == Counts(5864, 100) and counts_of(test) == Counts(5924, 100)
    assert test.class_names[0].startswith("101.") and test.class_names[-1] == "200.Common_Yellowthroat"
    next((base / "images" / "101.White_Pelican").iterdir()).unlink()
    with pytest.raises(DataError, match=r"1 of 5,924 image files are missing .* 101.White_Pelican/"):
        load_dataset("cub")


def test_cub_lists_that_are_broken(root: Path) -> None:
    base = cub_tree(root, {1: 1, 150: 1})
    lists = {name: (base / name).read_text() for name in ("images.txt", "image_class_labels.txt")}
    for name, content, said in (
        ("images.txt", None, "images.txt cannot be read"),
        ("images.txt", "1\n", "line 1: 2 values expected, found 1"),
        ("image_class_labels.txt", "1 1\n", "has no class for image 2"),
        ("image_class_labels.txt", "1 one\n", "'one' is not a whole number"),
        ("images.txt", "", "names no image of the test split"),
    ):
        (base / name).unlink()
        if content is not None:
            (base / name).write_text(content)
        with pytest.raises(DataError, match=said):
            unchecked("cub", "test")
        (base / name).write_text(lists[name])


def test_cars(root: Path) -> None:
    base = cars_tree(root, [1, 98, 99, 196])
    train, test = unchecked("cars", "train"), unchecked("cars", "test")
    assert train.labels.tolist() == [0, 0, 97, 97] and test.labels.tolist() == [0, 0, 97, 97]
    assert (test.class_names[0], test.class_names[97]) == ("Car 99", "Car 196")
    torch.testing.assert_close(test.images[np.array([2])][0], by_hand(base / "car_ims/001960.jpg"))
    with pytest.raises(DataError, match="where 8,131 images of 98 classes are expected"):
        load_dataset("cars")
    (base / "cars_annos.mat").write_bytes(b"not a mat file")
    with pytest.raises(DataError, match="not the combined annotations"):
        unchecked("cars", "test")


def test_sop(root: Path) -> None:
    base = sop_tree(root)
    test = unchecked("sop", "test")
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2] and test.class_names == ["4", "5", "6"]
    torch.testing.assert_close(test.images[np.array([1])][0], by_hand(base / "chair_final/8_1.JPG"))
    with pytest.raises(DataError, match="60,502 images of 11,316 classes"):
        load_dataset("sop")
    (base / "Ebay_test.txt").unlink()
    with pytest.raises(DataError, match=r"Ebay_test.txt cannot be read: No such file"):
        unchecked("sop", "test")


def test_inshop_has_queries_and_gallery_apart(root: Path) -> None:
    base = inshop_tree(root)
    test = unchecked("inshop", "test")
    assert test.query.tolist() == [0, 1, 2, 3] and test.gallery.tolist() == [4, 5]
    assert test.labels.tolist() == [0, 0, 1, 1, 0, 1] and test.class_names == ["id_00000002", "id_00000007"]
    assert (test.position_in_gallery == -1).all()
    train = unchecked("inshop", "train")
    assert len(train) == len(train.query) == len(train.gallery) == 3
    with pytest.raises(DataError, match="26,830 images of 3,985 classes, 14,218 of them queries"):
        load_dataset("inshop")
    listing = base / "Eval" / "list_eval_partition.txt"
    listing.write_text(listing.read_text().replace(" gallery", " galery"))
    with pytest.raises(DataError, match="'galery' is not train, query or gallery"):
        unchecked("inshop", "test")


@pytest.mark.parametrize("packed", [False, True])
def test_grocery_by_class_whatever_its_own_split_says(packed: bool, root: Path, tmp_path: Path) -> None:
    tree = grocery_tree(tmp_path)
    if packed:
        zipped(tree, root / "grocery-224.zip")
    else:
        tree.rename(root / "grocery")
    train, test = unchecked("grocery", "train"), unchecked("grocery", "test")
    assert train.labels.tolist() == [0] * 3 + [30] * 3 + [0] * 2 + [30] * 2 + [0] * 2 + [30] * 2
    assert len(train.query) == len(train.gallery) == 14 and train.class_names[30] == "Kind-30"
    assert set(test.labels) == {0, 49} and test.class_names[49] == "Kind-80" and counts_of(test) == Counts(14, 2, 10)
    source = test.images.source  # type: ignore[attr-defined]
    for c in (0, 49):  # the five of the smallest hash, written out
        paths = [p.removeprefix("dataset/") for p, label in zip(source.paths, test.labels, strict=True) if label == c]
        five = sorted(paths, key=lambda p: hashlib.sha256(p.encode()).hexdigest())[:5]
        asked = {source.paths[row].removeprefix("dataset/") for row in test.query if test.labels[row] == c}
        assert asked == set(five)
    row = int(test.gallery[0])
    loose = (tmp_path if packed else root) / "grocery" / source.paths[row]
    torch.testing.assert_close(test.images[np.array([row])][0], by_hand(loose))
    with pytest.raises(DataError, match=r"found 14 images of 2 classes, 10 of them queries where 2,888 images of 50"):
        load_dataset("grocery")


def test_an_archive_and_its_folder_are_the_same_data_set(root: Path, tmp_path: Path) -> None:
    archive = zipped(grocery_tree(tmp_path), root / "grocery-224.zip")
    packed = unchecked("grocery", "test").sha256
    archive.unlink()
    (tmp_path / "grocery").rename(root / "grocery")
    assert unchecked("grocery", "test").sha256 == packed


def test_archives_and_lists_that_are_broken(root: Path, tmp_path: Path) -> None:
    archive = root / "grocery-224.zip"
    archive.write_bytes(b"PK\3\4 cut off")
    with pytest.raises(DataError, match=r"grocery-224\.zip cannot be read"):
        unchecked("grocery", "test")
    archive.unlink()
    tree = grocery_tree(root)
    (tree / "dataset" / "val.txt").write_text("val/a.jpg, many, 0\n")
    with pytest.raises(DataError, match=r"val\.txt: line 1: the class 'many' is not a whole number"):
        unchecked("grocery", "test")
    (tree / "dataset" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        unchecked("grocery", "test")


def test_a_picture_that_is_broken_inside_an_archive_is_named(root: Path, tmp_path: Path) -> None:
    tree = grocery_tree(tmp_path)
    broken = next((tree / "dataset" / "val" / "Fruit" / "Kind-31").glob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:200])
    zipped(tree, root / "grocery-224.zip")
    lines = verify("grocery")[1].broken
    assert len(lines) == 1 and f"{broken.name}:" in lines[0]


@pytest.mark.parametrize("packed", [False, True])
def test_lfw_takes_people_of_four_and_six_of_each(packed: bool, root: Path, tmp_path: Path) -> None:
    tree = lfw_tree(tmp_path / "lfw", {"Ann_Lee": 4, "Bob": 3, "Cem": 9})
    if packed:
        zipped(tmp_path / "lfw", root / "lfw-4plus.zip")
    else:
        tree.rename(root / "lfw-deepfunneled")
    found = unchecked("lfw", "test")
    assert found.class_names == ["Ann_Lee", "Cem"] and found.labels.tolist() == [0] * 4 + [1] * 6
    assert found.query.tolist() == [0, 4] and found.gallery.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert [Path(p).name for p in found.images.source.paths[4:]] == [f"Cem_{i:04d}.jpg" for i in range(1, 7)]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="has no training split"):
        load_dataset("lfw", "train")


@pytest.mark.parametrize(("name", "archive"), [("grocery", "grocery-224.zip"), ("lfw", "lfw-4plus.zip")])
def test_the_real_archives_are_whole(name: str, archive: str, data: Path) -> None:
    shared(archive)
    found = load_dataset(name)
    rows = np.array([0, len(found) // 2])
    assert counts_of(found) == DATASETS[name].counts["test"]
    assert not set(found.query) & set(found.gallery) and len(found.images.source.digests()) == len(found)  # type: ignore[attr-defined]
    assert {len(found.images.source.picture(int(r)).getbands()) for r in rows} == {3}  # type: ignore[attr-defined]


def test_mnist_is_torchvisions(data: Path) -> None:
    from torchvision.datasets import MNIST

    ours, theirs = load_dataset("mnist"), MNIST(str(data), train=False)
    assert (ours.labels == theirs.targets.numpy()).all()
    torch.testing.assert_close(ours.images[np.arange(50)][:, 0], theirs.data[:50].float() / 255)


def test_idx_files_packed_and_broken(root: Path) -> None:
    folder = root / "FashionMNIST" / "raw"
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    path = idx_file(folder / "t10k-images-idx3-ubyte", images)
    idx_file(folder / "t10k-labels-idx1-ubyte", np.arange(12) % 10)
    with gzip.open(f"{path}.gz", "wb") as packed:
        packed.write(path.read_bytes())
    content = path.read_bytes()
    path.unlink()
    got = unchecked("fashion-mnist", "test")
    assert len(got) == 12 and got.class_names[9] == "boot"
    torch.testing.assert_close(got.images[np.arange(12)][:, 0], torch.from_numpy(images).float() / 255)
    with pytest.raises(DataError, match="found 12 images of 10 classes where 10,000"):
        load_dataset("fashion-mnist")
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="not a whole IDX file"):
        unchecked("fashion-mnist", "test")
    path.unlink()
    Path(f"{path}.gz").write_bytes(Path(f"{path}.gz").read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read"):
        unchecked("fashion-mnist", "test")


def test_omniglot_full_reads_both_archives(real: Path, root: Path) -> None:
    source = real / "omniglot" / "images_background_small1.zip"
    (root / "omniglot").mkdir()
    (root / "omniglot" / "images_evaluation.zip").write_bytes(source.read_bytes())
    got = unchecked("omniglot", "test")
    assert (len(got), len(got.class_names)) == (136 * 20, 136) and got.class_names[0] == "Balinese/character01"
    with pytest.raises(DataError, match="where 13,180 images of 659 classes"):
        load_dataset("omniglot")
    with pytest.raises(DataError, match=r"images_background\.zip"):
        unchecked("omniglot", "train")


@pytest.mark.parametrize("spoilt", [40, 90])
def test_an_omniglot_archive_that_is_broken_inside(spoilt: int, root: Path) -> None:
    """One byte of a compressed drawing is another: zlib says so in an error of its own kind."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (105, 105), np.uint8) * 255).save(buffer, "PNG")
    folder = root / "omniglot"
    folder.mkdir()
    file = folder / "images_background_small2.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("a/Sanskrit/character01/1.png", buffer.getvalue() * 3)
    content = bytearray(file.read_bytes())
    content[spoilt + 28] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"small2.zip cannot be read"):
        unchecked("omniglot-small", "test")


def test_omniglot_small_is_whole(data: Path) -> None:
    assert counts_of(load_dataset("omniglot-small", "train")) == Counts(2720, 136)
    assert counts_of(load_dataset("omniglot-small", "test")) == Counts(2120, 106)


def test_cifar_binary_and_pickles_agree(root: Path) -> None:
    rng = np.random.default_rng(3)
    pixels, labels, coarse = rng.integers(0, 256, (6, 3072)), np.array([3, 1, 4, 1, 5, 9]), np.zeros(6, int)
    binary, pickled = root / "cifar-100-binary", root / "cifar-100-python"
    binary.mkdir()
    records = np.column_stack([coarse, labels, pixels]).astype(np.uint8)
    (binary / "test.bin").write_bytes(records.tobytes())
    (binary / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    one = unchecked("cifar100", "test")
    assert one.labels.tolist() == labels.tolist() and list(one.class_names) == ["apple", "aquarium_fish"]
    (binary / "test.bin").write_bytes(records.tobytes()[:-5])
    with pytest.raises(DataError, match="truncated"):
        unchecked("cifar100", "test")
    binary.rename(root / "elsewhere")
    pickled.mkdir()
    batch = {b"data": pixels.astype(np.uint8), b"fine_labels": labels.tolist(), b"filenames": [b"a.png"]}
    (pickled / "test").write_bytes(pickle.dumps(batch, protocol=2))
    two = unchecked("cifar100", "test")
    assert two.sha256 == one.sha256
    assert (one.images[np.array([2])][0].numpy() * 255 == pixels[2].reshape(3, 32, 32)).all()


class _Harmful:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.mkdir, ("harm-was-done",))


def test_cifar_pickles_run_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "cifar-10-batches-py").mkdir()
    for content in (pickle.dumps({b"data": _Harmful()}), b"not a pickle", pickle.dumps([1])):
        (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="not a CIFAR batch"):
            unchecked("cifar10", "test")
    assert not (root / "harm-was-done").exists()


def test_a_folder_of_class_folders(tmp_path: Path, root: Path) -> None:
    tree = class_tree(tmp_path / "mine", classes=3, each=2)
    picture(tree / "class1" / "deeper" / "x.JPG", seed=9)
    (tree / "class1" / "notes.txt").write_text("not a picture")
    (tree / ".hidden").mkdir()
    got = load_dataset(f"folder:{tree}", preprocess=SMALL)
    assert got.labels.tolist() == [0, 0, 1, 1, 1, 2, 2] and got.class_names == ["class0", "class1", "class2"]
    torch.testing.assert_close(got.images[np.array([0])][0], by_hand(tree / "class0" / "000.png"))
    with pytest.raises(UsageError, match="no folder 'train'"):
        load_dataset(f"folder:{tree}", "train")
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset(f"folder:{tree}/nowhere")
    with pytest.raises(DataError, match="no pictures in class folders"):
        load_dataset(f"folder:{tree / 'class0'}")


def test_a_folder_with_splits(tmp_path: Path, root: Path) -> None:
    tree = class_tree(tmp_path / "mine", parts=("train", "val"))
    assert (
        len(load_dataset(f"folder:{tree}", "train", SMALL)) == len(load_dataset(f"folder:{tree}", "test", SMALL)) == 12
    )
    apart = class_tree(tmp_path / "apart", parts=("query", "gallery"), each=2)
    got = load_dataset(f"folder:{apart}", preprocess=SMALL)
    assert (len(got), len(got.query), len(got.gallery)) == (12, 6, 6)
    assert not set(got.query) & set(got.gallery)
    with pytest.raises(UsageError, match="nothing for the train split"):
        load_dataset(f"folder:{apart}", "train")


def test_names_that_are_not_utf8(tmp_path: Path, root: Path) -> None:
    tree = class_tree(tmp_path / "mine", classes=2, each=2)
    odd = picture(tmp_path / "plain.png").rename(os.fsdecode(bytes(tree) + b"/class1/caf\xe9.png"))
    got = load_dataset(f"folder:{tree}", preprocess=SMALL)
    assert got.images[np.arange(5)].shape == (5, 3, 14, 14)
    odd.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"caf\\xe9.png: not an image"):
        load_dataset(f"folder:{tree}", preprocess=SMALL).images[np.arange(5)]


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_whose_labels_are_not_utf_8(tmp_path: Path, root: Path) -> None:
    """Class names can be written into a report."""
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    lines = "label,path,split,is_query,is_gallery\nM\xfcll,a.png,validation,1,1\nB,a.png,validation,1,1\n"
    (tmp_path / "df.csv").write_bytes(lines.encode("latin-1"))
    names = load_dataset(f"csv:{tmp_path / 'df.csv'}", preprocess=SMALL).class_names
    assert [name.encode() for name in names] == [b"B", b"M\\xfcll"]


def test_a_csv_with_boxes(tmp_path: Path, root: Path) -> None:
    for i in range(5):
        picture(tmp_path / "images" / f"{i}.png", seed=i)
    file = csv(
        tmp_path / "df.csv",
        "label,path,split,is_query,is_gallery,x_1,x_2,y_1,y_2",
        "10,images/0.png,train,,,,,,",
        "30,images/1.png,validation,True,False,5,25,2,22",
        "30,images/2.png,validation,False,True,,,,",
        "70,images/3.png,validation,True,True,,,,",
        "70,images/4.png,validation,True,True,,,,",
    )
    got = load_dataset(f"csv:{file}", preprocess=SMALL)
    assert got.labels.tolist() == [0, 0, 1, 1] and got.class_names == ["30", "70"]
    assert got.query.tolist() == [0, 2, 3] and got.gallery.tolist() == [1, 2, 3]
    with Image.open(tmp_path / "images" / "1.png") as whole:
        whole.crop((5, 2, 25, 22)).save(tmp_path / "part.png")
    torch.testing.assert_close(got.images[np.array([0])][0], by_hand(tmp_path / "part.png"))
    assert len(load_dataset(f"csv:{file}", "train", SMALL)) == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["label,path,split", "1,0.png,test"], "no column is_query, is_gallery"),
        (["label,path,split,is_query,is_gallery", "1,0.png,dev,1,1"], "line 2: split 'dev'"),
        (["label,path,split,is_query,is_gallery", "1,,test,1,1"], "line 2: path is empty"),
        (["label,path,split,is_query,is_gallery", "1,0.png,test,maybe,1"], "line 2: is_query 'maybe'"),
        (["label,path,split,is_query,is_gallery", "1,0.png,test,1,0"], "marks no gallery row"),
        (["label,path,split,is_query,is_gallery", "1,9.png,test,1,1"], "1 of 1 image files are missing"),
        (["label,path,split,is_query,is_gallery,x_1", "1,0.png,test,1,1,3"], "not all of x_1"),
        (
            ["label,path,split,is_query,is_gallery,x_1,x_2,y_1,y_2", "1,0.png,test,1,1,a,2,1,2"],
            "x_1 'a' is not a number",
        ),
        (["label,path,split,is_query,is_gallery,x_1,x_2,y_1,y_2", "1,0.png,test,1,1,0,99,0,9"], r"box \(0, 0, 99, 9\)"),
        (
            ["label,path,split,is_query,is_gallery,x_1,x_2,y_1,y_2", "1,0.png,test,1,1,,9,0,9"],
            "line 2: a box needs all",
        ),
        (["label,path,split,is_query,is_gallery", "1,0.png,test,1,1,"], "names 5 columns, and a row has more cells"),
        (["label,path,split,is_query,is_gallery", "", ",,,,", "1,0.png,dev,1,1"], "line 4: split 'dev'"),
    ],
)
def test_a_csv_that_is_wrong(lines: list[str], said: str, tmp_path: Path, root: Path) -> None:
    picture(tmp_path / "0.png")
    file = csv(tmp_path / "df.csv", *lines)
    with pytest.raises(DataError, match=said):
        load_dataset(f"csv:{file}", preprocess=SMALL).images[np.array([0])]


def test_pictures_in_memory_fit_a_larger_network(data: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_dataset("digits", preprocess=Preprocess.standard((3, 16, 16)))
    assert digits.images.shape == (3, 16, 16)
    plain = load_dataset("digits")
    assert plain.images.shape == (1, 8, 8) and len(plain) == len(digits)
    grey = (plain.images[np.array([5])][0, 0] * 255).round().to(torch.uint8).numpy()
    expected = np.asarray(Image.fromarray(grey).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    assert ((digits.images[np.array([5])][0] * 255).round().permute(1, 2, 0).numpy() == expected).all()


def test_where_data_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DMLBENCH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_roots() == [tmp_path / "dmlbench" / "data", Path("../shared/data")]
    monkeypatch.setenv("DMLBENCH_DATA", "/a/b")
    assert data_roots() == [Path("/a/b")]


HALVES = [0.5] * 4 + [0.7] * 4


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (HALVES, "whole numbers, not 0.5"),
        (torch.tensor(HALVES), "whole numbers, not 0.5"),
        ([0.0] * 7 + [float("nan")], "not nan"),
        ([0.0] * 7 + [1e300], "not 1e+300"),
        (np.full(8, 2**63, np.uint64), "not 9223372036854775808"),
        ([2**70] * 8, f"not {2**70}"),
        ([None] * 8, "not None"),
        ([1j] * 8, "not 1j"),
        (["cat"] * 7 + [float("nan")], "all strings or all whole numbers, not nan too"),
        ([[0, 1], [2]], "are no array"),
        ([0, 1], "8 images but labels of shape (2,)"),
        ([["cat"]] * 8, "must be whole numbers, not 'cat'"),
    ],
)
def test_labels_are_never_cut(labels: object, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)) as refused:
        RetrievalDataset("m", "test", TensorImages(torch.zeros(8, 1, 2, 2)), labels)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([3.0, 3.0, -1.0], [3, 3, -1], []),
        (torch.tensor([2, 0, 2]), [2, 0, 2], []),
        (np.array([7, 1, 7], np.uint8), [7, 1, 7], []),
        (np.array([7, 1, 7], object), [7, 1, 7], []),
        ([True, False, True], [1, 0, 1], []),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        (np.array(["b", "b", "a"]), [1, 1, 0], ["a", "b"]),
    ],
)
def test_labels_of_every_kind(labels: object, numbers: list[int], names: list[str]) -> None:
    made = RetrievalDataset("m", "test", TensorImages(torch.zeros(3, 1, 2, 2)), labels)
    assert made.labels.dtype == np.int64 and made.labels.tolist() == numbers and list(made.class_names) == names
    again = dataclasses.replace(made, query=[0], gallery=torch.tensor([1, 2]))
    assert again.labels.tolist() == numbers and list(again.class_names) == names and again.query.tolist() == [0]


def test_rows_are_never_cut_and_names_never_wrong() -> None:
    images = TensorImages(torch.zeros(3, 1, 2, 2))
    with pytest.raises(DataError, match=r"query rows must be whole numbers, not 1\.5"):
        RetrievalDataset("m", "test", images, [0, 0, 1], query=[0.0, 1.5])
    with pytest.raises(DataError, match="gallery must be row numbers"):
        RetrievalDataset("m", "test", images, [0, 0, 1], gallery=[False, True, False])
    with pytest.raises(DataError, match="are the class names"):
        RetrievalDataset("m", "test", images, ["a", "a", "b"], class_names=("x", "y"))


def test_unknown_names() -> None:
    for name, said in (("cbu", "did you mean 'cub'"), ("foldr:/x", "did you mean 'folder'"), ("csv:", "needs a path")):
        with pytest.raises(UsageError, match=said):
            load_dataset(name)
    with pytest.raises(UsageError, match="must be 'train' or 'test'"):
        load_dataset("digits", "val")


MARKET = ("bounding_box_train", "query", "bounding_box_test")
REID = {
    "train": ["0001_c1s1_000000_00.jpg", "0001_c2s1_000000_00.jpg", "0007_c1s1_000000_00.jpg"],
    "query": ["0002_c1s1_000000_00.jpg", "0005_c3s1_000000_00.jpg"],
    "gallery": [
        "-1_c1s1_000000_00.jpg", "0000_c1s1_000000_00.jpg", "0000_c2s1_000001_00.jpg", "0002_c1s1_000005_00.jpg",
        "0002_c2s1_000006_00.jpg", "0005_c1s1_000007_00.jpg", "0005_c3s1_000008_00.jpg",
    ],
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_market_reads_people_and_cameras_from_names(packed: bool, root: Path, tmp_path: Path) -> None:
    base = reid_tree(tmp_path / "m" / "Market-1501-v15.09.15", MARKET, REID)
    if packed:
        zipped(tmp_path / "m", root / "Market-1501-v15.09.15.zip")
    else:
        base.rename(root / "Market-1501-v15.09.15")
    test, train = unchecked("market1501", "test"), unchecked("market1501", "train")
    files = [Path(p).name for p in test.images.source.paths]  # type: ignore[attr-defined]
    assert files == sorted(REID["query"]) + sorted(REID["gallery"])[1:], "junk is gone"
    assert test.labels.tolist() == [0, 1, -2, -2, 0, 0, 1, 1] and test.class_names == ["2", "5"]
    assert counts_of(test) == Counts(8, 2, 2) and train.labels.tolist() == [0, 0, 1]
    assert test.apart is not None
    for row in test.query:
        person, camera = files[row][:4], files[row][5:7]
        apart = {files[j] for j in test.gallery if (test.apart[row] == test.apart[j])[test.apart[row] >= 0].any()}
        assert apart == {f for f in REID["gallery"] if f.startswith(person) and f[5:7] == camera}
    with pytest.raises(DataError, match="19,281 images of 750 classes, 3,368 of them queries are expected"):
        load_dataset("market1501")


def test_the_other_sets_of_cameras(root: Path) -> None:
    duke = {part: [name.replace("0000_", "0003_") for name in names if name[0] != "-"] for part, names in REID.items()}
    reid_tree(root / "DukeMTMC-reID", MARKET, duke)
    test = unchecked("dukemtmc", "test")
    assert counts_of(test) == Counts(8, 3, 2) and test.labels.min() == 0
    vehicles = {part: [name.replace("_c", "_c00") for name in names] for part, names in duke.items()}
    reid_tree(root / "VeRi", ("image_train", "image_query", "image_test"), vehicles)
    assert counts_of(unchecked("veri776", "test")) == Counts(8, 3, 2)
    for path in (root / "VeRi" / "image_query").glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no pictures such as 0002_c1s1_000451_03\.jpg in image_query"):
        unchecked("veri776", "test")


def rows_of(folder: Path, count: int = 4, more: str = "", values: Sequence[str] = ()) -> Path:
    """A CSV of two classes, every row both query and gallery, with one more column."""
    lines = [f"label,path,split,is_query,is_gallery{more}"]
    for i in range(count):
        picture(folder / f"{i}.png", seed=i)
        lines.append(f"{i % 2},{i}.png,validation,1,1{',' + values[i] if values else ''}")
    return csv(folder / "df.csv", *lines)


def test_a_csv_with_sequences_and_cameras(tmp_path: Path, root: Path) -> None:
    file = rows_of(tmp_path, 4, ",sequence,camera,weather", ["a,1,dry", "a,1,wet", ",1,dry", "b,2,dry"])
    got = load_dataset(f"csv:{file}", preprocess=SMALL)
    assert got.apart is not None
    together = {
        (i, j) for i in range(4) for j in range(i) if any(a == b >= 0 for a, b in zip(*got.apart[[i, j]], strict=True))
    }
    assert together == {(1, 0), (2, 0)}, "one sequence whatever the label; one camera with the same label"
    assert next(iter(remarks(got))) == "columns that are not used: weather"
    as_camid = rows_of(tmp_path / "camid", 4, ",sequence,camid,weather", ["a,1,dry", "a,1,wet", ",1,dry", "b,2,dry"])
    np.testing.assert_array_equal(load_dataset(f"csv:{as_camid}", preprocess=SMALL).apart, got.apart)
    plain = load_dataset(f"csv:{rows_of(tmp_path / 'plain')}", preprocess=SMALL)
    assert plain.apart is None and not plain.notes


@pytest.mark.parametrize(
    "labels, classes",
    [
        (("1", "2", "1.0", "02"), [0, 1, 0, 1]),
        (("+3", "03.", "-3", "-3.00"), [0, 0, 1, 1]),
        (("12345678901234567890", "12345678901234567891", "12345678901234567890.0", "4"), [0, 1, 0, 2]),
        (("01", "1", "a", "1"), [0, 1, 2, 1]),  # words, as one is no number
        (("1", "1.5", "01.5", "1"), [1, 2, 0, 1]),
    ],
)
def test_whole_numbers_in_a_csv_are_numbers_however_they_are_written(labels, classes, tmp_path: Path, root: Path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", seed=i)
    head = "label,path,split,is_query,is_gallery,sequence,camera"
    lines = [f"{label},{i}.png,validation,1,1,{label},1" for i, label in enumerate(labels)]
    got = load_dataset(f"csv:{csv(tmp_path / 'df.csv', head, *lines)}", preprocess=SMALL)
    same = np.equal.outer(classes, classes)
    for column in (got.labels, *got.groups.T):
        np.testing.assert_array_equal(np.equal.outer(column, column), same)
    merged = len(set(labels)) > len(set(classes))
    assert any("the same number is written as" in note for note in got.notes) == merged


@pytest.mark.parametrize("word", ["NA", "nan", "NULL", "<NA>", "None", "N/A", ""])
def test_cells_without_a_value_in_a_csv(word: str, tmp_path: Path, root: Path) -> None:
    """As pandas, R and databases write them: of no camera, no sequence and no box, and neither query nor gallery; as a label it
    is said."""
    given = [",".join([word] * 6)] * 4
    got = load_dataset(f"csv:{rows_of(tmp_path / 'a', 4, ',camera,sequence,x_1,x_2,y_1,y_2', given)}", preprocess=SMALL)
    assert (got.groups == -1).all() and not got.notes
    assert got.images[np.arange(4)].shape == (4, 3, 14, 14)
    flags = [f"{i % 2},{i}.png,test,{'1' if i < 2 else word},1" for i in range(4)]
    file = csv(tmp_path / "a" / "flags.csv", "label,path,split,is_query,is_gallery", *flags)
    assert load_dataset(f"csv:{file}", preprocess=SMALL).query.tolist() == [0, 1]
    if word:
        file = rows_of(tmp_path / "b")
        file.write_text(file.read_text().replace("\n1,", f"\n{word},"))
        assert any(word in note for note in load_dataset(f"csv:{file}", preprocess=SMALL).notes)


def test_what_a_csv_is_forgiven(tmp_path: Path, root: Path) -> None:
    file = rows_of(tmp_path / "mine")
    text = (
        file.read_text().replace("0.png", "..\\mine\\0.png").replace("\n1,3", "\n-1.00,3").replace("\n0,2", "\n 0 ,2")
    )
    text = (text + "\n,,,,\n\n").replace("\n", "\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    got = load_dataset(f"csv:{file}", preprocess=SMALL)
    assert got.labels.tolist() == [0, 1, 0] and any("label -1 are junk" in note for note in got.notes)
    assert [r.split for r in verify(f"csv:{file}")] == ["test"] and verify(f"csv:{file}")[0].complete
    with pytest.raises(UsageError, match="no row of the train split"):
        load_dataset(f"csv:{file}", "train")
    with pytest.raises(UsageError, match="no row of the test split"):
        load_dataset(f"csv:{csv(tmp_path / 'learn.csv', 'label,path,split', '0,0.png,train')}")
    only = csv(tmp_path / "junk.csv", "label,path,split,is_query,is_gallery", "-1,0.png,test,1,1")
    with pytest.raises(DataError, match="only junk"):
        load_dataset(f"csv:{only}")


def test_a_part_to_learn_from_alone_is_whole(tmp_path: Path, root: Path) -> None:
    class_tree(tmp_path / "a", parts=("train",))
    class_tree(tmp_path / "b", parts=("query", "train"))
    learn = csv(rows_of(tmp_path / "c").with_name("learn.csv"), "label,path,split", "0,0.png,train", "1,1.png,train")
    for name in (f"folder:{tmp_path / 'a'}", f"csv:{learn}"):
        (report,) = verify(name)
        assert report.split == "train" and report.complete and "the test split" in report.notes[-1]
    with pytest.raises(UsageError, match="nothing for the test split"):  # queries without a gallery are a slip
        verify(f"folder:{tmp_path / 'b'}")


def test_a_csv_as_spreadsheets_write_it(tmp_path: Path, root: Path) -> None:
    file = rows_of(tmp_path / "mine")
    plain, text = load_dataset(f"csv:{file}", preprocess=SMALL), file.read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        file.write_text(text, encoding=encoding)
        got = load_dataset(f"csv:{file}", preprocess=SMALL)
        assert got.labels.tolist() == plain.labels.tolist() and got.class_names == plain.class_names
    for mark in ";\t":
        file.write_text(text.replace(",", mark))
        with pytest.raises(DataError, match="not by commas"):
            load_dataset(f"csv:{file}", preprocess=SMALL)


def test_a_class_folder_without_a_file_is_named(tmp_path: Path, root: Path) -> None:
    tree = class_tree(tmp_path / "mine", classes=2)
    (tree / "failed").mkdir()
    (tree / "hidden").mkdir()
    (tree / "hidden" / ".DS_Store").touch()
    got = load_dataset(f"folder:{tree}", preprocess=SMALL)
    assert got.class_names == ["class0", "class1"] and any("failed, hidden" in note for note in got.notes)


def test_a_folder_of_people_by_camera(tmp_path: Path, root: Path) -> None:
    """As re-identification's code arranges them: -1 is junk; the camera, which only the names say, is not read."""
    for part, person, count in (
        ("query", "0005", 2),
        ("gallery", "0005", 2),
        ("gallery", "-1", 3),
        ("gallery", "0006", 1),
    ):
        for i in range(count):
            picture(tmp_path / part / person / f"{person}_c{i + 1}s1_{i:06d}_00.png", seed=i)
    got = load_dataset(f"folder:{tmp_path}", preprocess=SMALL)
    assert (len(got.query), len(got.gallery), list(got.class_names)) == (2, 3, ["0005", "0006"])
    assert sum(re.match("3 images are junk|.*the camera is not read", said) is not None for said in remarks(got)) == 2


def test_a_person_is_shown_their_own_data_set(typed, tmp_path: Path, root: Path) -> None:  # type: ignore[no-untyped-def]
    class_tree(tmp_path, classes=2, each=2, parts=("query", "gallery"))
    picture(tmp_path / "gallery" / "-1" / "0.png")
    shown = typed("datasets", "show", f"folder:{tmp_path}", "--json").json
    assert "nothing for the train split" in shown["train"]
    assert (shown["test"]["classes"], shown["test"]["queries"], shown["test"]["gallery"]) == (2, 4, 4)
    assert "is not a folder" in typed("datasets", "show", "folder:nowhere", code=2).err


def test_what_pillow_says_of_pictures_that_it_reads_is_not_shown(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    class_tree(tmp_path / "mine", classes=2, each=1)
    with Image.open(tmp_path / "mine" / "class0" / "000.png") as image:
        image.convert("P").save(tmp_path / "mine" / "class0" / "p.png", transparency=bytes(range(9)))
    assert run("datasets", "verify", f"folder:{tmp_path / 'mine'}").err == ""


def test_a_csv_with_a_row_for_each_role(tmp_path: Path, root: Path) -> None:
    """The same file is a query in one row and a gallery entry in another: it is not its own answer."""
    lines = ["label,path,split,is_query,is_gallery"]
    for i in range(4):
        picture(tmp_path / f"{i}.png", seed=i)
        lines += [f"{i % 2},{i}.png,test,1,", f"{i % 2},{i}.png,test,,1"]
    got = load_dataset(f"csv:{csv(tmp_path / 'df.csv', *lines)}", preprocess=SMALL)
    assert got.apart is not None
    for row in got.query:
        assert [j for j in got.gallery if got.apart[j, -1] == got.apart[row, -1]] == [row + 1]
    assert any(said.startswith("4 of 4 queries have a copy of their own picture") for said in remarks(got))


@pytest.mark.parametrize(
    ("parts", "wrapper"),
    [
        (("Train", "Test"), ""),
        (("training", "testing"), ""),
        (("train", "VAL"), "car_data/car_data"),
        (("TRAIN", "Valid"), "x"),
        (("train_set", "test_set"), ""),
        (("Training images", "Test images"), ""),
        (("seg_train/seg_train", "seg_test/seg_test"), "archive"),
        (("trainset", "testset"), ""),
        (("train/train", "test/test"), ""),
    ],
)
def test_folders_of_splits_as_people_have_them(
    parts: tuple[str, str], wrapper: str, tmp_path: Path, root: Path
) -> None:
    class_tree(tmp_path / "mine" / wrapper, parts=parts, each=2)
    train, test = (load_dataset(f"folder:{tmp_path / 'mine'}", split, SMALL) for split in ("train", "test"))
    assert counts_of(train) == counts_of(test) == Counts(6, 3)
    assert not set(train.images.source.paths) & set(test.images.source.paths)  # type: ignore[attr-defined]


@pytest.mark.parametrize("parts", [("query", "gallery"), ("Query", "Gallery"), ("query_images", "gallery_images")])
@pytest.mark.parametrize("above", ["", "Test"])
def test_query_and_gallery_within_test_are_as_beside_train(
    above: str, parts: tuple[str, str], tmp_path: Path, root: Path
) -> None:
    class_tree(tmp_path / "mine" / above, parts=parts, each=2)
    if above:
        class_tree(tmp_path / "mine", parts=("Train",), each=3)
    got = load_dataset(f"folder:{tmp_path / 'mine'}", preprocess=SMALL)
    assert (len(got.query), len(got.gallery), len(got.class_names)) == (6, 6, 3)
    assert not set(got.query) & set(got.gallery)


def test_words_of_splits_among_classes_name_classes(tmp_path: Path, root: Path) -> None:
    for name in ("test_tube", "train_wagon", "bottle"):
        picture(tmp_path / "a" / name / "1.png", seed=len(name))
    assert load_dataset(f"folder:{tmp_path / 'a'}", preprocess=SMALL).class_names == [
        "bottle",
        "test_tube",
        "train_wagon",
    ]
    class_tree(tmp_path / "b" / "test", parts=("query",), each=2)
    with pytest.raises(UsageError, match="has query, and neither"):
        load_dataset(f"folder:{tmp_path / 'b'}", preprocess=SMALL)
    class_tree(tmp_path / "c", parts=("train_a", "train_b", "test_a"), each=1)
    with pytest.raises(DataError, match="train_a and train_b: which of them is meant"):
        load_dataset(f"folder:{tmp_path / 'c'}", preprocess=SMALL)


def test_wrappers_that_are_stepped_through_and_classes_that_are_not(tmp_path: Path, root: Path) -> None:
    class_tree(tmp_path / "a" / "images")
    picture(tmp_path / "a" / "__MACOSX" / "images" / "class0" / "._1.png")
    picture(tmp_path / "a" / "images" / "cover.jpg")
    got = load_dataset(f"folder:{tmp_path / 'a'}", preprocess=SMALL)
    assert counts_of(got) == Counts(12, 3) and len(got.notes) == 2
    assert "1 pictures right in" in got.notes[1]
    for i in range(2):
        picture(tmp_path / "b" / "only" / f"{i}.png", seed=i)
    one = load_dataset(f"folder:{tmp_path / 'b'}", preprocess=SMALL)
    assert counts_of(one) == Counts(2, 1) and any("of one class" in said for said in remarks(one))
    picture(tmp_path / "c" / "dogs" / "poodle" / "1.png")
    picture(tmp_path / "c" / "cats" / "tabby" / "1.png")
    deep = load_dataset(f"folder:{tmp_path / 'c'}", preprocess=SMALL)
    assert deep.class_names == ["cats", "dogs"] and "no picture lies right in a class folder" in deep.notes[0]
    class_tree(tmp_path / "d", parts=("train", "Train"), each=1)
    with pytest.raises(DataError, match="which of them is meant"):
        load_dataset(f"folder:{tmp_path / 'd'}", "train")
    class_tree(tmp_path / "e", parts=("test", "val", "extra"), each=1)
    assert load_dataset(f"folder:{tmp_path / 'e'}", preprocess=SMALL).notes == ["folders passed over: extra, val"]


@pytest.mark.skipif(sys.platform == "darwin", reason="file names have one Unicode form and no case there")
def test_names_that_differ_in_case_or_unicode_form(tmp_path: Path, root: Path) -> None:
    for part, name in (("query", "Caf\u00e9"), ("gallery", "Cafe\u0301"), ("query", "dog"), ("gallery", "Dog")):
        for i in range(2):
            picture(tmp_path / "mine" / part / name / f"{i}.png", seed=len(name) + 9 * i)
    got = load_dataset(f"folder:{tmp_path / 'mine'}", preprocess=SMALL)
    assert got.class_names == ["Caf\u00e9", "Dog"] and len(got.notes) == 2
    assert set(got.labels[got.query]) == set(got.labels[got.gallery]) == {0, 1}
    for name in ("a", "A", "b"):
        picture(tmp_path / "letters" / name / "1.png", seed=ord(name))
    letters = load_dataset(f"folder:{tmp_path / 'letters'}", preprocess=SMALL)
    assert letters.class_names == ["A", "a", "b"] and "different classes" in letters.notes[0]


@pytest.mark.parametrize("below", ["", "images"])
def test_a_folder_that_has_an_id_of_its_own_says_so(tmp_path: Path, root: Path, below: str) -> None:
    for c in ("001.Albatross", "002.Auklet"):
        picture(tmp_path / "CUB_200_2011/images" / c / "1.png", seed=len(c))
    assert load_dataset(f"folder:{tmp_path}/CUB_200_2011/images", preprocess=SMALL).notes == []
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1 1\n2 2\n")
    got = load_dataset(f"folder:{tmp_path}/CUB_200_2011/{below}", preprocess=SMALL)
    assert sum("--dataset cub" in note for note in got.notes) == 1


def test_pictures_are_known_by_content_and_what_is_passed_over_is_counted(tmp_path: Path, root: Path) -> None:
    mine = tmp_path / "mine"
    for c in "ab":
        for suffix, form in ((".jpg", "JPEG"), (".jfif", "JPEG"), ("", "PNG"), (".JPG_large", "JPEG")):
            Image.open(picture(tmp_path / "x.png", seed=ord(c))).save(mine_file := tmp_path / "y", form)
            target = mine / c / f"1{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            mine_file.rename(target)
        (mine / c / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
        (mine / c / "notes.txt").write_text("no picture")
    got = load_dataset(f"folder:{mine}", preprocess=SMALL)
    assert counts_of(got) == Counts(8, 2)
    assert got.notes == ["passed over, no pictures that can be read here: 2 .heic, 2 .txt"]
    (mine / "c").mkdir()
    (mine / "c" / "IMG_2.HEIC").write_bytes(bytes(99))
    with pytest.raises(DataError, match=r"class folder .*/c holds no picture that can be read here: 1 \.heic"):
        load_dataset(f"folder:{mine}", preprocess=SMALL)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["pipe", "pipe.jpg"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path, root: Path) -> None:
    os.mkfifo(class_tree(tmp_path / "mine") / "class0" / name)
    assert len(load_dataset(f"folder:{tmp_path / 'mine'}", preprocess=SMALL)) == 12


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_links_are_followed_but_not_in_circles(tmp_path: Path, root: Path) -> None:
    class_tree(tmp_path / "store", classes=2, each=3)
    mine = class_tree(tmp_path / "mine", classes=2, each=1)
    (mine / "class0" / "session1").symlink_to(tmp_path / "store" / "class0")
    (mine / "class2").symlink_to(tmp_path / "store" / "class1")
    (mine / "class1" / "again").symlink_to(mine / "class1")
    (mine / "class1" / "all").symlink_to(mine)
    got = load_dataset(f"folder:{mine}", preprocess=SMALL)
    assert np.bincount(got.labels).tolist() == [4, 1, 3]
    assert len(got.notes) == 2 and all("is a link to a folder that it lies in" in note for note in got.notes)


def test_a_picture_that_cannot_be_taken_is_named(tmp_path: Path, root: Path) -> None:
    mine = class_tree(tmp_path / "mine", classes=2, each=1)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(mine / "class1" / "float.tif")
    for name, value in (("deep", 65_535), ("deeper", 65_536), ("below", -1)):
        Image.fromarray(np.full((8, 8), value, np.int32)).save(mine / "class1" / f"{name}.tif")
    assert verify(f"folder:{mine}")[0].broken == (
        f"{mine}/class1/below.tif: pixels from -1 to -1 have no known range",
        f"{mine}/class1/deeper.tif: pixels from 65536 to 65536 have no known range",
        f"{mine}/class1/float.tif: floating-point pixels have no known range",
    )


def test_what_is_said_before_anything_is_measured(tmp_path: Path, root: Path) -> None:
    mine = class_tree(tmp_path / "mine", classes=3, each=1)
    said = list(remarks(load_dataset(f"folder:{mine}", preprocess=SMALL)))
    assert said == [
        "the gallery has 3 images, fewer than 100: CA- and QA- cannot be measured",
        "3 of 3 queries have no other image of their class to find: they have no recall",
    ]
    copied = class_tree(tmp_path / "copies", classes=2, each=2)
    for path in list(copied.rglob("*.png")):
        path.with_name(f"{path.stem} (copy).png").write_bytes(path.read_bytes())
    found = load_dataset(f"folder:{copied}", preprocess=SMALL)
    assert (
        list(remarks(found))[1]
        == "8 of 8 queries have a copy of their own picture in the gallery: it is not their answer"
    )

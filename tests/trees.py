"""Small data sets in the real layouts, made in a test's own folder."""

import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """Write a picture of ``size`` (width, height), a colour of its own with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 200, 3) + rng.integers(0, 40, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)
    return path


def class_tree(root: Path, classes: int = 3, each: int = 4, parts: Iterable[str] = ("",), suffix: str = ".png") -> Path:
    """Class folders below each of ``parts``."""
    for p, part in enumerate(parts):
        for c in range(classes):
            for i in range(each):
                picture(root / part / f"class{c}" / f"{i:03d}{suffix}", seed=1000 * p + 100 * c + i)
    return root


def cub_tree(root: Path, counts: dict[int, int]) -> Path:
    """CUB_200_2011 with ``counts`` images by class."""
    base = root / "CUB_200_2011"
    images, labels = [], []
    for label, count in counts.items():
        for i in range(count):
            name = f"{label:03d}.Bird_{label}/Bird_{label}_{i:04d}.jpg"
            picture(base / "images" / name, seed=10 * label + i)
            images.append(name)
            labels.append(label)
    (base / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(images, 1)))
    (base / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(labels, 1)))
    (base / "classes.txt").write_text("".join(f"{c} {c:03d}.Bird_{c}\n" for c in range(1, 201)))
    return base


def cub_from_lists(root: Path, lists: Path) -> Path:
    """CUB_200_2011 of the real lists, each image file one of five small pictures."""
    base = root / "CUB_200_2011"
    (base / "images").mkdir(parents=True)
    for name in ("images.txt", "image_class_labels.txt", "classes.txt"):
        (base / name).write_bytes((lists / name).read_bytes())
    stock = [picture(base / f"stock{i}.jpg", seed=i) for i in range(5)]
    for i, line in enumerate((lists / "images.txt").read_text().splitlines()):
        path = base / "images" / line.split()[1]
        path.parent.mkdir(exist_ok=True)
        os.link(stock[i % 5], path)
    return base


def cars_tree(root: Path, classes: Iterable[int], each: int = 2) -> Path:
    """Cars-196 with the combined annotations, written as the real file is."""
    from scipy.io import savemat

    base = root / "cars196"
    fields = [("relative_im_path", object), *((f"bbox_{s}", object) for s in ("x1", "y1", "x2", "y2"))]
    rows = []
    for c in classes:
        for i in range(each):
            name = f"car_ims/{10 * c + i:06d}.jpg"
            picture(base / name, seed=10 * c + i)
            rows.append((name, 1, 1, 39, 29, c, int(c > 98)))
    annotations = np.array([tuple(row) for row in rows], dtype=[*fields, ("class", object), ("test", object)])
    names = np.array([f"Car {c}" for c in range(1, 197)], dtype=object)
    savemat(base / "cars_annos.mat", {"annotations": annotations[None], "class_names": names[None]})
    return base


def sop_tree(root: Path, products: int = 3, each: int = 2) -> Path:
    """Stanford Online Products: class ids go on from train to test, as they do in the real lists."""
    base = root / "Stanford_Online_Products"
    number = 0
    for s, split in enumerate(("train", "test")):
        lines = ["image_id class_id super_class_id path\n"]
        for c in range(products):
            for i in range(each):
                number += 1
                name = f"chair_final/{number}_{i}.JPG"
                picture(base / name, seed=number)
                lines.append(f"{number} {1 + s * products + c} 1 {name}\n")
        (base / f"Ebay_{split}.txt").write_text("".join(lines))
    return base


def inshop_tree(root: Path) -> Path:
    """In-Shop Clothes: one training item, two test items of two queries and one gallery picture each."""
    base = root / "In-shop"
    records = [("id_00000001", "train", 3)]
    records += [(f"id_0000000{i}", part, count) for i in (2, 7) for part, count in (("query", 2), ("gallery", 1))]
    lines = []
    for n, (item, part, count) in enumerate(records):
        for i in range(count):
            name = f"img/WOMEN/Dresses/{item}/{n:02d}_{i}_front.jpg"
            picture(base / "Img" / name, seed=10 * n + i)
            lines.append(f"{name}    {item} {part}\n")
    (base / "Eval").mkdir()
    text = f"{len(lines)}\nimage_name item_id evaluation_status\n{''.join(lines)}"
    (base / "Eval" / "list_eval_partition.txt").write_text(text)
    return base


def zipped(folder: Path, archive: Path) -> Path:
    """Everything below ``folder`` in a zip archive, by its path below the folder."""
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                bundle.write(path, path.relative_to(folder).as_posix())
    return archive


def grocery_tree(root: Path, classes: Iterable[int] = (0, 30, 31, 80), each: int = 7) -> Path:
    """The Grocery Store data set: its own three lists, each naming some photographs of every class."""
    base = root / "grocery" / "dataset"
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c in classes:
        for i in range(each):
            part = ("train", "val", "test")[i % 3]
            name = f"{part}/Fruit/Kind-{c}/Kind-{c}_{i:03d}.jpg"
            picture(base / name, seed=100 * c + i)
            lines[part].append(f"{name}, {c}, {c // 10}\n")
    for part, listed in lines.items():
        (base / f"{part}.txt").write_text("".join(listed))
    header = "Class Name (str),Class ID (int),Coarse Class Name (str)\n"
    (base / "classes.csv").write_text(header + "".join(f"Kind-{c},{c},Fruit\n" for c in range(81)))
    return root / "grocery"


def lfw_tree(root: Path, people: dict[str, int]) -> Path:
    """Deep-funneled LFW with so many photographs by name."""
    base = root / "lfw-deepfunneled"
    for p, (name, count) in enumerate(people.items()):
        for i in range(1, count + 1):
            picture(base / name / f"{name}_{i:04d}.jpg", seed=50 * p + i)
    return base


def idx_file(path: Path, array: np.ndarray) -> Path:
    """An IDX file of uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    return path


def reid_tree(base: Path, folders: tuple[str, str, str], names: dict[str, list[str]]) -> Path:
    """A re-identification set: the files ``names`` of "train", "query" and "gallery" in the three folders."""
    for folder, part in zip(folders, ("train", "query", "gallery"), strict=True):
        for i, name in enumerate(names[part]):
            picture(base / folder / name, seed=1000 * len(part) + i)
        (base / folder / "Thumbs.db").write_bytes(b"no picture")
    return base

"""In-Shop Clothes Retrieval of DeepFashion: 52,712 pictures (Liu, Luo, Qiu, Wang and Tang, CVPR 2016).

``list_eval_partition.txt`` gives each picture its item and one of train (25,882), query (14,218) and
gallery (12,612). In the test split queries and gallery are different pictures of the same 3,985 items.
"""

import numpy as np

from dmlbench.datasets.base import Counts, RetrievalDataset, need, numbered
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.lists import rows
from dmlbench.datasets.pictures import Files
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

COUNTS = {"train": Counts(25882, 3997), "test": Counts(14218 + 12612, 3985, 14218)}
FOLDERS = ("In-shop", "inshop", "In-shop Clothes Retrieval Benchmark", "In_shop_Clothes_Retrieval_Benchmark")
LISTS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt", "Anno/list_eval_partition.txt")


def inshop(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The split's clothes: first the queries, then the gallery, each in the order of the list."""
    root = need("inshop", *FOLDERS)
    listing = next((root / name for name in LISTS if (root / name).exists()), root / LISTS[0])
    records = list(rows(listing, 3, header=2))
    parts = ("train",) if split == "train" else ("query", "gallery")
    strange = next((part for _, _, part in records if part not in ("train", "query", "gallery")), None)
    if strange is not None:
        raise DataError(f"list file {listing}: status {strange!r} is not train, query or gallery")
    chosen = [record for part in parts for record in records if record[2] == part]
    if not chosen:
        raise DataError(f"list file {listing} names no image of the {split} split")
    labels, names = numbered([item for _, item, _ in chosen])
    pictures = Files(root / "Img" if (root / "Img").is_dir() else root, [path for path, _, _ in chosen])
    queries = np.flatnonzero([part == "query" for _, _, part in chosen])
    gallery = np.flatnonzero([part == "gallery" for _, _, part in chosen])
    return RetrievalDataset(
        name="inshop",
        split=split,
        images=CachedImages(pictures, preprocess),
        labels=labels,
        query=queries,
        gallery=gallery,
        licence="non-commercial research",
        source="https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        class_names=names,
    )

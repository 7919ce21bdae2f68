"""Stanford Online Products: 120,053 pictures of 22,634 products (Oh Song, Xiang, Jegelka and Savarese, CVPR 2016).

``Ebay_train.txt`` and ``Ebay_test.txt`` (a header; image id, class id, super class id, path) are the
field's splits: 59,551 images of 11,318 classes, 60,502 of the other 11,316.
"""

from dmlbench.datasets.base import Counts, RetrievalDataset, need, numbered
from dmlbench.datasets.cache import CachedImages
from dmlbench.datasets.lists import rows, whole_number
from dmlbench.datasets.pictures import Files
from dmlbench.errors import DataError
from dmlbench.preprocess import Preprocess

COUNTS = {"train": Counts(59551, 11318), "test": Counts(60502, 11316)}


def sop(split: str, preprocess: Preprocess) -> RetrievalDataset:
    """The split's products, in the order of its list."""
    root = need("sop", "Stanford_Online_Products", "sop", "online_products")
    listing = root / f"Ebay_{split}.txt"
    records = [(path, whole_number(label, listing, "class id")) for _, label, _, path in rows(listing, 4, header=1)]
    if not records:
        raise DataError(f"list file {listing} names no image")
    labels, names = numbered([label for _, label in records])
    pictures = Files(root, [path for path, _ in records])
    return RetrievalDataset(
        name="sop",
        split=split,
        images=CachedImages(pictures, preprocess),
        labels=labels,
        licence="non-commercial research",
        source="https://cvgl.stanford.edu/projects/lifted_struct/",
        class_names=names,
    )

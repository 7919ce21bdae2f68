"""Is a data set whole? Counts against the published ones, and every image decoded."""

from dataclasses import dataclass, field, replace

import numpy as np

from dmlbench.datasets import CachedImages, RetrievalDataset, dataset_entry
from dmlbench.datasets.base import Counts, counts_of
from dmlbench.datasets.cache import Progress
from dmlbench.datasets.pictures import Files, Undecodable, each
from dmlbench.datasets.remarks import remarks
from dmlbench.errors import DataError, NoSplit, UsageError
from dmlbench.preprocess import Preprocess


@dataclass(frozen=True)
class SplitReport:
    """The report on one split.

    Attributes:
        split: "train" or "test".
        counts, expected: the number of images and classes; expected is None if it is unknown.
        lonely: classes of a single image, whose queries have nothing to find.
        broken: a line for each image that is missing or cannot be decoded.
        problem: why the split could not be read at all, else "".
        notes: what else a person should know, a sentence each.
    """

    split: str
    counts: Counts | None = None
    expected: Counts | None = None
    lonely: int = 0
    broken: tuple[str, ...] = field(default=())
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Nothing is missing, broken or too many."""
        return not self.problem and not self.broken and (self.expected is None or self.counts == self.expected)


def verify(name: str, progress: Progress = lambda done, total: None) -> list[SplitReport]:
    """Both splits of a data set; a user's own may lack one of them.

    Raises:
        UsageError: no such data set, or nothing in it.
    """
    entry = dataset_entry(name)
    reports = []
    for split in ("train", "test"):
        try:
            dataset = entry.read(split, Preprocess.standard(entry.shape))
        except DataError as error:
            reports.append(SplitReport(split, expected=entry.counts.get(split), problem=str(error)))
            continue
        except UsageError as error:
            alone = bool(reports) and isinstance(error, NoSplit)
            if (split == "test" and not alone) or split in entry.counts:
                raise
            if alone:
                reports[-1] = replace(reports[-1], notes=(*reports[-1].notes, f"{error}: to learn from alone"))
            continue
        if ":" in name and split == "train" and not len(dataset):
            continue
        reports.append(
            SplitReport(
                split,
                counts=counts_of(dataset),
                expected=entry.counts.get(split),
                lonely=int((np.bincount(dataset.labels[dataset.labels >= 0]) == 1).sum()),
                broken=tuple(broken := _broken(dataset, progress)),
                notes=tuple(remarks(dataset)) if not broken else tuple(dataset.notes),
            )
        )
    return reports


def _broken(dataset: RetrievalDataset, progress: Progress) -> list[str]:
    """A line for each image that cannot be decoded; pictures in memory were decoded when they were read."""
    if not isinstance(dataset.images, CachedImages) or not isinstance(dataset.images.source, Files):
        return []
    images = dataset.images

    def one(row: int) -> str | None:
        try:
            images.preprocess(images.source.picture(row))
        except Undecodable as error:
            return str(error)
        except ValueError as error:
            return f"{images.source.called(row)}: {error}"
        return None

    lines = []
    for done, line in enumerate(each(one, len(images)), 1):
        progress(done, len(images))
        if line is not None:
            lines.append(line)
    return lines

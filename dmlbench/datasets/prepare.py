"""Preparing a data set: download, unpack or link it, or print how to get it.

:data:`ORIGINS` says for each data set where it comes from and how its folder is recognised. Sizes and
sha256 are those that TensorFlow Datasets publishes for the same files.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmlbench.datasets import DATASETS, load_dataset
from dmlbench.datasets.base import data_roots
from dmlbench.datasets.downloads import Download, Heard, fetch
from dmlbench.datasets.folder import PARTS
from dmlbench.datasets.pictures import shown
from dmlbench.datasets.unpack import unpack
from dmlbench.errors import DataError, UsageError
from dmlbench.files import atomic_file, sweep


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from.

    Attributes:
        folder: its place below the data root.
        marker: a file that shows the folder to be this data set, relative to it; several for alternatives.
        downloads: what can be fetched.
        manual: what to get by hand, where nothing can be fetched.
        keep: the downloads themselves are read, so they are not unpacked.
    """

    folder: str
    marker: Sequence[str]
    downloads: Sequence[Download] = ()
    manual: str = ""
    keep: bool = False


def prepare(name: str, source: Path | None = None, heard: Heard = lambda done, total: None) -> str:
    """Make a data set ready; a sentence on what was done.

    Args:
        name: its id, or ``folder:PATH`` to unpack one's own archive there.
        source: an archive or a folder that was got by hand.
        heard: progress, as (done, total) in bytes or files; total 0 where it is not known.

    Raises:
        UsageError: nothing to prepare, or ``source`` missing where it is needed.
        DataError: the download or the archive is not what it should be, or has to be got by hand.
    """
    try:
        return _prepared(name, source, heard)
    except OSError as error:  # a folder that cannot be made, read or written
        raise DataError(
            f"{shown(error.filename or data_roots()[0])} cannot be used: {error.strerror or error}"
        ) from None


def _prepared(name: str, source: Path | None, heard: Heard) -> str:
    kind, colon, path = name.partition(":")
    if colon:
        return _unpack_user_folder(kind, Path(path).expanduser(), source, heard)
    entry = DATASETS[name]
    if entry.packaged:
        raise UsageError(f"data set {name!r} comes with the installed packages: nothing to prepare")
    if source is not None and not source.exists():
        raise DataError(f"--from {shown(source)} does not exist")
    if (origin := ORIGINS.get(name)) is None:
        raise UsageError(f"data set {name!r} is of a plugin: what it needs is said by the package that it comes from")
    target = data_roots()[0] / origin.folder
    if source is None and not origin.downloads:
        raise DataError(
            f"data set {name!r} cannot be fetched by a program. {origin.manual} "
            f"Then: dmlbench datasets prepare {name} --from FILE"
        )
    if target.exists() and not origin.keep:
        raise DataError(f"{shown(target)} exists already; 'dmlbench datasets verify {name}' checks it")
    if origin.keep:
        done = _use_published(name, origin, target, source, heard)
    elif source is not None and source.is_dir():
        done = _linked(name, origin, target, source)
    else:
        archive = source or fetch(origin.downloads[0], target.parent / "downloads", heard)
        _unpacked(name, origin, target, archive, heard)
        done = f"unpacked into {shown(target)}"
    try:
        counts = [f"{split}: {len(load_dataset(name, split)):,} images" for split in entry.counts]
    except DataError:
        if target.is_symlink():
            target.unlink()
        raise
    return f"{name}: {done}; {', '.join(counts)}"


def _unpack_user_folder(kind: str, target: Path, source: Path | None, heard: Heard) -> str:
    """Unpack somebody's own archive of class folders."""
    if kind != "folder":
        raise UsageError(f"only data sets by id and folder:PATH can be prepared, not {kind}:")
    if source is None or not source.is_file():
        raise UsageError("folder:PATH needs --from ARCHIVE, which is unpacked there")
    if target.exists():
        raise UsageError(f"{shown(target)} exists already: name a folder that does not")
    unpack(source, target, lambda files: heard(files, 0))
    only = list(target.iterdir())
    wrapped = len(only) == 1 and only[0].is_dir() and only[0].name.lower() not in PARTS
    if wrapped and any(d.is_dir() for d in only[0].iterdir()):
        lifted = target.with_name(f".{target.name}.lifted")
        only[0].rename(lifted)
        target.rmdir()
        lifted.rename(target)
    parts = sorted(d.name for d in target.iterdir() if d.is_dir())
    return f"unpacked into {shown(target)}: {', '.join(shown(p) for p in parts[:6])}{' ...' if len(parts) > 6 else ''}"


def _marked(folder: Path, origin: Origin) -> Path | None:
    """``folder`` or the folder right below it that holds a marker."""
    for candidate in (folder, *sorted(d for d in folder.iterdir() if d.is_dir())):
        if any((candidate / marker).exists() for marker in origin.marker):
            return candidate
    return None


def _linked(name: str, origin: Origin, target: Path, source: Path) -> str:
    root = _marked(source, origin)
    if root is None:
        raise DataError(f"{shown(source)} is not data set {name!r}: no {' or '.join(origin.marker)} in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(root.resolve(), target_is_directory=True)
    except OSError as error:
        raise DataError(f"{shown(target)} cannot be linked to {shown(root)}: {error.strerror}") from None
    return f"{shown(target)} is a link to {shown(root.resolve())}"


def _unpacked(name: str, origin: Origin, target: Path, archive: Path, heard: Heard) -> None:
    """Unpack, and put the folder with the marker at ``target``."""
    unpacked = target.with_name(f".{target.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack(archive, unpacked, lambda files: heard(files, 0))
        root = _marked(unpacked, origin)
        if root is None:
            raise DataError(
                f"archive {shown(archive)} is not data set {name!r}: no {' or '.join(origin.marker)} in it. {origin.manual}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        root.rename(target)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _use_published(name: str, origin: Origin, target: Path, source: Path | None, heard: Heard) -> str:
    """Files that are read as they were published: downloaded, or copied from a folder."""
    if source is None:
        for file in origin.downloads:
            fetch(file, target, heard)
        return f"downloaded into {shown(target)}"
    if source.is_file():
        raise UsageError(f"data set {name!r} consists of several files: --from names the folder that holds them")
    folder = next((d for d in (source, *sorted(source.rglob("*"))) if d.is_dir() and _published(d, origin)), None)
    if folder is None:
        raise DataError(f"{shown(source)} does not hold {', '.join(f.name for f in origin.downloads)}")
    target.mkdir(parents=True, exist_ok=True)
    sweep(target)
    for published in _published(folder, origin):
        with atomic_file(target / published.name) as part:
            shutil.copyfile(published, part)
    return f"copied into {shown(target)}"


def _published(folder: Path, origin: Origin) -> list[Path]:
    """All of the origin's files in ``folder``, packed or not; empty unless all are there."""
    choices = []
    for file in origin.downloads:
        choice = next((folder / n for n in (file.name, file.name.removesuffix(".gz")) if (folder / n).is_file()), None)
        if choice is None:
            return []
        choices.append(choice)
    return choices


def _idx_files(base: str, sizes: dict[str, tuple[int, str]]) -> tuple[Download, ...]:
    return tuple(Download(f"{n}-ubyte.gz", (f"{base}{n}-ubyte.gz",), *sizes[n]) for n in sizes)


_OMNIGLOT = "https://github.com/brendenlake/omniglot/raw/master/python/"

ORIGINS: dict[str, Origin] = {
    "omniglot-small": Origin(
        "omniglot",
        (),
        (
            Download(
                "images_background_small1.zip",
                (f"{_OMNIGLOT}images_background_small1.zip",),
                1319022,
                "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
            ),
            Download(
                "images_background_small2.zip",
                (f"{_OMNIGLOT}images_background_small2.zip",),
                1580917,
                "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
            ),
        ),
        keep=True,
    ),
    "omniglot": Origin(
        "omniglot",
        (),
        (
            Download(
                "images_background.zip",
                (f"{_OMNIGLOT}images_background.zip",),
                9464212,
                "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            ),
            Download(
                "images_evaluation.zip",
                (f"{_OMNIGLOT}images_evaluation.zip",),
                6462886,
                "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            ),
        ),
        keep=True,
    ),
    "mnist": Origin(
        "MNIST/raw",
        (),
        _idx_files(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            {
                "train-images-idx3": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
                "train-labels-idx1": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
                "t10k-images-idx3": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
                "t10k-labels-idx1": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            },
        ),
        keep=True,
    ),
    "fashion-mnist": Origin(
        "FashionMNIST/raw",
        (),
        _idx_files(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            {
                "train-images-idx3": (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
                "train-labels-idx1": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
                "t10k-images-idx3": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
                "t10k-labels-idx1": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
            },
        ),
        keep=True,
    ),
    "cifar10": Origin(
        "cifar-10-batches-bin",
        ("test_batch.bin", "test_batch"),
        (
            Download(
                "cifar-10-binary.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "cifar100": Origin(
        "cifar-100-binary",
        ("test.bin", "fine_label_names.txt", "test"),
        (
            Download(
                "cifar-100-binary.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
    ),
    "cub": Origin(
        "CUB_200_2011",
        ("image_class_labels.txt",),
        (
            Download(
                "CUB_200_2011.tgz",
                ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
                1150585339,
                "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            ),
        ),
    ),
    "cars": Origin(
        "cars196",
        ("cars_annos.mat",),
        manual=(
            "Get car_ims.tgz and cars_annos.mat of the Stanford Cars data set (its first home, "
            "ai.stanford.edu/~jkrause/cars, no longer serves them), unpack the first beside the second, and give that folder."
        ),
    ),
    "sop": Origin(
        "Stanford_Online_Products",
        ("Ebay_test.txt",),
        manual=(
            "Get Stanford_Online_Products.zip (3,083,860,082 bytes, sha256 b04fa78210e6...) from "
            "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip."
        ),
    ),
    "inshop": Origin(
        "In-shop",
        ("Eval/list_eval_partition.txt", "list_eval_partition.txt", "Anno/list_eval_partition.txt"),
        manual=(
            "Get img.zip and list_eval_partition.txt of the In-shop Clothes Retrieval Benchmark from "
            "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, make a folder with Img/img/ and "
            "Eval/list_eval_partition.txt of them, and give that folder."
        ),
    ),
    "grocery": Origin(
        "grocery",
        ("dataset/classes.csv",),
        manual=(
            "Get the repository https://github.com/marcusklasson/GroceryStoreDataset (git clone, or its ZIP) at commit "
            "fc80ba9, and give the folder or the archive."
        ),
    ),
    "lfw": Origin(
        "lfw-deepfunneled",
        ("Abdullah_Gul/Abdullah_Gul_0004.jpg",),
        manual=(
            "Get lfw-deepfunneled.tgz of Labeled Faces in the Wild (its first home, vis-www.cs.umass.edu/lfw, does not "
            "always answer)."
        ),
    ),
    "market1501": Origin(
        "Market-1501-v15.09.15",
        ("bounding_box_test",),
        manual="Get Market-1501-v15.09.15.zip of Market-1501 (Zheng et al., ICCV 2015) from its authors.",
    ),
    "dukemtmc": Origin(
        "DukeMTMC-reID",
        ("bounding_box_test",),
        manual="DukeMTMC-reID is no longer given out by its authors; give the DukeMTMC-reID.zip that you have.",
    ),
    "veri776": Origin(
        "VeRi",
        ("image_query",),
        manual="Get VeRi.zip of VeRi-776 from its authors, who ask for a signed request (github.com/JDAI-CV/VeRidataset).",
    ),
}

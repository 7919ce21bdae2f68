"""Archives that must be refused, downloads that break off, and data sets made ready from both."""

import functools
import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ran
from trees import class_tree, cub_tree

from dmlbench.datasets import prepare as preparing
from dmlbench.datasets import unpack as unpacking
from dmlbench.datasets.base import Counts
from dmlbench.datasets.downloads import Download, fetch
from dmlbench.datasets.prepare import ORIGINS, Origin, prepare
from dmlbench.datasets.unpack import unpack
from dmlbench.datasets.verify import verify
from dmlbench.errors import DataError, UsageError


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        for info in others:
            bundle.addfile(info)
    return path


def packed(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as bundle:
        bundle.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("make", [zipped, tarred])
def test_unpacking(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / "a.archive", {"top/a.txt": b"A", "top/deep/b.txt": b"B"})
    heard: list[int] = []
    unpack(archive, tmp_path / "out", heard.append)
    assert (tmp_path / "out/top/deep/b.txt").read_bytes() == b"B" and heard == [1, 2]
    with pytest.raises(DataError, match="exists already"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/tmp/dmlbench-out.txt", "C:\\out.txt", "..\\out.txt"]
)
def test_names_that_point_outside(make, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / "a.archive", {"fine.txt": b"x", name: b"bad"})
    with pytest.raises(DataError, match="points outside its folder"):
        unpack(archive, tmp_path / "in" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.archive", "in"] and not any((tmp_path / "in").iterdir())
    assert not Path("/tmp/dmlbench-out.txt").exists()


def test_links_and_devices(tmp_path: Path) -> None:
    for kind, said in (
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.FIFOTYPE, "not a plain file"),
    ):
        info = tarfile.TarInfo("trap")
        info.type, info.linkname = kind, "/etc/passwd"
        with pytest.raises(DataError, match=f"'trap' is {said}"):
            unpack(tarred(tmp_path / "a.tgz", {"fine": b""}, info), tmp_path / "out")
    link = zipfile.ZipInfo("trap")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="'trap' is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bombs_and_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="is refused: it unpacks to more than"):
        unpack(zipped(tmp_path / "bomb.zip", {"zeros": bytes(150_000_000)}), tmp_path / "out")
    monkeypatch.setattr(unpacking, "MOST_FILES", 3)
    with pytest.raises(DataError, match="in 4 files"):
        unpack(tarred(tmp_path / "many.tgz", {str(i): b"" for i in range(5)}), tmp_path / "out")
    twin = tarfile.TarInfo("a")
    with pytest.raises(DataError, match="names a file twice"):
        unpack(tarred(tmp_path / "twin.tgz", {"a": b"1"}, twin), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_archives_that_are_broken(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "a.tgz", {"a": os.urandom(5000)}).read_bytes()
    (tmp_path / "a.tgz").write_bytes(whole[:2000])
    (tmp_path / "b.zip").write_bytes(b"not an archive")
    for name in ("a.tgz", "b.zip", "missing.zip"):
        with pytest.raises(DataError, match=name):
            unpack(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match="is empty"):
        unpack(tarred(tmp_path / "c.tgz", {}), tmp_path / "out")


CONTENT = bytes(range(256)) * 4000


class Serving(http.server.BaseHTTPRequestHandler):
    """Gives CONTENT, from where it is asked to; ``/short`` breaks off, ``/page`` is a web page, ``/whole`` knows no ranges."""

    asked: list[str]

    def do_GET(self) -> None:
        start = self.headers.get("Range", "")
        self.asked.append(f"{self.path} {start}".strip())
        if self.path == "/missing":
            self.send_error(404)
            return
        offset = int(start[6:-1]) if start and self.path != "/whole" else 0
        body = CONTENT[offset:]
        self.send_response(206 if offset else 200)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
        if self.path == "/short":
            body = body[:300_000]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address, what was asked)."""
    asked: list[str] = []
    handler = functools.partial(type("Handler", (Serving,), {"asked": asked}))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def published(*urls: str, sha256: str | None = None, size: int = len(CONTENT)) -> Download:
    return Download("data.bin", urls, size, sha256 or hashlib.sha256(CONTENT).hexdigest())


def test_a_download_goes_on_where_it_stopped(server: tuple[str, list[str]], tmp_path: Path) -> None:
    base, asked = server
    with pytest.raises(DataError, match="broke off at 300,000 of 1,024,000 bytes"):
        fetch(published(f"{base}/short"), tmp_path)
    assert not (tmp_path / "data.bin").exists()
    heard: list[tuple[int, int]] = []
    path = fetch(published(f"{base}/data"), tmp_path, lambda done, total: heard.append((done, total)))
    assert path.read_bytes() == CONTENT and heard[-1] == (len(CONTENT), len(CONTENT))
    assert asked == ["/short", "/data bytes=300000-"]
    fetch(published(f"{base}/data"), tmp_path)
    assert len(asked) == 2  # it is there
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin"]


def test_a_server_without_ranges_starts_again(server: tuple[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / ".data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(published(f"{server[0]}/whole"), tmp_path).read_bytes() == CONTENT


def test_downloads_that_are_wrong(server: tuple[str, list[str]], tmp_path: Path) -> None:
    base, _ = server
    for file, said in (
        (published(f"{base}/page"), "answers with a web page"),
        (published(f"{base}/missing"), "cannot be reached: HTTPError"),
        (published(f"{base}/data", sha256="0" * 64), "hash"),
        (published(f"{base}/data", size=1000), "more than the 1,000 bytes"),
        (published(), "no address is known"),
        (published("http://127.0.0.1:9/x"), "cannot be reached: ConnectionError"),
    ):
        with pytest.raises(DataError, match=said):
            fetch(file, tmp_path)
        assert not (tmp_path / "data.bin").exists()
        (tmp_path / ".data.bin.part").unlink(missing_ok=True)
    assert fetch(published(f"{base}/missing", f"{base}/data"), tmp_path).read_bytes() == CONTENT


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DMLBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


@pytest.fixture
def small_cub(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """CUB is whole with these images by class."""
    from dmlbench.datasets import cub

    monkeypatch.setitem(cub.COUNTS, "train", Counts(2, 1))
    monkeypatch.setitem(cub.COUNTS, "test", Counts(3, 2))
    return {1: 2, 101: 1, 102: 2}


def test_an_archive_or_a_folder_becomes_cub(root: Path, tmp_path: Path, small_cub: dict[int, int]) -> None:
    tree = cub_tree(tmp_path / "mine", small_cub)
    archive = packed(tree, tmp_path / "CUB_200_2011.tgz")
    assert prepare("cub", archive) == f"cub: unpacked into {root}/CUB_200_2011; train: 2 images, test: 3 images"
    assert [r.complete for r in verify("cub")] == [True, True] and verify("cub")[1].lonely == 1
    with pytest.raises(DataError, match="exists already; 'dmlbench datasets verify cub'"):
        prepare("cub", archive)
    shutil.rmtree(root / "CUB_200_2011")
    assert "is a link to" in prepare("cub", tree.parent)
    assert (root / "CUB_200_2011" / "images.txt").is_file()


def test_what_is_not_cub_is_refused(root: Path, tmp_path: Path, small_cub: dict[int, int]) -> None:
    with pytest.raises(DataError, match=r"is not data set 'cub': no image_class_labels\.txt in it"):
        prepare("cub", zipped(tmp_path / "a.zip", {"x/readme": b""}))
    with pytest.raises(DataError, match="is not data set 'cub'"):
        prepare("cub", class_tree(tmp_path / "other", 1, 1))
    with pytest.raises(DataError, match="does not exist"):
        prepare("cub", tmp_path / "nowhere")
    with pytest.raises(DataError, match="found 1 images of 1 classes where 2 images of 1 classes"):
        prepare("cub", cub_tree(tmp_path / "less", {1: 1, 101: 3}))
    assert not (root / "CUB_200_2011").exists()
    with pytest.raises(DataError, match=r"cannot be fetched by a program. Get car_ims.tgz and cars_annos.mat"):
        prepare("cars")
    with pytest.raises(UsageError, match="nothing to prepare"):
        prepare("digits")


def test_every_data_set_has_an_origin() -> None:
    from dmlbench.datasets import DATASETS

    assert set(ORIGINS) == {name for name, entry in DATASETS.items() if not entry.packaged}
    for origin in ORIGINS.values():
        assert origin.downloads or origin.manual
        assert all(len(d.sha256) == 64 and d.bytes > 0 for d in origin.downloads)


def test_a_download_becomes_a_data_set(
    root: Path,
    tmp_path: Path,
    small_cub: dict[int, int],
    server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = packed(cub_tree(tmp_path / "mine", small_cub), tmp_path / "CUB_200_2011.tgz").read_bytes()
    file = Download("CUB_200_2011.tgz", (f"{server[0]}/data",), len(archive), hashlib.sha256(archive).hexdigest())
    monkeypatch.setitem(preparing.ORIGINS, "cub", Origin("CUB_200_2011", ("image_class_labels.txt",), (file,)))
    monkeypatch.setitem(globals(), "CONTENT", archive)
    assert "unpacked into" in prepare("cub")


def test_files_that_are_read_as_published(root: Path, data_folder: Path) -> None:
    assert "copied into" in prepare("omniglot-small", data_folder)
    assert sorted(p.name for p in (root / "omniglot").iterdir()) == [
        "images_background_small1.zip",
        "images_background_small2.zip",
    ]
    with pytest.raises(UsageError, match="names the folder that holds them"):
        prepare("omniglot-small", data_folder / "omniglot" / "images_background_small1.zip")
    with pytest.raises(DataError, match=r"does not hold train-images-idx3-ubyte\.gz"):
        prepare("mnist", data_folder / "omniglot")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The shared real data, found before a test points DMLBENCH_DATA elsewhere."""
    from conftest import shared

    return shared()


def test_verify_lists_what_is_broken(root: Path, tmp_path: Path, small_cub: dict[int, int]) -> None:
    base = cub_tree(root, small_cub)
    broken = base / "images" / "102.Bird_102" / "Bird_102_0001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (base / "images" / "101.Bird_101" / "Bird_101_0000.jpg").unlink()
    train, test = verify("cub")
    assert train.complete and not test.complete
    assert [line.rpartition("/")[2].partition(":")[0] for line in test.broken] == [
        "Bird_101_0000.jpg",
        "Bird_102_0001.jpg",
    ]
    assert test.broken[0].endswith("file is missing")


def test_verify_and_prepare_as_typed(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    env = {"DMLBENCH_DATA": str(tmp_path / "data"), "DMLBENCH_CACHE": str(tmp_path / "cache")}
    archive = packed(class_tree(tmp_path / "mine", parts=("train", "test")), tmp_path / "mine.tgz")
    done: Ran = run("datasets", "prepare", f"folder:{tmp_path}/out", "--from", archive, env=env)
    assert done.out == f"unpacked into {tmp_path}/out: test, train\n"
    told = run("datasets", "verify", f"folder:{tmp_path}/out", "--json", env=env).json
    assert told["whole"] and [s["images"] for s in told["splits"]] == [12, 12]
    (tmp_path / "out" / "test" / "class0" / "000.png").write_bytes(b"")
    bad = run("datasets", "verify", f"folder:{tmp_path}/out", env=env, code=4)
    assert "class0/000.png: not an image" in bad.out and bad.err.endswith("is not whole\n")


@pytest.mark.parametrize(("top", "kept"), [("train", "train"), ("pictures", "class0")])
def test_a_single_top_folder_is_a_wrapping_unless_it_names_a_split(top: str, kept: str, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {f"{top}/class0/1.png": b"x", f"{top}/class1/1.png": b"x"})
    prepare(f"folder:{tmp_path / 'out'}", archive)
    assert (tmp_path / "out" / kept).is_dir()

"""Weights that are not in the package: folders, addresses, mirrors, and what comes in their place."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmlbench.checkpoints import File, checkpoint
from dmlbench.errors import DataError
from dmlbench.fetching import fetch, weights_path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A folder behind a local web server, and an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DMLBENCH_CHECKPOINT_BASE", raising=False)
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def weights(folder: Path, name: str = "m.safetensors") -> dict:
    save_file({"w": torch.arange(50.0)}, str(folder / name))
    content = (folder / name).read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_download_is_checked_and_kept(served, tmp_path: Path) -> None:
    address, folder = served
    file = File(url=f"{address}/m.safetensors", **weights(folder))
    path = fetch("m", file)
    assert path.read_bytes() == (folder / "m.safetensors").read_bytes() and tmp_path / "cache" in path.parents
    (folder / "m.safetensors").unlink()
    assert fetch("m", file) == path
    path.write_bytes(b"changed")
    with pytest.raises(DataError, match=f"{address}/m.safetensors cannot be reached"):
        fetch("m", file)
    assert list(path.parent.iterdir()) == []


def test_two_that_fetch_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of torchrun do with an empty cache: neither spoils what the other writes."""
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    facts = weights(tmp_path)
    both = threading.Barrier(2)

    class Together(Quiet):
        def do_GET(self) -> None:
            both.wait(10)
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Together, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        file = File(url=f"http://127.0.0.1:{server.server_port}/m.safetensors", **facts)
        try:
            with ThreadPoolExecutor(2) as pool:
                paths = list(pool.map(lambda _: fetch("m", file), range(2)))
        finally:
            server.shutdown()
            thread.join()
    assert paths[0] == paths[1] and paths[0].read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert list(paths[0].parent.iterdir()) == [paths[0]]


def test_a_cache_that_cannot_be_written_is_one_line(served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = served
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="DMLBENCH_CACHE names another"):
        fetch("m", File(url=f"{address}/m.safetensors", **weights(folder)))


def test_mirrors_in_order_and_every_trouble_told(served) -> None:
    address, folder = served
    facts = weights(folder)
    (folder / "page.html").write_text("<!DOCTYPE html><html>sign in</html>")
    (folder / "other.safetensors").write_bytes(b"x" * facts["bytes"])
    (folder / "long.safetensors").write_bytes(b"x" * (facts["bytes"] + 1))
    (folder / "short.safetensors").write_bytes(b"x")
    names = ("page.html", "other.safetensors", "long.safetensors", "short.safetensors", "missing.safetensors")
    bad = [f"{address}/{name}" for name in names]
    good = File(url=bad[0], mirrors=(*bad[1:], f"{address}/m.safetensors"), **facts)
    assert fetch("m", good).read_bytes() == (folder / "m.safetensors").read_bytes()
    with pytest.raises(DataError) as failed:
        fetch("n", File(url=bad[0], mirrors=tuple(bad[1:]), **facts))
    for said in (
        "web page",
        "hash",
        "more than",
        "broke off at 1 of",
        "missing.safetensors",
        "DMLBENCH_CHECKPOINT_BASE",
    ):
        assert said in str(failed.value)


def test_base_may_be_a_folder_or_an_address(served, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = served
    file = File(url="{base}/m.safetensors", **weights(folder))
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(folder))
    assert fetch("m", file) == folder / "m.safetensors"
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", address + "/")
    assert fetch("m", file).read_bytes() == (folder / "m.safetensors").read_bytes()


def test_nothing_is_fetched_without_a_hash_or_an_address() -> None:
    with pytest.raises(DataError, match="no sha256"):
        fetch("m", File(url="https://example.org/m"))
    entry = checkpoint("digits-smallcnn-triplet-none").model_copy(update={"files": (File(manual="ask the authors"),)})
    with pytest.raises(DataError, match="ask the authors"):
        weights_path("m", entry)

"""Weights that are not in the package: folders, addresses, mirrors, and what comes in their place."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from networks import clip_names
from safetensors.torch import save_file
from trees import cub_tree

from dmlbench.checkpoints import File, checkpoint, checkpoints
from dmlbench.datasets import cub
from dmlbench.datasets.base import Counts
from dmlbench.errors import DataError
from dmlbench.models import open_model, probe_images
from dmlbench.models.fetching import addresses, fetch, weights_path
from dmlbench.models.published import IMAGENET_MEAN, IMAGENET_STD

ROOT = Path(__file__).parents[1]


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
    path, said = fetch("m", file)
    assert (
        said == ()
        and path.read_bytes() == (folder / "m.safetensors").read_bytes()
        and tmp_path / "cache" in path.parents
    )
    (folder / "m.safetensors").unlink()
    assert fetch("m", file) == (path, ())
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
                paths = list(pool.map(lambda _: fetch("m", file)[0], range(2)))
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
    assert fetch("m", good)[0].read_bytes() == (folder / "m.safetensors").read_bytes()
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


def test_weights_of_an_own_registry_are_not_said_to_be_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(tmp_path / "own.json"))
    monkeypatch.delenv("DMLBENCH_CHECKPOINT_BASE", raising=False)
    monkeypatch.setattr("dmlbench.models.fetching._checkpoints", lambda: None)
    for url in ("{base}/mine.safetensors", ""):
        with pytest.raises(DataError, match="cannot be had: no address of them is known; add --weights FILE"):
            fetch("mine", File(url=url, sha256="0" * 64))


def test_base_may_be_a_folder_or_an_address(served, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = served
    file = File(url="{base}/m.safetensors", **weights(folder))
    blank = folder / "a folder"
    blank.mkdir()
    shutil.copy(folder / "m.safetensors", blank)
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", blank.as_uri())
    assert fetch("m", file) == (blank / "m.safetensors", ())
    for named in (str(folder), folder.as_uri()):
        monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", named)
        assert fetch("m", file) == (folder / "m.safetensors", ())
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", address + "/")
    assert fetch("m", file)[0].read_bytes() == (folder / "m.safetensors").read_bytes()


def test_a_base_without_the_file_leaves_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "dmlbench"
    (package.parent / "checkpoints").mkdir(parents=True)
    (package.parent / "checkpoints" / "m.safetensors").write_bytes(b"ours")
    monkeypatch.setattr("dmlbench.models.fetching.PACKAGE", package)
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(tmp_path / "other"))
    file = File(url="{base}/m.safetensors", sha256=hashlib.sha256(b"ours").hexdigest())
    assert fetch("m", file)[0] == package.parent / "checkpoints" / "m.safetensors"


def test_a_file_of_any_address_may_lie_in_the_base_if_a_hash_tells_it(served, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = served
    file = File(url=f"{address}/missing/m.safetensors", **weights(folder))
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(folder))
    assert fetch("m", file) == (folder / "m.safetensors", ())
    unknown = File(url=file.url, format="safetensors")
    assert list(addresses(unknown)) == [file.url]  # another's file may have the same name
    monkeypatch.delenv("DMLBENCH_CHECKPOINT_BASE")
    assert list(addresses(file)) == [file.url]


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Message, dict[str, str]]:
    """A package without a checkout around it, whose metadata and files of metadata are those that are returned."""
    monkeypatch.setattr("dmlbench.models.fetching.PACKAGE", tmp_path / "site-packages" / "dmlbench")
    links, files = Message(), dict[str, str]()
    found = SimpleNamespace(metadata=links, read_text=files.get)
    monkeypatch.setattr("dmlbench.models.fetching.distribution", lambda _: found)
    return links, files


@pytest.mark.parametrize(
    "name", [n for n, c in checkpoints().items() if any((f.url or "")[:1] == "{" and not f.mirrors for f in c.files)]
)
def test_an_installed_copy_fetches_from_its_source_or_says_which_file_it_lacks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DMLBENCH_CHECKPOINT_BASE", raising=False)
    links, origin = installed(tmp_path, monkeypatch)
    with pytest.raises(DataError) as failed:
        weights_path(name, checkpoint(name))
    said = str(failed.value)
    assert f"checkpoints/{name}.safetensors" in said and "--weights FILE" in said and "DMLBENCH_CHECKPOINT_BASE" in said
    links["Project-URL"] = "Issues, https://example.org/dmlbench/issues"
    links["Project-URL"] = "Source, https://example.org/dmlbench"
    expected = [f"https://example.org/dmlbench/raw/HEAD/checkpoints/{name}.safetensors"]
    assert list(addresses(checkpoint(name).files[0])) == expected
    checkout = tmp_path / "a checkout"
    origin["direct_url.json"] = json.dumps({"url": checkout.as_uri(), "dir_info": {}})
    assert list(addresses(checkpoint(name).files[0])) == expected  # it is gone
    checkout.mkdir()
    (checkout / "checkpoints").symlink_to(ROOT / "checkpoints")
    assert weights_path(name, checkpoint(name))[0] == checkout / "checkpoints" / f"{name}.safetensors"
    origin["direct_url.json"] = json.dumps({"url": "https://example.org/dmlbench.git", "vcs_info": {"vcs": "git"}})
    assert list(addresses(checkpoint(name).files[0])) == expected


def test_a_file_that_another_publishes_is_not_said_to_be_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(tmp_path))
    with pytest.raises(DataError) as failed:
        fetch("m", File(url="{base}/m.pt", mirrors=(str(tmp_path / "n.pt"),), manual="inside the wheel of another"))
    assert "inside the wheel of another" in str(failed.value) and "repository" not in str(failed.value)


def test_hashes_of_any_kind_and_length(served) -> None:
    """torchvision, timm and open_clip put eight digits of sha256 into names, OML publishes six of md5."""
    address, folder = served
    content = (folder / weights_name(folder)).read_bytes()
    sha256, md5 = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    for right in (f"sha256:{sha256[:8]}", f"sha256:{sha256}", f"md5:{md5[:6]}", f"md5:{md5}"):
        path, said = fetch(right[-9:-1], File(url=f"{address}/m.safetensors", hash=right))
        assert path.read_bytes() == content and sha256 in said[0] and right in said[0]
    for wrong in ("sha256:00000000", "md5:000000"):
        with pytest.raises(DataError, match=wrong.partition(":")[0]):
            fetch("w", File(url=f"{address}/m.safetensors", hash=wrong))
    for nonsense in ("f37072fd", "sha1:123456", "md5:12", f"md5:{'0' * 33}", "sha256:XYZXYZ"):
        with pytest.raises(ValueError, match="hash"):
            File(hash=nonsense)


def weights_name(folder: Path) -> str:
    weights(folder)
    return "m.safetensors"


def test_a_file_without_a_hash_is_trusted_once(served, tmp_path: Path) -> None:
    """The first copy counts: it is said, kept in mind, and another one later is refused."""
    address, folder = served
    facts = weights(folder)
    file = File(url=f"{address}/m.safetensors")
    path, said = fetch("m", file)
    assert facts["sha256"] in said[0] and "no hash of it is published" in said[0]
    assert fetch("m", file) == (path, ())
    path.unlink()
    assert fetch("m", file) == (path, ())  # again the same
    path.unlink()
    save_file({"w": torch.zeros(50)}, str(folder / "m.safetensors"))
    with pytest.raises(DataError, match="hash"):
        fetch("m", file)
    path.write_bytes(b"changed here")
    with pytest.raises(DataError):
        fetch("m", file)
    short = File(url=f"{address}/cut.safetensors")
    (folder / "cut.safetensors").write_bytes(b"x" * 10)
    assert fetch("n", short)[0].read_bytes() == b"x" * 10


def test_nothing_is_fetched_without_an_address() -> None:
    entry = checkpoint("digits-smallcnn-triplet-none").model_copy(update={"files": (File(manual="ask the authors"),)})
    with pytest.raises(DataError, match="ask the authors"):
        weights_path("m", entry)


def test_one_command_fetches_and_measures_a_published_model(
    served, typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``evaluate --model oml-vits16-cub --dataset cub``, the file from an address; one block deep, on a small CUB."""
    address, folder = served
    monkeypatch.setitem(cub.COUNTS, "test", Counts(4, 2))
    cub_tree(tmp_path / "data", {1: 2, 101: 2, 102: 2})
    entry = checkpoint("oml-vits16-cub").model_dump(mode="json")
    entry["arch"] |= {"kwargs": {"depth": 1}, "n_params": None}
    network = timm.create_model(entry["arch"]["builder"][5:], num_classes=0, depth=1)
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, folder / "m.ckpt")
    md5 = hashlib.md5((folder / "m.ckpt").read_bytes()).hexdigest()
    entry["files"] = [{"url": f"{address}/m.ckpt", "hash": f"md5:{md5[:6]}", "format": "torch"}]
    (tmp_path / "c.json").write_text(json.dumps({"schema_version": 1, "checkpoints": {"oml-vits16-cub": entry}}))
    env = {"DMLBENCH_CHECKPOINTS": str(tmp_path / "c.json"), "DMLBENCH_DATA": str(tmp_path / "data")}
    command = ["evaluate", "--model", "oml-vits16-cub", "--dataset", "cub", "--attacks", "GTT@fgsm"]
    done = typed(*command, env=env)
    assert "oml-vits16-cub on cub (test): 4 queries" in done.out and f"only md5:{md5[:6]}" in done.err
    assert "trusted" not in typed(*command, env=env).err  # kept, and the same


def test_a_published_model_by_its_id_alone(served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OML's layout: names behind a prefix, the loss's weight beside them, pictures padded with white."""
    address, folder = served
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {f"model.{k}": v.half() for k, v in network.state_dict().items()} | {
        "criterion.weight": torch.zeros(3, 192)
    }
    torch.save({"state_dict": state}, folder / "vits16_cub.ckpt")
    md5 = hashlib.md5((folder / "vits16_cub.ckpt").read_bytes()).hexdigest()
    entry = checkpoint("oml-vits16-cub").model_dump(mode="json")
    entry["arch"] = {
        **entry["arch"],
        "builder": "timm:vit_tiny_patch16_224",
        "embed_dim": 192,
    }  # smaller, else the same
    entry["files"] = [{"url": f"{address}/vits16_cub.ckpt", "hash": f"md5:{md5[:6]}", "format": "torch"}]
    (tmp_path / "c.json").write_text(json.dumps({"schema_version": 1, "checkpoints": {"oml-vits16-cub": entry}}))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(tmp_path / "c.json"))
    embedder = open_model("oml-vits16-cub")
    assert embedder.distance.space == "E" and embedder.card is not None and embedder.card.dataset.name == "cub"
    assert (embedder.preprocess.longest, embedder.preprocess.pad, embedder.preprocess.size) == (224, 255, (224, 224))
    assert any("trusted on first use" in note for note in embedder.notes)
    images = probe_images((3, 224, 224), 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = network.half().float().eval()((images - mean) / std)
    torch.testing.assert_close(embedder(images), expected)


def of_openai(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The vision half alone, as fine-tuned encoders are saved."""
    named = clip_names(network)
    return {k.removeprefix("visual."): v for k, v in named.items() if k.startswith("visual.")}


def of_dinov2(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = network.state_dict()
    return {**state, "mask_token": torch.zeros(1, state["pos_embed"].shape[-1])}


def as_it_is(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return network.state_dict()


@pytest.mark.parametrize(
    ("name", "layout", "made"),
    [
        ("fare2-vitl14", of_openai, {}),
        ("tecoa4-vitl14", of_openai, {}),
        ("openclip-vitb32-laion2b-e16", clip_names, {}),
        ("clip-vitb32-openai", as_it_is, {}),
        ("siglip-vitb16", as_it_is, {}),
        ("dino-vits16", as_it_is, {}),
        ("dinov2-vits14", of_dinov2, {"img_size": 518}),
        ("dinov2-vitl14-reg", of_dinov2, {"img_size": 518}),
    ],
)
def test_each_family_in_the_layout_that_its_authors_publish(
    name: str, layout, made: dict, served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One block deep, else as the record says; the file from the address; the same as timm's network of these weights."""
    address, folder = served
    entry = checkpoint(name).model_dump(mode="json")
    kwargs = {**entry["arch"]["kwargs"], "depth": 1}
    width = entry["arch"]["embed_dim"] if entry["arch"]["head"] else 0
    torch.manual_seed(5)
    network = timm.create_model(entry["arch"]["builder"][5:], num_classes=width, **{**kwargs, **made}).eval()
    if width:
        torch.nn.init.zeros_(network.head.bias)
    content = layout(network)
    if entry["files"][0].get("format") == "torch":
        torch.save(content, folder / "m")
    else:
        save_file({k: v.contiguous() for k, v in content.items()}, str(folder / "m"))
    entry["arch"] |= {"kwargs": kwargs, "n_params": None}
    entry["files"] = [{"url": f"{address}/m", "format": entry["files"][0]["format"]}]
    (tmp_path / "c.json").write_text(json.dumps({"schema_version": 1, "checkpoints": {name: entry}}))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(tmp_path / "c.json"))
    embedder = open_model(name)
    images = probe_images(embedder.input_shape, 1)
    if made:  # timm's own resizing of the position embeddings
        smaller = timm.create_model(entry["arch"]["builder"][5:], num_classes=0, **kwargs).eval()
        state = timm.models.vision_transformer.checkpoint_filter_fn(network.state_dict(), smaller)
        smaller.load_state_dict(state)
        network = smaller
    mean, std = (torch.tensor(entry["normalize"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network((images - mean) / std))
    torch.testing.assert_close(embedder(images), expected, rtol=1e-4, atol=1e-5)
    assert embedder.card is not None and expected.shape[1] == entry["arch"]["embed_dim"]

"""The registry's models of other people: each entry builds as it says, and the files at hand give the stated numbers."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image

from dmlbench.checkpoints import Checkpoint, checkpoints, packaged
from dmlbench.errors import DataError, UsageError
from dmlbench.models import ModelOptions, build, build_network, open_model, parameter_count, probe_images
from dmlbench.models.inspection import width_of

REAL = [name for name, c in checkpoints().items() if not c.train.command and c.files and not c.files[0].path]
CLAIMS = {"oml-vits16-cub": 83.7, "oml-vits16-sop": 86.6, "proxyanchor-cars-r50": 87.7, "dino-vits16": 62.7}


def test_the_models_that_people_know_are_there() -> None:
    for family in ("oml-vits16", "unicom", "dino-", "dinov2", "clip", "siglip", "tv-", "fare", "tecoa", "rclip"):
        assert any(name.startswith(family) for name in REAL), family
    for name in REAL:
        entry = checkpoints()[name]
        assert entry.paper is not None and entry.paper.url and entry.license, name
        assert all(f.sha256 or f.hash or f.url or f.manual for f in entry.files), name
    for name, value in CLAIMS.items():
        assert value in [c.value for c in checkpoints()[name].claims if c.metric == "recall_at_1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_an_entry_builds_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = checkpoints()[name]
    with torch.device("meta"):
        embedder = build(entry, name)
    assert entry.arch.n_params in (None, parameter_count(embedder.network))
    assert width_of(embedder.network, embedder.input_shape) == entry.arch.embed_dim


def test_an_address_of_the_hub_or_of_a_release_names_its_hash() -> None:
    """The digits that torchvision, timm and open_clip put into names are those that are checked."""
    for name in REAL:
        for file in checkpoints()[name].files:
            if file.hash and file.hash.startswith("sha256:"):
                assert file.url is not None and f"-{file.hash.removeprefix('sha256:')}.pth" in file.url, name


@pytest.mark.slow
def test_mobilefacenet_gives_its_recall_on_lfw() -> None:
    """R@1 97.8 on the first 200 people, at most five pictures each; 96.7 is stated for 932 pictures of 200 people, without which."""
    weights = shared("weights", "mobilefacenet-068.ckpt")
    embedder = open_model("mobilefacenet", ModelOptions(weights=str(weights))).frozen()
    with zipfile.ZipFile(shared("lfw-4plus.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        by_person: dict[str, list[str]] = {}
        for name in names:
            by_person.setdefault(name.split("/")[-2], []).append(name)
        chosen = [(i, name) for i, person in enumerate(sorted(by_person)[:200]) for name in by_person[person][:5]]
        pixels = np.stack([embedder.preprocess(Image.open(io.BytesIO(archive.read(name)))) for _, name in chosen])
    labels = torch.tensor([i for i, _ in chosen])
    with torch.no_grad():
        embeddings = torch.cat([embedder(torch.from_numpy(p).float() / 255) for p in np.array_split(pixels, 15)])
    likeness = (embeddings @ embeddings.t()).fill_diagonal_(-2)
    assert len(chosen) == 928
    assert 100 * float((labels[likeness.argmax(1)] == labels).float().mean()) == pytest.approx(97.8, abs=0.2)


def test_osnet_loads_whole_by_its_id_and_by_its_layout() -> None:
    weights = str(shared("weights", "osnet_x0_25_msmt17_statedict.pt"))
    named, recognised = open_model("osnet-x0_25-msmt17", ModelOptions(weights=weights)), open_model(weights)
    images = probe_images((3, 256, 128), 2)
    assert recognised.arch == "osnet-x0_25" and named.distance == recognised.distance
    assert named.preprocess == recognised.preprocess and named(images).shape == (2, 512)
    torch.testing.assert_close(named(images), recognised(images))


def test_the_public_mobilenet_v2_loads_whole() -> None:
    weights = str(shared("weights", "mobilenetv2_imagenet.pt"))
    doors = [open_model(weights), open_model("torchvision:mobilenet_v2", ModelOptions(weights=weights))]
    images = probe_images((3, 224, 224), 1)
    assert doors[0](images).shape == (1, 1280) and not any("not used" in note for note in doors[0].notes)
    torch.testing.assert_close(doors[0](images), doors[1](images))


def test_onnx_is_named_for_what_it_is() -> None:
    with pytest.raises(DataError, match="it is an ONNX graph"):
        open_model(str(shared("weights", "osnet_x0_25_msmt17.onnx")))


def test_the_list_says_what_a_person_looks_for(typed) -> None:
    text = typed("models", "list", env={"COLUMNS": "80"}).out
    lines = text.splitlines()
    assert lines[0].split() == ["id", "family", "size", "claimed", "measured"]
    assert all(len(line) <= 80 for line in lines) and len(lines) > 60
    section = lines[lines.index("trained on cub:") :]
    row = next(line for line in section if line.startswith("oml-vits16-cub"))
    assert row.split() == ["oml-vits16-cub", "ViT-S/16", "22M", "83.7"]
    ours = next(line for line in lines if line.startswith("digits-smallcnn-triplet-none")).split()
    assert ours[1:3] == ["smallcnn", "40k"] and float(ours[3]) == 88.8
    assert "mnist-conv3-triplet-act " not in text and "mnist-conv3-triplet-act " in typed("models", "list", "--all").out
    assert {i["trained on"] for i in typed("models", "list", "--trained-on", "cars", "--json").json} == {"cars"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("resnet50", "timm:resnet50"), ("vit_b_16", "torchvision:vit_b_16"), ("googlenet", "torchvision:")],
)
def test_a_name_of_a_library_is_understood(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}"):
        open_model(name)


def test_a_spec_says_all_that_a_record_can(tmp_path: Path) -> None:
    """Longest side and padding, a box, squash, BGR of 0 to 255."""
    network = build_network("conv3", kwargs={"channels": 3, "embed_dim": 8}).network
    torch.save(network.state_dict(), tmp_path / "x.pt")
    arch = {"builder": "conv3", "kwargs": {"channels": 3, "embed_dim": 8}, "embed_dim": 8}
    caffe = {"mean": [104.0, 117.0, 128.0], "std": [1.0, 1.0, 1.0], "scale": 255}
    images = probe_images((3, 28, 28), 2)
    for given, expected in (
        ({"size": 28, "resize": 28, "resize_longest_side": True, "pad": 9}, {"longest": 28, "pad": 9}),
        ({"size": 28, "squash": True, "order": "bgr"}, {"resize": None, "order": "bgr"}),
        ({"size": [28, 28], "box": [1, 2, 30, 40]}, {"box": (1, 2, 30, 40)}),
        ({"size": 28, "resize": 30, "resize_shorter_side": True}, {"shorter": 30}),
    ):
        (tmp_path / "s.json").write_text(
            json.dumps({"arch": arch, "input": {"channels": 3, **given}, "normalize": caffe})
        )
        embedder = open_model(str(tmp_path / "x.pt"), ModelOptions(spec=tmp_path / "s.json"))
        assert {k: getattr(embedder.preprocess, k) for k in expected} == expected
        fed = images * 255 - torch.tensor(caffe["mean"]).view(1, 3, 1, 1)
        torch.testing.assert_close(embedder.normalise(images), fed, rtol=1e-4, atol=1e-3)
    with pytest.raises(UsageError, match="--scale 255"):
        ModelOptions(mean=(104.0, 117.0, 128.0))
    for wrong in ({"squash": True, "resize": 30}, {"resize_shorter_side": True}):
        with pytest.raises(ValueError):
            Checkpoint.model_validate(
                {**next(iter(checkpoints().values())).model_dump(), "input": {"size": 28, "channels": 3, **wrong}}
            )


def test_the_registry_is_written_in_one_way() -> None:
    text = packaged("checkpoints.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert list(content["checkpoints"]) == sorted(content["checkpoints"])
    assert text == json.dumps(content, indent=2, ensure_ascii=False) + "\n"

"""The registry's models of other people: each entry builds as it says, and the files at hand give the stated numbers."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import shared
from PIL import Image

from dmlbench.checkpoints import Checkpoint, checkpoints, packaged
from dmlbench.errors import DataError, UsageError
from dmlbench.models import ModelOptions, build, build_network, open_model, parameter_count, probe_images
from dmlbench.models.inspection import width_of
from dmlbench.results import json_bytes

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
    elsewhere = next(line for line in lines if line.startswith("mobilefacenet")).split()
    assert elsewhere[:3] == ["mobilefacenet", "mobilefacenet", "1.0M"] and float(elsewhere[3].removesuffix("*")) > 95
    assert lines[-2].startswith("* claimed on ") and "measured on grocery or lfw" in lines[-2]
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
    assert text.encode() == json_bytes(content)


def scattered(shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Seeded values in place of a network's tensors, variances above zero."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name, tensor in shapes.items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * 0.05
            tensor = values.abs() + 0.5 if name.endswith("running_var") else values + name.endswith("bn3.weight")
        out[name] = tensor
    return out


def test_a_file_of_mocos_gives_its_query_encoders_features(tmp_path: Path) -> None:
    """`state_dict` with both encoders, each with the two layers of its projection head, and the queue."""
    body = scattered({k: v for k, v in torchvision.models.resnet50().state_dict().items() if not k.startswith("fc.")})
    layers = {"fc.0.weight": (2048, 2048), "fc.0.bias": (2048,), "fc.2.weight": (128, 2048), "fc.2.bias": (128,)}
    head = {name: torch.zeros(shape) for name, shape in layers.items()}
    held = {f"module.encoder_q.{k}": v for k, v in {**body, **head}.items()}
    other = {k: v + 1 if v.is_floating_point() else v for k, v in held.items()}
    both = held | {k.replace("encoder_q", "encoder_k"): v for k, v in other.items()}
    both |= {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    record = checkpoints()["moco-v2-r50"].model_dump(mode="json", exclude_defaults=True)
    record["files"] = [{"manual": "by hand", "format": "torch"}]  # whose md5 no file of ours can have
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"moco-v2-r50": record}))
    plain = torchvision.models.resnet50()
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(body)
    images = probe_images((3, 224, 224), 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(plain.eval()((images - mean) / std), dim=1)
        for name, tensors in (("q", held), ("both", both)):
            path = tmp_path / f"{name}.pth.tar"
            torch.save({"epoch": 800, "arch": "resnet50", "state_dict": tensors}, path)
            embedder = open_model(str(path), ModelOptions(spec=spec))
            torch.testing.assert_close(embedder(images), expected)
    with pytest.raises(DataError, match="is not the file registered"):
        open_model("moco-v2-r50", ModelOptions(weights=str(path)))


def iresnet(tensors: dict[str, torch.Tensor], x: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """IResNet's function written out from a file's tensors."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = [tensors[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        weight, bias, mean, var = (part.view(shape) for part in parts)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def steep(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.where(x > 0, x, x * tensors[f"{name}.weight"].view(1, -1, 1, 1))

    def conv(x: torch.Tensor, name: str, stride: int, pad: int = 1) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, tensors[f"{name}.weight"], None, stride, pad)

    x = steep(norm(conv(x, "conv1", 1), "bn1"), "prelu")
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            y = steep(norm(conv(norm(x, f"{at}.bn1"), f"{at}.conv1", 1), f"{at}.bn2"), f"{at}.prelu")
            y = norm(conv(y, f"{at}.conv2", stride), f"{at}.bn3")
            if i == 0:
                x = norm(conv(x, f"{at}.downsample.0", 2, 0), f"{at}.downsample.1")
            x = x + y
    x = norm(x, "bn2").flatten(1) @ tensors["fc.weight"].t() + tensors["fc.bias"]
    return norm(x, "features")


def test_a_file_of_arcfaces_is_its_own_layout(tmp_path: Path) -> None:
    """The names of arcface_torch's backbone.pth, of 18 layers; 50 layers do not take it."""
    network = build_network("iresnet18").network
    tensors = scattered(network.state_dict())
    torch.save({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "backbone.pth")
    embedder = open_model(str(tmp_path / "backbone.pth"), ModelOptions())
    assert embedder.arch == "iresnet18" and embedder.distance.space == "C" and embedder.input_shape == (3, 112, 112)
    images = probe_images((3, 112, 112), 2)
    with torch.no_grad():
        expected = iresnet(tensors, (images - 0.5) / 0.5, (2, 2, 2, 2))
    torch.testing.assert_close(embedder(images), torch.nn.functional.normalize(expected, dim=1), atol=1e-4, rtol=1e-3)
    with torch.device("meta"):
        names = {name: build_network(name).network.state_dict().keys() for name in ("iresnet18", "iresnet50")}
    assert "layer3.13.conv2.weight" in names["iresnet50"] and "layer3.14.conv2.weight" not in names["iresnet50"]
    assert "downsample.1.running_var" in " ".join(names["iresnet18"])
    with pytest.raises(DataError, match=r"layer1\.2"):
        open_model("arcface-r50-ms1mv3", ModelOptions(weights=str(tmp_path / "backbone.pth")))

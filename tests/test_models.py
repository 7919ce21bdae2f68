"""Every way to name a model, the files people have, and models that misbehave."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import lightning, resnet18_of_robrank, seeded
from torch import Tensor, nn

from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.models import ModelOptions, load_model, open_model, probe_images, read_file, write_weights
from dmlbench.models.architectures import IMAGENET_MEAN, IMAGENET_STD, build_network, c2f2, conv3, smallcnn
from dmlbench.models.inspection import CANDIDATES, best_fit, describe, fits
from dmlbench.models.spec import Spec
from dmlbench.models.weights import strip


def mnasnet_of_robrank() -> nn.Module:
    network = torchvision.models.mnasnet1_0()
    network.classifier = nn.Linear(1280, 512)
    return seeded(network)


@pytest.mark.parametrize(
    ("make", "size", "arch"),
    [
        (resnet18_of_robrank, 224, "torchvision:resnet18"),
        (mnasnet_of_robrank, 224, "torchvision:mnasnet1_0"),
        (lambda: seeded(c2f2()), 28, "c2f2"),
    ],
)
def test_a_robrank_checkpoint_loads(make, size: int, arch: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = make()
    path = lightning(tmp_path / "epoch=7-step=368.ckpt", network, **{"_centers": torch.zeros(3, 512)})
    embedder = open_model(str(path))
    assert embedder.arch == arch and embedder.input_shape == (1 if size == 28 else 3, size, size)
    assert any("prefix 'backbone.' removed" in note for note in embedder.notes)
    assert any("not used: _centers" in note for note in embedder.notes)
    images = probe_images(embedder.input_shape, 2)
    if size == 224:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        expected = network((images - mean) / std)
    else:
        expected = network(images)
    torch.testing.assert_close(embedder(images), nn.functional.normalize(expected, dim=1))
    assert embedder.preprocess.resize == ((256, 256) if size == 224 else None)


def test_lightning_files_are_described(tmp_path: Path) -> None:
    file = read_file(lightning(tmp_path / "last.ckpt", seeded(c2f2())))
    assert (file.format, file.key) == ("lightning", "state_dict")
    assert file.content["epoch"] == 7 and set(file.tensors) == {f"backbone.{k}" for k in c2f2().state_dict()}


class _Harmful:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.mkdir, ("harm-was-done",))


def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": _Harmful()}, "bad.pth")
    with pytest.raises(DataError, match=r"holds posix.mkdir, which would run code"):
        read_file(Path("bad.pth"))
    torch.save(smallcnn(), "whole.pth")
    with pytest.raises(DataError, match=r"holds torch.nn.modules.container.Sequential, which would run code"):
        read_file(Path("whole.pth"))
    Path("pickle.pth").write_bytes(pickle.dumps({"x": _Harmful()}))
    with pytest.raises(DataError, match=r"pickle\.pth"):
        read_file(Path("pickle.pth"))
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"<!DOCTYPE html><html>Sign in", "is a web page"),
        (b"PK\x03\x04 half of a zip", "truncated"),
    ],
)
def test_files_that_are_no_weights(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_file(path)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "none.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    facts = describe(read_file(tmp_path / "none.safetensors"))
    assert (facts["tensors"], facts["first"], facts["last"]) == (0, None, None)


def test_a_truncated_file(tmp_path: Path) -> None:
    torch.save(smallcnn().state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    write_weights(tmp_path / "a.safetensors", smallcnn())
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(DataError, match=name):
            read_file(tmp_path / name)


def test_where_the_state_dictionary_is(tmp_path: Path) -> None:
    state = smallcnn().state_dict()
    for key in ("state_dict", "model_state_dict", "model", "net"):
        torch.save({"epoch": 3, key: state}, tmp_path / "a.pth")
        assert read_file(tmp_path / "a.pth").key == key
    torch.save({"epoch": 3, "ema": {"shadow": state}}, tmp_path / "a.pth")
    assert set(read_file(tmp_path / "a.pth", "ema.shadow").tensors) == set(state)
    assert read_file(tmp_path / "a.pth").key == "ema.shadow"  # the only one
    with pytest.raises(UsageError, match=r"'emma': no tensors there .* it has epoch, ema"):
        read_file(tmp_path / "a.pth", "emma")
    torch.save({"epoch": 3, "left": state, "right": state}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="--checkpoint-key; it has left, right"):
        read_file(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(DataError, match="holds a list"):
        read_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("prefix", "stays"),
    [
        ("", ""),
        ("module.", "module."),
        ("backbone.", "backbone."),
        ("module.model.", "module.model."),
        ("_orig_mod.module.", ""),
        ("model.backbone.", "model.backbone."),
    ],
)
def test_prefixes(prefix: str, stays: str) -> None:
    state = smallcnn().state_dict()
    dressed = {prefix + k: v for k, v in state.items()} | {"criterion.proxies": torch.zeros(2)}
    found, plain = strip(dressed, state)
    assert found == stays and {k: v for k, v in plain.items() if k != "criterion.proxies"}.keys() == state.keys()


def test_a_users_pth_on_a_timm_network(tmp_path: Path) -> None:
    network = seeded(timm.create_model("test_resnet", num_classes=64))
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "mine.pth")
    embedder = open_model("timm:test_resnet", ModelOptions(weights=str(tmp_path / "mine.pth"), input_size=(64, 64)))
    assert embedder.input_shape == (3, 64, 64) and embedder.weights_sha256
    assert any("last layer (fc, 64 values) is the embedding" in note for note in embedder.notes)
    images = probe_images((3, 64, 64), 2)
    torch.testing.assert_close(embedder(images), nn.functional.normalize(network((images - 0.5) / 0.5)))
    features = open_model("timm:test_resnet", ModelOptions(weights=str(tmp_path / "mine.pth"), embed_dim=0))
    assert features(probe_images((3, 160, 160), 1)).shape == (1, 96)
    assert any("not used: module.fc.weight, module.fc.bias" in note for note in features.notes)
    with pytest.raises(DataError, match=r"other shape: fc.weight \(64, 96\) instead of \(32, 96\)"):
        open_model("timm:test_resnet", ModelOptions(weights=str(tmp_path / "mine.pth"), embed_dim=32))
    with pytest.raises(DataError, match=r"missing conv1\.weight"):
        open_model("torchvision:resnet18", ModelOptions(weights=str(tmp_path / "mine.pth")))
    deeper = network.state_dict() | {"layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)}
    torch.save(deeper, tmp_path / "deeper.pth")
    with pytest.raises(DataError, match=r"does not fit the architecture: unexpected layer1.2.conv1.weight"):
        open_model("timm:test_resnet", ModelOptions(weights=str(tmp_path / "deeper.pth")))


@pytest.mark.parametrize(
    "name", ["timm:vit_tiny_patch16_224", "torchvision:mobilenet_v2", "torchvision:vgg11", "timm:convnext_atto"]
)
def test_heads_of_other_networks(name: str) -> None:
    with torch.device("meta"):
        for dim in (0, 24):
            made = build_network(name, embed_dim=dim).network
            out = made.eval()(torch.zeros(1, 3, 224, 224))
            assert out.shape[1] == (dim or {"vgg11": 4096}.get(name[12:], out.shape[1])) and out.shape[1] != 1000


def test_an_untrained_network_is_the_same_each_time() -> None:
    one, two = (open_model("timm:test_resnet", ModelOptions(embed_dim=8, input_size=(32, 32))) for _ in range(2))
    images = probe_images((3, 32, 32), 2)
    torch.testing.assert_close(one(images), two(images), rtol=0, atol=0)
    assert "untrained" in one.notes[0]


def test_spec(tmp_path: Path) -> None:
    network = seeded(conv3(embed_dim=16))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    spec = {
        "arch": {"builder": "conv3", "kwargs": {"embed_dim": 16}, "embed_dim": 16},
        "input": {"size": 28, "channels": 1},
        "normalize": {"mean": [0.5], "std": [0.25]},
        "embedding": {"normalized": False},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    embedder = open_model(str(tmp_path / "net.pt"), ModelOptions(spec=tmp_path / "spec.json"))
    images = probe_images((1, 28, 28), 2)
    torch.testing.assert_close(embedder(images), network((images - 0.5) / 0.25))
    assert embedder.distance.space == "E" and re.fullmatch(r"net-[0-9a-f]{8}", embedder.name)
    changed = open_model(
        str(tmp_path / "net.pt"), ModelOptions(spec=tmp_path / "spec.json", normalize=True, mean=(0.0,), std=(1.0,))
    )
    torch.testing.assert_close(changed(images), nn.functional.normalize(network(images)))
    for change, said in (
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"normalize": {"std": [0.0]}}, "std must be above zero"),
        ({"arch": {"builder": "conv4", "embed_dim": 16}}, "did you mean 'conv3'"),
        ({"arch": {"builder": "conv3", "kwargs": {"deep": 1}, "embed_dim": 16}}, "does not take these arguments"),
        ({"arch": {**spec["arch"], "embed_dim": 17}}, "says embed_dim 17, the network gives 16"),
        (
            {"arch": {"builder": "conv3", "kwargs": {"width": 10**5}, "embed_dim": 16}},
            "is too large: at most 2000000000",
        ),
        ({"arch": {"builder": "timm:resnet18", "kwargs": {"block": "x"}, "embed_dim": 16}}, "AttributeError"),
        ({"arch": {"builder": "timm:resnet18", "kwargs": {"act_layer": "x"}, "embed_dim": 16}}, "KeyError: 'x'"),
        (
            {"arch": {"builder": "timm:resnet18", "kwargs": {"checkpoint_path": "/etc/passwd"}, "embed_dim": 16}},
            "is not given 'checkpoint_path'",
        ),
    ):
        (tmp_path / "spec.json").write_text(json.dumps(spec | change))
        with pytest.raises((DataError, UsageError), match=said):
            open_model(str(tmp_path / "net.pt"), ModelOptions(spec=tmp_path / "spec.json"))
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(DataError, match=r"spec .* cannot be read"):
        open_model(str(tmp_path / "net.pt"), ModelOptions(spec=tmp_path / "spec.json"))


def test_own_nets_are_recognised(tmp_path: Path) -> None:
    for network, name in ((smallcnn(embed_dim=24), "smallcnn"), (conv3(width=8), "conv3"), (c2f2(embed_dim=7), "c2f2")):
        write_weights(tmp_path / "a.safetensors", seeded(network))
        fit = best_fit(read_file(tmp_path / "a.safetensors"))
        assert fit is not None and fit.builder == name
        embedder = open_model(str(tmp_path / "a.safetensors"))
        images = probe_images(embedder.input_shape, 2)
        torch.testing.assert_close(embedder(images), nn.functional.normalize(network(images)))


def test_what_nearly_fits_is_listed(tmp_path: Path) -> None:
    state = resnet18_of_robrank().state_dict()
    del state["layer4.1.bn2.bias"]
    torch.save(state, tmp_path / "a.pth")
    best = fits(read_file(tmp_path / "a.pth"))[0]
    assert best.builder == "torchvision:resnet18" and best.missing == ("layer4.1.bn2.bias",) and best.embed_dim == 512
    with pytest.raises(UsageError, match="no known architecture fits"):
        open_model(str(tmp_path / "a.pth"))


@pytest.mark.slow
def test_candidates_have_their_telling_names() -> None:
    with torch.device("meta"):
        for builder, telling in CANDIDATES.items():
            assert telling in build_network(builder).network.state_dict(), builder


FACTORY = """
import timm
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)
        torch.nn.init.constant_(self.layer.weight, 0.1)
    def forward(self, x):
        return self.layer(x.flatten(1))
def make():
    net = Net()
    net.input_shape = (3, 2, 2)
    return net
def fails():
    raise RuntimeError("no such dataset")
def shaped(shape):
    net = Net()
    net.input_shape = shape
    return net
def flat():
    return shaped((3, 32))
def text():
    return shaped("abc")
def zero():
    return shaped((3, 0, 2))
number = 3
def none():
    return None
"""


def test_a_users_own_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    where = f"python:{tmp_path / 'mine.py'}"
    embedder = open_model(f"{where}:make", ModelOptions(name="mine"))
    assert embedder.input_shape == (3, 2, 2) and embedder.name == "mine"
    assert "is your own code and was run" in embedder.notes[0]
    for name, said in (
        ("mkae", "has no function 'mkae'"),
        ("number", "is of type int, not a function"),
        ("fails", "failed: RuntimeError: no such dataset"),
        ("none", "gave a NoneType"),
        ("flat", r"input_shape \(3, 32\) is not \(channels, height, width\)"),
        ("text", "input_shape 'abc' is not"),
        ("zero", r"input_shape \(3, 0, 2\) is not"),
    ):
        with pytest.raises((UsageError, DataError), match=said):
            open_model(f"{where}:{name}")
    with pytest.raises(UsageError, match="is not a file"):
        open_model("python:/nowhere/x.py:make")
    with pytest.raises(DataError, match="ModuleNotFoundError"):
        open_model("python:no_such_module_here:make")
    with pytest.raises(UsageError, match="needs a module or file and a name"):
        open_model("python:make")


def test_no_option_of_ones_own_code_is_passed_over(tmp_path: Path) -> None:
    """--head works there; what the function has decided is no option."""
    body = dict(timm.create_model("test_resnet", num_classes=0).state_dict())
    torch.save({**body, "emb.weight": torch.rand(7, 96), "emb.bias": torch.rand(7)}, tmp_path / "x.pth")
    (tmp_path / "own.py").write_text(
        "import timm\nfrom dmlbench import Embedder\n"
        "def net():\n    net = timm.create_model('test_resnet', num_classes=0)\n    net.input_shape = (3, 64, 64)\n"
        "    return net\n"
        "def whole():\n    return Embedder(net(), (3, 64, 64))\n"
    )
    for name in ("net", "whole"):
        own, weights = f"python:{tmp_path / 'own.py'}:{name}", str(tmp_path / "x.pth")
        with pytest.raises(UsageError, match=r"would leave out: emb.weight"):
            open_model(own, ModelOptions(weights=weights))
        embedder = open_model(own, ModelOptions(weights=weights, head="emb"))
        assert embedder(probe_images((3, 64, 64), 2)).shape == (2, 7)
        with pytest.raises(UsageError, match=r"'conv1.0': .* already|no linear layer"):
            open_model(own, ModelOptions(weights=weights, head="conv1.0"))
        with pytest.raises(UsageError, match="--embed-dim does not go with python:"):
            open_model(own, ModelOptions(embed_dim=0))
    with pytest.raises(UsageError, match=r"gives an Embedder: .* --mean does not go with it"):
        open_model(own, ModelOptions(mean=(0.5,)))


def test_an_option_wins_over_the_spec_or_is_refused(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=24)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    spec = {"arch": {"builder": "timm:test_resnet", "embed_dim": 24}, "input": {"size": 64, "channels": 3}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    options = ModelOptions(spec=tmp_path / "spec.json", embed_dim=0)
    assert open_model(str(tmp_path / "x.pth"), options)(probe_images((3, 64, 64), 2)).shape == (2, 96)
    torch.save(build_network("mobilefacenet").network.state_dict(), tmp_path / "face.pth")
    with pytest.raises(UsageError, match=r"--embed-dim 64: mobilefacenet .* are 128 values"):
        open_model(str(tmp_path / "face.pth"), ModelOptions(embed_dim=64))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"normalize": {"mean": [104, 117, 128]}}, "128 is above 1, .* scale 255"),
        ({"normalize": {"mean": [0, 0, 0], "std": [255, 255, 255]}}, "255 is above 1, .* scale 255"),
        ({"normalize": {"mean": [float("nan")]}}, "must be finite"),
        ({"input": {"size": 64, "channels": 3, "pad": 255}}, "needs resize_longest_side"),
    ],
)
def test_a_spec_is_refused_where_the_options_are(part: dict, said: str, tmp_path: Path) -> None:
    spec = {"arch": {"builder": "timm:test_resnet", "embed_dim": 24}, "input": {"size": 64, "channels": 3}, **part}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=said):
        Spec.read(tmp_path / "spec.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"std": (255.0,)}, "--std 255 is above 1"), ({"mean": (float("nan"),)}, "finite"), ({"pad": 9}, "longest:N")],
)
def test_options_that_would_feed_nonsense_or_nothing(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_model("timm:test_resnet", ModelOptions(**options))


def test_an_ensemble_averages_squared_distances(tmp_path: Path) -> None:
    for i in range(2):
        write_weights(tmp_path / f"{i}.safetensors", seeded(smallcnn(embed_dim=6 + i), seed=i))
    one, two = (open_model(str(tmp_path / f"{i}.safetensors")) for i in range(2))
    both = open_model(f"ensemble:{tmp_path}/0.safetensors,{tmp_path}/1.safetensors")
    images = probe_images((1, 8, 8), 3)
    square = [torch.cdist(m(images), m(images)) ** 2 for m in (one, two, both)]
    torch.testing.assert_close(square[2], (square[0] + square[1]) / 2, atol=1e-5, rtol=1e-3)
    write_weights(tmp_path / "c.safetensors", seeded(conv3()))
    with pytest.raises(UsageError, match=r"fed or compared differently: size \(8, 8\) and \(28, 28\)"):
        open_model(f"ensemble:{tmp_path}/0.safetensors,{tmp_path}/c.safetensors")
    with pytest.raises(UsageError, match="at least two"):
        open_model(f"ensemble:{tmp_path}/0.safetensors")


class Returns(nn.Module):
    """Gives whatever it is told to make of an embedding."""

    def __init__(self, make) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.layer = nn.Linear(64, 5)
        self.make = make

    def forward(self, x: Tensor):  # type: ignore[no-untyped-def]
        return self.make(self.layer(x.flatten(1)))


def loaded(make, **options: object) -> Embedder:  # type: ignore[no-untyped-def]
    from dmlbench.models import settle

    embedder = Embedder(Returns(make), (1, 8, 8), name="mine")
    settle(embedder, **options)  # type: ignore[arg-type]
    return embedder


def test_outputs_that_are_not_a_tensor() -> None:
    images = probe_images((1, 8, 8), 2)
    one = loaded(lambda e: {"embedding": e, "loss": e.mean()})
    assert one(images).shape == (2, 5) and "'embedding' is taken as the embedding" in one.notes[0]
    assert loaded(lambda e: (e,))(images).shape == (2, 5)
    assert loaded(lambda e: e[:, :, None, None])(images).shape == (2, 5)
    two = loaded(lambda e: (e[:, :3], e), output_key="1")
    assert two(images).shape == (2, 5)
    with pytest.raises(
        UsageError, match=r"gives a tuple with 0 \(3, 3\), 1 \(3, 5\): name the embedding with --output-key"
    ):
        loaded(lambda e: (e[:, :3], e))
    with pytest.raises(UsageError, match="'emb': model 'mine' gives a dictionary with embedding"):
        loaded(lambda e: {"embedding": e}, output_key="emb")
    with pytest.raises(UsageError, match="gives one tensor"):
        loaded(lambda e: e, output_key="0")
    with pytest.raises(DataError, match="feature map has to be pooled"):
        loaded(lambda e: e[:, :, None, None].expand(-1, -1, 7, 7))
    with pytest.raises(DataError, match="gives a NoneType"):
        loaded(lambda e: None)
    with pytest.raises(DataError, match=r"gives \(3, 0\) where embeddings"):
        loaded(lambda e: e[:, :0])


class Stubborn(nn.Module):
    """Dropout that stays on, as a wrapper without its own eval() leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x.flatten(1)))

    def train(self, mode: bool = True) -> "Stubborn":
        return super().train(True)


def test_modes_randomness_and_batches() -> None:
    stubborn = load_model(Stubborn(), input_shape=(1, 8, 8))
    assert "kept training after eval(), put right" in stubborn.notes[0] and not stubborn.doubts
    noisy = loaded(lambda e: nn.functional.dropout(e, 0.5, training=True))
    assert [flag for flag, _ in noisy.doubts] == ["randomised"]
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    together = loaded(lambda e: norm(e) if len(e) > 1 else e)
    assert [flag for flag, _ in together.doubts] == ["batch-dependent"]
    plain = loaded(lambda e: e)
    assert not plain.doubts and not plain.notes


def test_a_users_module_stays_in_its_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    network[2].eval()
    before = [part.training for part in network.modules()]
    model = load_model(network, input_shape=(1, 8, 8))
    assert [part.training for part in network.modules()] == before
    evaluate(model, "digits", "ers-digits", attacks=["CA+"], limit=4)
    assert [part.training for part in network.modules()] == before
    with pytest.raises(UsageError):
        evaluate(model, "digits", "no-such-protocol")
    assert [part.training for part in network.modules()] == before
    stubborn = load_model(Stubborn(), input_shape=(1, 8, 8))
    assert not any(part.training for part in stubborn.frozen().modules())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "mean has 3 values for images of 1 channel"),
        ({"std": [0.0]}, "std must be above zero"),
        ({"mean": [float("nan")]}, "mean must be finite"),
        ({"mean": [127.0], "std": [58.0]}, "above 1, and pixels are in"),
        ({"input_shape": (0, 8, 8)}, r"input_shape must be \(channels, height, width\)"),
    ],
)
def test_a_module_that_would_be_fed_nonsense(given: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(nn.Flatten(), **{"input_shape": (1, 8, 8), **given})


def test_mean_and_std_as_arrays() -> None:
    listed = load_model(nn.Flatten(), input_shape=(1, 8, 8), mean=[0.25], std=[0.5])
    images = probe_images((1, 8, 8), 2)
    for given in (np.array([0.25]), torch.tensor([0.25], dtype=torch.float64)):
        other = load_model(nn.Flatten(), input_shape=(1, 8, 8), mean=given, std=given * 2)
        assert torch.equal(other(images), listed(images))


def test_another_size_than_the_network_takes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    with pytest.raises(DataError, match=r"python:.*' does not take images of 3x32x32 .*--input-size"):
        open_model(f"python:{tmp_path / 'mine.py'}:make", ModelOptions(input_size=(32, 32)))


def test_spaces() -> None:
    def space(**options: object) -> str:
        return open_model("timm:test_resnet", ModelOptions(input_size=(32, 32), embed_dim=4, **options)).distance.space  # type: ignore[arg-type]

    assert (space(), space(distance="cosine"), space(normalize=False)) == ("N", "C", "E")
    for options, said in (
        ({"distance": "cosine", "normalize": False}, "does not go with --no-normalize"),
        ({"mean": (0.1, 0.2)}, "--mean has 2 values for 3 channels"),
        ({"resize": "big"}, "--resize 'big' must be"),
        ({"resize": "exact:999999"}, "--resize 'exact:999999': N is at most 4096"),
        ({"input_size": (32, 99999)}, "--input-size 32x99999: at most 4096"),
        ({"embed_dim": 10**13}, "at most 1048576"),
        ({"embed_dim": -1}, "must be 0"),
        ({"std": (0.0,)}, "above zero"),
        ({"precision": "int4"}, "precision 'int4'"),
    ):
        with pytest.raises(UsageError, match=said):
            open_model("timm:test_resnet", ModelOptions(**{"input_size": (32, 32), **options}))  # type: ignore[arg-type]


def test_lower_precision_is_for_gradients_only() -> None:
    embedder = Embedder(seeded(conv3()), (1, 28, 28))
    images = probe_images((1, 28, 28), 2)
    with torch.no_grad():
        exact = embedder(images)
    full = torch.autograd.grad(embedder(images.requires_grad_()).sum(), images)[0]
    embedder.precision = "bfloat16"
    with torch.no_grad():
        torch.testing.assert_close(embedder(images), exact, rtol=0, atol=0)
    low = torch.autograd.grad(embedder(images.requires_grad_()).sum(), images)[0]
    assert not torch.equal(low, full)
    assert float((low.sign() == full.sign()).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:resnet81", "did you mean 'resnet18"),
        ("torchvision:rsnet18", "did you mean 'resnet18'"),
        ("tmm:resnet18", "did you mean 'timm'"),
        ("digits-smalcnn", "unknown model"),
    ],
)
def test_unknown_names(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_model(name)


def test_the_published_checkpoints_wait_for_their_files(tmp_path: Path) -> None:
    import csv

    from conftest import reference

    from dmlbench.checkpoints import checkpoints

    manual = {name: c for name, c in checkpoints().items() if c.files and c.files[0].manual}
    manual = {name: c for name, c in manual.items() if any(claim.metric == "ers" for claim in c.claims)}
    assert len(manual) == 3
    with reference("published_ers_cvpr2022.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["table"] == "main" and row["pgd_steps_eta"] == "32"]
    short = {"recall_at_1": "R@1", "recall_at_2": "R@2", "map": "mAP", "nmi": "NMI", "ers": "ERS"}
    for name, card in manual.items():
        dataset = {"cub": "cub200"}.get(card.dataset.name, card.dataset.name)
        defense = "HM[S,g_LGA]" + ("&ICS" if name.endswith("-ics") else "")
        row = next(r for r in rows if (r["dataset"], r["defense"]) == (dataset, defense))
        assert len(card.claims) == 15
        for claim in card.claims:
            assert claim.value == float(row[short.get(claim.metric, claim.metric)]), (name, claim.metric)
        with pytest.raises(DataError, match=r"drive.google.com/file/d/.* --weights FILE"):
            open_model(name)


def test_a_published_checkpoint_loads_by_its_id(tmp_path: Path) -> None:
    network = resnet18_of_robrank()
    path = lightning(tmp_path / "last.ckpt", network)
    embedder = open_model("cub-resnet18-triplet-hm-lga", ModelOptions(weights=str(path)))
    images = probe_images((3, 224, 224), 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(embedder(images), nn.functional.normalize(network((images - mean) / std)))
    assert embedder.card is not None and embedder.card.dataset.name == "cub"
    assert embedder.preprocess.resize == (256, 256) and embedder.preprocess.size == (224, 224)
    small = lightning(tmp_path / "other.ckpt", seeded(c2f2()))
    with pytest.raises(DataError, match="does not fit the architecture"):
        open_model("cub-resnet18-triplet-hm-lga", ModelOptions(weights=str(small)))


@pytest.mark.parametrize(
    ("name", "maker"),
    [("timm:test_resnet", "timm"), ("hf-hub:someone/net", "timm"), ("torchvision:resnet18", "torchvision")],
)
def test_weights_that_cannot_be_fetched(name: str, maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host\nmore about it")

    monkeypatch.setattr("timm.create_model", offline)
    monkeypatch.setattr("torchvision.models.get_model", offline)
    with pytest.raises(DataError, match=f"^{maker} cannot fetch .*: ConnectionError: no route to host$"):
        open_model(name, ModelOptions(weights="pretrained"))


@pytest.mark.parametrize(("name", "said"), [("timm:test_resnet", True), ("torchvision:squeezenet1_1", False)])
def test_class_scores_of_published_weights_are_told(name: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last layer is one that --embed-dim 0 leaves out."""
    of_timm, of_torchvision = timm.create_model, torchvision.models.get_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **k: of_timm(name, **k))
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **k: of_torchvision(name, **k))
    embedder = open_model(name, ModelOptions(weights="pretrained"))
    assert any("--embed-dim 0 leaves that layer out" in note for note in embedder.notes) == said


def test_images_that_are_not_pictures() -> None:
    embedder = load_model(nn.Sequential(nn.Flatten(), nn.Linear(10 * 4, 3)), input_shape=(10, 2, 2))
    assert embedder(probe_images((10, 2, 2), 2)).shape == (2, 3)
    with pytest.raises(UsageError, match="1 or 3 channels, not 10"):
        _ = embedder.preprocess


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"mean": (0.1,)}, "--mean"),
        ({"distance": "cosine"}, "--distance"),
        ({"normalize": False}, "--normalize"),
        ({"name": "x"}, "--name"),
    ],
)
def test_a_registered_model_is_what_its_record_says(option: dict, said: str) -> None:
    """An option that would be passed over is refused: the number would be taken for another model's."""
    with pytest.raises(UsageError, match=f"is registered: .*{said} does not go with it"):
        open_model("digits-smallcnn-triplet-none", ModelOptions(**option))

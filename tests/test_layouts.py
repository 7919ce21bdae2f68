"""Weights files as people have them: whole or not at all, the same numbers by every door."""

import argparse
import collections
import configparser
import datetime
import functools
import hashlib
import itertools
import json
import math
import operator
import optparse
import os
import pickle
import re
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import clip_names
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dmlbench.checkpoints import File, checkpoint
from dmlbench.embedding import Embedder
from dmlbench.errors import DataError, UsageError
from dmlbench.models import ModelOptions, load_model, open_model, probe_images, read_file
from dmlbench.models.architectures import build_network
from dmlbench.models.files import WeightsFile
from dmlbench.models.inspection import best_fit, describe, fits
from dmlbench.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED, published
from dmlbench.models.spec import preprocess_of

TINY = "timm:test_resnet"
SIZE = (64, 64)
SHAPE = (3, *SIZE)


def seeded(network: nn.Module, seed: int = 1) -> nn.Module:
    """Every tensor its own, batch norms' statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in network.state_dict().items():
        if t.is_floating_point():
            drawn = torch.randn(t.shape, generator=generator) * 0.05
            t.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return network.eval()


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """timm's smallest ResNet with an embedding of 24 values."""
    return seeded(timm.create_model("test_resnet", num_classes=24))


def unit(network: nn.Module, images: Tensor, mean: float | Tensor = 0.5, std: float | Tensor = 0.5) -> Tensor:
    with torch.no_grad():
        return nn.functional.normalize(network((images - mean) / std), dim=1)


def loads_as(network: nn.Module, path: Path, **options: object) -> Embedder:
    """The file loads on the tiny network and gives what ``network`` gives."""
    embedder = open_model(TINY, ModelOptions(weights=str(path), input_size=SIZE, **options))  # type: ignore[arg-type]
    images = probe_images(SHAPE, 2)
    torch.testing.assert_close(embedder(images), unit(network, images))
    return embedder


class Config:
    """A type of a package that whoever loads the file need not have."""

    def __init__(self) -> None:
        self.lr = 0.1


class Options(dict):  # type: ignore[type-arg]
    """A dictionary of such a package."""


class Log(list):  # type: ignore[type-arg]
    """A list of such a package."""


HARMLESS = {
    "strings": np.array(["cat", "dog"]),
    "uint16": np.zeros(3, np.uint16),
    "datetime64": np.array(["2024-01-01"], "datetime64[D]"),
    "complex": np.zeros(2, complex),
    "structured": np.zeros(2, [("a", "i4"), ("b", "f8")]),
    "records": np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "objects": np.array([1, "a", None], object),
    "date": datetime.datetime(2024, 1, 1),
    "default": collections.defaultdict(list, {"a": [1]}),
    "namespace": argparse.Namespace(a=1),
    "simple": types.SimpleNamespace(a=1),
    "path": Path("/logs"),
    "partial": functools.partial(int, base=2),
    "frozen": frozenset([1]),
    "generator": np.random.default_rng(0),
    "config": Config(),
    "options": Options(a=1, b=Options(c=2)),
    "log": Log([1, 2]),
    "constants": (..., NotImplemented),
    "functions": (torch.relu, "a".join, len, math.sqrt, operator.itemgetter(0), iter([1])),
    "settings": (optparse.Values({"lr": 0.1}), configparser.ConfigParser(), time.gmtime(0), itertools.count()),
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """``Config`` and the like belong to a package that is there while a file is written, and not when it is read."""
    module = types.ModuleType("package_of_training")
    for kind in (Config, Options, Log):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield lambda: sys.modules.pop(module.__name__, None)
    sys.modules.pop(module.__name__, None)


@pytest.mark.parametrize("zipped", [True, False])
def test_values_beside_weights_never_keep_them_from_being_read(elsewhere, tmp_path: Path, zipped: bool) -> None:
    state = {"layer.weight": torch.arange(6.0).view(2, 3)}
    for name, value in HARMLESS.items():
        torch.save({"state_dict": state, name: value}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    elsewhere()
    for name in HARMLESS:
        file = read_file(tmp_path / name)
        assert torch.equal(file.tensors["layer.weight"], state["layer.weight"]), name
    assert (
        "values of other packages were passed over: package_of_training.Config"
        in read_file(tmp_path / "config").notes[0]
    )


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("harm-was-done",))


@pytest.mark.parametrize("harm", [Harmful(), eval, os.system, print, nn.Linear(2, 2)])
def test_code_is_refused_and_not_run(harm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": harm}, "x.pth")
    with pytest.raises(DataError, match="which would run code when it is loaded"):
        read_file(Path("x.pth"))
    assert not Path("harm-was-done").exists()


def _onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x06\x12\x07pytorch\x1a\x051.7.0:\x00")


OLD_JIT = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")


def _scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


def _cut(path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])


def _cut_tensors(path: Path) -> None:
    save_file({"a": torch.zeros(100)}, str(path))
    path.write_bytes(path.read_bytes()[:-7])


@OLD_JIT
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_onnx, "it is an ONNX graph"),
        (_scripted, r"it is a TorchScript program, not weights; torch.save\(torch.jit.load"),
        (_cut, "truncated"),
        (_cut_tensors, "truncated"),
        (lambda p: p.write_bytes(b""), "it is empty"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n"), "HDF5"),
        (lambda p: p.write_bytes(b"\x1f\x8b123"), "gzip"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_text("hello, I am no weights"), "it is not a file of torch.save, nor of safetensors"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1}, 4)), "it is a file of pickle, not of torch.save"),
        (lambda p: p.write_bytes(pickle.dumps({"a": np.zeros(3)}, 2)), "it is a file of pickle, not of torch.save"),
    ],
)
def test_what_is_no_weights_file_is_told_truly(write, said: str, tmp_path: Path) -> None:
    write(tmp_path / "x.pth")
    with pytest.raises(DataError, match=said) as error:
        read_file(tmp_path / "x.pth")
    assert ("truncated" in str(error.value)) == (said == "truncated") and "\n" not in str(error.value)


def test_content_counts_and_not_the_suffix(tiny: nn.Module, tmp_path: Path) -> None:
    for name in ("UPPER.SAFETENSORS", "named.pth", "without"):
        save_file(tiny.state_dict(), str(tmp_path / name))
        assert read_file(tmp_path / name).format == "safetensors"
    torch.save(tiny.state_dict(), tmp_path / "weights.dat")
    loads_as(tiny, tmp_path / "weights.dat")


def test_a_folder_of_the_hub_says_how_it_is_fed(tiny: nn.Module, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(tiny.state_dict(), str(hub / "model.safetensors"))
    told = {"input_size": [3, *SIZE], "mean": [0.25] * 3, "std": [0.5] * 3, "crop_pct": 0.8, "interpolation": "bicubic"}
    (hub / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 24, "pretrained_cfg": told})
    )
    images = probe_images(SHAPE, 2)
    both = [open_model(str(hub)), open_model(TINY, ModelOptions(weights=str(hub)))]
    for embedder in both:
        assert (
            embedder.preprocess.describe() | {"shorter": 80, "interpolation": "bicubic"}
            == embedder.preprocess.describe()
        )
        torch.testing.assert_close(embedder(images), unit(tiny, images, mean=0.25))
    (hub / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UsageError, match=r"of transformers \(vit\)"):
        open_model(str(hub))


@pytest.mark.parametrize("door", ["", "model.safetensors"])
@pytest.mark.parametrize("first_form", [False, True])
def test_the_hubs_file_is_fed_as_its_folder_says(door: str, first_form: bool, tiny: nn.Module, tmp_path: Path) -> None:
    """The folder or the file in it, and timm's first form of the configuration, which has everything in one."""
    fed = {"input_size": [3, *SIZE], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    config = {"architecture": "test_resnet", "num_classes": 24, **(fed if first_form else {"pretrained_cfg": fed})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    for embedder in (
        open_model(str(tmp_path / door)),
        open_model(TINY, ModelOptions(weights=str(tmp_path / door))),
    ):
        assert embedder.input_shape == SHAPE and embedder.preprocess.interpolation == "bicubic"
        torch.testing.assert_close(embedder.mean.flatten(), torch.tensor(fed["mean"]))


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(160, 160), (160, 128)])
def test_the_hubs_crop_is_timms(mode: str, size: tuple[int, int], tiny: nn.Module, tmp_path: Path) -> None:
    """Against timm's own transform, which cuts after a squash too; of no square, timm's ``center`` has no words here."""
    given = {"input_size": [3, *size], "crop_pct": 0.8, "crop_mode": mode, "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": given}))
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    if mode == "center" and size[0] != size[1]:
        with pytest.raises(DataError, match="how it is fed is not understood"):
            open_model(str(tmp_path))
        told = {
            "arch": {"builder": TINY, "embed_dim": 24},
            "input": {"size": list(size), "channels": 3},
            "normalize": {},
        }
        (tmp_path / "spec.json").write_text(json.dumps(told))
        assert open_model(str(tmp_path), ModelOptions(spec=tmp_path / "spec.json")).input_shape == (3, *size)
        return
    transform = timm.data.create_transform(
        tuple(given["input_size"]), crop_pct=0.8, crop_mode=mode, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3
    )
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((350, 271))
    ours = open_model(str(tmp_path)).preprocess(picture)
    np.testing.assert_array_equal(ours, (transform(picture) * 255).round().byte().numpy())


@pytest.mark.parametrize("door", ["", "open_clip_model.safetensors"])
@pytest.mark.parametrize("mode", [None, "squash", "longest"])
def test_open_clips_file_is_fed_as_its_configuration_says(
    mode: str | None, door: str, tiny: nn.Module, tmp_path: Path
) -> None:
    fed = {"mean": [0.5] * 3, "std": [0.25] * 3, **({"resize_mode": mode} if mode else {})}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"image_size": SIZE[0]}}, "preprocess_cfg": fed}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    save_file(tiny.state_dict(), tmp_path / "open_clip_model.safetensors")
    options = ModelOptions(weights=str(tmp_path / door))
    if mode == "longest":
        with pytest.raises(DataError, match="how it is fed is not understood"):
            open_model(TINY, options)
        return
    embedder, images = open_model(TINY, options), probe_images(SHAPE, 2)
    way = {"size": SIZE, "resize": None, "shorter": None if mode else SIZE[0], "interpolation": "bicubic"}
    assert embedder.preprocess.describe() | way == embedder.preprocess.describe()
    torch.testing.assert_close(embedder(images), unit(tiny, (images - 0.25) * 2, mean=0.25))


def test_shards_are_read_with_their_index(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    placed = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(state)}
    for part in set(placed.values()):
        save_file({k: v for k, v in state.items() if placed[k] == part}, str(tmp_path / part))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    by_folder, by_index = loads_as(tiny, tmp_path), loads_as(tiny, index)
    assert by_folder.weights_sha256 == by_index.weights_sha256
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-1.safetensors does not exist"):
        read_file(index)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(DataError, match="lie beside it"):
        read_file(index)


def test_a_folder_that_is_neither_weights_nor_a_run_is_told_so(tiny: nn.Module, tmp_path: Path) -> None:
    for n in (1, 2):
        save_file(tiny.state_dict(), tmp_path / f"model-0000{n}-of-00002.safetensors")
    with pytest.raises(
        DataError, match=r"no checkpoint.json, .* folder with several files of weights: name one of mod"
    ):
        open_model(str(tmp_path))


def test_folders_that_are_something_else_are_named(tmp_path: Path) -> None:
    (tmp_path / "deep.ckpt" / "checkpoint").mkdir(parents=True)
    torch.save({"module": {}}, tmp_path / "deep.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt")
    (tmp_path / "fsdp.ckpt").mkdir()
    (tmp_path / "fsdp.ckpt" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "none.ckpt").mkdir()
    for name, said in (
        ("deep", "DeepSpeed.*only part"),
        ("fsdp", "distributed checkpoint"),
        ("none", "without weights"),
    ):
        with pytest.raises(DataError, match=said):
            open_model(str(tmp_path / f"{name}.ckpt"))


NAMES = {
    "module.": lambda k: f"module.{k}",
    "compiled blocks": lambda k: k.replace("layer1.", "layer1._orig_mod."),
    "checkpointed blocks": lambda k: k.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."),
    "fsdp": lambda k: "_fsdp_wrapped_module." + k.replace("layer1.", "layer1._fsdp_wrapped_module."),
    "single layers in parallel": lambda k: "net." + k.replace("layer1.", "layer1.module."),
    "a prefix of one's own": lambda k: f"base_net.trunk.{k}",
}


@pytest.mark.parametrize("layout", list(NAMES))
def test_names_with_something_before_or_inside(tiny: nn.Module, layout: str, tmp_path: Path) -> None:
    torch.save({NAMES[layout](k): v for k, v in tiny.state_dict().items()}, tmp_path / "x.pth")
    loads_as(tiny, tmp_path / "x.pth")


def test_copies_of_a_network(tiny: nn.Module, tmp_path: Path) -> None:
    other = seeded(timm.create_model("test_resnet", num_classes=24), seed=2)
    path = tmp_path / "x.pth"

    def save(one: str, two: str, **beside: object) -> None:
        both = {one + k: v for k, v in tiny.state_dict().items()} | {two + k: v for k, v in other.state_dict().items()}
        torch.save({"state_dict": both, **beside}, path)

    for one, two in (("module.encoder_q.", "module.encoder_k."), ("ema_model.", "model."), ("teacher.", "student.")):
        save(one, two)
        embedder = loads_as(tiny, path)
        assert any("two copies" in note and two in note for note in embedder.notes)
        loads_as(other, path, prefix=two)
    save("left.", "right.")
    with pytest.raises(UsageError, match=r"several copies .*'left.', 'right.': choose one with --checkpoint-prefix"):
        loads_as(tiny, path)
    loads_as(other, path, prefix="right")


def test_the_average_is_taken_as_timm_does(tiny: nn.Module, tmp_path: Path) -> None:
    other = seeded(timm.create_model("test_resnet", num_classes=24), seed=2)
    path = tmp_path / "x.pth.tar"
    for key in ("state_dict_ema", "model_ema", "ema"):
        torch.save({"state_dict": other.state_dict(), key: tiny.state_dict(), "epoch": 3}, path)
        assert any(f"({key}), as timm does" in note for note in loads_as(tiny, path).notes)
        loads_as(other, path, checkpoint_key="state_dict")
    part = {k: v for k, v in tiny.state_dict().items() if "running" not in k}
    torch.save({"state_dict": other.state_dict(), "ema": part}, path)  # an average of half of it is none
    assert any("some of the same layers stand under ema" in note for note in loads_as(other, path).notes)
    torch.save({"model": tiny.state_dict(), "best_model": other.state_dict()}, path)
    assert any("stand under best_model too" in note for note in loads_as(tiny, path).notes)
    loads_as(other, path, checkpoint_key="best_model")
    torch.save({"net_state_dict": tiny.state_dict(), "optimizer_state_dict": {"state": {}}, "epoch": 3}, path)
    loads_as(tiny, path)
    torch.save({"encoder_weights": tiny.state_dict(), "decoder_weights": other.state_dict()}, path)
    with pytest.raises(UsageError, match="--checkpoint-key; it has encoder_weights, decoder_weights"):
        loads_as(tiny, path)


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("params", "params_ema"),
        ("net", "ema_net"),
        ("model_state_dict", "ema_model_state_dict"),
        ("model", "swa_model"),
        ("model", "averaged_model"),
        ("student", "teacher"),
        ("model", "ema.shadow"),
        ("checkpoint.model", "checkpoint.ema"),
        ("state_dict", "callbacks.EMA.ema_state_dict"),
    ],
)
def test_an_average_is_found_by_its_layers_wherever_it_stands(
    raw: str, average: str, tiny: nn.Module, tmp_path: Path
) -> None:
    other = seeded(timm.create_model("test_resnet", num_classes=24), seed=2)
    content: dict = {"epoch": 3, "optimizer_state": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    for place, network in ((raw, other), (average, tiny)):
        *above, last = place.split(".")
        inside = content
        for part in above:
            inside = inside.setdefault(part, {})
        inside[last] = {f"module.{k}": v for k, v in network.state_dict().items()} | (
            {"n_averaged": torch.tensor(3)} if network is tiny else {}
        )
    torch.save(content, tmp_path / "x.pth")
    notes = loads_as(tiny, tmp_path / "x.pth").notes
    assert any(f"({average}), as timm does; --checkpoint-key {raw} takes" in note for note in notes)
    loads_as(other, tmp_path / "x.pth", checkpoint_key=raw)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_that_are_no_plain_numbers_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    """Integers that a scale would turn into numbers, quantised, complex and sparse ones: never loaded as they are."""
    state, path = tiny.state_dict(), tmp_path / "x.pth"
    name = next(k for k, v in state.items() if v.dim() == 4)
    for coded, said in (
        ((state[name] * 100).to(torch.int8), "int8"),
        (state[name] > 0, "bool"),
        (torch.quantize_per_tensor(state[name], 0.01, 0, torch.qint8), "qint8"),
        (state[name].to(torch.complex64), "complex64"),
        (state[name].to_sparse(), "sparse"),
    ):
        torch.save({**state, name: coded}, path)
        with pytest.raises(DataError, match=f"holds weights as .*{said}.*{name}"):
            open_model(TINY, ModelOptions(weights=str(path), input_size=SIZE))


def test_a_trained_layer_is_used_or_the_run_ends(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    features = timm.create_model("test_resnet", num_classes=0)
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("fc.")}
    features.load_state_dict(body)
    layer, norm = seeded(nn.Linear(96, 8), seed=3), seeded(nn.BatchNorm1d(96), seed=4)
    beside = {
        "embedding": layer.state_dict(),
        "bottleneck": norm.state_dict(),
        "head.0": layer.state_dict(),
        "criterion": {"proxies": torch.zeros(5, 8)},
    }
    images = probe_images(SHAPE, 2)
    for name, state in beside.items():
        held = {f"{name}.{k}": v for k, v in state.items()}
        for content in ({**tiny.state_dict(), **held}, {"model": tiny.state_dict(), name: state}):
            torch.save(content, path)
            if name == "criterion":
                loads_as(tiny, path)
                continue
            with pytest.raises(
                UsageError, match=rf"trained layers .* leave out: {name}.*--head {name} .*--leave-out {name}"
            ):
                loads_as(tiny, path)
            loads_as(tiny, path, leave_out=name)
            embedder = open_model(TINY, ModelOptions(weights=str(path), input_size=SIZE, head=name))
            after = norm if name == "bottleneck" else layer
            with torch.no_grad():
                expected = nn.functional.normalize(after.eval()(features.eval()((images - 0.5) / 0.5)), dim=1)
            torch.testing.assert_close(embedder(images), expected)
    torch.save({**tiny.state_dict(), "neck.weight": torch.zeros(3, 3, 3, 3)}, path)
    with pytest.raises(UsageError, match="--head 'neck' is no linear layer"):
        loads_as(tiny, path, head="neck")
    with pytest.raises(UsageError, match="has no such layer"):
        loads_as(tiny, path, head="nck")
    torch.save(tiny.state_dict(), path)
    only = open_model(TINY, ModelOptions(weights=str(path), input_size=SIZE, embed_dim=0))
    assert only(images).shape == (2, 96)


@pytest.mark.parametrize(
    ("content", "key", "place"),
    [
        ({"trunk": "body", "embedder": "layer"}, "trunk", "embedder"),
        ({"model": "body", "embedder": "layer"}, "model", "embedder"),
        ({"models": {"model": "body", "embedder": "layer"}}, None, "models.embedder"),
        ({"models": {"trunk": "body", "embedder": "layer"}}, "models.trunk", "models.embedder"),
        ({"embedder": "layer", "**": "body"}, None, "embedder"),
    ],
)
def test_a_trained_layer_beside_the_named_weights_is_not_left_out(content, key, place, tiny, tmp_path: Path) -> None:
    """Whoever names where the network lies has not said that the embedding layer next to it is to be left out."""
    layer = seeded(nn.Linear(96, 8), seed=3)
    states = {"body": {k: v for k, v in tiny.state_dict().items() if not k.startswith("fc.")}, "layer": {}}
    states["layer"] = {f"0.{k}": v for k, v in layer.state_dict().items()}

    def filled(names: dict) -> dict:
        inside = {k: filled(v) if isinstance(v, dict) else states[v] for k, v in names.items() if k != "**"}
        return {**states[names["**"]], **inside} if "**" in names else inside

    torch.save({**filled(content), "optimizer": {"exp": torch.zeros(2)}, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=rf"would leave out: {place}.0.weight.*--head {place}.0"):
        loads_as(tiny, tmp_path / "x.pth", checkpoint_key=key)
    whole = nn.Sequential(timm.create_model("test_resnet", num_classes=0), layer).eval()
    whole[0].load_state_dict(states["body"])
    loads_as(whole, tmp_path / "x.pth", checkpoint_key=key, head=f"{place}.0")


@pytest.mark.parametrize("door", [TINY, "timm:test_convnext"])
def test_a_last_layer_without_bias(door: str, tmp_path: Path) -> None:
    """A linear layer without bias is a usual embedding layer."""
    network = seeded(timm.create_model(door.partition(":")[2], num_classes=24))
    layer = network.get_classifier()
    state = {k: v for k, v in network.state_dict().items() if v is not layer.bias and not v.equal(layer.bias)}
    assert len(state) == len(network.state_dict()) - 1
    torch.save(state, tmp_path / "x.pth")
    nn.init.zeros_(layer.bias)
    embedder = open_model(door, ModelOptions(weights=str(tmp_path / "x.pth"), input_size=SIZE, mean=(0.5,), std=(0.5,)))
    images = probe_images(SHAPE, 2)
    torch.testing.assert_close(embedder(images), unit(network, images))
    assert any("no bias" in note for note in embedder.notes)


def test_a_layer_of_another_shape_is_no_copy_of_the_network(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    content = {"model": network.state_dict(), "embedder": nn.Linear(3, 2).state_dict()}
    torch.save({**content, "embedder": {f"0.{k}": v for k, v in content["embedder"].items()}}, tmp_path / "x.pth")
    assert list(read_file(tmp_path / "x.pth").further) == ["embedder.0.weight", "embedder.0.bias"]


@pytest.mark.parametrize(
    "name, shape",
    [("gap.p", (1,)), ("pixel_mean", (3, 1, 1)), ("attention.g.weight", (8, 96, 1, 1)), ("cameras", (6, 1, 96))],
)
def test_the_features_alone_are_not_without_what_comes_before_them(
    name, shape, tiny: nn.Module, tmp_path: Path
) -> None:
    """--embed-dim 0 leaves out linear layers and norms; a learned pooling is none."""
    after = {
        "bottleneck.weight": torch.ones(96),
        "bottleneck.bias": torch.ones(96),
        "classifier.weight": torch.ones(7, 96),
    }
    state = {f"base.{k}": v for k, v in tiny.state_dict().items()} | after
    torch.save(state, tmp_path / "x.pth")
    alone = ModelOptions(weights=str(tmp_path / "x.pth"), embed_dim=0, input_size=SIZE)
    features = seeded(timm.create_model("test_resnet", num_classes=24))
    features.reset_classifier(0)
    images = probe_images(SHAPE, 2)
    torch.testing.assert_close(open_model(TINY, alone)(images), unit(features, images))
    torch.save({**state, name: torch.full(shape, 3.0)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=re.escape(name)):
        open_model(TINY, alone)
    without = replace(alone, leave_out=name.removesuffix(".weight"))
    torch.testing.assert_close(open_model(TINY, without)(images), unit(features, images))


def test_only_what_is_left_is_left_out(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save({**tiny.state_dict(), "neck.weight": torch.ones(24, 24)}, tmp_path / "x.pth")
    for layers, said in (("neck,nek", "nek.*no such layer"), ("neck,fc", "fc.*the network has that layer")):
        with pytest.raises(UsageError, match=said):
            open_model(TINY, ModelOptions(weights=str(tmp_path / "x.pth"), leave_out=layers))


def test_a_file_with_a_layer_too_many_is_told_which_without_a_name_too(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save({**state, "neck.weight": torch.ones(9, 1000)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"resnet18 would leave out: neck.weight .*--head neck"):
        open_model(str(tmp_path / "x.pth"))


@pytest.mark.filterwarnings("ignore")
def test_windows_of_another_size_are_another_network(tmp_path: Path) -> None:
    """timm resizes their tables without a word."""
    other = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, window_size=8, img_size=256)
    torch.save(other.state_dict(), tmp_path / "x.pth")
    with pytest.raises(DataError, match="relative_position_bias_table"):
        open_model("timm:swin_tiny_patch4_window7_224", ModelOptions(weights=str(tmp_path / "x.pth")))


def test_swin_under_its_authors_names(tmp_path: Path) -> None:
    """Where two layers change places: a name of the one is then the other's in another shape."""
    network = seeded(timm.create_model("swin_tiny_patch4_window7_224", num_classes=4))
    state = {k.replace("head.fc.", "head."): v for k, v in network.state_dict().items()}
    state = {re.sub(r"(\d)\.down", lambda m: f"{int(m[1]) - 1}.down", k): v for k, v in state.items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    embedder = open_model("timm:swin_tiny_patch4_window7_224", ModelOptions(weights=str(tmp_path / "x.pth")))
    images = probe_images((3, 224, 224), 1)
    torch.testing.assert_close(embedder(images), unit(network, images, embedder.mean, embedder.std))


@pytest.mark.parametrize("size, asked", [((224, 224), None), ((256, 256), None), ((256, 256), (224, 224))])
def test_position_embeddings_behind_a_convolutional_stem(size, asked, tmp_path: Path) -> None:
    """Its patches are cut from feature maps, and their side is not that of the last convolution."""
    name = "vit_small_r26_s32_224"
    torch.save(timm.create_model(name, num_classes=4, img_size=size).state_dict(), tmp_path / "x.pth")
    embedder = open_model(f"timm:{name}", ModelOptions(weights=str(tmp_path / "x.pth"), input_size=asked))
    theirs = timm.create_model(name, num_classes=4, img_size=asked or size).eval()
    theirs.load_state_dict(
        sys.modules[type(theirs).__module__].checkpoint_filter_fn(
            torch.load(tmp_path / "x.pth", weights_only=True), theirs
        )
    )
    images = probe_images((3, *(asked or size)), 2)
    torch.testing.assert_close(embedder(images), unit(theirs, images, embedder.mean, embedder.std))


@pytest.mark.parametrize("size", [(96, 64), (128, 32)])
def test_a_folder_says_how_position_embeddings_of_no_square_lie(size: tuple[int, int], tmp_path: Path) -> None:
    """As many of them as a square has, or not."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=size).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    told = {"input_size": [3, *size], "crop_pct": 1.0, "crop_mode": "squash"}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": size}, "pretrained_cfg": told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    embedder, images = open_model(str(tmp_path)), probe_images((3, *size), 2)
    torch.testing.assert_close(embedder(images), unit(network, images))


def test_a_layer_is_put_where_its_width_fits(tiny: nn.Module, tmp_path: Path) -> None:
    """Behind the features, behind the last layer (24 values), or nowhere; what the user is advised to do can be done."""
    path, held = tmp_path / "x.pth", {f"net.{k}": v for k, v in tiny.state_dict().items()}
    for name, layer in (("embedding", nn.Linear(24, 8)), ("bn", nn.BatchNorm1d(24))):
        layer = seeded(layer, seed=3)
        torch.save({**held, **{f"{name}.{k}": v for k, v in layer.state_dict().items()}}, path)
        with pytest.raises(UsageError, match=rf"--head {name} puts"):
            loads_as(tiny, path)
        notes = loads_as(nn.Sequential(tiny, layer).eval(), path, head=name).notes
        assert any("after the last one" in note for note in notes) and not any("not used" in note for note in notes)
    torch.save({**held, "x.weight": torch.zeros(8, 50), "ln.weight": torch.ones(24), "ln.bias": torch.zeros(24)}, path)
    with pytest.raises(UsageError, match=r"takes 50 values, and the features have 96: .* python:FILE"):
        loads_as(tiny, path, head="x")
    with pytest.raises(
        UsageError, match=r"ln.weight \(24,\), ln.bias \(24,\). --head x puts"
    ):  # a layer norm is no head
        loads_as(tiny, path)


def test_of_several_last_layers_none_is_left_out_in_silence(tiny: nn.Module, tmp_path: Path) -> None:
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("fc.")}
    layers = seeded(nn.Sequential(nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 8)), seed=3)
    torch.save({**body, **{f"fc.{k}": v for k, v in layers.state_dict().items()}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"other last layers .*fc.0.weight.*--embed-dim 0 .*python:FILE"):
        loads_as(tiny, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"would leave out: fc.2.weight"):
        loads_as(tiny, tmp_path / "x.pth", head="fc.0")
    features = timm.create_model("test_resnet", num_classes=0).eval()
    features.load_state_dict(body)
    loads_as(nn.Sequential(features, layers[0]).eval(), tmp_path / "x.pth", head="fc.0", leave_out="fc.2")
    loads_as(features, tmp_path / "x.pth", embed_dim=0)
    torch.save(body, tmp_path / "x.pth")
    assert not any("the last layer" in note for note in loads_as(features, tmp_path / "x.pth").notes)


@pytest.mark.parametrize("name", ["timm:test_convnext", "torchvision:mobilenet_v3_small", "torchvision:convnext_tiny"])
def test_features_where_the_last_layer_stands_beside_others(name: str, tmp_path: Path) -> None:
    package, _, network_name = name.partition(":")
    make = timm.create_model if package == "timm" else torchvision.models.get_model
    network = seeded(make(network_name, num_classes=12))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    embedder = open_model(name, ModelOptions(weights=str(tmp_path / "x.pth"), embed_dim=0, input_size=SIZE))
    if package == "timm":
        network.reset_classifier(0)
    else:
        network.classifier[-1] = nn.Identity()
    images = probe_images(SHAPE, 2)
    with torch.no_grad():
        expected = nn.functional.normalize(network(embedder.normalise(images)), dim=1)
    torch.testing.assert_close(embedder(images), expected)


def test_a_network_without_a_linear_layer_is_loaded_as_it_is(tmp_path: Path) -> None:
    network = seeded(torchvision.models.squeezenet1_1())
    torch.save(network.state_dict(), tmp_path / "x.pth")
    embedder = open_model("torchvision:squeezenet1_1", ModelOptions(weights=str(tmp_path / "x.pth"), input_size=SIZE))
    assert embedder(probe_images(SHAPE, 2)).shape == (2, 1000)
    with pytest.raises(UsageError, match="no last layer to change"):
        open_model("torchvision:squeezenet1_1", ModelOptions(weights=str(tmp_path / "x.pth"), embed_dim=0))


def test_proxy_anchors_file_is_its_own_layout(tmp_path: Path) -> None:
    """fc is ImageNet's and unused; features are the average plus the maximum over places, then ``embedding``."""
    body = seeded(torchvision.models.resnet18())
    layer = seeded(nn.Linear(512, 32), seed=2)
    held = {f"model.{k}": v for k, v in body.state_dict().items()}
    held |= {f"model.embedding.{k}": v for k, v in layer.state_dict().items()}
    torch.save({"model_state_dict": held}, tmp_path / "pa.pth")
    assert fits(read_file(tmp_path / "pa.pth"))[0].embed_dim == 32
    embedder = open_model(str(tmp_path / "pa.pth"), ModelOptions(input_size=(32, 32)))
    assert embedder.arch == "proxyanchor-resnet18" and embedder.preprocess.size == (32, 32)
    images = probe_images((3, 32, 32), 2)
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        places = torch.nn.Sequential(*list(body.children())[:-2])((images - mean) / std)
        expected = layer(places.mean((2, 3)) + places.flatten(2).max(2).values)
    torch.testing.assert_close(embedder(images), nn.functional.normalize(expected, dim=1))
    with pytest.raises(UsageError, match=r"--head model.embedding .*--leave-out model.embedding"):
        open_model("torchvision:resnet18", ModelOptions(weights=str(tmp_path / "pa.pth"), mean=(0.5,), std=(0.5,)))


def test_the_same_file_has_the_same_numbers_by_every_door(tmp_path: Path) -> None:
    network = torchvision.models.resnet18()
    network.fc = nn.Linear(512, 16)
    torch.save(seeded(network).state_dict(), tmp_path / "mine.pth")
    path = str(tmp_path / "mine.pth")
    doors = [
        open_model(path),
        open_model("timm:resnet18", ModelOptions(weights=path)),
        open_model("torchvision:resnet18", ModelOptions(weights=path)),
    ]
    spec = {"arch": {"builder": "torchvision:resnet18", "embed_dim": 16}, "input": {"size": 224, "channels": 3}}
    stated = {"normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    for more in ({}, stated, {"embedding": {}}):
        (tmp_path / "spec.json").write_text(json.dumps(spec | more))
        doors.append(open_model(path, ModelOptions(spec=tmp_path / "spec.json")))
    (tmp_path / "spec.json").write_text(json.dumps(spec | {"normalize": {}}))
    plain = open_model(path, ModelOptions(spec=tmp_path / "spec.json"))
    assert plain.identity and any("pixels in [0, 1]" in note for note in plain.notes)
    images = probe_images((3, 224, 224), 1)
    for other in doors[1:]:
        assert other.preprocess == doors[0].preprocess and other.weights_sha256 == doors[0].weights_sha256
        torch.testing.assert_close(other(images), doors[0](images))
    assert any("(bicubic)" in note for note in open_model("timm:resnet18").notes)


def test_a_spec_that_says_little_feeds_a_published_network_as_its_publication_does(tmp_path: Path) -> None:
    built = build_network("mobilefacenet")
    torch.save(seeded(built.network).state_dict(), tmp_path / "face.pth")
    spec = {
        "arch": {"builder": "mobilefacenet", "embed_dim": 128},
        "input": {"size": [112, 96], "squash": True, "channels": 3},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    found, plain = (
        open_model(str(tmp_path / "face.pth"), ModelOptions(spec=s)) for s in (tmp_path / "spec.json", None)
    )
    images = probe_images((3, 112, 96), 2)
    assert found.distance == plain.distance and found.preprocess == plain.preprocess
    assert torch.equal(found.normalise(images), plain.normalise(images)) and not found.identity


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_registered_models_file_by_another_door_names_the_record_that_feeds_it_otherwise(kind, tmp_path, monkeypatch):
    network = torchvision.models.resnet18()
    torch.save(seeded(network).state_dict(), tmp_path / "mine.pth")
    digits = hashlib.new(kind, (tmp_path / "mine.pth").read_bytes()).hexdigest()[:8]
    entry = checkpoint("tv-resnet18")
    mine = {
        "theirs": entry.model_copy(update={"files": (File(url="https://x.org/mine.pth", hash=f"{kind}:{digits}"),)})
    }
    monkeypatch.setattr("dmlbench.models.recognised.checkpoints", lambda: mine)

    def said(**options) -> bool:
        notes = open_model("torchvision:resnet18", ModelOptions(weights=str(tmp_path / "mine.pth"), **options)).notes
        return any(note.endswith(f"--model theirs --weights {tmp_path / 'mine.pth'}") for note in notes)

    asks = preprocess_of(entry.input)
    as_asked = {"resize": f"shorter:{asks.shorter}", "interpolation": asks.interpolation, "embed_dim": 0}
    assert asks.shorter and said() and not said(**as_asked)
    for other in ({"mean": (0.5,)}, {"distance": "cosine"}, {"embed_dim": None}, {"order": "bgr"}):
        assert said(**{**as_asked, **other}), other


def test_a_file_that_two_doors_would_feed_otherwise_is_asked_about(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=8).state_dict(), tmp_path / "vit.pth")
    path = str(tmp_path / "vit.pth")
    with pytest.raises(UsageError, match="say which with --mean and --std"):
        open_model("timm:deit_tiny_patch16_224", ModelOptions(weights=path))
    said = ModelOptions(weights=path, mean=(0.5,), std=(0.5,))
    images = probe_images((3, 224, 224), 1)
    torch.testing.assert_close(open_model("timm:deit_tiny_patch16_224", said)(images), open_model(path)(images))


def test_position_embeddings_of_another_size(tmp_path: Path) -> None:
    big = seeded(timm.create_model("vit_tiny_patch16_224", num_classes=8, img_size=96))
    torch.save(big.state_dict(), tmp_path / "vit.pth")
    path = str(tmp_path / "vit.pth")
    own = open_model("timm:vit_tiny_patch16_224", ModelOptions(weights=path))
    assert own.preprocess.size == (96, 96) == open_model(path).preprocess.size
    assert any("position embeddings are of images of 96x96" in note for note in own.notes)
    torch.testing.assert_close(own(probe_images((3, 96, 96), 1)), unit(big, probe_images((3, 96, 96), 1)))
    big.set_input_size(img_size=(64, 32))  # timm's own way to resize them
    small = open_model("timm:vit_tiny_patch16_224", ModelOptions(weights=path, input_size=(64, 32)))
    images = probe_images((3, 64, 32), 1)
    torch.testing.assert_close(small(images), unit(big, images), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="patches of 16x16"):
        open_model("timm:vit_tiny_patch16_224", ModelOptions(weights=path, input_size=(50, 50)))


def test_a_candidate_that_asks_for_an_option_does_not_end_the_search(tmp_path: Path) -> None:
    """A distilled DeiT has one token more than the plain ViT that it is compared with first."""
    name = "deit_small_distilled_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "x.pth")
    file = read_file(tmp_path / "x.pth")
    fit = best_fit(file)
    assert fit is not None and fit.builder == f"timm:{name}" and fits(file)[0].complete


def test_clip_under_its_own_names(tmp_path: Path) -> None:
    network = seeded(timm.create_model("test_vit", pre_norm=True, num_classes=12))
    network.head.bias.data.zero_()
    named = clip_names(network)
    images = probe_images((3, 160, 160), 1)
    for content in (named, {k.removeprefix("visual."): v for k, v in named.items() if k.startswith("visual.")}):
        torch.save(content, tmp_path / "clip.pt")
        spec = {
            "arch": {"builder": "timm:test_vit", "kwargs": {"pre_norm": True}, "embed_dim": 12},
            "input": {"size": 160, "channels": 3},
            "normalize": {"mean": [0.5], "std": [0.5]},
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        embedder = open_model(str(tmp_path / "clip.pt"), ModelOptions(spec=tmp_path / "spec.json"))
        torch.testing.assert_close(embedder(images), unit(network, images), rtol=1e-4, atol=1e-5)


def test_eight_and_sixteen_bits(tiny: nn.Module, tmp_path: Path) -> None:
    images = probe_images(SHAPE, 2)
    for kind, off in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float8_e4m3fn, 0.2)):
        state = {k: v.to(kind) if v.dim() == 4 else v for k, v in tiny.state_dict().items()}
        save_file(state, str(tmp_path / "x.safetensors"))
        assert describe(read_file(tmp_path / "x.safetensors"))["not_finite"] == []
        embedder = open_model(TINY, ModelOptions(weights=str(tmp_path / "x.safetensors"), input_size=SIZE))
        assert embedder(images).dtype == torch.float32 and all(p.dtype == torch.float32 for p in embedder.parameters())
        torch.testing.assert_close(embedder(images), unit(tiny, images), rtol=0, atol=off)
    half = load_model(seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 16))).half(), input_shape=(1, 8, 8))
    assert half(probe_images((1, 8, 8), 2)).dtype == torch.float32
    assert any("float16" in note for note in half.notes)


@pytest.mark.parametrize("name", ["mobilefacenet", "osnet-x0_25", "facenet"])
def test_layouts_of_publications_are_recognised(name: str, tmp_path: Path) -> None:
    network = seeded(published(name))
    extra = {"classifier.weight": torch.zeros(7, 512)} if name.startswith("osnet") else {}
    extra |= {"logits.weight": torch.zeros(7, 512), "logits.bias": torch.zeros(7)} if name == "facenet" else {}
    torch.save({f"module.{k}": v for k, v in {**network.state_dict(), **extra}.items()}, tmp_path / "x.pth")
    fit = best_fit(read_file(tmp_path / "x.pth"))
    assert fit is not None and fit.builder == name
    embedder = open_model(str(tmp_path / "x.pth"))
    fed = PUBLISHED[name].fed
    assert embedder.preprocess == fed.preprocess and embedder.distance.space == fed.space
    images = probe_images(embedder.input_shape, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (fed.mean, fed.std))
    torch.testing.assert_close(embedder(images), embedder.distance.finish(network((images - mean) / std)))


def test_the_first_mobilenet_v2_under_its_old_names(tmp_path: Path) -> None:
    network = seeded(torchvision.models.mobilenet_v2(num_classes=5))
    new_to_old = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
    first = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
    state = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "features" and parts[2] == "conv":
            layer = ".".join(parts[3:-1])
            name = f"features.{parts[1]}.conv.{(first if parts[1] == '1' else new_to_old)[layer]}.{parts[-1]}"
        if not name.startswith("classifier"):
            state[name] = tensor
    torch.save(state, tmp_path / "x.pth")
    embedder = open_model(str(tmp_path / "x.pth"), ModelOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,)))
    images = probe_images((3, 32, 32), 2)
    with torch.no_grad():
        expected = network.features(images).mean((2, 3))
    torch.testing.assert_close(embedder(images), nn.functional.normalize(expected, dim=1))
    assert any("embeddings of 1280 values" in note for note in embedder.notes)


OLDER = {
    "torchvision:densenet121": ((r"(norm|conv)([12])\.", r"\1.\2."),),
    "torchvision:vit_b_32": ((r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2.")),
}


@pytest.mark.parametrize("name", list(OLDER))
def test_the_published_names_that_torchvision_changes_when_it_reads_them(name: str, tmp_path: Path) -> None:
    network = torchvision.models.get_model(name.partition(":")[2], weights=None)
    state = seeded(network).state_dict()
    for new, old in OLDER[name]:
        state = {re.sub(new, old, k): v for k, v in state.items()}
    assert not set(state) <= set(network.state_dict())
    if "vit" in name:  # too large to be filled here
        fit = best_fit(WeightsFile(Path("x"), "torch", state, "", {f"module.{k}": v for k, v in state.items()}))
        assert fit is not None and (fit.builder, fit.prefix) == (name, "module.")
        return
    torch.save(state, tmp_path / "x.pth")
    for door in ({"model": str(tmp_path / "x.pth")}, {"model": name, "weights": str(tmp_path / "x.pth")}):
        embedder = load_model(**door, input_size=(32, 32), mean=(0.5,), std=(0.5,))
        images = probe_images((3, 32, 32), 1)
        torch.testing.assert_close(embedder(images), unit(network, images))


@pytest.mark.parametrize("side_exits", [True, False])
def test_googlenet_is_fed_as_its_weights_are_by_every_door(side_exits: bool, tmp_path: Path) -> None:
    """torchvision's weights of it undo ImageNet's mean and std in the network, which a file does not tell."""
    make = torchvision.models.googlenet
    network = seeded(make(num_classes=8, aux_logits=side_exits, transform_input=True, init_weights=False))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    images, (mean, std) = (
        probe_images((3, 64, 64), 1),
        (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)),
    )
    expected = unit(network, images, mean, std)
    for door in (
        {"model": str(tmp_path / "x.pth")},
        {"model": "torchvision:googlenet", "weights": str(tmp_path / "x.pth")},
    ):
        torch.testing.assert_close(load_model(**door, input_size=(64, 64))(images), expected, atol=1e-5, rtol=1e-5)


class Locked(nn.Module):
    """A network that cannot be copied."""

    def __init__(self) -> None:
        import threading

        super().__init__()
        self.net, self.lock = nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@OLD_JIT
def test_networks_that_do_not_copy_are_attacked_as_they_are() -> None:
    plain = seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)))
    locked = Locked()
    locked.net.load_state_dict(plain.state_dict())
    images = probe_images((1, 8, 8), 2)
    traced = torch.jit.trace(plain, images)
    for module in (traced, locked, torch.jit.script(plain), torch.jit.freeze(torch.jit.script(plain.eval()))):
        twin = load_model(module, input_shape=(1, 8, 8)).frozen()
        x = images.clone().requires_grad_()
        twin(x)[:, 0].sum().backward()
        expected = images.clone().requires_grad_()
        nn.functional.normalize(plain(expected), dim=1)[:, 0].sum().backward()
        torch.testing.assert_close(x.grad, expected.grad)


def test_a_program_of_one_mode_is_refused() -> None:
    program = torch.export.export(nn.Flatten(), (torch.zeros(2, 1, 8, 8),)).module()
    with pytest.raises(DataError, match="cannot be put into eval mode"):
        load_model(program, input_shape=(1, 8, 8))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_as_its_authors_save_it(name: str, tmp_path: Path) -> None:
    """A mask token that no test uses; registers under their own name, and a position of the class token beside them."""
    network = seeded(timm.create_model(name, depth=2, img_size=42))
    state = dict(network.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], 1)
    torch.save(state, tmp_path / "x.pth")
    spec = {
        "arch": {"builder": f"timm:{name}", "kwargs": {"depth": 2}, "embed_dim": 384, "head": False},
        "input": {"size": 28, "channels": 3},
        "normalize": {"mean": [0.5], "std": [0.5]},
    }
    (tmp_path / "s.json").write_text(json.dumps(spec))
    embedder = open_model(str(tmp_path / "x.pth"), ModelOptions(spec=tmp_path / "s.json"))
    network.set_input_size(img_size=28)
    images = probe_images((3, 28, 28), 2)
    torch.testing.assert_close(embedder(images), unit(network, images), rtol=1e-4, atol=1e-5)


def test_a_file_that_two_networks_read_otherwise_is_asked_about(typed, tmp_path: Path) -> None:
    network = build_network("timm:tf_mobilenetv3_large_100").network.eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"timm:mobilenetv3_large_100 and timm:tf_mobilenetv3_large_100"):
        open_model(str(tmp_path / "w.pth"))
    said = typed("models", "inspect", "w.pth").out
    assert "--model timm:mobilenetv3_large_100 or timm:tf_mobilenetv3_large_100 --weights" in said
    options = ModelOptions(weights=str(tmp_path / "w.pth"), input_size=SIZE)
    images = probe_images(SHAPE, 2)
    named = [open_model(f"timm:{twin}mobilenetv3_large_100", options)(images) for twin in ("tf_", "")]
    assert not torch.allclose(*named, atol=1e-3)

"""What a newcomer types: their own checkpoint, their own pictures, the field's data sets."""

from pathlib import Path

import torch
from conftest import Ran, shared
from networks import lightning, resnet18_of_robrank, seeded
from torch import nn
from trees import class_tree, cub_from_lists

from dmlbench.models.architectures import c2f2


def test_a_cub_folder_and_a_pth_file(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The commands of docs/models.md, at a size that a processor manages."""
    import timm

    lists = shared("CUB_200_2011")
    home = cub_from_lists(tmp_path / "downloads", lists)
    network = seeded(timm.create_model("test_resnet", num_classes=16))
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    torch.save({"epoch": 9, "model": state, "centres": torch.zeros(3, 16)}, tmp_path / "mine.pth")
    env = {"DMLBENCH_DATA": str(tmp_path / "data"), "DMLBENCH_CACHE": str(tmp_path / "cache")}
    done: Ran = run("datasets", "prepare", "cub", "--from", home, env=env)
    assert "train: 5,864 images, test: 5,924 images" in done.out
    asked = "--model timm:test_resnet --weights mine.pth --dataset cub --input-size 24 --resize none --limit 8"
    e = run(
        "evaluate", *asked.split(), "--attacks", "TMA,ES:D", "--name", "mine", "--out", "runs/mine", "--json", env=env
    )
    assert "prefix 'module.' removed" in e.err and "the last layer (fc, 16 values) is the embedding" in e.err
    got = e.json
    assert (got["model"]["id"], got["model"]["arch"], got["model"]["embed_dim"]) == ("mine", "timm:test_resnet", 16)
    assert (got["dataset"]["n_gallery"], got["dataset"]["n_classes"]) == (5924, 100)
    assert got["partial"] and got["protocol"]["name"] == "ers-224"
    assert run("report", "runs/mine", env=env).out == "runs/mine/report.html\n"


def test_a_lightning_checkpoint_on_mnist(run, data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = lightning(tmp_path / "epoch=7-step=368.ckpt", seeded(c2f2()))
    told = run("models", "inspect", path)
    assert "lightning" in told.out and "c2f2: fits without prefix 'backbone.', embeddings of 512 values" in told.out
    got = run("evaluate", "--model", path, "--dataset", "mnist", "--limit", "4", "--attacks", "GTM", "--json").json
    assert (
        got["model"]["arch"] == "c2f2" and got["protocol"]["name"] == "ers-28" and got["dataset"]["n_gallery"] == 10000
    )


def test_a_published_checkpoint_on_a_folder(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = lightning(tmp_path / "last.ckpt", resnet18_of_robrank())
    tree = class_tree(tmp_path / "mine", classes=3, each=3)
    env = {"DMLBENCH_CACHE": str(tmp_path / "cache")}
    asked = ["--model", "cub-resnet18-triplet-hm-lga", "--weights", str(path), "--dataset", f"folder:{tree}"]
    got = run("evaluate", *asked, "--limit", "1", "--attacks", "ES:D", "--json", env=env).json
    assert got["model"]["arch"] == "torchvision:resnet18" and got["model"]["defense"] == "hm"
    assert got["dataset"]["n_gallery"] == 9 and got["measurements"][0]["n"] == 1
    told = run("evaluate", "--model", "cub-resnet18-triplet-hm-lga", code=4)
    assert "drive.google.com" in told.err and told.err.count("\n") == 1


def test_what_goes_wrong_is_one_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(nn.Linear(3, 3), tmp_path / "module.pth")
    for args, code, said in (
        (("models", "inspect", "module.pth"), 4, "holds torch.nn.modules.linear.Linear, which would run code"),
        (("evaluate", "--model", "timm:resnet18", "--dataset", "digits", "--mean", "a,b"), 2, "not a list of numbers"),
    ):
        failed = run(*args, code=code)
        assert said in failed.err and failed.err.startswith(("Error: ", "note: ")), failed.err

"""Training on one's own pictures and from given weights: from a folder to a model that is measured and registered."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from bundles import SUBMISSIONS
from conftest import shared
from PIL import Image
from safetensors.torch import load_file
from trees import class_tree, picture

from dmlbench.checkpoints import sha256_of
from dmlbench.datasets.base import DISTRACTOR, JUNK, ArrayImages, RetrievalDataset
from dmlbench.errors import DataError, UsageError
from dmlbench.models import load_model, write_weights
from dmlbench.models.architectures import ARCHITECTURES
from dmlbench.models.published import PUBLISHED
from dmlbench.models.registration import read_entry
from dmlbench.models.spec import input_of, preprocess_of
from dmlbench.preprocess import Preprocess
from dmlbench.results import load
from dmlbench.submission.pack import draft
from dmlbench.training import loop
from dmlbench.training.defenses import DEFENSES
from dmlbench.training.loop import train
from dmlbench.training.recipe import load_recipe, make_recipe, packaged_recipes
from dmlbench.training.start import learnable, settled

QUICK = {"groups": 4, "iterations": 2, "check_every": 1, "steps": 1, "input_size": [32, 32]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and test of plain colours with noise, other classes in each, and a training class of one picture."""
    root = tmp_path_factory.mktemp("own") / "Photos of mine"
    rng = np.random.default_rng(3)
    for part, classes, count in (("train", 4, 4), ("test", 3, 4), ("train/lonely", 0, 1)):
        for name, number in [(f"{part}/{part}-{c}", count) for c in range(classes)] or [(part, count)]:
            (root / name).mkdir(parents=True)
            colour = rng.integers(0, 256, 3)
            for i in range(number):
                noise = rng.integers(-30, 30, (40, 36, 3))
                Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def table(photos: Path, **changes):
    """A quick recipe on the folder."""
    return make_recipe({"id": "x", "dataset": f"folder:{photos}", "arch": "smallcnn", **QUICK, **changes}, "x")


def test_a_folder_becomes_a_model_that_is_measured_and_registered(typed, photos: Path, tmp_path: Path) -> None:
    quick = ["--iterations", 2, "--set", "groups=4", "--set", 'arch_kwargs={"width": 2}', "--input-size", 16]
    own = f"folder:{photos}"
    done = typed("train", "--defense", "act", "--dataset", own, "--arch", "smallcnn", *quick, "--out", "runs/mine")
    assert "1 class with fewer than 2 images is not learnt from: lonely" in done.err
    name, entry = read_entry(tmp_path / "runs" / "mine")
    assert name == "photos-of-mine-smallcnn-triplet-act"
    assert (entry.dataset.name, entry.input.size, entry.input.channels) == (own, 16, 3)

    attacks = ["--attacks", "CA+", "--json"]
    measured = typed("evaluate", "--model", "runs/mine", *attacks).json
    assert measured["dataset"]["name"] == own and measured["dataset"]["n_queries"] == 12
    typed("register", "runs/mine", "--registry", "own.json", "--weights", "w", "--url", f"{tmp_path}/w/{{name}}")
    again = typed("evaluate", "--model", name, *attacks, env={"DMLBENCH_CHECKPOINTS": str(tmp_path / "own.json")}).json
    assert again["measurements"][0]["value"] == measured["measurements"][0]["value"]
    assert again["model"]["weights_sha256"] == sha256_of(tmp_path / "runs" / "mine" / "last.safetensors")


def test_a_board_is_not_given_what_nobody_else_can_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(SUBMISSIONS.glob("digits-*/run"))
    e = load(run)
    assert "digits" in draft(run)
    own = e.model_copy(update={"dataset": e.dataset.model_copy(update={"name": "folder:mine"})})
    monkeypatch.setattr("dmlbench.submission.pack.load", lambda run: own)
    with pytest.raises(UsageError, match="measured on folder:mine, which only you have"):
        draft(run)


def test_a_csv_is_learnt_from(typed, photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train").rglob("*.png"))
    rows = [f"{file.parent.name},{file},train,," for file in files]
    (tmp_path / "list.csv").write_text("\n".join(["label,path,split,is_query,is_gallery", *rows]) + "\n")
    quick = ["--iterations", 1, "--set", "groups=4", "--input-size", 16]
    typed("train", "--defense", "none", "--dataset", "csv:list.csv", "--arch", "conv3", *quick, "--out", "r")
    assert read_entry(tmp_path / "r")[0] == "list-conv3-triplet-none"


def network(name: str = "test_resnet", seed: int = 5, **kwargs) -> torch.nn.Module:
    """timm's network with random weights and batch statistics that are not those of a new one."""
    torch.manual_seed(seed)
    made = timm.create_model(name, **kwargs)
    for m in made.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return made.eval()


@pytest.mark.parametrize(("width", "classes"), [(0, 10), (10, 10), (24, 10)])
def test_the_network_begins_with_all_of_the_given_weights(
    photos: Path, tmp_path: Path, width: int, classes: int
) -> None:
    """Embeddings before the first step: those of timm's own network on pixels normalised by hand."""
    trained = network(num_classes=classes)
    torch.save(trained.state_dict(), tmp_path / "given.pth")
    recipe = table(photos, arch="timm:test_resnet", init=str(tmp_path / "given.pth"), embed_dim=width)
    recipe, preprocess = settled(recipe)
    assert recipe.mean == recipe.std == (0.5, 0.5, 0.5) and preprocess == Preprocess.standard((3, 32, 32))
    learner, begun = loop.make_learner(recipe, preprocess, 4)
    assert begun is not None and sha256_of(tmp_path / "given.pth") in begun.origin
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        raw = learner.embedder.eval().network((images - 0.5) / 0.5)
        features = trained.forward_head(trained.forward_features((images - 0.5) / 0.5), pre_logits=True)
        if width == classes:
            torch.testing.assert_close(raw, trained((images - 0.5) / 0.5))
        else:
            ours = learner.embedder.network
            here = ours.forward_head(ours.forward_features((images - 0.5) / 0.5), pre_logits=True)
            torch.testing.assert_close(here, features)
            assert raw.shape[1] == (width or features.shape[1])
    assert any("is new" in note for note in begun.notes) == (width == 24)


def test_a_run_goes_on_from_another(photos: Path, tmp_path: Path) -> None:
    """The second run has the first's network, last layer and all, and says so."""
    train(table(photos), tmp_path / "a")
    recipe = table(photos, init=str(tmp_path / "a"), defense="est")
    learner, begun = loop.make_learner(*settled(recipe), 4)
    held = load_file(tmp_path / "a" / "last.safetensors")
    assert all(torch.equal(v, held[k]) for k, v in learner.embedder.network.state_dict().items())
    assert begun is not None and begun.origin.startswith(f"begins with x, trained on folder:{photos} (sha256 ")
    entry = read_entry(train(recipe, tmp_path / "b").folder)[1]
    assert entry.extra_training_data == begun.origin


def test_a_resumed_run_needs_its_first_weights_no_more(photos: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(row: loop.Progress) -> None:
        if row.iteration == 2:
            raise Stop

    file = tmp_path / "given.pth"
    torch.save(network().state_dict(), file)
    recipe = table(photos, arch="timm:test_resnet", init=str(file), iterations=3)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Stop):
        train(recipe, tmp_path / "cut", report=stop)
    file.write_bytes(b"another file")
    assert train(recipe, tmp_path / "cut", resume=True).entry == whole.entry


def test_a_run_is_not_resumed_on_other_pictures(tmp_path: Path) -> None:
    mine = class_tree(tmp_path / "mine", classes=4, each=4, parts=("train",))
    train(table(mine), tmp_path / "run")
    picture(mine / "train" / "class0" / "new.png", seed=99)
    with pytest.raises(UsageError, match="begun on other pictures or labels"):
        train(table(mine), tmp_path / "run", resume=True)
    (mine / "train" / "class0" / "new.png").unlink()
    train(table(mine), tmp_path / "run", resume=True)


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_frozen_statistics_stay_and_the_rest_is_learnt(photos: Path, tmp_path: Path, statistics: str) -> None:
    given = network(num_classes=0)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    recipe = table(
        photos,
        arch="timm:test_resnet",
        init=str(tmp_path / "given.pth"),
        embed_dim=0,
        batch_norm=statistics,
        margin=2.0,  # every triplet has a loss
    )
    train(recipe, tmp_path / "r")
    before, after = given.state_dict(), load_file(tmp_path / "r" / "last.safetensors")
    running = [k for k in before if "running_" in k]
    assert running and all(torch.equal(before[k], after[k]) == (statistics == "frozen") for k in running)
    assert not any(torch.equal(before[k], after[k]) for k in before if k.startswith("conv1.") and "weight" in k)


def test_weights_stored_in_half_are_those_that_are_measured(photos: Path, tmp_path: Path) -> None:
    full = train(table(photos), tmp_path / "full")
    train(table(photos, stored="float16"), tmp_path / "half")
    held, exact = (load_file(tmp_path / name / "last.safetensors") for name in ("half", "full"))
    assert all(v.dtype == torch.float16 and torch.equal(v, exact[k].half()) for k, v in held.items())
    by_hand = load_model(str(full.folder))
    by_hand.network.load_state_dict({k: v.float() for k, v in held.items()})
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(str(tmp_path / "half"))(images), by_hand(images))


def test_a_number_too_large_for_half_is_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 70000.0)
    with pytest.raises(DataError, match="weight holds numbers above 65504"):
        write_weights(tmp_path / "x.safetensors", layer, half=True)
    assert not list(tmp_path.iterdir())


def test_a_vision_transformer_is_made_for_the_images(photos: Path, tmp_path: Path) -> None:
    """Position embeddings of 160x160 are resized as timm does."""
    given = network("test_vit", num_classes=0)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    recipe, preprocess = settled(table(photos, arch="timm:test_vit", init=str(tmp_path / "given.pth"), embed_dim=0))
    assert recipe.arch_kwargs == {"img_size": [32, 32]}
    learner, _ = loop.make_learner(recipe, preprocess, 4)
    given.set_input_size(img_size=(32, 32))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(learner.embedder.eval().network(images), given(images))


def test_members_of_an_ensemble_begin_with_the_given_weights(photos: Path, tmp_path: Path) -> None:
    given = network(num_classes=0)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    kwargs = {"member": "timm:test_resnet", "members": 2}
    recipe = table(
        photos, arch="ensemble", arch_kwargs=kwargs, embed_dim=0, init=str(tmp_path / "given.pth"),
        loss="proxy-anchor", defense="eat",
    )  # fmt: skip
    learner, _ = loop.make_learner(*settled(recipe), 4)
    for member in learner.embedder.network.members:
        assert all(torch.equal(v, given.state_dict()[k]) for k, v in member.state_dict().items())
    train(recipe, tmp_path / "r")
    images = torch.rand(2, 3, 32, 32)
    whole = load_model(str(tmp_path / "r"))
    assert whole(images).shape == (2, 2 * given.num_features)
    assert read_entry(tmp_path / "r")[1].normalize.mean == (0.5, 0.5, 0.5)


def test_published_weights_are_asked_for_by_their_network(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(num_classes=0)
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **k: made if pretrained else real(name, **k)
    )
    recipe = table(photos, arch="timm:test_resnet", init="pretrained", embed_dim=6)
    learner, begun = loop.make_learner(*settled(recipe), 4)
    own = learner.embedder.network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in made.state_dict().items())
    assert begun is not None and "the published weights of timm:test_resnet" in begun.origin


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": "resnet18"}, UsageError, "did you mean 'timm:resnet18'"),
        ({"arch": "qqq"}, UsageError, "known: smallcnn, .*, timm:NAME, torchvision:NAME"),
        ({"arch": "tim:resnet18"}, UsageError, "did you mean 'timm'"),
        ({"arch": "timm:resnet81"}, UsageError, "timm has no model 'resnet81'"),
        ({"dataset": "foldr:x"}, UsageError, "did you mean 'folder'"),
        ({"embed_dim": 0}, UsageError, "'smallcnn' has none to spare"),
        ({"init": "nowhere"}, UsageError, "init 'nowhere' is no weights file"),
        ({"init": "digits-smallcnn-triplet-nome"}, UsageError, "did you mean 'digits-smallcnn-triplet-none'"),
        ({"init": "digits-smallcnn-triplet-none"}, DataError, "other shape"),
        ({"init": "digits-smallcnn-triplet-none", "arch": "timm:test_resnet"}, UsageError, "is a smallcnn, and the network"),
        ({"init": "pretrained"}, UsageError, "of timm's and torchvision's networks, not of 'smallcnn'"),
        ({"init_without": "fc"}, UsageError, "without one it would do nothing"),
        ({"init": "pretrained", "init_without": "fc", "arch": "timm:test_resnet"}, UsageError, "without one it would do nothing"),
        ({"init": "stray.pth", "init_without": "embedding,embeding", "arch": "timm:test_resnet"}, UsageError, "'embeding': stray.pth has no such layer"),
        ({"batch_norm": "frozen"}, UsageError, "name these with init"),
        ({"arch": "mobilefacenet"}, UsageError, "is fed 112x96: leave input_size out"),
        ({"init": "stray.pth", "arch": "timm:test_resnet"}, UsageError, "--set init_without=embedding begins without"),
        ({"init": "short.pth", "arch": "timm:test_resnet"}, DataError, "missing conv1.0.weight"),
        ({"init": "vit.pth", "arch": "timm:test_vit", "batch_norm": "frozen"}, UsageError, "has no batch norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_begun_with_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes, error, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state = network().state_dict()
    torch.save({**state, "embedding.weight": torch.rand(8, 512)}, "stray.pth")
    torch.save({k: v for k, v in state.items() if k != "conv1.0.weight"}, "short.pth")
    torch.save(network("test_vit").state_dict(), "vit.pth")
    with pytest.raises(error, match=message):
        train(table(photos, **changes), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_named_layers_are_begun_without(photos: Path, tmp_path: Path) -> None:
    state = network(num_classes=0).state_dict()
    torch.save({**state, "embedding.weight": torch.rand(8, 512)}, tmp_path / "stray.pth")
    changes = {"init": str(tmp_path / "stray.pth"), "init_without": "embedding", "embed_dim": 0}
    learner, _ = loop.make_learner(*settled(table(photos, arch="timm:test_resnet", **changes)), 4)
    assert all(torch.equal(v, state[k]) for k, v in learner.embedder.network.state_dict().items())


def test_rows_of_no_class_and_of_short_classes_are_not_learnt_from() -> None:
    labels = [0, 0, 1, JUNK, 2, 2, 2, DISTRACTOR, 3, 3]
    images = ArrayImages(np.zeros((len(labels), 1, 2, 2), np.uint8))
    data = RetrievalDataset("mine", "train", images, labels, class_names=["a", "b", "c", "d"])
    for needed in (2, 3, 4):
        counts = {c: labels.count(c) for c in labels if c >= 0}
        enough = [c for c in counts if counts[c] >= needed]
        kept = enough if len(enough) >= 2 else list(counts)  # else the sampler's own error tells
        rows, notes = learnable(data, needed)
        assert rows.tolist() == [i for i, label in enumerate(labels) if label in kept]
        assert ("2 images of no class" in notes[0]) and (any("fewer than" in n for n in notes) == (needed == 2))


def test_copies_that_are_learnt_from_are_counted() -> None:
    contents, labels = [0, 0, 0, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 2]  # the last two of two classes, one too short
    images = ArrayImages(np.array(contents, np.uint8)[:, None, None, None])
    (note,) = (n for n in learnable(RetrievalDataset("mine", "train", images, labels), 2)[1] if "copies" in n)
    assert note.startswith("3 images")
    field = RetrievalDataset("field", "train", images, labels, copies_count=True)
    assert not any("copies" in n for n in learnable(field, 2)[1])


def test_the_quick_check_is_the_same_in_parts(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, preprocess = settled(table(photos, eps="2/255"))
    learner, _ = loop.make_learner(recipe, preprocess, 4)
    images, labels = torch.rand(13, 3, 32, 32), torch.arange(13) % 3
    whole = loop.quick_check(learner, recipe, images, labels)
    monkeypatch.setattr("dmlbench.training.progress.QUICK_VALUES", 4 * images[0].numel())
    assert loop.quick_check(learner, recipe, images, labels) == pytest.approx(whole, abs=1e-4)


def test_a_record_says_how_pictures_are_prepared() -> None:
    ways = [entry.fed.preprocess for entry in PUBLISHED.values()]
    ways += [Preprocess.standard(shape) for shape in ((1, 8, 8), (3, 128, 128), (3, 224, 224), (3, 256, 128))]
    ways += [Preprocess((64, 64), longest=60, pad=9), Preprocess((96, 96), resize=(120, 120), order="bgr")]
    for way in ways:
        assert preprocess_of(input_of(way)) == way
    with pytest.raises(UsageError, match="no record says"):
        input_of(Preprocess((32, 32), resize=(40, 50)))


def test_our_own_networks_take_the_images_of_the_data_set(photos: Path) -> None:
    recipe, _ = settled(table(photos, arch="conv3"))
    assert recipe.arch_kwargs == {"channels": 3, "size": 32}
    plain = load_recipe("mnist-conv3-triplet-act")
    assert settled(plain)[0] == plain, "a packaged recipe says all of it"


def test_an_ensemble_does_not_ask_a_hub() -> None:
    with pytest.raises(UsageError, match="unknown architecture 'hf-hub:a/b'"):
        ARCHITECTURES["ensemble"](member="hf-hub:a/b", members=2)


@pytest.mark.parametrize("name", [n for n, entry in DEFENSES.items() if not entry.ensemble and not entry.norms])
def test_every_defence_learns_from_a_network_with_frozen_statistics(photos: Path, tmp_path: Path, name: str) -> None:
    torch.save(network(num_classes=0).state_dict(), tmp_path / "given.pth")
    loss = "proxy-anchor" if "proxy-anchor" in DEFENSES[name].losses else "triplet"
    changes = {"init": str(tmp_path / "given.pth"), "embed_dim": 0, "batch_norm": "frozen", "loss": loss}
    done = train(table(photos, arch="timm:test_resnet", defense=name, **changes), tmp_path / "r")
    assert all(math.isfinite(row.loss) for row in done.progress)
    assert json.loads((tmp_path / "r" / "recipe.json").read_text())["batch_norm"] == "frozen"


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if name.startswith("grocery-")])
def test_the_recipes_on_grocery_begin_with_imagenets_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member has the published file's embeddings of pixels prepared and normalised as by ``evaluate``."""
    weights = shared("weights", "mobilenetv2_imagenet.pt")
    monkeypatch.setenv("DMLBENCH_CHECKPOINT_BASE", str(weights.parent))
    plain = load_model("torchvision:mobilenet_v2", weights=weights, embed_dim=0, input_size=(128, 128))
    registered = load_model("mobilenetv2-imagenet-128")
    recipe, preprocess = settled(load_recipe(name))
    learner, begun = loop.make_learner(recipe, preprocess, 31)
    assert begun is not None and sha256_of(weights) in begun.origin and "trained on imagenet" in begun.origin
    embedder = learner.embedder.eval()
    assert embedder.preprocess == plain.preprocess == registered.preprocess == preprocess
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        wanted = plain(images)
        members = getattr(embedder.network, "members", [embedder.network])
        for member in members:
            assert torch.equal(embedder.distance.finish(member(embedder.normalise(images))), wanted)
        assert torch.equal(registered(images), wanted)

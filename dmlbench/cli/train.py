"""``dmlbench train``: train a model by a recipe."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click
import torch

from dmlbench.cli.model_options import Size
from dmlbench.cli.output import Bar, hint, json_option, print_json, print_list, tell
from dmlbench.errors import UsageError
from dmlbench.run.parallel import World
from dmlbench.run.subject import resolve_device
from dmlbench.training.defenses import DEFENSES, user_defense
from dmlbench.training.loop import train as run_training
from dmlbench.training.progress import Progress as Row
from dmlbench.training.recipe import Recipe, changed, load_recipe, make_recipe, packaged_recipes, short_name, slug
from dmlbench.training.start import architecture_of
from dmlbench.user_code import RUN

EXAMPLE = """\b
Examples:
  dmlbench train digits-smallcnn-triplet-hm-lga-ics --out runs/mine
  dmlbench train --defense act --dataset digits --arch smallcnn --set eps=40/255 --out runs/act
  dmlbench train --defense hm --dataset folder:photos --arch timm:resnet18 --init resnet18.pth --out runs/own
  torchrun --nproc-per-node 2 -m dmlbench train my-recipe.toml --out runs/two
"""


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` to a key and a value: JSON where it is JSON, else the text itself."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"--set {text!r} must be KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Changed keys from ``--set``, as :func:`dmlbench.training.recipe.changed` takes them."""
    return dict(map(parse_setting, pairs))


def device_of_process(name: str) -> torch.device:
    """The device by name; where several processes train, ``cuda`` is each one's own."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def gather(recipe: str | None, changes: dict[str, Any], named: dict[str, Any]) -> Recipe:
    """The recipe of the command line: a file or packaged id, or one made from the options."""
    if recipe is not None:
        return load_recipe(recipe, {**named, **changes})
    named = {**architecture_of(named.get("init")), **named} if "arch" not in named else named
    missing = [f"--{key}" for key in ("defense", "dataset", "arch") if key not in named]
    if missing:
        raise UsageError(f"name a RECIPE, or give {', '.join(missing)} (dmlbench train --list shows the recipes)")
    losses = DEFENSES[named["defense"]].losses
    if losses and "triplet" not in losses:
        changes = {"loss": losses[0], **changes}
    parts = (short_name(named["dataset"]), short_name(named["arch"]), changes.get("loss", "triplet"), named["defense"])
    name = slug("-".join(map(str, parts)))
    name += "-own" if name in packaged_recipes() else ""  # a registered id is no other model's
    table = {"id": name, **named}
    return make_recipe(changed(table, changes), "the options")


@click.command(epilog=EXAMPLE)
@click.argument("recipe", required=False)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder (needed to train).")
@click.option(
    "--defense",
    help="Defence, e.g. none, est, act, hm, eat, or FILE.py:NAME (runs that code); instead of a RECIPE, or over it.",
)
@click.option(
    "--dataset",
    help="Data set whose training split is learnt: an id (dmlbench datasets list), folder:PATH or csv:PATH.",
)
@click.option(
    "--arch", help="Network: smallcnn, conv3, ..., timm:NAME or torchvision:NAME; by default that of a model in --init."
)
@click.option("--embed-dim", type=int, help="Width of the last layer; 0 leaves it out (timm, torchvision).")
@click.option(
    "--init",
    metavar="ID|FILE|RUN|pretrained",
    help="Begin with these weights, all of them: a registered model, a file, a run folder; pretrained: as published.",
)
@click.option(
    "--input-size",
    type=Size(),
    help="Side of the images in pixels, or HxW; by default the data set's, 224 of your own.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Seed of everything random; of a new network's weights with --set first_weights=seed.",
)
@click.option("--iterations", type=click.IntRange(min=1), help="Number of steps.")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change any key of the recipe; TABLE.KEY for one key of a table.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; other numbers round sums otherwise.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--allow-collapse", is_flag=True, help="Train on where all embeddings have become alike.")
@click.option("--list", "listing", is_flag=True, help="List the packaged recipes.")
@json_option
def train(
    recipe: str | None,
    out: Path | None,
    pairs: tuple[str, ...],
    device: str,
    threads: int | None,
    resume: bool,
    allow_collapse: bool,
    listing: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model by RECIPE: a packaged recipe's id or a TOML file, or by --defense, --dataset and --arch.

    Writes weights (last and best), log.csv, checkpoint.json (the registry entry) and what --resume
    needs. A step's search uses the same optimizers as the attacks.
    """
    if listing:
        names = packaged_recipes()
        recipes = [{"id": name, "title": load_recipe(name).title} for name in names]
        print_list(recipes, ("id", "title"), as_json)
        return
    named = {key: value for key, value in options.items() if value is not None}
    if ".py:" in named.get("defense", ""):
        named["defense"] = user_defense(named["defense"])
        tell(RUN[named["defense"]])
    chosen = gather(recipe, settings(pairs), named)
    if out is None:
        raise UsageError("--out is needed: the folder that the run is written to")
    if threads is not None:
        torch.set_num_threads(threads)
    where = device_of_process(device)
    world = World.join(where)
    try:
        with Bar("decoding images") as decoding, Bar(chosen.id) as steps:

            def report(row: Row) -> None:
                if world.leads:
                    steps.say(
                        f"{chosen.id} {row.iteration}/{chosen.iterations} loss {row.loss:.4f}  R@1 {row.recall_at_1:.1f}  "
                        f"attacked {row.attacked_recall_at_1:.1f}  spread {row.spread:.2f}"
                    )

            done = run_training(
                chosen,
                out,
                device=where,
                resume=resume,
                allow_collapse=allow_collapse,
                report=report,
                tell=lambda note: tell(note) if world.leads else None,
                decoded=decoding.at if world.leads else lambda done, total: None,
                stepped=steps.at if world.leads else lambda done, total: None,
                world=world,
            )
    except KeyboardInterrupt:
        if (out / "state.pt").exists():
            click.echo(f"go on with the same command and --resume; {out} holds the last check", err=True)
        raise
    finally:
        world.leave()
    if not world.leads:
        return
    last = done.progress[-1]
    if as_json:
        print_json({"id": chosen.id, "folder": str(out), "log": [vars(row) for row in done.progress]})
        return
    click.echo(
        f"{chosen.id}: {last.iteration} steps, loss {last.loss:.4f}, training R@1 {last.recall_at_1:.1f} "
        f"(quick attack {last.attacked_recall_at_1:.1f}); {out / 'last.safetensors'}"
    )
    hint(f"dmlbench evaluate --model {shlex.quote(str(out))} --out {shlex.quote(str(out))}-scored")

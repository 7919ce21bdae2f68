"""``dmlbench models``: what the registry holds."""

import click

from dmlbench.checkpoints import checkpoint, checkpoints
from dmlbench.cli.output import json_option, print_facts, print_list


@click.group(epilog="Example: dmlbench models list")
def models() -> None:
    """List and show models."""


@models.command("list", epilog="Example: dmlbench models list --json")
@json_option
def list_models(as_json: bool) -> None:
    """Every registered model."""
    items = [
        {
            "id": name,
            "dataset": c.dataset.name,
            "arch": c.arch.builder,
            "loss": c.train.loss,
            "defense": c.defense.name,
            "status": c.status,
            "title": c.title,
        }
        for name, c in checkpoints().items()
    ]
    print_list(items, ("id", "dataset", "arch", "loss", "defense", "status"), as_json)


@models.command("show", epilog="Example: dmlbench models show digits-smallcnn-triplet-hm-lga-ics")
@click.argument("name")
@json_option
def show_model(name: str, as_json: bool) -> None:
    """One model's record in checkpoints.json."""
    print_facts({"id": name, **checkpoint(name).model_dump(mode="json", exclude_none=True)}, as_json)

"""``dmlbench datasets``: which image sets there are."""

import click

from dmlbench.cli.output import json_option, print_facts, print_list
from dmlbench.datasets import DATASETS, load_dataset
from dmlbench.errors import DataError


@click.group(epilog="Example: dmlbench datasets list")
def datasets() -> None:
    """List and show data sets."""


@datasets.command("list", epilog="Example: dmlbench datasets list --json")
@json_option
def list_datasets(as_json: bool) -> None:
    """Every data set by id."""
    items = [
        {"id": name, "protocol": d.protocol, "packaged": d.packaged, "title": d.title} for name, d in DATASETS.items()
    ]
    print_list(items, ("id", "protocol", "title"), as_json)


@datasets.command("show", epilog="Example: dmlbench datasets show digits")
@click.argument("name")
@json_option
def show_dataset(name: str, as_json: bool) -> None:
    """What a data set holds, as found on this machine."""
    entry = DATASETS[name]
    facts: dict[str, object] = {"id": name, "title": entry.title, "protocol": entry.protocol}
    for split in ("train", "test"):
        try:
            d = load_dataset(name, split)
        except DataError as error:
            facts[split] = f"not here: {error}"
            continue
        facts["licence"], facts["source"] = d.licence, d.source
        facts[split] = {
            "images": len(d),
            "classes": len(set(d.labels.tolist())),
            "queries": len(d.query),
            "gallery": len(d.gallery),
            "shape": list(d.images.shape),
            "sha256": d.sha256,
        }
    print_facts(facts, as_json)

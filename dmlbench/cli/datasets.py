"""``dmlbench datasets``: which image sets there are, getting them, and checking them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dmlbench.cli.output import Bar, json_option, print_facts, print_json, print_list
from dmlbench.datasets import DATASETS, dataset_entry, load_dataset
from dmlbench.datasets.base import counts_of
from dmlbench.errors import DataError, UsageError

if TYPE_CHECKING:
    from dmlbench.datasets.verify import SplitReport


@click.group(epilog="Example: dmlbench datasets list")
def datasets() -> None:
    """List, show, prepare and verify data sets."""


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
    """What a data set holds, as it is on this machine."""
    entry = dataset_entry(name)
    facts: dict[str, object] = {"id": name, "title": entry.title, "protocol": entry.protocol}
    for split in ("train", "test"):
        try:
            d = load_dataset(name, split)
        except DataError as error:
            facts[split] = f"not here: {error}"
            continue
        except UsageError as error:
            if split == "test":
                raise
            facts[split] = str(error)
            continue
        facts["licence"], facts["source"] = d.licence, d.source
        facts[split] = {
            "images": len(d),
            "classes": counts_of(d).classes,
            "queries": len(d.query),
            "gallery": len(d.gallery),
            "shape": list(d.images.shape),
            "sha256": d.sha256,
        }
    print_facts(facts, as_json)


@datasets.command("prepare", epilog="Example: dmlbench datasets prepare cub --from CUB_200_2011.tgz")
@click.argument("name")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), metavar="ARCHIVE|FOLDER", help="What you have already."
)
@json_option
def prepare_dataset(name: str, source: Path | None, as_json: bool) -> None:
    """Put a data set where dmlbench finds it: download, unpack or link it, or say how to get it.

    It goes below DMLBENCH_DATA, or ~/.cache/dmlbench/data where that is not set. folder:PATH with
    --from ARCHIVE unpacks your own archive of class folders there.
    """
    from dmlbench.datasets.prepare import prepare

    with Bar("preparing") as bar:
        done = prepare(name, source, bar.at)
    if as_json:
        print_json({"id": name, "done": done})
    else:
        click.echo(done)


@datasets.command("verify", epilog="Example: dmlbench datasets verify cub")
@click.argument("name")
@json_option
def verify_dataset(name: str, as_json: bool) -> None:
    """Count a data set's images and decode every one; exit code 4 if it is not whole."""
    from dmlbench.datasets.verify import verify

    with Bar("decoding") as bar:
        reports = verify(name, bar.at)
    if as_json:
        splits = [
            {
                "split": r.split,
                "whole": r.complete,
                "images": r.counts.images if r.counts else 0,
                "classes": r.counts.classes if r.counts else 0,
                "expected_images": r.expected.images if r.expected else None,
                "classes_of_one_image": r.lonely,
                "broken": list(r.broken),
                "problem": r.problem,
                "notes": list(r.notes),
            }
            for r in reports
        ]
        print_json({"id": name, "whole": all(r.complete for r in reports), "splits": splits})
    else:
        for r in reports:
            click.echo(_sentence(r))
            for line in r.broken:
                click.echo(f"  {line}")
            for note in r.notes:
                click.echo(f"{r.split}: note: {note}")
    if not all(r.complete for r in reports):
        raise DataError(f"data set {name!r} is not whole")


def _sentence(r: "SplitReport") -> str:
    """The report on a split, in one sentence."""
    if r.problem:
        return f"{r.split}: {r.problem}"
    text = f"{r.split}: {r.counts}"
    if r.expected is not None:
        text += ", as published" if r.counts == r.expected else f", where {r.expected} are expected"
    if r.lonely:
        text += f"; {r.lonely} classes have a single image"
    return f"{text}; {f'{len(r.broken)} images are broken:' if r.broken else 'every image decodes'}"

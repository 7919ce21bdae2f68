"""``dmlbench models``: what the registry holds, and what is in a weights file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dmlbench.checkpoints import Checkpoint, checkpoint, checkpoints, packaged
from dmlbench.cli.output import json_option, print_facts, print_list
from dmlbench.errors import UsageError
from dmlbench.registry import suggest


@click.group(epilog="Example: dmlbench models list")
def models() -> None:
    """List, show and inspect models."""


@models.command("list", epilog="Example: dmlbench models list --trained-on cub")
@click.option("--trained-on", metavar="DATASET", help="Only models that were trained on this.")
@click.option(
    "--all", "everything", is_flag=True, help="Superseded and retracted models too, which --json always lists."
)
@json_option
def list_models(trained_on: str | None, everything: bool, as_json: bool) -> None:
    """Every registered model: its family and size, what it was trained on, R@1 as claimed and as measured.

    R@1, in percent, is of clean pictures of the data set that the model was trained on, else (*) of another one.
    """
    measured = _measured()
    items: list[dict[str, Any]] = [
        {
            "id": name,
            "family": c.family,
            "size": _size(c.arch.n_params),
            "trained on": c.dataset.name,
            "claimed": (claimed := _chosen(_claimed(c), c.dataset.name))[0],
            "claimed on": claimed[1],
            "measured": (found := _chosen(measured.get(name, {}), c.dataset.name))[0],
            "measured on": found[1],
            "loss": c.train.loss,
            "defense": c.defense.name,
            "status": c.status,
            "title": c.title,
        }
        for name, c in checkpoints().items()
        if (everything or as_json or c.status == "active") and trained_on in (None, c.dataset.name)
    ]
    if trained_on is not None:
        trained = sorted({c.dataset.name for c in checkpoints().values()})
        if trained_on not in trained:
            raise UsageError(f"no registered model was trained on {trained_on!r}{suggest(trained_on, trained)}")
    if as_json:
        print_list(items, (), as_json)
        return
    columns = ("id", "family", "size", "claimed", "measured")
    rows = [[i["id"], i["family"], i["size"] or "", *(_elsewhere(i, c) for c in columns[3:])] for i in items]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths, strict=False)]
        return " ".join([*left, *(c.rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True))]).rstrip()

    click.echo(line(columns))
    for data in sorted({i["trained on"] for i in items}):
        click.echo(f"trained on {data}:")
        for item, row in zip(items, rows, strict=True):
            if item["trained on"] == data:
                click.echo(line(row))
    others = {c: sorted({i[f"{c} on"] for i in items if _elsewhere(i, c).endswith("*")}) for c in columns[3:]}
    if any(others.values()):
        text = ", ".join(f"{column} on {' or '.join(data)}" for column, data in others.items() if data)
        click.echo(f"* {text}\ndmlbench models show ID lists every claim")


def _size(count: int | None) -> str | None:
    """A number of parameters as people say it: 22M, 89k."""
    if count is None:
        return None
    return (
        f"{count / 1e6:.0f}M"
        if count >= 9.5e6
        else f"{count / 1e6:.1f}M"
        if count >= 9.995e5
        else f"{count / 1e3:.0f}k"
    )


def _elsewhere(item: Mapping[str, Any], column: str) -> str:
    """R@1 claimed or measured, marked where it is of another data set than the model was trained on."""
    if item[column] is None:
        return ""
    return f"{item[column]:.1f}" + ("*" if item[f"{column} on"] != item["trained on"] else "")


def _chosen(recalls: Mapping[str, float], trained_on: str) -> tuple[float | None, str | None]:
    """Of R@1 by data set that of the one trained on, else the first, and which data set that is."""
    dataset = trained_on if trained_on in recalls else next(iter(recalls), None)
    return (None, None) if dataset is None else (recalls[dataset], dataset)


def _claimed(entry: Checkpoint) -> dict[str, float]:
    """R@1 on clean pictures by data set as somebody else states it, percent."""
    recalls: dict[str, float] = {}
    for claim in entry.claims:
        if claim.metric == "recall_at_1":
            recalls.setdefault(claim.dataset or entry.dataset.name, claim.value)
    return recalls


def _measured() -> dict[str, dict[str, float]]:
    """R@1 on clean pictures by model and data set as the boards have it, percent; the boards of an attack on it alike."""
    recalls: dict[str, dict[str, float]] = {}
    for path in sorted(packaged("leaderboard").glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row.get("recall_at_1") and row.get("status") != "claimed":
                    recalls.setdefault(row["model"], {}).setdefault(row["dataset"], float(row["recall_at_1"]))
    return recalls


@models.command("show", epilog="Example: dmlbench models show digits-smallcnn-triplet-hm-lga-ics")
@click.argument("name")
@json_option
def show_model(name: str, as_json: bool) -> None:
    """One model's record in checkpoints.json."""
    print_facts({"id": name, **checkpoint(name).model_dump(mode="json", exclude_none=True)}, as_json)


@models.command("inspect", epilog="Example: dmlbench models inspect my_checkpoint.pth")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--checkpoint-key", help="Where in the file the state dictionary is, e.g. model or ema.net.")
@click.option("--arch", multiple=True, help="Compare with this architecture, e.g. timm:resnet50; repeat for several.")
@json_option
def inspect_file(file: Path, checkpoint_key: str | None, arch: tuple[str, ...], as_json: bool) -> None:
    """What is in a weights file, which architecture fits, and what is missing. Nothing in it is run."""
    from dmlbench.models.files import listed, read_file
    from dmlbench.models.inspection import TWINS, clip_names, describe, fits

    weights = read_file(file, checkpoint_key)
    facts = describe(weights)
    best = fits(weights, arch or None)[:3]
    ranking = [
        {
            "arch": f.builder,
            "fits": f.complete,
            "embed_dim": f.embed_dim,
            "prefix": f.prefix,
            "matched": f.matched,
            "missing": list(f.missing),
            "unexpected": list(f.unexpected),
            "other_shape": list(f.other_shape),
            "left_out": list(f.left),
        }
        for f in best
    ]
    if as_json:
        print_facts({"id": str(file), **facts, "architectures": ranking}, as_json)
        return
    print_facts({"file": str(file), **facts}, as_json)
    for f in best:
        lacks = [
            f"{what} {listed(names)}"
            for what, names in (
                ("missing", f.missing),
                ("unexpected", f.unexpected),
                ("other shape", f.other_shape),
                (f"{'fits, but ' if f.but_for_layers else ''}would leave out", f.left),
            )
            if names
        ]
        prefix = f" without prefix {f.prefix!r}" if f.prefix else ""
        width = f", embeddings of {f.embed_dim} values" if f.embed_dim else ""
        verdict = f"fits{prefix}{width}" if f.complete else "; ".join(lacks)
        click.echo(f"{f.builder}: {verdict}")
    for note in weights.notes:
        click.echo(f"note: {note}")
    if names := clip_names(weights):
        click.echo(f"a vision half of CLIP: --model {' or '.join(names)} --weights {file}")
    elif not best:
        click.echo("no known architecture has tensors of these names: compare with one by --arch timm:NAME")
    elif best[0].complete and (twin := TWINS.get(best[0].builder)):
        click.echo(f"one of two with the same tensors: --model {best[0].builder} or {twin} --weights {file}")
    elif best[0].complete:
        click.echo(f"try: dmlbench evaluate --model {file} --dataset ...")

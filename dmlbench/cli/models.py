"""``dmlbench models``: what the registry holds, and what is in a weights file."""

from pathlib import Path

import click

from dmlbench.checkpoints import checkpoint, checkpoints
from dmlbench.cli.output import json_option, print_facts, print_list


@click.group(epilog="Example: dmlbench models list")
def models() -> None:
    """List, show and inspect models."""


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


@models.command("inspect", epilog="Example: dmlbench models inspect my_checkpoint.pth")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--checkpoint-key", help="Where in the file the state dictionary is, e.g. model or ema.net.")
@click.option("--arch", multiple=True, help="Compare with this architecture, e.g. timm:resnet50; repeat for several.")
@json_option
def inspect_file(file: Path, checkpoint_key: str | None, arch: tuple[str, ...], as_json: bool) -> None:
    """What is in a weights file, which architecture fits, and what is missing. Nothing in it is run."""
    from dmlbench.models.files import listed, read_file
    from dmlbench.models.inspection import clip_names, describe, fits

    found = read_file(file, checkpoint_key)
    facts = describe(found)
    best = fits(found, arch or None)[:3]
    ranking = [
        {
            "arch": f.builder,
            "fits": f.whole,
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
                ("fits, but would leave out", f.left),
            )
            if names
        ]
        prefix = f" without prefix {f.prefix!r}" if f.prefix else ""
        width = f", embeddings of {f.embed_dim} values" if f.embed_dim else ""
        verdict = f"fits{prefix}{width}" if f.whole else "; ".join(lacks)
        click.echo(f"{f.builder}: {verdict}")
    for note in found.notes:
        click.echo(f"note: {note}")
    if names := clip_names(found):
        click.echo(f"a vision half of CLIP: --model {' or '.join(names)} --weights {file}")
    elif not best:
        click.echo("no known architecture has tensors of these names: compare with one by --arch timm:NAME")
    elif best[0].whole:
        click.echo(f"try: dmlbench evaluate --model {file} --dataset ...")

"""``dmlbench register``: put finished training runs into a registry."""

import shlex
from pathlib import Path

import click

from dmlbench.checkpoints import PACKAGE
from dmlbench.cli.output import json_option, print_json, tell
from dmlbench.models.registration import register as add


@click.command(epilog="Example: dmlbench register runs/mine --registry checkpoints.json --weights dmlbench/weights")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--registry", type=click.Path(path_type=Path, dir_okay=False), default="checkpoints.json", show_default=True
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False),
    default="dmlbench/weights",
    show_default=True,
    help="Folder that the weights are copied to.",
)
@click.option(
    "--url", help="Address of weights that are fetched, with {name}, e.g. {base}/{name}; they are not packaged."
)
@click.option("--replace", is_flag=True, help="Replace an entry of the same id.")
@json_option
def register(
    runs: tuple[Path, ...], registry: Path, weights: Path, url: str | None, replace: bool, as_json: bool
) -> None:
    """Copy the weights of finished training RUNS and add their entries to the registry file."""
    packaged = PACKAGE / "weights"
    if url is None and weights.resolve() != packaged.resolve():
        tell(
            f"without --url the weights are looked for in the package alone, {packaged}; "
            f"--url {shlex.quote(f'{weights.resolve()}/{{name}}')} has them found in {weights}"
        )
    made = []
    for run in runs:
        name = add(run, registry, weights, url=url, replace=replace)
        made.append({"id": name, "run": str(run), "weights": str(weights / f"{name}.safetensors")})
        if not as_json:
            click.echo(f"{name} -> {registry}")
    if as_json:
        print_json({"registry": str(registry), "registered": made})

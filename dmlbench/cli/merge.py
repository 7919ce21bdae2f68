"""``dmlbench merge``: the units of several shards become one result."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmlbench.cli.evaluate import foreseen, keep, named, present
from dmlbench.cli.model_options import load_subject, model_options
from dmlbench.cli.output import json_option, progress
from dmlbench.errors import UsageError
from dmlbench.files import prepare_folder
from dmlbench.results import refuse_partial
from dmlbench.user_code import require_named

if TYPE_CHECKING:
    from dmlbench.models import ModelOptions

RESULT_OPTIONS = ("attacks", "limit", "eps", "seed", "eot", "surrogate")
"""What of a configuration makes a result partial."""
EPILOG = "Example: dmlbench merge runs/cub-1 runs/cub-2 --out runs/cub"


@click.command(epilog=EPILOG)
@click.argument(
    "shards", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="RUN..."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Write the run folder here."
)
@click.option("--model", help="The model, where the shards measured one that is not registered.")
@click.option("--dataset", help="The data set, where it is of your own code.")
@click.option("--attacks", help="The attacks of your own code, as the shards were told: they are not run again.")
@click.option("--surrogate", help="The surrogate, where it is of your own code.")
@click.option(
    "--pairs", type=click.Path(path_type=Path, dir_okay=False), help="The file of pairs that the shards verify."
)
@click.option("--protocol", help="The protocol's TOML file, where it is not a packaged one.")
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), help="Add or replace this model's row there.")
@model_options
@json_option
def merge(
    shards: tuple[Path, ...],
    out: Path,
    model: str | None,
    dataset: str | None,
    attacks: str | None,
    surrogate: str | None,
    pairs: Path | None,
    protocol: str | None,
    csv: Path | None,
    options: "ModelOptions",
    as_json: bool,
) -> None:
    """Join run folders made with `evaluate --shard i/n` into one result, as if one process had made it.

    Nothing is attacked here: a missing unit is an error. The model is loaded for its record, and for the audit of
    a strict protocol.
    """
    import dmlbench
    from dmlbench.attacks import ATTACKS
    from dmlbench.protocols import packaged_protocol
    from dmlbench.run.units import Units, Work, collect, shared_by
    from dmlbench.task import Options, Task

    made = shared_by(shards)
    made["surrogate"] = surrogate or made["surrogate"]
    sources = {"model": model or made["model"], "dataset": dataset or made["dataset"], "surrogate": made["surrogate"]}
    for option, given in (("model", model), ("dataset", dataset), ("surrogate", surrogate)):
        require_named(option, "" if given else sources[option], shards[0], f"with --{option}")
    named(attacks)
    if unknown := [name for name in made["attacks"] or () if ".py:" in name and name.partition("@")[0] not in ATTACKS]:
        raise UsageError(
            f"{shards[0]} was made with the attack {unknown[0]}, your own code: name its file with --attacks"
        )
    rules = packaged_protocol(made["protocol"], made.get("protocol_sha256", "")) if protocol is None else None
    rules = rules or dmlbench.load_protocol(protocol or made["protocol"])
    embedder, images = load_subject(
        model or made["model"], options, dataset or made["dataset"], made["split"], ready=True
    )
    settings: dict[str, Any] = {name: made.get(name) for name in RESULT_OPTIONS}
    how = Options(**settings, pairs=pairs, device=made.get("device", "auto"), batch_size=made.get("batch_size"))
    task = Task.of(embedder, images, rules, replace(how, argv=["dmlbench", *sys.argv[1:]]))
    foreseen(task, csv)
    refuse_partial(out, task.partial)
    prepare_folder(out)
    units = Units(out / "units")
    collect(shards, units)
    with progress() as bars:
        gathering = replace(task.options, progress=bars, work=Work(units, gather=True))
        evaluation = dmlbench.evaluate(embedder, images, rules, gathering)
    keep(evaluation, out, units)
    present(evaluation, out, csv, as_json)

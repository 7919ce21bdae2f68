"""``dmlbench evaluate``: from a model to a scored table, a run folder and a leaderboard row."""

import os
import shlex
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dmlbench.cli.model_options import MODEL_HELP, load_subject, model_options
from dmlbench.cli.output import hint, json_option, print_json, progress, tell
from dmlbench.cli.results import print_evaluation, print_plan
from dmlbench.errors import Interrupted, ShardDone, UsageError
from dmlbench.files import prepare_folder
from dmlbench.results import Evaluation, held, load, refuse_partial, save

if TYPE_CHECKING:
    from dmlbench.models import ModelOptions
    from dmlbench.protocol import Protocol
    from dmlbench.run.parallel import World
    from dmlbench.run.units import Shard, Units
    from dmlbench.task import Task

EPILOG = "Example: dmlbench evaluate --model digits-smallcnn-triplet-hm-lga-ics --out runs/digits --csv mine.csv"


def named(text: str | None) -> list[str] | None:
    """``"CA+,QA-"`` as a list; the minus signs of the papers (− and –) count as hyphens, and one's own code is read.

    Raises:
        UsageError: nothing is named.
    """
    from dmlbench.attacks import user_attacks

    if text is None:
        return None
    plain = text.replace("−", "-").replace("–", "-")
    names = [name.strip() for name in plain.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--attacks {text!r} names nothing: e.g. CA+,QA-, or all for what the protocol measures")
    return user_attacks(names)


def _batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is not 'auto' or a positive number")
    return int(value)


@click.command(epilog=EPILOG)
@click.option("--model", required=True, help=MODEL_HELP)
@click.option(
    "--dataset",
    help="A data set's id, folder:PATH, csv:FILE, or python:FILE.py:FUNCTION (runs that code); by default the one that the "
    "model was trained on.",
)
@click.option("--split", default="test", type=click.Choice(["test", "train"]), show_default=True)
@click.option(
    "--protocol", help="A protocol's name or TOML file, or several: ers-28,strict; by default the data set's."
)
@click.option(
    "--attacks",
    help="Only these parts, e.g. CA+,QA-; any attack@optimizer, e.g. QA+@square, is an extra part, and so is FILE.py:NAME "
    "(runs that code); all: the protocol's.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@click.option(
    "--batch-size", default="auto", show_default=True, callback=_batch_size, help="Queries attacked at a time."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only this many queries; marks the result partial.")
@click.option(
    "--until",
    type=float,
    metavar="POINTS",
    help="Only so many queries that ERS, or the protocol's own number, is sure to this many points; marks the result partial.",
)
@click.option(
    "--preview",
    is_flag=True,
    help="A first look: at most 64 queries and 1,000 gallery images, drawn by class; marks the result partial.",
)
@click.option(
    "--eps",
    metavar="EPS[,EPS...]",
    help="Another size of the perturbation, e.g. 2/255, or several for a curve; marks the result partial.",
)
@click.option("--seed", type=int, help="Another seed than the protocol's; marks the result partial.")
@click.option("--eot", type=click.IntRange(min=1), help="Average this many passes, for models that are random.")
@click.option("--surrogate", help="Make the adversarial images on this model instead (transfer).")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Verify the pairs of this file, LFW's pairs.txt or a CSV of probe,partner,same[,fold]; marks the result partial.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write the run folder here.")
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), help="Add or replace this model's row there.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out.")
@click.option("--shard", metavar="I/N", help="Do only the I-th of N parts, into --out; `dmlbench merge` joins them.")
@click.option("--cache", is_flag=True, help="Keep the clean embeddings on disk, for later runs of this model.")
@click.option("--plan", is_flag=True, help="Measure a few steps, print the expected time and memory, do nothing.")
@model_options
@json_option
def evaluate(
    model: str,
    dataset: str | None,
    split: str,
    protocol: str | None,
    attacks: str | None,
    device: str,
    batch_size: int | None,
    limit: int | None,
    until: float | None,
    preview: bool,
    eps: str | None,
    seed: int | None,
    eot: int | None,
    surrogate: str | None,
    pairs: Path | None,
    out: Path | None,
    csv: Path | None,
    resume: bool,
    shard: str | None,
    cache: bool,
    plan: bool,
    options: "ModelOptions",
    as_json: bool,
) -> None:
    """Score a model: benign metrics, every attack part, ERS with its interval.

    Under torchrun the processes share the queries of each attack, and the first one writes.
    """
    import dmlbench
    from dmlbench.plan import plan_of
    from dmlbench.run.units import Shard
    from dmlbench.task import Options, Task, default_protocol

    if (resume or shard) and out is None:
        raise UsageError(f"{'--resume' if resume else '--shard'} needs --out, the run folder")
    part = Shard.parse(shard) if shard else None
    world, device = _join(device)
    try:
        embedder, images = load_subject(model, options, dataset, split, ready=not plan, small=preview)
        several = [
            dmlbench.load_protocol(name.strip())
            for name in (protocol or default_protocol(images)).split(",")
            if name.strip()
        ]
        if not several or len({rules.name for rules in several}) < len(several):
            raise UsageError(f"--protocol {protocol!r} names {'a protocol twice' if several else 'no protocol'}")
        how = Options(
            attacks=named(attacks), limit=limit, until=until, seed=seed, eot=eot, surrogate=surrogate, pairs=pairs, device=device,
            batch_size=batch_size, cache=cache, resume=resume, shared={}, argv=["dmlbench", *sys.argv[1:]],
        )  # fmt: skip
        tasks = {
            name: Task.of(embedder, images, rules, replace(how, eps=sizes))
            for rules in several
            for name, sizes in _sizes(rules, eps).items()
        }
        many = len(tasks) > 1
        if many and csv:
            raise UsageError("--csv is a board of one protocol: name one with --protocol and --eps, or leave --csv out")
        if plan and until is not None:
            raise UsageError("--plan cannot tell when --until stops: leave --until out for what all queries cost")
        if plan:
            plans = {name: plan_of(task) for name, task in tasks.items()}
            if as_json:
                print_json(plans if many else next(iter(plans.values())))
                return
            for name, work in plans.items():
                print_plan(work, f"{name}, " if many else "")
            return
        done: list[tuple[Path | None, Evaluation]] = []
        for name, task in tasks.items():
            folder = out / name if out and many else out
            evaluation = _measured(task, folder, csv, part, world)
            if evaluation:
                done.append((folder, evaluation))
                if not (many and as_json):
                    present(evaluation, folder, csv, as_json)
        if many and world.leads:
            if as_json:
                print_json([evaluation.model_dump(mode="json") for _, evaluation in done])
            if out and len(done) == len(tasks):
                _write_report(out, [folder for folder, _ in done if folder])
    except KeyboardInterrupt:
        if plan:
            raise
        raise Interrupted(_how_to_resume(out is not None)) from None
    finally:
        world.leave()


def _sizes(rules: "Protocol", eps: str | None) -> dict[str, list[str] | None]:
    """By the name of its folder, the eps of each run: all in one under a protocol with a grid, else one in each.

    Raises:
        UsageError: ``--eps`` names nothing.
    """
    if eps is None:
        return {rules.name: None}
    sizes = [size.strip() for size in eps.split(",") if size.strip()]
    if not sizes:
        raise UsageError(f"--eps {eps!r} names nothing: e.g. 2/255,4/255,8/255")
    if rules.grid:
        return {rules.name: sizes}
    return {f"{rules.name}-eps-{size.replace('/', '-')}": [size] for size in sizes}


def _measured(
    task: "Task", out: Path | None, csv: Path | None, part: "Shard | None", world: "World"
) -> Evaluation | None:
    """The result of one task, saved in ``out``; None for a shard, and in all processes but the first."""
    import dmlbench
    from dmlbench.run.units import Units, Work, refuse_other
    from dmlbench.task import identity_of

    foreseen(task, csv)
    if out:
        prepare_folder(out)
        if world.leads:
            click.get_current_context().with_resource(held(out))
    units = Units(out / "units") if out else None
    resume = task.options.resume
    if out and units and resume and not part and (out / "manifest.json").exists() and units.configuration() is None:
        done = load(out)
        refuse_other(identity_of(done), task.identity, out, "name another --out")
        if not world.leads:
            return None
        click.echo(f"{out} holds the finished result of this command: nothing is done again", err=True)
        return done
    if out and not part:
        refuse_partial(out, task.partial)
    begun = units is not None and units.configuration() is not None
    try:
        with progress() if world.leads else nullcontext() as bars:
            options = replace(task.options, progress=bars, work=Work(units, world, part))
            evaluation = dmlbench.evaluate(task.embedder, task.dataset, task.official, options)
        if world.leads:
            keep(evaluation, out, units)
    except ShardDone as finished:
        click.echo(f"{finished}; when all are: dmlbench merge {out} … --out RUN", err=True)
        return None
    except Exception:
        if units and world.leads and not begun and not units.searched():  # nothing is lost, and the folder stays free
            with suppress(OSError):
                units.remove()
        raise
    return evaluation if world.leads else None


def _write_report(out: Path, folders: list[Path]) -> None:
    """One page of several protocols' results, the first in full."""
    from dmlbench.board.report import Run, write_page

    target = out / "report.html"
    prepare_folder(out)
    write_page([Run(folder.name, load(folder)) for folder in folders], target)
    click.echo(f"report: {target}", err=True)


def foreseen(task: "Task", csv: Path | None) -> None:
    """Refuse before the run what ``--csv`` would refuse after it."""
    from dmlbench.board import foresee

    if csv:
        prepare_folder(csv.parent)
        rules, embedder, images = task.official, task.embedder, task.dataset
        known = {
            "protocol": rules.name, "protocol_sha256": rules.sha256, "model": embedder.name,
            "weights_sha256": embedder.weights_sha256, "dataset": images.name, "split": images.split,
            "dataset_sha256": images.sha256,
        }  # fmt: skip
        foresee(csv, task.partial, **known, arch=None if embedder.card else embedder.arch)


def keep(evaluation: Evaluation, out: Path | None, units: "Units | None") -> None:
    """Write the run folder and delete the finished units."""
    if out:
        save(evaluation, out)
    if units:
        units.remove()


def present(evaluation: Evaluation, out: Path | None, csv: Path | None, as_json: bool) -> None:
    """Print the result and write the row, neither of which keeps the other from being done; notes on how it was made
    go to stderr."""
    for note in evaluation.environment.notes:
        tell(note)
    try:
        if as_json:
            print_json(evaluation.model_dump(mode="json"))
        else:
            print_evaluation(evaluation)
            if out:
                click.echo(f"run folder: {out}", err=True)
                hint(
                    f"dmlbench report {shlex.quote(str(out))}  (a page of it; docs/submitting.md puts it on the board)"
                )
            else:
                hint("the same with --out FOLDER keeps every query's outcome, for report, table, plot and compare")
    finally:
        if csv:
            from dmlbench.board import add_row

            add_row(evaluation, csv)


def _join(device: str) -> "tuple[World, str]":
    """The processes of torchrun, if any, and the device of this one of them."""
    from dmlbench.run.parallel import World
    from dmlbench.run.subject import resolve_device

    where = resolve_device(device)
    local = os.environ.get("LOCAL_RANK")
    if where.type == "cuda" and where.index is None and local is not None:
        import torch

        where = resolve_device(f"cuda:{int(local) % torch.cuda.device_count()}")
        torch.cuda.set_device(where)
    return World.join(where), str(where)


def _how_to_resume(has_folder: bool) -> str:
    """The message to a user who stops a run."""
    if not has_folder:
        return "interrupted; nothing was kept (with --out a run can be gone on with)"
    command = [word for word in sys.argv[1:] if word != "--resume"]
    return f"interrupted; go on with: dmlbench {shlex.join([*command, '--resume'])}"

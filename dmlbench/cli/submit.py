"""``dmlbench submit``: from a run folder to a bundle."""

from collections.abc import Iterator
from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(epilog="Example: dmlbench submit init runs/mine && dmlbench submit pack runs/mine --out mine.zip")
def submit() -> None:
    """Make a bundle to submit; docs/submitting.md goes through it step by step."""


@submit.command(epilog="Example: dmlbench submit init runs/mine --author 'Ada Lovelace'")
@click.argument("run", type=_FOLDER)
@click.option("--out", type=_FILE, help="Where to write; by default submission.yaml beside the run folder.")
@click.option(
    "--checkpoint", type=_FILE, help="A JSON record of the model, as in checkpoints.json, where it is not registered."
)
@click.option("--author", "authors", multiple=True, help="Who submits; repeatable.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@json_option
def init(
    run: Path, out: Path | None, checkpoint: Path | None, authors: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Write submission.yaml for the run folder RUN, with what is known filled in."""
    import yaml

    from dmlbench.errors import UsageError
    from dmlbench.files import prepare_folder, write_atomic
    from dmlbench.submission.pack import draft, read_card
    from dmlbench.submission.record import FILL_IN

    path = out or run.parent / "submission.yaml"
    if path.exists() and not force:
        raise UsageError(f"{path} is already there: --force replaces it, --out names another")
    text = draft(run, read_card(checkpoint) if checkpoint else None, authors)
    prepare_folder(path.parent)
    write_atomic(path, text.encode())
    content = yaml.safe_load(text)
    left = list(_holding(FILL_IN, content))
    if as_json:
        print_json({"id": content["id"], "submission": str(path), "to_fill_in": left})
        return
    click.echo(f"wrote {path}")
    if left:
        click.echo(f"still to fill in: {len(left)} field{'s' * (len(left) != 1)} marked {FILL_IN}")


def _holding(mark: str, value: object, where: str = "") -> Iterator[str]:
    """The fields of a YAML document that hold ``mark``, as ``train.loss`` or ``authors.0``."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _holding(mark, inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, str) and mark in value:
        yield where


@submit.command(epilog="Example: dmlbench submit pack runs/mine --out mine.zip")
@click.argument("run", type=_FOLDER)
@click.option("--submission", type=_FILE, help="By default submission.yaml beside the run folder.")
@click.option("--weights", type=_FILE, help="The model's safetensors file; by default the registered one.")
@click.option(
    "--no-weights",
    is_flag=True,
    help="Leave the weights out: the package holds the same file, or the submission says where it is fetched from.",
)
@click.option(
    "--sample",
    type=int,
    help="Of how many sampled queries the adversarial images are kept; by default, and at the least, what level 2 looks at.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A .zip file, or a folder as under leaderboard/submissions.",
)
@json_option
def pack(
    run: Path,
    submission: Path | None,
    weights: Path | None,
    no_weights: bool,
    sample: int | None,
    out: Path,
    as_json: bool,
) -> int:
    """Put the run folder RUN, its submission.yaml and the weights into one bundle, and check it (level 0)."""
    from dmlbench.errors import UsageError
    from dmlbench.files import prepare_folder
    from dmlbench.submission import pack as packing
    from dmlbench.submission.bundle import Problem, Refused
    from dmlbench.submission.static import check_static

    if weights and no_weights:
        raise UsageError("--weights and --no-weights exclude each other")
    files = packing.pack(run, submission or run.parent / "submission.yaml", weights, not no_weights, sample)
    if out.suffix == ".zip":
        prepare_folder(out.parent)
        packing.write_zip(files, out)
    else:
        packing.write_folder(files, out)
    size = sum(len(content) for content in files.values())
    if not as_json:
        click.echo(f"wrote {out}: {len(files)} files, {size / 1024:.0f} KiB")
    name, problems = None, list[Problem]()
    try:
        name = check_static(out).submission.id
    except Refused as refused:
        problems += refused.problems
    if as_json:
        listed = [problem._asdict() for problem in problems]
        facts = {"bundle": str(out), "files": sorted(files), "bytes": size}
        print_json({"id": name, **facts, "passed": not listed, "problems": listed})
        return 1 if listed else 0
    for problem in problems:
        click.echo(f"not ready: {problem}", err=True)
    if problems:
        return 1
    click.echo(f"{name}: level 0 passed")
    return 0

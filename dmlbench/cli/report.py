"""``dmlbench report``: run folders to one HTML page."""

from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json
from dmlbench.errors import UsageError
from dmlbench.results import load

_EXAMPLE = "Example: dmlbench report runs/mine runs/baseline --out mine.html"


@click.command(epilog=_EXAMPLE)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here; by default RUN/report.html."
)
@json_option
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """One self-contained HTML page: scores, curves, what was retrieved, projections, the environment.

    The first RUN is shown in full, the others beside it.
    """
    from dmlbench.board.report import Run, write_page

    if len(set(runs)) < len(runs):
        raise UsageError("a run folder is named twice")
    read = [Run(_name(folder, runs), load(folder)) for folder in runs]
    target = out or runs[0] / "report.html"
    if not target.resolve().parent.is_dir():
        raise UsageError(f"--out {target}: the folder does not exist")
    write_page(read, target)
    if as_json:
        shown = [{"name": _name(folder, runs), "folder": str(folder)} for folder in runs]
        print_json({"report": str(target), "bytes": target.stat().st_size, "runs": shown})
        return
    click.echo(str(target))


def _name(folder: Path, runs: tuple[Path, ...]) -> str:
    """The folder's own name, or its path where two have the same name."""
    name = folder.resolve().name
    return str(folder) if [f.resolve().name for f in runs].count(name) > 1 else name

"""``dmlbench table``: several runs as a table for a paper."""

from dataclasses import asdict
from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json, runs_argument, runs_named

_EXAMPLE = "Example: dmlbench table runs/plain runs/hardened --format latex --out table.tex"


@click.command(epilog=_EXAMPLE)
@runs_argument
@click.option("--format", "form", type=click.Choice(["latex", "md", "csv"]), default="latex", show_default=True)
@click.option(
    "--columns", help="Metrics by comma, in this order, e.g. recall_at_1,ES:R,ers; by default all of the protocol's."
)
@click.option("--protocol", help="Which stored run, where a registered model has several.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it here instead of to stdout.")
@json_option
def table(
    runs: tuple[str, ...], form: str, columns: str | None, protocol: str | None, out: Path | None, as_json: bool
) -> None:
    """Several runs of one protocol side by side: LaTeX (booktabs), Markdown or CSV.

    A RUN is a run folder, or the id of a registered model, whose stored run is taken. Bold are the best of a column and
    all that are not surely behind it, by the paired comparison that `dmlbench compare` makes.
    """
    from dmlbench.board.paper import FORMATS
    from dmlbench.board.paper import table as of_runs
    from dmlbench.files import prepare_folder, write_atomic

    chosen = [name.strip() for name in columns.split(",") if name.strip()] if columns else []
    made = of_runs(runs_named(runs, protocol), chosen)
    if out is not None:
        prepare_folder(out.parent)
        write_atomic(out, FORMATS[form](made).encode())
    if as_json:
        rows = [{"model": name, "cells": [asdict(cell) for cell in cells]} for name, cells in made.rows]
        print_json({"columns": made.columns, "rows": rows, "caption": made.caption, "file": out and str(out)})
    elif out is None:
        click.echo(FORMATS[form](made), nl=False)
    else:
        click.echo(str(out))

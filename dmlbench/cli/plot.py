"""``dmlbench plot``: runs as a figure for a paper."""

from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json, runs_argument, runs_named

_EXAMPLE = "Example: dmlbench plot runs/plain runs/hardened --kind parts --out parts.pdf"


@click.command(epilog=_EXAMPLE)
@runs_argument
@click.option(
    "--kind", required=True, help="eps, parts, scatter, classes, tsne, matrix (model by surrogate) or roc (pairs)."
)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="FILE.pdf, .svg or .png.")
@click.option("--metric", help="Of scatter and matrix, e.g. ES:R; by default ERS, or what the protocol ranks by.")
@click.option("--part", help="Of classes and tsne: one attack part, by name.")
@click.option("--protocol", help="Which stored run, where a registered model has several.")
@click.option("--width", type=click.FloatRange(min=2, max=20), default=5.5, show_default=True, help="In inches.")
@json_option
def plot(
    runs: tuple[str, ...],
    kind: str,
    out: Path,
    metric: str | None,
    part: str | None,
    protocol: str | None,
    width: float,
    as_json: bool,
) -> None:
    """Draw runs: curves over eps, bars of the parts, robustness against clean R@1, classes, embeddings, transfer.

    A RUN is a run folder, or the id of a registered model, whose stored run is taken. The file is the same, byte for byte,
    whenever it is made of the same runs.
    """
    from dmlbench.board.plots import KINDS, SUFFIXES
    from dmlbench.errors import UsageError

    suffix = out.suffix.removeprefix(".").lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: a figure is written as {', '.join(SUFFIXES)}")
    path = KINDS[kind](runs_named(runs, protocol), metric, part).save(out, width)
    if as_json:
        print_json({"file": str(path), "bytes": path.stat().st_size, "kind": kind, "runs": runs})
    else:
        click.echo(str(path))

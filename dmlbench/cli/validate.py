"""``dmlbench validate``: is a bundle what it says it is?"""

from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json, progress

EPILOG = """Example: dmlbench validate mine.zip --level 3

Exit codes: 0 accepted; 1 refused, with the level, the field and the reason; 2 a weights file or a run folder; 4 the bundle or the data set is not at hand."""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--level",
    type=click.IntRange(0, 4),
    default=2,
    show_default=True,
    help="0 files and sums, 1 weights, 2 replay, 3 a random share again, 4 everything again.",
)
@click.option(
    "--board",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder leaderboard that it would join: ids must be new.",
)
@click.option(
    "--weights", type=click.Path(path_type=Path, dir_okay=False), help="The weights, where the bundle has none."
)
@click.option("--fetch", is_flag=True, help="Fetch weights that the bundle has not, from the address it names.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="Of the queries, at level 3; at least 64.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Which queries, at level 3; by default nobody knows beforehand."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@json_option
def validate(
    bundle: Path,
    level: int,
    board: Path | None,
    weights: Path | None,
    fetch: bool,
    share: float,
    seed: int | None,
    device: str,
    as_json: bool,
) -> int:
    """Check BUNDLE, a zip file or a folder. Nothing in it is unpacked, unpickled or executed."""
    from dmlbench.errors import DataError, UsageError
    from dmlbench.models.files import SUFFIXES
    from dmlbench.submission.validate import LEVELS
    from dmlbench.submission.validate import validate as run

    if not bundle.exists():
        raise DataError(f"{bundle} does not exist")
    if bundle.suffix in SUFFIXES or (bundle / "evaluation.json").is_file():
        raise UsageError(
            f"{bundle} is not a bundle: `dmlbench submit init` and `submit pack` make one of a run folder and its weights"
        )
    if board is not None and not (board / "submissions").is_dir():
        raise DataError(f"--board {board} has no folder submissions: it is not a board")

    def passed(step: int) -> None:
        if not as_json:
            click.echo(f"level {step} passed: {LEVELS[step]}")

    with progress() as bars:
        report = run(
            bundle,
            level,
            board=board,
            weights=weights,
            fetch=fetch,
            share=share,
            seed=seed,
            device=device,
            progress=bars,
            on_level=passed,
        )
    if as_json:
        print_json({**report.model_dump(mode="json"), "problems": [p._asdict() for p in report.problems]})
    else:
        for note in report.notes:
            click.echo(note)
        for problem in report.problems:
            click.echo(f"REFUSED {problem}")
        click.echo(f"{report.bundle}: {report.status}")
    return 0 if report.status == "accepted" else 1

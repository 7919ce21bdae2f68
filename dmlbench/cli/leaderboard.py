"""``dmlbench leaderboard``: show the board, build it from its submissions, and make its site."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dmlbench.cli.output import json_option, print_json

_FOLDER = click.Path(path_type=Path, file_okay=False)


def _board(usual: str) -> Callable[[Any], Any]:
    return click.option("--board", type=_FOLDER, help=f"Another folder leaderboard than {usual}.")


@click.group(epilog="Example: dmlbench leaderboard show --filter dataset=digits")
def leaderboard() -> None:
    """Show the board, build it from its submissions, and make its site."""


@leaderboard.command(epilog="Example: dmlbench leaderboard show --filter 'ers>=40' --sort -recall_at_1 --format md")
@click.option("--filter", "filters", multiple=True, help="E.g. 'ers>=40', 'status=verified', 'defense~hm'; repeatable.")
@click.option("--sort", help="Columns, a minus before one for descending, e.g. -ers,model.")
@click.option("--columns", help="Comma-separated, or 'all'.")
@click.option(
    "--format", "form", type=click.Choice(["table", "md", "csv", "json", "latex"]), help="By default a table."
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--csv", "file", type=click.Path(path_type=Path, dir_okay=False), help="A CSV file of rows instead of the board."
)
@_board("the packaged one")
def show(
    filters: tuple[str, ...],
    sort: str | None,
    columns: str | None,
    form: str | None,
    as_json: bool,
    file: Path | None,
    board: Path | None,
) -> None:
    """Print rows of the board, of every protocol and data set unless filtered."""
    from dmlbench.board.build import board_folder, load_boards
    from dmlbench.board.row import COLUMNS
    from dmlbench.board.show import FORMATS, column, default_columns, select
    from dmlbench.board.table import from_csv

    boards = {str(file): from_csv(file)} if file else load_boards(board or board_folder())
    rows = select([row for rows in boards.values() for row in rows], filters, sort)
    if columns == "all":
        chosen = list(COLUMNS)
    elif columns:
        chosen = [column(c.strip()) for c in columns.split(",") if c.strip()]
    else:
        several = len({(r.protocol, r.dataset) for r in rows}) > 1
        chosen = [*(("protocol", "dataset") if several else ()), *default_columns(rows)]
    click.echo(FORMATS["json" if as_json else form or "table"](rows, chosen), nl=False)


@leaderboard.command(epilog="Example: dmlbench leaderboard build --check")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a committed file differs.")
@click.option("--site", type=_FOLDER, help="Also write the static site into this folder.")
@_board("the one in this folder")
@json_option
def build(check: bool, site: Path | None, board: Path | None, as_json: bool) -> int:
    """Make the board's CSV files from its submissions.

    Where the current folder has no leaderboard, --site shows the packaged one as it is.
    """
    from dmlbench.board.build import board_folder, differences, load_boards
    from dmlbench.board.build import build as make
    from dmlbench.errors import UsageError

    folder = board or Path("leaderboard")
    packaged = board is None and not check and site is not None and not folder.exists()
    if packaged:
        folder = board_folder()
    elif not (folder / "submissions").is_dir():
        raise UsageError(f"{folder} has no folder submissions: run this at the repository's root, or name --board")
    facts: dict[str, object] = {"board": str(folder)}

    def say(line: str) -> None:
        if not as_json:
            click.echo(line)

    changes_needed: list[str] = []
    if check:
        changes_needed = differences(folder)
        facts |= {"up_to_date": not changes_needed, "differences": changes_needed}
        for line in changes_needed:
            say(f"differs: {line}")
        say(f"{folder}: {'run `dmlbench leaderboard build`' if changes_needed else 'up to date'}")
    elif not packaged:
        changed = make(folder)
        rows = sum(map(len, load_boards(folder).values()))
        facts |= {"changed": [str(folder / name) for name in changed], "rows": rows}
        for name in changed:
            say(f"wrote {folder / name}")
        say(f"{folder}: {rows} rows, {len(changed)} file{'s' * (len(changed) != 1)} changed")
    if site and not changes_needed:
        from dmlbench.board.site import write_site

        pages = write_site(folder, site)
        facts["site"] = {"index": str(site / "index.html"), "pages": len(pages)}
        say(f"{site}: {len(pages)} pages; open {site / 'index.html'}")
    if as_json:
        print_json(facts)
    return 1 if changes_needed else 0


@leaderboard.command(epilog="Example: dmlbench leaderboard admit origin/main")
@click.argument("base")
@click.option("--level", type=click.IntRange(0, 4), default=3, show_default=True, help="Of `dmlbench validate`.")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Which queries, at level 3; by default nobody knows beforehand."
)
@click.option("--fetch", is_flag=True, help="Fetch weights that a bundle has not, from the address it names.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@json_option
def admit(base: str, level: int, seed: int | None, fetch: bool, device: str, as_json: bool) -> int:
    """Check what the checkout in this folder does to the board since it left the commit BASE.

    It may add bundles, each in a new folder called by its id, and the CSV files that follow from them. Exit codes: 0
    admitted; 1 refused; 4 a data set is not at hand.
    """
    from dmlbench.board.build import differences
    from dmlbench.cli.output import progress
    from dmlbench.errors import DataError
    from dmlbench.submission.bundle import Problem
    from dmlbench.submission.change import BOARD, added, changes, refusals

    board = Path(BOARD)
    changed, there = changes(Path.cwd(), base)
    problems = list(refusals(changed, there))
    for problem in problems:
        if not as_json:
            click.echo(f"REFUSED {problem}")
    bundles = [] if problems else added(changed)
    for name in bundles:
        from dmlbench.submission.validate import validate

        with progress() as bars:
            report = validate(
                board / "submissions" / name, level, board=board, fetch=fetch, seed=seed, device=device, progress=bars
            )
        problems += report.problems
        if not as_json:
            for line in (*report.notes, *(f"REFUSED {problem}" for problem in report.problems)):
                click.echo(line)
            click.echo(f"{name}: {report.status} at level {level}")
    if not problems:
        try:
            problems += [Problem(0, BOARD, line) for line in differences(board)]
        except DataError as error:
            problems.append(Problem(0, BOARD, str(error)))
        if not as_json:
            for problem in problems:
                click.echo(f"REFUSED {problem}")
    if as_json:
        print_json({"bundles": bundles, "level": level, "problems": [p._asdict() for p in problems]})
    else:
        click.echo(f"{BOARD}: {'refused' if problems else 'admitted'}")
    return 1 if problems else 0

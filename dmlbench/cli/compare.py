"""``dmlbench compare``: the CI gate."""

import os
from pathlib import Path

import click

from dmlbench.cli.output import print_json

EPILOG = """Example: dmlbench compare runs/base runs/candidate --max-drop ers=1.0 --markdown report.md

Exit codes: 0 the gate passed; 1 it failed; 2 usage; 3 the two are not comparable; 4 missing or corrupt data;
5 inconclusive, under --fail-on-inconclusive; 130 interrupted."""

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(epilog=EPILOG)
@click.argument("base")
@click.argument("candidate")
@click.option(
    "--max-drop",
    "drops",
    multiple=True,
    metavar="METRIC=POINTS",
    help="How far a metric may fall; repeatable. 'any' is any attack part.",
)
@click.option("--fail-on-inconclusive", is_flag=True, default=None, help="Exit 5 where a gated metric cannot be told.")
@click.option("--config", type=_FILE, help="A pyproject.toml with [tool.dmlbench.gate]; by default the nearest one.")
@click.option("--protocol", help="Which result, where one has several; or a protocol's TOML file.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the resampling.")
@click.option("--markdown", type=_FILE, help="Write the report for a pull request here.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    type=_FILE,
    help="Write it as JSON here; alone or with - to stdout.",
)
@click.option("--junit", type=_FILE, help="Write JUnit XML here.")
def compare(
    base: str,
    candidate: str,
    drops: tuple[str, ...],
    fail_on_inconclusive: bool | None,
    config: Path | None,
    protocol: str | None,
    seed: int,
    markdown: Path | None,
    json_file: Path | None,
    junit: Path | None,
) -> int:
    """Is CANDIDATE worse than BASE, surely, and by more than is allowed?

    BASE and CANDIDATE are run folders, ids of registered models, or rows of a board (MODEL@FILE.csv).
    The report is also appended to $GITHUB_STEP_SUMMARY where that is set.
    """
    from dmlbench.board.compare import as_junit, as_markdown, as_text
    from dmlbench.board.compare import compare as compare_runs
    from dmlbench.board.compare.gate import metric_name, named_gate, parse_drop, project_gate
    from dmlbench.board.compare.sources import find
    from dmlbench.board.compare.verdict import as_row, compare_rows, components_of
    from dmlbench.errors import DataError
    from dmlbench.files import prepare_folder, write_atomic
    from dmlbench.results import Evaluation, json_bytes

    outputs = [p for p in (markdown, json_file, junit) if p is not None and str(p) != "-"]
    named = [parse_drop(d) for d in drops]
    file = Path(protocol) if protocol and protocol.endswith(".toml") else None
    sides = [find(text, None if file else protocol) for text in (base, candidate)]
    parts = [m.component for side in sides if isinstance(side, Evaluation) for m in side.measurements]
    gate = named_gate(config, parts) if config else project_gate(Path.cwd(), parts)[0]
    gate = gate.model_copy(
        update={
            "max_drop": {**gate.max_drop, **{metric_name(name, parts): points for name, points in named}},
            "fail_on_inconclusive": gate.fail_on_inconclusive if fail_on_inconclusive is None else True,
        }
    )
    for path in outputs:
        prepare_folder(path.parent)
    first, second = sides
    if isinstance(first, Evaluation) and isinstance(second, Evaluation):
        result = compare_runs(
            first, second, gate, components=components_of(first, file), labels=(base, candidate), seed=seed
        )
    else:
        result = compare_rows(as_row(first), as_row(second), gate, labels=(base, candidate))

    content = {**result.model_dump(mode="json"), "passed": result.exit_code == 0, "exit_code": result.exit_code}
    if markdown:
        write_atomic(markdown, as_markdown(result).encode())
    if junit:
        write_atomic(junit, as_junit(result))
    if json_file and str(json_file) != "-":
        write_atomic(json_file, json_bytes(content))
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(step).open("a", encoding="utf-8") as stream:
                stream.write(as_markdown(result) + "\n")
        except OSError as error:
            raise DataError(f"$GITHUB_STEP_SUMMARY {step} cannot be written: {error.strerror}") from None
    if json_file and str(json_file) == "-":
        print_json(content)
    else:
        click.echo(as_text(result), nl=False)
    return result.exit_code

"""``dmlbench verify``: measure a bundle again, in full, and keep a record of it."""

from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_json, progress

EPILOG = """Example: dmlbench verify leaderboard/submissions/digits-mine-ers-digits

Exit codes: 0 it agreed (the row becomes verified); 1 refused, or it did not agree (disputed); 4 the bundle or the data set is not at hand."""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the record; of a bundle on a board by default its verifications/ID.json.",
)
@click.option(
    "--weights", type=click.Path(path_type=Path, dir_okay=False), help="The weights, where the bundle has none."
)
@click.option("--fetch", is_flag=True, help="Fetch weights that the bundle has not, from the address it names.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@json_option
def verify(bundle: Path, out: Path | None, weights: Path | None, fetch: bool, device: str, as_json: bool) -> int:
    """Attack every query of BUNDLE again and record whether it agreed: level 4 for the people who keep the board."""
    from dmlbench.errors import DataError, UsageError
    from dmlbench.files import prepare_folder, write_atomic
    from dmlbench.results import json_bytes
    from dmlbench.submission.bundle import SUBMISSIONS, verification_of
    from dmlbench.submission.validate import validate

    if not bundle.exists():
        raise DataError(f"{bundle} does not exist")
    path = out or (verification_of(bundle) if bundle.is_dir() and bundle.parent.name == SUBMISSIONS else None)
    if path is None:
        raise UsageError(f"{bundle} is no folder of a board: say with --out where the record goes")
    prepare_folder(path.parent)
    with progress() as bars:
        report = validate(bundle, 4, weights=weights, fetch=fetch, device=device, progress=bars)
    record = report.verification
    if record is not None:
        write_atomic(path, json_bytes(record.model_dump(mode="json")))
    if as_json:
        print_json({**report.model_dump(mode="json"), "problems": [p._asdict() for p in report.problems]})
        return 0 if record is not None and record.agreed else 1
    for problem in report.problems:
        click.echo(f"REFUSED {problem}")
    if record is None:
        click.echo(f"{bundle}: refused before anything was measured again")
        return 1
    outcome = "verified" if record.agreed else "disputed"
    name, stated, measured = "ERS", record.ers_stated, record.ers_measured
    if record.headline:
        name, stated, measured = record.headline, record.stated, record.measured
    numbers = "" if stated is None or measured is None else f": {name} {stated:.2f} stated, {measured:.2f} measured"
    click.echo(f"{report.id}: {outcome}{numbers}")
    click.echo(f"wrote {path}")
    return 0 if record.agreed else 1

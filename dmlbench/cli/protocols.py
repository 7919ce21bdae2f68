"""``dmlbench protocols``: which protocols there are and what each one measures."""

from pathlib import Path

import click

from dmlbench.cli.output import json_option, print_facts, print_json, print_list
from dmlbench.errors import DataError, NotComparable, UsageError
from dmlbench.files import write_atomic
from dmlbench.protocols import load_protocol, protocol_names, protocol_versions


@click.group(epilog="Example: dmlbench protocols list")
def protocols() -> None:
    """List and show protocols."""


@protocols.command("list", epilog="Example: dmlbench protocols list --json")
@json_option
def list_protocols(as_json: bool) -> None:
    """Every packaged protocol, superseded versions (NAME@VERSION) after the current one."""
    items = [
        {
            "id": p.id,
            "version": p.version,
            "kind": p.kind,
            "title": p.title,
            "sha256": p.sha256,
            "superseded_by": p.superseded_by,
        }
        for name in protocol_names()
        for p in protocol_versions(name)
    ]
    print_list(items, ("id", "version", "kind", "title"), as_json)


@protocols.command("show", epilog="Example: dmlbench protocols show ers-28")
@click.argument("name")
@json_option
def show_protocol(name: str, as_json: bool) -> None:
    """One protocol: threat, components, content hash."""
    p = load_protocol(name)
    print_facts({"id": p.id, "sha256": p.sha256, **p.model_dump(mode="json")}, as_json)


@protocols.command("docs", epilog="Example: dmlbench protocols docs --check --out docs/protocols.md")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here, not on stdout.")
@click.option("--check", is_flag=True, help="Compare with --out and exit with 3 if it differs.")
@json_option
def docs(out: Path | None, check: bool, as_json: bool) -> None:
    """The page of every protocol, attack, read-out, optimizer and check, written from the tables."""
    from dmlbench.board.catalogue import render

    page = render()
    if out is None:
        if check:
            raise UsageError("--check needs --out, the page to compare with")
        if as_json:
            print_json({"page": page})
        else:
            click.echo(page, nl=False)
    elif check:
        try:
            current = out.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{out} cannot be read: {error.strerror}") from None
        if as_json:
            print_json({"out": str(out), "up_to_date": current == page})
        if current != page:
            raise NotComparable(f"{out} is not what the tables say: run `dmlbench protocols docs --out {out}`")
        click.echo(f"{out} is what the tables say", err=True)
    else:
        write_atomic(out, page.encode())
        if as_json:
            print_json({"out": str(out), "bytes": len(page.encode())})

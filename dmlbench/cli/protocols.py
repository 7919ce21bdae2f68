"""``dmlbench protocols``: which protocols there are and what each one measures."""

import click

from dmlbench.cli.output import json_option, print_facts, print_list
from dmlbench.protocol import load_protocol, protocol_names


@click.group(epilog="Example: dmlbench protocols list")
def protocols() -> None:
    """List and show protocols."""


@protocols.command("list", epilog="Example: dmlbench protocols list --json")
@json_option
def list_protocols(as_json: bool) -> None:
    """Every packaged protocol."""
    items = [
        {"id": p.name, "version": p.version, "kind": p.kind, "title": p.title, "sha256": p.sha256}
        for p in map(load_protocol, protocol_names())
    ]
    print_list(items, ("id", "version", "kind", "title"), as_json)


@protocols.command("show", epilog="Example: dmlbench protocols show ers-28")
@click.argument("name")
@json_option
def show_protocol(name: str, as_json: bool) -> None:
    """One protocol: threat, components, content hash."""
    p = load_protocol(name)
    print_facts({"id": p.name, "sha256": p.sha256, **p.model_dump(mode="json")}, as_json)

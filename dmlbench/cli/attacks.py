"""``dmlbench attacks``: which attacks there are and what each one does."""

import inspect
from dataclasses import asdict

import click

from dmlbench.attacks import ATTACKS
from dmlbench.cli.output import json_option, print_facts, print_list
from dmlbench.objectives import OBJECTIVES
from dmlbench.targets import TARGETS


@click.group(epilog="Example: dmlbench attacks list")
def attacks() -> None:
    """List and show attacks."""


@attacks.command("list", epilog="Example: dmlbench attacks list --json")
@json_option
def list_attacks(as_json: bool) -> None:
    """Every attack by name."""
    items = [{"id": name, **asdict(a)} for name, a in ATTACKS.items()]
    print_list(items, ("id", "title", "objective", "targets"), as_json)


@attacks.command("show", epilog="Example: dmlbench attacks show QA+")
@click.argument("name")
@json_option
def show_attack(name: str, as_json: bool) -> None:
    """One attack: what it minimises, whom it aims at, what is read."""
    a = ATTACKS[name]
    facts: dict[str, object] = {"id": name, **asdict(a), "formula": inspect.getdoc(OBJECTIVES[a.objective])}
    if a.targets:
        facts["aim"] = inspect.getdoc(TARGETS[a.targets])
    print_facts(facts, as_json)

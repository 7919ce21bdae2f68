"""Tables of the protocols that are more than parts, and the audit's findings."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dmlbench.kinds.base import Line, Sheet

MARK = {"pass": "[green]pass[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]", "skip": "skip"}


def print_kind(tables: "Iterable[Sheet | Line]", out: Console) -> None:
    """What the record of a kind of protocol shows of a run."""
    from dmlbench.kinds.base import Line

    for shown in tables:
        if isinstance(shown, Line):
            out.print(f"[bold]{shown.head}[/bold]  {shown.text}" if shown.head else shown.text)
            continue
        table = Table(box=None, pad_edge=False, title=shown.title, title_justify="left")
        for name in shown.names:
            table.add_column(name)
        for column in shown.columns:
            table.add_column(column, justify="right")
        for n, row in enumerate(shown.rows):
            table.add_row(*row, style="bold" if n in shown.bold else None)
        out.print(table)


def print_findings(findings: Sequence[dict[str, Any]], out: Console) -> None:
    """One line for each check: verdict and evidence."""
    table = Table(box=None, pad_edge=False, title="audit", title_justify="left")
    for column in ("check", "verdict", "evidence"):
        table.add_column(column)
    for f in findings:
        table.add_row(f["check"], MARK[f["verdict"]], f["message"])
    out.print(table)

"""Tables of the protocols that are more than parts: ``strict``, ``clustering``, and the audit's findings."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

MARK = {"pass": "[green]pass[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]", "skip": "skip"}


def print_strict(strict: dict[str, Any], out: Console) -> None:
    """The curve over eps, its area, what each step contributed and what it cost."""
    curve = strict["curve"]
    steps = [s["step"] for s in curve[0]["steps"]]
    table = Table(box=None, pad_edge=False, title=f"worst case, {strict['norm']}", title_justify="left")
    table.add_column("eps")
    for column in ("R@1", "R@2 ≤", "R@8 ≤", "MAP@R ≤", "before", *steps):
        table.add_column(column, justify="right")
    table.add_row("0", f"{strict['clean']:.1f}")
    for row in curve:
        table.add_row(
            row["eps"],
            *(f"{row[key]:.1f}" for key in ("recall_at_1", "recall_at_2", "recall_at_8", "map_at_r", "carried")),
            *(f"{s['points']:.1f}" for s in row["steps"]),
        )
    out.print(table)
    out.print(
        "≤: read at the images that the search for R@1 found; no search aimed at it, so the true worst case is lower. "
        "before: points broken at a smaller eps; then points that each step broke."
    )
    out.print(
        f"[bold]area under the curve {strict['area']:.1f}[/bold]  "
        f"{strict['gradients_per_query']:.0f} gradients and {strict['values_per_query']:.0f} values a right query and eps"
    )


def print_clustering(clustering: dict[str, Any], out: Console) -> None:
    """Every clustering attack, and the lowest of each number."""
    names = {"nmi": "NMI", "ami": "AMI", "f1": "pair F1", "recall_at_1": "R@1 within"}
    table = Table(box=None, pad_edge=False, title="k-means on attacked images, %", title_justify="left")
    table.add_column("eps")
    table.add_column("attack")
    for column in names.values():
        table.add_column(column, justify="right")
    table.add_row("0", "none", *(f"{clustering['clean'][key]:.1f}" for key in names))
    for row in clustering["attacks"]:
        table.add_row(row["eps"], row["attack"], *(f"{row[key]:.1f}" for key in names))
    for row in clustering["worst"]:
        label = "lowest, labels known" if row["labelled"] else "lowest, label-free"
        table.add_row(row["eps"], label, *(f"{row[key]:.1f}" for key in names), style="bold")
    out.print(table)


def print_findings(findings: Sequence[dict[str, Any]], out: Console) -> None:
    """One line for each check: verdict and evidence."""
    table = Table(box=None, pad_edge=False, title="audit", title_justify="left")
    for column in ("check", "verdict", "evidence"):
        table.add_column(column)
    for f in findings:
        table.add_row(f["check"], MARK[f["verdict"]], f["message"])
    out.print(table)

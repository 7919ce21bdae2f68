"""Tables of the protocols that are more than parts: ``strict``, ``clustering``, and the audit's findings."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dmlbench.threat import written

MARK = {"pass": "[green]pass[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]", "skip": "skip"}


def _number(value: float | None, digits: int = 1) -> str:
    """A number as a table shows it; a run folder holds no NaN but null."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def print_strict(strict: dict[str, Any], out: Console) -> None:
    """The curve over eps, what each step contributed and cost, what may be missed, and the headline."""
    curve = strict["curve"]
    steps = [s["step"] for s in curve[0]["steps"]]
    table = Table(box=None, pad_edge=False, title=f"worst case, {strict['norm']}", title_justify="left")
    table.add_column("eps")
    missed = ("missed", "≤") if "missed" in curve[0] else ()
    for column in ("R@1", *missed, "R@2 ≤", "R@8 ≤", "MAP@R ≤", "before", *steps):
        table.add_column(column, justify="right")
    table.add_row("0", _number(strict["clean"]))
    for row in curve:
        table.add_row(
            row["eps"],
            _number(row["recall_at_1"]),
            *(_number(row[key]) for key in ("missed", "missed_at_most") if missed),
            *(_number(row[key]) for key in ("recall_at_2", "recall_at_8", "map_at_r", "carried")),
            *(_number(s["points"]) for s in row["steps"]),
        )
    out.print(table)
    out.print(
        "≤: read at the images that the search for R@1 found; no search aimed at it, so the true worst case is lower. "
        "before: points broken at a smaller eps; then points that each step broke."
    )
    if missed:
        ran = ", ".join(str(len(s["rounds"])) for row in curve for s in row["steps"] if "rounds" in s)
        out.print(
            "missed: points of R@1 that ten times the rounds would still take, estimated, and at most. "
            f"Rounds by eps: {ran}."
        )
    if "smallest_eps" in strict:
        found = strict["smallest_eps"]
        ends = f" ({' – '.join(_eps(end, found) for end in found['interval'])})" if found["interval"] else ""
        someone = (strict["clean"] or 0.0) > 0  # where no query is right, none is broken either
        median = _eps(found["median"], found) if someone else _number(None)
        head = f"smallest eps that breaks a query, median {median}{ends}"
    else:
        head = f"area under the curve {_number(strict['area'])}"
    out.print(
        f"[bold]{head}[/bold]  "
        f"{_number(strict['gradients_per_query'], 0)} gradients and {_number(strict['values_per_query'], 0)} values a right query and eps"
    )


def _eps(value: float | None, found: dict[str, Any]) -> str:
    """A length in a sentence; one that is beyond the largest of the grid is said to be so."""
    return f"> {written(found['largest'], found['norm'])}" if value is None else written(value, found["norm"])


def print_clustering(clustering: dict[str, Any], out: Console) -> None:
    """Every clustering attack, and the lowest of each number."""
    names = {"nmi": "NMI", "ami": "AMI", "f1": "pair F1", "recall_at_1": "R@1 within"}
    table = Table(box=None, pad_edge=False, title="k-means on attacked images, %", title_justify="left")
    table.add_column("eps")
    table.add_column("attack")
    for column in names.values():
        table.add_column(column, justify="right")
    table.add_row("0", "none", *(_number(clustering["clean"][key]) for key in names))
    for row in clustering["attacks"]:
        table.add_row(row["eps"], row["attack"], *(_number(row[key]) for key in names))
    for row in clustering["worst"]:
        label = "lowest, labels known" if row["labelled"] else "lowest, label-free"
        table.add_row(row["eps"], label, *(_number(row[key]) for key in names), style="bold")
    out.print(table)


def print_findings(findings: Sequence[dict[str, Any]], out: Console) -> None:
    """One line for each check: verdict and evidence."""
    table = Table(box=None, pad_edge=False, title="audit", title_justify="left")
    for column in ("check", "verdict", "evidence"):
        table.add_column(column)
    for f in findings:
        table.add_row(f["check"], MARK[f["verdict"]], f["message"])
    out.print(table)

"""How a result, what a run is expected to cost and the audit's findings are printed."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dmlbench.cli.output import console, print_table

if TYPE_CHECKING:
    from dmlbench.kinds.base import Line, Sheet
    from dmlbench.results import Evaluation

MARK = {"pass": "[green]pass[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]", "skip": "skip"}
MOST_PARTS = 30
"""Parts that are listed one by one."""
ARROW = {"higher": "↑", "lower": "↓"}


def _table(title: str | None, names: Iterable[str | Column], numbers: Iterable[str] = ()) -> Table:
    """An empty one with columns of text, then of numbers."""
    columns = (*names, *(Column(name, justify="right") for name in numbers))
    return Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")


def print_kind(tables: "Iterable[Sheet | Line]", out: Console) -> None:
    """What the record of a kind of protocol shows of a run."""
    from dmlbench.kinds.base import Line

    for shown in tables:
        if isinstance(shown, Line):
            out.print(f"[bold]{shown.head}[/bold]  {shown.text}" if shown.head else shown.text)
            continue
        table = _table(shown.title, shown.names, shown.columns)
        for n, row in enumerate(shown.rows):
            table.add_row(*row, style="bold" if n in shown.bold else None)
        print_table(table, out)


def print_findings(findings: Sequence[dict[str, Any]], out: Console) -> None:
    """One line for each check: verdict and evidence."""
    table = _table("audit", ("check", "verdict", "evidence"))
    for f in findings:
        table.add_row(f["check"], MARK[f["verdict"]], f["message"])
    out.print(table)


def print_plan(work: list[dict[str, object]], which: str) -> None:
    """The searches of a run with the time and memory that each is expected to take; ``which`` run begins the title."""
    numbers = ("optimizer", "eps", "queries", "steps", "time", "peak MiB")
    table = _table(f"{which}expected, from a few measured steps", [Column("search", no_wrap=True)], numbers)
    for row in work:
        shown = [str(row[key] or "") for key in ("id", "optimizer", "eps", "queries", "steps")]
        table.add_row(*shown, _range(row), str(row["peak_mib"] or "–"))
    print_table(table, console())


def _range(row: dict[str, Any]) -> str:
    """The times between which a search is expected to end; "at most" where queries that are broken leave it."""
    low, high = row["range"]
    most = "at most " * row["at_most"] + _clock(high)
    return f"{_clock(low)} – {most}" if low else most


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def print_evaluation(e: "Evaluation") -> None:
    """The tables of one result on stdout."""
    out = console()
    d = e.dataset
    out.print(
        f"[bold]{e.model.id}[/bold] on {d.name} ({d.split}): {d.n_queries} queries, {d.n_gallery} gallery images, "
        f"{d.n_classes} classes; protocol {e.protocol.name} v{e.protocol.version} ({e.protocol.sha256[:8]})"
    )
    from dmlbench.board.adversary import adversary
    from dmlbench.kinds.base import interval_text, text_of
    from dmlbench.kinds.table import kind_of, numbers
    from dmlbench.metrics import CLEAN_METRICS, decimals, mean
    from dmlbench.run.looks import mean_interval

    kind = kind_of(e)
    shown = {metric.title: e.benign[name] for name, metric in CLEAN_METRICS.items() if name in e.benign}
    benign = _table("benign, %", (), shown)
    benign.add_row(*map(text_of, shown.values()))
    print_table(benign, out)

    if attacked := adversary(e):
        what = "under attack" if kind.moved else "against"
        out.print(f"[italic]{what}[/italic]: {escape(attacked)}")
    columns = ("raw", "better", "score", "95 % interval", "retention", "queries", "seconds")
    parts = _table(None, [Column("part", overflow="fold")], columns)  # a name is never cut
    retention = e.extras.get("retention", {})
    for m in e.measurements:
        parts.add_row(
            m.component,
            text_of(m.value, decimals(m.readout)),
            ARROW[m.better],
            text_of(m.score),
            interval_text(m.interval),
            f"{retention[m.component]:.1f}" if m.component in retention else "",
            str(m.n),
            f"{m.seconds:.1f}",
        )
    if len(e.measurements) <= MOST_PARTS or kind.name not in e.extras:  # else the kind's own table says it shorter
        print_table(parts, out)
    if kind.name in e.extras:
        print_kind(kind.tables(e.extras[kind.name]), out)
    if "audit" in e.extras:
        print_findings(e.extras["audit"], out)
    if e.ers is not None:
        partial = f"  (partial: {', '.join(e.partial)})" if e.partial else ""
        out.print(f"[bold]ERS {e.ers:.1f}[/bold]  95 % interval {interval_text(e.ers_interval)}{partial}")
    elif name := e.extras.get("until", {}).get("number"):
        number, values = numbers()[name], kind.by_query(e)[name]
        ends = f"95 % interval {interval_text(mean_interval(e, values))}"
        out.print(f"[bold]{number.title} {text_of(mean(values))}[/bold]  {ends}  (partial: {', '.join(e.partial)})")
    elif e.partial:
        score = "" if kind.run else "ERS –  "
        out.print(f"{score}(partial: {', '.join(e.partial)})")
    elif kind.mean and any(m.value is None for m in e.measurements):
        out.print("ERS –  (a part has no value)")
    for warning in e.warnings:
        out.print(f"[yellow]warning[/yellow] {warning.flag}: {warning.message}")

"""What every verb prints with: data on stdout, progress on stderr, colour only on a terminal."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def console() -> Console:
    """Where data goes."""
    return Console(file=sys.stdout, highlight=False)


def print_json(value: Any) -> None:
    """JSON on stdout, UTF-8, NaN refused."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_list(items: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """A list of objects, each with its ``id``, as JSON or as a table of ``columns``."""
    if as_json:
        print_json(list(items))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for item in items:
        table.add_row(*("" if item.get(c) is None else str(item[c]) for c in columns))
    console().print(table)


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """One object, as JSON or as lines of key and value."""
    if as_json:
        print_json(facts)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(key, text)
    console().print(table)


class RichProgress:
    """A bar for each task and one for the total, on stderr; silent where stderr is not a terminal."""

    def __init__(self, bars: Bars, total: int | None = None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._total = None if total is None else bars.add_task("total", total=total)

    def start(self, task: str, total: int) -> None:
        """A bar for ``task``; one that begins again, as a step's rounds do, keeps its bar."""
        if task in self._tasks:
            self._bars.reset(self._tasks[task], total=total)
        else:
            self._tasks[task] = self._bars.add_task(task, total=total)

    def advance(self, task: str, count: int) -> None:
        """Move it, and the total with it."""
        self._bars.advance(self._tasks[task], count)
        if self._total is not None:
            self._bars.advance(self._total, count)


@contextmanager
def progress(total: int | None = None) -> Iterator[RichProgress]:
    """Bars on stderr for as long as the block runs."""
    err = Console(file=sys.stderr)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=err, disable=not err.is_terminal) as bars:
        yield RichProgress(bars, total)


class Bar:
    """One bar on stderr that appears with its first step; silent where stderr is not a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bars: Bars | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def at(self, done: int, total: int) -> None:
        """``done`` of ``total`` are done."""
        if self._bars is None:
            err = Console(file=sys.stderr)
            columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, console=err, disable=not err.is_terminal)
            self._bars.start()
            self._bars.add_task(self._title, total=total)
        self._bars.update(self._bars.task_ids[0], completed=done, total=total)

"""What every verb prints with: data on stdout, progress on stderr, colour only on a terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from dmlbench.errors import UsageError

if TYPE_CHECKING:
    from dmlbench.results import Evaluation

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class _Output(Console):
    """A console that leaves a pipe without a reader to the command, and does not exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Where data goes."""
    return _Output(file=sys.stdout, highlight=False)


def print_table(table: Table, out: Console) -> None:
    """Print it; no number is cut where nobody looks, as the lines of a file or a pipe may be as long as they need."""
    if not out.is_terminal:
        out.width = max(out.width, out.measure(table, options=out.options.update(max_width=1000)).maximum)
    out.print(table)


def tell(note: str) -> None:
    """Print a note on stderr, once: the same note is not printed again with the result."""
    notes_shown: set[str] = click.get_current_context().meta.setdefault("dmlbench.told", set())
    if note not in notes_shown:
        notes_shown.add(note)
        click.echo(f"note: {note}", err=True)


def hint(line: str) -> None:
    """What a person may do next, on stderr, where one is looking: logs and pipes get none."""
    if sys.stderr.isatty():
        click.echo(f"next: {line}", err=True)


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


runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN...")


def runs_named(texts: Sequence[str], protocol: str | None) -> "list[tuple[str, Evaluation]]":
    """The runs that RUN... names, each with its name: run folders, or ids of registered models with a stored run.

    Raises:
        UsageError: one is named twice, or is a row of a CSV file, which lacks the queries' outcomes.
    """
    from dmlbench.board.compare.sources import find
    from dmlbench.results import Evaluation

    if len(set(texts)) < len(texts):
        raise UsageError("a run is named twice")
    runs = []
    for text in texts:
        run = find(text, protocol)
        if not isinstance(run, Evaluation):
            raise UsageError(f"{text} is a row of a CSV file, without the queries' own outcomes: name its run folder")
        runs.append((text, run))
    return runs


EVERY = 60.0
"""Seconds between two lines on how far a long task is, where there is no terminal to draw a bar on."""


class Lines:
    """How far each task is, in a line on stderr from time to time: for a log, where bars cannot be drawn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tasks: dict[str, tuple[int, int, float]] = {}  # done, total, begun
        self._last_line = clock()

    def start(self, task: str, total: int) -> None:
        """``task`` begins, with ``total`` images to do."""
        self._tasks[task] = (0, total, self._clock())

    def advance(self, task: str, count: int) -> None:
        """``count`` more are done."""
        done, total, begun = self._tasks[task]
        self._tasks[task], now = (done + count, total, begun), self._clock()
        if now - self._last_line >= EVERY and done + count < total and now > begun:
            self._last_line, rate = now, (done + count) / (now - begun)
            seconds = (total - done - count) / rate
            left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
            click.echo(f"{task}: {done + count:,} of {total:,}, {rate:.1f} a second, about {left} left", err=True)


class Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class RichProgress:
    """A bar for each task and one for the total, on stderr; :class:`Lines` where that is not a terminal."""

    def __init__(self, bars: Bars, total: int | None = None) -> None:
        self._bars = bars
        self._lines = Lines() if bars.disable else None
        self._tasks: dict[str, TaskID] = {}
        self._total = None if total is None else bars.add_task("total", total=total)

    def start(self, task: str, total: int) -> None:
        """A bar for ``task``; one that begins again, as a step's rounds do, keeps its bar."""
        if self._lines:
            self._lines.start(task, total)
        if task in self._tasks:
            self._bars.reset(self._tasks[task], total=total)
        else:
            self._tasks[task] = self._bars.add_task(task, total=total)

    def advance(self, task: str, count: int) -> None:
        """Move it, and the total with it."""
        if self._lines:
            self._lines.advance(task, count)
        self._bars.advance(self._tasks[task], count)
        if self._total is not None:
            self._bars.advance(self._total, count)


@contextmanager
def progress(total: int | None = None) -> Iterator[RichProgress]:
    """Bars on stderr for as long as the block runs."""
    err = Console(file=sys.stderr)
    with Bars(*_columns(), console=err, disable=not err.is_terminal) as bars:
        yield RichProgress(bars, total)


def _columns() -> tuple[ProgressColumn, ...]:
    return (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())


class Bar:
    """One bar on stderr that appears with its first step; :class:`Lines` where that is not a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bars: Bars | None = None
        self._shown: RichProgress | None = None
        self._done = 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def at(self, done: int, total: int) -> None:
        """``done`` of ``total`` are done."""
        if self._bars is None or self._shown is None:
            err = Console(file=sys.stderr)
            self._bars = Bars(*_columns(), console=err, disable=not err.is_terminal)
            self._bars.start()
            self._shown = RichProgress(self._bars)
            self._done = 0
        if done <= self._done or not self._done:
            self._shown.start(self._title, total)
            self._done = 0
        self._shown.advance(self._title, done - self._done)
        self._done = done
        if done >= total:  # another bar may be next, and two would draw on the same line
            self.__exit__()

    def say(self, line: str) -> None:
        """A line on stderr, above the bar where one is drawn."""
        if self._bars is None:
            click.echo(line, err=True)
        else:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

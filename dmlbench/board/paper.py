"""Tables for a paper: several runs of one protocol side by side, as LaTeX (booktabs), Markdown or CSV.

:func:`table` makes a :class:`Table` from runs, and :data:`FORMATS` writes it. Every number is that of the run, 95 % intervals
have classes as their unit (:mod:`dmlbench.intervals`), and what is bold comes from the paired comparison of
:mod:`dmlbench.board.compare`: the best of a column, and every run that it is not surely ahead of.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmlbench.board.compare import compare
from dmlbench.board.compare.render import escape_markdown
from dmlbench.board.compare.verdict import components_of
from dmlbench.board.row import EXECUTED, kind_columns, more, shown, superseded
from dmlbench.errors import NotComparable, UsageError
from dmlbench.files import printable
from dmlbench.intervals import Ends
from dmlbench.kinds.table import KINDS, kind_of, numbers_of
from dmlbench.metrics import CLEAN_METRICS
from dmlbench.protocol import score_intervals
from dmlbench.registry import suggest
from dmlbench.results import Evaluation
from dmlbench.run.looks import mean_interval

HEADERS = {**{name: metric.title for name, metric in CLEAN_METRICS.items()}, "ers": "ERS"}
"""What columns are called; parts by their own name, other numbers in words."""


@dataclass(frozen=True)
class Cell:
    """One number of a run, its 95 % interval, whether it is the best of its column or not surely behind that, and what stands
    before it (:func:`dmlbench.board.row.more`)."""

    value: float | None
    interval: Ends = None
    bold: bool = False
    more: str = ""

    def text(self, column: str) -> str:
        """The value as a person reads it."""
        return "–" if self.value is None else self.more + shown(column, self.value)


@dataclass(frozen=True)
class Table:
    """Rows of cells, by the name of the run; ``columns`` are metrics by their names in ``compare``.

    ``caption`` says by which rules the numbers were made, on how many queries, and every doubt about them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: str


def header(column: str) -> str:
    """A column's name as a reader sees it: "worst_case_area" is "worst case area"; a part that has its kind's name, as
    kinds do with one part for each eps, is "R@1, eps 8/255"."""
    kind, _, eps = column.partition("@")
    if eps and kind in KINDS:
        return f"R@1, eps {eps}"
    return HEADERS.get(column, column if "@" in column else column.replace("_", " "))


def numbers(e: Evaluation) -> dict[str, float | None]:
    """Every number that a table can show, by its metric's name: clean metrics, parts' scores, the protocol's own, ERS."""
    values: dict[str, float | None] = {**e.benign, **{m.component: m.score for m in e.measurements}, **numbers_of(e)}
    return values if e.ers is None else {**values, "ers": e.ers}


def intervals(e: Evaluation) -> dict[str, Ends]:
    """Their 95 % intervals as they are made today, from the queries' own outcomes; what is no mean or median over queries has none.

    Of a protocol that is not at hand, and of a run that stopped where it was sure enough, the parts have those that the result states.
    """
    if "label" not in e.arrays:
        return {}
    ends: dict[str, Ends] = {}
    try:
        present = [c for name, c in components_of(e).items() if f"{name}/value" in e.arrays]
        stated = "until" in e.extras
    except NotComparable:
        stated = True
    if stated:
        present, ends = [], {m.component: m.interval for m in e.measurements} | {"ers": e.ers_interval}
    if present:
        ends |= zip([c.name for c in present], score_intervals(present, e.arrays).columns, strict=True)
    for name in e.benign:
        values = e.arrays.get(f"benign/{name}")
        if values is not None:
            ends[name] = mean_interval(e, values.astype(np.float64))
    extra = set(e.extras.get("extra_parts", ()))
    protocol_parts = [c for c in present if c.name not in extra]
    if e.ers is not None and protocol_parts:
        ends["ers"] = score_intervals(protocol_parts, e.arrays).mean
    columns = kind_columns(e)
    for name in numbers_of(e):
        low, high = columns.get(f"{name}_lo"), columns.get(f"{name}_hi")
        if low is not None and high is not None:
            ends[name] = (low, high)
    return ends


def names_of(runs: Sequence[tuple[str, Evaluation]]) -> list[str]:
    """The models' names; with the run's own name behind it where two runs are of one model."""
    count = Counter(e.model.id for _, e in runs)
    return [e.model.id if count[e.model.id] == 1 else f"{e.model.id} ({label})" for label, e in runs]


def table(runs: Sequence[tuple[str, Evaluation]], columns: Sequence[str] = ()) -> Table:
    """The runs side by side.

    Args:
        runs: each with the name that the user gave it.
        columns: which metrics, in this order; by default clean R@1, every part, the protocol's own numbers and ERS.

    Raises:
        NotComparable: the runs differ in protocol, data set, queries, surrogate or averaged passes (exit code 3).
        UsageError: no run, or a metric that none of them has.
    """
    if not runs:
        raise UsageError("name at least one run")
    first = runs[0][1]
    given, ends = [numbers(e) for _, e in runs], [intervals(e) for _, e in runs]
    known = list(dict.fromkeys(name for values in given for name in values))
    if unknown := [name for name in columns if name not in known]:
        raise UsageError(f"no run has a metric {unknown[0]!r}{suggest(unknown[0], known)}")
    clean = [name for name in first.benign if name != "recall_at_1"]
    chosen = tuple(columns or (name for name in known if name not in clean))
    bold = _bold([e for _, e in runs], names_of(runs), given, chosen)
    lengths = [kind_of(e).read(e) for _, e in runs]
    return Table(
        columns=chosen,
        rows=tuple(
            (name, tuple(Cell(given[r].get(c), ends[r].get(c), r in bold[c], more(lengths[r], c)) for c in chosen))
            for r, name in enumerate(names_of(runs))
        ),
        caption=_caption(runs),
    )


def _bold(
    runs: Sequence[Evaluation],
    names: Sequence[str],
    given: Sequence[Mapping[str, float | None]],
    columns: Sequence[str],
) -> dict[str, set[int]]:
    """By column the best run and those that it is not surely ahead of; none where nothing says how sure a difference is."""
    of_pairs: dict[tuple[int, int], dict[str, Ends]] = {}

    def ahead(a: int, b: int) -> dict[str, Ends]:
        """By metric the interval of what ``b`` is ahead of ``a``."""
        if (a, b) not in of_pairs:
            result = compare(runs[a], runs[b], labels=(names[a], names[b]))
            of_pairs[a, b] = {m.metric: m.interval for m in result.metrics}
        return of_pairs[a, b]

    for other in range(1, len(runs)):
        ahead(0, other)  # refuses what cannot be set side by side, whichever columns are shown
        if set(runs[0].arrays["query"].tolist()) != set(runs[other].arrays["query"].tolist()):
            raise NotComparable(f"{names[0]} and {names[other]} measured other queries: their means are not of one set")
    bold: dict[str, set[int]] = {}
    for column in columns:
        there = [r for r, values in enumerate(given) if values.get(column) is not None]
        if not there:
            bold[column] = set()
            continue
        best = max(there, key=lambda r: float(given[r][column] or 0.0))
        near = {best}
        sure = 0
        for other in there:
            if other != best:
                ends = ahead(min(best, other), max(best, other)).get(column)
                sure += ends is not None
                behind = ends is not None and (ends[1] < 0 if best < other else ends[0] > 0)
                near |= set() if behind else {other}
        bold[column] = near if sure and sure == len(there) - 1 else set()
    return bold


def _caption(runs: Sequence[tuple[str, Evaluation]]) -> str:
    first, names = runs[0][1], names_of(runs)
    p, d = first.protocol, first.dataset
    sentences = [
        f"Protocol {p.name}, version {p.version} (sha256 {p.sha256[:12]}), on {d.name}/{d.split}: n = {d.n_queries} queries of "
        f"{d.n_classes} classes, {d.n_gallery} gallery images",
        "Higher is more robust; percentages and scores run from 0 to 100, with 95 % intervals over classes",
    ]
    if len(runs) > 1:
        sentences.append("Bold: the best, and all that are not surely behind it (paired by query)")
    doubts: dict[str, list[str]] = {}
    for name, (_, e) in zip(names, runs, strict=True):
        stale = superseded(e.protocol.name, e.protocol.sha256, e.model.id)
        flags = ", ".join(w.flag for w in e.warnings)
        for doubt in (
            f"Partial result ({', '.join(e.partial)})" if e.partial else "",
            f"Stale ({stale})" if stale else "",
            f"Flagged ({flags})" if flags else "",
        ):
            if doubt:
                doubts.setdefault(doubt, []).append(name)
    for doubt, of in doubts.items():
        sentences.append(f"{doubt}: {'all' if len(of) == len(runs) > 1 else ', '.join(of)}")
    return ". ".join(sentences) + "."


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\char34{}", "`": r"\char96{}", "'": r"\char39{}", "‐": "-", "[": "{[}", "]": "{]}", "*": "{*}", "±": r"$\pm$",
    "→": r"$\to$", "×": r"$\times$", "–": r"\textendash{}", "…": r"\ldots{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; a character that pdflatex has no letter for is named by its code point."""
    out = []
    for character in " ".join(text.split()):
        if character in _LATEX:
            out.append(_LATEX[character])
        elif character.isascii() or (character <= "\u017f" and character.isalpha()):
            out.append(character if character.isprintable() else " ")
        else:
            out.append(f"U+{ord(character):04X}")
    return re.sub(r"(?<=-)-", "{-}", "".join(out))  # two hyphens would be a dash


def _reach(cell: Cell, column: str) -> tuple[str, str, str]:
    """Value, and how far the interval reaches above and below it, each as text; empty where there is none."""
    if cell.value is None or cell.interval is None:
        return cell.text(column), "", ""
    low, high = cell.interval
    return cell.text(column), shown(column, high - cell.value), shown(column, cell.value - low)


def as_latex(table: Table) -> str:
    r"""A ``table`` environment that needs ``\usepackage{booktabs,graphicx}``: intervals stand below their values, and a
    table that is wider than the line is made smaller."""
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape_latex(table.caption)}}}",
        rf"\sbox0{{\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["Model", *(escape_latex(header(c)) for c in table.columns)]) + r" \\",
        r"\midrule",
    ]
    for name, cells in table.rows:
        values, spreads = [], []
        for column, cell in zip(table.columns, cells, strict=True):
            value, above, below = _reach(cell, column)
            text = escape_latex(value).replace("-", "$-$")
            values.append(rf"\textbf{{{text}}}" if cell.bold else text)
            reach = rf"\pm{above}" if above == below else rf"{{}}^{{+{above}}}_{{-{below}}}"
            spreads.append(rf"{{\scriptsize ${reach}$}}" if above else "")
        lines += [" & ".join([escape_latex(name), *values]) + r" \\", " & ".join(["", *spreads]) + r" \\\addlinespace"]
    smaller = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}%", smaller, r"\end{table}"]) + "\n"


def as_markdown(table: Table) -> str:
    """A Markdown table, its caption below."""
    lines = ["| " + " | ".join(["Model", *(escape_markdown(header(c)) for c in table.columns)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(table.columns))
    for name, cells in table.rows:
        texts = []
        for column, cell in zip(table.columns, cells, strict=True):
            value, above, below = _reach(cell, column)
            spread = "" if not above else f" ± {above}" if above == below else f" (+{above} −{below})"
            texts.append((f"**{value}**" if cell.bold else value) + spread)
        lines.append("| " + " | ".join([escape_markdown(name), *texts]) + " |")
    return "\n".join([*lines, "", escape_markdown(table.caption)]) + "\n"


def as_csv(table: Table) -> str:
    """Every digit: for each metric its value, the ends of its interval, and 1 where it is bold. A name that a spreadsheet
    would execute begins with an apostrophe. The caption is the last cell of each row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    suffixes = ("", "_lo", "_hi", "_bold")
    writer.writerow(["model", *(_cell(f"{c}{suffix}") for c in table.columns for suffix in suffixes), "caption"])
    for name, cells in table.rows:
        numbers = [x for cell in cells for x in (cell.value, *(cell.interval or (None, None)), int(cell.bold))]
        writer.writerow([_cell(name), *("" if x is None else repr(x) for x in numbers), _cell(table.caption)])
    return stream.getvalue()


def _cell(text: str) -> str:
    plain = " ".join(printable(text).split())
    return f"'{plain}" if plain.startswith(EXECUTED) else plain


FORMATS: dict[str, Callable[[Table], str]] = {"latex": as_latex, "md": as_markdown, "csv": as_csv}
"""How a table is written."""

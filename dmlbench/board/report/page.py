"""The page of one or several runs: tables and drawings from their records, pictures from their close-ups.

A pure function of run folders: nothing is measured, loaded from elsewhere or fetched, and the page
itself may not fetch anything (its content security policy says so).
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dmlbench.board.adversary import adversary, sizes_of
from dmlbench.board.paper import Cell, header, table
from dmlbench.board.paper import intervals as intervals_of
from dmlbench.board.plots import Figure, Series, eps, inline, parts, reached
from dmlbench.board.report.fallen import FIRST, fallen
from dmlbench.board.report.pictures import data_uri, magnified
from dmlbench.board.row import headline, more, shown
from dmlbench.errors import NotComparable
from dmlbench.kinds.base import interval_text, text_of
from dmlbench.kinds.table import kind_of
from dmlbench.metrics import CLEAN_METRICS, decimals
from dmlbench.results import Evaluation
from dmlbench.run.closeup import names_of
from dmlbench.threat import written

STRIPS = 4
"""Queries shown for each part."""
_MOVED = ("clean", "attacked", "gallery")


@dataclass(frozen=True)
class Run:
    """A run folder as the page needs it: its name and what it holds."""

    name: str
    evaluation: Evaluation

    @property
    def eps(self) -> float:
        """The largest perturbation in the run, in the protocol's norm; 0 if the run stores no norms."""
        return reached(self.evaluation)

    @property
    def length(self) -> str:
        """:attr:`eps` as the field writes lengths of its norm."""
        return written(self.eps, sizes_of(self.evaluation)[0])


@dataclass(frozen=True)
class Retrieved:
    """One retrieved image: its picture, and whether it is of the query's class."""

    picture: str
    right: bool
    label: str


@dataclass(frozen=True)
class Strip:
    """One query before and after an attack."""

    label: str
    query: str
    attacked: str
    change: str
    factor: float
    size: float
    before: tuple[Retrieved, ...]
    after: tuple[Retrieved, ...]


def page(runs: Sequence[Run]) -> str:
    """The HTML page of the runs, the first of them in full.

    Raises:
        IndexError: no run.
    """
    first = runs[0].evaluation
    environment = Environment(
        loader=PackageLoader("dmlbench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = text_of
    environment.filters["interval"] = interval_text
    return environment.get_template("report.html").render(
        runs=runs,
        first=runs[0],
        e=first,
        adversary=adversary(first),
        headline=_headline(first),
        benign=[
            (metric.title, [run.evaluation.benign.get(name) for run in runs])
            for name, metric in CLEAN_METRICS.items()
            if not metric.grouped or any(name in run.evaluation.benign for run in runs)
        ],
        parts=[(m, text_of(m.value, decimals(m.readout))) for m in first.measurements],
        chart=_chart(runs),
        sides=_sides(runs),
        curves=_curves(runs),
        fallen=fallen([run.evaluation for run in runs]),
        first_queries=FIRST,
        closeups=[_closeup(first, i, name) for i, name in enumerate(names_of(first.sample).components)],
        command=shlex.join(first.environment.argv) if first.environment.argv else "",
    )


def _headline(e: Evaluation) -> tuple[str, str, str] | None:
    """What runs without ERS are ranked by: the number as it is written, its title, its 95 % interval or ""; None for none."""
    ranked_by = headline(e)
    kind = kind_of(e)
    number = next((n for n in kind.numbers if ranked_by and n.name == ranked_by[0]), None)
    if ranked_by is None or number is None:
        return None
    given, norm = kind.read(e), sizes_of(e)[0]
    ends = intervals_of(e).get(number.name) or (given.get(f"{number.name}_lo"), given.get(f"{number.name}_hi"))

    def text(value: float | None) -> str:
        if value is None:
            return "beyond the grid" if number.length else "–"
        return written(value, norm) if number.length else shown(number.name, value)

    value = more(given, number.name) + text(ranked_by[1])
    return value, number.title, "" if ends[0] is None else f"{text(ends[0])} – {text(ends[1])}"


def _chart(runs: Sequence[Run]) -> Markup | None:
    """Every part's score as bars: of all runs where they are of one protocol and data set, else of the first."""
    if not runs[0].evaluation.measurements:
        return None
    pairs = [(run.name, run.evaluation) for run in runs]
    try:
        figure = parts(pairs)
    except NotComparable:
        figure = parts(pairs[:1])
    return inline(figure, "parts", "score of each part, with its 95 % interval", 7.0)


@dataclass(frozen=True)
class Sides:
    """Runs side by side: a row for each number, with its value, its interval and whether it is bold for each run; or why they
    cannot be."""

    rows: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...] = ()
    caption: str = ""


def _sides(runs: Sequence[Run]) -> Sides | None:
    """None for a single run."""
    if len(runs) < 2:
        return None
    try:
        compared = table([(run.name, run.evaluation) for run in runs])
    except NotComparable as error:
        return Sides(caption=f"They cannot be set side by side: {error}.")
    rows = []
    for n, column in enumerate(compared.columns):
        cells = [cells[n] for _, cells in compared.rows]
        rows.append((header(column), tuple((c.text(column), _ends(column, c), c.bold) for c in cells)))
    return Sides(tuple(rows), compared.caption)


def _ends(column: str, cell: Cell) -> str:
    return "" if cell.interval is None else " – ".join(shown(column, end) for end in cell.interval)


def _curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """What there is along eps, each with its title: ERS of runs at several eps, and the curves of the kinds of protocol, a
    line for each run of the same protocol and data set. Where no query has an outcome when clean, there is nothing to draw."""
    drawn = []
    scored = [(run.name, run.evaluation) for run in runs if run.evaluation.ers is not None]
    if len({round(reached(e), 4) for _, e in scored}) > 1:
        drawn.append(("ERS", eps(scored)))
    groups: dict[tuple[str, ...], list[tuple[str, Evaluation]]] = {}
    for run in runs:
        e = run.evaluation
        curve = kind_of(e).curve(e)
        if curve is not None and curve.points[0].value is not None and not np.isnan(curve.points[0].value):
            key = curve.title, e.protocol.name, e.protocol.sha256, e.dataset.name, e.dataset.split, e.dataset.sha256
            groups.setdefault(key, []).append((run.name, e))
    drawn += [(key[0], eps(group)) for key, group in groups.items()]
    return [
        (title, inline(figure, f"eps-{n}", f"{title} against eps", 6.5, 3.4)) for n, (title, figure) in enumerate(drawn)
    ]


def _closeup(e: Evaluation, index: int, name: str) -> dict[str, Any]:
    """The strips and the projection of one part."""
    sample, (_, classes, order) = e.sample, names_of(e.sample)
    labels = {int(row): int(label) for row, label in zip(sample["closeup/rows"], sample["closeup/labels"], strict=True)}
    pictures = dict(zip(sample["closeup/rows"].tolist(), sample["closeup/images"], strict=True))

    def picture(image: np.ndarray) -> str:
        return data_uri(image[::-1] if order == "bgr" else image)

    strips = []
    for k, (clean, label) in enumerate(
        zip(sample["closeup/query"][:STRIPS], sample["closeup/query_label"].tolist(), strict=False)
    ):

        def retrieved(rows: np.ndarray, query_label: int = label) -> tuple[Retrieved, ...]:
            return tuple(
                Retrieved(
                    picture(pictures[row]),
                    labels[row] == query_label,
                    f"class {classes.get(labels[row], labels[row])}",
                )
                for row in rows.tolist()
            )

        original = clean.astype(np.float32)
        attacked = sample[name][int(sample["closeup/place"][k])]
        change, factor = magnified(attacked - original)
        strips.append(
            Strip(
                label=f"class {classes.get(label, label)}",
                query=picture(original),
                attacked=picture(attacked),
                change=picture(change),
                factor=factor,
                size=float(np.abs(attacked - original).max()),
                before=retrieved(sample["closeup/top"][0, k]),
                after=retrieved(sample["closeup/top"][1 + index, k]),
            )
        )
    at = (sample["closeup/plane"][0], sample["closeup/plane"][1 + index], sample["closeup/plane_gallery"])
    group = sample["closeup/plane_labels"]
    moved = (Series(what, p[:, 0], p[:, 1], groups=group) for what, p in zip(_MOVED, at, strict=True))
    figure = Figure("plane", "", "", tuple(moved))
    drawing = inline(figure, f"plane-{index}", f"embeddings before and after {name}", 2.4, 2.4)
    return {"name": name, "strips": strips, "plane": drawing}

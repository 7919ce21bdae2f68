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

from dmlbench.board.report.charts import PALETTE, Bar, Line, bars, curves, length_255, plane
from dmlbench.board.report.pictures import data_uri, magnified
from dmlbench.kinds.table import kind_of
from dmlbench.metrics import CLEAN
from dmlbench.results import Evaluation, Measurement
from dmlbench.run.closeup import names_of
from dmlbench.threat import length

STRIPS = 4
"""Queries shown for each part."""
_RAW_DECIMALS = {"target_cosine": 3, "embedding_shift": 3}


@dataclass(frozen=True)
class Run:
    """A run folder as the page needs it: its name and what it holds."""

    name: str
    evaluation: Evaluation

    @property
    def eps(self) -> float:
        """The largest perturbation found in the run, in its protocol's norm; 0 where none is kept."""
        norms = [a for key, a in self.evaluation.arrays.items() if key.endswith("/norm") and a.size]
        return max((float(np.nanmax(a)) for a in norms), default=0.0)


@dataclass(frozen=True)
class Found:
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
    before: tuple[Found, ...]
    after: tuple[Found, ...]


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
    environment.filters["number"] = _number
    environment.filters["interval"] = _interval
    environment.filters["length_255"] = length_255
    return environment.get_template("report.html").render(
        runs=runs,
        first=runs[0],
        e=first,
        benign=[(label, [run.evaluation.benign.get(key) for run in runs]) for key, label in CLEAN.items()],
        parts=[(m, _raw(m)) for m in first.measurements],
        chart=Markup(bars([_bar(m, i) for i, m in enumerate(first.measurements)])),
        comparison=_comparison(runs),
        curve=_curve(runs),
        kinds=_curves_of_kinds(runs),
        closeups=[_closeup(first, i, name) for i, name in enumerate(names_of(first.sample)[0])],
        command=shlex.join(first.environment.argv) if first.environment.argv else "",
    )


def _number(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.1f} – {ends[1]:.1f}"


def _raw(m: Measurement) -> str:
    return _number(m.value, _RAW_DECIMALS.get(m.readout, 1))


def _bar(m: Measurement, i: int) -> Bar:
    ends = f", 95 % interval {_interval(m.interval)}" if m.interval else ""
    return Bar(m.component, m.score, m.interval, PALETTE[0], f"{m.component}: {_number(m.score)}{ends}, {m.n} queries")


def _comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row of scores for each run; empty for a single run."""
    if len(runs) < 2:
        return []
    return [
        {
            "name": run.name,
            "e": run.evaluation,
            "eps": run.eps,
            "scores": {m.component: m.score for m in run.evaluation.measurements},
        }
        for run in runs
    ]


def _curve(runs: Sequence[Run]) -> Markup | None:
    """ERS against eps, a line for each model; None unless two runs have one at different eps."""
    scored = [run for run in runs if run.evaluation.ers is not None]
    if len({round(run.eps, 4) for run in scored}) < 2:
        return None
    models = list(dict.fromkeys(run.evaluation.model.id for run in scored))
    lines = [
        Line(
            model,
            [
                (run.eps, float(run.evaluation.ers or 0.0), run.evaluation.ers_interval)
                for run in scored
                if run.evaluation.model.id == model
            ],
            PALETTE[i % len(PALETTE)],
        )
        for i, model in enumerate(models)
    ]
    return Markup(curves(lines, "ERS"))


def _curves_of_kinds(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """The title and the curve over eps of each kind of protocol that has one, a line for each run; where no query has an
    outcome when clean, there is nothing to draw."""
    lines: dict[str, list[Line]] = {}
    for run in runs:
        e = run.evaluation
        curve, intervals = kind_of(e).curve(e), {m.component: m.interval for m in e.measurements}
        if curve is None or curve.points[0].value is None or np.isnan(curve.points[0].value):
            continue
        points: list[tuple[float, float, tuple[float, float] | None]] = []
        for p in curve.points:
            norms = e.arrays.get(f"{p.part}/norm")
            reached = float(np.nanmax(norms)) if norms is not None and norms.size else length(p.eps)
            points.append((reached, float("nan" if p.value is None else p.value), intervals.get(p.part or "")))
        here = lines.setdefault(curve.title, [])
        here.append(Line(run.name, points, PALETTE[len(here) % len(PALETTE)]))
    return [(title, Markup(curves(found, title))) for title, found in lines.items()]


def _closeup(e: Evaluation, index: int, name: str) -> dict[str, Any]:
    """The strips and the projection of one part."""
    kept, classes = e.sample, names_of(e.sample)[1]
    labels = {int(row): int(label) for row, label in zip(kept["closeup/rows"], kept["closeup/labels"], strict=True)}
    pictures = dict(zip(kept["closeup/rows"].tolist(), kept["closeup/images"], strict=True))
    strips = []
    for k, (clean, label) in enumerate(
        zip(kept["closeup/query"][:STRIPS], kept["closeup/query_label"].tolist(), strict=False)
    ):

        def found(rows: np.ndarray, wanted: int = label) -> tuple[Found, ...]:
            return tuple(
                Found(data_uri(pictures[row]), labels[row] == wanted, f"class {classes.get(labels[row], labels[row])}")
                for row in rows.tolist()
            )

        original = clean.astype(np.float32)
        attacked = kept[name][int(kept["closeup/place"][k])]
        change, factor = magnified(attacked - original)
        strips.append(
            Strip(
                label=f"class {classes.get(label, label)}",
                query=data_uri(original),
                attacked=data_uri(attacked),
                change=data_uri(change),
                factor=factor,
                size=float(np.abs(attacked - original).max()),
                before=found(kept["closeup/top"][0, k]),
                after=found(kept["closeup/top"][1 + index, k]),
            )
        )
    drawing = plane(
        kept["closeup/plane_gallery"],
        kept["closeup/plane"][0],
        kept["closeup/plane"][1 + index],
        kept["closeup/plane_labels"],
        f"embeddings before and after {name}",
    )
    return {"name": name, "strips": strips, "plane": Markup(drawing)}

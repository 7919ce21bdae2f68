"""What a figure is, as plain numbers, and how matplotlib draws it.

matplotlib is imported when something is drawn. Nothing needs a display, the same numbers give the same bytes, and curves,
bars and points differ in shape and lightness, so that they read in grey.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmlbench.errors import UsageError
from dmlbench.files import prepare_folder, printable, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 40
"""Up to which number of classes each is named below the axis."""


@dataclass(frozen=True)
class Series:
    """One curve, one set of bars or one set of points: x (n,), y (n,) and, where they are known, ends of 95 % intervals.

    Attributes:
        low, high: (n,), NaN where a point has no interval.
        groups: (n,) the class of each point of a projection.
        tooltips: the text shown at each point on a page.
        links: where each point leads, on a page.
        hollow: points are outlines.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    groups: np.ndarray | None = None
    tooltips: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    hollow: bool = False


@dataclass(frozen=True)
class Figure:
    """What a figure shows, as numbers.

    Attributes:
        kind: how it is drawn, a name of :data:`DRAW`.
        ticks: names of the positions 0, 1, ... on the x axis, where these are no numbers.
        table: (rows, columns) of a matrix, NaN where there is no run; ``series`` then gives the rows' names.
    """

    kind: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    table: np.ndarray | None = None
    limits: tuple[float, float] | None = None

    def _repr_png_(self) -> bytes:
        return draw(self, "png")

    def save(self, path: str | Path, width: float = 5.5) -> Path:
        """Write it as PDF, SVG or PNG, as the suffix of ``path`` says, ``width`` inches wide.

        Raises:
            UsageError: another suffix.
            DataError: the file cannot be written.
        """
        path = Path(path)
        content = draw(self, path.suffix.removeprefix(".").lower(), width)
        prepare_folder(path.parent)
        write_atomic(path, content)
        return path


@dataclass(frozen=True)
class Ink:
    """The colours of a drawing.

    Attributes:
        of: n colours that tell n things apart.
        ink, soft, line, paper: of text and axes, of what stands back, of the grid, of the ground.
    """

    of: Callable[[int], Sequence[Any]]
    ink: str
    soft: str
    line: str
    paper: str


def _dark_to_light(count: int) -> Sequence[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](at) for at in np.linspace(0.0, 0.82, max(count, 2))][:count]


PAPER = Ink(_dark_to_light, ink="#000000", soft="#555555", line="#d9d9d9", paper="#ffffff")
"""For print: from dark to light, so that they differ in grey as well."""

_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.grid": True, "axes.grid.axis": "y", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4, "pdf.fonttype": 42,
    "svg.hashsalt": "dmlbench", "svg.fonttype": "none", "hatch.linewidth": 0.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_MARKERS = "osD^vPX<>*hp"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
SUFFIXES = ("pdf", "svg", "png")


def _text(text: str) -> str:
    """Text that matplotlib shows as it is: no mathematics, no line breaks or other control characters, not hidden from a legend."""
    plain = " ".join(printable(text).split()).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _errors(s: Series) -> np.ndarray | None:
    """(2, n) how far the intervals reach down and up."""
    return (
        None
        if s.low is None or s.high is None
        else np.nan_to_num(np.stack([s.y - s.low, s.high - s.y]), nan=0.0).clip(0)
    )


def _draw_curves(axes: "Axes", figure: Figure, ink: Ink) -> None:
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        axes.plot(
            255 * s.x,
            s.y,
            color=colour,
            ls=_DASHES[i % len(_DASHES)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=_text(s.name),
        )
        if s.low is not None and s.high is not None:
            known = ~np.isnan(s.low)
            axes.fill_between(255 * s.x[known], s.low[known], s.high[known], color=colour, alpha=0.15, lw=0)


def _draw_bars(axes: "Axes", figure: Figure, ink: Ink) -> None:
    width = 0.8 / len(figure.series)
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        at = s.x + (i - (len(figure.series) - 1) / 2) * width
        style = {"color": colour, "edgecolor": ink.paper, "lw": 0.3, "hatch": _HATCHES[i % len(_HATCHES)]}
        axes.bar(
            at, s.y, width, yerr=_errors(s), error_kw={"lw": 0.7, "ecolor": ink.soft}, label=_text(s.name), **style
        )
    _name_ticks(axes, figure.ticks)


def _name_ticks(axes: "Axes", ticks: Sequence[str]) -> None:
    slanted = sum(map(len, ticks)) > 70
    axes.set_xticks(
        range(len(ticks)), [_text(t) for t in ticks], rotation=40 if slanted else 0, ha="right" if slanted else "center"
    )


def _draw_points(axes: "Axes", figure: Figure, ink: Ink) -> None:
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        marker = _MARKERS[i % len(_MARKERS)]
        axes.errorbar(
            s.x, s.y, yerr=_errors(s), color=colour, marker=marker, ls="", elinewidth=0.7, label=_text(s.name)
        )


def _draw_board(axes: "Axes", figure: Figure, ink: Ink) -> None:
    """Many points, each with a link; in the SVG the id of each is ``point-I-N``."""
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        if (reach := _errors(s)) is not None:
            axes.errorbar(s.x, s.y, yerr=reach, color=colour, ls="", elinewidth=0.7)
        for n, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
            axes.plot(
                x, y, color=colour, ls="", marker=_MARKERS[i % len(_MARKERS)], gid=f"point-{i}-{n}",
                mfc="none" if s.hollow else colour, label="_" if n else _text(s.name),
            )  # fmt: skip
    axes.grid(True, axis="both")


def _draw_classes(axes: "Axes", figure: Figure, ink: Ink) -> None:
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        axes.plot(s.x, s.y, color=colour, ls=":", lw=0.8, marker=_MARKERS[i % len(_MARKERS)], label=_text(s.name))
    if len(figure.ticks) <= MOST_CLASSES:
        _name_ticks(axes, figure.ticks)
    else:
        axes.set_xticks([])


def _draw_roc(axes: "Axes", figure: Figure, ink: Ink) -> None:
    """Steps on a log scale of the share of impostors, from half of the smallest share that there is."""
    smallest = min(float(s.x[s.x > 0].min()) for s in figure.series)
    for i, (s, colour) in enumerate(zip(figure.series, ink.of(len(figure.series)), strict=True)):
        x = np.maximum(s.x, smallest / 2)
        axes.plot(x, s.y, color=colour, ls=_DASHES[i % len(_DASHES)], drawstyle="steps-post", label=_text(s.name))
    axes.set(xscale="log", xlim=(smallest / 2, 100.0))


def _draw_plane(axes: "Axes", figure: Figure, ink: Ink) -> None:
    """Clean and attacked points, joined; what stands after them is a ground of small dots."""
    clean, attacked, *ground = figure.series
    assert clean.groups is not None
    names = np.unique(clean.groups)
    of = dict(zip(names.tolist(), ink.of(len(names)), strict=True))
    for s in ground:
        axes.scatter(s.x, s.y, s=2, c=ink.soft, alpha=0.35, lw=0, label=_text(s.name))
    for a, b, u, v, group in zip(clean.x, clean.y, attacked.x, attacked.y, clean.groups.tolist(), strict=True):
        axes.plot([a, u], [b, v], color=of[group], lw=0.4, alpha=0.5)
    colours = [of[g] for g in clean.groups.tolist()]
    axes.scatter(clean.x, clean.y, s=16, c=colours, marker="o", label="clean")
    axes.scatter(attacked.x, attacked.y, s=18, c=colours, marker="x", lw=1.0, label="attacked")
    axes.set(xticks=[], yticks=[])
    if ground:
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()


def _draw_matrix(axes: "Axes", figure: Figure, ink: Ink) -> None:
    assert figure.table is not None
    top = float(np.nanmax(figure.table)) if np.isfinite(figure.table).any() else 1.0
    axes.imshow(np.ma.masked_invalid(figure.table), cmap="Greys", vmin=0.0, vmax=1.6 * max(top, 1e-9), aspect="auto")
    for r, row in enumerate(figure.table):
        for c, value in enumerate(row):
            axes.text(
                c,
                r,
                "–" if np.isnan(value) else f"{value:.3g}" if top <= 1 else f"{value:.1f}",
                ha="center",
                va="center",
            )
    _name_ticks(axes, figure.ticks)
    axes.set_yticks(range(len(figure.series)), [_text(s.name) for s in figure.series])
    axes.grid(False)


DRAW: dict[str, Callable[["Axes", Figure, Ink], None]] = {
    "eps": _draw_curves, "parts": _draw_bars, "scatter": _draw_points, "board": _draw_board, "classes": _draw_classes,
    "tsne": _draw_plane, "plane": _draw_plane, "matrix": _draw_matrix, "roc": _draw_roc,
}  # fmt: skip
"""How each kind of figure is put on its axes."""


def draw(figure: Figure, suffix: str, width: float = 5.5, ink: Ink = PAPER, height: float | None = None) -> bytes:
    """The figure as a file of the kind ``suffix``, ``width`` inches wide: the same bytes for the same numbers.

    Args:
        height: in inches; by default what suits its kind. With it, axes have their usual margins, in place of those that
            their texts need, which take several times as long to find.

    Raises:
        UsageError: ``suffix`` is none of :data:`SUFFIXES`, or there is nothing to draw.
    """
    if suffix not in SUFFIXES:
        raise UsageError(
            f"a figure is written as {', '.join(SUFFIXES)}, not as {suffix or 'a file without a suffix'!r}"
        )
    if not figure.series:
        raise UsageError("these runs hold nothing of that kind to draw")
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}[suffix]
    colours = {**dict.fromkeys(_INKED, ink.ink), "grid.color": ink.line, "hatch.color": ink.paper}
    with rc_context({**_STYLE, **colours}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        rows = len(figure.series) if figure.table is not None else 0
        tall = height or (0.32 * rows + 1.9 if rows else 0.62 * width)
        canvas = Canvas(figsize=(width, tall), layout=None if height else "constrained")
        legend = figure.table is None and figure.kind != "plane" and not (height and len(figure.series) == 1)
        lines = -(-len(figure.series) // 2) if legend else 0
        if height:
            left, low = (0.1, 0.1) if figure.kind == "plane" else (0.5, 0.45 + 0.14 * lines)
            canvas.subplots_adjust(left / width, low / height, 1 - 0.1 / width, 1 - 0.1 / height)
        axes = canvas.add_subplot()
        DRAW[figure.kind](axes, figure, ink)
        axes.set_xlabel(_text(figure.x_title))
        if figure.table is not None or figure.kind == "tsne":
            axes.set_title(_text(figure.y_title), fontsize=8)
        else:
            axes.set_ylabel(_text(figure.y_title))
        if figure.limits:
            axes.set_ylim(*figure.limits)
        if legend:
            columns = 2 if height or len(figure.series) < 9 else 3
            canvas.legend(
                loc="lower center" if height else "outside lower center", ncols=columns, fontsize=7, borderpad=0
            )
        out = io.BytesIO()
        canvas.savefig(out, format=suffix, dpi=200, metadata=metadata)
    return out.getvalue()

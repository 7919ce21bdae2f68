"""Drawings for a page, as SVG text: no script, no font and no file of anybody else."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PALETTE = ("#2563a8", "#c2571a", "#2e7d4f", "#8a4fa3", "#a8323e", "#5b6570", "#a0821a", "#1a8a99")


@dataclass(frozen=True)
class Bar:
    """One bar: 0 to 100, its interval, and what a pointer on it is told."""

    label: str
    value: float | None
    interval: tuple[float, float] | None
    colour: str
    title: str


def bars(rows: Sequence[Bar], width: int = 640) -> str:
    """Horizontal bars on a scale of 0 (worst) to 100 (best), with whiskers for intervals."""
    left, right, step = 110, 52, 26
    height = step * len(rows) + 24
    scale = (width - left - right) / 100.0

    def x(value: float) -> float:
        return left + scale * min(100.0, max(0.0, value))

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="score of each part">']
    for tick in (0.0, 25.0, 50.0, 75.0, 100.0):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:.0f}</text>')
    for i, row in enumerate(rows):
        y = step * i + 4
        middle = y + (step - 8) / 2
        parts.append(f"<g><title>{escape(row.title)}</title>")
        parts.append(
            f'<text class="label" x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
        )
        if row.value is None:
            parts.append(f'<text class="tick" x="{left + 4}" y="{middle + 4:.1f}">no value</text></g>')
            continue
        parts.append(
            f'<rect x="{left}" y="{y}" width="{max(0.5, x(row.value) - left):.1f}" height="{step - 8}" rx="2" fill="{row.colour}"/>'
        )
        if row.interval is not None:
            a, b = x(row.interval[0]), x(row.interval[1])
            parts.append(
                f'<path class="whisker" d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {y + 4}v{step - 16}M{b:.1f} {y + 4}v{step - 16}"/>'
            )
        parts.append(
            f'<text class="value" x="{width - 4}" y="{middle + 4:.1f}" text-anchor="end">{row.value:.1f}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def length_255(eps: float) -> str:
    """A length on the [0, 1] scale as the field writes it; longer ones, of the L2 norm, as they are."""
    return f"{eps * 255:.3g}/255" if eps <= 1 else f"{eps:.3g}"


@dataclass(frozen=True)
class Line:
    """Points of one curve: eps on the [0, 1] scale, value 0 to 100, its interval."""

    label: str
    points: Sequence[tuple[float, float, tuple[float, float] | None]]
    colour: str


def curves(lines: Sequence[Line], y_title: str, width: int = 640, height: int = 280) -> str:
    """Values against eps in 1/255, each point with its interval; lines are joined in order of eps."""
    left, right, top, bottom = 44, 36, 10, 58
    largest = max((p[0] for line in lines for p in line.points), default=0.0) or 1.0

    def x(eps: float) -> float:
        return left + (width - left - right) * eps / largest

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - min(100.0, max(0.0, value)) / 100.0)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_title)} against eps">'
    ]
    for tick in (0.0, 25.0, 50.0, 75.0, 100.0):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0f}</text>')
    for eps in sorted({p[0] for line in lines for p in line.points}):
        label = length_255(eps)
        parts.append(
            f'<text class="tick" x="{x(eps):.1f}" y="{height - bottom + 16}" text-anchor="middle">{label}</text>'
        )
    for i, line in enumerate(lines):
        points = sorted(line.points)
        path = "M" + "L".join(f"{x(e):.1f} {y(v):.1f}" for e, v, _ in points)
        parts.append(f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        for e, v, ends in points:
            if ends is not None:
                parts.append(f'<path class="whisker" d="M{x(e):.1f} {y(ends[0]):.1f}V{y(ends[1]):.1f}"/>')
            parts.append(
                f'<circle cx="{x(e):.1f}" cy="{y(v):.1f}" r="4" fill="{line.colour}">'
                f"<title>{escape(line.label)}: {v:.1f} at eps {e:.4g}</title></circle>"
            )
        row, column = divmod(i, 2)
        at = left + column * (width - left) // 2
        parts.append(f'<rect x="{at}" y="{height - 30 + 14 * row}" width="10" height="10" fill="{line.colour}"/>')
        parts.append(f'<text class="tick" x="{at + 15}" y="{height - 21 + 14 * row}">{escape(line.label)}</text>')
    return "".join([*parts, "</svg>"])


def plane(
    gallery: np.ndarray, clean: np.ndarray, attacked: np.ndarray, labels: np.ndarray, title: str, side: int = 300
) -> str:
    """Embeddings on two axes: the gallery as grey dots, each query as a dot joined to where the attack moved it.

    Args:
        gallery: (G, 2); clean, attacked: (S, 2); labels: (S,) classes, which give the colours.
    """
    everything = np.concatenate([gallery, clean, attacked])
    low, high = everything.min(0), everything.max(0)
    span = float(max(*(high - low), 1e-9))
    offset = (low + high) / 2

    def at(point: np.ndarray) -> tuple[float, float]:
        x, y = (point - offset) / span * (side - 24) + side / 2
        return float(x), side - float(y)

    parts = [f'<svg class="plane" viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}">']
    parts += [f'<circle class="dust" cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>' for x, y in map(at, gallery)]
    order = {label: i for i, label in enumerate(sorted(set(labels.tolist())))}
    for before, after, label in zip(clean, attacked, labels.tolist(), strict=True):
        (x, y), (u, v) = at(before), at(after)
        colour = PALETTE[order[label] % len(PALETTE)]
        parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}" stroke="{colour}" stroke-width="0.7" opacity="0.55"/>'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>')
        parts.append(f'<path d="M{u - 3:.1f} {v - 3:.1f}l6 6m0 -6l-6 6" stroke="{colour}" stroke-width="1.4"/>')
    return "".join([*parts, "</svg>"])

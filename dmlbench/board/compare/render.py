"""A comparison as text, as Markdown for a pull request, and as JUnit XML for a CI system."""

import html
import xml.etree.ElementTree as ET

from dmlbench.board.compare.records import Comparison, Difference
from dmlbench.board.row import LENGTHS
from dmlbench.files import printable

MARK = {"better": "▲", "same": "=", "worse": "▼", "inconclusive": "?"}


def _cells(m: Difference) -> tuple[str, ...]:
    form = ".3g" if m.metric in LENGTHS else ".2f"

    def number(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}{form}}"

    ends = "–" if m.interval is None else f"[{number(m.interval[0], '+')}, {number(m.interval[1], '+')}]"
    allowed = "–" if m.allowed is None else f"{m.allowed:g}"
    verdict = f"{MARK[m.verdict]} {m.verdict}" + (", REGRESSION" if m.regression else "")
    return (m.metric, number(m.base), number(m.candidate), number(m.difference, "+"), ends, allowed, verdict)


HEADER = ("metric", "base", "candidate", "difference", "95 % interval", "may drop", "verdict")


def summary(c: Comparison) -> str:
    """What was compared, in a line."""
    classes = f", {c.n_classes} classes" if c.n_classes else ""
    how = "paired by query, classes as the unit" if c.paired else "unpaired"
    return f"{c.protocol} on {c.dataset}: {c.n_queries} queries{classes}, {how}"


def as_text(c: Comparison) -> str:
    """A table for a terminal."""
    rows = [HEADER, *(_cells(m) for m in c.metrics)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADER))]
    lines = [f"base       {c.base.label}", f"candidate  {c.candidate.label}", summary(c), ""]
    for n, row in enumerate(rows):
        cells = [
            cell.rjust(w) if 0 < i < 6 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if n == 0:
            lines.append("  ".join("-" * w for w in widths))
    lines += ["", *(f"note: {n}" for n in c.notes), *(f"FAIL: {f.message}" for f in c.failures), c.headline + "."]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = html.escape(" ".join(printable(text).split()), quote=False)
    for character in "\\`*_{}[]()#|~@!":
        escaped = escaped.replace(character, "\\" + character)
    return escaped


def as_markdown(c: Comparison) -> str:
    """For a pull request comment or a job summary: the outcome, the reasons, the table."""
    sign = {0: "✅", 1: "❌", 5: "❔"}[c.exit_code]
    lines = [
        f"### {sign} {c.headline}",
        "",
        f"{escape_markdown(c.base.label)} → {escape_markdown(c.candidate.label)}  ",
        escape_markdown(summary(c)),
        "",
    ]
    lines += [f"- **{escape_markdown(f.subject)}**: {escape_markdown(f.message)}" for f in c.failures]
    lines += [""] if c.failures else []
    lines += ["| " + " | ".join(HEADER) + " |", "| --- | ---: | ---: | ---: | :---: | ---: | --- |"]
    for m in c.metrics:
        cells = [escape_markdown(cell) for cell in _cells(m)]
        lines.append("| " + " | ".join([cells[0], *cells[1:6], f"**{cells[6]}**" if m.regression else cells[6]]) + " |")
    lines += ["", *(f"_{escape_markdown(n)}_  " for n in c.notes)]
    return "\n".join(lines).rstrip() + "\n"


def as_junit(c: Comparison) -> bytes:
    """One test case for each gated metric and each other reason; a CI system shows which failed."""
    suite = ET.Element("testsuite", name=f"dmlbench compare {c.protocol} {c.dataset}")
    reasons = {f.subject: f for f in c.failures}
    names = [m.metric for m in c.metrics if m.allowed is not None]
    names += [f.subject for f in c.failures if f.subject not in names]
    by_name = {m.metric: m for m in c.metrics}
    failed = 0
    for name in names:
        case = ET.SubElement(suite, "testcase", classname=f"dmlbench.{c.candidate.model}", name=name)
        if name in reasons:
            failed += 1
            ET.SubElement(case, "failure", type=reasons[name].kind, message=reasons[name].message)
        if name in by_name:
            ET.SubElement(case, "system-out").text = "  ".join(_cells(by_name[name]))
    suite.set("tests", str(len(names)))
    suite.set("failures", str(failed))
    suite.set("errors", "0")
    root = ET.Element("testsuites", tests=str(len(names)), failures=str(failed))
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"

"""docs/protocols.md, written from the tables, so that it cannot say something else than the code does."""

from collections.abc import Iterator

from dmlbench.attacks import ATTACKS
from dmlbench.doubts.audit import CHECKS
from dmlbench.kinds.page import arrow, number, table, text, threat
from dmlbench.kinds.table import KINDS
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import COLOUR, Component, Protocol
from dmlbench.protocols import protocol_names, protocol_versions
from dmlbench.targets import TARGETS

HEAD = """# Protocols, attacks and scores

This page is written by `dmlbench protocols docs`; a test compares it with the tables. What an attack *is*:
an objective aimed at chosen targets, descended by an optimizer inside a threat, and read out by a metric.
Any attack can be descended by any optimizer under any protocol's threat: `--attacks QA+@square`.

Notation: x~ is the perturbed image, d the distance of the embedding space, X an entry of the gallery (the clean
embeddings), q a query, c a candidate. The adversary *minimises* the formula. A gradient is one forward and one
backward pass of the network for one image, a value one forward pass.

A score is `100 * (raw - worst) / (best - worst)`: 0 is a model that gives in, 100 one that withstands. "↑ robust"
means that a higher raw value is more robust.
"""


def cost_of(c: Component, protocol: Protocol) -> str:
    """What a component spends on one query, at the most."""
    t = protocol.threat_of(c)
    pattern = OPTIMIZERS[c.optimizer].cost
    return (
        pattern.replace("restarts", str(t.restarts)).replace("steps", str(t.steps)).replace("queries", str(t.queries))
    )


def protocol_section(p: Protocol) -> Iterator[str]:
    """One protocol: what it is made of and what it costs."""
    yield f"### {p.name}\n"
    yield f"{p.title}. Version {p.version}, kind `{p.kind}`, seed {p.seed}, sha256 `{p.sha256[:16]}`" + (
        f"; superseded by {p.superseded_by}.\n" if p.superseded_by else ".\n"
    )
    if p.threat:
        yield f"Threat: {threat(p.threat)}.\n"
    if p.grid:
        sides = "; ".join(
            f"{'colour' if side == COLOUR else f'up to {side} pixels a side'}: {', '.join(eps)}"
            for side, eps in p.grid.items()
        )
        larger = "larger ones as colour" if COLOUR in p.grid else "larger ones as the largest"
        yield f"eps grid of images: {sides} ({larger}).\n"
    if p.components:
        rows = [
            [
                c.name,
                f"{c.attack}@{c.optimizer}",
                f"`{c.readout}` ({READOUTS[c.readout].unit})",
                f"{number(c.worst)} → {number(c.best)}, {arrow(c.worst, c.best)}",
                threat(c.threat),
                cost_of(c, p),
            ]
            for c in p.components
        ]
        yield from table(["part", "attack", "read-out", "worst → best", "own threat", "cost a query"], rows)
    yield from KINDS[p.kind].page(p)
    if p.queries is not None:
        yield f"Measured are the first {p.queries} queries of a fixed shuffle, or all where there are fewer.\n"
    if p.audit:
        yield f"The audit (docs/audit.md) is run on {p.audit} of the queries.\n"


def render() -> str:
    """The whole page."""
    lines: list[str] = [HEAD, "## Protocols\n"]
    older: list[Protocol] = []
    for name in protocol_names():
        current, *superseded = protocol_versions(name)
        lines += protocol_section(current)
        older += superseded
    if older:
        lines.append("### Superseded versions\n\nKept for the results that were made with them; they still run.\n")
        rows = [[f"`{p.id}`", p.superseded_by or "", f"`{p.sha256[:16]}`"] for p in older]
        lines += table(["protocol", "superseded by", "sha256"], rows)
    lines.append("## Kinds of protocol\n")
    lines += table(["kind", "what it is"], [[f"`{name}`", kind.title] for name, kind in KINDS.items()])
    lines.append("## Attacks\n")
    rows = []
    for name, a in ATTACKS.items():
        reads = "; ".join(
            f"`{r}` {number(w)} → {number(b)}, {arrow(w, b)}" for r, (w, b) in zip(a.readouts, a.ends, strict=True)
        )
        aims = f"`{a.targets}`" + (f" × {a.k}" if a.k > 1 else "") if a.targets else "–"
        rows.append([name, a.title, f"`{a.objective}`", aims, reads, a.source, a.note])
    lines += table(["attack", "title", "objective", "targets", "read-out, worst → best", "source", "deviation"], rows)
    lines.append("## Objectives\n")
    lines += table(["objective", "formula, minimised"], [[f"`{n}`", text(f)] for n, f in OBJECTIVES.items()])
    lines.append("## Target rules\n")
    lines += table(["rule", "whom"], [[f"`{n}`", text(f)] for n, f in TARGETS.items()])
    lines.append("## Read-outs\n")
    lines += table(["read-out", "unit", "what"], [[f"`{n}`", r.unit, text(r.read)] for n, r in READOUTS.items()])
    lines.append("## Optimizers\n")
    rows = [[f"`{n}`", o.cost, text(o.run)] for n, o in OPTIMIZERS.items()]
    lines += table(["optimizer", "cost an image", "how"], rows)
    lines.append("## Checks of the audit\n")
    lines += table(["check", "question"], [[n, text(c.ask)[4:]] for n, c in CHECKS.items()])
    lines.append(
        "## Other numbers\n\n"
        "`retention`: for every part that reads R@1, the value as a percentage of the clean R@1 of the same model, "
        "↑ robust. ERS compares absolute values of models whose clean recall differs (criticised in arXiv 2312.07364).\n"
    )
    return "\n".join(lines)

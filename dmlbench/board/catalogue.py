"""docs/protocols.md, written from the tables, so that it cannot say something else than the code does."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from dmlbench.attacks import ATTACKS
from dmlbench.doubts.audit import CHECKS
from dmlbench.kinds.clustering import CLUSTER_ATTACKS
from dmlbench.kinds.threshold import halvings
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import COLOUR, Component, Protocol, protocol_names, protocol_versions
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


def text(function: Callable[..., Any]) -> str:
    """A docstring's first paragraphs as one line, without the sections on arguments and errors."""
    doc = re.split(r"\n\s*(?:Raises|Args|Returns|Attributes):", inspect.getdoc(function) or "")[0]
    plain = " ".join(doc.split()).replace("|", "\\|")
    return re.sub(r":(?:class|data|func):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", plain)


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def number(value: float | int) -> str:
    """Without a needless decimal point."""
    return f"{value:g}"


def arrow(worst: float | int, best: float | int) -> str:
    """Which raw value is more robust."""
    return "↑ robust" if best > worst else "↓ robust"


def threat(fields: dict[str, Any]) -> str:
    """A threat's fields as written in the protocol."""
    return ", ".join(f"{key} {value}" for key, value in fields.items())


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
    if p.kind == "ers":
        yield "Score: ERS, the mean of the parts' scores, 0 to 100, higher is more robust.\n"
    if p.steps:
        rows = []
        total = 0
        for s in p.steps:
            t = p.threat_at(next(iter(p.grid.values()))[0], s.threat)
            times = s.rounds if s.rounds > 1 else s.aims
            gradients, values = (times * n for n in OPTIMIZERS[s.optimizer].passes(t))
            total += gradients
            spent = f"{gradients} gradients" if gradients else f"{values} values"
            if times > 1:  # one aim for each other class, where there are fewer
                spent = f"at most {spent}"
            rows.append([s.name, f"{s.attack}@{s.optimizer}", str(s.aims), threat(s.threat), spent])
        yield from table(["step", "attack", "aims", "own threat", "cost of a survivor"], rows)
        for s in p.steps:
            if s.rounds > 1:
                turns = ", ".join(f"{t.attack or s.attack} from {t.start or 'its start'}" for t in s.turns)
                yield (
                    f"{s.name} is repeated on what is left, in turn {turns}, where an attack that aims takes the next of {s.aims} targets each "
                    f"time. It ends for each group of {p.together} queries after {s.rounds} rounds, or once both hold: it has run {s.fewest} times "
                    f"for each of the group's queries that were right when clean, whichever it ran for, and the last half of the rounds broke no "
                    f"more than {s.until:g} % of them.\n"
                )
        headline = "and the area under the curve" if p.threshold is None else "and the smallest eps that breaks a query"
        yield (
            f"Each step attacks what the ones before left; at most {total} gradients ({total / 32:.1f} runs of PGD-32) "
            f"a query and eps. Score: R@1 at each eps, percent, ↑ robust, {headline}.\n"
        )
    if p.threshold is not None:
        e = p.threshold
        yield (
            f"The smallest eps of each query is found by halving, on a log scale of {e.parts} steps from one eps of the grid to the next and "
            f"in each of the {e.octaves} halves below the smallest, with one search each ({e.attack}@{e.optimizer}, {threat(e.threat)}), "
            f"so at most {halvings(e)} of them. Score: the median over the queries that are right when clean, on the [0, 1] scale, ↑ robust.\n"
        )
    if p.queries is not None:
        yield f"Measured are the first {p.queries} queries of a fixed shuffle, or all where there are fewer.\n"
    if p.audit:
        yield f"The audit (docs/audit.md) is run on {p.audit} of the queries.\n"
    if p.kind == "clustering":
        rows = [
            [
                name,
                a.title,
                text(a.formula),
                "labels" if a.labelled else "clean clusters",
                "at every step" if a.moving else "clean",
            ]
            for name, a in ((name, CLUSTER_ATTACKS[name]) for name in p.attacks)
        ]
        yield from table(["attack", "title", "formula", "groups", "centroids"], rows)
        yield (
            f"PGD, {p.threat.get('steps')} gradients an image, attack and eps (and as many values where centroids "
            "move), step 2.5 eps / steps. Scores: NMI, AMI, pairwise F1 and R@1 within the attacked set, percent, "
            f"↑ robust; k-means seeds {', '.join(map(str, p.clustering_seeds))}. Reported: the lowest over the attacks "
            "that know the labels, and over the others apart. After Ke, arXiv 2501.01025, whose text was not at hand; "
            "the objectives are ours.\n"
        )
    if p.joint:
        j = p.joint
        yield (
            f"`joint`: temperature {j.temperature:g}, {j.steps} steps that shorten from eps to 0 along a cosine, at most {j.restarts} "
            f"restarts of them (the first from the clean images, the others random): at most {j.steps * j.restarts} gradients "
            f"and as many values an image and eps. NMI is read every {j.look} steps, the images of the lowest count, and "
            f"{j.patience} restarts in a row that lower it by less than {j.least:g} points are the last. `union`: at most "
            f"{j.rounds} rounds of choices and k-means, which end alike; no gradients.\n"
        )


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

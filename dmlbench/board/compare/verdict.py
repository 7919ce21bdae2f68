"""Is the candidate better, the same or worse, and may it pass?

===============  ===========================================================================
better, worse    the 95 % interval of the paired difference excludes zero
same             it holds zero, the difference is within what the gate allows, and nothing beyond
                 five times that is in the interval; or every query has the same outcome in both
inconclusive     it holds zero, but the difference or the interval is larger: too few queries (or
                 classes) to tell; or there is no interval, and the metric fell further than allowed
===============  ===========================================================================

A *regression*, which fails the gate, is a drop beyond what is allowed whose interval excludes zero. A point of a length
(a smallest eps, a radius) is a hundredth of the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmlbench.board.compare.gate import DEFAULT_DROPS, Gate, metric_name
from dmlbench.board.compare.paired import Paired, common, pair, unshared
from dmlbench.board.compare.records import Comparison, Difference, Failure, Side, Verdict
from dmlbench.board.row import CLEAN_COLUMNS, LENGTHS, PARTS, Row, from_evaluation, more, superseded
from dmlbench.errors import NotComparable
from dmlbench.intervals import DRAWS
from dmlbench.kinds.table import kind_of, numbers
from dmlbench.results import Conditions, Evaluation

if TYPE_CHECKING:
    from dmlbench.protocol import Component

REACH = 5.0
"""How many times the allowance an interval may reach and still read as "same"."""


def judge(paired: Paired, gate: Gate) -> Difference:
    """The verdict on one metric."""
    allowed = gate.allowed(paired.metric, paired.is_part)
    point = (paired.base or 0.0) / 100.0 if paired.metric in LENGTHS else 1.0
    margin = point * DEFAULT_DROPS["any" if paired.is_part else "ers"] if allowed is None else allowed
    difference = None if paired.base is None or paired.candidate is None else paired.candidate - paired.base
    verdict: Verdict
    if difference is None:
        verdict = "inconclusive"
    elif paired.interval is None:
        verdict = "inconclusive" if abs(difference) > margin else "same"
    elif paired.interval[0] > 0:
        verdict = "better"
    elif paired.interval[1] < 0:
        verdict = "worse"
    else:
        most = REACH * max(margin, 0.2 * point)
        near = abs(difference) <= margin and max(-paired.interval[0], paired.interval[1]) <= most
        verdict = "same" if near or paired.unchanged else "inconclusive"
    return Difference(
        metric=paired.metric,
        base=paired.base,
        candidate=paired.candidate,
        difference=difference,
        interval=paired.interval,
        allowed=allowed,
        verdict=verdict,
        regression=verdict == "worse" and allowed is not None and difference is not None and -difference > allowed,
    )


def components_of(evaluation: Evaluation, protocol_file: Path | None = None) -> dict[str, "Component"]:
    """By name, how raw outcomes become scores: as the run's protocol says; extra parts as their attack's ends say.

    Raises:
        NotComparable: the protocol is none of the packaged ones (nor ``protocol_file``), or has changed.
    """
    from dmlbench.protocol import Component
    from dmlbench.protocols import load_protocol, packaged_protocol, protocol_names

    stated = evaluation.protocol
    if protocol_file is None and stated.name not in protocol_names():
        raise NotComparable(f"protocol {stated.name!r} is not a packaged one: name its file with --protocol")
    protocol = packaged_protocol(stated.name, stated.sha256) if protocol_file is None else None
    protocol = protocol or load_protocol(str(protocol_file) if protocol_file else stated.name)
    if protocol.sha256 != stated.sha256:
        raise NotComparable(
            f"the runs were made by another content of protocol {stated.name!r} "
            f"(sha256 {stated.sha256[:12]}…) than the one here ({protocol.sha256[:12]}…)"
        )
    extra, ends = set(evaluation.extras.get("extra_parts", ())), evaluation.extras.get("own_ends", {})
    components = {}
    for m in evaluation.measurements:  # R@1 of the other kinds of protocol is taken as it is
        worst, best = ends.get(m.component) or (_ends(m.attack, m.readout) if m.component in extra else (0, 100))
        components[m.component] = Component(
            name=m.component, attack=m.attack, readout=m.readout, worst=worst, best=best
        )
    return components | {c.name: c for c in protocol.components}


def _ends(attack: str, readout: str) -> tuple[int | float, int | float]:
    """The raw values that score 0 and 100 where an attack is an extra part.

    Raises:
        NotComparable: the attack is not at hand, or is not read so.
    """
    from dmlbench.attacks import ATTACKS

    if attack not in ATTACKS or readout not in ATTACKS[attack].readouts:
        raise NotComparable(f"attack {attack!r} read by {readout!r} is not known here: its raw values have no score")
    return ATTACKS[attack].ends[ATTACKS[attack].readouts.index(readout)]


def _differing(pairs: Mapping[str, tuple[object, object]], stale: Sequence[str]) -> None:
    """Raise with the keys whose two values differ, and with what is stale."""
    differences = [f"{key} ({_short(a)} and {_short(b)})" for key, (a, b) in pairs.items() if a != b or a is None]
    if differences:
        raise NotComparable(
            "; ".join([f"the two cannot be set side by side, these differ: {', '.join(differences)}", *stale])
        )


def _stale(sides: Sequence[tuple[str, str | None, str]]) -> list[str]:
    """A note for each reason why base, candidate or both (protocol, its sha256, model) are stale."""
    reasons: dict[str, list[str]] = {}
    for name, side in zip(("base", "candidate"), sides, strict=True):
        if why := superseded(*side):
            reasons.setdefault(why, []).append(name)
    return [f"{'both are' if len(names) == 2 else f'the {names[0]} is'} stale: {why}" for why, names in reasons.items()]


def _conditions(base: Conditions, candidate: Conditions) -> dict[str, tuple[object, object]]:
    """By key, how each side's adversarial images were made."""
    usual = {"surrogate": "no surrogate"}
    sides = [
        {key: usual.get(key, "the protocol's") if value is None else value for key, value in side.model_dump().items()}
        for side in (base, candidate)
    ]
    return {key: (sides[0][key], sides[1][key]) for key in sides[0]}


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 else text


def compare(
    base: Evaluation,
    candidate: Evaluation,
    gate: Gate | None = None,
    *,
    components: Mapping[str, "Component"] | None = None,
    labels: tuple[str, str] = ("base", "candidate"),
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparison:
    """Compare two runs query by query.

    Args:
        gate: what is allowed; by default the documented defaults.
        components: by name, what turns raw outcomes into scores; by default from the run's packaged protocol.
        labels: what the report calls the two.

    Raises:
        NotComparable: protocol, data set, queries, surrogate or averaged passes differ (exit code 3).
    """
    gate = gate or Gate()
    stale = _stale([(e.protocol.name, e.protocol.sha256, e.model.id) for e in (base, candidate)])
    _differing(
        {
            "protocol": (base.protocol.name, candidate.protocol.name),
            "protocol_version": (base.protocol.version, candidate.protocol.version),
            "protocol_sha256": (base.protocol.sha256, candidate.protocol.sha256),
            "dataset": (base.dataset.name, candidate.dataset.name),
            "split": (base.dataset.split, candidate.dataset.split),
            "dataset_sha256": (base.dataset.sha256, candidate.dataset.sha256),
            **_conditions(base.conditions, candidate.conditions),
        },
        stale,
    )
    paired = pair(base, candidate, components or components_of(base), seed, draws)
    metrics = [judge(p, gate) for p in paired]
    _known(gate, [m.component for e in (base, candidate) for m in e.measurements])
    flags = [f for f in candidate.warnings if f.flag not in {w.flag for w in base.warnings}]
    notes = (*stale, *_notes(base, candidate, [p.metric for p in paired if p.left_out]))
    queries = len(base.arrays["query"]), len(candidate.arrays["query"])
    both_stopped = all("until" in e.extras for e in (base, candidate))  # each where it was sure enough
    counted = (min(queries), min(queries)) if both_stopped else queries
    return Comparison(
        base=_side(base, labels[0]),
        candidate=_side(candidate, labels[1]),
        protocol=base.protocol.name,
        dataset=f"{base.dataset.name}/{base.dataset.split}",
        paired=True,
        n_queries=min(queries),
        n_classes=len(np.unique(base.arrays["label"][common(base, candidate)[0]])),
        metrics=tuple(metrics),
        failures=_failures(metrics, [(f.flag, f.message) for f in flags], counted, gate),
        notes=notes,
        fail_on_inconclusive=gate.fail_on_inconclusive,
    )


def _notes(base: Evaluation, candidate: Evaluation, left_out: Sequence[str]) -> tuple[str, ...]:
    notes = [*_made([(e.protocol.seed, ", ".join(e.partial)) for e in (base, candidate)])]
    notes += _beyond([kind_of(e).read(e) for e in (base, candidate)])
    if left_out:
        notes.append(f"not compared, since they are of the queries as a set, which differs: {', '.join(left_out)}")
    if some := unshared(base, candidate):
        notes.append(f"over the queries that have an outcome in both runs, not all of either's: {', '.join(some)}")
    if len(np.unique(base.arrays["label"][common(base, candidate)[0]])) < 2:
        notes.append("with one test class there are no intervals")
    return tuple(notes)


def _made(sides: Sequence[tuple[int | None, str]]) -> Iterator[str]:
    """Notes on how base and candidate were made: by the seed, and the reasons why each is partial."""
    (first, _), (second, _) = sides
    if first != second:
        yield f"the runs drew their targets with other seeds ({first} and {second})"
    for name, (_, partial) in zip(("base", "candidate"), sides, strict=True):
        if partial:
            yield f"the {name} is a partial run: {partial}"


def _beyond(sides: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """A note for each length of base and candidate that is beyond the grid, by their columns."""
    for name, columns in zip(("base", "candidate"), sides, strict=True):
        for number in numbers():
            if more(columns, number):
                yield f"{number} of the {name} is beyond the largest eps of the grid, and counts as that"


def _side(e: Evaluation, label: str) -> Side:
    return Side(label=label, model=e.model.id, weights_sha256=e.model.weights_sha256, date=e.date, seed=e.protocol.seed)


def _known(gate: Gate, parts: Sequence[str]) -> None:
    for name in gate.max_drop:
        metric_name(name, parts)


def compare_rows(
    base: Row, candidate: Row, gate: Gate | None = None, *, labels: tuple[str, str] = ("base", "candidate")
) -> Comparison:
    """Compare two rows of a board, where the queries' own outcomes are not at hand.

    Only metrics with an interval of their own can show a difference as sure; the interval of the
    difference is that of two independent results, which is wider than a paired one.

    Raises:
        NotComparable: protocol, data set, gallery, surrogate or averaged passes differ, or a row is a claim.
    """
    gate = gate or Gate()
    keys = ("protocol", "protocol_version", "protocol_sha256", "dataset", "split", "dataset_sha256", "n_gallery")
    stale = _stale([(row.protocol, row.protocol_sha256, row.model) for row in (base, candidate)])
    conditions = [Conditions.of((row.partial or "").split(";")) for row in (base, candidate)]
    _differing({k: (getattr(base, k), getattr(candidate, k)) for k in keys} | _conditions(*conditions), stale)
    queries = base.n_queries or 0, candidate.n_queries or 0
    names = {"ers": "ers"} | {k: f"{v}_score" for k, v in PARTS.items()}
    names |= {n: n for n in (*CLEAN_COLUMNS, *numbers())}
    metrics = []
    for metric, column in names.items():
        first, second = getattr(base, column), getattr(candidate, column)
        if first is not None:
            interval = _independent(base, candidate, metric) if second is not None else None
            metrics.append(judge(Paired(metric, metric in PARTS, first, second, interval), gate))
    _known(gate, [])
    sides = [
        Side(label=label, model=row.model, weights_sha256=row.weights_sha256, date=row.date, seed=row.seed)
        for label, row in zip(labels, (base, candidate), strict=True)
    ]
    made = _made([(row.seed, (row.partial or "").replace("; ", ", ")) for row in (base, candidate)])
    new = sorted(set((candidate.flags or "").split()) - set((base.flags or "").split()))
    return Comparison(
        base=sides[0],
        candidate=sides[1],
        protocol=base.protocol,
        dataset=f"{base.dataset}/{base.split or 'test'}",
        paired=False,
        n_queries=min(queries),
        metrics=tuple(metrics),
        failures=_failures(metrics, [(f, "a doubt that the base does not have") for f in new], queries, gate),
        notes=(
            *stale,
            *made,
            *_beyond([vars(base), vars(candidate)]),
            "from CSV rows: unpaired, with an interval for ERS alone; compare run folders to see more",
        ),
        fail_on_inconclusive=gate.fail_on_inconclusive,
    )


def as_row(side: Evaluation | Row) -> Row:
    """A row, whichever was given."""
    return side if isinstance(side, Row) else from_evaluation(side)


def _independent(base: Row, candidate: Row, metric: str) -> tuple[float, float] | None:
    """Interval of the difference of two independent results: each side's half-widths add in squares."""
    sides: list[Any] = [[getattr(r, f"{metric}{end}", None) for end in ("_lo", "", "_hi")] for r in (base, candidate)]
    if any(value is None for side in sides for value in side):
        return None
    (low1, x1, high1), (low2, x2, high2) = sides
    return float(x2 - x1 - np.hypot(x2 - low2, high1 - x1)), float(x2 - x1 + np.hypot(high2 - x2, x1 - low1))


def _failures(
    metrics: Sequence[Difference], flags: Sequence[tuple[str, str]], queries: tuple[int, int], gate: Gate
) -> tuple[Failure, ...]:
    """Every reason why the gate does not open, worst kinds first."""
    out = []
    for m in metrics:
        if m.base is not None and m.candidate is None:
            out.append(Failure(kind="missing", subject=m.metric, message=f"{m.metric} has no value in the candidate"))
        elif m.regression and m.difference is not None and m.interval is not None:
            unit, form = ("", ".3g") if m.metric in LENGTHS else (" points", ".2f")
            fell, least, most = (format(-end, form) for end in (m.difference, m.interval[1], m.interval[0]))
            text = f"{m.metric} fell by {fell}{unit} (95 % interval {least} to {most}), {m.allowed:g} are allowed"
            out.append(Failure(kind="regression", subject=m.metric, message=text))
    if queries[1] < queries[0]:
        out.append(
            Failure(
                kind="fewer-queries",
                subject="queries",
                message=f"the candidate measured {queries[1]} queries, the base {queries[0]}",
            )
        )
    out += [Failure(kind="new-flag", subject=flag, message=f"new flag {flag}: {message}") for flag, message in flags]
    if gate.fail_on_inconclusive:
        out += [
            Failure(
                kind="inconclusive",
                subject=m.metric,
                message=f"{m.metric}: {'too few queries to tell' if m.base is not None else 'nothing to compare'}",
            )
            for m in metrics
            if m.verdict == "inconclusive" and m.allowed is not None and (m.base is None or m.candidate is not None)
        ]
    return tuple(out)

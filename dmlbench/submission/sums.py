"""Does every number that a run states come out of its queries' own outcomes again?"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dmlbench.errors import Problem
from dmlbench.intervals import VERSION, Ends
from dmlbench.kinds.base import CLOSE, QUERIES, RUN, Stated, count_problems, differences
from dmlbench.kinds.table import KINDS
from dmlbench.metrics import CLEAN_METRICS, OF_THE_GALLERY, READOUTS, RECALL_AT, mean
from dmlbench.protocol import Component, Protocol, ers_of, score_intervals
from dmlbench.results import Evaluation, finite
from dmlbench.submission import extras
from dmlbench.threat import TOLERANCE


def sum_problems(stated: Stated) -> Iterator[Problem]:
    """Does every stated number come out again, and is every one possible?"""
    e, rules, parts, kind = stated.evaluation, stated.rules, stated.parts, KINDS[stated.rules.kind]
    outcomes = list(_benign_problems(e)) or list(_outcome_problems(e, rules, parts))
    outcomes += kind.outcome_problems(stated) if not outcomes else []
    yield from outcomes
    if outcomes and kind.run:  # sums of what is wrong would be wrong in many more lines
        return
    for m, c in zip(e.measurements, parts, strict=True):
        where = f"{RUN} measurements.{c.name}"
        named = (m.attack, m.optimizer, m.readout, m.better)
        if named != (c.attack, c.optimizer, c.readout, c.better):
            yield Problem(0, where, f"{named} is not the protocol's {(c.attack, c.optimizer, c.readout, c.better)}")
        raw = e.arrays[f"{c.name}/value"].astype(np.float64)
        count, value = int((~np.isnan(raw)).sum()), finite(mean(raw))
        if m.n != count:
            yield Problem(0, f"{where}.n", f"says {m.n}, the arrays hold {count} outcomes")
        yield from differences(f"measurements.{c.name}.value", m.value, value)
        yield from differences(f"measurements.{c.name}.score", m.score, None if value is None else c.rescale(value))
        if (
            m.value is not None
            and c.readout == "recall_at_1"
            and m.score is not None
            and kind.moved
            and not kind.within
        ):
            clean, high = e.benign.get("recall_at_1", 100.0), m.interval[1] if m.interval else m.score
            if m.score - (high - m.score) > clean + CLOSE:
                yield Problem(0, f"{where}.value", f"R@1 of {m.value:.2f} under attack is above the clean {clean:.2f}")
    if parts:
        intervals = score_intervals(parts, e.arrays)
        ers = ers_of([m.score for m in e.measurements]) if kind.mean else None
        yield from differences("ers", e.ers, ers)
        stated_ends = [(f"measurements.{m.component}.interval", m.score, m.interval) for m in e.measurements]
        stated_ends.append(("ers_interval", e.ers, e.ers_interval))
        computed = [*intervals.columns, None if ers is None else intervals.mean]
        for (field, score, ends), again in zip(stated_ends, computed, strict=True):
            yield from _end_problems(f"{RUN} {field}", score, ends, again, e.interval_version == VERSION)
    yield from extras.number_problems(stated)


def _outcome_problems(e: Evaluation, rules: Protocol, parts: Sequence[Component]) -> Iterator[Problem]:
    kind, clean = KINDS[rules.kind], e.arrays.get("benign/recall_at_1")
    for c in parts:
        values, readout = e.arrays[f"{c.name}/value"], READOUTS[c.readout]
        field = f"{c.name}/value"
        where, missing = f"{QUERIES} {field}", np.isnan(values)
        if readout.missing is not None and clean is not None and not kind.within:
            text = "outcomes are missing, or there where none is"
            yield from count_problems(missing != readout.missing(clean), field, text)
        low, high = readout.limits
        bad = ~missing & (~np.isfinite(values) | (values < low - 1e-4) | (values > high + 1e-4))
        if bad.any():
            yield Problem(0, where, f"{int(bad.sum())} outcomes are outside {low:g} to {high:g}")
        if c.readout in ("recall_at_1", "kept_in_top_4") and not np.isin(values[~missing], (0.0, 100.0)).all():
            yield Problem(0, where, "holds outcomes other than 0 and 100")
        if not kind.moved:
            continue
        threat = rules.threat_of(c)
        norm = e.arrays[f"{c.name}/norm"]
        limit = threat.radius + TOLERANCE * max(1.0, threat.radius)
        outside = ~(np.isfinite(norm) & (norm >= 0) & (norm <= limit))
        if outside.any():
            reason = f"{int(outside.sum())} perturbations are outside the {threat.norm} ball of {threat.eps}"
            yield Problem(0, f"{QUERIES} {c.name}/norm", reason)


def _benign_problems(e: Evaluation) -> Iterator[Problem]:
    for name, value in e.benign.items():
        if not CLEAN_METRICS[name].lowest <= value <= 100.0 + CLOSE:
            yield Problem(0, f"{RUN} benign.{name}", f"{value} is not a percentage")
        per_query = e.arrays.get(f"benign/{name}")
        if per_query is not None:
            if per_query.shape != e.arrays["query"].shape or per_query.dtype.kind != "f":
                yield Problem(0, f"{QUERIES} benign/{name}", "is not one number for each query")
                continue
            yield from differences(f"benign.{name}", value, finite(mean(per_query)))
        elif name not in OF_THE_GALLERY:
            yield Problem(0, f"{QUERIES} benign/{name}", "is missing, though the run states its mean")
    for a, b in pairwise(f"recall_at_{k}" for k in RECALL_AT):
        if e.benign.get(a, 0.0) > e.benign.get(b, 100.0) + CLOSE:
            yield Problem(0, f"{RUN} benign.{a}", f"{e.benign[a]:.2f} is above {b} ({e.benign[b]:.2f})")


def _end_problems(where: str, score: float | None, stated: Ends, recomputed: Ends, current: bool) -> Iterator[Problem]:
    """Does the interval come out again? One of an earlier method, which nothing is read from, has to hold its score."""
    if stated is None or recomputed is None:
        same = stated is recomputed
    elif current:
        same = max(abs(a - b) for a, b in zip(stated, recomputed, strict=True)) <= CLOSE
    else:
        same = score is not None and stated[0] - CLOSE <= score <= stated[1] + CLOSE
    if not same:
        yield Problem(0, where, f"says {stated}, the queries' own outcomes give {recomputed}")

"""Level 0 of ``extras``: its form, and that what a kind of protocol says in it comes out of the queries' arrays again.

What that is for each kind stands in its record (:mod:`dmlbench.kinds`); here is what all share. The flags of the audit are
those of its findings.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ValidationError, create_model

from dmlbench.checkpoints import problems_of
from dmlbench.doubts.audit import CHECKS, FIRST
from dmlbench.doubts.evidence import Finding, last_resorts, left_by, white_steps
from dmlbench.doubts.questions import FEW, HIDDEN
from dmlbench.errors import Problem
from dmlbench.evaluate import retention
from dmlbench.kinds.base import QUERIES, RUN, SAMPLE, Form, Stated, differences
from dmlbench.kinds.table import KINDS
from dmlbench.protocol import Component, Protocol
from dmlbench.results import Evaluation
from dmlbench.submission.bundle import Refused


class FindingForm(Form):
    """One finding of the audit."""

    check: str
    verdict: Literal["pass", "warn", "fail", "skip"]
    value: float | None
    limit: float
    message: str


class FingerprintForm(Form):
    """What tells a model apart that no registry names."""

    arch: str | None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    parameters: str
    probe: tuple[float, ...] | None


class CommonForm(Form):
    """What a full run of any kind may hold in ``extras``."""

    retention: dict[str, float] | None = None
    audit: tuple[FindingForm, ...] | None = None
    fingerprint: FingerprintForm | None = None


if TYPE_CHECKING:
    Extras: type[BaseModel]
else:
    Extras = create_model("Extras", __base__=CommonForm, __doc__="``extras`` of a full run: what every kind keeps under its name.", **{
        kind.name: (kind.form | None, None) for kind in KINDS.values() if kind.form
    })  # fmt: skip


def form_problems(e: Evaluation) -> Iterator[Problem]:
    """Is ``extras`` what a run writes? What reads a row off it may then rely on its form."""
    try:
        Extras.model_validate(e.extras)
    except ValidationError as error:
        yield from (Problem(0, f"{RUN} extras.{place}", text) for place, text in problems_of(error))


def parts_of(rules: Protocol, e: Evaluation) -> list[Component]:
    """The columns that a full run has; under a grid they depend on the shape of the images that the sample holds."""
    kind = KINDS[rules.kind]
    if kind.run is None:
        return kind.components(rules, ())
    shapes = {
        images.shape[1:] for name, images in e.sample.items() if not name.startswith("closeup/") and images.ndim == 4
    }
    if len(shapes) != 1:
        raise Refused([Problem(0, SAMPLE, "holds no images of one size")])
    return kind.components(rules, shapes.pop())


def shape_problems(stated: Stated) -> Iterator[Problem]:
    """Are the keys of ``extras`` those of the kind, and the arrays there, one row for each query?"""
    e, rules, kind = stated.evaluation, stated.rules, KINDS[stated.rules.kind]
    known = {"fingerprint"} | ({kind.name} if kind.form else set())
    known |= (set() if kind.within else {"retention"}) | ({"audit"} if rules.audit else set())
    for key in sorted(e.extras):
        if key not in known:
            yield Problem(0, f"{RUN} extras.{key}", f"is not what a run of kind {kind.name!r} has")
    for name, (number_kind, columns) in kind.arrays(rules, stated.parts).items():
        values = e.arrays.get(name)
        shape = (e.dataset.n_queries,) if columns == 1 else (e.dataset.n_queries, columns)
        if values is None or values.shape != shape or values.dtype.kind != number_kind:
            what = "integer" if number_kind == "i" else "number"
            yield Problem(0, f"{QUERIES} {name}", f"is not one {what} for each of {' x '.join(map(str, shape))}")
    if kind.form and kind.name not in e.extras:
        yield Problem(0, f"{RUN} extras.{kind.name}", "is missing")


def number_problems(stated: Stated) -> Iterator[Problem]:
    """Does every number in ``extras`` come out of the arrays again? Only for arrays without problems."""
    e = stated.evaluation
    yield from KINDS[stated.rules.kind].number_problems(stated)
    yield from _audit_problems(stated)
    if "retention" in e.extras:
        yield from differences("extras.retention", e.extras["retention"], retention(e.measurements, e.benign))


def _audit_problems(stated: Stated) -> Iterator[Problem]:
    """One finding for each check, a flag for each that is no pass, and F4 no better than the arrays say."""
    e, rules = stated.evaluation, stated.rules
    given = e.extras.get("audit", [])
    expected = list(CHECKS) if rules.audit else []
    names = [f["check"] for f in given]
    if names != expected and not (rules.audit and rules.version == "1" and tuple(names) == FIRST):
        text = f"holds the checks {', '.join(names) or 'none'}; the protocol has {', '.join(expected) or 'none'}"
        yield Problem(0, f"{RUN} extras.audit", text)
        return
    findings = [Finding(**f) for f in given]
    due = {f.flag().flag: f.flag().message for f in findings if f.verdict in ("warn", "fail")}
    there = {f.flag: f.message for f in e.warnings if f.flag.startswith("audit-")}
    for flag in sorted({*due, *there}):
        if due.get(flag) != there.get(flag):
            text = "is in one of warnings and extras.audit alone, or in other words"
            yield Problem(0, f"{RUN} warnings.{flag}", text)
    for f in findings:
        if f.check == "F4" and f.verdict not in ("warn", "fail"):
            for c in stated.parts:
                by = e.arrays[f"{c.name}/broken_by"]
                left = int(left_by(by, white_steps(rules)).sum())
                for _, hit in last_resorts(rules, by):
                    broken = int(hit.sum())
                    if broken >= FEW and 100.0 * broken / left > HIDDEN:
                        text = f"says {f.verdict}, though at eps {c.threat['eps']} {broken} of {left} queries are broken without a gradient alone"
                        yield Problem(0, f"{RUN} extras.audit.F4", text)

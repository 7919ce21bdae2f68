"""What a comparison says, as records."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from dmlbench.files import printable

PASSED, FAILED, INCONCLUSIVE = 0, 1, 5
"""Exit codes of a comparison that could be made."""
Verdict = Literal["better", "same", "worse", "inconclusive"]
Line = Annotated[str, AfterValidator(printable)]
"""Text of a run or a row, which may be anybody's."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Side(_Record):
    """One of the two, as the report names it."""

    label: Line
    model: Line
    weights_sha256: str | None = None
    date: str | None = None
    seed: int | None = None


class Difference(_Record):
    """One metric of both; ``difference`` is candidate minus base, above zero is more robust."""

    metric: Line
    base: float | None
    candidate: float | None
    difference: float | None
    interval: tuple[float, float] | None
    allowed: float | None
    """points it may fall; None where it is shown only"""
    verdict: Verdict
    regression: bool


class Failure(_Record):
    """One reason why the gate does not open."""

    kind: Literal["regression", "new-flag", "missing", "fewer-queries", "inconclusive"]
    subject: Line
    message: Line


class Comparison(_Record):
    """All that ``compare`` says."""

    schema_version: Literal[1] = 1
    base: Side
    candidate: Side
    protocol: Line
    dataset: Line
    paired: bool
    """False where only CSV rows were at hand: then intervals are those of two independent results"""
    n_queries: int
    n_classes: int | None = None
    metrics: tuple[Difference, ...]
    failures: tuple[Failure, ...]
    notes: tuple[Line, ...] = ()
    fail_on_inconclusive: bool = False

    def __str__(self) -> str:
        """The table that ``dmlbench compare`` prints."""
        from dmlbench.board.compare.render import as_text

        return as_text(self)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 the gate failed, 5 nothing worse than inconclusive under --fail-on-inconclusive."""
        if any(f.kind != "inconclusive" for f in self.failures):
            return FAILED
        return INCONCLUSIVE if self.failures else PASSED

    @property
    def headline(self) -> str:
        """The outcome in a sentence."""
        blind = bool(self.metrics) and all(m.verdict == "inconclusive" for m in self.metrics)
        return {
            PASSED: "Gate passed, but with too few queries to tell any difference" if blind else "Gate passed",
            FAILED: f"Gate failed: {len(self.failures)} reason{'s' * (len(self.failures) != 1)}",
            INCONCLUSIVE: "Inconclusive: too few queries to tell",
        }[self.exit_code]

"""compare: is this checkpoint worse than that one, surely, and by more than is allowed?

``paired.py`` makes paired differences with intervals, ``gate.py`` says what is allowed, ``verdict.py``
judges, ``render.py`` writes. Sources: :mod:`dmlbench.intervals`.
"""

from dmlbench.board.compare.gate import Gate
from dmlbench.board.compare.records import Comparison, Difference, Failure
from dmlbench.board.compare.render import as_junit, as_markdown, as_text
from dmlbench.board.compare.verdict import compare, compare_rows

__all__ = [
    "Comparison",
    "Difference",
    "Failure",
    "Gate",
    "as_junit",
    "as_markdown",
    "as_text",
    "compare",
    "compare_rows",
]

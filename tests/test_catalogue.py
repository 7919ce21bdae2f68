"""docs/protocols.md is what the tables say, and names everything in them."""

from pathlib import Path

import pytest

from dmlbench.attacks import ATTACKS
from dmlbench.board.catalogue import render, text
from dmlbench.doubts.audit import CHECKS
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocols import protocol_names
from dmlbench.targets import TARGETS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "protocols.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: dmlbench protocols docs --out docs/protocols.md"


def test_everything_in_the_tables_is_on_the_page() -> None:
    page = render()
    for name in (*ATTACKS, *CHECKS):
        assert f"| {name} |" in page, name
    for name in (*OBJECTIVES, *TARGETS, *READOUTS, *OPTIMIZERS):
        assert f"| `{name}` |" in page, name
    for name in protocol_names():
        assert f"### {name}\n" in page
    widths = [line.count(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert min(widths) >= 1 and ":class:" not in page and ":data:" not in page


@pytest.mark.parametrize("row", [
    "| CA+ | raise a candidate in a query's list | `raise_candidate` | `anywhere` | `candidate_rank` 0 → 50, ↑ robust |",
    "| SQ | WM@square | 1 | queries 1000 | 1000 values |",
    "| W1 | WM@apgd | 1 | steps 100, start clean | 100 gradients |",
])  # fmt: skip
def test_the_page_says(row: str) -> None:
    assert row in render()


def test_docstrings_become_one_line() -> None:
    def documented() -> None:
        """First | line,
        second with :class:`~dmlbench.optimizers.Hunt`.

        More.

        Raises:
            ValueError: never.
        """

    assert text(documented) == "First \\| line, second with `Hunt`. More."


def test_command_line(typed, tmp_path: Path) -> None:
    typed("protocols", "docs", "--out", "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render()
    typed("protocols", "docs", "--out", "page.md", "--check")
    (tmp_path / "page.md").write_text("stale")
    assert "is not what the tables say" in typed("protocols", "docs", "--out", "page.md", "--check", code=3).err
    assert "cannot be read" in typed("protocols", "docs", "--out", "none.md", "--check", code=4).err
    assert "needs --out" in typed("protocols", "docs", "--check", code=2).err
    assert typed("protocols", "docs").out == render()

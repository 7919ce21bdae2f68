"""``dmlbench report``: run folders to one HTML page that needs nothing else.

``page.py`` makes the page from records, ``fallen.py`` finds who falls, ``pictures.py`` turns arrays into images.
"""

from collections.abc import Sequence
from pathlib import Path

from dmlbench.board.report.page import Run, page
from dmlbench.errors import UsageError
from dmlbench.files import prepare_folder, write_atomic
from dmlbench.results import Evaluation

__all__ = ["Run", "page", "report", "write_page"]


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page of some runs, the first in full.

    Raises:
        DataError: the file cannot be written.
    """
    write_atomic(path, page(runs).encode("utf-8", "backslashreplace"))


def report(runs: Evaluation | Sequence[Evaluation], out: str | Path) -> Path:
    """Write the page of one or several results, the first in full, to the file ``out``.

    Raises:
        UsageError: no run.
        DataError: the file cannot be written.
    """
    runs = [runs] if isinstance(runs, Evaluation) else runs
    if not runs:
        raise UsageError("name at least one run")
    path = Path(out)
    prepare_folder(path.parent)
    write_page([Run(e.model.id, e) for e in runs], path)
    return path

"""``dmlbench report``: run folders to one HTML page that needs nothing else.

``page.py`` makes the page from records, ``pictures.py`` turns arrays into images, ``charts.py`` into drawings.
"""

from dmlbench.board.report.page import Run, page

__all__ = ["Run", "page"]

"""The board: rows (``row.py``), CSV files of them (``table.py``), and what is made from submissions.

Pure functions of evaluations and files; nothing here runs a model, but for t-SNE (``plots.py``), which embeds a sample again.
"""

from dmlbench.board.row import COLUMNS, PARTS, STATUSES, Row, from_evaluation
from dmlbench.board.table import add_row, foresee, from_csv, rank, to_csv

__all__ = ["COLUMNS", "PARTS", "STATUSES", "Row", "add_row", "foresee", "from_csv", "from_evaluation", "rank", "to_csv"]

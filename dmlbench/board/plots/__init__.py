"""Figures: ``figures.py`` makes plain numbers of runs, ``draw.py`` draws them for a paper, ``page.py`` for a page."""

from dmlbench.board.plots.draw import SUFFIXES, Figure, Series, draw
from dmlbench.board.plots.figures import (
    KINDS,
    Runs,
    classes,
    eps,
    matrix,
    parts,
    projected,
    reached,
    roc,
    scatter,
    tsne,
)
from dmlbench.board.plots.page import inline

__all__ = [
    "KINDS",
    "SUFFIXES",
    "Figure",
    "Runs",
    "Series",
    "classes",
    "draw",
    "eps",
    "inline",
    "matrix",
    "parts",
    "projected",
    "reached",
    "roc",
    "scatter",
    "tsne",
]

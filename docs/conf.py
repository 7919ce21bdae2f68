"""The documentation as a site: ``pip install '.[docs]' && sphinx-build -W --keep-going docs build/docs``.

The pages are the Markdown files of this folder. Added here: the table of contents, a page for every command, the
notebooks with their output (:mod:`notebook_pages`), a page that leads to other versions (:mod:`version_page`), and the
board's own site under ``board/``. ``DMLBENCH_DOCS`` is the address at which the pages will be published, if they will,
``DMLBENCH_RELEASES`` names the releases whose pages lie there too (.github/workflows/docs.yml sets both).
"""

import os
import sys
from pathlib import Path
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import version_page
from notebook_pages import page

from dmlbench.board.site import write_site
from dmlbench.cli import VERBS
from dmlbench.version import __version__

CONTENTS = {
    "Tutorials": [f"tutorials/{name}" for name in ("model", "gate", "submit", "attack", "defence")],
    "Notebooks": ["notebooks/scores_explained", "notebooks/score_your_model", "notebooks/write_an_attack"],
    "Measure": [
        "protocols",
        "models",
        "datasets",
        "corruptions",
        "strict",
        "faces",
        "verification",
        "certified",
        "deployment",
        "defended",
        "intervals",
        "audit",
        "running",
    ],
    "Report": ["report", "paper", "ci"],
    "Train": ["training", "defended", "findings", "findings-tables"],
    "Board": ["leaderboard", "submitting", "forgeries", "published"],
    "Extend": ["extend", "architecture", "benchmarks"],
    "Reference": ["reference", "commands/index", "versions"],
}
"""The sections of the table of contents and their pages."""

project, author, version, release = "dmlbench", "The dmlbench authors", __version__, __version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".py": "notebook"}
exclude_patterns = ["_templates", "conf.py", "notebook_pages.py", "version_page.py", "**/__pycache__"]

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

smartquotes = False  # "--out" stays as it is typed
html_theme = "furo"
html_title = f"dmlbench {version}"
html_baseurl = os.environ.get("DMLBENCH_DOCS", "")
html_copy_source = False
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "board-link.html",
        "sidebar/scroll-end.html",
    ]
}


class NotebookParser(MystParser):
    """Runs a notebook and reads its Markdown."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        """``inputstring``, the file's text, is read again by cell."""
        super().parse(page(Path(document["source"])), document)


def write(path: Path, text: str) -> None:
    """Leave a file that is right as it is, so that Sphinx does not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def command_pages() -> None:
    """A page for every verb, and one that lists them, in ``commands/``, which git ignores."""
    folder = HERE / "commands"
    listed = "".join(f"| [dmlbench {verb}]({verb}.rst) | {said} |\n" for verb, said in VERBS.items())
    contents = "```{toctree}\n:hidden:\n\n" + "\n".join(VERBS) + "\n```\n"
    write(folder / "index.md", f"# Commands\n\n| command | what it does |\n| --- | --- |\n{listed}\n{contents}")
    for verb in VERBS:
        directive = f".. click:: dmlbench.cli.{verb}:{verb}\n   :prog: dmlbench {verb}\n   :nested: full\n"
        write(folder / f"{verb}.rst", directive)


def versions() -> None:
    """``versions.md``, which git ignores."""
    releases = os.environ.get("DMLBENCH_RELEASES", "").split()
    write(HERE / "versions.md", version_page.page(version, html_baseurl, releases))


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The table of contents stands here, not in ``index.md``, which is read on a repository's page too."""
    if docname == "index":
        for section, pages in CONTENTS.items():
            body = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section}\n\n{body}\n```\n"


def plain_at(app: Sphinx, context: Any, lines: list[str]) -> None:
    """``ATTACK@OPTIMIZER`` in an option's help is no address of mail."""
    lines[:] = [line.replace("@", r"\@") if "`" not in line else line for line in lines]


def add_board(app: Sphinx, error: Exception | None) -> None:
    """The board's pages, as ``dmlbench leaderboard build --site`` writes them."""
    if error is None:
        write_site(HERE.parent / "leaderboard", Path(app.outdir) / "board")


def setup(app: Sphinx) -> None:
    """What Sphinx calls first."""
    command_pages()
    versions()
    app.add_source_parser(NotebookParser)
    app.connect("source-read", add_contents)
    app.connect("sphinx-click-process-options", plain_at)
    app.connect("build-finished", add_board)

"""Run the notebooks in ``docs/notebooks`` and show them as Markdown with their output.

A notebook is Python in "percent" form, which Jupyter (with jupytext) and editors open as cells: ``# %% [markdown]``
begins a cell of text in comments, ``# %%`` one of code. As in a notebook, the value of a cell's last line is shown.

usage: python docs/notebook_pages.py [FILE...]        (by default every notebook)
"""

import ast
import base64
import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = sorted((Path(__file__).parent / "notebooks").glob("*.py"))


def cells(source: Path) -> list[tuple[str, str]]:
    """("markdown" or "code", content) of each cell."""
    parts = re.split(r"(?m)^# %%(.*)\n", source.read_text(encoding="utf-8"))
    found = []
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        if "[markdown]" in head:
            found.append(("markdown", re.sub(r"(?m)^# ?", "", body).strip()))
        else:
            found.append(("code", body.strip()))
    return found


def title(source: Path) -> str:
    """What the first heading says."""
    return cells(source)[0][1].splitlines()[0].lstrip("# ")


def run(code: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell of code printed, and the value of its last line if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None  # type: ignore[attr-defined]
    return printed.getvalue(), value


def _picture(png: bytes) -> str:
    return f'<img alt="plot" width="700" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def shown(value: Any) -> str:
    """A value as Markdown: its HTML where it has some, a figure as a picture, else its repr."""
    if hasattr(value, "savefig"):  # of matplotlib
        stream = io.BytesIO()
        value.savefig(stream, format="png", dpi=110, metadata={"Software": None})
        return _picture(stream.getvalue())
    if hasattr(value, "_repr_png_"):
        return _picture(value._repr_png_())
    if hasattr(value, "_repr_html_"):
        text = re.sub(r"<style.*?</style>", "", value._repr_html_().replace("\n", " "))
        return re.sub(r"<table[^>]*>", '<table class="docutils">', text)
    return f"```text\n{value!r}\n```"


def page(source: Path) -> str:
    """Run a notebook from its first cell to its last, in an empty folder; the page that shows it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            for kind, content in cells(source):
                if kind == "markdown":
                    lines.append(content)
                    continue
                lines.append(f"```python\n{content}\n```")
                printed, value = run(content, names)
                if printed:
                    lines.append(f"```text\n{printed.rstrip()}\n```")
                if value is not None:
                    lines.append(shown(value))
        finally:
            os.chdir(before)
    lines.append(f"To run it yourself: {{download}}`{source.name}`, which Jupyter opens with jupytext.")
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:] or SOURCES:
        print(page(Path(name).resolve()))

"""The documentation: its notebooks run, its reference is whole, and what a README says elsewhere is found from there."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dmlbench

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def run(*command: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if Path(dmlbench.__file__).is_relative_to(ROOT):
        env["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_notebooks_run_from_first_cell_to_last(tmp_path: Path) -> None:
    done = run(str(DOCS / "notebook_pages.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("# Score your model", "ERS", "Gate failed", "data:image/png", "# Write an attack", "leave-class@apgd"):
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []  # what a notebook writes stays in a folder of its own


def test_a_cell_that_fails_fails_the_notebook(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("# %% [markdown]\n# # Bad\n\n# %%\nx = 1\nassert x == 2\n")
    done = run(str(DOCS / "notebook_pages.py"), "bad.py", cwd=tmp_path)
    assert done.returncode and "AssertionError" in done.stderr


def test_a_cell_shows_what_it_printed_and_its_last_value(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        "# %% [markdown]\n# # Good\n#\n# - text\n\n# %%\nprint('a')\nx = 2\nx + 1\n\n# %%\nx = 5\n"
    )
    shown = run(str(DOCS / "notebook_pages.py"), "good.py", cwd=tmp_path).stdout
    assert shown.startswith(
        "# Good\n\n- text\n\n```python\nprint('a')\nx = 2\nx + 1\n```\n\n```text\na\n```\n\n```text\n3\n```\n"
    )
    assert "```python\nx = 5\n```\n\nTo run it" in shown


def test_the_reference_has_every_public_name() -> None:
    named = set(re.findall(r"(?m)^\.\. (?:auto\w+|data):: (\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8")))
    assert set(dmlbench.__all__) - {"__version__"} <= named


def test_links_between_the_pages_are_found() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")]
    pages.remove(DOCS / "forgeries.md")  # its messages quote patterns, which look like links
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        if not link.startswith(("http://", "https://"))
    ]
    assert len(links) > 40
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "conf.py").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f'"{page.stem}"' not in contents and page.stem != "index"] == []


def test_a_version_leads_to_all_others_and_back() -> None:
    page = runpy.run_path(str(DOCS / "version_page.py"))["page"]
    site = "https://example.org/dmlbench/"
    newest = page("0.11.0", site, ["v0.2.0", "v0.10.0"])
    assert re.findall(r"\[(.*?)\]\((.*?)\)", newest) == [
        ("v0.10.0", f"{site}v0.10.0/index.html"),
        ("v0.2.0", f"{site}v0.2.0/index.html"),
    ]
    old = page("0.2.0", f"{site}v0.2.0/", [])
    assert re.findall(r"\((\S+)\)", old) == [f"{site}versions.html"]
    assert "](" not in page("0.2.0", "", [])


def test_a_package_index_shows_absolute_links() -> None:
    pytest.importorskip("setuptools")
    address = "https://example.org/who/dmlbench"
    done = run("setup.py", "-q", "--long-description", cwd=ROOT, DMLBENCH_REPOSITORY=address)
    assert done.returncode == 0, done.stderr
    assert f"]({address}/blob/HEAD/docs/strict.md)" in done.stdout
    assert re.findall(r"\]\((?!https://)[^)]*\)", done.stdout) == []
    plain = run("setup.py", "-q", "--long-description", cwd=ROOT, DMLBENCH_REPOSITORY="").stdout
    assert "](docs/strict.md)" in plain  # where a copy's address is not known, none is made up

"""What setup.cfg cannot say: data at the repository root that belong in the wheel, and addresses.

docs/leaderboard.md says what the wheel carries of the board, and which weights.

``DMLBENCH_REPOSITORY`` is the address of the repository that a release is made from, ``DMLBENCH_DOCS`` that of its
documentation (.github/workflows/release.yml sets both): a package index then has project links, and the README's links
lead there. Without them none is made up.
"""

import csv
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT_DATA = ("checkpoints.json", "leaderboard")
USUAL = ("ers-28", "ers-224", "ers-digits")
"""The protocols that ``compare`` takes where only a model's id is given."""


def left_out(here: Path) -> Callable[[str, list[str]], set[str]]:
    """What ``copytree`` is to pass over: adversarial images, and every run but those of the rows that have a rank under
    :data:`USUAL` protocols (docs/leaderboard.md)."""
    kept = set()
    for protocol in USUAL:
        for path in (here / "leaderboard" / protocol).glob("*.csv"):
            with path.open(encoding="utf-8", newline="") as stream:
                kept |= {row["submission"] for row in csv.DictReader(stream) if row["rank"]}

    def ignored(folder: str, names: list[str]) -> set[str]:
        at = Path(folder)
        runs = {name for name in names if (at / name / "run").is_dir()} if at.name == "submissions" else set()
        return (runs - kept) | ({"adversarial_sample.npz"} & set(names))

    return ignored


class BuildWithRootData(build_py):
    """``build_py`` that also puts :data:`ROOT_DATA` into ``dmlbench/_root``."""

    def run(self) -> None:
        super().run()
        here = Path(__file__).resolve().parent
        target = Path(self.build_lib) / "dmlbench" / "_root"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ROOT_DATA:
            source = here / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=left_out(here))
            elif source.exists():
                shutil.copy2(source, target / name)


def addresses() -> dict[str, Any]:
    """The project's links, and the README with absolute ones; nothing where the repository is not known."""
    repository, docs = (os.environ.get(f"DMLBENCH_{name}", "").rstrip("/") for name in ("REPOSITORY", "DOCS"))
    if not repository:
        return {}
    readme = (Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8")
    links = {
        "Source": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
        "Documentation": docs or f"{repository}/tree/HEAD/docs",
    }
    return {
        "url": repository,
        "project_urls": links,
        "long_description": re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/HEAD/", readme),
    }


setup(cmdclass={"build_py": BuildWithRootData}, **addresses())

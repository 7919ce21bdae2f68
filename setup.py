"""Copies what lies at the repository root and belongs in the wheel, so that there is one source of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT_DATA = ("checkpoints.json", "leaderboard")
USUAL = ("ers-28", "ers-224", "ers-digits")
"""The protocols that ``compare`` takes where only a model's id is given."""


def left_out(here: Path) -> Callable[[str, list[str]], set[str]]:
    """What ``copytree`` is to pass over: adversarial images, and every run but those of active models under
    :data:`USUAL` protocols (docs/leaderboard.md)."""
    models = json.loads((here / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    kept = {f"{name}-{protocol}" for name, m in models.items() if not m.get("superseded_by") for protocol in USUAL}

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


setup(cmdclass={"build_py": BuildWithRootData})

"""Copies what lies at the repository root and belongs in the wheel, so that there is one source of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT_DATA = ("checkpoints.json", "leaderboard")
LEFT_OUT = (
    "adversarial_sample.npz",
    "mnist-*",
    "omniglot-*-ers-28-published",
    "*-clustering",
    "*-strict",
    "digits-*-ers-digits-published",
)
"""Adversarial images, of use only to who validates a submission, from a checkout; and runs that nobody compares with by
default, as those of superseded models are too. Their rows are in the CSV files all the same. The wheel is to stay under
15 MB."""


def left_out(here: Path) -> Callable[[str, list[str]], set[str]]:
    """What ``copytree`` is to pass over: :data:`LEFT_OUT`, and the runs of superseded models."""
    models = json.loads((here / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    old = [name for name, entry in models.items() if entry.get("status") == "superseded"]
    protocols = [path.stem for path in (here / "dmlbench" / "protocols").glob("*.toml")]
    return shutil.ignore_patterns(*LEFT_OUT, *(f"{name}-{protocol}" for name in old for protocol in protocols))


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

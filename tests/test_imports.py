"""What is imported when: help at once without torch, the package without what only some commands need."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("pandas", "requests", "matplotlib", "sklearn", "scipy.stats", "dmlbench.training")


def loaded(code: str) -> set[str]:
    """The modules that are loaded in a fresh interpreter after ``code``, which may exit."""
    tail = "import sys, atexit; atexit.register(lambda: print('\\n@', *sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", tail + code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("@")[2].split())


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_does_not_import_torch(argument: str) -> None:
    modules = loaded(f"from dmlbench.cli import main; main([{argument!r}])")
    assert "dmlbench.cli" in modules and not modules & {"torch", "numpy", *HEAVY}


def test_completion_of_a_verb_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_DMLBENCH_COMPLETE", "bash_complete"), ("COMP_WORDS", "dmlbench ev"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    modules = loaded("import sys; sys.argv[0] = 'dmlbench'\nfrom dmlbench.cli import main; main()")
    assert "click.shell_completion" in modules and "dmlbench.cli" in modules and "torch" not in modules


def test_what_the_package_leaves_for_later() -> None:
    modules = loaded("import dmlbench; dmlbench.evaluate, dmlbench.load_model, dmlbench.load_dataset")
    assert "torch" in modules and not modules & set(HEAVY)


def test_public_names() -> None:
    code = "import dmlbench.evaluate\nfrom dmlbench import *\nassert callable(dmlbench.evaluate) and callable(train)\n"
    loaded(
        code
        + "assert set(dmlbench.__all__) <= set(dir(dmlbench)); dmlbench.evaluate; assert not hasattr(dmlbench, 'x')"
    )


def test_what_a_module_lists_it_has() -> None:
    package = Path(__file__).parents[1] / "dmlbench"
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            missing = [listed for listed in getattr(module, "__all__", ()) if not hasattr(module, listed)]
            assert not missing, name


PLUGIN = """
from dmlbench.attacks import ATTACKS, Attack
from dmlbench.training.defenses import DEFENSES
ATTACKS.add("turn", Attack("turn round", "shift", "", ("recall_at_1",), "a test"))
DEFENSES.add("mine", DEFENSES["none"])
"""


def test_a_plugin_is_imported_after_what_it_imports(tmp_path: Path) -> None:
    info = tmp_path / "turning-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: turning\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmlbench.plugins]\nturn = turning\n")
    (tmp_path / "turning.py").write_text(PLUGIN)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    command = [sys.executable, "-m", "dmlbench", "attacks", "show", "turn"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0 and "turn round" in done.stdout, done.stderr


def test_no_test_file_imports_another() -> None:
    """What two of them need stands in a file of its own, so that a file can be run, moved or removed alone."""
    imports = re.compile(r"^\s*(?:from|import) (?:tests\.)?(test_\w+)", re.MULTILINE)
    files = sorted(Path(__file__).parent.glob("*.py"))
    tests = {file.stem for file in files if file.stem.startswith("test_")}
    found = {file.name: set(imports.findall(file.read_text(encoding="utf-8"))) & tests for file in files}
    assert {name: others for name, others in found.items() if others} == {}

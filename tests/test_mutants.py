"""The planted errors of ``benchmarks/mutants.py``: their texts stand in the package, their tests exist, CONTRIBUTING.md lists both."""

import re

import mutants
import pytest
from conftest import ROOT


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_planted_error_can_be_planted(mutant) -> None:
    whole = mutants.place(mutant, ROOT).read_text(encoding="utf-8")
    assert whole.replace(mutant.text, mutant.instead) != whole
    file, test = mutant.test.split("[")[0].split("::")
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert f"| {mutant.name} | `{mutant.test}` |" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_a_text_that_is_gone_or_twice_there_is_an_error(tmp_path) -> None:
    (tmp_path / "dmlbench").mkdir()
    mutant = mutants.Mutant("n", "a + b", "a - b", "t")
    for content, count in (("a * b", 0), ("a + b\na + b", 2)):
        (tmp_path / "dmlbench" / "sum.py").write_text(content)
        with pytest.raises(SystemExit, match=f"is found {count} times"):
            mutants.place(mutant, tmp_path)

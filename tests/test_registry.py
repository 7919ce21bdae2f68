"""Tables refuse duplicates and help with typos; protocols and registry files are checked."""

import ast
import json
import re
from pathlib import Path

import pytest

import dmlbench
from dmlbench.attacks import ATTACKS, parse
from dmlbench.checkpoints import checkpoints
from dmlbench.errors import DataError, UsageError
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.protocol import load_protocol, protocol_names, read_protocol
from dmlbench.registry import Registry
from dmlbench.targets import TARGETS

PACKAGE = Path(dmlbench.__file__).parent


def test_registry() -> None:
    table: Registry[int] = Registry("thing", {"alpha": 1})
    with pytest.raises(ValueError, match="twice"):
        table.add("alpha", 2)
    with pytest.raises(UsageError, match=r"unknown thing 'aplha'; did you mean 'alpha'\?"):
        table["aplha"]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_names_what_exists(name: str) -> None:
    attack = ATTACKS[name]
    assert attack.objective in OBJECTIVES and (not attack.targets or attack.targets in TARGETS)
    assert attack.readouts and all(r in READOUTS for r in attack.readouts) and attack.source


@pytest.mark.parametrize("kind", [OBJECTIVES, TARGETS])
def test_every_entry_says_what_it_is(kind) -> None:
    for name, entry in kind.items():
        assert entry.__doc__ and len(entry.__doc__) > 30, name


def test_parse() -> None:
    assert parse("QA+") == ("QA+", "pgd")
    with pytest.raises(UsageError, match=r"unknown optimizer 'pgdd'; did you mean 'pgd'\?"):
        parse("QA+@pgdd")


@pytest.mark.parametrize("name", protocol_names())
def test_packaged_protocols_load_and_are_hashed(name: str) -> None:
    p = load_protocol(name)
    assert p.name == name and re.fullmatch("[0-9a-f]{64}", p.sha256)
    assert p.model_copy(update={"title": "another"}).sha256 == p.sha256
    assert p.model_copy(update={"seed": p.seed + 1}).sha256 != p.sha256


def test_published_and_corrected_protocols_differ_in_the_quirks_alone() -> None:
    for size in ("28", "224"):
        ours, theirs = load_protocol(f"ers-{size}"), load_protocol(f"ers-{size}-published")
        assert ours.threat == theirs.threat
        changed = [a.name for a, b in zip(ours.components, theirs.components, strict=True) if a != b]
        assert changed == ["ES:D", "LTM", "GTM"]
        assert theirs.threat_of(theirs.component("ES:D")).steps == 31


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('attack = "QA+"', "unknown attack 'QA_'; did you mean 'QA"),
        ('readout = "rank_in_query"', "not read by 'recall_at_1'"),
        ('norm = "linf"', "unknown norm 'l7'"),
        ("worst = 0", "worst and best are both 50"),
        ("seed = 0", "sede"),
    ],
)
def test_a_broken_protocol_file_says_where(tmp_path: Path, change: str, words: str) -> None:
    text = (PACKAGE / "protocols" / "ers-digits.toml").read_text()
    wrong = {
        'attack = "QA+"': 'attack = "QA_"',
        'readout = "rank_in_query"': 'readout = "recall_at_1"',
        'norm = "linf"': 'norm = "l7"',
        "worst = 0": "worst = 50",
        "seed = 0": "sede = 0",
    }[change]
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(change, wrong, 1))
    with pytest.raises(DataError, match=re.escape(words)):
        read_protocol(path)


def test_checkpoint_file_refuses_unknown_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entry = next(iter(checkpoints().items()))
    record = entry.model_dump(mode="json")
    record["colour"] = "blue"
    path = tmp_path / "checkpoints.json"
    path.write_text(json.dumps({"schema_version": 1, "checkpoints": {name: record}}))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(path))
    with pytest.raises(DataError, match=f"{name}.colour"):
        checkpoints()


ORDER = [
    "errors", "version", "registry", "rng", "threat", "checkpoints", "embedding", "scene", "objectives", "targets",
    "optimizers", "metrics", "attacks", "protocol", "results", "intervals", "subject", "search", "record", "checks", "strict", "clustering", "audit", "evaluate",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """dmlbench modules that a file imports when it is read (not inside functions or for typing alone)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dmlbench."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_strictly_downwards(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    files = [path] if path.exists() else sorted((PACKAGE / name).glob("*.py"))
    assert files
    for file in files:
        above = [m for m in imported(file) if m in ORDER and m != name and ORDER.index(m) > ORDER.index(name)]
        assert not above, f"{file.name} imports {above}"


def test_only_the_command_line_prints() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "cli" in file.relative_to(PACKAGE).parts:
            continue
        calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], file

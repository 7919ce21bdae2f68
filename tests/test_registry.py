"""Tables refuse duplicates and help with typos; protocols and registry files are checked."""

import ast
import graphlib
import json
import re
from pathlib import Path

import pytest

import dmlbench
from dmlbench import protocols
from dmlbench.attacks import ATTACKS, parse
from dmlbench.checkpoints import checkpoints, packaged
from dmlbench.errors import DataError, UsageError
from dmlbench.metrics import READOUTS
from dmlbench.objectives import OBJECTIVES
from dmlbench.protocols import FOLDER, load_protocol, packaged_protocol, protocol_names, protocol_versions
from dmlbench.protocols.reading import read_protocol
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
    with pytest.raises(UsageError, match=r"unknown attack 'QA_\+'"):
        parse("QA_+@pgd")


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_search_by_decisions_is_refused_where_the_objective_is_none(attack: str) -> None:
    """ES is 0 or less everywhere: the clean image would count as a success, and a model as robust."""
    assert parse(f"{attack}@square") == (attack, "square")
    if attack in ("WM", "MT", "ME"):
        assert parse(f"{attack}@hopskipjump") == (attack, "hopskipjump")
    else:
        with pytest.raises(UsageError, match=r"hopskipjump sees only whether .* that of WM, MT, ME does"):
            parse(f"{attack}@hopskipjump")


@pytest.mark.parametrize("name", protocol_names())
def test_packaged_protocols_load_and_are_hashed(name: str) -> None:
    p = load_protocol(name)
    assert p.name == name and re.fullmatch("[0-9a-f]{64}", p.sha256)
    assert p.model_copy(update={"title": "another"}).sha256 == p.sha256
    assert p.model_copy(update={"seed": p.seed + 1}).sha256 != p.sha256


RELEASED = {
    "certified@1": "676085872286f5f8ed98dde9eda16dd2c0e5aeb9addafd826f57fa2eef7b0ec1",
    "clustering@1": "93d6ae711b7a666db962bac2cb0f62020cd21b80ec53f9b86112cde223715d25",
    "clustering@2": "7493111fbca659dc782f2471d6fdf1104e37c6ebf523de16169b55409f69493c",
    "corruptions@1": "4aa9aee8b8a144004c339724ea52f6b63e95a1056fcd8caf51be174122867003",
    "corruptions-everything@1": "749cbf20e71da1e783a24890c11881f766857636ff007977af14dfb2f451b6aa",
    "ers-224@1": "783addc16456acc6639fe2cd1b980adebb3356d5b39b7ec3d14bb0ba6dd23750",
    "ers-224@2": "6d86eaa174ed74d72be4a9282935abff1c0fbc7b22f36a0d95450e40e3b7c8f8",
    "ers-224-published@1": "3abe3f9d4022c938fc8ea4ab803ea04ae1cedf86f110bf84e754969498fce9b8",
    "ers-224-published@2": "efa47e38d0de790e4aeee7f4781a16217f31b141fd8a168499f346e118601241",
    "ers-28@1": "21998eaa5f3b66255d0e95b7c004d79dc2f8ff383649dbc386f274e78736be1b",
    "ers-28@2": "2fe0064f41928dd6ab8d220ab0dbf080ad51aaa7221e0aa8721a5d761dc1e223",
    "ers-28-published@1": "5911ef89cc35a2aa30a456633b9ca634786e02b2a21d8020f5bf4415cbae3e87",
    "ers-28-published@2": "594460f5f99050ceb750d35da392c192241337e9df72e639bdc710295ec04e25",
    "ers-digits@1": "f7e5741ab866648b149946bfda4316e996af411e3904f744ec69c9511a9c629a",
    "ers-digits@2": "e9f61fd8e31cba1fe6c0a7cb2b7111f21de41debb19ecf4b3b5aeb1ac60d0b41",
    "ers-digits-published@1": "c33abdd19ebe34354cb2db8f0d198bfbdb6de335f4dde936dd593e38be4407bf",
    "ers-digits-published@2": "25138f2872fecd66a3d8f378ad297cccb0302260c087fb5ff5a7e5ece1037026",
    "panum-28@1": "428d985c9fe39a3adad8332e7246e464499c7691987cb2c75d7b3e6bf68546c8",
    "panum-28-l2@1": "0722c3eaee6c97afa12f1420df79c1c991dfd645942a0707350380f61142ab41",
    "poison@1": "08c8b713e28406bce545791c21cb801e737767e16408e6708df16e586c1a37a1",
    "sides@1": "667f3163f6fe352e30c5f3de4144e7727bb0ee99e1976267f4413b3b80ba6013",
    "strict@2": "96c63923e0737e9b478bae9b6f775dc9578527cb7d4f997c20b5a92d67e3d149",
    "strict@1": "044fb3fed9a8f1de64e8e228d484634e82ac08f0cf9dd3848deb2eaf32f3d20b",
    "strict-fast@2": "43f04b5b91a8f39e51fdb6af7a785c0c48ff7c832e23fbb09ebb7e7f60b2542a",
    "strict-fast@1": "bc5211c2eca1de018c1101f56bb5b430630c5d2996b22a8a8ccc2162e8d99384",
    "strict-fast-l2@2": "48a901365d0f266824ebc554b0847e9557a7888a99182c74c85e95c7685060dd",
    "strict-fast-l2@1": "086165752cf1ed86590529e95cb6f8624a2ae26ddfb34e54653c82af3686dc32",
    "strict-l2@2": "ba1bf1602a89ebfb42089d4416d99f802af832d1850299186c07254b89cc011b",
    "universal@1": "72695e4267d4216945c5c9aa8ef264375a45f0368606730f10e397d50011b4be",
    "verification@1": "e81f5d22fec80a24cca519c41163f0f298d141bdec06f999e275f3d12f157f7e",
    "strict-l2@1": "dc1315161b667147ded7f297e673b6c1b8f60d8f914f3a154e002e65356356c3",
}


def test_every_packaged_protocol_has_a_hash_that_it_keeps() -> None:
    versions = [p for name in protocol_names() for p in protocol_versions(name)]
    assert sorted(RELEASED) == sorted(f"{p.name}@{p.version}" for p in versions)


@pytest.mark.parametrize("name", protocol_names())
def test_versions_of_a_protocol_name_their_successor(name: str) -> None:
    current, *older = protocol_versions(name)
    assert (current.name, current.id, current.superseded_by) == (name, name, None)
    known = {f"{name}@{p.version}" for p in (current, *older)}
    assert len(known) == 1 + len(older)
    for p in older:
        assert p.name == name and p.id == f"{name}@{p.version}" and p.superseded_by in known - {p.id}
        assert load_protocol(p.id) == packaged_protocol(name, p.sha256) == p


def test_a_version_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "strict-fast.toml").read_text(encoding="utf-8")
    version = load_protocol("strict-fast").version
    new = text.replace(f'version = "{version}"', 'version = "99"')
    (tmp_path / "strict-fast.toml").write_text(new, encoding="utf-8")
    old = text.replace("seed = 0", 'seed = 0\nsuperseded_by = "strict-fast@99"')
    (tmp_path / f"strict-fast@{version}.toml").write_text(old, encoding="utf-8")
    monkeypatch.setattr(protocols, "PROTOCOLS", Registry("protocol", protocols.protocol_files(tmp_path)))
    protocols._packaged.cache_clear()
    try:
        assert protocol_names() == ["strict-fast"]
        assert load_protocol("strict-fast").version == load_protocol("strict-fast@99").version == "99"
        assert load_protocol(f"strict-fast@{version}").id == f"strict-fast@{version}"
        with pytest.raises(UsageError, match=r"no version '7'; the current one is '99'"):
            load_protocol("strict-fast@7")
    finally:
        protocols._packaged.cache_clear()


@pytest.mark.parametrize("name", [n for n in protocol_names() if n.startswith("ers-")])
def test_a_packaged_ers_has_the_ten_parts(name: str) -> None:
    parts = ["CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT"]
    assert [c.name for c in load_protocol(name).components] == parts


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_packaged_protocol_keeps_its_hash(name: str) -> None:
    """Results are told apart by it: a changed protocol is a new one."""
    assert load_protocol(name).sha256 == RELEASED[name]


def test_published_and_corrected_protocols_differ_in_the_quirks_alone() -> None:
    for size in ("28", "224", "digits"):
        ours, theirs = load_protocol(f"ers-{size}"), load_protocol(f"ers-{size}-published")
        assert ours.threat == theirs.threat
        changed = [a.name for a, b in zip(ours.components, theirs.components, strict=True) if a != b]
        assert changed == ["ES:D", "ES:R", "LTM", "GTM"]
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


def test_a_superseded_model_names_a_registered_successor_and_says_so(monkeypatch, tmp_path: Path) -> None:
    old, new = "digits-smallcnn-triplet-none", "digits-smallcnn-triplet-act"
    table = json.loads(packaged("checkpoints.json").read_text(encoding="utf-8"))
    path = tmp_path / "c.json"
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(path))

    def write(**changes: str) -> None:
        entries = {old: {**table["checkpoints"][old], **changes}, new: table["checkpoints"][new]}
        path.write_text(json.dumps({"schema_version": 1, "checkpoints": entries}))

    write(status="superseded", superseded_by=new, reason="a test")
    assert checkpoints()[old].superseded_by == new
    assert f"{old} is superseded by {new}: a test" in dmlbench.load_model(old).notes
    assert not any("superseded" in note for note in dmlbench.load_model(new).notes)
    for changes, words in (
        ({"status": "superseded"}, "each needs the other"),
        ({"superseded_by": new}, "each needs the other"),
        ({"status": "superseded", "superseded_by": "nobody"}, "which is not registered"),
    ):
        path = tmp_path / f"{len(words)}{len(changes)}{changes.get('status')}.json"
        monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(path))
        write(**changes)
        with pytest.raises(DataError, match=words):
            checkpoints()


ERS = """name = "x"
version = "1"
kind = "ers"
title = "t"
[threat]
norm = "linf"
eps = "20/255"
step = "2/255"
steps = 4
[[components]]
name = "A"
attack = "LTM"
readout = "recall_at_1"
worst = 0
best = 100
"""
STRICT = """name = "x"
version = "1"
kind = "strict"
title = "t"
[threat]
norm = "linf"
[grid]
8 = ["40/255"]
[[steps]]
name = "W"
attack = "WM"
optimizer = "apgd"
threat = {steps = 20}
"""
CLUSTERING = """name = "x"
version = "1"
kind = "clustering"
title = "t"
[threat]
norm = "linf"
steps = 2
[grid]
8 = ["40/255"]
"""
COMPONENT, STEP = ERS[ERS.index("[[components]]") :], STRICT[STRICT.index("[[steps]]") :]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ERS + COMPONENT.replace("LTM", "GTM"), "two components have the name 'A'"),
        (ERS.replace("best = 100", "best = nan"), "components.0.best"),
        (ERS.replace("worst = 0", "worst = -inf"), "components.0.worst"),
        (ERS.replace("steps = 4", "steps = 3.5"), "component 'A': steps 3.5 is not a whole number"),
        (ERS.replace("steps = 4", "steps = true"), "steps True is not a whole number"),
        (ERS.replace("steps = 4", 'steps = "4"'), "steps '4' is not a whole number"),
        (ERS.replace("steps = 4", "steps = 4\neot = 1.5"), "eot 1.5 is not a whole number"),
        (ERS.replace("steps = 4", "steps = 4\nrestarts = 1.5"), "restarts 1.5 is not a whole number"),
        (ERS + "threat = {queries = 10.0}\n", "component 'A': queries 10.0 is not a whole number"),
        (ERS.replace('eps = "20/255"', "eps = true"), "eps True is not a number"),
        (ERS.replace('step = "2/255"', "step = false"), "step False is not a number"),
        (ERS.replace('eps = "20/255"', 'eps = ["20/255"]'), "is not a number"),
        (ERS.replace('norm = "linf"', "norm = 2"), "component 'A': norm 2 is not a word"),
        (ERS.replace("steps = 4", "step_ = 4"), "unknown key 'step_' of a threat; did you mean 'step"),
        (ERS[: ERS.index("[[components]]")], "kind 'ers' needs [[components]]"),
        (ERS[: ERS.index("[[components]]")].replace('"ers"', '"parts"'), "kind 'parts' needs [[components]]"),
        (ERS + STEP, "[[steps]] do nothing in kind 'ers'"),
        (STRICT + COMPONENT, "[[components]] do nothing in kind 'strict'"),
        (STRICT + "aims = 2\n", "step 'W': aims 2, but attack 'WM' has no targets"),
        (STRICT + "aims = 0\n", "step 'W': aims 0 must be 1 or more"),
        (STRICT.replace("WM", "MT") + "aims = -1\n", "aims -1 must be 1 or more"),
        (STRICT + STEP, "two steps have the name 'W'"),
        (STRICT.replace("steps = 20", "steps = 20.5"), "step 'W': steps 20.5 is not a whole number"),
        (STRICT.replace("steps = 20", "eps = 1"), "step 'W': threat eps does nothing"),
        (STRICT.replace('norm = "linf"', 'norm = "linf"\neps = 1'), "[threat] eps does nothing in kind 'strict'"),
        (STRICT.replace("apgd", "universal"), "step 'W': optimizer 'universal' needs all queries at once"),
        (STRICT.replace("WM", "ES").replace("apgd", "hopskipjump"), "ES@hopskipjump: hopskipjump sees only whether"),
        (ERS.replace("readout =", 'optimizer = "hopskipjump"\nreadout ='), "hopskipjump sees only whether"),
        (CLUSTERING + COMPONENT, "[[components]] do nothing in kind 'clustering'"),
        (CLUSTERING + STEP, "[[steps]] do nothing in kind 'clustering'"),
        (CLUSTERING.replace("steps = 2", 'steps = 2\nstart = "random"'), "[threat] start does nothing"),
        (CLUSTERING.replace("steps = 2", "steps = 2\nrestarts = 3"), "[threat] restarts does nothing"),
        (CLUSTERING.replace("steps = 2", "steps = 2\nstep = 0.1"), "[threat] step does nothing in kind 'clustering'"),
        *(
            (ERS.replace('name = "x"', f'name = "{n}"', 1), "must begin with a letter")
            for n in ("../x", "/x", "", "a,b", "=x")
        ),
        *(
            (ERS.replace('name = "A"', f'name = "{n}"'), "must begin with a letter")
            for n in ("=x", "", "a<b>", "a\u202eb")
        ),
        (f"seed = -1\n{ERS}", "seed: Input should be greater than or equal to 0"),
        (f"seed = {1 << 63}\n{ERS}", "seed: Input should be less than"),
        (f"clustering_seeds = []\n{CLUSTERING}", "clustering_seeds: Tuple should have at least 1 item"),
        (f"clustering_seeds = [{1 << 31}]\n{CLUSTERING}", "clustering_seeds.0: Input should be less than"),
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(words)) as error:
        read_protocol(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [ERS, STRICT, CLUSTERING, STRICT.replace("WM", "MT") + "aims = 2\n"])
def test_the_protocols_that_those_are_made_of_are_right(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert read_protocol(tmp_path / "mine.toml").name == "x"


def test_no_run_is_made_of_two_components_of_one_name() -> None:
    """Whoever made the protocol: one column would overwrite the other. A packaged file is no exception."""
    p = load_protocol("ers-digits")
    twice = p.model_copy(update={"components": (*p.components, p.components[0])})
    for names in (None, ["GTM"], ["QA+@square"]):
        with pytest.raises(UsageError, match=r"'ers-digits' has two components 'CA\+'"):
            twice.chosen(names, (1, 8, 8))


def test_checkpoint_file_refuses_unknown_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entry = next(iter(checkpoints().items()))
    record = entry.model_dump(mode="json")
    record["colour"] = "blue"
    path = tmp_path / "checkpoints.json"
    path.write_text(json.dumps({"schema_version": 1, "checkpoints": {name: record}}))
    monkeypatch.setenv("DMLBENCH_CHECKPOINTS", str(path))
    with pytest.raises(DataError, match=f"{name}.colour"):
        checkpoints()


def imports(path: Path) -> set[str]:
    """dmlbench modules that a file imports when it is read (not inside functions or for typing alone)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmlbench":
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if name in MODULES else node.module)
    return found


MODULES = {
    ".".join(("dmlbench", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): f
    for f in PACKAGE.rglob("*.py")
}


def test_no_imports_go_round_in_a_circle() -> None:
    known = {name: imports(path) & MODULES.keys() - {"dmlbench"} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(known).prepare()


def rows_of_the_page() -> list[list[str]]:
    """The files and folders of each row of the table in docs/architecture.md, as names of modules."""
    lines = (
        (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    )
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return [[name.removesuffix(".py").strip("/") for name in re.findall(r"`([\w/.]+)`", cell)] for cell in cells]


def test_the_page_names_every_room_in_an_order_without_an_arrow_up() -> None:
    rows = rows_of_the_page()
    place = {name: i for i, names in enumerate(rows) for name in names}
    rooms = {f.name.removesuffix(".py") for f in PACKAGE.iterdir() if f.suffix == ".py" or (f / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "version"} == {name.split("/")[0] for name in place}

    def at(module: str) -> int:
        parts = module.split(".")[1:]
        return place.get("/".join(parts), place.get(parts[0] if parts else "", -1))

    for name, path in MODULES.items():
        above = sorted(m for m in imports(path) if at(m) > at(name) >= 0)
        assert not above, f"{name} imports {above}"


def test_only_the_command_line_prints() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "cli" in file.relative_to(PACKAGE).parts:
            continue
        calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], file

"""The pages about the board and CI, and the tutorials: every command in them runs and prints what they show.

Lines that begin with ``$`` in a ``console`` block are commands, what follows is their output, and ``exit N``
after it a code other than 0. Words must be the same; a number may differ by a point and a quarter (by five points and
a quarter where the page trains: another machine rounds otherwise), those of seconds and hashes altogether. ``DMLBENCH_UPDATE_DOCS=1`` rewrites the pages instead.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import edit_json, zipped

from dmlbench.board import build
from dmlbench.submission import rerun

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?![\w.]*[a-z_])")
PROGRESS = re.compile(r".*: [\d,]+ of [\d,]+, .* a second, about \d+ (?:s|min) left")
"""What long work says from time to time where there is no terminal: more of it on a slow machine."""
TUTORIALS = ["tutorials/model.md", "tutorials/gate.md", "tutorials/attack.md", "tutorials/defence.md"]
UPDATE = os.environ.get("DMLBENCH_UPDATE_DOCS") == "1"


def commands(text):
    """(command, what it prints) of a block."""
    out = []
    for line in text.splitlines():
        if line.startswith("$ "):
            out.append((line[2:], []))
        else:
            out[-1][1].append(line)
    return [(command, "\n".join(lines)) for command, lines in out]


def execute(command, folder, typed=None):
    """Run one line as a shell would; what it printed on both streams, and its code if not 0."""
    words = shlex.split(command)
    if words[0] == "cp":
        shutil.copy(folder / words[1], folder / words[2])
        return ""
    if words[0] == "dmlbench" and typed:
        done = typed(*words[1:], cwd=folder, code=None)
        out, err, code = done.out, done.err, done.code
    else:
        python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT), "PATH": python}
        for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
            environment.pop(name, None)
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        out, err, code = ran.stdout, ran.stderr, ran.returncode
    assert "Traceback" not in err, err
    lines = [line.rstrip() for line in (out + err).splitlines()]
    printed = "\n".join(line for line in lines if not PROGRESS.fullmatch(line))
    return printed + (f"\nexit {code}" if code else "")


def alike(shown, printed, points=1.0):
    """The words of both, and the pairs of numbers that are too far apart."""

    def plain(text):
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+|[0-9a-f]{8,64}|\d+ KiB", "*", text)
        text = re.sub(r"(?m)^(.* [↑↓] .* \d+) +\d+\.\d$", r"\1 *", text)  # seconds
        return re.sub(r"[ \t]+|-{3,}", " ", text)

    words = [NUMBER.sub("N", plain(t)) for t in (shown, printed)]
    numbers = [[float(n.replace("−", "-")) for n in NUMBER.findall(plain(t))] for t in (shown, printed)]
    far = [(a, b) for a, b in zip(*numbers, strict=False) if abs(a - b) > points + 0.25 * abs(a)]
    return words, far


@pytest.fixture(scope="module", autouse=True)
def each_bundle_is_checked_once():
    """The pages build the whole board several times: a folder whose files are the same gives the same row."""
    measured, known = build._measured, {}

    def remembered(folder):
        files = [*folder.rglob("*"), build.verification_of(folder)]
        key = tuple(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()))
        if key not in known:
            known[key] = measured(folder)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_measured", remembered)
        yield


@pytest.fixture(scope="module", autouse=True)
def each_bundle_is_run_again_once():
    """``validate --level 4`` and ``verify`` attack the same bundle again: the second takes what the first found."""
    again, known = rerun.evaluate, {}

    def remembered(embedder, dataset, rules, **options):
        key = (embedder.weights_sha256, dataset.sha256, rules.sha256, str(options.get("only")))
        if key not in known:
            known[key] = again(embedder, dataset, rules, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerun, "evaluate", remembered)
        yield


@pytest.fixture
def folder(tmp_path):
    """A folder with what a checkout has that the commands name."""
    if not (ROOT / "leaderboard").is_dir() or not (ROOT / ".github").is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    shutil.copytree(ROOT / "leaderboard", tmp_path / "leaderboard")
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    return tmp_path


def tamper(folder):
    """What somebody might do to the bundle that the page has just made."""
    import zipfile

    with zipfile.ZipFile(folder / "mine.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    zipped(edit_json(files, "run/evaluation.json", lambda c: c.update(ers=99.0)), folder / "tampered.zip")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["submitting.md", "ci.md", "leaderboard.md", "verification.md", *TUTORIALS])
def test_the_page_tells_the_truth(name, folder, typed):
    path = ROOT / "docs" / name
    text = path.read_text(encoding="utf-8")
    updated = text
    for block in BLOCK.finditer(text):
        lines = []
        for command, shown in commands(block[1]):
            if "tampered.zip" in command:
                tamper(folder)
            printed = execute(command, folder, typed)
            lines.append(f"$ {command}\n" + (printed + "\n" if printed else ""))
            if not UPDATE:
                words, far = alike(shown, printed, 1.0 if name in ("ci.md", "leaderboard.md") else 5.0)
                assert words[0] == words[1], f"{command}\n{printed}"
                assert not far, f"{command}\n{printed}"
        updated = updated.replace(block[0], "```console\n" + "".join(lines) + "```", 1)
    if UPDATE:
        path.write_text(updated, encoding="utf-8")


def test_a_page_that_lies_is_found():
    words, far = alike("ERS 24.9  passed", "ERS 40.9 passed")
    assert words[0] == words[1] and far == [(24.9, 40.9)]
    words, _ = alike("gate passed", "gate failed")
    assert words[0] != words[1]


# --- the scripts that CI runs ------------------------------------------------------------------------------


@pytest.fixture
def repository(folder):
    """A git repository with the board committed."""

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words],
            cwd=folder,
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "board")
    return folder


def test_a_pull_request_is_checked(repository):
    name = "digits-smallcnn-triplet-none-ers-digits"
    source = repository / "leaderboard" / "submissions" / name
    check = "LEVEL=0 bash .github/check-submissions.sh HEAD"
    run = source / "run" / "evaluation.json"
    run.write_text(run.read_text().replace('"ers": 2', '"ers": 9', 1))
    printed = execute(check, repository)
    assert "is of a submission on the board" in printed and printed.endswith("exit 1")
    subprocess.run(["git", "checkout", "-q", "--", "."], cwd=repository, check=True)

    shutil.copytree(source, source.with_name("a-copy"))
    printed = execute(check, repository)
    assert "is already on the board" in printed and printed.endswith("exit 1")
    shutil.rmtree(source.with_name("a-copy"))

    odd = source.with_name("ä-copy")
    shutil.copytree(source, odd)
    assert "is no name for a submission" in execute(check, repository)
    shutil.rmtree(odd)


def test_the_action_and_the_workflows_are_well_formed():
    import yaml

    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")  # inputs reach the shell through the environment alone
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(action["inputs"])
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "submission.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request" not in workflow[True]  # whose workflow file would be the submitter's
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert (
            form["name"]
            and form["body"]
            and len({b["id"] for b in form["body"] if "id" in b}) == sum("id" in b for b in form["body"])
        )


def test_the_documented_workflow_uses_what_the_action_takes():
    import yaml

    action = yaml.safe_load((ROOT / "action.yml").read_text())
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    steps = yaml.safe_load(blocks[0])["jobs"]["gate"]["steps"]
    given = next(s["with"] for s in steps if "dmlbench@" in s.get("uses", ""))
    assert set(given) <= set(action["inputs"]) and {n for n, i in action["inputs"].items() if i.get("required")} <= set(
        given
    )


def test_json_of_the_gate(folder, typed):
    base = folder / "leaderboard" / "submissions" / "digits-smallcnn-triplet-none-ers-digits" / "run"
    execute(f"dmlbench compare {base} {base} --json=out.json", folder, typed)
    assert json.loads((folder / "out.json").read_text())["exit_code"] == 0

"""What a pull request may do to the board: add a bundle, in a new folder called by its id, and the CSV files that follow.

Whatever else it changes is refused by its path alone: a folder that is on the board, a record of a full rerun, claims, a
file outside the board. So nobody's row changes by the hand of another, and nothing that checks a submission comes with it.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dmlbench.checkpoints import ID
from dmlbench.errors import DataError, UsageError
from dmlbench.files import first_line
from dmlbench.submission.bundle import LIMITS, SUBMISSIONS, VERIFICATIONS, Problem

BOARD = "leaderboard"
MOST = 8
"""Bundles in one pull request: each takes minutes to hours to check."""
_PLAIN = "100644"
"""git's mode of a file that is no link, no program and no other repository."""


class Change(NamedTuple):
    """One path that differs from the base: git's mode of it now ("000000" where it is gone), and whether it was there."""

    path: str
    mode: str
    was_there: bool


def changes(root: Path, base: str) -> tuple[list[Change], set[str]]:
    """What differs in the checkout at ``root`` from where it left ``base``, and the submissions that were there.

    Files that git does not know count where they lie in the board's folder. Names are bytes between zeros, as git has them.

    Raises:
        UsageError: ``root`` is not the top of a checkout, or ``base`` no commit that its history shares.
    """
    if Path(_git(root, "rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
        raise UsageError(f"{root} is not the top of a git checkout")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip()
    fork = _git(root, "merge-base", commit, "HEAD").strip()
    fields = _git(root, "diff", "--raw", "-z", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-relative",
                  "--ignore-submodules=none", fork, "--").split("\0")  # fmt: skip
    changed = [
        Change(path, head.split()[1], not head.startswith(":000000"))
        for head, path in zip(fields[:-1:2], fields[1::2], strict=True)
    ]
    tracked = {change.path for change in changed}
    for path in _git(root, "ls-files", "--others", "-z", "--", BOARD).split("\0"):
        if path and path not in tracked:
            file = root / path
            plain = file.is_file() and not file.is_symlink()
            changed.append(Change(path, _PLAIN if plain else "120000", False))
    there = _git(root, "ls-tree", "-z", "--name-only", fork, f"{BOARD}/{SUBMISSIONS}/").split("\0")
    return sorted(changed), {name.rpartition("/")[2] for name in there if name}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except OSError as error:
        raise DataError(f"git cannot be run in {root}: {error.strerror}") from None
    if done.returncode:
        text = first_line(os.fsdecode(done.stderr), "no such commit, or no history in common")
        raise UsageError(f"git {words[0]} in {root}: {text}")
    return os.fsdecode(done.stdout)


def refusals(changed: Sequence[Change], there: set[str]) -> Iterator[Problem]:
    """Every change that a pull request may not make.

    Args:
        changed, there: as :func:`changes` returns them.
    """
    for change in changed:
        if reason := _reason(change, there):
            yield Problem(0, ascii(change.path).strip("'\""), reason)
    if len(names := added(changed)) > MOST:
        yield Problem(0, f"{BOARD}/{SUBMISSIONS}", f"{len(names)} bundles at once; at most {MOST} are checked together")


def _reason(change: Change, there: set[str]) -> str | None:
    top, _, rest = change.path.partition("/")
    room, _, inside = rest.partition("/")
    if top != BOARD or not rest:
        return "lies outside the board: a submission changes nothing there"
    if room == VERIFICATIONS:
        return "records of full reruns are written by the workflow `verify` of the board's keepers alone"
    if room == SUBMISSIONS:
        return _in_submissions(change, *inside.partition("/")[::2], there)
    if not re.fullmatch(r"[a-z0-9-]+/[a-z0-9_-]+\.csv", rest):
        return "is no place of the board"
    if change.mode not in (_PLAIN, "000000"):
        return "is a link, a program or another repository"
    return None  # its content is compared with what the submissions give


def _in_submissions(change: Change, name: str, file: str, there: set[str]) -> str | None:
    if name in there:
        return "is of a submission on the board: a pull request adds a folder of its own and changes no other"
    if not re.fullmatch(ID, name):
        return "is no name for a submission: small letters, digits, '.', '_' and '-'"
    if file == "claims.csv":
        return "claims are entered by the board's keepers: open an issue that names the source"
    if file not in LIMITS:
        return f"is not a file of a bundle; it may hold {', '.join(LIMITS)}"
    if change.mode != _PLAIN:
        return "is a link, a program or another repository"
    return None


def added(changed: Sequence[Change]) -> list[str]:
    """The names of the submissions in which something differs."""
    head = f"{BOARD}/{SUBMISSIONS}/"
    return sorted({c.path.removeprefix(head).partition("/")[0] for c in changed if c.path.startswith(head)})

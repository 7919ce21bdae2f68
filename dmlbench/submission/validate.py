"""All levels of validation in order, up to the given one; it stops at the first that refuses."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from dmlbench.board.row import headline
from dmlbench.run.subject import Progress, resolve_device
from dmlbench.submission.bundle import Problem, Refused
from dmlbench.submission.replay import replay
from dmlbench.submission.rerun import (
    LEAST,
    SHARE,
    Rerun,
    Verification,
    load_submitted,
    rerun_all,
    rerun_share,
)
from dmlbench.submission.static import Checked, check_static
from dmlbench.version import __version__

LEVELS = {
    0: "names, sizes, hashes, schema, licence; every stated number comes out of the queries' own outcomes",
    1: "the weights fit the architecture, and the probe agrees",
    2: "clean outcomes come out again; the stored adversarial images lie in the ball and in [0, 1] and score the same",
    3: "a random share of the queries, attacked again, agrees",
    4: "all queries, attacked again, agree",
}


class Report(BaseModel):
    """How far a bundle came."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    id: str | None = None
    sha256: str | None = None
    level: int
    """the level that was requested"""
    passed: tuple[int, ...]
    """the levels that it passed"""
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    status: Literal["accepted", "refused"]
    verification: Verification | None = None


def validate(
    path: Path,
    level: int = 2,
    *,
    board: Path | None = None,
    weights: Path | None = None,
    fetch: bool = False,
    share: float = SHARE,
    least: int = LEAST,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    on_level: Callable[[int], None] | None = None,
) -> Report:
    """Check a bundle, level 0 up to ``level``.

    Args:
        board: the folder ``leaderboard`` that the bundle would join; None to look at the bundle alone.
        weights: the weights file, where the bundle has none.
        fetch: whether weights that are neither there nor in this package are fetched from the address that the
            submission names; size and sha256 are checked.
        share, least, seed: of level 3.
        on_level: called with each level that was passed.

    Raises:
        DataError: the data set that level 2 and above need is not on this machine.
    """
    passed: list[int] = []
    notes: list[str] = []
    checked: Checked | None = None
    verification: Verification | None = None

    def done(step: int) -> None:
        passed.append(step)
        if on_level:
            on_level(step)

    try:
        checked = check_static(path, board)
        done(0)
        if level >= 1:
            embedder = load_submitted(checked, weights, fetch)
            done(1)
        if level >= 2:
            replay(checked, embedder, device)
            if not len(checked.evaluation.sample["rows"]):
                name = checked.evaluation.dataset.name
                notes.append(
                    f"level 2 looked at no adversarial image: pictures of {name} may not be passed on, so none is kept"
                )
            done(2)
        if level >= 3:
            again = rerun_share(
                checked, embedder, share=share, least=least, seed=seed, device=device, progress=progress
            )
            notes.append(f"level 3 {again.what}, chosen by --seed {again.seed}")
            if again.problems:
                raise Refused(again.problems)
            done(3)
        if level >= 4:
            full = rerun_all(checked, embedder, device=device, progress=progress)
            verification = _verification(checked, full, device)
            if full.problems:
                raise Refused(full.problems)
            done(4)
    except Refused as refused:
        return Report(
            bundle=str(path),
            id=checked.submission.id if checked else None,
            sha256=checked.bundle.sha256 if checked else None,
            level=level,
            passed=tuple(passed),
            problems=refused.problems,
            notes=tuple(notes),
            status="refused",
            verification=verification,
        )
    return Report(
        bundle=str(path),
        id=checked.submission.id,
        sha256=checked.bundle.sha256,
        level=level,
        passed=tuple(passed),
        notes=tuple(notes),
        status="accepted",
        verification=verification,
    )


def _verification(checked: Checked, full: Rerun, device: str) -> Verification:
    name, stated = headline(checked.evaluation) or (None, None)
    measured = full.headline[1] if full.headline else None
    plain = name in (None, "ers")
    return Verification(
        bundle_sha256=checked.bundle.sha256,
        agreed=not full.problems,
        ers_stated=checked.evaluation.ers,
        ers_measured=measured if plain else None,
        headline=None if plain else name,
        stated=None if plain else stated,
        measured=None if plain else measured,
        problems=tuple(f"{p.field}: {p.reason}" for p in full.problems),
        dmlbench=__version__,
        torch=torch.__version__,
        device=resolve_device(device).type,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

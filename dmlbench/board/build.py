"""The board's CSV files, made from what lies under ``leaderboard/submissions`` and from nothing else.

A folder there is a bundle (:mod:`dmlbench.submission.bundle`), or holds a ``claims.csv``: rows that a
paper or a README states and nobody has measured with this benchmark.
"""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from dmlbench.board.beyond import better_than
from dmlbench.board.row import PARTS, Row, Status, superseded
from dmlbench.board.table import from_csv, rank, ranked, to_csv
from dmlbench.checkpoints import ID, checkpoints, packaged
from dmlbench.errors import DataError
from dmlbench.files import write_atomic
from dmlbench.models.defended import network_of
from dmlbench.plain import read_json
from dmlbench.protocols import load_protocol, packaged_protocol, protocol_names
from dmlbench.results import Evaluation
from dmlbench.submission.bundle import SUBMISSIONS, VERIFICATIONS, Refused, verification_of
from dmlbench.submission.rerun import Verification
from dmlbench.submission.static import Opened, check_static

CLAIMS = "claims.csv"


def board_folder() -> Path:
    """The board that comes with this package (or lies in this repository)."""
    return packaged("leaderboard")


def rows_of(board: Path) -> list[Row]:
    """Every row of the board's submissions, unranked; raises as :func:`results_of`."""
    return [row for row, _ in results_of(board)]


def results_of(board: Path) -> list[tuple[Row, Evaluation | None]]:
    """Every row of the board's submissions, unranked, with the run that it was made from; a claim has none.

    Raises:
        DataError: a submission cannot be read or contradicts itself, or two give the same row.
    """
    results: list[tuple[Row, Evaluation | None]] = []
    seen: dict[tuple[str, ...], Path] = {}
    for folder in sorted((board / SUBMISSIONS).glob("*")):
        if not folder.is_dir() or folder.is_symlink():
            raise DataError(f"{folder} is no folder")
        if not re.fullmatch(ID, folder.name):
            raise DataError(f"{folder.name!a} is no name for a submission: small letters, digits, '.', '_' and '-'")
        claims = (folder / CLAIMS).exists()
        for row, run in ((row, None) for row in _claimed(folder)) if claims else [_measured(folder)]:
            key = tuple(unicodedata.normalize("NFKC", part).casefold() for part in row.key)
            if key in seen:
                raise DataError(f"{folder}: {row.model!r} under {row.protocol!r} is already in {seen[key]}")
            seen[key] = folder
            results.append((row, run))
    names = {folder.name for folder in seen.values()}
    for record in sorted((board / VERIFICATIONS).glob("*")):
        if record.suffix != ".json" or record.stem not in names:
            raise DataError(f"{record} is of no submission on the board")
    return results


def _claimed(folder: Path) -> Iterator[Row]:
    if others := sorted(path.name for path in folder.iterdir() if path.name != CLAIMS):
        raise DataError(f"{folder}: {others[0]!r} lies beside {CLAIMS}; a folder holds claims or a bundle")
    for row in from_csv(folder / CLAIMS):
        if row.status != "claimed" or not row.source or row.protocol_sha256:
            raise DataError(
                f"{folder / CLAIMS}: {row.model!r} must have status claimed, a source and no protocol_sha256"
            )
        if row.protocol not in protocol_names():
            raise DataError(f"{folder / CLAIMS}: {row.model!r} names the unknown protocol {row.protocol!r}")
        scores = {}
        for c in load_protocol(row.protocol).components:
            raw = getattr(row, f"{PARTS[c.name]}_raw") if c.name in PARTS else None
            if raw is not None:
                scores[f"{PARTS[c.name]}_score"] = round(float(c.rescale(raw)), 4)
        part_of = {f"{column}_score": name for name, column in PARTS.items()}
        worst = part_of[min(scores, key=lambda k: scores[k])] if scores else None
        yield row.model_copy(update={**scores, "worst_part": worst, "claimed_ers": row.ers, "submission": folder.name})


def _measured(folder: Path) -> tuple[Row, Evaluation]:
    """The row of a bundle, which passes level 0 as on the day it came, and its run."""
    try:
        checked = check_static(folder, aged=True)
    except Refused as refused:
        raise DataError(f"{folder}: {refused.problems[0]}") from None
    status = status_of(checked, verification_of(folder))
    return checked.row.model_copy(update={"status": status, "submission": folder.name}), checked.evaluation


def status_of(opened: Opened, verification: Path) -> Status:
    """What stands behind a measured row.

    Args:
        verification: where the record of a full rerun would lie.
    """
    e, submission = opened.evaluation, opened.submission
    card = checkpoints().get(network_of(e.model.id))
    if submission.retracted or submission.checkpoint.status == "retracted" or (card and card.status == "retracted"):
        return "retracted"
    known = packaged_protocol(e.protocol.name, e.protocol.sha256)
    if known is None or superseded(e.protocol.name, e.protocol.sha256, e.model.id):
        return "stale"
    if not verification.exists():
        return "reproduced"
    try:
        record = Verification.model_validate(read_json(verification.read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"{verification}: {error}") from None
    if record.bundle_sha256 != opened.bundle.sha256:
        raise DataError(f"{verification} speaks of another bundle: verify it again")
    return "verified" if record.agreed else "disputed"


def files_of(board: Path) -> dict[str, bytes]:
    """Each board's CSV by its path under the folder: ``<protocol>/<dataset>.csv``."""
    files: dict[str, list[Row]] = {}
    boards: dict[tuple[str, ...], list[tuple[Row, Evaluation]]] = {}
    for row, run in results_of(board):
        files.setdefault(f"{row.protocol}/{row.dataset}.csv", []).append(row)
        if run is not None and ranked(row):
            boards.setdefault(row.board, []).append((row, run))
    better: dict[tuple[str, ...], int] = {}
    for results in boards.values():
        counts = better_than([run for _, run in results])
        better |= {row.key: n for (row, _), n in zip(results, counts, strict=True) if n is not None}
    return {name: to_csv(rank(rows, better)) for name, rows in sorted(files.items())}


def differences(board: Path) -> list[str]:
    """How the committed CSV files differ from what the submissions give; empty where they do not."""
    expected = files_of(board)
    out = []
    for name, content in expected.items():
        path = board / name
        if not path.is_file():
            out.append(f"{name} is missing")
        elif path.read_bytes() != content:
            old, new = path.read_bytes().decode(errors="replace").splitlines(), content.decode().splitlines()
            at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            out.append(f"{name} differs from line {at + 1} on")
    out += [f"{name} comes from no submission" for name in committed(board) if name not in expected]
    return out


def committed(board: Path) -> list[str]:
    """The CSV files that are there."""
    return sorted(p.relative_to(board).as_posix() for p in board.glob("*/*.csv") if p.parent.name != "submissions")


def build(board: Path) -> list[str]:
    """Write every CSV file that differs and remove those that come from no submission; their names."""
    files = files_of(board)
    changed = []
    for name, content in files.items():
        path = board / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
            changed.append(name)
    for name in committed(board):
        if name not in files:
            (board / name).unlink()
            changed.append(name)
    return changed


def load_boards(board: Path) -> dict[str, list[Row]]:
    """Every committed board, by ``<protocol>/<dataset>``."""
    if not committed(board):
        raise DataError(f"{board} holds no board (no <protocol>/<dataset>.csv)")
    return {name.removesuffix(".csv"): from_csv(board / name) for name in committed(board)}

"""What a person may name as base or candidate: a run folder, a registered model, a row of a CSV file."""

from pathlib import Path

from dmlbench.board.row import Row
from dmlbench.board.table import from_csv
from dmlbench.checkpoints import checkpoints, packaged
from dmlbench.datasets import DATASETS
from dmlbench.errors import DataError, UsageError
from dmlbench.registry import suggest
from dmlbench.results import Evaluation, load


def find(text: str, protocol: str | None = None) -> Evaluation | Row:
    """The result that ``text`` names.

    Args:
        text: a run folder; ``MODEL@FILE.csv``, a row of a board (``FILE.csv:MODEL`` is the same); or the id of a registered model, whose
            stored run on the packaged board is taken.
        protocol: which one, where a model has several; by default the data set's own.

    Raises:
        UsageError: nothing of that name, or several.
        DataError: the folder or the file is there and cannot be used.
    """
    path = Path(text)
    if path.is_dir():
        return load(path)
    if path.is_file():
        hint = f"name a row as MODEL@{text}" if path.suffix == ".csv" else "a run is a folder"
        raise UsageError(f"{text} is a file; {hint}")
    model, at, file = text.partition("@")
    if at and file.endswith(".csv"):
        return _row(Path(file), model, protocol)
    if ".csv:" in text:
        file, *rest = text.split(".csv:")
        if len(rest) > 1:
            raise UsageError(f"{text!r} can be read in two ways: name a row as MODEL@FILE.csv")
        return _row(Path(f"{file}.csv"), rest[0], protocol)
    return _stored(text, protocol)


def _row(path: Path, model: str, protocol: str | None) -> Row:
    rows = from_csv(path)
    matches = [r for r in rows if r.model == model and protocol in (None, r.protocol)]
    if not matches:
        raise UsageError(f"{path} has no row of model {model!r}{suggest(model, {r.model for r in rows})}")
    if len(matches) > 1:
        choices = ", ".join(
            f"{r.protocol} on {r.dataset}, weights {(r.weights_sha256 or 'unknown')[:8]}" for r in matches
        )
        raise UsageError(f"{path} has {len(matches)} rows of model {model!r} ({choices}): choose one with --protocol")
    return matches[0]


def stored_runs() -> list[Path]:
    """Run folders of the submissions on the packaged board."""
    return sorted(p.parent for p in packaged("leaderboard").glob("submissions/*/run/evaluation.json"))


def _usual(dataset: str) -> str | None:
    """The protocol that a data set is measured by when none is named."""
    return DATASETS[dataset].protocol if dataset in DATASETS else None


def _stored(model: str, protocol: str | None) -> Evaluation:
    runs = [(folder, load(folder, arrays=False, sample=False)) for folder in stored_runs()]
    mine = [(folder, e) for folder, e in runs if e.model.id == model and protocol in (None, e.protocol.name)]
    if len(mine) > 1:  # the data set's own protocol is what evaluate runs when nothing else is said
        mine = [run for run in mine if run[1].protocol.name == _usual(run[1].dataset.name)] or mine
    if len(mine) > 1:
        names = ", ".join(sorted(e.protocol.name for _, e in mine))
        raise UsageError(f"model {model!r} has stored runs under several protocols ({names}): choose with --protocol")
    if mine:
        return load(mine[0][0], sample=False)
    if model in checkpoints():
        under = f" under protocol {protocol!r}" if protocol else ""
        raise DataError(f"model {model!r} is registered but has no stored run{under}: evaluate it first")
    known = [*checkpoints(), *(e.model.id for _, e in runs)]
    raise UsageError(
        f"{model!r} is no run folder, no MODEL@FILE.csv and no registered model{suggest(model, set(known))}"
    )

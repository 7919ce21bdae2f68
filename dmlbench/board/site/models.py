"""The page of one model: what it is, how it was made, what was measured of it, and how to do that again."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dmlbench.board.plots.figures import eps
from dmlbench.board.plots.page import inline
from dmlbench.board.row import HEADLINES, Row, defense_text
from dmlbench.board.site.boards import TITLES, row_id, title
from dmlbench.board.site.overview import anchor, cell
from dmlbench.checkpoints import PACKAGE, Checkpoint, File, Paper, checkpoints
from dmlbench.kinds.table import kind_of
from dmlbench.models.defended import behind
from dmlbench.protocols import load_protocol, protocol_names
from dmlbench.results import Evaluation

Place = tuple[str, int, Row]
"""The protocol, the place in its table and the row itself."""


def path_of(model: str) -> str:
    """Where the page of a model lies."""
    return f"models/{anchor(model)}.html"


def page(
    model: str,
    places: Sequence[Place],
    card: Checkpoint | None,
    runs: Mapping[str, Evaluation],
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """All that the page shows.

    Args:
        places: where its rows stand.
        card: what it is, as the submission or the registry says.
        runs: by submission.
        weights: by name of a file, where its copy lies in the site.
    """
    held = [(r, runs[r.submission]) for _, _, r in places if r.submission and r.submission in runs]
    registered = checkpoints().get(model)
    return {
        "model": model,
        "card": card.model_copy(update={"title": behind(card.title, model)}) if card else None,
        "registered": registered is not None,
        "status": registered if registered is not None and registered.status != "active" else None,
        "facts": _facts(card, model) if card else [],
        "files": [_file(f, weights) for f in card.files] if card else [],
        "bibtex": _bibtex(card.paper) if card and card.paper else "",
        "results": [_result(*place, runs) for place in places],
        "flags": [(r.protocol, r.dataset, w.flag, w.message) for r, e in held for w in e.warnings],
        "curves": [drawn for r, e in held if (drawn := _curve(r, e))],
    }


def _facts(card: Checkpoint, model: str) -> list[tuple[str, str]]:
    arch = ", ".join(f"{key} {value}" for key, value in card.arch.kwargs.items())
    size = card.input.size if isinstance(card.input.size, tuple) else (card.input.size, card.input.size)
    made = card.train
    facts = [
        ("Network", f"{card.arch.builder}{f' ({arch})' if arch else ''}"),
        ("Parameters", f"{card.arch.n_params:,}" if card.arch.n_params else ""),
        ("Embedding", f"{card.arch.embed_dim} numbers, {'on the unit sphere' if card.embedding.normalized else 'of any length'}, "
                      f"{card.embedding.metric} distance"),
        ("Input", f"{card.input.channels} × {size[0]} × {size[1]}"),
        ("Trained on", f"{card.dataset.name}, {card.dataset.split}"
                       + (f", and {card.extra_training_data}" if card.extra_training_data else "")),
        ("Loss", made.loss),
        ("Defence", behind(defense_text(card), model)),
        ("eps in training", made.eps or ""),
        ("Steps of its attack", str(made.steps) if made.steps else ""),
        ("Training", ", ".join(f"{n:,} {what}" for n, what in ((made.epochs, "epochs"), (made.iterations, "iterations")) if n)),
        ("Seed", "" if made.seed is None else str(made.seed)),
        ("Licence", card.license),
    ]  # fmt: skip
    return [(name, value) for name, value in facts if value]


def local(file: File) -> Path | None:
    """The file where it lies in this package or in this checkout."""
    for folder, name in ((PACKAGE / "weights", file.path), (PACKAGE.parent / "checkpoints", file.url)):
        if name and (folder / (last := name.rpartition("/")[2])).is_file():
            return folder / last
    return None


def _file(file: File, weights: Mapping[str, str]) -> dict[str, Any]:
    name = (file.path or file.url or "").rpartition("/")[2]
    outside = [a for a in (file.url, *file.mirrors) if a and a.startswith("https://")]
    return {
        "name": name or "weights",
        "path": weights.get(name),
        "addresses": outside,
        "manual": file.manual,
        "bytes": f"{file.bytes:,}" if file.bytes else "",
        "sha256": file.sha256,
    }


def _bibtex(paper: Paper) -> str:
    if paper.bibtex:
        return paper.bibtex
    key = anchor(paper.title.split(":")[0].lower())[:40].strip("-")
    fields = {"title": f"{{{paper.title}}}", "howpublished": paper.venue, "year": paper.year, "url": paper.url}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{lines}\n}}"


def _result(protocol: str, n: int, row: Row, runs: Mapping[str, Evaluation]) -> dict[str, Any]:
    column = next((c for c in HEADLINES if cell(row, c).value), None)
    return {
        "row": row,
        "title": title(protocol),
        "page": f"datasets/{anchor(row.dataset)}.html#{row_id(protocol, n, row)}",
        "recall": cell(row, "recall_at_1"),
        "name": TITLES[column] if column else "",
        "score": cell(row, column) if column else None,
        "command": command(row),
        "submission": row.submission if row.submission in runs else None,
    }


def command(row: Row) -> str:
    """What measures the row again, under the version of the protocol that it was measured by."""
    protocol = row.protocol
    if protocol in protocol_names() and row.protocol_version not in (None, load_protocol(protocol).version):
        protocol = f"{protocol}@{row.protocol_version}"
    parts = ["dmlbench", "evaluate", "--model", row.model, "--dataset", row.dataset, "--protocol", protocol]
    return shlex.join([*parts, "--out", f"runs/{row.model}-{row.protocol}"])


def _curve(row: Row, e: Evaluation) -> Markup | None:
    curve = kind_of(e).curve(e)
    if curve is None or curve.points[0].value is None:
        return None
    figure = eps([(row.model, e)])
    heading = f"{curve.title} against eps, {row.dataset} under {row.protocol}"
    return inline(figure, f"curve-{anchor(row.protocol)}-{anchor(row.dataset)}", heading, 5.0, 2.8)

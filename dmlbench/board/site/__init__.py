"""The board as a static site: pages that need no server and load nothing from elsewhere.

A front page over all data sets, one page for each data set with a tab for each of its boards, one for each measured model,
and the words. Each has its style and script inside and a content security policy that allows only those two. Every text
goes through Jinja2's escaping.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dmlbench.board.build import CLAIMS, load_boards
from dmlbench.board.row import STATUSES, Row
from dmlbench.board.site import models
from dmlbench.board.site.boards import board, head
from dmlbench.board.site.overview import Entry, anchor, by_dataset, entries, eps_of, filled, of_pictures
from dmlbench.board.site.words import words
from dmlbench.checkpoints import PACKAGE, Checkpoint, checkpoints
from dmlbench.datasets import DATASETS
from dmlbench.files import prepare_folder, write_atomic
from dmlbench.results import Evaluation, load
from dmlbench.submission.bundle import SUBMISSIONS
from dmlbench.submission.record import read_submission

TEMPLATES = PACKAGE / "templates"
MEASURED, CLAIMED = 5, 3
"""How many models of a data set the front page shows."""


def write_site(folder: Path, out: Path) -> list[str]:
    """Write the pages of the board in ``folder`` into ``out``; their paths.

    Beside them lie the CSV files, and of every measured row whose submission is at hand the run's record, the checkpoint's
    record and the weights.
    """
    boards = load_boards(folder)
    runs = _runs(folder)
    sets = by_dataset(boards)
    files: dict[str, bytes] = {f"{name}.csv": (folder / f"{name}.csv").read_bytes() for name in boards}
    files |= {f"runs/{name}.json": _json(run.model_dump(mode="json")) for name, run in runs.items()}
    places: dict[str, list[models.Place]] = {}
    for of_set in sets.values():
        for protocol, rows in of_set.items():
            for n, row in enumerate(rows):
                if row.status != "claimed":
                    places.setdefault(row.model, []).append((protocol, n, row))
    pages = Pages(sets, places)
    lists = {dataset: entries(of_set) for dataset, of_set in sets.items()}
    pages.add("index.html", "index.html.j2", tabs=_front(lists))
    for dataset, of_set in sets.items():
        pages.add(
            f"datasets/{anchor(dataset)}.html", "dataset.html.j2", dataset=dataset, title=_title(dataset), at=eps_of(lists[dataset]), rows=lists[dataset],
            columns=[head(c) for c in filled(lists[dataset])], boards=[board(protocol, dataset, rows) for protocol, rows in of_set.items()],
        )  # fmt: skip
    for model, there in places.items():
        card = _card(folder, (row for _, _, row in there)) or checkpoints().get(model)
        if card:
            files[f"checkpoints/{anchor(model)}.json"] = _json(card.model_dump(mode="json", exclude_none=True))
        weights = {}
        for file in card.files if card else ():
            if path := models.local(file):
                weights[path.name] = f"weights/{path.name}"
                files[weights[path.name]] = path.read_bytes()
        pages.add(models.path_of(model), "model.html.j2", **models.page(model, there, card, runs, weights))
    pages.add("words.html", "words.html.j2")
    prepare_folder(out)
    files |= {page: text.encode() for page, text in pages.written.items()}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, content)
    return list(pages.written)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _title(dataset: str) -> str:
    return DATASETS[dataset].title if dataset in DATASETS else ""


def _runs(folder: Path) -> dict[str, Evaluation]:
    """The run of every submission that is at hand; an installed package has those of some."""
    places = sorted(p for p in (folder / SUBMISSIONS).glob("*") if not (p / CLAIMS).exists())
    return {place.name: load(place / "run", sample=False) for place in places}


def _card(folder: Path, rows: Iterable[Row]) -> Checkpoint | None:
    """What a model is, as the first of its submissions that is at hand says, or the registry."""
    for row in rows:
        if row.submission and (file := folder / SUBMISSIONS / row.submission / "submission.yaml").is_file():
            return read_submission(file.read_bytes()).checkpoint
    return None


def _front(lists: Mapping[str, list[Entry]]) -> list[dict[str, Any]]:
    """What the front page has under each of its tabs, the first few models of each data set."""
    boards_shown = []
    for name, pictures in (("Real pictures", True), ("Small pictures", False)):
        groups: list[dict[str, Any]] = []
        for dataset, rows in lists.items():
            if of_pictures(dataset) == pictures:
                measured = [e for e in rows if e.row.status != "claimed"]
                claimed = [e for e in rows if e.row.status == "claimed"]
                shown = measured[:MEASURED] + claimed[: CLAIMED if measured else MEASURED]
                groups.append(
                    {
                        "dataset": dataset,
                        "title": _title(dataset),
                        "rows": shown,
                        "at": eps_of(rows),
                        "measured": len(measured),
                        "claimed": len(claimed),
                        "path": f"datasets/{anchor(dataset)}.html",
                    }
                )
        if groups:
            columns = [head(c) for c in filled([e for group in groups for e in group["rows"]])]
            boards_shown.append({"id": anchor(name.lower()), "title": name, "groups": groups, "columns": columns})
    return boards_shown


class Pages:
    """The pages that have been made, by path, each with the words that it explains."""

    def __init__(self, sets: Mapping[str, Any], places: Mapping[str, Any]) -> None:
        self.written: dict[str, str] = {}
        self.environment = environment()
        self.shared = {
            "datasets": [(dataset, f"datasets/{anchor(dataset)}.html") for dataset in sets],
            "has_page": set(places),
        }

    def add(self, path: str, template: str, **content: Any) -> None:
        """Make a page."""
        root = "../" * path.count("/")
        page = self.environment.get_template(template).render(**self.shared, **content, root=root, current=path)
        used = [name for name in words() if f'popovertarget="word-{name}"' in page]
        meanings = self.environment.get_template("meanings.html.j2").render(used={name: words()[name] for name in used})
        self.written[path] = page.replace("<!--meanings-->", meanings)


def environment() -> jinja2.Environment:
    """The templates, escaping, with the style and the script that pages carry."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    for name in ("style", "script"):
        text = (TEMPLATES / {"style": "site.css", "script": "site.js"}[name]).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        made.globals[name] = Markup(text)  # our own file, not data
        made.globals[f"{name}_hash"] = f"sha256-{digest}"
    made.globals |= {"words": words(), "statuses": STATUSES, "path_of": models.path_of}
    made.filters["anchor"] = anchor
    made.filters["address"] = lambda text: text if re.match(r"https://", text or "") else ""
    return made

"""How much of what ``strict`` calls robust a far stronger adversary breaks.

    python benchmarks/strict_truth.py leaderboard/submissions/digits-smallcnn-proxyanchor-at-strict --out truth
    python benchmarks/strict_truth.py --model digits-smallcnn-proxyanchor-at --protocol strict --out truth

A RUN is a run folder or a bundle of a protocol of kind "strict"; ``--model`` makes the run first. At each eps, smallest
first, every query that the run says survived is attacked by the searches of ``SEARCHES``, one after the other; what
breaks at one eps is broken at every larger one. The searches are those of ``adversary.py``, which share no code with
dmlbench's; from dmlbench come the model, the data set, the run's outcomes and, at the end, the read-out and the ball
check of each broken image: without these a break does not count.

OUT/cells keeps one file for each run and eps, written whole after every few seconds of work: the same command goes on
where it was stopped. The table of everything in OUT is printed and written to OUT/strict_truth.md and .json.
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adversary import Ball, Field, Found, climb, likeliest, seed_of, square
from torch import Tensor

from dmlbench import evaluate, load_dataset, load_model, load_protocol
from dmlbench.compact import npz_bytes, read_npz
from dmlbench.errors import DataError, DmlbenchError, Interrupted, UsageError
from dmlbench.fast.exact import true_float32
from dmlbench.files import write_atomic
from dmlbench.metrics import recall_at_1
from dmlbench.models.defended import network_of
from dmlbench.results import Evaluation, json_bytes, load, save
from dmlbench.run.subject import Subject, prepare, query_order
from dmlbench.threat import Threat, length

Chosen = tuple[Tensor, np.ndarray]
"""Some attempts of a search: the query of each, and the number of the attempt."""


@dataclass(frozen=True)
class Search:
    """One way to look for a misranked image, tried ``attempts`` times on every query that is still unbroken.

    Attributes:
        kind: "restart" (a random start, uniform and on a corner in turn), "entry" (the same, toward one wrong entry
            after the other, nearest first), "transfer" (from another query's perturbation, the likeliest first), "undefended"
            (restarts along the gradient of the model without its test-time defence; no attempt at a model without one)
            or "square".
        steps: of each attempt; forward passes where the kind is "square".
        momentum, wider, first: see :func:`adversary.climb`.
    """

    name: str
    kind: str
    attempts: int
    steps: int
    momentum: float = 0.75
    wider: float = 1.0
    first: float = 1.0


SEARCHES = (
    Search("restarts of 60 steps", "restart", 60, 60),
    Search("50 wrong entries", "entry", 50, 60),
    Search("transfer", "transfer", 10, 60, first=0.5),
    Search("momentum 0", "restart", 4, 100, momentum=0.0),
    Search("momentum 0.9", "restart", 4, 100, momentum=0.9),
    Search("from a wider ball", "restart", 8, 100, wider=2.0),
    Search("restarts of 200 steps", "restart", 10, 200),
    Search("restarts of 1,000 steps", "restart", 3, 1000),
    Search("on the undefended model", "undefended", 20, 100),
    Search("Square, 20,000 queries", "square", 1, 20_000),
)
"""About 14,000 gradients (16,000 behind a defence) and 20,000 further forward passes for a query that nothing breaks."""
SMALLER = "a smaller eps"
DONORS = 400
"""Perturbations of others that "transfer" chooses from, at most."""
FEW = 64
"""Attempts that are not worth a thread of their own, at most."""


@dataclass
class Cell:
    """One run at one eps: what is found so far, and how far the searches are.

    Attributes:
        about: what it depends on; a cell of another command is not gone on with.
        survivors: (Q,) bool, by the run.
        by: (Q,) which search broke it, -1 none, len(SEARCHES) a smaller eps.
        images: (C, H, W) each, the misranked images, by query.
        best: (Q,) the largest margin that any search saw.
        search, done: the search in progress and how many of its attempts are done ...
        pool: (n,) ... on these queries, those unbroken when it began.
        passes: (searches,) forward passes of one image, those of gradients among them.
        refused: images that the searches call misranked and dmlbench does not.
        seconds: of processors, all threads together.
    """

    about: dict[str, Any]
    survivors: np.ndarray
    by: np.ndarray
    images: dict[int, np.ndarray]
    best: np.ndarray
    search: int
    done: int
    pool: np.ndarray
    passes: np.ndarray
    refused: int
    seconds: float

    @property
    def alive(self) -> np.ndarray:
        """(Q,) bool, survivors that nothing has broken yet."""
        return self.survivors & (self.by < 0)

    def write(self, path: Path) -> None:
        """Keep it, whole or not at all."""
        arrays = {k: np.asarray(v) for k, v in vars(self).items() if k not in ("about", "images")}
        arrays["at"] = np.array(sorted(self.images), dtype=np.int64)
        arrays["images"] = np.stack([self.images[i] for i in sorted(self.images)]) if self.images else np.zeros(0)
        arrays["about"] = np.frombuffer(json.dumps(self.about, sort_keys=True).encode(), np.uint8)
        write_atomic(path, npz_bytes(arrays))

    @classmethod
    def read(cls, path: Path) -> "Cell":
        """One that was kept."""
        arrays: dict[str, Any] = read_npz(path)
        try:
            arrays["about"] = json.loads(arrays["about"].tobytes())
            arrays["images"] = dict(zip(arrays.pop("at").tolist(), arrays["images"], strict=True))
            return cls(**arrays | {k: arrays[k].item() for k in ("search", "done", "refused", "seconds")})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a cell of this script: {error}") from None


def field_of(subject: Subject) -> Field:
    """What searches see of a prepared subject."""
    images, dataset = subject.dataset.images, subject.dataset

    def embedded(rows: np.ndarray) -> Tensor:
        with torch.no_grad():
            parts = [subject.embedder(images[r].to(subject.device)) for r in np.array_split(rows, -(-len(rows) // 256))]
        return torch.cat(parts)

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(subject.device)

    position = np.full(len(dataset.labels), -1)
    position[dataset.gallery] = np.arange(len(dataset.gallery))
    return Field(
        subject.embedder,
        embedded(dataset.gallery),
        column(dataset.labels[dataset.gallery]),
        column(dataset.labels[subject.rows]),
        column(position[subject.rows]),
        images[subject.rows].to(subject.device),
        None
        if dataset.apart is None
        else (column(dataset.apart[subject.rows]), column(dataset.apart[dataset.gallery])),
    )


@dataclass(frozen=True)
class Bench:
    """A model with its queries, the field that searches see, and how work is spread.

    Attributes:
        subject: as dmlbench reads out.
        undefended: the field of the model without its test-time defence, if it has one.
        effort: factor on the number of attempts of every search.
    """

    subject: Subject
    field: Field
    undefended: Field | None
    seed: int
    effort: float
    threads: int
    stopped: threading.Event

    @property
    def batch(self) -> int:
        """Images of one forward pass, so that their pixels and their distances fit a processor's cache roughly."""
        pixels = int(np.prod(self.field.clean.shape[1:]))
        return max(16, min(2048, 2**18 // pixels, 2**22 // len(self.field.entries)))

    def stop(self) -> None:
        """End a search whose command was interrupted."""
        if self.stopped.is_set():
            raise Interrupted("stopped")

    def seeds(self, eps: float, search: int, q: Tensor, attempts: np.ndarray) -> list[int]:
        """One for each start, whatever the batch: by the image's row, not by its place among the others."""
        rows = self.subject.rows[q.cpu().numpy()]
        return [
            seed_of(self.seed, round(eps * 1e9), search, int(a), int(r)) for a, r in zip(attempts, rows, strict=True)
        ]

    def confirmed(self, threat: Threat, q: Tensor, images: Tensor) -> np.ndarray:
        """(b,) bool: dmlbench's own read-out and ball check of images said to be misranked."""
        with torch.no_grad(), true_float32():
            wrong = recall_at_1(self.subject.embedder(images), self.subject.scene[q]) == 0
            return (wrong & threat.contains(images, self.field.clean[q])).cpu().numpy()


def ready(bench: Bench, cell: Cell, index: int, ball: Ball) -> tuple[int, Callable[[Chosen], Found]]:
    """How many attempts a search makes at each query of the cell's pool, and what makes some of them."""
    search, field = SEARCHES[index], bench.field
    pool = torch.from_numpy(cell.pool).to(field.clean.device)
    attempts = max(1, round(search.attempts * bench.effort))

    def climbed(q: Tensor, start: Tensor, targets: Tensor | None = None) -> Found:
        s = search
        options: dict[str, Any] = {"momentum": s.momentum, "wider": s.wider, "first": s.first, "stop": bench.stop}
        options["along"] = bench.undefended if s.kind == "undefended" else None
        return climb(field, ball, q, start, steps=s.steps, targets=targets, **options)

    def starts(q: Tensor, tries: np.ndarray) -> Tensor:
        seeds, corner = bench.seeds(ball.eps, index, q, tries), torch.from_numpy(tries % 2 == 1)
        start = ball.start(field.clean[q], seeds, False)
        corners = corner.nonzero()[:, 0].tolist()
        if corners:
            start[corners] = ball.start(field.clean[q[corners]], [seeds[i] for i in corners], True)
        return start

    if search.kind in ("restart", "undefended"):
        possible = attempts if search.kind == "restart" or bench.undefended else 0
        return possible, lambda chosen: climbed(chosen[0], starts(*chosen))
    if search.kind == "square":
        queries = max(1, round(search.steps * bench.effort))
        return 1, lambda chosen: square(
            field, ball, chosen[0], bench.seeds(ball.eps, index, *chosen), queries=queries, stop=bench.stop
        )
    place = torch.full((len(field.labels),), -1, device=pool.device)
    place[pool] = torch.arange(len(pool), device=pool.device)
    if search.kind == "entry":
        lists = [field.wrong_entries(part, attempts) for part in pool.split(bench.batch)]
        attempts = min(one.shape[1] for one in lists)
        entries = torch.cat([one[:, :attempts] for one in lists])

        def toward(chosen: Chosen) -> Found:
            q, tries = chosen
            return climbed(q, starts(q, tries), entries[place[q], torch.from_numpy(tries).to(q.device)])

        return attempts, toward
    moves = donors(bench, cell, ball)
    attempts = min(attempts, len(moves))
    if not attempts:
        return 0, lambda chosen: climbed(chosen[0], starts(*chosen))
    picked, passes = likeliest(field, ball, pool, moves, attempts, bench.stop)
    cell.passes[index] += passes

    def carried(chosen: Chosen) -> Found:
        q, tries = chosen
        move = moves[picked[place[q], torch.from_numpy(tries).to(q.device)]]
        return climbed(q, ball.project(field.clean[q] + move, field.clean[q]))

    return attempts, carried


def donors(bench: Bench, cell: Cell, ball: Ball) -> Tensor:
    """(m, C, H, W) perturbations that break other queries: those found so far, and of queries that fell to the run."""
    field = bench.field
    parts = [torch.from_numpy(image).to(field.clean.device)[None] - field.clean[i] for i, image in cell.images.items()]
    others = query_order(len(cell.by))
    others = others[~cell.survivors[others]][: max(0, DONORS - len(parts))]
    for q in torch.from_numpy(others).to(field.clean.device).split(bench.batch):
        seeds = bench.seeds(ball.eps, len(SEARCHES), q, np.zeros(len(q), dtype=int))
        found = climb(field, ball, q, ball.start(field.clean[q], seeds, False), steps=60, stop=bench.stop)
        parts.append(found.images[found.broken] - field.clean[q[found.broken]])
    return torch.cat(parts) if parts else field.clean[:0]


def attack(bench: Bench, cell: Cell, threat: Threat, path: Path, say: Callable[[str], None]) -> None:
    """Every search that the cell has not had yet, on what is unbroken."""
    ball = Ball(threat.norm, threat.radius)
    with ThreadPoolExecutor(bench.threads) as workers:
        while cell.search < len(SEARCHES) and cell.alive.any():
            started = time.process_time()
            if cell.done == 0:
                cell.pool = np.flatnonzero(cell.alive)
            attempts, make = ready(bench, cell, cell.search, ball)
            total = attempts * len(cell.pool)
            while cell.done < total and cell.alive.any():
                todo = np.arange(cell.done, total)
                todo = todo[cell.alive[cell.pool[todo % len(cell.pool)]]][: bench.threads * bench.batch]
                pieces = [
                    (torch.from_numpy(cell.pool[p % len(cell.pool)]).to(bench.field.clean.device), p // len(cell.pool))
                    for p in np.array_split(todo, max(1, min(bench.threads, len(todo) // FEW)))
                    if len(p)
                ]
                running = [workers.submit(make, piece) for piece in pieces]
                try:
                    found = [future.result() for future in running]
                except BaseException:
                    bench.stopped.set()
                    raise
                for (q, _), one in zip(pieces, found, strict=True):
                    absorb(bench, cell, threat, q, one)
                cell.done = int(todo[-1]) + 1 if len(todo) else total
                cell.seconds += time.process_time() - started
                started = time.process_time()
                cell.write(path)
                name, broken = SEARCHES[cell.search].name, int((cell.by >= 0).sum())
                say(f"{name}: {cell.done} of {total} attempts, {broken} broken, {cell.seconds:.0f} CPU s")
            cell.search, cell.done = cell.search + 1, 0
            cell.write(path)
    cell.search = len(SEARCHES)
    cell.write(path)


def absorb(bench: Bench, cell: Cell, threat: Threat, q: Tensor, found: Found) -> None:
    """Note what some attempts found; an image counts once dmlbench reads it as misranked and inside the ball."""
    cell.passes[cell.search] += found.passes
    np.maximum.at(cell.best, q.cpu().numpy(), found.best.cpu().numpy())
    hit = found.broken.nonzero()[:, 0]
    if not len(hit):
        return
    sure = bench.confirmed(threat, q[hit], found.images[hit])
    cell.refused += int((~sure).sum())
    for i in hit[torch.from_numpy(sure).to(hit.device)].tolist():
        position = int(q[i])
        if cell.by[position] < 0:
            cell.by[position], cell.images[position] = cell.search, found.images[i].cpu().numpy()


def held(about: dict[str, Any], broken: int) -> bool | None:
    """Does the bound hold, which is of all queries of the run? None where too few of them were attacked to tell, or none is stated.
    Cells that earlier versions wrote do not know how many those are."""
    bound, of = about["bound"], about.get("of")
    if bound is None or of is None:
        return None
    if 100.0 * broken / max(1, of) > bound:
        return False
    return True if about["counted"] == of else None


def row_of(cell: Cell) -> dict[str, Any]:
    """What the table says of a cell."""
    about, survivors, broken = cell.about, int(cell.survivors.sum()), int((cell.by >= 0).sum())
    by = {name: int((cell.by == i).sum()) for i, name in enumerate([*(s.name for s in SEARCHES), SMALLER])}
    counted, right = max(1, about["counted"]), max(1, about["right"])
    gradients = sum(int(n) for s, n in zip(SEARCHES, cell.passes, strict=True) if s.kind != "square")
    return {
        **{key: about[key] for key in ("model", "dataset", "protocol", "eps", "queries", "right", "effort", "bound")},
        "survivors": survivors,
        "broken": broken,
        "share_of_right": 100.0 * broken / right,
        "broken_by": {name: count for name, count in by.items() if count},
        "strict": 100.0 * survivors / counted,
        "truth": 100.0 * (survivors - broken) / counted,
        "bound_holds": held(about, broken),
        "passes": {s.name: int(n) for s, n in zip(SEARCHES, cell.passes, strict=True)},
        "gradients": [about["spent"], gradients / max(1, survivors)],
        "refused": cell.refused,
        "seconds": cell.seconds,
        "finished": cell.search == len(SEARCHES),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; "gradients" are the run's for each query that a step attacked and this script's for each survivor. A bound is "open"
    where it is of more queries than were attacked, and these do not refute it."""
    head = (
        "| model | eps | queries | right | survivors | broken | by | % of right | R@1 strict → truth | stated: at most "
    )
    head += "| gradients | CPU s |"
    lines = [head, "|" + " --- |" * (head.count("|") - 1)]
    for r in rows:
        by = ", ".join(f"{name} {count}" for name, count in r["broken_by"].items()) or "–"
        word = {True: "holds", False: "**fails**", None: "open"}[r["bound_holds"]]
        bound = "–" if r["bound"] is None else f"{r['bound']:.1f} {word}"
        share = f"{r['share_of_right']:.2f}" + ("" if r["finished"] else " so far")
        cells = [r["model"], r["eps"], r["queries"], r["right"], r["survivors"], r["broken"], by, share]
        cells += [f"{r['strict']:.1f} → {r['truth']:.1f}", bound]
        cells += [" → ".join(f"{n:,.0f}" for n in r["gradients"]), f"{r['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def cells_of(run: Evaluation, options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Of each eps of a run, smallest first: its name, (Q,) bool which of its queries survived, and what it says."""
    if "strict" not in run.extras:
        raise UsageError(f"the run of {run.model.id} is of protocol {run.protocol.name}, which has no worst case")
    known = [stated["eps"] for stated in run.extras["strict"]["curve"]]
    for eps in options.eps or ():
        if eps not in known:
            raise UsageError(f"the run of {run.model.id} has no eps {eps}, it has {', '.join(known)}")
    for stated in run.extras["strict"]["curve"]:
        if options.eps and stated["eps"] not in options.eps:
            continue
        value = run.arrays[f"strict@{stated['eps']}/value"]
        yield stated["eps"], value == 100.0, stated


def opened(path: Path) -> Evaluation:
    """A run folder, or the run of a bundle."""
    return load(path / "run" if (path / "run").is_dir() else path, sample=False)


def made(options: argparse.Namespace) -> Evaluation:
    """The run of ``--model`` under ``--protocol``, made unless it was."""
    folder = (
        options.out
        / "runs"
        / re.sub(r"[^\w.@-]+", "_", f"{options.model}-{options.protocol}-{options.queries or 'all'}")
    )
    if not (folder / "manifest.json").exists():
        model = load_model(options.model)
        if model.card is None:
            raise UsageError(f"{options.model!r} is not a registered model: evaluate it and name the run folder")
        data = load_dataset(model.card.dataset.name)
        print(f"{options.model}: running {options.protocol}", file=sys.stderr)
        rules = load_protocol(options.protocol)
        save(evaluate(model, data, rules, limit=options.queries, device=options.device), folder)
    return load(folder, sample=False)


def verified(run: Evaluation, options: argparse.Namespace) -> None:
    """Attack what survived in one run, at every eps."""
    model, dataset = load_model(run.model.id), load_dataset(run.dataset.name, split=run.dataset.split)
    if run.model.weights_sha256 != model.weights_sha256 or run.dataset.sha256 != dataset.sha256:
        raise DataError(f"the run of {run.model.id} was made with other weights or other images than are found here")
    rows = run.arrays["query"]
    if options.queries and options.queries < len(rows):
        order = dataset.query[query_order(len(dataset.query))]
        rows = np.sort(order[np.isin(order, rows)][: options.queries])
    at = np.searchsorted(run.arrays["query"], rows)
    measured, network = replace(dataset, query=rows), network_of(run.model.id)
    subject = prepare(model, measured, device=options.device)
    undefended = None
    if network != run.model.id:
        undefended = field_of(prepare(load_model(network), measured, device=options.device))
    bench = Bench(
        subject, field_of(subject), undefended, options.seed, options.effort, options.threads, threading.Event()
    )
    clean = run.arrays["benign/recall_at_1"][at]
    smaller: dict[int, np.ndarray] = {}
    for eps, survived, stated in cells_of(run, options):
        protocol = f"{run.protocol.name} {run.protocol.version}"
        about = {
            "model": run.model.id,
            "weights": run.model.weights_sha256,
            "dataset": run.dataset.name,
            "protocol": protocol,
            "run": run.date,
            "eps": eps,
            "queries": len(rows),
            "counted": int((~np.isnan(clean)).sum()),
            "of": int((~np.isnan(run.arrays["benign/recall_at_1"])).sum()),
            "right": int((clean == 100).sum()),
            "bound": stated.get("missed_at_most"),
            "spent": sum(step["gradients"] / max(1, step["attacked"]) for step in stated.get("steps", ())),
            "seed": options.seed,
            "effort": options.effort,
            "searches": [vars(s) for s in SEARCHES],
        }
        survivors = survived[at]
        images = {i: image for i, image in smaller.items() if survivors[i]}
        by = np.full(len(rows), -1)
        by[list(images)] = len(SEARCHES)
        lowest, spent = np.full(len(rows), -np.inf, dtype=np.float32), np.zeros(len(SEARCHES), dtype=np.int64)
        cell = Cell(about, survivors, by, images, lowest, 0, 0, np.zeros(0, dtype=np.int64), spent, 0, 0.0)
        name = re.sub(r"[^\w.@-]+", "_", f"{run.model.id}-{protocol}@{eps}")
        path = options.out / "cells" / f"{name}.npz"
        if path.exists():
            kept = Cell.read(path)
            if kept.about != about:
                differ = ", ".join(k for k in about if kept.about.get(k) != about[k])
                raise UsageError(f"{path} is of another command (it differs in {differ}): name another --out")
            cell = kept
        threat = Threat(norm=run.extras["strict"]["norm"], eps=eps)
        attack(bench, cell, threat, path, lambda text, e=eps: print(f"{run.model.id} @ {e} {text}", file=sys.stderr))
        smaller |= cell.images


def report(out: Path) -> None:
    """The table of every cell in the folder."""
    cells = [Cell.read(path) for path in sorted((out / "cells").glob("*.npz"))]
    rows = sorted((row_of(c) for c in cells), key=lambda r: (r["dataset"], r["model"], r["protocol"], length(r["eps"])))
    write_atomic(out / "strict_truth.json", json_bytes(rows))
    write_atomic(out / "strict_truth.md", table(rows).encode())
    print(table(rows), end="")


def main(words: Sequence[str] | None = None) -> int:
    """Attack the survivors of each run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder or bundle of a strict protocol")
    parser.add_argument("--model", help="registered model to make a run of first")
    parser.add_argument("--protocol", default="strict", help="of that run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, help="only the first so many of the fixed shuffle that --limit uses")
    parser.add_argument("--eps", action="append", help="only this eps of the run's grid; may be repeated")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the attempts of every search")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    try:
        if not options.runs and not options.model:
            raise UsageError("name a RUN or a --model")
        if options.effort <= 0 or options.threads < 1 or (options.queries is not None and options.queries < 1):
            raise UsageError("--effort, --threads and --queries must be above 0")
        (options.out / "cells").mkdir(parents=True, exist_ok=True)
        for path in options.runs:
            verified(opened(path), options)
        if options.model:
            verified(made(options), options)
        report(options.out)
    except DmlbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

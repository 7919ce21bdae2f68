"""Train the models of docs/findings.md over several seeds, measure them, and write its table and figure.

    python benchmarks/findings.py train --group key --seed 0     # runs/findings/<run>, what is missing
    python benchmarks/findings.py measure --group key            # docs/findings.csv, what is missing
    python benchmarks/findings.py report                          # docs/findings-tables.md, docs/findings.svg

Runs and rows that exist are kept, so each command can be stopped and started again.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from dmlbench.checkpoints import sha256_of
from dmlbench.embedding import Embedder
from dmlbench.errors import DmlbenchError
from dmlbench.evaluate import evaluate
from dmlbench.models import build, fill, read_weights
from dmlbench.recipe import load_recipe
from dmlbench.registration import read_entry
from dmlbench.training import train as train_run

ROOT = Path(__file__).resolve().parent.parent
RUNS, ROWS = Path("runs/findings"), ROOT / "docs" / "findings.csv"
SEEDS = (0, 1, 2)
PREFIX = "digits-smallcnn-triplet-"
KEY = (
    *(PREFIX + d for d in ("none", "est", "act", "hm-lga", "hm-lga-ics", "robust-p")),
    *(f"digits-smallcnn-proxyanchor-{d}" for d in ("none", "at", "trades")),
    "digits-smallcnnx3-proxyanchor-eat",
)
REST = (
    *(PREFIX + d for d in ("min-max", "hm-r-m", "hm-r-m-ics", "robust-n", "robust-a", "ca-tride")),
    *(PREFIX + d for d in ("hm-square", "hm-sqrt", "hm-constant", "hm-b-m")),
    "digits-smallcnn-contrastive-robust-p",
)
ETAS = (2, 8, 32)
SAMPLINGS = "RMSDH"


@dataclass(frozen=True)
class Run:
    """One training run of the findings."""

    group: str
    recipe: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    tag: str = ""

    @property
    def name(self) -> str:
        """Its folder and its name in the table."""
        return f"{self.recipe}{self.tag}@{self.seed}"


def planned() -> Iterator[Run]:
    """Every run: the defences, HM over η, and HM[S,D] over all samplings."""
    for seed in SEEDS:
        for group, recipes in (("key", KEY), ("rest", REST)):
            for recipe in recipes:
                yield Run(group, recipe, seed)
        for eta in ETAS:
            # 2/255 a step, so that more steps reach further: 4/255 at η = 2, the whole ball from η = 20 on.
            yield Run("eta", PREFIX + "hm-lga", seed, {"steps": eta, "step": "2/255"}, f"+eta{eta}")
        for s in SAMPLINGS:
            for d in SAMPLINGS:
                changes = {"defense_params": {"source": s, "destination": d}, "iterations": 300}
                yield Run("grid", PREFIX + "hm-lga", seed, changes, f"+{s}{d}")


def chosen(group: str | None, seed: int | None, only: str = "") -> list[Run]:
    """The planned runs of one group or seed whose name holds ``only``."""
    return [r for r in planned() if group in (None, r.group) and seed in (None, r.seed) and only in r.name]


def load(folder: Path) -> Embedder:
    """The model of a finished run."""
    name, entry = read_entry(folder)
    embedder = build(entry, name)
    fill(embedder.network, read_weights(folder / "last.safetensors"), str(folder))
    embedder.card, embedder.weights_sha256 = entry, sha256_of(folder / "last.safetensors")
    return embedder.eval()


def rows_of(path: Path) -> list[dict[str, str]]:
    """The measured rows so far."""
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


@click.group()
def cli() -> None:
    """Train, measure and report what docs/findings.md says."""
    torch.set_num_threads(1)


@cli.command()
@click.option("--group", type=click.Choice(["key", "rest", "eta", "grid"]))
@click.option("--seed", type=int)
@click.option("--only", default="", help="Part of the run's name.")
def train(group: str | None, seed: int | None, only: str) -> None:
    """Train the runs that are missing."""
    for run in chosen(group, seed, only):
        folder = RUNS / run.name
        if (folder / "checkpoint.json").exists():
            continue
        for old in folder.glob("*"):
            old.unlink()
        recipe = load_recipe(run.recipe, {**run.changes, "seed": run.seed})
        try:
            last = train_run(recipe, folder, allow_collapse=True).progress[-1]
            click.echo(f"{run.name}: loss {last.loss:.4f} spread {last.spread:.3f} {last.seconds:.0f} s", err=True)
        except DmlbenchError as error:
            click.echo(f"{run.name}: {error}", err=True)


FIELDS = ("run", "group", "recipe", "tag", "seed", "protocol", "quantity", "value")


@cli.command()
@click.option("--group", type=click.Choice(["key", "rest", "eta", "grid"]))
@click.option("--seed", type=int)
@click.option("--protocol", default="ers-digits", show_default=True)
def measure(group: str | None, seed: int | None, protocol: str) -> None:
    """Evaluate the finished runs that have no rows yet."""
    known = {(row["run"], row["protocol"]) for row in rows_of(ROWS)}
    for run in chosen(group, seed):
        folder = RUNS / run.name
        if (run.name, protocol) in known or not (folder / "checkpoint.json").exists():
            continue
        result = evaluate(load(folder), None, protocol)
        values: dict[str, float | None] = {**result.benign, "ers": result.ers}
        values |= {m.component: m.value for m in result.measurements}
        values["spread"] = float(list(csv.DictReader((folder / "log.csv").open()))[-1]["spread"])
        fresh = not ROWS.exists()
        with ROWS.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if fresh:
                writer.writerow(FIELDS)
            for quantity, value in values.items():
                if value is not None:
                    writer.writerow(
                        (run.name, run.group, run.recipe, run.tag, run.seed, protocol, quantity, round(value, 4))
                    )
        click.echo(f"{run.name}: {protocol} ERS {result.ers} R@1 {result.benign.get('recall_at_1')}", err=True)


if __name__ == "__main__":
    cli()

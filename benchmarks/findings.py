"""Train the models of docs/findings.md over several seeds, measure them, and write its table and figure.

    python benchmarks/findings.py train --group key --seed 0     # runs/findings/<run>, what is missing
    python benchmarks/findings.py measure --group key            # docs/findings.csv, what is missing
    python benchmarks/findings.py measure --group key --protocol clustering
    python benchmarks/findings.py report                          # docs/findings-tables.md, docs/findings.svg

Runs and rows that exist are kept, so each command can be stopped and started again; of rows that are there twice the
later count. The committed rows are kept too: move docs/findings.csv away to measure everything again.
"""

import csv
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from dmlbench.errors import DmlbenchError
from dmlbench.evaluate import evaluate
from dmlbench.files import write_atomic
from dmlbench.training.loop import train as train_run
from dmlbench.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RUNS, ROWS = Path("runs/findings"), ROOT / "docs" / "findings.csv"
VERSION = "1"
"""Of the protocols that the page's figures were measured by; later versions give other numbers."""
SEEDS = (0, 1, 2)
STEPS = 300
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
DRAWN = "omniglot-small-conv3-triplet-"
OMNIGLOT = tuple(
    f"{DRAWN}{d}-2"
    for d in (
        *("none", "est", "act", "hm-lga", "hm-lga-ics"),
        *("hm-r-m", "hm-r-m-ics", "hm-b-m", "hm-constant", "hm-sqrt", "hm-square"),
    )
)
FIRST = tuple(f"{DRAWN}{d}" for d in ("none", "est", "act", "hm-lga-ics"))
REACHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {}),
    ("+step10", {"step": "10/255"}),
    ("+step20", {"step": "20/255"}),
    ("+steps32", {"steps": 32}),
)
PANUM = (
    *(DRAWN + d for d in ("none", "robust-p", "robust-n", "robust-a")),
    "omniglot-small-conv3-contrastive-robust-p",
)
FAR = (
    *(DRAWN + d for d in ("min-max", "ca-tride", "robust-p", "robust-n", "robust-a")),
    "omniglot-small-conv3-contrastive-robust-p",
    *(f"omniglot-small-conv3-proxyanchor-{d}" for d in ("at", "trades")),
    "omniglot-small-conv3x3-proxyanchor-eat",
)
MNIST = tuple(f"mnist-conv3-triplet-{d}-2" for d in ("none", "est", "act", "hm-lga-ics"))
ETAS = (2, 8, 32)
SAMPLINGS = "RMSDH"
GROUPS = {
    "key": "The papers' defences",
    "rest": "Variants",
    "eta": "HM[S,g_LGA] over η (2/255 a step)",
    "omniglot": "Omniglot, the recipes at full length",
    "reach": "Omniglot, the first recipes, and HM[S,g_LGA] with an adversary of another reach",
    "far": "Omniglot, the other defences with steps of 10/255, 2,000 steps of training",
    "panum": "Omniglot, the first recipes under the attacks of Panum et al.",
    "mnist": "MNIST, the second recipes",
}
"""The groups of runs with a table of their own."""
ALL_GROUPS = (*GROUPS, "grid")


Column = tuple[str, str, str]
"""(protocol, quantity, title) of a table."""


@dataclass(frozen=True)
class Yardstick:
    """How the runs of a group are measured.

    Attributes:
        protocol: that is measured where none is asked for.
        columns: of the tables.
        queries: measured at most, by protocol: of the 896 digits, 2,120 drawings or 10,000 of MNIST; the rest take all.
    """

    protocol: str
    columns: tuple[Column, ...]
    queries: dict[str, int]


def scores(protocol: str) -> tuple[Column, ...]:
    """ERS and what stands beside it."""
    titles = {"ers": "ERS", "recall_at_1": "R@1", "LTM": "R@1 under LTM", "GTM": "R@1 under GTM", "nmi": "NMI"}
    return tuple((protocol, quantity, title) for quantity, title in titles.items())


def attacked_nmi(*eps: str) -> tuple[Column, ...]:
    """Lowest NMI under the clustering attacks that know the labels."""
    return tuple(("clustering", f"nmi@{e}", f"NMI, clustering attack {e}") for e in eps)


def worst_case(*eps: str) -> tuple[Column, ...]:
    """R@1 under strict."""
    return tuple(("strict", f"strict@{e}", f"R@1, strict {e}") for e in eps)


DIGITS = Yardstick("ers-digits", (*scores("ers-digits"), *attacked_nmi("10/255", "40/255")), {"ers-digits": 256})
AT_28 = (*scores("ers-28"), *attacked_nmi("16/255", "77/255"), *worst_case("8/255", "16/255", "32/255", "77/255"))
DRAWINGS = Yardstick("ers-28", AT_28, {"ers-28": 512, "strict": 512})
FIGURES = Yardstick("ers-28", AT_28, {"ers-28": 512, "strict": 512, "clustering": 2000})
REACH = Yardstick("ers-28", scores("ers-28"), DRAWINGS.queries)
LAST_CHECK: tuple[Column, ...] = (
    ("training", "iterations", "steps trained"),
    ("training", "spread", "spread"),
    ("training", "recall_at_1", "training R@1"),
)
TRAINED = Yardstick("ers-28", (*LAST_CHECK, *scores("ers-28")), DRAWINGS.queries)
NEAREST_POSITIVE = Yardstick(
    "panum-28",
    (
        ("panum-28", "recall_at_1", "R@1"),
        *(("panum-28", f"{kind}:R@1", f"of the right queries, {kind}") for kind in ("FGSM", "CW", "R-FGSM", "PGD")),
    ),
    {},
)
YARDSTICKS = {
    "omniglot": DRAWINGS,
    "reach": REACH,
    "far": TRAINED,
    "panum": NEAREST_POSITIVE,
    "mnist": FIGURES,
}


def yardstick(group: str) -> Yardstick:
    """Of a group of runs."""
    return YARDSTICKS.get(group, DIGITS)


@dataclass(frozen=True)
class Run:
    """One training run of the findings."""

    group: str
    recipe: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    tag: str = ""

    @property
    def notes_training(self) -> bool:
        """Whether the last check of training is a finding itself: whether the embeddings collapse."""
        return self.group in ("grid", "far")

    @property
    def name(self) -> str:
        """Its folder and its name in the table."""
        return f"{self.recipe}{self.tag}@{self.seed}"


def planned() -> Iterator[Run]:
    """Every run: the defences, HM over η, and HM[S,D] over all samplings; on digits shorter than the recipes."""
    for seed in SEEDS:
        for group, recipes in (("omniglot", OMNIGLOT), ("mnist", MNIST), ("reach", FIRST), ("panum", PANUM)):
            for recipe in recipes:
                yield Run(group, recipe, seed)
        for tag, changes in REACHES:
            yield Run("reach", DRAWN + "hm-lga", seed, changes, tag)
        contrastive = "omniglot-small-conv3-contrastive-robust-p"
        yield Run("panum", contrastive, seed, {"defense": "none", "defense_params": {}}, "+none")
        for recipe in FAR:
            yield Run("far", recipe, seed, {"step": "10/255", "iterations": 2000, "check_every": 250}, "+far")
        for group, recipes in (("key", KEY), ("rest", REST)):
            for recipe in recipes:
                yield Run(group, recipe, seed, {"iterations": STEPS, "check_every": STEPS})
        for eta in ETAS:
            # 2/255 a step, so that more steps reach further: 4/255 at η = 2, the whole ball from η = 20 on.
            yield Run(
                "eta", PREFIX + "hm-lga", seed, {"steps": eta, "step": "2/255", "iterations": STEPS}, f"+eta{eta}"
            )
        for s in SAMPLINGS:
            for d in SAMPLINGS:
                changes = {"defense_params": {"source": s, "destination": d}, "iterations": STEPS}
                yield Run("grid", PREFIX + "hm-lga", seed, changes, f"+{s}{d}")


def chosen(group: str | None, seed: int | None, only: str = "") -> list[Run]:
    """The planned runs of one group or seed whose name holds ``only``."""
    return [r for r in planned() if group in (None, r.group) and seed in (None, r.seed) and only in r.name]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The measured rows so far."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def measured() -> set[tuple[str, str]]:
    """(run, protocol) that have rows."""
    return {(row["run"], row["protocol"]) for row in rows_of(ROWS)}


@click.group()
def cli() -> None:
    """Train, measure and report what docs/findings.md says."""
    torch.set_num_threads(1)


@cli.command()
@click.option("--group", type=click.Choice(ALL_GROUPS))
@click.option("--seed", type=int)
@click.option("--only", default="", help="Part of the run's name.")
def train(group: str | None, seed: int | None, only: str) -> None:
    """Train the runs that are missing; those that collapse are begun again."""
    for run in chosen(group, seed, only):
        folder = RUNS / run.name
        if (folder / "checkpoint.json").exists():
            continue
        for old in folder.glob("*"):
            old.unlink()
        recipe = load_recipe(run.recipe, {**run.changes, "seed": run.seed})
        try:
            last = train_run(recipe, folder, allow_collapse=run.group != "far").progress[-1]
            click.echo(f"{run.name}: loss {last.loss:.4f} spread {last.spread:.3f} {last.seconds:.0f} s", err=True)
        except DmlbenchError as error:
            click.echo(f"{run.name}: {error}", err=True)
        if run.notes_training and (checks := rows_of(folder / "log.csv")):
            last_check = {"iterations": "iteration", "spread": "spread", "recall_at_1": "recall_at_1"}
            record(run, "training", {ours: float(checks[-1][theirs]) for ours, theirs in last_check.items()})


def record(run: Run, protocol: str, values: dict[str, float | None]) -> None:
    """Add a run's rows to the file."""
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


FIELDS = ("run", "group", "recipe", "tag", "seed", "protocol", "quantity", "value")


@cli.command()
@click.option("--group", type=click.Choice(ALL_GROUPS))
@click.option("--seed", type=int)
@click.option("--only", default="", help="Part of the run's name.")
@click.option("--protocol", "named", help="By default the one that gives the data set's ERS.")
def measure(group: str | None, seed: int | None, only: str, named: str | None) -> None:
    """Evaluate the finished runs that have no rows yet."""
    known = measured()
    for run in chosen(group, seed, only):
        folder, own = RUNS / run.name, yardstick(run.group)
        protocol = named or own.protocol
        if (run.name, protocol) in known or not (folder / "checkpoint.json").exists():
            continue
        result = evaluate(str(folder), None, f"{protocol}@{VERSION}", limit=own.queries.get(protocol))
        values: dict[str, float | None] = {**result.benign, "ers": result.ers}
        values |= {m.component: m.value for m in result.measurements}
        for worst in result.extras.get("clustering", {}).get("worst", []):
            if worst["labelled"]:
                values |= {f"{index}@{worst['eps']}": worst[index] for index in ("nmi", "ami")}
        values["spread"] = float(rows_of(folder / "log.csv")[-1]["spread"])
        record(run, protocol, values)
        click.echo(f"{run.name}: {protocol} ERS {result.ers} R@1 {result.benign.get('recall_at_1')}", err=True)


Table = dict[tuple[str, str, str, str], list[float]]
"""(group, recipe and tag, protocol, quantity) to one value per seed."""


def collected() -> Table:
    """The rows, seeds together; of rows that are there twice the later counts."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows_of(ROWS):
        key = (row["group"], row["recipe"] + row["tag"], row["protocol"], row["quantity"])
        found.setdefault(key, {})[row["seed"]] = float(row["value"])
    return {key: list(by_seed.values()) for key, by_seed in found.items()}


def cell(values: list[float] | None, digits: int = 1) -> str:
    """Mean over the seeds, and their range where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def markdown(table: Table, group: str) -> list[str]:
    """One table of a group, best ERS first."""
    own = yardstick(group)
    names = sorted(
        {name for g, name, *_ in table if g == group},
        key=lambda name: -statistics.mean(table.get((group, name, own.protocol, "ers"), [0.0])),
    )
    lines = [
        "| model | seeds | " + " | ".join(title for *_, title in own.columns) + " |",
        "| --- | --- |" + " --- |" * len(own.columns),
    ]
    for name in names:
        found = [table.get((group, name, protocol, quantity), []) for protocol, quantity, _ in own.columns]
        cells = [
            cell(values, 2 if quantity == "spread" else 0 if quantity == "iterations" else 1)
            for values, (_, quantity, _) in zip(found, own.columns, strict=True)
        ]
        lines.append(f"| `{name}` | {max(map(len, found))} | " + " | ".join(cells) + " |")
    return lines


def grid_markdown(table: Table) -> list[str]:
    """The spread of HM[S,D]'s embeddings at the last check; below 0.02 is collapse."""
    lines = ["| S \\ D | " + " | ".join(SAMPLINGS) + " |", "| --- |" + " --- |" * len(SAMPLINGS)]
    for s in SAMPLINGS:
        found = [table.get(("grid", f"{PREFIX}hm-lga+{s}{d}", "training", "spread"), []) for d in SAMPLINGS]
        lines.append(f"| {s} | " + " | ".join(" / ".join(f"{v:.2f}" for v in values) or "–" for values in found) + " |")
    return lines


@cli.command()
def report() -> None:
    """Write the tables and the figure from the rows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    table = collected()
    lines = ["# Tables of the findings", ""]
    for group, title in GROUPS.items():
        if any(key[0] == group for key in table):
            lines += [f"## {title}", "", *markdown(table, group), ""]
    if any(key[0] == "grid" for key in table):
        lines += ["## Spread of HM[S,D], 300 steps, one value per seed", "", *grid_markdown(table), ""]
    write_atomic(ROOT / "docs" / "findings-tables.md", ("\n".join(lines)).encode())

    matplotlib.rcParams["svg.hashsalt"] = "findings"
    figure, both = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2))
    draw(both[0], table, ("key", "rest"), "Digits")
    draw(both[1], table, ("omniglot",), "Omniglot")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "findings.svg", metadata={"Date": None})


def draw(axes: Any, table: Table, groups: tuple[str, ...], title: str) -> None:
    """ERS against R@1 of some groups' models: a dot at the means, lines over the range of the seeds."""
    protocol = yardstick(groups[0]).protocol
    for group, name in sorted({(g, n) for g, n, *_ in table if g in groups}):
        recall, ers = (table.get((group, name, protocol, q), []) for q in ("recall_at_1", "ers"))
        if recall and ers:
            x, y = statistics.mean(recall), statistics.mean(ers)
            axes.plot([x, x], [min(ers), max(ers)], color="0.6", lw=1)
            axes.plot([min(recall), max(recall)], [y, y], color="0.6", lw=1)
            axes.plot(x, y, "o", color="C0", ms=5)
            label = name.removeprefix("omniglot-small-conv3-").removesuffix("-2").removeprefix("digits-")
            axes.annotate(label, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("R@1, %")
    axes.set_ylabel(f"ERS ({protocol})")
    axes.set_title(f"{title}: robustness against recall; lines: range over seeds", fontsize=9)


if __name__ == "__main__":
    cli()

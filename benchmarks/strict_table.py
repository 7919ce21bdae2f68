"""The tables of docs/strict.md: published attacks, `strict-fast` and `strict` side by side.

    python benchmarks/strict_table.py --models GOLDEN_FOLDER --models RUNS --out OUT --queries 512

``--models`` is a folder of training runs of the recipes in benchmarks/strict (each a folder with
``last.safetensors``, named ``omniglot-conv3-<defence>-seed<n>``) or of golden networks (``net_*.safetensors``).
Each model's numbers are kept in OUT/<model>.json, so that the command goes on where it was stopped;
the tables, in Markdown, are printed and written to OUT/strict.md. Needs the data set omniglot-small.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dmlbench import Embedder, evaluate, load_dataset, load_protocol
from dmlbench.models import ARCHITECTURES
from dmlbench.protocol import Component, Protocol

FIELD = ("LTM-published", "GTM-published", "LTM", "GTM", "WM")
FIELD_EPS = ("16/255", "32/255")
EPS = ("8/255", "16/255", "32/255", "77/255")


def networks(folders: list[Path]) -> dict[str, Path]:
    """Weights by model name."""
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("net_*.safetensors")):
            found[f"golden-{path.stem[4:]}"] = path
        for path in sorted(folder.glob("omniglot-conv3-*-seed*/last.safetensors")):
            found[path.parent.name.removeprefix("omniglot-conv3-")] = path
    return found


def model_of(name: str, path: Path) -> Embedder:
    """The conv3 network in ``path``."""
    network = ARCHITECTURES["conv3"]()
    network.load_state_dict(load_file(str(path)))
    return Embedder(network.eval(), (1, 28, 28), name=name)


def field() -> Protocol:
    """The attacks of the field by PGD-32 with step 3/255, at every eps of the table."""
    components = tuple(
        Component(name=f"{a}@{eps}", attack=a, readout="recall_at_1", worst=0, best=100, threat={"eps": eps})
        for eps in FIELD_EPS
        for a in FIELD
    )
    threat = {"norm": "linf", "step": "3/255", "steps": 32, "start": "clean"}
    return Protocol(
        name="field", version="1", kind="parts", title="", threat=threat, components=components, clustering_seeds=(0,)
    )


def quick(name: str) -> Protocol:
    """A packaged protocol with one k-means seed, and the audit on fewer queries; neither touches the searches."""
    rules = load_protocol(name)
    return rules.model_copy(update={"clustering_seeds": (0,), "audit": min(64, rules.audit)})


def both_right(arrays: dict[str, np.ndarray], name: str) -> float:
    """Percent of the queries that are right before and after."""
    value, clean = arrays[f"{name}/value"], arrays["benign/recall_at_1"]
    return float(np.nanmean(np.where(np.isnan(value), np.nan, (value == 100) & (clean == 100))) * 100)


def measured(name: str, path: Path, queries: int) -> dict[str, Any]:
    """Everything about one model."""
    dataset, model = load_dataset("omniglot-small"), model_of(name, path)
    started = time.process_time()
    published = evaluate(model, dataset, field(), limit=queries)
    fast = evaluate(model, dataset, quick("strict-fast@1"), limit=queries)
    before = time.process_time()
    full = evaluate(model, dataset, quick("strict@1"), limit=queries)
    strict_seconds = time.process_time() - before
    out: dict[str, Any] = {
        "model": name,
        "queries": full.dataset.n_queries,
        "clean": full.extras["strict"]["clean"],
        "field": {c.component: both_right(published.arrays, c.component) for c in published.measurements},
        "fast": {r["eps"]: r["recall_at_1"] for r in fast.extras["strict"]["curve"]},
        "strict": full.extras["strict"],
        "warnings": [w.flag for w in full.warnings],
        "audit": full.extras["audit"],
        "strict_cpu_seconds": strict_seconds,
    }
    out["cpu_seconds"] = time.process_time() - started
    return out


def spread(values: list[float]) -> str:
    """Mean, and the range where there is more than one."""
    mean = float(np.mean(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f}–{max(values):.1f})"


def tables(results: list[dict[str, Any]]) -> str:
    """The Markdown of docs/strict.md."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault(re.sub(r"-seed\d+$", "", r["model"]), []).append(r)
    head = ["model", "eps", "clean", *("LTM pub.", "GTM pub.", "LTM", "GTM", "margin PGD-32"), "strict-fast", "strict"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, members in groups.items():
        for eps in EPS:
            fields = [spread([m["field"][f"{a}@{eps}"] for m in members]) if eps in FIELD_EPS else "–" for a in FIELD]
            worst = [next(r["recall_at_1"] for r in m["strict"]["curve"] if r["eps"] == eps) for m in members]
            cells = [name, eps, spread([m["clean"] for m in members]), *fields]
            cells += [spread([m["fast"][eps] for m in members]), f"**{spread(worst)}**"]
            lines.append(f"| {' | '.join(cells)} |")
    steps = [step["step"] for step in results[0]["strict"]["curve"][0]["steps"]] if results else []
    head = ["model", "eps", "before", *steps, "gradients a right query", "PGD-32 runs"]
    lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, members in groups.items():
        for i, eps in enumerate(EPS):
            rows = [m["strict"]["curve"][i] for m in members]
            points = [spread([r["steps"][j]["points"] for r in rows]) for j in range(len(steps))]
            right = [m["clean"] / 100 * m["queries"] for m in members]
            gradients = [sum(s["gradients"] for s in r["steps"]) / q for r, q in zip(rows, right, strict=True)]
            cells = [name, eps, spread([r["carried"] for r in rows]), *points]
            cells += [spread(gradients), spread([g / 32 for g in gradients])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | queries | audit: not a pass | CPU seconds of `strict` |", "|" + " --- |" * 4]
    for r in results:
        doubts = ", ".join(f"{f['check']} {f['verdict']}" for f in r["audit"] if f["verdict"] != "pass") or "none"
        lines.append(f"| {r['model']} | {r['queries']} | {doubts} | {r['strict_cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = networks(arguments.models)
    for name, path in found.items():
        target = arguments.out / f"{name}.json"
        if not target.exists():
            target.write_text(json.dumps(measured(name, path, arguments.queries)))
    text = tables([json.loads(p.read_text()) for p in sorted(arguments.out.glob("*.json"))])
    (arguments.out / "strict.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

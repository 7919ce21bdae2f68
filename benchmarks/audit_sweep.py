"""The honest models of docs/audit.md: what the checks measure on every registered model whose data are at hand.

    python benchmarks/audit_sweep.py                        # digits, Omniglot and MNIST
    python benchmarks/audit_sweep.py --prefix digits --queries 256

Prints a table in Markdown. It measures what every result is asked (docs/audit.md), without the attacks.
"""

import argparse
import time

import numpy as np

import dmlbench
from dmlbench.checkpoints import checkpoints
from dmlbench.doubts.audit import glance
from dmlbench.doubts.checks import between, spread
from dmlbench.doubts.unseen import survey
from dmlbench.errors import DmlbenchError
from dmlbench.metrics import retrieval
from dmlbench.run.subject import prepare


def row(name: str, queries: int | None) -> list[str]:
    """One line of the table."""
    model = dmlbench.load_model(name)
    assert model.card is not None
    subject = prepare(model, dmlbench.load_dataset(model.card.dataset.name), limit=queries, device="cpu")
    recall = retrieval(subject.scene)["recall_at_1"]
    began = time.process_time()
    flags = [f.flag for f in glance(subject, recall, {"pgd"}, 256)]
    took = time.process_time() - began
    right = np.flatnonzero(recall == 100.0)
    found = survey(subject, right[np.unique(np.linspace(0, len(right) - 1, 128).astype(int))])
    kept = [f"{100 * found.kept[start].mean():.0f}" for start in ("as is", "midpoint", "aside")]
    clean = [f"{100 * found.right[start].mean():.0f}" for start in ("least bits", "midpoint", "aside")]
    lengths = [f"{np.nanmedian(found.nearness):.2f}", f"{between(subject):.3f}", f"{spread(subject):.3f}"]
    return [name, *kept, *clean, *lengths, f"{took:.1f}", ", ".join(flags) or "none"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="", help="of the models' ids")
    parser.add_argument("--queries", type=int, help="at most so many; by default all")
    options = parser.parse_args()
    head = ["model", "survive, as is", "midpoint", "aside", "right, least bits", "midpoint", "aside"]
    head += ["A4", "median distance", "spread", "CPU s", "flags"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name in checkpoints():
        if name.startswith(options.prefix) and name.startswith(("digits", "omniglot", "mnist")):
            try:
                print(f"| {' | '.join(row(name, options.queries))} |", flush=True)
            except DmlbenchError as error:
                print(f"| {name} | {error} |{' |' * (len(head) - 2)}", flush=True)


if __name__ == "__main__":
    main()

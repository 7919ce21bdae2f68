"""The honest models of docs/audit.md: what the checks measure on every registered model whose data are at hand.

    python benchmarks/audit_sweep.py                        # digits, Omniglot and MNIST
    python benchmarks/audit_sweep.py --prefix digits --queries 256
    python benchmarks/audit_sweep.py --whole strict-fast --queries 64

Prints a table in Markdown. It measures what every result is asked (docs/audit.md), without the attacks; with ``--whole``, every
check of ``dmlbench audit`` after that protocol's attacks.
"""

import argparse
import time

import numpy as np

import dmlbench
from dmlbench.checkpoints import checkpoints
from dmlbench.doubts.audit import GLANCED, glance
from dmlbench.doubts.checks import between, spread
from dmlbench.doubts.unseen import survey
from dmlbench.errors import DmlbenchError
from dmlbench.metrics import retrieval
from dmlbench.run.subject import prepare

SHORT = ("survive, as is", "midpoint", "aside", "right, least bits", "midpoint", "aside", "A4", "median distance", "spread", "CPU s", "flags")  # fmt: skip
WHOLE = ("verdict", "no pass", "queries", "CPU s")


def audited(name: str, queries: int | None, protocol: str) -> list[str]:
    """One line of the table of whole audits."""
    began, rules = time.process_time(), dmlbench.load_protocol(protocol)
    rules = rules.model_copy(update={"audit": queries or GLANCED})
    result = dmlbench.evaluate(name, protocol=rules, limit=queries, device="cpu")
    verdicts = {f["check"]: f["verdict"] for f in result.extras["audit"]}
    worst = next((v for v in ("fail", "warn") if v in verdicts.values()), "pass")
    doubts = ", ".join(f"{check} {verdict}" for check, verdict in verdicts.items() if verdict not in ("pass", "skip"))
    return [name, worst, doubts or "none", str(result.dataset.n_queries), f"{time.process_time() - began:.0f}"]


def row(name: str, queries: int | None) -> list[str]:
    """One line of the table of short looks."""
    model = dmlbench.load_model(name)
    assert model.card is not None
    subject = prepare(model, dmlbench.load_dataset(model.card.dataset.name), limit=queries, device="cpu")
    recall = retrieval(subject.scene)["recall_at_1"]
    began = time.process_time()
    flags = [f.flag for f in glance(subject, recall, {"pgd"}, 256)]
    took = time.process_time() - began
    right = np.flatnonzero(recall == 100.0)
    found = survey(subject, right[np.unique(np.linspace(0, len(right) - 1, 128).astype(int))])
    kept = [f"{100 * found.survived[start].mean():.0f}" for start in ("as is", "midpoint", "aside")]
    clean = [f"{100 * found.right[start].mean():.0f}" for start in ("least bits", "midpoint", "aside")]
    lengths = [f"{np.nanmedian(found.nearness):.2f}", f"{between(subject):.3f}", f"{spread(subject):.3f}"]
    return [name, *kept, *clean, *lengths, f"{took:.1f}", ", ".join(flags) or "none"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="", help="of the models' ids")
    parser.add_argument("--queries", type=int, help="at most so many; by default all")
    parser.add_argument("--whole", metavar="PROTOCOL", help="the whole audit, by this protocol's searches")
    options = parser.parse_args()
    head = ["model", *(WHOLE if options.whole else SHORT)]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name in checkpoints():
        if name.startswith(options.prefix) and name.startswith(("digits", "omniglot", "mnist")):
            try:
                line = audited(name, options.queries, options.whole) if options.whole else row(name, options.queries)
                print(f"| {' | '.join(line)} |", flush=True)
            except DmlbenchError as error:
                print(f"| {name} | {error} |{' |' * (len(head) - 2)}", flush=True)


if __name__ == "__main__":
    main()

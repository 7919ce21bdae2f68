"""``dmlbench audit``: does a model's measured robustness mean what it says?"""

import sys
from typing import TYPE_CHECKING

import click

from dmlbench.cli.model_options import load_subject, model_options
from dmlbench.cli.output import console, json_option, print_json, progress
from dmlbench.cli.results import print_findings

if TYPE_CHECKING:
    from dmlbench.models import ModelOptions

EPILOG = """\b
Examples:
  dmlbench audit digits-smallcnn-triplet-hm-lga-ics
  dmlbench audit python:mynets.py:make --dataset folder:pics --input-size 64"""
SOUND = {
    "pass": "no doubt was found",
    "warn": "doubts: look again before the number is used",
    "fail": "the measured robustness is not to be believed",
}


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--dataset",
    help="A data set's id, folder:PATH, csv:FILE, or python:FILE.py:FUNCTION (runs that code); by default the one that the "
    "model was trained on.",
)
@click.option("--protocol", default="strict", show_default=True, help="Whose searches the checks build on.")
@click.option("--queries", default=256, show_default=True, type=click.IntRange(min=1), help="Queries looked at.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n.")
@model_options
@json_option
def audit(
    model: str,
    dataset: str | None,
    protocol: str,
    queries: int,
    device: str,
    options: "ModelOptions",
    as_json: bool,
) -> None:
    """Check MODEL for masked gradients, randomness, memorised images and collapse; see docs/audit.md.

    MODEL and the options that describe it are those of `dmlbench evaluate --model`, and so are the images.
    Exit code 0 whatever the verdict: the verdict is the output.
    """
    import dmlbench
    from dmlbench.errors import UsageError
    from dmlbench.kinds.table import KINDS

    rules = dmlbench.load_protocol(protocol)
    kinds = [name for name, kind in KINDS.items() if "audit" in kind.reads]
    if rules.kind not in kinds:
        raise UsageError(
            f"protocol {protocol!r} is of kind {rules.kind!r}: the audit builds on one of kind {' or '.join(map(repr, kinds))}"
        )
    embedder, images = load_subject(model, options, dataset, "test")
    rules = rules.model_copy(update={"audit": queries})
    with progress() as bars:
        evaluation = dmlbench.evaluate(
            embedder, images, rules, limit=queries, device=device, progress=bars, argv=["dmlbench", *sys.argv[1:]]
        )
    findings = evaluation.extras["audit"]
    verdicts = {f["verdict"] for f in findings}
    verdict = next(v for v in ("fail", "warn", "pass") if v in verdicts or v == "pass")
    if as_json:
        print_json(
            {
                "model": embedder.name,
                "dataset": images.name,
                "queries": evaluation.dataset.n_queries,
                "verdict": verdict,
                "findings": findings,
                "curve": evaluation.extras[rules.kind]["curve"],
            }
        )
        return
    out = console()
    out.print(f"[bold]{embedder.name}[/bold] on {images.name}, {evaluation.dataset.n_queries} queries")
    print_findings(findings, out)
    out.print(f"[bold]{verdict}[/bold]: {SOUND[verdict]} (docs/audit.md)")

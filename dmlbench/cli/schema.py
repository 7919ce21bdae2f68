"""``dmlbench schema``: the JSON Schema of each file that people and programs exchange."""

import click
from pydantic import BaseModel

from dmlbench.cli.output import print_json
from dmlbench.errors import UsageError
from dmlbench.registry import suggest


def schemas() -> dict[str, tuple[type[BaseModel], str]]:
    """By name: the model and what it describes."""
    from dmlbench.board import Row
    from dmlbench.board.compare import Comparison, Gate
    from dmlbench.checkpoints import CheckpointFile
    from dmlbench.protocol import Protocol
    from dmlbench.results import Evaluation
    from dmlbench.submission.extras import Extras
    from dmlbench.submission.record import Submission
    from dmlbench.submission.rerun import Verification

    return {
        "row": (Row, "a row of leaderboard/<protocol>/<dataset>.csv"),
        "evaluation": (Evaluation, "evaluation.json of a run folder"),
        "extras": (Extras, "extras in evaluation.json of a full run, what is each kind's under its name"),
        "submission": (Submission, "submission.yaml of a bundle"),
        "verification": (Verification, "verification.json of a submission"),
        "comparison": (Comparison, "what compare --json gives"),
        "gate": (Gate, "[tool.dmlbench.gate] of pyproject.toml"),
        "checkpoints": (CheckpointFile, "checkpoints.json"),
        "protocol": (Protocol, "a protocol's TOML file"),
    }


@click.command(epilog="Example: dmlbench schema row > row.schema.json")
@click.argument("name", required=False)
def schema(name: str | None) -> None:
    """Print the JSON Schema called NAME; without a name, list them."""
    known = schemas()
    if name is None:
        for key, (_, what) in known.items():
            click.echo(f"{key:<14}{what}")
        return
    if name not in known:
        raise UsageError(f"unknown schema {name!r}{suggest(name, known)}")
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **known[name][0].model_json_schema()})

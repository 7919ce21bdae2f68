"""Measure the board again: every registered, active model whose row is stale or missing, into its bundle.

    python benchmarks/remeasure.py --data digits --protocols ers-digits,strict --out runs/board
    python benchmarks/remeasure.py --data omniglot-small --protocols ers-28 --models hm-lga,act --out runs/board

Each run is the command ``dmlbench evaluate --model ID --protocol NAME --out OUT/ID-NAME/run --resume``, so it can be
stopped and started at any time; what is finished is packed into ``leaderboard/submissions/ID-NAME`` and taken as done
from then on. ``dmlbench leaderboard build`` then writes the CSV files.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from dmlbench.checkpoints import checkpoints
from dmlbench.errors import DataError
from dmlbench.protocols import load_protocol
from dmlbench.results import load

ROOT = Path(__file__).resolve().parents[1]


def done(bundle: Path, protocol: str) -> bool:
    """Does the bundle hold a result of the protocol's current version?"""
    try:
        return load(bundle / "run", arrays=False).protocol.sha256 == load_protocol(protocol).sha256
    except DataError:
        return False


def main() -> None:
    """Measure, pack, say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="measure the models that are registered with this data set")
    parser.add_argument("--protocols", required=True, help="names, joined by commas; measured in this order")
    parser.add_argument("--models", default="", help="only ids that hold one of these texts, joined by commas")
    parser.add_argument("--out", type=Path, required=True, help="where unfinished runs lie")
    parser.add_argument("--board", type=Path, default=ROOT / "leaderboard", help="whose submissions are written")
    args = parser.parse_args()
    wanted = [text for text in args.models.split(",") if text]
    models = [
        name
        for name, entry in checkpoints().items()
        if entry.status == "active" and entry.dataset.name == args.data and entry.files
        if not wanted or any(text in name for text in wanted)
    ]
    for protocol in args.protocols.split(","):
        for model in models:
            name = f"{model}-{protocol}"
            bundle, work = args.board / "submissions" / name, args.out / name
            if done(bundle, protocol):
                continue
            began = time.monotonic()
            author = ["--author", "The dmlbench authors"]
            for command in (
                ["evaluate", "--model", model, "--protocol", protocol, "--out", work / "run", "--resume"],
                ["submit", "init", work / "run", "--out", work / "submission.yaml", "--force", *author],
                [
                    "submit",
                    "pack",
                    work / "run",
                    "--submission",
                    work / "submission.yaml",
                    "--no-weights",
                    "--out",
                    bundle,
                ],
            ):
                ended = subprocess.run(
                    [sys.executable, "-m", "dmlbench", *map(str, command)], stdout=subprocess.DEVNULL
                )
                if ended.returncode:
                    print(f"{name}: {command[0]} ended with {ended.returncode}", flush=True)
                    break
            else:
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

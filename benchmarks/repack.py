"""Keep the board's bundles as `dmlbench submit pack` writes them today: the same numbers in less room (docs/leaderboard.md).

    python benchmarks/repack.py                  # says what each folder weighed and weighs; again, it finds nothing to do
    python benchmarks/repack.py --board FOLDER

Every array is read back before a file is replaced: outcomes bit for bit, the images of the queries that stay too. A run that
has become stale loses all but one query's images. Bundles with a record of a full rerun are refused: it speaks of
their manifest.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from dmlbench.errors import DataError
from dmlbench.kinds.base import WHOLE_RUN
from dmlbench.results import load
from dmlbench.submission.bundle import SUBMISSIONS
from dmlbench.submission.pack import repacked, write_folder

ROOT = Path(__file__).resolve().parents[1]


def same(old: np.ndarray, new: np.ndarray) -> bool:
    """Type, shape and bits."""
    return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()


def require_same(folder: Path, files: dict[str, bytes]) -> None:
    """Raise DataError where the files, written and read, give other numbers than the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(files, Path(scratch))
        old, new = load(folder / "run"), load(Path(scratch) / "run")
    differing = [k for k in old.arrays.keys() | new.arrays.keys() if not same(old.arrays[k], new.arrays[k])]
    stay = np.isin(old.sample["rows"], new.sample["rows"])
    differing += [
        k
        for k in old.sample.keys() | new.sample.keys()
        if not same(old.sample[k] if k.startswith(WHOLE_RUN) else old.sample[k][stay], new.sample[k])
    ]
    if old != new or differing:
        raise DataError(f"{folder} would change: {', '.join(differing) or 'evaluation.json'}")


def main() -> None:
    """Repack, one folder after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", type=Path, default=ROOT / "leaderboard", help="whose submissions are written")
    total = [0, 0]
    for folder in sorted((parser.parse_args().board / SUBMISSIONS).iterdir()):
        if not (folder / "run").is_dir():
            continue
        before = after = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        files = repacked(folder)
        if files is not None:
            require_same(folder, files)
            write_folder(files, folder)
            after = sum(map(len, files.values()))
            print(f"{folder.name}: {before} bytes, now {after}", flush=True)
        total = [total[0] + before, total[1] + after]
    print(f"all bundles: {total[0]} bytes, now {total[1]}")


if __name__ == "__main__":
    main()

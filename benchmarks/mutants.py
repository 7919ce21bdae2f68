"""Errors planted in the package, one at a time, and the test that notices each.

    python benchmarks/mutants.py [NAME ...]

Each is a text of the package with another in its place, in a copy. Ends with 1 where a test passes all the same, a text is
not found exactly once, or a test does not pass on the package as it is. The table is also in CONTRIBUTING.md.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TWIN = "test_optimizers.py::test_a_search_is_that_of_the_plain_loop[{}]".format
TIES = "test_metrics.py::test_the_fast_ranking_counts_the_negatives_that_the_rule_of_ties_puts_ahead"
BLUR = "test_objectives.py::test_rounding_is_as_large_as_embeddings_are_long"
GAPS = "test_intervals.py::test_resamples_in_which_nothing_counts_say_nothing"


@dataclass(frozen=True)
class Mutant:
    """An error: ``text``, found once in the package wherever it stands, becomes ``instead``; ``test`` then fails."""

    name: str
    text: str
    instead: str
    test: str


MUTANTS = (
    Mutant("GTT: ties count for the model", "ahead(d, c).sum(1) - 1", "(d < c).sum(1)",
           "test_metrics.py::test_entries_as_near_as_the_target_push_it_out_of_the_top_4"),
    Mutant("R@k: ties count for the model", "torch.le(part,", "torch.lt(part,", TIES),
    Mutant("R@k from sorted lists: ties count for the model", "near, right=True).to(", "near, right=False).to(", TIES),
    Mutant("certified: a change as long as the radius is certified", "right_by(radius - size)", "(radius >= size)",
           "test_certified.py::test_a_change_as_long_as_the_radius_is_not_certified"),
    Mutant("ES: blur without the scale", "size.detach() <= scene.gallery.blur * scene.gallery.scale",
           "size.detach() <= scene.gallery.blur", BLUR),
    Mutant("ES, GTM as published: blur without the scale", "keepdim=True) <= scene.gallery.blur * scene.gallery.scale",
           "keepdim=True) <= scene.gallery.blur", BLUR),
    Mutant("APGD: no second condition", "too_long | stuck", "too_long", TWIN("apgd-linf-4")),
    Mutant("MI-FGSM: no momentum", "momentum = momentum + g /", "momentum = g /", TWIN("mi-fgsm-l2-6")),
    Mutant("noise: no corners", "if i % 2:", "if False:", TWIN("noise-linf-1")),
    Mutant("C&W: c stays", "torch.isinf(high), trade * 10, (low + high) / 2", "torch.isinf(high), trade, trade", TWIN("cw-linf-2")),
    Mutant("Square: one sign for all channels", "eps * rng.signs(best.shape[1], 1, 1)", "eps * rng.signs(1, 1, 1)", TWIN("square-linf-6")),
    Mutant("NES: fine noise at 224", "(h, w) == (32 * COARSE, 32 * COARSE)", "False", TWIN("nes-linf-224")),
    Mutant("compare: the worst clusters of all eps", 'row["eps"] == rows[-1]["eps"]', "True",
           "test_compare.py::test_the_worst_attack_on_clusters_is_that_of_the_largest_eps"),
    Mutant("intervals: resamples without a value are 0", "drawn[np.isfinite(drawn)]", "np.nan_to_num(drawn)", GAPS),
    Mutant("medians: resamples without a value are 0", "column[order][half], np.nan)", "column[order][half], 0.0)", GAPS),
)  # fmt: skip


def place(mutant: Mutant, root: Path) -> Path:
    """The file below ``root`` that holds the mutant's text.

    Raises:
        SystemExit: it is not found exactly once.
    """
    files = sorted((root / "dmlbench").rglob("*.py"))
    found = [f for f in files for _ in range(f.read_text(encoding="utf-8").count(mutant.text))]
    if len(found) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.text!r} is found {len(found)} times in the package")
    return found[0]


def run(root: Path, *tests: str) -> int:
    """pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    where = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, *(f"tests/{t}" for t in tests)], cwd=root, env=where, capture_output=True
    ).returncode


def main(names: list[str]) -> int:
    """Print the table."""
    chosen = [m for m in MUTANTS if not names or m.name in names]
    failed = not chosen
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("dmlbench", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "checkpoints.json", "leaderboard"):
            (root / part).symlink_to(ROOT / part)
        places = [place(m, root) for m in chosen]
        if run(root, *dict.fromkeys(m.test for m in chosen)):
            raise SystemExit("the tests do not pass on the package as it is")
        for m, file in zip(chosen, places, strict=True):
            whole = file.read_text(encoding="utf-8")
            file.write_text(whole.replace(m.text, m.instead), encoding="utf-8")
            code = run(root, m.test)
            file.write_text(whole, encoding="utf-8")
            failed |= code != 1
            print(f"| {m.name} | {({0: 'SURVIVES', 1: 'killed'}).get(code, code)} | `{m.test}` |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What it spares that images whose hinge is satisfied leave PGD, and that results are the same to the bit.

    python benchmarks/leaving.py [--limit N] [--repeats N] MODEL ...

Each search of the default protocol is run with and without, in turn. "spared" is the share of its passes that were not made;
times are CPU seconds of the process (user), which other programs on a busy machine change less than wall time.
"""

import argparse
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

import dmlbench
from dmlbench.fast.exact import true_float32
from dmlbench.optimizers import gradient
from dmlbench.run.search import auto_batch, run_search, searches
from dmlbench.run.subject import Silent, Subject, prepare
from dmlbench.task import default_dataset, default_protocol


@contextmanager
def nobody_leaves() -> Iterator[None]:
    """Within it every image stays to the end."""
    share, gradient.SHARE = gradient.SHARE, 2.0
    try:
        yield
    finally:
        gradient.SHARE = share


@contextmanager
def counted(subject: Subject) -> Iterator[list[int]]:
    """Within it, the images of every pass that makes a gradient."""
    sizes: list[int] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled() and args[0].requires_grad:
            sizes.append(len(args[0]))

    handle = subject.embedder.register_forward_pre_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


def cpu_seconds() -> float:
    """User time of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


@true_float32()
def compare(name: str, limit: int | None, repeats: int) -> None:
    """Print a line for each search of one model that spares anything, and one for all."""
    model = dmlbench.load_model(name)
    dataset = dmlbench.load_dataset(default_dataset(model))
    rules = dmlbench.load_protocol(default_protocol(dataset))
    subject = prepare(model, dataset, limit=limit, device="cpu")
    size = auto_batch(dataset, subject.device)
    total = np.zeros(4)
    for search in searches(rules, rules.components):

        def once(search: object = search) -> tuple[dict[str, np.ndarray], np.ndarray, int, float]:
            began = cpu_seconds()
            with counted(subject) as sizes:
                done = run_search(subject, search, rules.seed, size, Silent())  # type: ignore[arg-type]
            assert done is not None
            return *done, sum(sizes), cpu_seconds() - began

        pairs = []
        for _ in range(repeats):
            with nobody_leaves():
                without = once()
            pairs.append((without, once()))
        for (a, images, _, _), (b, others, _, _) in pairs:
            same = all(np.array_equal(a[key], b[key], equal_nan=True) for key in a if key != "seconds")
            assert same and np.array_equal(images, others), f"{name} {search.name}: results differ"
        passes = [pairs[0][side][2] for side in (0, 1)]
        seconds = [float(np.median([pair[side][3] for pair in pairs])) for side in (0, 1)]
        total += [*passes, *seconds]
        if passes[0] != passes[1]:
            line(name, search.name, *passes, *seconds)
    line(name, "all parts", *total)


def line(model: str, part: str, before: float, after: float, without: float, having: float) -> None:
    """A row of the table."""
    spared, ratio = 100 * (1 - after / before), having / without
    print(f"| {model} | {part} | {spared:.1f} % | {without:.2f} | {having:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--limit", type=int, help="queries; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | part | spared | CPU s without | CPU s with | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        compare(name, args.limit, args.repeats)


if __name__ == "__main__":
    main()

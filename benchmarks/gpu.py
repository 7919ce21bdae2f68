"""Everything that is to be measured on a GPU, in one command, with nothing to download.

    python benchmarks/gpu.py --minutes 9 --out DIR [--public CHECKOUT]
    python benchmarks/gpu.py --minutes 1 --out DIR --tiny --device cpu     # the same code at sizes of seconds

Weights are random and images are drawn here: what a step costs does not depend on them. Each part runs in a process of its
own, with a share of the time that is left, so that one which fails, hangs or spoils the GPU's context ends alone.
DIR/gpu.json and DIR/gpu.md are written anew after each part, and hold what a part that was stopped had found until then.

``--public`` names a checkout of the field's public attack code (RobRank), which is then imported and timed beside ours.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attack_cost
import numpy as np
import torch

import dmlbench
from dmlbench.attacks import ATTACKS, choose_targets, craft, measure
from dmlbench.datasets import ArrayImages, RetrievalDataset
from dmlbench.embedding import Embedder
from dmlbench.evaluate import benign_arrays, evaluate
from dmlbench.fast.compiled import ready as ready_to_attack
from dmlbench.fast.exact import true_float32
from dmlbench.files import first_line, prepare_folder, write_atomic
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.plan import timed
from dmlbench.results import json_bytes
from dmlbench.rng import Rng
from dmlbench.run.search import Search, auto_batch, run_search, searches
from dmlbench.run.subject import Silent, prepare, resolve_device
from dmlbench.threat import Threat

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5.0
"""Seconds after its time that a part has to end by itself."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large every part is.

    Attributes:
        tests: files whose tests marked ``cuda`` are run.
        nets: by network of ``attack_cost.NETS``, images attacked at a time.
        variants: (precision, compiled) of gradient steps.
        attacks, steps, repeats, gallery: of the costs of a step; a gallery of None is the network's own.
        net, protocol, queries, classes: of the whole run.
        strict: protocol and numbers of queries, ascending.
        entries, clusters, dimensions, iterations: of k-means.
        public: attacks that are timed beside the public code's.
    """

    tests: tuple[str, ...]
    nets: Mapping[str, int]
    variants: tuple[tuple[str, bool], ...]
    attacks: tuple[str, ...]
    steps: int
    repeats: int
    gallery: int | None
    net: str
    protocol: str
    queries: int
    classes: int
    strict: tuple[str, tuple[int, ...]]
    entries: int
    clusters: int
    dimensions: int
    iterations: int
    public: tuple[str, ...]


WHOLE = Sizes(
    tests=("tests",),
    nets={"resnet18": 256, "digits": 2048, "golden": 2048, "vit_s": 128, "resnet50": 128},
    variants=(("tf32", False), ("float32", False), ("bfloat16", False), ("tf32", True)),
    attacks=("TMA", "QA+"),
    steps=8,
    repeats=2,
    gallery=None,
    net="resnet18",
    protocol="ers-224",
    queries=5924,
    classes=100,
    strict=("strict", (32, 64, 128, 256, 512)),
    entries=60502,
    clusters=11316,
    dimensions=512,
    iterations=40,
    public=("ES", "QA+", "CA+", "LTM"),
)
"""A CUB-sized ERS, an SOP-sized clustering."""
TINY = Sizes(
    tests=("tests/test_exact.py",),
    nets={"digits": 8},
    variants=(("float32", False), ("tf32", False)),
    attacks=("TMA",),
    steps=2,
    repeats=1,
    gallery=200,
    net="digits",
    protocol="ers-digits",
    queries=120,
    classes=4,
    strict=("strict-fast", (2, 4)),
    entries=300,
    clusters=20,
    dimensions=16,
    iterations=3,
    public=("ES", "QA+"),
)
"""Seconds on a CPU, so that the script does not rot."""


@dataclass(frozen=True)
class Run:
    """What a part is given: sizes, the device's name, until when it may run, and where its rows go."""

    sizes: Sizes
    device: str
    until: float
    log: Path
    public: Path | None

    @property
    def left(self) -> float:
        """Seconds that the part still has."""
        return self.until - time.monotonic()

    @property
    def where(self) -> torch.device:
        """The device; a part's own process is the first to ask CUDA anything."""
        return resolve_device(self.device)

    def note(self, **row: Any) -> None:
        """Keep a row, whatever becomes of the part after it."""
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, default=float) + "\n")

    def attempt(self, call: Callable[[], None], **what: Any) -> None:
        """``call``; a row says what failed where it does."""
        try:
            call()
        except Exception as error:  # one network or precision that fails must not end the others
            self.note(**what, failed=f"{type(error).__name__}: {first_line(error)}")


def machine(run: Run) -> None:
    """What it is measured on."""
    device = run.where
    row: Row = {"device": str(device), "torch": torch.__version__, "python": platform.python_version()}
    row |= {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        row |= {"card": card.name, "memory_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
        row |= {"cudnn": torch.backends.cudnn.version(), "capability": f"{card.major}.{card.minor}"}
    run.note(**row)


def tests(run: Run) -> None:
    """The tests that need CUDA; without it they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:xdist", "-o", "addopts=", "-rfEs"]
    command += ["--jaxtyping-packages=dmlbench,beartype.beartype", *run.sizes.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=run.left)
    lines = (done.stdout or done.stderr).strip().splitlines() or ["pytest said nothing"]
    run.note(exit_code=done.returncode, outcome=lines[-1])
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            run.note(exit_code=done.returncode, outcome=line)
    if done.returncode:
        raise RuntimeError(lines[-1])


def settings(run: Run, net: str, precision: str = "auto", compiled: bool = False) -> argparse.Namespace:
    """What ``attack_cost`` is told."""
    s = run.sizes
    return argparse.Namespace(
        clock="wall", batch=s.nets[net], gallery=s.gallery, precision=precision, compile=compiled, steps=s.steps,
        repeats=s.repeats, attacks=list(s.attacks),
    )  # fmt: skip


def steps(run: Run) -> None:
    """What an attack costs over the bare passes, by network and precision; "ways" is the bare cost of each way to run the
    network (as it is, channels_last, folded, compiled), in seconds."""
    shown = ("network", "precision", "compiled", "attack", "batch", "bare_seconds", "seconds", "images_per_second")
    for net in run.sizes.nets:
        for precision, compiled in run.sizes.variants:

            def cost(net: str = net, precision: str = precision, compiled: bool = compiled) -> None:
                for row in attack_cost.costs(net, settings(run, net, precision, compiled), run.where):
                    run.note(**{key: row[key] for key in (*shown, "peak_mib", "ratio", "fastest", "ways")})

            run.attempt(cost, network=net, precision=precision, compiled=compiled)


def pictures(sizes: Sizes) -> RetrievalDataset:
    """As many images as there are queries, of classes that a network with random weights can tell apart."""
    rng, shape = np.random.default_rng(0), attack_cost.NETS[sizes.net].shape
    labels = np.arange(sizes.queries) % sizes.classes
    middle = rng.integers(32, 224, (sizes.classes, *shape), dtype=np.uint8)
    images = np.stack([middle[label] + rng.integers(0, 32, shape, dtype=np.uint8) for label in labels])
    return RetrievalDataset(name="drawn", split="test", images=ArrayImages(images), labels=labels)


def network(name: str) -> Embedder:
    """A network of ``attack_cost`` with random weights."""
    torch.manual_seed(0)
    net = attack_cost.NETS[name]
    coloured = attack_cost.IMAGENET if net.shape[0] == 3 else {}
    return Embedder(net.make(), net.shape, name=name, **coloured).eval()


@true_float32()
def whole(run: Run) -> None:
    """A whole ERS run: a batch of each search first, then as many searches on all queries as the time allows."""
    sizes, device = run.sizes, run.where
    dataset, rules = pictures(sizes), dmlbench.load_protocol(sizes.protocol)
    subjects: list[Any] = []
    clean = timed(lambda: subjects.append(prepare(network(sizes.net), dataset, device=run.device)), device)
    subject, count = subjects[0], len(dataset.query)
    run.note(part="embedding", queries=count, seconds=clean)
    ranked = timed(lambda: benign_arrays(subject, rules.clustering_seeds), device)
    run.note(part="clean metrics", queries=count, seconds=ranked)
    size = auto_batch(dataset, device, subject.embedder)
    first = replace(subject, rows=subject.rows[:size], scene=subject.scene[:size])

    def seconds_of(search: Search, on: Any) -> float:
        return timed(lambda: run_search(on, search, rules.seed, size, Silent()), device)

    planned, expected, taken = searches(rules, rules.components), {}, {}
    for search in planned:
        seconds_of(search, first)  # the first time pays for what is made once
        expected[search.name] = seconds_of(search, first) / len(first.rows) * count
        run.note(part=search.name, queries=len(first.rows), seconds=expected[search.name] * len(first.rows) / count)
    for search in planned:
        if 1.3 * expected[search.name] > run.left:
            continue
        taken[search.name] = seconds_of(search, subject)
        run.note(part=search.name, queries=count, seconds=taken[search.name], expected=expected[search.name])
    total = clean + ranked + sum((expected | taken).values())
    run.note(part=f"{rules.name}, whole", queries=count, seconds=total, measured=f"{len(taken)} of {len(planned)}")


def strict(run: Run) -> None:
    """The worst case on more and more queries, as far as the time allows; what the last number of them would take."""
    name, counts = run.sizes.strict
    dataset = pictures(run.sizes)
    each = 0.0
    for n in counts:
        if 1.3 * each * n > run.left:
            run.note(protocol=name, queries=counts[-1], expected=each * counts[-1])
            return
        began = time.monotonic()
        found = evaluate(network(run.sizes.net), dataset, name, limit=n, device=run.device)
        spent = time.monotonic() - began
        run.note(
            protocol=name, queries=n, seconds=spent, gradients_per_query=found.extras["strict"]["gradients_per_query"]
        )


def clustering(run: Run) -> None:
    """k-means with as many clusters as SOP has test classes, and the clean metrics of as many entries."""
    s = run.sizes
    for k_means in (True, False):
        for row in attack_cost.metric_costs(
            s.entries, s.clusters, s.dimensions, run.where, k_means, s.iterations, timed
        ):
            run.note(entries=s.entries, clusters=s.clusters, **row)


def public(run: Run) -> None:
    """One batch of each attack by the public code and by ours: the same network, images, gallery, eps and steps."""
    if run.public is None:
        run.note(left_out="no checkout was named with --public")
        return
    sys.path.insert(0, str(run.public))
    from robrank.attacks.advrank import AdvRank

    sizes, device = run.sizes, run.where
    net = attack_cost.NETS[sizes.net]
    embedder = network(sizes.net).to(device)
    ready = ready_to_attack(embedder, sizes.gallery or net.gallery, device)
    images = torch.rand(sizes.nets[sizes.net], *net.shape, device=device)
    scene = attack_cost.scene_for(ready, images, sizes.gallery or net.gallery)
    threat, rng = Threat("linf", net.eps, net.step, sizes.steps), Rng(0, scene.row)
    for name in sizes.public:
        kind, sign = name.rstrip("+-"), name[len(name.rstrip("+-")) :]
        theirs = AdvRank(
            embedder, eps=threat.radius, alpha=threat.stride, pgditer=threat.steps, attack_type=kind, M=1, W=1,
            pm=sign or None, metric="N", device=str(device),
        )  # fmt: skip
        attack = ATTACKS[name]

        def ours(attack: Any = attack) -> None:
            part = choose_targets(attack, scene, rng)
            found = craft(ready, attack, OPTIMIZERS["pgd"], threat, images, part, rng)
            measure(ready, attack, threat, found, images, part)

        def other(theirs: Any = theirs) -> None:
            theirs.attack(images, scene.labels, (scene.gallery.embeddings, scene.gallery.labels))

        def pair(name: str = name) -> None:
            ours(), other()
            seconds = min(timed(ours, device) for _ in range(2)), min(timed(other, device) for _ in range(2))
            run.note(attack=name, batch=len(images), ours=seconds[0], public=seconds[1], times=seconds[1] / seconds[0])

        run.attempt(pair, attack=name)


def profile(run: Run) -> None:
    """Where the time of the steps goes, by torch operation."""
    net, attack = run.sizes.net, run.sizes.attacks[-1]
    run.note(network=net, attack=attack, table=attack_cost.profile(net, attack, settings(run, net), run.where))


PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "machine": (machine, 0.1),
    "tests": (tests, 0.15),
    "steps": (steps, 0.4),
    "whole": (whole, 0.4),
    "strict": (strict, 0.4),
    "clustering": (clustering, 0.4),
    "public": (public, 0.5),
    "profile": (profile, 1.0),
}
"""Each part and the share that it may take of the time that is left when it begins."""


def alone(part: Callable[[Run], None], run: Run) -> str:
    """Run a part in a process of its own; how it ended, in words."""

    def work() -> None:
        try:
            part(run)
        except BaseException as error:
            run.note(failed=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            raise

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(max(1.0, run.left) + GRACE)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "stopped: its time was over"
    return "done" if process.exitcode == 0 else f"failed, exit code {process.exitcode}"


def page(found: Mapping[str, Row]) -> str:
    """The parts as Markdown: a table each, and texts as they are."""
    lines = ["# GPU run", "", f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`", ""]
    for name, part in found.items():
        described = " ".join((PARTS[name][0].__doc__ or "").split())
        lines += [f"## {name}", "", f"{described} {part['ended']}; {part['seconds']:.1f} s.", ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row if key != "table"))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [f"| {' | '.join(_shown(row.get(key)) for key in columns)} |" for row in part["rows"]]
            lines.append("")
        for row in part["rows"]:
            lines += ["```", row["table"].rstrip(), "```", ""] if "table" in row else []
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items())
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|")


def main() -> int:
    """Every part in turn; 1 where one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together; default: 9")
    parser.add_argument("--out", type=Path, required=True, help="the folder of gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same at sizes of seconds on a CPU")
    parser.add_argument(
        "--public", type=Path, metavar="CHECKOUT", help="of the public attack code, to time beside ours"
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="default: all")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}: there are {', '.join(PARTS)}")
    prepare_folder(args.out)
    end, found = time.monotonic() + 60 * args.minutes, dict[str, Row]()
    for name in args.parts:
        part, share = PARTS[name]
        began, log = time.monotonic(), args.out / f".{name}.jsonl"
        log.unlink(missing_ok=True)
        log.touch()
        run = Run(TINY if args.tiny else WHOLE, args.device, began + share * max(0.0, end - began), log, args.public)
        print(f"{name}: at most {run.left:.0f} s", flush=True)
        ended = alone(part, run)
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        log.unlink()
        found[name] = {"ended": ended, "seconds": time.monotonic() - began, "rows": rows}
        write_atomic(args.out / "gpu.json", json_bytes({"minutes": args.minutes, "tiny": args.tiny, "parts": found}))
        write_atomic(args.out / "gpu.md", page(found).encode())
        print(f"{name}: {ended}", flush=True)
    return int(any(part["ended"] != "done" for part in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""What an attack costs beside what nobody can avoid: steps x (forward + backward to the input).

Prints, for each network and attack, seconds for one batch, images per second, peak memory and the
ratio to the bare cost of the fastest way to run that network on that device. Attack and bare cost are
timed in turn, pair by pair, and the ratio is the median over the pairs, so that a busy machine moves
both. Weights, images and gallery are random: the cost does not depend on what they hold.

    python benchmarks/attack_cost.py                                  # digits and golden networks
    python benchmarks/attack_cost.py --net c2f2 --gallery 60000       # the gallery product is real work
    python benchmarks/attack_cost.py --net resnet18 --gallery 6000 --batch 16 --steps 8
    python benchmarks/attack_cost.py --net resnet18 --compile         # gradient steps through torch.compile
    python benchmarks/attack_cost.py --metrics 60502                  # retrieval and clustering metrics

The bare cost is that of the precision in which the attack makes its gradients (--precision; auto is tf32 on a GPU
that has it), and of a compiled network too with --compile and on CUDA.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dmlbench.attacks import ATTACKS, choose_targets, craft, measure
from dmlbench.embedding import DISTANCES, Embedder
from dmlbench.fast.compiled import Steps
from dmlbench.fast.compiled import ready as ready_to_attack
from dmlbench.fast.exact import gradients_in, true_float32
from dmlbench.fast.kmeans import lloyd
from dmlbench.fast.rounded import settled
from dmlbench.metrics import agreement, kmeans, mean, retrieval
from dmlbench.models import ARCHITECTURES
from dmlbench.models.spec import PRECISIONS
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.plan import forget_peak, peak_mib, timed
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene
from dmlbench.threat import Threat

ERS = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES", "LTM", "GTM", "GTT")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Net:
    """A network of the benchmark: how it is made, its input, gallery size and threat by default."""

    make: Callable[[], torch.nn.Module]
    shape: tuple[int, int, int]
    gallery: int
    batch: int
    eps: str
    step: str


def _timm(name: str) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=512)

    return make


NETS = {
    "digits": Net(lambda: ARCHITECTURES["smallcnn"](), (1, 8, 8), 896, 256, "40/255", "2/255"),
    "golden": Net(lambda: ARCHITECTURES["conv3"](), (1, 28, 28), 2120, 256, "77/255", "3/255"),
    "c2f2": Net(lambda: ARCHITECTURES["c2f2"](), (1, 28, 28), 60000, 256, "77/255", "3/255"),
    "resnet18": Net(_timm("resnet18"), (3, 224, 224), 6000, 32, "8/255", "3/255"),
    "resnet50": Net(_timm("resnet50"), (3, 224, 224), 6000, 32, "8/255", "3/255"),
    "vit_s": Net(_timm("vit_small_patch16_224"), (3, 224, 224), 6000, 32, "8/255", "3/255"),
}


def clock(name: str) -> Callable[[Callable[[], object], torch.device], float]:
    """Seconds of a call: "wall", or "process" time, which other programs on a busy machine hardly change."""
    if name == "wall":
        return timed

    def processed(call: Callable[[], object], device: torch.device) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return processed


def ways(embedder: Embedder, compiled: bool) -> dict[str, torch.nn.Module]:
    """The ways to run the network that compete for "fastest"; pixels in, network's output out."""
    plain = copy.deepcopy(embedder.network).eval().requires_grad_(False)
    folded = embedder.frozen(embedder.device).network
    found = {
        "as it is": plain,
        "channels_last": copy.deepcopy(plain).to(memory_format=torch.channels_last),
        "folded": copy.deepcopy(folded).to(memory_format=torch.contiguous_format),
        "folded, channels_last": folded,
    }
    if compiled or embedder.device.type == "cuda":
        found["folded, channels_last, compiled"] = torch.compile(folded)
    return found


def bare(network: torch.nn.Module, images: torch.Tensor, steps: int, precision: str) -> Callable[[], None]:
    """``steps`` times forward and backward to the input, nothing else."""
    with torch.no_grad():
        towards = torch.randn_like(network(images[:1])).expand(len(images), -1).contiguous()
    dtype = torch.bfloat16 if precision == "bfloat16" else None

    def run() -> None:
        for _ in range(steps):
            x = images.detach().requires_grad_(True)
            with gradients_in(precision):
                with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                    y = network(x)
                torch.autograd.grad(y, x, towards.to(y.dtype))

    return run


def scene_for(embedder: Embedder, images: torch.Tensor, entries: int) -> Scene:
    """A random gallery of ``entries`` in 100 classes whose first rows are the images' own."""
    with torch.no_grad():
        clean = embedder(images)
    gallery = F.normalize(torch.randn(entries, clean.shape[1], device=images.device), dim=1)
    gallery[: len(clean)] = clean
    labels = torch.arange(entries, device=images.device) % 100
    rows = torch.arange(len(images), device=images.device)
    return Scene(
        distance=embedder.distance,
        gallery=Gallery.seen(gallery, labels, embedder.precision),
        clean=clean,
        labels=labels[: len(clean)],
        row=rows,
        chosen=rows.new_zeros(len(images), 0),
    )


@true_float32()
def costs(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row for each attack on one network; as within a run, only what may be rounded is."""
    net, seconds_of = NETS[name], clock(args.clock)
    batch, entries = args.batch or net.batch, args.gallery or net.gallery
    torch.manual_seed(0)
    coloured = IMAGENET if net.shape[0] == 3 else {}
    embedder = Embedder(net.make(), net.shape, name=name, **coloured).eval().to(device)
    embedder.precision, embedder.compiled = settled(args.precision, entries, device), args.compile
    images = torch.rand(batch, *net.shape, device=device)
    threat = Threat("linf", net.eps, net.step, args.steps)
    contenders = {
        way: bare(network, images.contiguous(memory_format=torch.channels_last), args.steps, embedder.precision)
        for way, network in ways(embedder, args.compile).items()
    }
    trials: dict[str, list[float]] = {way: [] for way in contenders}
    for _ in range(1 + max(2, args.repeats // 3)):
        for way, run in contenders.items():
            trials[way].append(seconds_of(run, device))
    fastest = min(trials, key=lambda way: statistics.median(trials[way][1:]))
    floor = contenders[fastest]
    ready = ready_to_attack(embedder, entries, device)
    whole = scene_for(ready, images, entries)
    rng = Rng(0, torch.arange(batch, device=device))
    rows = []
    for attack_name in args.attacks:
        attack = ATTACKS[attack_name]

        def attacked(attack: object = attack) -> None:
            part = choose_targets(attack, whole, rng)  # type: ignore[arg-type]
            found = craft(ready, attack, OPTIMIZERS["pgd"], threat, images, part, rng)  # type: ignore[arg-type]
            measure(ready, attack, threat, found, images, part)  # type: ignore[arg-type]

        forget_peak(device)
        attacked()
        peak = peak_mib(device)
        pairs = [(seconds_of(floor, device), seconds_of(attacked, device)) for _ in range(args.repeats)]
        seconds = statistics.median(a for _, a in pairs)
        rows.append(
            {
                "network": name,
                "attack": attack_name,
                "batch": batch,
                "gallery": entries,
                "dimensions": whole.clean.shape[1],
                "steps": args.steps,
                "device": device.type,
                "precision": embedder.precision,
                "compiled": args.compile and not (isinstance(ready.steps, Steps) and ready.steps.trouble),
                "threads": torch.get_num_threads(),
                "clock": args.clock,
                "fastest": fastest,
                "ways": {way: statistics.median(found[1:]) for way, found in trials.items()},
                "bare_seconds": statistics.median(b for b, _ in pairs),
                "seconds": seconds,
                "images_per_second": batch / seconds,
                "peak_mib": peak,
                "ratio": statistics.median(a / b for b, a in pairs),
            }
        )
        print(
            f"| {name} | {attack_name} | {batch} | {entries} x {rows[-1]['dimensions']} | {rows[-1]['bare_seconds']:.3f} "
            f"| {seconds:.3f} | {batch / seconds:.1f} | {peak:.0f} | {rows[-1]['ratio']:.2f} |",
            flush=True,
        )
    return rows


@true_float32()
def profile(name: str, attack_name: str, args: argparse.Namespace, device: torch.device) -> str:
    """A table of where the time of a few steps of one attack goes, by torch operation."""
    net = NETS[name]
    embedder = Embedder(net.make(), net.shape, name=name, **(IMAGENET if net.shape[0] == 3 else {})).eval()
    embedder.precision, embedder.compiled = args.precision, args.compile
    ready = ready_to_attack(embedder.to(device), args.gallery or net.gallery, device)
    images = torch.rand(args.batch or net.batch, *net.shape, device=device)
    rng, attack = Rng(0, torch.arange(len(images), device=device)), ATTACKS[attack_name]
    scene = choose_targets(attack, scene_for(ready, images, args.gallery or net.gallery), rng)
    threat = Threat("linf", net.eps, net.step, args.steps)
    craft(ready, attack, OPTIMIZERS["pgd"], threat, images, scene, rng)
    with torch.profiler.profile(acc_events=True) as seen:
        craft(ready, attack, OPTIMIZERS["pgd"], threat, images, scene, rng)
    column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=column, row_limit=16, max_name_column_width=44)


def clusters_of(points: torch.Tensor, k: int, iterations: int) -> np.ndarray:
    """(N, 1) clusters by the k-means of the points' device."""
    if points.device.type == "cuda":
        return lloyd(points, k, 0, iterations).cpu().numpy()[:, None]
    return kmeans(points.numpy(), k, 0, iterations)[:, None]


def metric_costs(
    entries: int,
    classes: int,
    dimensions: int,
    device: torch.device,
    k_means: bool,
    iterations: int,
    timed: Callable[..., float],
) -> list[dict[str, object]]:
    """What the clean metrics of a gallery of this size take; classes overlap as those of a fair model do. Printed as it goes."""
    torch.manual_seed(0)
    middles = F.normalize(torch.randn(classes, dimensions), dim=1)
    labels = torch.arange(entries) % classes
    points = F.normalize(middles[labels] + 0.045 * torch.randn(entries, dimensions), dim=1).to(device)
    rows = torch.arange(entries, device=device)
    scene = Scene(
        distance=DISTANCES["N"],
        gallery=Gallery(points, labels.to(device)),
        clean=points,
        labels=labels.to(device),
        row=rows,
        chosen=rows.new_zeros(entries, 0),
    )
    print(f"| metric of {entries} x {dimensions}, {classes} classes | seconds | peak MiB | value |")
    print("| --- | --- | --- | --- |")
    found: dict[str, object] = {}
    told: list[dict[str, object]] = []

    def row(metric: str, call: Callable[[], object], value: Callable[[], str]) -> None:
        forget_peak(device)
        seconds, peak = timed(call, device), peak_mib(device)
        told.append({"metric": metric, "seconds": seconds, "peak_mib": peak, "value": value()})
        print(f"| {metric} | {seconds:.1f} | {peak:.0f} | {told[-1]['value']} |", flush=True)

    def shown() -> str:
        return ", ".join(f"{name} {mean(values):.2f}" for name, values in found.items())  # type: ignore[arg-type]

    if k_means:
        means = partial(clusters_of, points, classes, iterations)
        row(f"k-means, one start, {iterations} iterations", lambda: found.update(clusters=means()), lambda: "")
    else:
        row("R@k, mAP, MAP@R", lambda: found.update(retrieval(scene)), shown)
    clusters = found.get("clusters", torch.randint(classes, (entries, 1)).numpy())
    row(
        "NMI and AMI",
        lambda: found.update(agreement(labels.numpy(), clusters)),  # type: ignore[arg-type]
        lambda: f"{found['nmi']:.2f}, {found['ami']:.2f}",
    )
    return told


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=sorted(NETS), help="default: digits and golden")
    parser.add_argument("--gallery", type=int, help="entries; default: the network's own")
    parser.add_argument("--batch", type=int, help="images attacked at a time; default: the network's own")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=list(ERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--compile", action="store_true", help="gradient steps through torch.compile")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--profile", metavar="ATTACK", help="show where the time of one batch goes instead")
    parser.add_argument("--metrics", type=int, metavar="N", help="time the clean metrics of N entries instead")
    parser.add_argument("--classes", type=int, default=11316, help="of --metrics; that many clusters")
    parser.add_argument(
        "--kmeans", action="store_true", help="of --metrics: k-means instead of the retrieval metrics; minutes on a CPU"
    )
    parser.add_argument(
        "--iterations", type=int, default=40, help="of k-means; evaluate makes at most 40 (faiss) or 100"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.profile:
        print(profile((args.net or ["digits"])[0], args.profile, args, device))
        return
    if args.metrics:
        metric_costs(args.metrics, args.classes, 512, device, args.kmeans, args.iterations, clock(args.clock))
        return
    print(
        f"torch {torch.__version__}, {platform.machine()}, {device}, {args.threads} threads, {args.steps} steps, {args.clock} time"
    )
    print("| network | attack | batch | gallery | bare s | attack s | images/s | peak MiB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = [row for name in args.net or ("digits", "golden") for row in costs(name, args, device)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

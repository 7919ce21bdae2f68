"""How far a stronger adversary lowers the NMI that ``clustering`` leaves.

    python benchmarks/clustering_truth.py digits-smallcnn-proxyanchor-at@10/255 --out truth

Each CELL is MODEL@EPS. The protocol's own attacks are run first, then this file's search, which shares no code with them: it
descends the soft NMI itself, whose tables are differentiated with everything else, by momentum steps through one pass over
all images; k-means is scikit-learn's, anew at every few steps. With the defaults it takes 2,400 gradients an image where the
protocol takes at most 400: restarts differ in start, temperature, momentum and length of steps. From dmlbench come the model, the data
set and, at the end, the read-out of both: k-means by the protocol's seeds.

OUT holds one file a cell, so that the same command goes on where it was stopped. The table of everything in OUT is printed
and written to OUT/clustering_truth.md.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dmlbench import evaluate, load_dataset, load_model, load_protocol
from dmlbench.kinds.clustering.search import readings
from dmlbench.kinds.clustering.summary import numbers
from dmlbench.run.subject import Subject, prepare
from dmlbench.threat import length

BLOCK = 512
"""Images whose graph is held at a time."""
STARTS = ("clean", "uniform", "corner")
TEMPERATURES = (0.05, 0.025, 0.08)
MOMENTA = (0.0, 0.75, 0.9, 0.5)
FIRST = (1.0, 0.5, 0.25)
"""The first step, in eps; the last is 0."""
FRESH = 5
"""Steps that a k-means serves for."""


def soft_nmi(e: Tensor, classes: Tensor, centres: Tensor, temperature: float) -> Tensor:
    """(): NMI of the classes (N,) and of soft clusters around ``centres`` (k, D), arithmetic mean, 0 to 1."""
    p = torch.softmax(-torch.cdist(e, centres) / temperature, 1)
    both = torch.zeros(int(classes.max()) + 1, len(centres), dtype=p.dtype).index_add(0, classes, p) / len(e)
    both = both.clamp_min(1e-12)
    a, b = both.sum(1), both.sum(0)
    entropies = -(a * a.log()).sum() - (b * b.log()).sum()
    return 2 * (both * (both.log() - a.log()[:, None] - b.log())).sum() / entropies


def embedded(network: torch.nn.Module, images: Tensor) -> Tensor:
    """(N, D) without a graph."""
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(BLOCK)])


def slope(
    network: torch.nn.Module, images: Tensor, classes: Tensor, middles: list[Tensor], temperature: float
) -> Tensor:
    """The gradient of the mean soft NMI over several k-means with respect to every pixel.

    First of the embeddings, then block by block of the pixels through them.
    """
    e = embedded(network, images).requires_grad_(True)
    (of_embeddings,) = torch.autograd.grad(sum(soft_nmi(e, classes, c, temperature) for c in middles), e)
    parts = []
    for x, g in zip(images.split(BLOCK), of_embeddings.split(BLOCK), strict=True):
        x = x.detach().requires_grad_(True)
        parts.append(torch.autograd.grad((network(x) * g).sum(), x)[0])
    return torch.cat(parts)


def middles_of(e: Tensor, k: int, count: int, seed: int) -> list[Tensor]:
    """Centroids of ``count`` k-means of scikit-learn."""
    found = (KMeans(k, n_init=1, max_iter=30, random_state=seed + j).fit(e.numpy()) for j in range(count))
    return [torch.from_numpy(means.cluster_centers_).float() for means in found]


def hunt(
    subject: Subject, eps: float, restarts: int, steps: int, look: int, seeds: tuple[int, ...]
) -> tuple[float, list[float]]:
    """The lowest NMI (percent) of all looks, read by the protocol's k-means, and the lowest of each restart."""
    network, clean = subject.embedder, subject.images(0, len(subject.rows))
    labels = subject.scene.labels.numpy()
    classes = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    k, lows = int(classes.max()) + 1, []
    for r in range(restarts):
        draws = torch.Generator().manual_seed(r)
        noise = {"clean": 0.0, "uniform": 2 * torch.rand(clean.shape, generator=draws) - 1,
                 "corner": torch.sign(torch.rand(clean.shape, generator=draws) - 0.5)}[STARTS[r % 3]]  # fmt: skip
        x, velocity = (clean + eps * noise).clamp(0, 1), torch.zeros_like(clean)
        low = math.inf
        for step in range(steps):
            if step % FRESH == 0:
                middles = middles_of(embedded(network, x), k, 5, 1000 * r + step)
            g = slope(network, x, classes, middles, TEMPERATURES[(r // 3) % 3])
            velocity = MOMENTA[r % 4] * velocity + g / g.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
            size = eps * FIRST[r % 3] * (1 + math.cos(math.pi * step / steps)) / 2
            x = torch.min(torch.max(x - size * velocity.sign(), clean - eps), clean + eps).clamp(0, 1)
            if (step + 1) % look == 0:
                found = readings(subject, embedded(network, x), labels, seeds)
                low = min(low, numbers(labels, found["clusters"], found["value"])["nmi"])
        assert float((x - clean).abs().max()) <= eps + 1e-6
        lows.append(low)
    return min(lows), lows


def cell(name: str, out: Path, restarts: int, steps: int, look: int) -> None:
    """Measure one cell and keep it."""
    model, _, eps = name.partition("@")
    file = out / f"{name.replace('/', '_')}.json"
    if file.exists():
        return
    embedder, rules = load_model(model), load_protocol("clustering")
    data = load_dataset(embedder.card.dataset.name)
    one = rules.model_copy(update={"grid": {"colour": (eps,), "1000": (eps,)}})
    began = time.process_time()
    rows = {r["attack"]: r["nmi"] for r in evaluate(embedder, data, one, device="cpu").extras["clustering"]["attacks"]}
    own = time.process_time() - began
    low, lows = hunt(prepare(embedder, data, device="cpu"), length(eps), restarts, steps, look, rules.clustering_seeds)
    record = {"cell": name, "protocol": rules.sha256, "nmi": rows, "truth": low, "restarts": lows, "gradients": restarts * steps,
              "cpu": [own, time.process_time() - began - own]}  # fmt: skip
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")


def table(out: Path) -> str:
    """Everything in ``out``."""
    lines = ["| model @ eps | C1 to C3 | joint | union | this adversary | its restarts | CPU seconds: protocol, adversary |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for file in sorted(out.glob("*.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        old = min(r["nmi"][name] for name in ("C1", "C2", "C3"))
        shown = [f"{v:.1f}" for v in (old, r["nmi"]["joint"], r["nmi"]["union"], r["truth"])]
        spread = f"{min(r['restarts']):.1f} to {max(r['restarts']):.1f}"
        lines.append(f"| {' | '.join([r['cell'], *shown, spread, ', '.join(f'{s:.0f}' for s in r['cpu'])])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Every cell that is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="MODEL@EPS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--restarts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--look", type=int, default=20, help="read NMI every so many steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cells:
        cell(name, options.out, options.restarts, options.steps, options.look)
    (options.out / "clustering_truth.md").write_text(table(options.out), encoding="utf-8")
    print(table(options.out), end="")


if __name__ == "__main__":
    main()

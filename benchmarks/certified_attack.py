"""Does a search break what a certificate says cannot be broken?

    python benchmarks/certified_attack.py RUN RUN ... --out FILE

A RUN is a run folder of a protocol of kind "certified". Every query that it certifies is moved by a search within its own certified radius, and within a
few times that, where nothing is promised. The search climbs the smoothed model's margin along gradients through the mean of noisy copies, new ones at
every step (expectation over transformations), with momentum and steps that shorten along a cosine: once from the clean picture and once from a random
one on the rim. Its margin is that of ``adversary.py``, which shares no code with dmlbench's. Pictures may leave [0, 1], as certificates allow.

What counts is the mean embedding of fresh copies at the end: 500 for each of both, and for the worse one as many as the protocol takes wherever
these leave it near 0.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from adversary import Field
from torch import Tensor

from dmlbench import load_dataset, load_model
from dmlbench.embedding import Embedder
from dmlbench.files import write_atomic
from dmlbench.kinds.certified.measure import RADIUS, smoothed
from dmlbench.results import load
from dmlbench.rng import Rng, seed_of
from dmlbench.run.subject import prepare

COPIES, STEPS, DECAY = 16, 20, 0.9
"""Noisy copies that a gradient is the mean over; steps of a search; weight of the earlier gradients."""
FIRST, NEAR = 500, 0.05
"""Copies that a picture is read with first, and the margin under which all are taken."""
BLOCK = 128
EDGE = 1 - 1e-4
"""Certificates hold for changes shorter than the radius."""
BEYOND = 100
"""Certified queries of each run that are also moved farther than is certified."""


@dataclass(frozen=True, eq=False)
class Target:
    """A smoothed model and its queries: clean (q, C, H, W), their rows (q,) in the data set, and the gallery."""

    embedder: Embedder
    field: Field
    rows: Tensor
    sigma: float
    samples: int

    def margin(self, images: Tensor, q: Tensor, stream: Rng, copies: int) -> Tensor:
        """(b,) above 0 where the mean of noisy copies is misranked, with a gradient."""
        noise = self.sigma * torch.stack([stream.normal(*images.shape[1:]) for _ in range(copies)], dim=1)
        e = self.embedder((images[:, None] + noise).flatten(0, 1)).unflatten(0, (len(images), copies)).mean(1)
        return self.field.margin(e, q)[0]

    def climbed(self, q: Tensor, radius: Tensor, rim: bool) -> Tensor:
        """The pictures of the queries ``q`` after one search within ``radius`` (b,) each."""
        clean, stream = self.field.clean[q], Rng(seed_of("certified attack", rim), self.rows[q])
        size = radius.view(-1, 1, 1, 1)
        moved = unit(stream.normal(*clean.shape[1:])) * size if rim else torch.zeros_like(clean)
        momentum = torch.zeros_like(clean)
        for i in range(STEPS):
            x = (clean + moved).requires_grad_()
            (gradient,) = torch.autograd.grad(self.margin(x, q, stream, COPIES).sum(), x)
            momentum = DECAY * momentum + unit(gradient)
            moved = moved + size * (1 + math.cos(math.pi * i / STEPS)) / 2 * unit(momentum)
            moved = moved * (size / lengths(moved).clamp_min(1e-20)).clamp_max(1.0)
        return clean + moved

    def read(self, images: Tensor, q: Tensor, copies: int) -> Tensor:
        """(b,) the margin of the smoothed embedding, by fresh copies."""
        stream = Rng(seed_of("certified read", copies), self.rows[q])
        return self.field.margin(smoothed(self.embedder, images, stream, self.sigma, copies).float(), q)[0]

    def attacked(self, q: Tensor, radius: Tensor) -> Tensor:
        """(b,) the larger margin of two searches, 0 or above where the query is broken."""
        tried = [self.climbed(q, radius, rim) for rim in (False, True)]
        found, worse = torch.stack([self.read(images, q, FIRST) for images in tried]).max(0)
        images = torch.where(worse.view(-1, 1, 1, 1) == 0, *tried)
        near = (found > -NEAR).nonzero()[:, 0]
        if len(near):
            found[near] = self.read(images[near], q[near], self.samples)
        return found


def unit(images: Tensor) -> Tensor:
    """Each at length 1."""
    return images / lengths(images).clamp_min(1e-20)


def lengths(images: Tensor) -> Tensor:
    """(b, 1, 1, 1) length of each as a vector."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def counts(run: Path, factors: Sequence[float], most: int | None) -> tuple[str, list[tuple[int, int]]]:
    """The model, and by factor of the certified radius how many queries were attacked and how many were broken."""
    e = load(run)
    said = e.extras["certified"]
    dataset = load_dataset(e.dataset.name)
    subject = prepare(load_model(e.model.id), dataset, limit=len(e.arrays["query"]), device="cpu")
    assert np.array_equal(subject.rows, e.arrays["query"]), "the run's queries are others"
    entries, scene = subject.scene.gallery, subject.scene
    clean = subject.images(0, len(subject.rows))
    groups = None if scene.groups is None or entries.groups is None else (scene.groups, entries.groups)
    field = Field(subject.embedder, entries.embeddings, entries.labels, scene.labels, scene.row, clean, groups)
    target = Target(subject.embedder, field, torch.from_numpy(subject.rows), said["sigma"], said["samples"])
    certified = torch.from_numpy(np.flatnonzero(e.arrays[RADIUS] > 0)[:most])
    radius, found = torch.from_numpy(e.arrays[RADIUS]).float(), []
    for factor in factors:
        these = certified if factor == 1 else certified[:BEYOND]
        broken = 0
        for q in these.split(BLOCK):
            broken += int((target.attacked(q, factor * EDGE * radius[q]) >= 0).sum())
        found.append((len(these), broken))
    return e.model.id, found


def main(argv: Sequence[str] | None = None) -> int:
    """The number of certificates that were broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--factors", default="1,2,4,8", help="of the certified radius, the first 1")
    parser.add_argument("--limit", type=int, help="certified queries of each run at most")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    factors = [float(factor) for factor in options.factors.split(",")]
    lines = [
        f"| model | {' | '.join(f'{f:g} × radius' for f in factors)} |",
        f"|---|{'---|' * len(factors)}",
    ]
    total = broken = 0
    for run in options.runs:
        name, found = counts(run, factors, options.limit)
        lines.append(f"| `{name}` | {' | '.join(f'{b} of {n}' for n, b in found)} |")
        total, broken = total + found[0][0], broken + found[0][1]
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(f"{table}broken within their certified radius: {broken} of {total}")
    if options.out:
        write_atomic(options.out, table.encode())
    return broken


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))

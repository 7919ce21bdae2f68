"""How a training run goes: a row of its log, the quick check that it is made of, and when a model has collapsed."""

import csv
import io
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmlbench.embedding import Embedder
from dmlbench.objectives import right_by
from dmlbench.optimizers import pgd
from dmlbench.rng import Rng
from dmlbench.training.defenses import Learner
from dmlbench.training.recipe import Recipe

QUICK_QUERIES = 256
QUICK_VALUES = 1 << 21
"""Pixel values that the quick check looks at in one go: all of them up to 32x32, 42 images of 128x128."""
QUICK_STEPS = 8
COLLAPSE = 0.02
"""A model whose embeddings are on average nearer than this share of their length has collapsed."""
COLLAPSE_FROM = 100
"""The first step at which collapse is checked: an untrained network also gives all images nearly the same embedding."""


@dataclass(frozen=True)
class Progress:
    """One row of the log.

    Attributes:
        iteration: steps done.
        loss: mean training loss since the row before.
        recall_at_1: of a fixed sample of training images among themselves, percent.
        attacked_recall_at_1: the same after a quick attack (8 PGD steps on the margin), percent.
        spread: mean distance of two embeddings over their mean length; near 0 is collapse.
        lr: learning rate.
        seconds: since this process began.
    """

    iteration: int
    loss: float
    recall_at_1: float
    attacked_recall_at_1: float
    spread: float
    lr: float
    seconds: float


def margins(
    embedder: Embedder,
    embeddings: Float[Tensor, "b d"],
    labels: Int[Tensor, " n"],
    gallery: Float[Tensor, "n d"],
    rows: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """Nearest other-class minus nearest same-class distance; image i is gallery entry ``rows[i]``, left out.

    Args:
        labels: of the gallery.
        rows: by default all of it in order.
    """
    entries = torch.arange(len(labels), device=labels.device)
    rows = entries if rows is None else rows
    d = embedder.distance.pairwise(embeddings, gallery)
    same = labels[rows][:, None] == labels[None, :]
    itself = rows[:, None] == entries[None, :]
    nearest = torch.where(same & ~itself, d, torch.inf).amin(1)
    return torch.where(same, torch.inf, d).amin(1) - nearest


def quick_check(learner: Learner, recipe: Recipe, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Benign and attacked R@1 (percent) of images among themselves, and the spread of their embeddings.

    The attack is PGD with few, longer steps on the margin to the nearest entry of another class: a
    thermometer for the training log, not an evaluation.
    """
    embedder = learner.embedder.frozen()
    parts = torch.arange(len(images), device=images.device).split(max(1, QUICK_VALUES // images[0].numel()))
    with torch.no_grad():
        clean = torch.cat([embedder(images[rows]) for rows in parts])
        benign = right_by(margins(embedder, clean, labels, clean))
        length = clean.norm(dim=1).mean().clamp_min(1e-12)
        spread = (clean - clean.roll(len(clean) // 2, 0)).norm(dim=1).mean() / length
    threat = recipe.threat.but(steps=QUICK_STEPS, step=2.5 * recipe.threat.radius / QUICK_STEPS, start="clean")
    right = 0
    for rows in parts:

        def margin(x: Tensor, rows: Tensor = rows) -> Tensor:
            return margins(embedder, embedder(x), labels, clean, rows)

        moved = pgd(margin, images[rows], threat, Rng(0, rows))
        with torch.no_grad():
            right += int(right_by(margin(moved)).sum())
    return 100.0 * float(benign.float().mean()), 100.0 * right / len(images), float(spread)


def collapsed(rows: list[Progress], last: bool) -> bool:
    """Have the embeddings collapsed to nearly one point: at two checks in a row, or at the ``last`` one of the run?

    What grows is still leaving the state that untrained networks are in.
    """

    def is_collapsed(i: int) -> bool:
        rising = i > 0 and rows[i].spread > 1.1 * rows[i - 1].spread
        return not rows[i].spread >= COLLAPSE and not rising

    if not rows or rows[-1].iteration < COLLAPSE_FROM:
        return False
    before = len(rows) > 1 and rows[-2].iteration >= COLLAPSE_FROM and is_collapsed(len(rows) - 2)
    return is_collapsed(len(rows) - 1) and (last or before)


def log_bytes(rows: list[Progress]) -> bytes:
    """The log as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Progress.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) for k, v in asdict(row).items()} for row in rows)
    return text.getvalue().encode()

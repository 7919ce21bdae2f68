"""What each query still finds when its picture, or every picture, is corrupted.

A picture is corrupted in its 8 bits as the model is fed it (:mod:`dmlbench.corruptions`). What comes out depends on the picture,
the protocol's seed, the corruption and the severity alone, so the numbers do not depend on batches, shards or a resume.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import AfterValidator, Field
from torch import Tensor

from dmlbench.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from dmlbench.embedding import require_finite
from dmlbench.kinds.base import Outcome, Settings, ascending
from dmlbench.metrics import mean, retrieval
from dmlbench.protocol import Component, Protocol
from dmlbench.run.subject import Progress, Subject
from dmlbench.run.units import Arrays, Work
from dmlbench.scene import Gallery

BLOCK = 256
"""Pictures corrupted and embedded at a time."""
ALSO = ("map_at_r",)
"""Metrics of each query besides R@1."""
CLEAN = "clean"
"""Under which name the sample holds the pictures before any corruption."""


class CorruptionSettings(Settings):
    """``[settings]``."""

    severities: Annotated[
        tuple[Annotated[int, Field(ge=SEVERITIES[0], le=SEVERITIES[-1])], ...],
        Field(min_length=1),
        AfterValidator(ascending),
    ] = SEVERITIES
    """of every corruption, ascending"""
    gallery: bool = False
    """whether the gallery is corrupted too"""


def corruptions_and_severities(protocol: Protocol, shape: Sequence[int]) -> list[tuple[str, int]]:
    """Every corruption at every severity, but those that change colours for grey pictures."""
    names = [name for name, c in CORRUPTIONS.items() if not c.colour or shape[0] > 1]
    return [(name, severity) for name in names for severity in CorruptionSettings.of(protocol).severities]


def components(protocol: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each corruption and severity, for pictures of this shape (channels, height, width)."""
    return [
        Component(name=f"{name}@{severity}", attack=name, readout="recall_at_1", worst=0, best=100, optimizer="none")
        for name, severity in corruptions_and_severities(protocol, shape)
    ]


def parsed(part: Component) -> tuple[str, int]:
    """Which corruption a column is of, and at which severity."""
    name, _, severity = part.name.partition("@")
    return name, int(severity)


def pictures(images: Float[Tensor, "b C H W"]) -> UInt8[np.ndarray, "b H W C"]:
    """The images (RGB or grey) in 8 bits, as corruptions take them."""
    eight = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(eight.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def changed(images: Float[Tensor, "b C H W"], name: str, severity: int, seed: int) -> Float[Tensor, "b C H W"]:
    """The images (RGB or grey) under one corruption."""
    eight = np.stack([corrupted(one, name, severity, seed) for one in pictures(images)])
    return torch.from_numpy(eight).permute(0, 3, 1, 2).float() / 255


def embedded(subject: Subject, rows: np.ndarray, name: str, severity: int, seed: int) -> Float[Tensor, "n D"]:
    """Embeddings of the data set's pictures at ``rows`` under one corruption, which sees red first whatever the model is fed.

    Raises:
        DataError: one is NaN or infinite.
    """
    blocks = []
    red_first = subject.embedder.preprocess.red_first
    with torch.no_grad():
        for a in range(0, len(rows), BLOCK):
            images = red_first(changed(red_first(subject.dataset.images[rows[a : a + BLOCK]]), name, severity, seed))
            blocks.append(subject.embedder(images.contiguous().to(subject.device)))
    e = torch.cat(blocks)
    require_finite(e, subject.embedder.name, "corrupted pictures")
    return e


def readings(subject: Subject, protocol: Protocol, name: str, severity: int, seed: int) -> dict[str, np.ndarray]:
    """What every query of ``subject`` finds under one corruption: ``value`` (R@1) and :data:`ALSO`, (Q,) each, percent.

    With ``gallery`` among the protocol's settings the pictures that are searched are corrupted too, each in its own way.
    """
    scene = subject.scene
    scene = replace(scene, clean=embedded(subject, subject.rows, name, severity, seed))
    if CorruptionSettings.of(protocol).gallery:
        e = embedded(subject, subject.dataset.gallery, name, severity, seed)
        scene = replace(scene, gallery=Gallery(e, scene.gallery.labels, groups=scene.gallery.groups))
    metrics = retrieval(scene, (1,))
    return {"value": metrics["recall_at_1"], **{key: metrics[key] for key in ALSO}}


def run(
    subject: Subject,
    protocol: Protocol,
    seed: int,
    batch_size: int,
    progress: Progress,
    sampled: np.ndarray,
    work: Work | None = None,
) -> Outcome | None:
    """Every corruption at every severity; None where ``work`` is a shard, whose part is then done.

    A unit is one corruption at one severity on all queries.
    """
    work = work or Work()
    parts = components(protocol, subject.dataset.images.shape)
    everyone = len(subject.rows) + (len(subject.dataset.gallery) if CorruptionSettings.of(protocol).gallery else 0)
    progress.start("corruptions", everyone * len(parts))

    def unit(i: int) -> Arrays:
        return readings(subject, protocol, *parsed(parts[i]), seed)

    units = {i: (part.name, 0, everyone) for i, part in enumerate(parts)}
    each = work.each("corruptions", units, unit, partial(progress.advance, "corruptions"))
    if work.shard:
        return None
    arrays = {f"{part.name}/{key}": each[i][key] for i, part in enumerate(parts) for key in ("value", *ALSO)}
    seconds = {part.name: float(each[i]["seconds"].sum()) for i, part in enumerate(parts)}
    sample = {CLEAN: subject.images(0, len(subject.rows))[torch.from_numpy(sampled).to(subject.device)].cpu().numpy()}
    clean = {
        key: mean(values) for key, values in retrieval(subject.scene, (1,)).items() if key in ("recall_at_1", *ALSO)
    }
    return Outcome(parts, seconds, arrays, sample, summary(parts, clean, arrays))


def summary(parts: Sequence[Component], clean: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """All that a run says of its queries' outcomes: what goes into ``extras.corruptions``.

    Args:
        clean: ``recall_at_1`` and :data:`ALSO` without a corruption, percent.
        arrays: by column ``value`` and :data:`ALSO`, (Q,) each.
    """
    table = [
        {
            "corruption": parsed(part)[0],
            "severity": parsed(part)[1],
            "extra": CORRUPTIONS[parsed(part)[0]].extra,
            "recall_at_1": mean(arrays[f"{part.name}/value"]),
            **{key: mean(arrays[f"{part.name}/{key}"]) for key in ALSO},
        }
        for part in parts
    ]
    usual = [row for row in table if not row["extra"]]
    means = {key: float(np.mean([row[key] for row in usual])) for key in ("recall_at_1", *ALSO)}
    by_name = {
        name: float(np.mean([row["recall_at_1"] for row in table if row["corruption"] == name]))
        for name in dict.fromkeys(row["corruption"] for row in table)
    }
    worst = min(by_name, key=lambda name: by_name[name])
    return {
        "clean": clean,
        "table": table,
        "mean": means,
        "worst": {"corruption": worst, "recall_at_1": by_name[worst]},
        "retention": 100.0 * means["recall_at_1"] / clean["recall_at_1"] if clean["recall_at_1"] > 0 else None,
    }

"""Doubts about a result, in words: what makes a number mean less than it says."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dmlbench.results import Flag, Measurement
from dmlbench.run.subject import Subject

COLLAPSE = 1e-3
"""Spread of the gallery, relative to the length of its entries, under which a model counts as collapsed."""

NARROW = 0.05
"""Median distance of the gallery's entries, relative to their root mean square length, under which shifts say little."""
ROUNDED = 1e-2
"""Median error of a float32 distance between two entries of the gallery, relative to the distance, above which ranks are partly rounding."""
SAMPLED = 512
"""Entries that the medians are of, at most."""
FLAGS = {
    "randomised": "Two passes of one batch differ: attack scores are too high unless the attack averages over them.",
    "naive-attack": "A defence at test time was attacked as if nobody knew it: attack scores are too high.",
    "batch-dependent": "An image's embedding depends on the other images of its batch: no number means what it says.",
    "collapsed": "The embeddings are nearly constant. Nothing can be moved, so attack scores look high and say nothing "
    "about robustness.",
    "small-spread": "The gallery's embeddings are near one another, so every shift (ES:D) looks small in their length.",
    "out-of-range": "A part is below 0 or above 100, where no attack leads from either end: it counts as 0 or 100 in "
    "ERS, and the search or the model deserves a look.",
    "no-positive": "Some queries have no other image of their class in the gallery and are left out of recall.",
    "nonfinite-gradients": "Some gradients were NaN or infinite and taken as zero: searches stood still there, so "
    "attack scores are too high.",
    "no-attacks": "No attack was run.",
    "rounded-distances": "The gallery's entries are so near one another for their length that float32 cannot tell their distances "
    "apart: recall, clean and under attack, is partly rounding.",
}
"""What each flag means, those of the audit apart (:data:`dmlbench.doubts.audit.FLAGS`)."""


def spread(subject: Subject) -> float:
    """Root mean square distance of the gallery from its mean, relative to the length of its entries."""
    gallery = subject.scene.gallery
    around = gallery.embeddings - gallery.embeddings.mean(0)
    return float(around.square().sum(1).mean().sqrt() / gallery.scale.clamp_min(1e-30))


def between(subject: Subject) -> float:
    """Median distance of two entries of the gallery, relative to their root mean square length.

    Unlike :func:`spread` it does not change where a few entries are long. Of :data:`SAMPLED` entries at the most,
    evenly spread over the gallery.
    """
    if len(subject.scene.gallery) < 2:
        return float("nan")
    entries = _some(subject)
    apart = torch.nn.functional.pdist(entries - entries.mean(0))
    return float(apart.median() / subject.scene.gallery.scale.clamp_min(1e-30))


def rounding(subject: Subject) -> float:
    """Median error of the distances that rankings are read from, relative to the distance, between :data:`SAMPLED` entries of the
    gallery at the most; NaN where no two of them differ."""
    entries, distance = _some(subject), subject.scene.distance
    exact = torch.pdist(entries.double())
    exact = exact.square() / 2 if distance.metric == "cosine" else exact
    first, second = torch.triu_indices(len(entries), len(entries), 1, device=entries.device)
    off = (distance.pairwise(entries, entries)[first, second] - exact).abs() / exact
    return float(off[exact > 0].median())


def _some(subject: Subject) -> Tensor:
    """Entries of the gallery, evenly spread over it: :data:`SAMPLED` at the most."""
    gallery = subject.scene.gallery
    rows = torch.linspace(0, len(gallery) - 1, min(SAMPLED, len(gallery)), dtype=torch.float64).long()
    return gallery.embeddings[rows.to(gallery.labels.device)]


def _outside(m: Measurement, score: float) -> bool:
    """Is the score below 0 or above 100, by more than chance?"""
    low, high = m.interval or (score, score)
    return low > 100.0 or high < 0.0


def doubts_about(subject: Subject, measurements: Sequence[Measurement], nonfinite: int = 0) -> Iterator[Flag]:
    """Every doubt that the model, the numbers and ``nonfinite`` gradients in the searches raise."""
    for flag, sentence in subject.embedder.doubts:
        yield Flag(flag=flag, message=sentence)
    width = spread(subject)
    if width < COLLAPSE:
        yield Flag(
            flag="collapsed",
            message=f"embeddings are (nearly) constant: spread {width:.1e} of their length. "
            "Nothing can be moved, so attack scores look high; they say nothing about robustness.",
        )
    elif (off := rounding(subject)) > ROUNDED:
        yield Flag(
            flag="rounded-distances",
            message=f"float32 distances between two entries of the gallery are off by {off:.1e} of themselves (median), as the entries "
            f"differ by {width:.1e} of their length only: ranks, and so recall, are partly rounding.",
        )
    if any(m.readout == "embedding_shift" for m in measurements) and (apart := between(subject)) < NARROW:
        yield Flag(
            flag="small-spread",
            message=f"two entries of the gallery are {apart:.1e} of their length apart (median): shifts of embeddings "
            "are measured in that length, so that ES:D looks robust whatever the attack does.",
        )
    outside = [m for m in measurements if m.score is not None and _outside(m, m.score)]
    if outside:
        listed = ", ".join(f"{m.component} {m.score:.1f}" for m in outside)
        yield Flag(
            flag="out-of-range",
            message=f"parts outside 0 to 100, which count as 0 or 100 in ERS: {listed}. An attack that fails leaves 100 "
            "at most; more means that the search went the wrong way (docs/audit.md).",
        )
    lonely = int((~subject.scene.has_positive).sum())
    if lonely:
        yield Flag(
            flag="no-positive",
            message=f"{lonely} of {len(subject.rows)} queries have no other image of their class in the gallery: "
            "they are left out of recall, mAP and every part that reads recall.",
        )
    if nonfinite:
        yield Flag(
            flag="nonfinite-gradients",
            message=f"{nonfinite} times the gradient of an image was NaN or infinite and taken as zero: searches along "
            "it stood still there, so attack scores are too high (docs/audit.md).",
        )
    if not measurements:
        yield Flag(flag="no-attacks", message="no attack was run")

"""Doubts about a result, in words: what makes a number mean less than it says."""

from collections.abc import Iterator, Sequence

from dmlbench.results import Flag, Measurement
from dmlbench.subject import Subject

COLLAPSE = 1e-3
"""Spread of the gallery, relative to the length of its entries, under which a model counts as collapsed."""


def spread(subject: Subject) -> float:
    """Root mean square distance of the gallery from its mean, relative to the length of its entries."""
    gallery = subject.scene.gallery
    around = gallery.embeddings - gallery.embeddings.mean(0)
    return float(around.square().sum(1).mean().sqrt() / gallery.scale.clamp_min(1e-30))


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

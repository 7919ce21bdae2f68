"""The fingerprint of a model, by which a resumed run, a merge or a cache recognises that the model is the same.

A hash of the parameters does not show how images are normalised, which output is used, or what code runs. So the
fingerprint also has the embeddings of a few fixed images, the probe. Floating point differs between processors, so
fingerprints from different processes are compared by a few projections of these embeddings, within :data:`NEAR`; a
cache, which stays on one machine, compares the exact bytes (:func:`exact`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.embedding import STEADY, Embedder, digest_of, disagreement
from dmlbench.fast.exact import true_float32
from dmlbench.models import probe_images

NEAR = 1e-3
"""The largest accepted difference of two probes, relative to their largest value: far more than processors differ by."""
IMAGES, DIRECTIONS, PASSES = 2, 8, 3


@true_float32()
def probed(embedder: Embedder) -> Float[Tensor, "b d"] | None:
    """The embeddings of the probe images; None if repeated passes differ, or if they are NaN or infinite.

    torch's generators are seeded for the call, and then restored to the caller's state.
    """
    where = embedder.device
    images = probe_images(embedder.input_shape, IMAGES).to(where)
    drawn = []
    with torch.no_grad(), torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        for _ in range(PASSES):
            torch.manual_seed(0)
            drawn.append(embedder.eval()(images).cpu())
    steady = disagreement(drawn) <= STEADY  # not where one is NaN
    return drawn[0] if steady and bool(torch.isfinite(drawn[0]).all()) else None


def fingerprint(embedder: Embedder) -> dict[str, Any]:
    """The fingerprint, comparable across processes and machines (:func:`differing`).

    Returns:
        ``arch``; ``normalisation``, mean and std per channel; ``parameters``, a hash of the network's; ``probe``,
        ``IMAGES`` x ``DIRECTIONS`` numbers, or None if the model's embeddings vary from pass to pass.
    """
    e = probed(embedder)
    return {
        "arch": embedder.arch,
        "normalisation": [embedder.mean.flatten().tolist(), embedder.std.flatten().tolist()],
        "parameters": digest_of(embedder.network),
        "probe": None if e is None else _projections(e),
    }


def _projections(e: Float[Tensor, "b d"]) -> list[float]:
    """The projections of each embedding on a few fixed cosine waves of unit length."""
    place = torch.arange(e.shape[1], dtype=torch.float64)
    waves = torch.cos(place[:, None] * torch.arange(1, DIRECTIONS + 1) * 0.7 + 0.3)  # (d, DIRECTIONS)
    projected = e.double() @ (waves / waves.norm(dim=0))
    return [float(f"{value:.6g}") for value in projected.flatten().tolist()]


def probes_agree(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Do two probes agree within :data:`NEAR`? None, an unknown probe, agrees with every other."""
    if a is None or b is None:
        return True
    scale = max((abs(v) for v in (*a, *b)), default=0.0)
    return len(a) == len(b) and all(abs(x - y) <= NEAR * scale for x, y in zip(a, b, strict=True))


def differing(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ, sorted; those that end in ``probe`` are compared by :func:`probes_agree`."""
    return [key for key in sorted({*stored, *expected}) if not _same(key, stored.get(key), expected.get(key))]


def _same(key: str, a: Any, b: Any) -> bool:
    return probes_agree(a, b) if key.endswith("probe") else bool(a == b)


def exact(embedder: Embedder) -> str | None:
    """The exact fingerprint, a hash for a cache on one machine: any visible change of the model changes it. None if passes differ."""
    e = probed(embedder)
    if e is None:
        return None
    described = f"{digest_of(embedder)} {embedder.arch} {embedder.distance.space} {tuple(e.shape)}"
    return hashlib.sha256(described.encode() + e.contiguous().numpy().tobytes()).hexdigest()

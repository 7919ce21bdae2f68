"""What a smoothed embedding proves of a query's first answer: margins, the error of a mean of samples, radii.

The smoothed embedding of an image x is f̄(x) = E f(x + σz), z ~ N(0, I), |f| ≤ 1. It is nearer to a positive p than to a negative n, both of unit
length, where ⟨f̄, p - n⟩ > 0. The function h = (1 + ⟨f, p - n⟩ / |p - n|) / 2 lies in [0, 1], so that Φ⁻¹ of its smoothed value changes by at most
r / σ when the image moves by r (Salman et al., NeurIPS 2019, lemma 2): the answer is proven within σ Φ⁻¹(h̄). docs/certified.md derives it all.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from dmlbench.scene import Scene

SAME = 1e-6
"""Distance under which two entries are one: neither is nearer than the other."""


def margins(smoothed: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """By how much a smoothed embedding is on the side of its best positive: max over positives p of the min over negatives n of
    ⟨f̄, p - n⟩ / |p - n|, float64, -1 to 1. Above 0 the first answer is right.

    Entries are taken at unit length. What does not count for a query (:attr:`Scene.left_out`) is neither. NaN without positives,
    infinite without negatives.
    """
    entries = torch.nn.functional.normalize(scene.gallery.embeddings.double(), dim=1)
    near = smoothed.double() @ entries.t()  # (B, N)
    values = near.new_full((len(scene),), torch.nan)
    for label in scene.labels.unique():
        of_class = scene.gallery.labels == label
        kin, others = of_class.nonzero()[:, 0], (~of_class).nonzero()[:, 0]
        apart = torch.cdist(entries[kin], entries[others])  # (P, M)
        for i in (scene.labels == label).nonzero()[:, 0]:
            p, n = scene.same[i, kin], scene.other[i, others]
            if not bool(p.any()):
                continue
            gap = near[i, kin[p], None] - near[i, None, others[n]]
            distance = apart[p][:, n]
            gap = torch.where(distance > SAME, gap / distance, 0.0)
            values[i] = gap.amin(1).amax() if bool(n.any()) else torch.inf
    return values


def _evidence(samples: int, alpha: float, queries: int) -> float:
    """ln(2 Q / α) / K."""
    return math.log(2.0 * queries / alpha) / samples


def errors(lengths: Float[np.ndarray, " Q"], samples: int, alpha: float, queries: int) -> Float[np.ndarray, " Q"]:
    """How far each mean of ``samples`` embeddings may be from the smoothed embedding: all of ``queries`` at once hold with probability
    1 - ``alpha`` wherever the error is below the mean's length, and elsewhere nothing is proven.

    Args:
        lengths: |mean|, 0 to 1.
    """
    y, s = _evidence(samples, alpha, queries), np.clip(lengths, 0.0, 1.0)
    b = 4.0 * y * (s + 1.0 / 3.0)
    bound: np.ndarray = (b + np.sqrt(b * b + 8.0 * y * (1.0 + 2.0 * y) * (1.0 - s * s))) / (2.0 * (1.0 + 2.0 * y))
    return bound


def fewest(alpha: float, queries: int) -> int:
    """With how many samples any certificate can be given at all: fewer leave an error of 1 even where all embeddings are one."""
    return math.floor(_evidence(1, alpha, queries) / 0.3) + 1


def radii(
    margin: Float[np.ndarray, " Q"],
    lengths: Float[np.ndarray, " Q"],
    sigma: float,
    samples: int,
    alpha: float,
    queries: int,
) -> Float[np.ndarray, " Q"]:
    """The certified radius of each query, L2 on the [0, 1] scale of pixels: every smaller change leaves its first answer right.

    0 where nothing is proven, NaN where there is no margin. None is above :func:`largest`.
    """
    share = (1.0 + margin - errors(lengths, samples, alpha, queries)) / 2.0
    radius = sigma * ndtri(np.clip(share, 0.5, 1.0))
    return np.where(np.isposinf(margin), largest(sigma, samples, alpha, queries), radius)


def largest(sigma: float, samples: int, alpha: float, queries: int) -> float:
    """The largest radius that so many samples can certify: that of a mean of length 1 all along p - n."""
    error = float(errors(np.ones(1), samples, alpha, queries)[0])
    return float(sigma * ndtri(1.0 - error / 2.0))

"""Small scenes that several test files look at."""

import torch

from dmlbench.embedding import DISTANCES
from dmlbench.rng import Rng
from dmlbench.scene import Gallery, Scene

N, D, B = 14, 5, 6


def scene_of(space: str, k: int = 2, seed: int = 0) -> tuple[Scene, torch.Tensor]:
    """A hand-sized scene (images 0 to 5 of 14, four classes) and moved embeddings of its images."""
    rng = Rng(seed, torch.arange(N))
    d = DISTANCES[space]
    everyone = d.finish(rng.normal(D))
    labels = torch.arange(N) % 4
    moved = d.finish(everyone[:B] + 0.5 * rng.normal(D)[:B])
    chosen = rng.integers(N, k)[:B]
    return Scene(d, Gallery(everyone, labels), everyone[:B], labels[:B], torch.arange(B), chosen), moved


def big_scene(space: str, n: int = 230) -> Scene:
    rng = Rng(3, torch.arange(n))
    d = DISTANCES[space]
    x = d.finish(rng.normal(4))
    y = torch.arange(n) % 7
    return Scene(d, Gallery(x, y), x[:40], y[:40], torch.arange(40), torch.zeros(40, 0, dtype=torch.long))

"""What the adversary may know, fixed before the search: the gallery, the clean images, the targets.

``N`` gallery entries, ``B`` images under attack, ``D`` dimensions, ``K`` targets an image. Distances
to the gallery include the image's own clean entry; the views ``same`` and ``other`` leave it out.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.embedding import Distance


@dataclass(frozen=True, eq=False)
class Gallery:
    """The clean embeddings that are searched.

    Attributes:
        embeddings: (N, D) float32.
        labels: (N,) int64.
    """

    embeddings: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def square(self) -> Float[Tensor, " N"]:
        """Squared lengths, used at every distance."""
        return self.embeddings.square().sum(1)

    @cached_property
    def by_class(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N,) rows sorted by class; and of each class (C,) its label, its size and where it starts there."""
        order = self.labels.argsort(stable=True)
        classes, counts = self.labels[order].unique_consecutive(return_counts=True)
        return order, classes, counts, counts.cumsum(0) - counts

    @cached_property
    def scale(self) -> Tensor:
        """(): root mean square length of an entry; 1 where embeddings are normalised."""
        return self.square.mean().sqrt()


@dataclass(frozen=True, eq=False)
class Scene:
    """A batch of images under attack and all that is known about them.

    Attributes:
        distance: the embedding space.
        gallery: the clean embeddings that are searched.
        clean: (B, D) the images' own clean embeddings.
        labels: (B,) their classes.
        row: (B,) each image's own gallery entry, -1 where it has none.
        chosen: (B, K) gallery rows of its targets; K may be 0.
    """

    distance: Distance
    gallery: Gallery
    clean: Tensor
    labels: Tensor
    row: Tensor
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Scene":
        return replace(
            self,
            clean=self.clean[index],
            labels=self.labels[index],
            row=self.row[index],
            chosen=self.chosen[index],
        )

    def aimed(self, chosen: Int[Tensor, "B K"]) -> "Scene":
        """The same scene with these targets."""
        return replace(self, chosen=chosen)

    def distances(self, embeddings: Float[Tensor, "B D"], out: Tensor | None = None) -> Float[Tensor, "B N"]:
        """From each embedding to every gallery entry; into ``out``, without a graph, where it is given."""
        return self.distance.pairwise(embeddings, self.gallery.embeddings, self.gallery.square, out)

    def ranked(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B N"]:
        """As ``distances``, with each image's own entry at infinity: what a ranking is read from."""
        return self.distances(embeddings).masked_fill(self.own, torch.inf)

    @cached_property
    def own(self) -> Bool[Tensor, "B N"]:
        """True at each image's own entry."""
        return self.row[:, None] == torch.arange(len(self.gallery), device=self.row.device)

    @cached_property
    def kin(self) -> Bool[Tensor, "B N"]:
        """True at entries of the image's class, its own entry among them."""
        return self.labels[:, None] == self.gallery.labels

    @cached_property
    def same(self) -> Bool[Tensor, "B N"]:
        """True at the positives: entries of the image's class, its own left out."""
        return self.kin & ~self.own

    @cached_property
    def other(self) -> Bool[Tensor, "B N"]:
        """True at the negatives: entries of another class."""
        return ~self.kin

    @cached_property
    def has_positive(self) -> Bool[Tensor, " B"]:
        """False where no other entry of the image's class exists: such queries have no recall."""
        return self.same.any(1)

    @cached_property
    def target_class(self) -> Bool[Tensor, "B N"]:
        """True at entries of the class of the first target."""
        return self.gallery.labels[self.chosen[:, :1]] == self.gallery.labels

    @cached_property
    def has_negative(self) -> Bool[Tensor, " B"]:
        """False where every entry is of the image's class."""
        return self.other.any(1)

    @cached_property
    def has_kin(self) -> Bool[Tensor, " B"]:
        """False where no entry at all is of the image's class, not even its own."""
        return self.kin.any(1)

    @cached_property
    def kin_shut(self) -> Float[Tensor, "B N"]:
        """inf at entries of the image's class, 0 elsewhere: added, it is many times cheaper than a mask."""
        return _shut(self.kin)

    @cached_property
    def other_shut(self) -> Float[Tensor, "B N"]:
        """inf at entries of another class, 0 elsewhere."""
        return _shut(self.other)

    @cached_property
    def all_but_same_shut(self) -> Float[Tensor, "B N"]:
        """0 at the positives, inf elsewhere."""
        return _shut(~self.same)

    @cached_property
    def targets(self) -> Float[Tensor, "B K D"]:
        """The targets' embeddings."""
        return self.gallery.embeddings[self.chosen]

    @cached_property
    def target_distances(self) -> Float[Tensor, "B K N"]:
        """From each target to every gallery entry; exactly 0 to itself, which a product would round."""
        b, k, d = self.targets.shape
        flat = self.distance.pairwise(self.targets.reshape(b * k, d), self.gallery.embeddings, self.gallery.square)
        return flat.view(b, k, -1).scatter(2, self.chosen[:, :, None], 0.0)


def _shut(mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """inf where ``mask`` is true, else 0."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, torch.inf)

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
from dmlbench.rounded import RoundedGallery

BLUR = 1e-5
"""How far the embedding of an unchanged image may be from its clean one by float32 rounding, over ``Gallery.scale``."""
BLURS = {"tf32": 1e-2, "bfloat16": 2e-2}
"""The same by precision of gradients, where their passes are rounded more. The most that was seen, on six small models and
256 images each: in TF32 1e-3 where factors are rounded and 5e-3 where they are cut off, in bfloat16 1e-2."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """The clean embeddings that are searched.

    Attributes:
        embeddings: (N, D) float32.
        labels: (N,) int64.
        rough: gradients may see the entries rounded to 8 bits; see :mod:`dmlbench.rounded`.
        blur: an embedding this near to the clean one, over ``scale``, is as good as it in a gradient's pass.
    """

    embeddings: Tensor
    labels: Tensor
    rough: bool = False
    blur: float = BLUR

    @staticmethod
    def seen(embeddings: Float[Tensor, "N D"], labels: Int[Tensor, " N"], precision: str) -> "Gallery":
        """The gallery as attacks see it whose gradients are made in ``precision``, which is settled."""
        return Gallery(embeddings, labels, precision == "int8", BLURS.get(precision, BLUR))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def square(self) -> Float[Tensor, " N"]:
        """Squared lengths, used at every distance."""
        return self.embeddings.square().sum(1)

    @cached_property
    def rounded(self) -> RoundedGallery | None:
        """The entries in 8 bits, or None where gradients are to see them as they are."""
        return RoundedGallery.of(self.embeddings, self.square) if self.rough else None

    @cached_property
    def by_class(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N,) rows sorted by class; and of each class (C,) its label, its size and where it starts there."""
        order = self.labels.argsort(stable=True)
        classes, counts = self.labels[order].unique_consecutive(return_counts=True)
        return order, classes, counts, counts.cumsum(0) - counts

    def rows_of(self, labels: Int[Tensor, " B"]) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Rows of the entries of each of these classes, and which are not padding.

        Padded to the most that any class here has by repeating the last one (by any row where there is none).
        """
        order, classes, counts, starts = self.by_class
        at = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)  # (B,)
        size = torch.where(classes[at] == labels, counts[at], 0)[:, None]  # (B, 1)
        place = torch.arange(max(1, int(size.max())) if len(size) else 1, device=order.device)  # (P,)
        return order[starts[at][:, None] + torch.minimum(place, (size - 1).clamp_min(0))], place < size

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
    def has_negative(self) -> Bool[Tensor, " B"]:
        """False where every entry is of the image's class."""
        return self.kin_rows[1].sum(1) < len(self.gallery)

    @cached_property
    def kin_rows(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """As :meth:`Gallery.rows_of` the images' own classes: its own entry is among them."""
        return self.gallery.rows_of(self.labels)

    @cached_property
    def target_rows(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """The same of the classes of the first targets."""
        return self.gallery.rows_of(self.gallery.labels[self.chosen[:, 0]])

    @cached_property
    def positive_rows(self) -> Bool[Tensor, "B P"]:
        """Which of ``kin_rows`` are positives: neither padding nor the image's own entry."""
        rows, real = self.kin_rows
        return real & (rows != self.row[:, None])

    @cached_property
    def table(self) -> Float[Tensor, "B N"]:
        """Memory for a number for each image and entry, whatever it holds: to make a new one costs as much as filling it."""
        return self.gallery.embeddings.new_empty(len(self), len(self.gallery))

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

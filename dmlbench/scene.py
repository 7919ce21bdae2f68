"""What the adversary may know, fixed before the search: the gallery, the clean images, the targets.

``N`` gallery entries, ``B`` images under attack, ``D`` dimensions, ``K`` targets an image. Distances
to the gallery include the image's own clean entry; the views ``same`` and ``other`` leave it out.
Besides its own entry, further entries may not count for an image: those that share one of its ``groups``, such as
the same person seen by the same camera. No ranking, rank, target or objective sees them (``ignored``).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.embedding import Distance
from dmlbench.fast.rounded import RoundedGallery

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
        rough: gradients may see the entries rounded to 8 bits; see :mod:`dmlbench.fast.rounded`.
        blur: an embedding this near to the clean one, over ``scale``, is as good as it in a gradient's pass.
        groups: (N, G) int64, or None; see :func:`sharing`.
    """

    embeddings: Tensor
    labels: Tensor
    rough: bool = False
    blur: float = BLUR
    groups: Tensor | None = None

    @staticmethod
    def seen(
        embeddings: Float[Tensor, "N D"], labels: Int[Tensor, " N"], precision: str, groups: Tensor | None = None
    ) -> "Gallery":
        """The gallery as attacks see it whose gradients are made in ``precision``, which is settled."""
        return Gallery(embeddings, labels, precision == "int8", BLURS.get(precision, BLUR), groups)

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
    def classed(self) -> Bool[Tensor, " N"]:
        """True at entries of a class, whose labels count from 0; False at distractors, which are of none."""
        return self.labels >= 0

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


def sharing(groups: Int[Tensor, "*b G"], among: Int[Tensor, "N G"]) -> Bool[Tensor, "*b N"]:
    """True where both are in one group: the same number of 0 or more in the same column. -1 is in none."""
    shared = groups.new_zeros((*groups.shape[:-1], len(among)), dtype=torch.bool)
    for mine, theirs in zip(groups.unbind(-1), among.unbind(-1), strict=True):
        shared |= (mine[..., None] == theirs) & (mine[..., None] >= 0)
    return shared


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
        groups: (B, G) int64 where the gallery has groups too, else None: entries of one of an image's groups do not
            count for it.
        abreast: how many images blocks of the gallery are cut for; 0 for as many as there are.
        query: (B,) the images' rows in the data set, by which a random defence seeds its draws; None if unknown.
        threshold: (B,) the distance below which each image and its first target are decided to be of one class; None if
            nobody decides.
    """

    distance: Distance
    gallery: Gallery
    clean: Tensor
    labels: Tensor
    row: Tensor
    chosen: Tensor
    groups: Tensor | None = None
    abreast: int = 0
    query: Tensor | None = None
    threshold: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Scene":
        return replace(
            self,
            clean=self.clean[index],
            labels=self.labels[index],
            row=self.row[index],
            chosen=self.chosen[index],
            groups=None if self.groups is None else self.groups[index],
            query=None if self.query is None else self.query[index],
            threshold=None if self.threshold is None else self.threshold[index],
        )

    def aimed(self, chosen: Int[Tensor, "B K"]) -> "Scene":
        """The same scene with these targets."""
        return replace(self, chosen=chosen)

    def thinned(self, alive: Bool[Tensor, " B"]) -> "Scene":
        """Only the images that are ``alive``, before blocks of the gallery as they were: so their sums are rounded as before."""
        return replace(self[alive], abreast=self.abreast or len(self))

    def among_themselves(self, embeddings: Float[Tensor, "B D"]) -> "Scene":
        """The images searched among each other, all at these embeddings, aimed at nobody."""
        places = torch.arange(len(self), device=self.row.device)
        gallery = Gallery(embeddings, self.labels, groups=self.groups)
        return replace(self, gallery=gallery, clean=embeddings, row=places, chosen=places.new_zeros(len(self), 0))

    def distances(self, embeddings: Float[Tensor, "B D"], out: Tensor | None = None) -> Float[Tensor, "B N"]:
        """From each embedding to every gallery entry; into ``out``, without a graph, where it is given."""
        return self.distance.pairwise(embeddings, self.gallery.embeddings, self.gallery.square, out)

    def ranked(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B N"]:
        """As ``distances``, with what does not count for an image at infinity: what a ranking is read from."""
        return self.distances(embeddings).masked_fill(self.left_out, torch.inf)

    @cached_property
    def own_entries(self) -> Bool[Tensor, "B N"]:
        """True at each image's own entry."""
        return self.row[:, None] == torch.arange(len(self.gallery), device=self.row.device)

    @cached_property
    def ignored(self) -> Bool[Tensor, "B N"] | None:
        """True at entries that share a group with the image, its own aside; None where nothing has a group."""
        if self.groups is None or self.gallery.groups is None:
            return None
        return sharing(self.groups, self.gallery.groups) & ~self.own_entries

    @cached_property
    def left_out(self) -> Bool[Tensor, "B N"]:
        """True at what no ranking of the image holds: its own entry and the ``ignored`` ones."""
        return self.own_entries if self.ignored is None else self.own_entries | self.ignored

    @cached_property
    def counted(self) -> "int | Int[Tensor, 'B 1']":
        """How many entries normalised ranks are counted over: all but the ``ignored`` ones, so the own one too."""
        return len(self.gallery) if self.ignored is None else (~self.ignored).sum(1, keepdim=True)

    def entry(self, place: Int[Tensor, "B k"]) -> Int[Tensor, "B k"]:
        """The gallery row of the entry at each place among those that are ``counted``, in gallery order."""
        if self.ignored is None:
            return place
        return torch.searchsorted((~self.ignored).long().cumsum(1), place + 1)

    @cached_property
    def kin(self) -> Bool[Tensor, "B N"]:
        """True at entries of the image's class, its own entry among them."""
        return self.labels[:, None] == self.gallery.labels

    @cached_property
    def same(self) -> Bool[Tensor, "B N"]:
        """True at the positives: entries of the image's class, its own and the ignored ones left out."""
        return self.kin & ~self.left_out

    @cached_property
    def other(self) -> Bool[Tensor, "B N"]:
        """True at the negatives: entries of another class, the ignored ones left out."""
        return ~self.kin if self.ignored is None else ~(self.kin | self.ignored)

    @cached_property
    def has_positive(self) -> Bool[Tensor, " B"]:
        """False where no other entry of the image's class exists: such queries have no recall."""
        return self.same.any(1)

    @cached_property
    def has_negative(self) -> Bool[Tensor, " B"]:
        """False where every entry that counts is of the image's class."""
        return self.kin_rows[1].sum(1) < len(self.gallery) if self.ignored is None else self.other.any(1)

    @cached_property
    def kin_rows(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """As :meth:`Gallery.rows_of` the images' own classes: its own entry is among them."""
        return self.gallery.rows_of(self.labels)

    @cached_property
    def target_rows(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """The same of the classes of the first targets; the second says which count for the image too."""
        rows, real = self.gallery.rows_of(self.gallery.labels[self.chosen[:, 0]])
        return rows, self._counting(rows, real)

    def _counting(self, rows: Int[Tensor, "B P"], real: Bool[Tensor, "B P"]) -> Bool[Tensor, "B P"]:
        """Which of ``rows`` are ``real`` and not ignored."""
        return real if self.ignored is None else real & ~self.ignored.gather(1, rows)

    @cached_property
    def kin_counted(self) -> Bool[Tensor, "B P"]:
        """Which of ``kin_rows`` count for the image: neither padding nor ignored."""
        return self._counting(*self.kin_rows)

    @cached_property
    def positive_rows(self) -> Bool[Tensor, "B P"]:
        """Which of ``kin_rows`` are positives: neither padding nor ignored nor the image's own entry."""
        return self.kin_counted & (self.kin_rows[0] != self.row[:, None])

    @cached_property
    def table(self) -> Float[Tensor, "B N"]:
        """Memory for a number for each image and entry, whatever it holds: to make a new one costs as much as filling it."""
        return self.gallery.embeddings.new_empty(len(self), len(self.gallery))

    @cached_property
    def targets(self) -> Float[Tensor, "B K D"]:
        """The targets' embeddings."""
        return self.gallery.embeddings[self.chosen]

    @cached_property
    def genuine(self) -> Bool[Tensor, " B"]:
        """True where the image and its first target are of one class."""
        return self.labels == self.gallery.labels[self.chosen[:, 0]]

    @cached_property
    def target_distances(self) -> Float[Tensor, "B K N"]:
        """From each target to every gallery entry; exactly 0 to itself, which a product would round."""
        b, k, d = self.targets.shape
        flat = self.distance.pairwise(self.targets.reshape(b * k, d), self.gallery.embeddings, self.gallery.square)
        return flat.view(b, k, -1).scatter(2, self.chosen[:, :, None], 0.0)

    @cached_property
    def target_ignored(self) -> Bool[Tensor, "B K N"] | None:
        """As ``ignored``, for each target as the one that asks."""
        if self.ignored is None or self.gallery.groups is None:
            return None
        shared = sharing(self.gallery.groups[self.chosen], self.gallery.groups)
        return shared.scatter(2, self.chosen[:, :, None], False)

    @cached_property
    def target_counted(self) -> "int | Int[Tensor, 'B K']":
        """As ``counted``, for each target as the one that asks."""
        return len(self.gallery) if self.target_ignored is None else (~self.target_ignored).sum(2)

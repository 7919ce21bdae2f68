"""What the adversary wants: (embeddings, Scene) to a loss per image, which it minimises.

Type of an entry: :data:`Objective`. Definitions: Zhou, Niu, Wang, Zhang and Hua, "Adversarial Ranking
Attack and Defense" (ECCV 2020, arXiv 2002.11293) for CA and QA; Zhou and Patel, "Enhancing Adversarial
Robustness for Deep Metric Learning" (CVPR 2022, arXiv 2203.01439) and arXiv 2106.03614 for the rest.
The roles are the papers': in CA the perturbed image is a candidate and its targets are queries, in QA
it is a query and its targets are candidates. ``B`` images, ``K`` targets, ``N`` gallery entries.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmlbench.fast.sweep import candidate_hinge, extreme_entries, nearest_entries, query_hinge
from dmlbench.registry import Registry
from dmlbench.scene import Scene

Objective = Callable[[Tensor, Scene], Tensor]

PRESERVED = 5
"""How many of the query's nearest entries the semantics-preserving attacks keep near the head of the list."""

Real = TypeVar("Real", Tensor, np.ndarray)


def ahead(negative: Real, positive: Real) -> Real:
    """Which negatives stand before a positive, by their distances: ties count against the model, so one that is as near does.

    :func:`~dmlbench.fast.ranking.negatives_ahead` counts them without comparing each pair, to the same numbers.
    """
    return negative <= positive


def wrong_by(margin: Real) -> Real:
    """Which decisions are wrong. A margin is by how much nearer the positive is than every negative; a tie, 0, is wrong, NaN neither
    wrong nor right."""
    return margin <= 0


def right_by(margin: Real) -> Real:
    """Which decisions are right: those whose margin is above 0."""
    return margin > 0


def raise_candidate(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """CA+: move the candidate to the head of its queries' lists. Mean over X of relu(d(q,c~) - d(q,X))."""
    return candidate_hinge(e, scene, -1.0)


def lower_candidate(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """CA-: move the candidate down its queries' lists. Mean over X of relu(d(q,X) - d(q,c~))."""
    return candidate_hinge(e, scene, 1.0)


def raise_in_query(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """QA+: bring the candidates to the head of the query's list. Mean over X of relu(d(q~,c) - d(q~,X))."""
    return query_hinge(e, scene, -1.0)


def lower_in_query(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """QA- and GTT: push the candidates down the query's list. Mean over X of relu(d(q~,X) - d(q~,c))."""
    return query_hinge(e, scene, 1.0)


def match(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """TMA, targeted mismatch: look like the target. 1 - cos(f(x~), t)."""
    return 1.0 - F.cosine_similarity(e, scene.targets[:, 0], dim=1)


def shift(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """ES: move the embedding away from its clean place. Minus the Euclidean shift.

    At the clean image the gradient is zero, so the papers move the reference by 1e-7 there. Here an
    image whose shift is within rounding (``Gallery.blur``) counts as being at the clean one: it gets the
    gradient that the papers mean, the same in every dimension, whatever the rounding.
    """
    moved = e - scene.clean
    size = moved.norm(dim=1)  # (B,)
    push = e.sum(1) / e.shape[1] ** 0.5
    stuck = size.detach() <= scene.gallery.blur * scene.gallery.scale
    return torch.where(stuck, push - push.detach(), -size)


def approach(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """GTM: come near the target, the nearest entry of another class. d(f(x~), u)."""
    return scene.distance.paired(e, scene.targets[:, 0])


ADDED = 1e-6
"""What torch's ``pairwise_distance`` adds to every difference before the norm: no number of the papers."""


def _published_distance(e: Tensor, reference: Tensor, scene: Scene, moved: float = 0.0) -> Tensor:
    """(B,) Euclidean distance as the field's public code has it: :data:`ADDED` is added to each difference.

    Where e is at ``reference`` within rounding (``Gallery.blur``), the differences are those that the code has there,
    from the reference moved by ``moved``, in float32 as it is there: the gradient is that of the added number.
    """
    difference = e - reference
    value = difference.detach()
    still = value.norm(dim=1, keepdim=True) <= scene.gallery.blur * scene.gallery.scale
    there = torch.where(still, reference - (reference + moved), value)
    return (difference + (there - value) + ADDED).norm(dim=1)


def shift_published(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """ES as behind the published numbers: the first step goes the other way.

    That code moves the reference by 1e-7 at the clean image, and its Euclidean distance then adds 1e-6 to each
    difference, so that -1e-7 becomes +9e-7. The first step is along +1 in every dimension, where :func:`shift` is
    along -1. Its cosine distance adds nothing: in space C it is :func:`shift`.
    """
    if scene.distance.metric == "cosine":
        return shift(e, scene)
    return -_published_distance(e, scene.clean, scene, moved=1e-7)


def approach_published(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """GTM as behind the published numbers: an image aimed at its own entry, where it is, steps along -1.

    ``nearest_other_published`` aims a few images so. d(f(x~), u) with 1e-6 added to each difference, where :func:`approach`
    has no gradient.
    """
    if scene.distance.metric == "cosine":
        return approach(e, scene)
    return _published_distance(e, scene.targets[:, 0], scene)


def _extreme_gap(e: Tensor, scene: Scene, near: Bool[Tensor, "B P"]) -> Tensor:
    """relu(farthest entry of another class - nearest of the image's class where ``near``); 0 where either is missing.

    The two entries are found without a graph; the gradient is that of their two distances.
    """
    farthest, nearest = (scene.gallery.embeddings[rows] for rows in extreme_entries(e, scene, near))
    gap = scene.distance.paired(e, farthest) - scene.distance.paired(e, nearest)
    return F.relu(gap) * (near.any(1) & scene.has_negative)


def spread(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """LTM: bring all other classes nearer than the nearest positive (the image's own entry left out).

    relu(max over other-class X of d - min over same-class X of d).
    """
    return _extreme_gap(e, scene, scene.positive_rows)


def spread_published(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """LTM as behind the published numbers: the image's own clean entry counts as a positive.

    It is usually the nearest one, so the attack only moves away from itself and is easier to survive.
    """
    return _extreme_gap(e, scene, scene.kin_counted)


def gap(
    e: Float[Tensor, "B D"], scene: Scene, negative: Int[Tensor, " B"], positive: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Distance to the entries in the rows ``negative`` - distance to those in ``positive``.

    inf where there is no entry of another class, -inf where there is no positive, without a gradient.
    """
    to_negative, to_positive = (scene.distance.paired(e, scene.gallery.embeddings[r]) for r in (negative, positive))
    to_negative = torch.where(scene.has_negative, to_negative, torch.inf)
    return to_negative - torch.where(scene.positive_rows.any(1), to_positive, torch.inf)


def margin(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """WM: put the nearest entry of another class before the nearest positive, both looked up at every step.

    min over other-class X of d - min over same-class X of d (own entry left out): the query is
    misranked where this is 0 or less.
    """
    positive, negative, _ = nearest_entries(e, scene)
    return gap(e, scene, negative, positive)


def margin_to_class(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """MT: put the target's class before the nearest positive. min over the target's class of d - min over same-class X of d."""
    positive, _, of_target = nearest_entries(e, scene, aimed=True)
    assert of_target is not None
    return gap(e, scene, of_target, positive)


def margin_to_entry(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """ME: put the target before the nearest positive. d(f(x~), u) - min over same-class of d."""
    positive, _, _ = nearest_entries(e, scene)
    return gap(e, scene, scene.chosen[:, 0], positive)


def leave(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """Panum: move away from the target, the nearest positive. -d(f(x~), c)."""
    return -scene.distance.paired(e, scene.targets[:, 0])


def _squares(e: Tensor, scene: Scene) -> Float[Tensor, "B K"]:
    """|f(x~) - t|^2 for every target."""
    return (e[:, None, :] - scene.targets).square().sum(2)


def leave_guides(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """MA-: move away from several guides of one's own class. Minus the mean of |f(x~) - g|^2 over the targets g that are of it; 0
    where none is."""
    of_class = (scene.gallery.labels[scene.chosen] == scene.labels[:, None]) & (scene.chosen != scene.row[:, None])
    return -(_squares(e, scene) * of_class).sum(1) / of_class.sum(1).clamp_min(1)


def join_guides(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """MA+: move towards several guides of one other class. The mean of |f(x~) - g|^2 over the targets g."""
    return _squares(e, scene).mean(1)


def flip(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """FLIP: the decision on the pair of the image and its target. t - d(f(x~), c) where both are of one class, else d(f(x~), c) - t.

    Of a genuine pair the distance is to pass the threshold t (dodging), of an impostor pair to fall below it (impersonation): the
    decision is wrong where this is 0 or less. t is 0 where nobody decides.
    """
    edge = 0.0 if scene.threshold is None else scene.threshold
    margin = scene.distance.paired(e, scene.targets[:, 0]) - edge
    return torch.where(scene.genuine, -margin, margin)


def order(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """FOA: make the candidates appear in the order in which they were chosen.

    Mean over pairs i < j of relu(d(q~,c_i) - d(q~,c_j)).
    """
    return _disorder(e, scene, scene.targets)


def _disorder(e: Tensor, scene: Scene, candidates: Tensor) -> Tensor:
    d = scene.distance.paired(e[:, None, :], candidates)  # (B, M)
    first, second = torch.triu_indices(d.shape[1], d.shape[1], 1, device=d.device)
    return F.relu(d[:, first] - d[:, second]).mean(1)


def order_in_place(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """SPFOA: as FOA, and keep the candidates at the head of the list: + QA+ of the candidates."""
    return _disorder(e, scene, scene.targets) + raise_in_query(e, scene)


def _candidate_and_head(scene: Scene) -> tuple[Scene, Scene]:
    """The scene aimed at the true targets, and at the last :data:`KEPT`, which are to stay near the head."""
    return scene.aimed(scene.chosen[:, :-PRESERVED]), scene.aimed(scene.chosen[:, -PRESERVED:])


def raise_and_keep(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """SPQA+: QA+ of the candidate + QA+ of the query's 5 nearest entries, which keeps them near the head."""
    candidate, head = _candidate_and_head(scene)
    return raise_in_query(e, candidate) + raise_in_query(e, head)


def lower_and_keep(e: Float[Tensor, "B D"], scene: Scene) -> Float[Tensor, " B"]:
    """SPQA-: QA- of the candidate + 100 * QA+ of the query's 5 nearest entries, which keeps them near the head."""
    candidate, head = _candidate_and_head(scene)
    return lower_in_query(e, candidate) + 100.0 * raise_in_query(e, head)


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "raise_candidate": raise_candidate,
        "lower_candidate": lower_candidate,
        "raise_in_query": raise_in_query,
        "lower_in_query": lower_in_query,
        "match": match,
        "shift": shift,
        "shift_published": shift_published,
        "approach": approach,
        "approach_published": approach_published,
        "spread": spread,
        "spread_published": spread_published,
        "margin": margin,
        "margin_to_class": margin_to_class,
        "margin_to_entry": margin_to_entry,
        "leave": leave,
        "leave_guides": leave_guides,
        "join_guides": join_guides,
        "flip": flip,
        "order": order,
        "order_in_place": order_in_place,
        "raise_and_keep": raise_and_keep,
        "lower_and_keep": lower_and_keep,
    },
)

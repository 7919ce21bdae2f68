"""The audit's questions: does the number mean what it says? Each answers with a number, a limit and a verdict in words.

Gradient masking, randomness and breakdown make a model look robust that is not (Athalye, Carlini and
Wagner, ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019).
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.doubts.checks import COLLAPSE, spread
from dmlbench.doubts.evidence import Evidence, Finding, last_resorts, white_steps
from dmlbench.doubts.unseen import Survey, altered, history, near_by
from dmlbench.embedding import STEADY, disagreement, passes
from dmlbench.metrics import READOUTS
from dmlbench.objectives import approach, margin
from dmlbench.optimizers import OPTIMIZERS, autograd, watched
from dmlbench.protocol import Step
from dmlbench.run.subject import Subject
from dmlbench.scene import Scene
from dmlbench.threat import Threat

NOISE_DRAWS = 50
"""Random images per query in F4 and A2."""
FEW = 3
"""Fewer queries than this are an accident, whatever share they are."""
HIDDEN = 1.0
"""Percent of the queries that searches with gradients leave, beyond which F4 fails."""
BEYOND, TRIED = 1.5, 64
"""F4 asks whether gradients break the same queries, so many at the most, in a ball this much larger."""
DOWNHILL = 75.0
"""Percent of the queries on which the gradient's sign beats all random directions, under which A1 warns."""
AGREED = 0.7
"""Correlation of measured and predicted changes of the loss, median over the queries, under which A1 warns."""
NEARER = (1.0, 1 / 8, 1 / 64)
"""Parts of A1's step at which changes are compared, until they agree at both places: a step that breaks an undefended model outright is far
beyond where its gradient predicts anything, and a wrong gradient predicts nothing at any of them."""
LOST, CHANCE = 20.0, 120.0
"""Points that may be lost elsewhere than at the test images: so many, and ``CHANCE / sqrt(n)`` that n queries may lose
by accident."""
KNOWN = 40.0
"""Percent of the queries that are right when clean and have to be right near the test images too."""
ALTERED = 1e-3
"""F5: how far the embedding of an image may be from what it was in another batch: float rounding is much less."""
TURNED = 0.25
"""F5: how far the gradient may be from what it was before the searches, over its length: float rounding is much less (on a CPU; CUDA was not tried)."""
MISSED, PLACES = 0.15, 16
"""How much of an embedding's way the gradient may miss (mean over the queries, each at most 1), summed at so many places, before A1
warns: honest models (benchmarks/audit_sweep.py) miss far less."""
PASSES = 5
"""How often F1 looks: a model that draws once a batch from few choices gives the same twice by accident."""
LANDED = 0.3
"""Median distance of midpoints to the nearest entry, over that of the queries, under which A4 warns."""


def randomness(evidence: Evidence) -> Finding:
    """F1: do passes of one batch differ by more than 1e-5 (of the embeddings' root mean square length)?"""
    return judged_random(passes_gap(evidence.subject, evidence.images, evidence.scene))


def passes_gap(subject: Subject, images: Tensor, scene: Scene) -> float:
    """The largest difference of :data:`PASSES` passes from the first, relative to the embeddings' root mean square length."""
    with torch.no_grad():
        return disagreement(passes(subject.embedder, images, PASSES, rows=scene.query), scene.gallery.scale)


def judged_random(gap: float) -> Finding:
    if gap > STEADY:
        message = (
            f"two passes of the same images differ by {gap:.1e}, so the model is random and a single gradient "
            "says little: attack it with --eot N, which averages N passes"
        )
        return Finding("F1", "fail", gap, STEADY, message)
    return Finding("F1", "pass", gap, STEADY, "two passes of the same images agree")


def zero_gradients(evidence: Evidence) -> Finding:
    """F2: have more than 1 % of the queries a gradient that is exactly zero in every pixel, or NaN or infinite in one?"""
    missing, wrong = no_gradient(evidence.subject, evidence.images, evidence.scene)
    return judged_zero(100.0 * float(missing.float().mean()), wrong)


def no_gradient(subject: Subject, images: Tensor, scene: Scene) -> tuple[Tensor, int]:
    """(B,) bool: which queries have no gradient to follow; and how many of these have one that is NaN or infinite."""
    with watched() as trouble:
        _, gradient = autograd(AttackLoss(subject.embedder, margin, scene), images, subject.rng(0))
    return (gradient.flatten(1) == 0).all(1), trouble.count


def judged_zero(share: float, wrong: int) -> Finding:
    if share > 1:
        what = "exactly zero, NaN or infinite" if wrong else "exactly zero"
        message = f"the gradient is {what} for {share:.1f} % of the queries: a search along it stands still"
        return Finding("F2", "fail", share, 1.0, message)
    return Finding("F2", "pass", share, 1.0, f"the gradient is exactly zero for {share:.1f} % of the queries")


def unbounded(evidence: Evidence) -> Finding:
    """F3: without a bound (eps 1, clean start, 50 steps of PGD), are more than 1 % of the queries (and at least 3) right still?"""
    threat = Threat(norm="linf", eps=1, step=2.5 / 50, steps=50)
    step = Step(name="F3", attack="WM", optimizer="pgd")
    alive = ~evidence.attacked(step, threat, evidence.positions)
    share = 100.0 * float(alive.mean())
    if share > 1 and alive.sum() >= FEW:
        message = (
            f"with no bound at all, {share:.1f} % of the queries that were right stay right: any image could have "
            "been reached, so the search fails and not the attack"
        )
        return Finding("F3", "fail", share, 1.0, message)
    return Finding("F3", "pass", share, 1.0, f"with no bound, {share:.1f} % of the queries stay right")


def black_beats_white(evidence: Evidence) -> Finding:
    """F4: does an attack that sees values only (Square, 50 random images), or the gradient of the model without its defence, break
    more than 1 %, and at least 3, of the queries that all gradient searches leave?

    It fails where the gradient searches break so few of these even in a ball half as large again that more than
    1 % stays hidden from them, else it warns: on a rugged loss they miss by a hair what others hit by a hair.
    """
    steps = white_steps(evidence.protocol)
    noise = Step(name="noise", attack="WM", optimizer="noise")
    findings = [Finding("F4", "pass", 0.0, HIDDEN, "attacks without gradients break next to nothing that others left")]
    for eps, broken_by in evidence.broken_by.items():
        left = evidence.left(eps, steps)
        some_left = evidence.positions[left[evidence.positions]]
        threat = evidence.protocol.threat_at(eps, {"queries": NOISE_DRAWS})
        last = [
            (name, np.flatnonzero(hit), int(left.sum())) for name, hit in last_resorts(evidence.protocol, broken_by)
        ]
        for name, hit, of in (
            *last,
            (f"{NOISE_DRAWS} random images", some_left[evidence.attacked(noise, threat, some_left)], len(some_left)),
        ):
            share = 100.0 * len(hit) / of if len(hit) >= FEW else 0.0
            if share <= HIDDEN:
                findings.append(replace(findings[0], value=share))
                continue
            beyond = _broken_beyond(evidence, eps, hit)
            message = (
                f"{name} at eps {eps} breaks {len(hit)} of the {of} queries ({share:.1f} %) that all searches along "
                f"the gradient left; these break {100 * beyond:.0f} % of them where the ball is half as large again"
            )
            hidden = share * (1 - beyond) > HIDDEN and len(hit) * (1 - beyond) >= FEW
            end = ": the gradient hides what is there" if hidden else ": the loss is rugged"
            findings.append(Finding("F4", "fail" if hidden else "warn", share, HIDDEN, message + end))
    return max(findings, key=lambda f: (("pass", "warn", "fail").index(f.verdict), f.value or 0.0))


def _broken_beyond(evidence: Evidence, eps: str, queries: np.ndarray) -> float:
    """The share of the queries, or of some of them, that searches along the gradient break in a larger ball."""
    some = queries[np.unique(np.linspace(0, len(queries) - 1, min(TRIED, len(queries))).astype(int))]
    rest = some
    for step in evidence.protocol.steps[: white_steps(evidence.protocol)]:
        threat = evidence.protocol.threat_at(eps, step.threat)
        wider = BEYOND * threat.radius if threat.norm != "linf" else min(1.0, BEYOND * threat.radius)
        rest = rest[~evidence.attacked(step, threat.but(eps=wider), rest)]
    return 1.0 - len(rest) / len(some)


def useful_gradient(evidence: Evidence) -> Finding:
    """A1: does a small step along the gradient's sign beat 20 random sign directions on fewer than 75 % of queries, or do the
    changes of the loss along these correlate with those that the gradient predicts by less than 0.7 (median), at
    the step and at an eighth and a 64th of it? Or does the gradient, summed from the query to an image of another class, miss
    more than 0.15 (mean) of the way that the embedding goes there?

    The first two are asked at the clean images and, of a gradient that may be sound there alone, at images drawn from the balls around them
    (A3's). The step is 4/255; 0.5/255 for images of less than 28 pixels a side, where few pixels let random
    directions come near the best one before the loss bends.
    """
    return direction(evidence.subject, [evidence.positions])


def direction(subject: Subject, batches: list[np.ndarray]) -> Finding:
    """A1 of the queries at some positions, in batches."""
    near = _near(subject, batches)
    missed = np.concatenate([missed_of(subject, positions) for positions in batches]) if near.verdict == "pass" else ()
    if np.isfinite(missed).sum() < FEW or (share := float(np.nanmean(np.minimum(missed, 1.0)))) <= MISSED:
        return near
    message = (
        f"on the way from a query to an image of another class the gradient misses {share:.2f} of how far the embedding goes: "
        "it changes in jumps, or beside what the gradient says"
    )
    return Finding("A1", "warn", share, MISSED, message)


def _near(subject: Subject, batches: list[np.ndarray]) -> Finding:
    """A1 of small steps."""
    agreed: dict[str, float] = {}
    for nearer in NEARER:
        parts = [downhill_of(subject, positions, nearer) for positions in batches]
        at = {place: np.concatenate([part[place] for part in parts], axis=1) for place in parts[0]}
        if not agreed:
            count = sum(map(len, batches))
            place, share = min(((p, 100.0 * float(v[0].mean())) for p, v in at.items()), key=lambda found: found[1])
            message = f"a small step along the gradient beats 20 random directions on {share:.1f} % of the queries, at {place}"
            passed = Finding("A1", "pass", share, DOWNHILL, message)
            if share < DOWNHILL and count * (1 - share / 100) >= FEW - 0.5:
                return replace(passed, verdict="warn")
        agreed = {place: max(agreed.get(place, -1.0), float(np.median(v[1]))) for place, v in at.items()}
        if min(agreed.values()) >= AGREED or count < FEW:
            return passed
    place = min(agreed, key=lambda p: agreed[p])
    message = (
        f"changes of the loss along random directions correlate by {agreed[place]:.2f} with those that the gradient predicts, "
        f"at {place}: part of it is wrong or missing"
    )
    return Finding("A1", "warn", agreed[place], AGREED, message)


def downhill_of(subject: Subject, positions: np.ndarray, nearer: float) -> dict[str, np.ndarray]:
    """By place, (2, n) of each query: is the gradient's sign a better direction than every random one (1 or 0), and how well do
    the changes along the random ones correlate with those predicted (-1 to 1; 0 where either are all the same)?

    ``nearer`` is the part of A1's step that is made.
    """
    images, scene = shown(subject, positions)
    rng = subject.rng("A1")[torch.from_numpy(positions).to(subject.device)]
    loss = AttackLoss(subject.embedder, margin, scene)
    side = max(images.shape[2:])
    step, radius = nearer * (4 if side >= 28 else 0.5) / 255, Threat(norm="linf", eps=near_by(side), steps=1).radius
    drawn = (images + radius * (2 * rng.uniform(*images.shape[1:]) - 1)).clamp(0, 1)
    found = {}
    for place, start in {"the test images": images, "images drawn around them": drawn}.items():
        _, gradient = autograd(loss, start, rng)
        unit = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        there, predicted = [], []  # 20 of (n,)
        with torch.no_grad():
            along = loss((start - step * gradient.sign()).clamp(0, 1))
            for _ in range(20):
                x = (start + step * rng.signs(*start.shape[1:])).clamp(0, 1)
                there.append(loss(x))
                predicted.append((unit * (x - start)).sum((1, 2, 3)))
        beaten = (along < torch.stack(there)).all(0).to(along.dtype)
        correlation = _correlation(torch.stack(predicted), torch.stack(there))
        found[place] = torch.stack([beaten, correlation]).cpu().numpy()
    return found


def missed_of(subject: Subject, positions: np.ndarray) -> np.ndarray:
    """(n,) how much of its way to the embedding of an image of another class each query's gradient misses, as a share of all ups and
    downs of the distance on a straight line between the images; NaN where every entry is of its class.

    A derivative adds up to what it is the derivative of. What is stored, rounded or chosen by a threshold changes in jumps, and
    these are in no gradient.
    """
    images, scene = shown(subject, positions)
    rng = subject.rng("A1, other class")[torch.from_numpy(positions).to(subject.device)]
    rows = rng.uniform(len(scene.gallery)).masked_fill(~scene.other, -1.0).argmax(1, keepdim=True)
    goal = subject.dataset.images[subject.dataset.gallery[rows[:, 0].cpu().numpy()]].to(subject.device)
    loss = AttackLoss(subject.embedder, approach, scene.aimed(rows))
    with torch.no_grad():
        values, summed = [loss(images)], torch.zeros_like(scene.clean[:, 0])
        for k in range(PLACES):
            value, gradient = autograd(loss, images + (k + 0.5) / PLACES * (goal - images), rng)
            values.append(value)
            summed += (gradient * (goal - images)).sum((1, 2, 3)) / PLACES
        way = torch.stack([*values, loss(goal)])
    missed = (way[-1] - way[0] - summed).abs() / way.diff(dim=0).abs().sum(0).clamp_min(1e-30)
    return missed.masked_fill(~scene.has_negative, torch.nan).cpu().numpy()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(n,) of the columns of a and b (k, n); 0 where those of either are all the same."""
    a, b = (F.normalize((v - v.mean(0)).double(), dim=0, eps=1e-100) for v in (a, b))
    return (a * b).sum(0)


def noise_is_no_rival(evidence: Evidence) -> Finding:
    """A2: do 50 random images leave hardly more (less than 2 points) than the first search, where that leaves 5 % or
    more and the random images cost 5 points or more themselves?"""
    nearest, message = float("inf"), "random images do far less harm than the first search"
    noise = Step(name="noise", attack="WM", optimizer="noise")
    for eps in evidence.broken_by:
        first = 100.0 * float(evidence.left(eps, 1)[evidence.positions].mean())
        threat = evidence.protocol.threat_at(eps, {"queries": NOISE_DRAWS})
        left = 100.0 - 100.0 * float(evidence.attacked(noise, threat, evidence.positions).mean())
        if first < 5 or left > 95:
            continue
        if left - first < nearest:
            nearest = left - first
            message = (
                f"at eps {eps}, of the queries that are right when clean, {first:.1f} % survive the first search and "
                f"{left:.1f} % survive {NOISE_DRAWS} random images"
            )
    if nearest == float("inf"):
        return Finding("A2", "pass", None, 2.0, message)
    return Finding("A2", "warn" if nearest < 2 else "pass", nearest, 2.0, message)


def forgets(evidence: Evidence) -> Finding:
    """F5: does a copy that has just seen images 1/255 away embed new images as the model does, to 1e-5? And does the
    model embed an image, to 1e-3, as at the start of the run, as in another batch, and as where a gradient is asked for? Is
    the gradient of 16 queries, to 0.25 of its length, what it was before the searches, in a batch as large as theirs?"""
    if randomness(evidence).verdict == "fail":
        return Finding("F5", "skip", None, STEADY, "two passes differ anyway, since the model is random")
    at = evidence.subject, evidence.positions
    return judged_function(history(*at), altered(*at), evidence.beginning.turned())


def judged_function(gap: float, change: float, turned: float) -> Finding:
    """Of :func:`~dmlbench.doubts.unseen.history`, :func:`~dmlbench.doubts.unseen.altered` and
    :meth:`~dmlbench.doubts.unseen.Beginning.turned`."""
    if not change <= ALTERED:
        message = (
            f"embeddings of the same images differ by {change:.1e} from those at the start of the run, in another batch or "
            "where a gradient is asked for: the model is not one function of the image, and attacks on it prove nothing"
        )
        return Finding("F5", "fail", change, ALTERED, message)
    if turned > TURNED:
        message = (
            f"the gradient of the same images differs by {turned:.2f} of its length from what it was before the searches, in a "
            "batch as large as theirs: searches followed another gradient than the model's"
        )
        return Finding("F5", "fail", turned, TURNED, message)
    if math.isnan(gap):
        return Finding("F5", "skip", None, STEADY, "the model cannot be copied")
    if gap > STEADY:
        message = (
            f"embeddings change by {gap:.1e} where other images were embedded before: the model remembers what it was "
            "shown, so it is not one function of the image, and attacks on it prove nothing"
        )
        return Finding("F5", "fail", gap, STEADY, message)
    return Finding("F5", "pass", gap, STEADY, "embeddings do not depend on what was embedded before")


def generalises(evidence: Evidence) -> Finding:
    """A3: do far fewer queries survive the same search, or are far fewer right at all, where it begins from images that
    are near the test images but none of them?

    These are midpoints to another image of the class and images one pixel aside, of which the better counts; right at
    all must also be the query with the least bit of each pixel changed.
    """
    return judged_survey(evidence.surveyed)


def judged_survey(surveyed: Survey) -> Finding:
    right = {name: 100.0 * float(values.mean()) for name, values in surveyed.right.items()}
    survived = {name: 100.0 * float(values.mean()) for name, values in surveyed.survived.items()}
    known = min(right["least bits"], max(right["midpoint"], right["aside"]))
    if known < KNOWN:
        message = (
            f"of the queries that are right, {right['least bits']:.1f} % are right once the least bit of each pixel is "
            f"changed, {right['aside']:.1f} % one pixel aside and {right['midpoint']:.1f} % half-way to another image "
            "of the class: the model knows the test images rather than their classes"
        )
        return Finding("A3", "warn", known, KNOWN, message)
    lost = survived["as is"] - max(survived["midpoint"], survived["aside"])
    limit = LOST + CHANCE / math.sqrt(len(surveyed.nearness))
    message = (
        f"{survived['as is']:.1f} % of the queries survive a short search from the test image, {survived['midpoint']:.1f} % from "
        f"half-way to another image of the class and {survived['aside']:.1f} % from one pixel aside"
    )
    if lost > limit:
        return Finding("A3", "warn", lost, limit, f"{message}: what withstands is the test images, not their classes")
    return Finding("A3", "pass", lost, limit, message)


def leaves_the_entries(evidence: Evidence) -> Finding:
    """A4: do midpoints land on entries of the gallery: at less than 0.3 of the queries' distance to the nearest one?"""
    return judged_entries(evidence.surveyed)


def judged_entries(surveyed: Survey) -> Finding:
    apart = surveyed.nearness[~np.isnan(surveyed.nearness)]
    if not len(apart):
        return Finding("A4", "skip", None, LANDED, "every query's embedding is also that of another entry")
    ratio = float(np.median(apart))
    message = (
        f"the image half-way between two of a class is {ratio:.2f} times as far from the nearest entry as a query is"
    )
    if ratio < LANDED:
        message += ": the model gives back entries of the gallery for images that are not in it"
        return Finding("A4", "warn", ratio, LANDED, message)
    return Finding("A4", "pass", ratio, LANDED, message)


def nothing_changes(evidence: Evidence) -> Finding:
    """H1: at eps 0, is every image and every outcome that of the clean query, exactly?"""
    threat = Threat(norm=evidence.protocol.threat_at(next(iter(evidence.broken_by))).norm, eps=0, steps=3)
    with torch.no_grad():
        moved = [
            OPTIMIZERS[name](evidence.loss(), evidence.images, threat, evidence.subject.rng(0))
            for name in ("pgd", "apgd")
        ]
        differing = sum(int((x != evidence.images).flatten(1).any(1).sum()) for x in moved)
        again = evidence.subject.embedder(moved[0])
        wrong = int((READOUTS["recall_at_1"].read(again, evidence.scene) != 100).sum())
    if differing:
        message = f"{differing} images were changed at eps 0: the harness is at fault"
        return Finding("H1", "fail", float(differing), 0.0, message)
    if passes_gap(evidence.subject, evidence.images, evidence.scene) > 0:
        message = "at eps 0 every image is the clean one; outcomes cannot be compared, since the model is random"
        return Finding("H1", "skip", None, 0.0, message)
    if wrong:
        message = f"{wrong} queries that were right are wrong when the unchanged image is embedded again"
        return Finding("H1", "fail", float(wrong), 0.0, message)
    return Finding("H1", "pass", 0.0, 0.0, "at eps 0 every image and outcome is the clean one")


def inside_the_ball(evidence: Evidence) -> Finding:
    """H2: is every adversarial image inside the ball and [0, 1]? An image outside ends the run, so a report says yes."""
    return Finding("H2", "pass", 0.0, 0.0, "every adversarial image that was read lies inside the ball and [0, 1]")


def not_collapsed(evidence: Evidence) -> Finding:
    """H3: do the embeddings of the gallery differ at all? A constant embedding is collapsed, not robust."""
    width = spread(evidence.subject)
    if width < COLLAPSE:
        message = (
            f"the gallery's embeddings are (nearly) constant, spread {width:.1e} of their length: collapsed, not robust"
        )
        return Finding("H3", "fail", width, COLLAPSE, message)
    message = f"the gallery's embeddings differ, spread {width:.2f} of their length"
    return Finding("H3", "pass", width, COLLAPSE, message)


def shown(subject: Subject, positions: np.ndarray) -> tuple[Tensor, Scene]:
    """The clean images of some queries, and where they stand."""
    images = subject.dataset.images[subject.rows[positions]].to(subject.device)
    return images, subject.scene[torch.from_numpy(positions).to(subject.device)]

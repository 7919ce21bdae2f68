"""Does the number mean what it says? Checks of a model under attack, and of the harness itself.

Gradient masking, randomness and breakdown make a model look robust that is not (Athalye, Carlini and
Wagner, ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019). Each check asks one
question and answers with a number, a limit and a verdict in words; docs/audit.md is the page to read.
"fail": the measured robustness is not to be believed; "warn": look again; "pass": no doubt was found. A finding
that is not a pass travels with the result as a flag.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmlbench.attacks import AttackLoss
from dmlbench.doubts.checks import COLLAPSE, spread
from dmlbench.doubts.checks import FLAGS as OTHER_FLAGS
from dmlbench.doubts.unseen import Survey, history, joined, survey
from dmlbench.embedding import passes
from dmlbench.kinds.strict.search import CLEAN_WRONG, SURVIVED, attempt
from dmlbench.metrics import READOUTS
from dmlbench.objectives import margin
from dmlbench.optimizers import OPTIMIZERS, autograd, watched
from dmlbench.protocol import Protocol, Step
from dmlbench.registry import Registry
from dmlbench.results import Flag
from dmlbench.run.subject import Subject
from dmlbench.scene import Scene
from dmlbench.threat import Threat

PAGE = "docs/audit.md"
NOISE_DRAWS = 50
"""Random images per query in F4 and A2."""
FEW = 3
"""Fewer queries than this are an accident, whatever share they are."""
HIDDEN = 1.0
"""Percent of the queries that searches with gradients leave, beyond which F4 fails."""
BEYOND, TRIED = 1.5, 64
"""F4 asks whether gradients break the same queries, so many at the most, in a ball this much larger."""
GLANCED = 256
"""Queries that :func:`glance` looks at, at most."""
SURVEYED = 128
"""Of these, queries that it searches from, at most a quarter of those measured."""
DOWNHILL = 75.0
"""Percent of the queries on which the gradient's sign beats all random directions, under which A1 warns."""
LOST, CHANCE = 20.0, 120.0
"""Points that may be lost elsewhere than at the test images: so many, and ``CHANCE / sqrt(n)`` that n queries may lose
by accident."""
KNOWN = 40.0
"""Percent of the queries that are right when clean and have to be right near the test images too."""
PASSES = 5
"""How often F1 looks: a model that draws once a batch from few choices gives the same twice by accident."""
LANDED = 0.3
"""Median distance of midpoints to the nearest entry, over that of the queries, under which A4 warns."""

Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        check: a name of :data:`CHECKS`.
        verdict: "pass", "warn", "fail", or "skip" where the question does not arise.
        value: what was measured, in the unit of the check; None where it was skipped.
        limit: where a pass ends.
        message: the evidence in words.
    """

    check: str
    verdict: Verdict
    value: float | None
    limit: float
    message: str

    def flag(self) -> Flag:
        """The finding as a doubt that travels with a result."""
        return Flag(flag=f"audit-{self.check}", message=f"{self.verdict}: {self.message} ({PAGE})")


def left_by(broken_by: np.ndarray, steps: int) -> np.ndarray:
    """(Q,) bool: right when clean and not broken by the first so many steps, or at a smaller eps."""
    return (broken_by == SURVIVED) | (broken_by >= 2 + steps)


def white_steps(protocol: Protocol) -> int:
    """How many of the protocol's steps, from the first, use the gradient."""
    flags = [OPTIMIZERS[step.optimizer].needs_gradients for step in protocol.steps]
    return flags.index(False) if False in flags else len(flags)


def last_resort(protocol: Protocol, broken_by: np.ndarray) -> tuple[int, int]:
    """How many queries the steps without a gradient break, and how many the steps with one had left."""
    left = left_by(broken_by, white_steps(protocol))
    return int((left & ~left_by(broken_by, len(protocol.steps))).sum()), int(left.sum())


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the checks look at: some queries that are right when clean, and a strict run on all.

    Attributes:
        subject: the model and every query measured.
        protocol: the one that was run.
        broken_by: by eps, how each query (Q,) ended.
        positions: (B,) which queries the checks attack themselves.
        images: (B, C, H, W) their clean images.
        scene: the same queries.
        seed: of the run.
    """

    subject: Subject
    protocol: Protocol
    broken_by: dict[str, np.ndarray]
    positions: np.ndarray
    images: Tensor
    scene: Scene
    seed: int

    def loss(self) -> AttackLoss:
        """The margin of R@1 of each image; 0 or less is misranked."""
        return AttackLoss(self.subject.embedder, margin, self.scene)

    def left(self, eps: str, steps: int) -> np.ndarray:
        """(Q,) bool: right when clean and not broken at this eps by the first so many steps, or before."""
        return left_by(self.broken_by[eps], steps)

    @cached_property
    def surveyed(self) -> Survey:
        """What becomes of the queries near the test images."""
        return survey(self.subject, self.positions)

    def attacked(self, step: Step, threat: Threat, positions: np.ndarray) -> np.ndarray:
        """(n,) bool: which queries one more search breaks."""
        if not len(positions):
            return np.zeros(0, dtype=bool)
        return attempt(self.subject, step, threat, positions, self.seed).broken


def randomness(evidence: Evidence) -> Finding:
    """F1: do passes of one batch differ by more than 1e-5 (of the embeddings' root mean square length)?"""
    return _randomness(_gap(evidence.subject, evidence.images, evidence.scene))


def _gap(subject: Subject, images: Tensor, scene: Scene) -> float:
    """The largest difference of :data:`PASSES` passes from the first, relative to the embeddings' root mean square length."""
    with torch.no_grad():
        first, *others = passes(subject.embedder, images, PASSES, rows=scene.query)
        largest = torch.stack([(e - first).abs().amax() for e in others]).amax()
    return float(largest / scene.gallery.scale.clamp_min(1e-30))


def _randomness(gap: float) -> Finding:
    if gap > 1e-5:
        message = (
            f"two passes of the same images differ by {gap:.1e}, so the model is random and a single gradient "
            "says little: attack it with --eot N, which averages N passes"
        )
        return Finding("F1", "fail", gap, 1e-5, message)
    return Finding("F1", "pass", gap, 1e-5, "two passes of the same images agree")


def zero_gradients(evidence: Evidence) -> Finding:
    """F2: have more than 1 % of the queries a gradient that is exactly zero in every pixel, or NaN or infinite in one?"""
    missing, wrong = _missing(evidence.subject, evidence.images, evidence.scene)
    return _zero_gradients(100.0 * float(missing.float().mean()), wrong)


def _missing(subject: Subject, images: Tensor, scene: Scene) -> tuple[Tensor, int]:
    """(B,) bool: which queries have no gradient to follow; and how many of these have one that is NaN or infinite."""
    with watched() as trouble:
        _, gradient = autograd(AttackLoss(subject.embedder, margin, scene), images, subject.rng(0))
    return (gradient.flatten(1) == 0).all(1), trouble.count


def _zero_gradients(share: float, wrong: int) -> Finding:
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
    """F4: does an attack that sees values only (Square, 50 random images) break more than 1 %, and at least 3, of the
    queries that all gradient searches leave?

    It fails where the gradient searches break so few of these even in a ball half as large again that more than
    1 % stays hidden from them, else it warns: on a rugged loss they miss by a hair what others hit by a hair.
    """
    steps = white_steps(evidence.protocol)
    noise = Step(name="noise", attack="WM", optimizer="noise")
    found = [Finding("F4", "pass", 0.0, HIDDEN, "attacks without gradients break next to nothing that others left")]
    for eps, broken_by in evidence.broken_by.items():
        left = evidence.left(eps, steps)
        mine = evidence.positions[left[evidence.positions]]
        threat = evidence.protocol.threat_at(eps, {"queries": NOISE_DRAWS})
        by_square = np.flatnonzero(left & ~left_by(broken_by, len(evidence.protocol.steps)))
        for name, hit, of in (
            ("Square", by_square, int(left.sum())),
            (f"{NOISE_DRAWS} random images", mine[evidence.attacked(noise, threat, mine)], len(mine)),
        ):
            share = 100.0 * len(hit) / of if len(hit) >= FEW else 0.0
            if share <= HIDDEN:
                found.append(replace(found[0], value=share))
                continue
            beyond = _broken_beyond(evidence, eps, hit)
            message = (
                f"{name} at eps {eps} breaks {len(hit)} of the {of} queries ({share:.1f} %) that all searches along "
                f"the gradient left; these break {100 * beyond:.0f} % of them where the ball is half as large again"
            )
            hidden = share * (1 - beyond) > HIDDEN and len(hit) * (1 - beyond) >= FEW
            end = ": the gradient hides what is there" if hidden else ": the loss is rugged"
            found.append(Finding("F4", "fail" if hidden else "warn", share, HIDDEN, message + end))
    return max(found, key=lambda f: (("pass", "warn", "fail").index(f.verdict), f.value or 0.0))


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
    """A1: does a small step along the gradient's sign beat 20 random sign directions on fewer than 75 % of queries?

    The step is 4/255; 0.5/255 for images of less than 28 pixels a side, where few pixels let random
    directions come near the best one before the loss bends.
    """
    return _useful_gradient(_downhill(evidence.subject, evidence.positions))


def _downhill(subject: Subject, positions: np.ndarray) -> np.ndarray:
    """(n,) bool: is the gradient's sign a better direction than every random one?"""
    images, scene = _shown(subject, positions)
    rng = subject.rng("A1")[torch.from_numpy(positions).to(subject.device)]
    loss = AttackLoss(subject.embedder, margin, scene)
    step = (4 if max(images.shape[2:]) >= 28 else 0.5) / 255
    _, gradient = autograd(loss, images, rng)
    with torch.no_grad():
        along = loss((images - step * gradient.sign()).clamp(0, 1))
        beaten = torch.ones_like(along, dtype=torch.bool)
        for _ in range(20):
            beaten &= along < loss((images + step * rng.signs(*images.shape[1:])).clamp(0, 1))
    return beaten.cpu().numpy()


def _useful_gradient(downhill: np.ndarray) -> Finding:
    share = 100.0 * float(downhill.mean())
    message = f"a small step along the gradient beats 20 random directions on {share:.1f} % of the queries"
    return Finding("A1", "warn" if share < DOWNHILL else "pass", share, DOWNHILL, message)


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
    """F5: does a copy that has just seen images 1/255 away embed new images as the model does, to 1e-5?"""
    if randomness(evidence).verdict == "fail":
        return Finding("F5", "skip", None, 1e-5, "two passes differ anyway, since the model is random")
    return _forgets(history(evidence.subject, evidence.positions))


def _forgets(gap: float) -> Finding:
    if math.isnan(gap):
        return Finding("F5", "skip", None, 1e-5, "the model cannot be copied")
    if gap > 1e-5:
        message = (
            f"embeddings change by {gap:.1e} where other images were embedded before: the model remembers what it was "
            "shown, so it is not one function of the image, and attacks on it prove nothing"
        )
        return Finding("F5", "fail", gap, 1e-5, message)
    return Finding("F5", "pass", gap, 1e-5, "embeddings do not depend on what was embedded before")


def generalises(evidence: Evidence) -> Finding:
    """A3: do far fewer queries survive the same search, or are far fewer right at all, where it begins from images that
    are near the test images but none of them?

    These are midpoints to another image of the class and images one pixel aside, of which the better counts; right at
    all must also be the query with the least bit of each pixel changed.
    """
    return _generalises(evidence.surveyed)


def _generalises(found: Survey) -> Finding:
    right = {name: 100.0 * float(values.mean()) for name, values in found.right.items()}
    kept = {name: 100.0 * float(values.mean()) for name, values in found.kept.items()}
    known = min(right["least bits"], max(right["midpoint"], right["aside"]))
    if known < KNOWN:
        message = (
            f"of the queries that are right, {right['least bits']:.1f} % are right once the least bit of each pixel is "
            f"changed, {right['aside']:.1f} % one pixel aside and {right['midpoint']:.1f} % half-way to another image "
            "of the class: the model knows the test images rather than their classes"
        )
        return Finding("A3", "warn", known, KNOWN, message)
    lost = kept["as is"] - max(kept["midpoint"], kept["aside"])
    limit = LOST + CHANCE / math.sqrt(len(found.nearness))
    message = (
        f"{kept['as is']:.1f} % of the queries survive a short search from the test image, {kept['midpoint']:.1f} % from "
        f"half-way to another image of the class and {kept['aside']:.1f} % from one pixel aside"
    )
    if lost > limit:
        return Finding("A3", "warn", lost, limit, f"{message}: what withstands is the test images, not their classes")
    return Finding("A3", "pass", lost, limit, message)


def leaves_the_entries(evidence: Evidence) -> Finding:
    """A4: do midpoints land on entries of the gallery: at less than 0.3 of the queries' distance to the nearest one?"""
    return _leaves_the_entries(evidence.surveyed)


def _leaves_the_entries(found: Survey) -> Finding:
    apart = found.nearness[~np.isnan(found.nearness)]
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
        return Finding(
            "H1", "fail", float(differing), 0.0, f"{differing} images were changed at eps 0: the harness is at fault"
        )
    if _gap(evidence.subject, evidence.images, evidence.scene) > 0:
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
    return Finding(
        "H3", "pass", width, COLLAPSE, f"the gallery's embeddings differ, spread {width:.2f} of their length"
    )


@dataclass(frozen=True)
class Check:
    """One question of the audit.

    Attributes:
        ask: how it is answered.
        doubt: what the flag of a finding that is no pass means, whatever the model.
        flag: of the same finding where the run has no audit (:func:`glance`); "" where it is not asked then.
    """

    ask: Callable[[Evidence], Finding]
    doubt: str
    flag: str = ""


CHECKS: Registry[Check] = Registry(
    "check",
    {
        "F1": Check(
            randomness,
            "Two passes of the same images differ: the model is random, so a single gradient says little.",
            "random",
        ),
        "F2": Check(
            zero_gradients,
            "The gradient is zero, NaN or infinite for more than 1 % of the queries: searches along it stand still.",
            "zero-gradients",
        ),
        "F3": Check(
            unbounded, "Queries stay right where any image may be reached: the search fails, and not the attack."
        ),
        "F4": Check(
            black_beats_white,
            "Searches that see values alone break queries that all searches along the gradient left: the gradient hides "
            "them (fail), or the loss is rugged (warn).",
        ),
        "F5": Check(
            forgets,
            "Embeddings depend on which images were embedded before: the model remembers, and attacks prove nothing.",
            "remembers",
        ),
        "A1": Check(
            useful_gradient,
            "A small step along the gradient is often no better than random ones: searches along it may be misled.",
            "misleading-gradients",
        ),
        "A2": Check(noise_is_no_rival, "A search breaks hardly more queries than a few random images do."),
        "A3": Check(
            generalises,
            "The test images withstand attacks, or are recognised, that images near them do not: they may have been "
            "memorised.",
            "memorised",
        ),
        "A4": Check(
            leaves_the_entries,
            "Images that are not in the gallery are given the embeddings of images that are: these may have been stored.",
            "gallery-copies",
        ),
        "H1": Check(nothing_changes, "At eps 0 an image or an outcome differs: the harness is at fault."),
        "H2": Check(inside_the_ball, "An adversarial image is outside the ball or [0, 1]: the harness is at fault."),
        "H3": Check(not_collapsed, "The embeddings are nearly constant: collapsed, not robust."),
    },
)
FIRST = ("F1", "F2", "F3", "F4", "A1", "A2", "H1", "H2", "H3")
"""The checks that there were when version 1 of the strict protocols was released."""
GLANCES = tuple(check.flag for check in CHECKS.values() if check.flag)
"""The flags of :func:`glance`."""
FLAGS = {
    **OTHER_FLAGS,
    **{check.flag: check.doubt for check in CHECKS.values() if check.flag},
    **{f"audit-{name}": check.doubt for name, check in CHECKS.items()},
}
"""What each flag of a result means."""


def examine(
    subject: Subject, protocol: Protocol, broken_by: dict[str, np.ndarray], seed: int, queries: int
) -> list[Finding]:
    """Every check, on up to ``queries`` of the queries that are right when clean, spread evenly over all."""
    right = np.flatnonzero(next(iter(broken_by.values())) != CLEAN_WRONG)
    positions = _evenly(right, queries)
    evidence = Evidence(subject, protocol, broken_by, positions, *_shown(subject, positions), seed)
    if not len(positions):
        message = "no query is right when clean, so nothing can be attacked"
        found = [Finding(name, "skip", None, 0.0, message) for name in CHECKS if name != "H3"]
        return [*found, not_collapsed(evidence)]
    return [check.ask(evidence) for check in CHECKS.values()]


def _evenly(positions: np.ndarray, most: int) -> np.ndarray:
    """Up to ``most`` of the positions, spread evenly over all."""
    if not len(positions):
        return positions
    return positions[np.unique(np.linspace(0, len(positions) - 1, min(most, len(positions))).astype(int))]


def _shown(subject: Subject, positions: np.ndarray) -> tuple[Tensor, Scene]:
    """The clean images of some queries, and where they stand."""
    images = subject.dataset.images[subject.rows[positions]].to(subject.device)
    return images, subject.scene[torch.from_numpy(positions).to(subject.device)]


def glance(
    subject: Subject, recall: Float[np.ndarray, " Q"], optimizers: Collection[str], batch_size: int
) -> Iterator[Flag]:
    """The checks with a ``flag``, on some of the queries that are right when clean: what every result can afford.

    F1 and F2 are asked of up to :data:`GLANCED` queries, the others of up to :data:`SURVEYED`; where none of
    ``optimizers`` follows the gradient, F1, F5 and A4 alone. F2 and A1 are asked of the model that the searches are
    made on, the surrogate where there is one. Their gradient is the margin's, as in the audit: unlike that of the
    shift it has no reason to vanish at the clean image. A model that is known to be random is asked F2 alone.

    Args:
        recall: clean R@1 of each query, percent, NaN without positives.
        optimizers: names of what the run searched with.
    """
    right = np.flatnonzero(recall == 100.0)
    if not len(right):
        return
    followed, source = any(OPTIMIZERS[name].needs_gradients for name in optimizers), subject.surrogate or subject
    batches = _batches(_evenly(right, GLANCED), batch_size)
    random = any(flag == "randomised" for flag, _ in subject.embedder.doubts)
    found = []
    if not random:
        found.append(_randomness(max(_gap(subject, *_shown(subject, part)) for part in batches)))
        random = found[0].verdict == "fail"
    few = _batches(_evenly(right, min(SURVEYED, -(-len(right) // 4))), batch_size)
    if not random:
        found.append(_forgets(max(history(subject, part) for part in few)))
    blind = False
    if followed:
        missing = [_missing(source, *_shown(source, part)) for part in batches]
        share = 100.0 * float(torch.cat([rows for rows, _ in missing]).float().mean())
        found.append(_zero_gradients(share, sum(wrong for _, wrong in missing)))
        blind = found[-1].verdict == "fail"
    if followed and not random and not blind:
        found.append(_useful_gradient(np.concatenate([_downhill(source, part) for part in few])))
    if not random:
        surveyed = joined([survey(subject, part) for part in few])
        found += [_generalises(surveyed), _leaves_the_entries(surveyed)]
    for finding in found:
        if finding.verdict in ("warn", "fail"):
            yield Flag(flag=CHECKS[finding.check].flag, message=f"{finding.message} ({PAGE})")


def _batches(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[a : a + size] for a in range(0, len(positions), size)]

"""The audit: which checks of :mod:`dmlbench.doubts.questions` are run on a result, and what their flags mean.

docs/audit.md is the page to read. "fail": the measured robustness is not to be believed; "warn": look again; "pass": no
doubt was found. A finding that is not a pass travels with the result as a flag.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from dmlbench.doubts.checks import FLAGS as OTHER_FLAGS
from dmlbench.doubts.evidence import PAGE, Evidence, Finding
from dmlbench.doubts.questions import (
    black_beats_white,
    direction,
    forgets,
    generalises,
    inside_the_ball,
    judged_entries,
    judged_function,
    judged_random,
    judged_survey,
    judged_zero,
    leaves_the_entries,
    no_gradient,
    noise_is_no_rival,
    not_collapsed,
    nothing_changes,
    passes_gap,
    randomness,
    shown,
    unbounded,
    useful_gradient,
    zero_gradients,
)
from dmlbench.doubts.unseen import Beginning, altered, history, joined, survey
from dmlbench.kinds.strict.search import CLEAN_WRONG
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Protocol
from dmlbench.registry import Registry
from dmlbench.results import Flag
from dmlbench.run.subject import Subject

GLANCED = 256
"""Queries that :func:`glance` looks at, at most."""
SURVEYED = 128
"""Of these, queries that it searches from, at most a quarter of those measured."""


@dataclass(frozen=True)
class Check:
    """One question of the audit.

    Attributes:
        ask: how it is answered.
        doubt: what the flag of a finding that is no pass means, whatever the model.
        flag: of the same check in a run without an audit (:func:`glance`); "" if it is not made there.
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
            "An image's embedding or gradient depends on which images were embedded before or with it, or on whether a gradient is asked "
            "for: attacks prove nothing.",
            "remembers",
        ),
        "A1": Check(
            useful_gradient,
            "A small step along the gradient is often no better than random ones, or the embedding moves in jumps that are in no gradient: "
            "searches along it may be misled.",
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
    subject: Subject,
    protocol: Protocol,
    broken_by: dict[str, np.ndarray],
    seed: int,
    queries: int,
    beginning: Beginning | None = None,
) -> list[Finding]:
    """Every check, on up to ``queries`` of the queries that are right when clean, spread evenly over all.

    Args:
        beginning: the gradient before the searches; None: as it is now.
    """
    right = np.flatnonzero(next(iter(broken_by.values())) != CLEAN_WRONG)
    positions = _evenly(right, queries)
    evidence = Evidence(
        subject,
        protocol,
        broken_by,
        positions,
        *shown(subject, positions),
        seed,
        beginning or Beginning.of(subject, queries),
    )
    if not len(positions):
        message = "no query is right when clean, so nothing can be attacked"
        skipped = [Finding(name, "skip", None, 0.0, message) for name in CHECKS if name != "H3"]
        return [*skipped, not_collapsed(evidence)]
    return [check.ask(evidence) for check in CHECKS.values()]


def _evenly(positions: np.ndarray, most: int) -> np.ndarray:
    """Up to ``most`` of the positions, spread evenly over all."""
    if not len(positions):
        return positions
    return positions[np.unique(np.linspace(0, len(positions) - 1, min(most, len(positions))).astype(int))]


def follow_gradients(optimizers: Collection[str]) -> bool:
    """Whether one of these optimizers follows the gradient."""
    return any(OPTIMIZERS[name].needs_gradients for name in optimizers)


def glance(
    subject: Subject,
    recall: Float[np.ndarray, " Q"],
    optimizers: Collection[str],
    batch_size: int,
    beginning: Beginning | None = None,
) -> Iterator[Flag]:
    """The checks with a ``flag``, on some of the queries that are right when clean: what every result can afford.

    F1 and F2 are made on up to :data:`GLANCED` queries, the others on up to :data:`SURVEYED`; if none of
    ``optimizers`` follows the gradient, F1, F5 and A4 alone. F2, A1 and F5's gradient are made on the model that the searches are
    made on, the surrogate where there is one. Their gradient is the margin's, as in the audit: unlike that of the
    shift it has no reason to vanish at the clean image. For a model that is known to be random F2 alone is made.

    Args:
        recall: clean R@1 of each query, percent, NaN without positives.
        optimizers: names of what the run searched with.
        beginning: the gradient before the searches; None: as it is now.
    """
    right = np.flatnonzero(recall == 100.0)
    if not len(right):
        return
    followed, source = follow_gradients(optimizers), subject.surrogate or subject
    batches = _batches(_evenly(right, GLANCED), batch_size)
    random = any(flag == "randomised" for flag, _ in subject.embedder.doubts)
    findings = []
    if not random:
        findings.append(judged_random(max(passes_gap(subject, *shown(subject, part)) for part in batches)))
        random = findings[0].verdict == "fail"
    few = _batches(_evenly(right, min(SURVEYED, -(-len(right) // 4))), batch_size)
    if not random:
        gap, change = (max(measured(subject, part) for part in few) for measured in (history, altered))
        turned = (beginning or Beginning.of(source, batch_size)).turned() if followed else 0.0
        findings.append(judged_function(gap, change, turned))
    blind = False
    if followed:
        missing = [no_gradient(source, *shown(source, part)) for part in batches]
        share = 100.0 * float(torch.cat([rows for rows, _ in missing]).float().mean())
        findings.append(judged_zero(share, sum(wrong for _, wrong in missing)))
        blind = findings[-1].verdict == "fail"
    if followed and not random and not blind:
        findings.append(direction(source, few))
    if not random:
        surveyed = joined([survey(subject, part) for part in few])
        findings += [judged_survey(surveyed), judged_entries(surveyed)]
    for finding in findings:
        if finding.verdict in ("warn", "fail"):
            yield Flag(flag=CHECKS[finding.check].flag, message=f"{finding.message} ({PAGE})")


def _batches(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[a : a + size] for a in range(0, len(positions), size)]

"""Protocols that are a list of components, each searched for itself: with a mean that is ERS, or without one."""

from collections.abc import Iterator

import torch

from dmlbench.attacks import ATTACKS, measure
from dmlbench.errors import Problem
from dmlbench.kinds.base import Kind, Stated, StoredSample, outcomes_differ
from dmlbench.protocol import Protocol
from dmlbench.run.search import aimed, searches


def page(p: Protocol) -> Iterator[str]:
    """What the mean is called."""
    yield "Score: ERS, the mean of the parts' scores, 0 to 100, higher is more robust.\n"


def replay(stated: Stated, stored: StoredSample) -> Iterator[Problem]:
    """Do the stored images of each attack score the same?"""
    e, rules, subject = stated.evaluation, stated.rules, stored.subject
    for search in searches(rules, rules.components):
        scene = aimed(subject, search, rules.seed)[torch.from_numpy(stored.positions).to(subject.device)]
        for c in search.components:
            adversarial = torch.from_numpy(e.sample[c.name].copy()).to(subject.device)
            read_outs = measure(
                subject.embedder, ATTACKS[search.attack], search.threat, adversarial, stored.clean, scene
            )
            yield from outcomes_differ(e, c, read_outs, stored.positions)


ERS = Kind(
    name="ers",
    title="components whose mean score is ERS",
    meaning="ERS, the empirical robustness score, is the mean of the scores of several attacks, each from 0 (the attack always "
    "succeeds) to 100 (it never does). It says how a model fares against attacks of many aims, each searched for by itself: "
    "the worst case of a single query can be far lower.",
    needs=("components",),
    mean=True,
    page=page,
    replay=replay,
)
PARTS = Kind(
    name="parts",
    title="components without a common score",
    meaning="Each attack is scored for itself, from 0 (it always succeeds) to 100 (it never does). There is no common score, so "
    "rows have no rank.",
    needs=("components",),
    replay=replay,
)

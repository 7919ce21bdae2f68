"""The packaged model, and strict protocols with so little of each search that a test can run them."""

from dmlbench.protocols import load_protocol

DEFAULT = "digits-smallcnn-triplet-hm-lga-ics"


def shortened(name: str = "strict", steps: int = 12, queries: int = 40, audit: int = 0, rounds: int = 6):
    """A packaged protocol with less of each search: the same code paths."""
    p = load_protocol(name)
    few = tuple(
        s.model_copy(
            update={
                "threat": {**s.threat, **({"queries": queries} if "queries" in s.threat else {"steps": steps})},
                "rounds": min(s.rounds, rounds),
                "fewest": min(s.fewest, rounds // 2),
            }
        )
        for s in p.steps
    )
    changes: dict[str, object] = {"steps": few, "audit": audit, "clustering_seeds": (0,)}
    if p.threshold:
        changes["threshold"] = p.threshold.model_copy(
            update={"threat": {**p.threshold.threat, "steps": steps}, "parts": 2, "octaves": 1}
        )
    if p.together > 1:
        changes["together"] = 20
    return p.model_copy(update=changes)

"""How strong the adversary of a result was."""

from dmlbench.kinds.table import kind_of
from dmlbench.protocols import packaged_protocol
from dmlbench.results import Evaluation


def sizes_of(e: Evaluation) -> tuple[str, tuple[str, ...]]:
    """Norm and eps of the adversary, ascending; no eps where nothing is perturbed within a ball, or nobody knows.

    For a result that is older than these fields, the packaged protocol says it.
    """
    rules = None if e.protocol.norm else packaged_protocol(e.protocol.name, e.protocol.sha256)
    if rules is None:
        return e.protocol.norm or "", e.protocol.eps
    if (curve := kind_of(e).curve(e)) is not None:
        return rules.norm, tuple(point.eps for point in curve.points[1:])
    if e.conditions.eps is not None:
        return rules.norm, tuple(e.conditions.eps.split(","))
    return rules.norm, () if rules.grid else rules.sizes(())


def adversary(e: Evaluation) -> str:
    """The adversary in words: norm, eps, and what eps is applied to; empty where :func:`sizes_of` has no eps."""
    norm, sizes = sizes_of(e)
    eps = " to ".join(dict.fromkeys((*sizes[:1], *sizes[-1:])))
    return eps and f"{norm}, eps {eps} of pixels in [0, 1], after resize and crop, before normalisation"

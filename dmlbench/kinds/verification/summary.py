"""What a verification run says: clean numbers, the curve over eps, and the smallest eps, all from the queries' own arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dmlbench.kinds.smallest import halfway
from dmlbench.kinds.verification.pairs import SIDES, Settings
from dmlbench.metrics import mean
from dmlbench.protocol import Component, Protocol
from dmlbench.results import finite

FARS = ("1e-2", "1e-3", "1e-4")
"""False accept rates at which TAR is reported."""
NO_PAIR, SURVIVED, CLEAN_WRONG, CARRIED = -2, -1, 0, 1
"""``broken_by`` of a query without such a pair, of a pair that no step flipped, that was decided wrongly before any, and that a
smaller eps flipped; the protocol's steps count from 2."""
FOLD = "verification/fold"


def components(rules: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each side and eps of the grid, ascending, for images of this shape (channels, height, width)."""
    return [
        Component(
            name=f"{side}@{eps}", attack=side, optimizer="worst case", readout="decided", worst=0, best=100, threat={"eps": eps}
        )
        for side in SIDES
        for eps in rules.eps_for(shape)
    ]  # fmt: skip


def distances(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "Q 2"]:
    """The clean distance of each query's pairs, NaN where it has none."""
    return np.stack([arrays[f"{side}/distance"] for side in SIDES], axis=1)


def margins(distance: Float[np.ndarray, "Q 2"], edge: Float[np.ndarray, " Q"]) -> Float[np.ndarray, "Q 2"]:
    """How far each pair is on the right side of its threshold."""
    return (distance - edge[:, None]) * np.array([-1, 1], dtype=np.float32)


def outcome(broken_by: np.ndarray) -> Float[np.ndarray, " Q"]:
    """100 where the pair is decided rightly in spite of all, else 0; NaN where there is no pair. Percent."""
    return np.where(broken_by == NO_PAIR, np.nan, 100.0 * (broken_by == SURVIVED)).astype(np.float32)


def roc(distance: Float[np.ndarray, " n"], genuine: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "k 2"]:
    """The share of impostors and of genuine pairs that are accepted, at every distance there is, from none to all."""
    values = np.unique(distance)
    ends = [np.searchsorted(np.sort(distance[side]), values, side="right") / side.sum() for side in (~genuine, genuine)]
    return np.concatenate([np.zeros((1, 2)), np.stack(ends, axis=1)])


def eer(curve: Float[np.ndarray, "k 2"]) -> float:
    """The rate at which as many impostors are accepted as genuine pairs are rejected, 0 to 1; along a line between two points."""
    far, frr = curve[:, 0], 1.0 - curve[:, 1]
    after = int((far >= frr).argmax())
    if after == 0:
        return float(far[0])
    gap = (frr - far)[[after - 1, after]]
    share = gap[0] / (gap[0] - gap[1])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def tar_at(curve: Float[np.ndarray, "k 2"], far: float, impostors: int) -> float | None:
    """The largest share of genuine pairs that is accepted where at most ``far`` of the impostors are, 0 to 1; None where
    that is not even one of them."""
    if far * impostors < 1:
        return None
    return float(curve[curve[:, 0] <= far, 1].max())


def corners(curve: Float[np.ndarray, "k 2"]) -> list[list[float]]:
    """The points of a curve of steps where it turns, percent."""
    turns = np.ones(len(curve), dtype=bool)
    flat = np.diff(curve, axis=0) == 0  # (k - 1, 2)
    turns[1:-1] = ~(flat[1:] & flat[:-1]).any(1)
    return [[float(x), float(y)] for x, y in 100.0 * curve[turns]]


def codes(rules: Protocol) -> dict[str, int]:
    """What the numbers in ``broken_by`` mean."""
    plain = {"no such pair": NO_PAIR, "survived": SURVIVED, "wrong when clean": CLEAN_WRONG}
    return plain | {"flipped at a smaller eps": CARRIED} | {step.name: i + 2 for i, step in enumerate(rules.steps)}


def by_query(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> Float[np.ndarray, " Q"]:
    """The mean of each query's outcomes under some names, of the pairs that it has."""
    table = np.stack([arrays[name].astype(np.float64) for name in names], axis=1)
    there = ~np.isnan(table)
    return np.where(there.any(1), np.where(there, table, 0.0).sum(1) / np.maximum(there.sum(1), 1), np.nan)


def smallest_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " Q"]]:
    """The smallest eps of each query's pairs: ``any`` of them, and by side."""
    sides = {side: arrays[f"{side}/smallest_eps"].astype(np.float64) for side in SIDES}
    return {"any": np.fmin(*sides.values()), **sides}


def summary(
    rules: Protocol,
    grid: Sequence[str],
    labels: np.ndarray,
    edges: Float[np.ndarray, " F"],
    arrays: Mapping[str, np.ndarray],
    spent: Sequence[Sequence[Mapping[str, Any]]],
    halving: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that a run says of its queries' outcomes: what goes into ``extras.verification``.

    Args:
        edges: the threshold of each fold.
        arrays: by side ``distance``, ``clean`` (100 where decided rightly), ``smallest_eps``, and by side and eps ``value`` and ``broken_by``,
            (Q,) each; :data:`FOLD`.
        spent: by eps and step the ``gradients``, ``values`` (passes over all pairs) and ``seconds`` it cost.
        halving: the same of the search for the smallest eps; None where there was none.
    """
    d = distances(arrays)
    there = ~np.isnan(d)
    genuine = np.broadcast_to(np.array([True, False]), d.shape)[there]
    both = bool(genuine.any() and not genuine.all())
    curve = roc(d[there], genuine) if both else None
    impostors = int((~genuine).sum())
    percent = {far: tar_at(curve, float(far), impostors) if curve is not None else None for far in FARS}
    rows = []
    for eps, costs in zip(grid, spent, strict=True):
        by = np.concatenate([arrays[f"{side}@{eps}/broken_by"] for side in SIDES])
        alive, done = int(((by == SURVIVED) | (by > CARRIED)).sum()), []
        for index, (step, cost) in enumerate(zip(rules.steps, costs, strict=True)):
            here = int((by == index + 2).sum())
            entry: dict[str, Any] = {"step": step.name, "attacked": alive if cost["ran"] else 0, "flipped": here}
            done.append(entry | {name: cost[name] for name in ("ran", "gradients", "values", "seconds")})
            alive -= here
        names = [f"{side}@{eps}/value" for side in SIDES]
        row: dict[str, Any] = {"eps": eps, "accuracy": finite(mean(by_query(arrays, names)))}
        row |= {side: finite(mean(arrays[name])) for side, name in zip(SIDES, names, strict=True)}
        rows.append({**row, "carried": int((by == CARRIED).sum()), "steps": done})
    right = sum(int((arrays[f"{side}/clean"] == 100.0).sum()) for side in SIDES)
    passes = {
        name: sum(s[name] for row in rows for s in row["steps"]) + (halving or {}).get(name, 0)
        for name in ("gradients", "values")
    }
    extras: dict[str, Any] = {
        "norm": rules.threat_at(grid[0]).norm,
        "pairs": {side: int(there[:, i].sum()) for i, side in enumerate(SIDES)},
        "far": Settings.of(rules).far,
        "thresholds": [None if np.isnan(edge) else float(edge) for edge in edges],
        "clean": {
            "accuracy": finite(mean(by_query(arrays, [f"{side}/clean" for side in SIDES]))),
            **{side: finite(mean(arrays[f"{side}/clean"])) for side in SIDES},
            "eer": None if curve is None else 100.0 * eer(curve),
            "tar": {far: None if tar is None else 100.0 * tar for far, tar in percent.items()},
        },
        "roc": [] if curve is None else corners(curve),
        "curve": rows,
        **{f"{name}_per_pair": n / max(1, right) / len(grid) for name, n in passes.items()},
        "codes": codes(rules),
    }
    if halving is not None:
        smallest = smallest_of(arrays)
        extras["smallest_eps"] = {
            name: halfway(rules, grid, values, labels, halving if name == "any" else {})
            for name, values in smallest.items()
        }
    return extras

"""What a run of kind strict says: one column for each eps, how each query ended, and all that follows from it.

Everything here is made of the queries' outcomes alone, so that who checks a submitted run makes it again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dmlbench.kinds.smallest import halfway
from dmlbench.kinds.strict.rounds import fallen, groups, last_half, missed, rounds_run
from dmlbench.metrics import mean
from dmlbench.protocol import Component, Protocol

SURVIVED, CLEAN_WRONG, CARRIED = -1, 0, 1
"""``broken_by`` of a query that no step broke, that was wrong before any, and that a smaller eps broke;
the protocol's steps count from 2."""
PROXIES = ("recall_at_2", "recall_at_4", "recall_at_8", "map_at_r")
"""Read at the images that the searches for R@1 stopped at: no search aimed at them, so the true worst is lower."""
SMALLEST = "smallest_eps/value"
"""The per-query array of the smallest eps that breaks each query, on the [0, 1] scale."""


def components(protocol: Protocol, shape: Sequence[int]) -> list[Component]:
    """One column for each eps of the grid, ascending, for images of this shape (channels, height, width)."""
    return [
        Component(
            name=f"strict@{eps}",
            attack=protocol.name,
            optimizer="worst case",
            readout="recall_at_1",
            worst=0,
            best=100,
            threat={"eps": eps},
        )
        for eps in protocol.eps_for(shape)
    ]


def outcome(broken_by: Int[np.ndarray, " Q"], clean: Float[np.ndarray, " Q"]) -> Float[np.ndarray, " Q"]:
    """100 where nothing broke the query, else 0; NaN where it has no outcome when clean. Percent."""
    value = np.where(broken_by == SURVIVED, 100.0, 0.0)
    return np.where(np.isnan(clean), np.nan, value).astype(np.float32)


def codes(protocol: Protocol) -> dict[str, int]:
    """What the numbers in ``broken_by`` mean."""
    plain = {"survived": SURVIVED, "wrong when clean": CLEAN_WRONG, "broken at a smaller eps": CARRIED}
    return plain | {step.name: i + 2 for i, step in enumerate(protocol.steps)}


def summary(
    protocol: Protocol,
    grid: Sequence[str],
    clean: Float[np.ndarray, " Q"],
    labels: Int[np.ndarray, " Q"],
    arrays: Mapping[str, np.ndarray],
    spent: Sequence[Sequence[Mapping[str, Any]]],
    halving: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that a run says of its queries' outcomes: what goes into ``extras.strict``.

    Args:
        clean: R@1 of each query before any attack, percent, NaN without positives.
        arrays: per eps ``strict@<eps>/`` value, broken_by and the :data:`PROXIES`, (Q,) each; under a protocol with
            rounds also round, with a threshold :data:`SMALLEST`.
        spent: by eps and step the ``gradients``, ``values`` (passes over all queries) and ``seconds`` it cost.
        halving: the same of the search for the smallest eps.
    """
    count = max(1, int((~np.isnan(clean)).sum()))
    group, right = groups(len(clean), protocol.together), clean == 100.0
    rows: list[dict[str, Any]] = []
    for eps, costs in zip(grid, spent, strict=True):
        by = arrays[f"strict@{eps}/broken_by"]
        alive, done = ~np.isin(by, (CLEAN_WRONG, CARRIED)), []
        carried = int((by == CARRIED).sum())
        row: dict[str, Any] = {"eps": eps, "recall_at_1": mean(arrays[f"strict@{eps}/value"])}
        row |= {proxy: mean(arrays[f"strict@{eps}/{proxy}"]) for proxy in PROXIES}
        for index, (step, cost) in enumerate(zip(protocol.steps, costs, strict=True)):
            here = by == index + 2
            entry: dict[str, Any] = {"step": step.name, "attacked": int(alive.sum()), "broken": int(here.sum())}
            entry |= {name: cost[name] for name in ("gradients", "values", "seconds")}
            entry["points"] = 100.0 * entry["broken"] / count
            if step.rounds > 1:
                first = np.where(here, arrays[f"strict@{eps}/round"], 0)
                ran = rounds_run(step, group, right, alive, first)
                total = fallen(step.rounds, group, first)
                entry["rounds"] = np.diff(total.sum(0))[: int(ran.max(initial=0))].tolist()
                most = int((by == SURVIVED).sum())
                estimate, bound = missed(last_half(total, ran))
                row["missed"] = 100.0 * min(estimate, most) / count
                row["missed_at_most"] = 100.0 * min(bound, most) / count
            done.append(entry)
            alive &= ~here
        rows.append({**row, "carried": 100.0 * carried / count, "steps": done})
    curve = [mean(clean), *(row["recall_at_1"] for row in rows)]
    radii = [0.0, *(protocol.threat_at(eps).radius for eps in grid)]
    passes = {
        name: sum(s[name] for row in rows for s in row["steps"]) + (halving or {}).get(name, 0)
        for name in ("gradients", "values")
    }
    return {
        "norm": protocol.threat_at(grid[0]).norm,
        "clean": curve[0],
        "curve": rows,
        **(
            {"area": area(radii, curve)}
            if protocol.threshold is None
            else {"smallest_eps": halfway(protocol, grid, arrays[SMALLEST], labels, halving or {})}
        ),
        **{f"{name}_per_query": n / max(1, int(right.sum())) / len(grid) for name, n in passes.items()},
        "codes": codes(protocol),
    }


def area(radii: Sequence[float], curve: Sequence[float]) -> float:
    """Mean height of the curve from eps 0 to the last, by trapezoids, percent."""
    r, c = np.asarray(radii), np.asarray(curve)
    return float((np.diff(r) * (c[1:] + c[:-1]) / 2).sum() / r[-1])

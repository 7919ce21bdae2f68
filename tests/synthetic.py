"""Evaluations made of numbers drawn here, for tests that need results and not a model."""

import numpy as np

from dmlbench.intervals import VERSION
from dmlbench.protocol import score_intervals
from dmlbench.protocols import load_protocol
from dmlbench.results import DatasetInfo, Environment, Evaluation, Measurement, ModelInfo, ProtocolInfo

ENDS = {
    "CA+": (0, 50),
    "CA-": (100, 0),
    "QA+": (0, 50),
    "QA-": (100, 0),
    "TMA": (1, 0),
    "ES:D": (2, 0),
    "ES:R": (0, 100),
    "LTM": (0, 100),
    "GTM": (0, 100),
    "GTT": (0, 100),
}
BINARY = ("ES:R", "LTM", "GTM", "GTT")


def rescale(component, value):
    """Raw to score, written out a second time."""
    worst, best = ENDS[component]
    return 100.0 * (value - worst) / (best - worst)


def outcomes(seed=0, level=40.0, queries=400, classes=5):
    """Per-query arrays of an ERS run whose parts score about ``level``."""
    rng = np.random.default_rng(seed)
    label = np.arange(queries) % classes + 5
    lean = rng.normal(0, 2, classes)[label - 5]
    arrays = {"query": np.arange(queries), "label": label}
    clean = rng.random(queries)
    for k, share in ((1, 0.95), (2, 0.97), (4, 0.98), (8, 0.99)):
        arrays[f"benign/recall_at_{k}"] = (clean < share).astype(np.float32) * 100
    arrays["benign/map"] = rng.uniform(50, 90, queries).astype(np.float32)
    arrays["benign/map_at_r"] = rng.uniform(40, 80, queries).astype(np.float32)
    for component, (worst, best) in ENDS.items():
        aim = np.clip(level + lean + (0 if component in BINARY else rng.normal(0, 8, queries)), 0, 100)
        if component in BINARY:
            value = (rng.random(queries) * 100 < aim) * 100.0
            value = np.minimum(value, arrays["benign/recall_at_1"]) if component != "GTT" else value
        else:
            value = worst + aim / 100 * (best - worst)
        arrays[f"{component}/value"] = value.astype(np.float32)
        arrays[f"{component}/norm"] = np.full(queries, 40 / 255, dtype=np.float32)
    return arrays


def evaluation(
    arrays=None,
    *,
    model="digits-smallcnn-triplet-none",
    protocol="ers-digits",
    protocol_sha256=None,
    dataset="digits",
    dataset_sha256="b" * 64,
    nmi=70.0,
    partial=(),
    warnings=(),
    date="2026-01-02T03:04:05+00:00",
    seed=0,
    extras=None,
    arrays_kept=True,
    **drawn,
):
    """The record that ``evaluate`` would make of ``arrays`` (or of freshly drawn ones)."""
    arrays = outcomes(seed=seed, **drawn) if arrays is None else arrays
    parts = [c for c in ENDS if f"{c}/value" in arrays]
    table = np.stack([rescale(c, arrays[f"{c}/value"].astype(np.float64)) for c in parts], axis=1)
    rules = load_protocol(protocol)
    intervals = score_intervals([c for c in rules.components if c.name in parts], arrays)
    measurements = tuple(
        Measurement(
            component=c,
            attack=c.split(":")[0],
            optimizer="pgd",
            readout="recall_at_1",
            better="higher" if ENDS[c][1] > ENDS[c][0] else "lower",
            value=float(np.nanmean(arrays[f"{c}/value"].astype(np.float64))),
            score=float(np.nanmean(table[:, i])),
            interval=intervals.columns[i],
            n=len(table),
        )
        for i, c in enumerate(parts)
    )
    full = len(parts) == len(ENDS)
    rules = load_protocol(protocol)
    benign = {k.split("/")[1]: float(np.nanmean(v.astype(np.float64))) for k, v in arrays.items() if "benign/" in k}
    return Evaluation(
        model=ModelInfo(id=model, weights_sha256="c" * 64, arch="smallcnn", loss="triplet", space="N", embed_dim=64),
        dataset=DatasetInfo(
            name=dataset,
            split="test",
            sha256=dataset_sha256,
            n_queries=len(table),
            n_queries_full=len(table),
            n_gallery=len(table),
            n_classes=len(np.unique(arrays["label"])),
        ),
        protocol=ProtocolInfo(name=rules.name, version=rules.version, sha256=protocol_sha256 or rules.sha256, seed=0),
        environment=Environment(
            dmlbench="0.1.0", torch="2.4", numpy="2.0", python="3.11", device="cpu", device_name="test"
        ),
        partial=tuple(partial),
        benign={**benign, "nmi": nmi},
        measurements=measurements,
        ers=float(np.mean([m.score for m in measurements])) if full else None,
        ers_interval=intervals.mean if full else None,
        interval_version=VERSION,
        extras=extras or {},
        warnings=tuple(warnings),
        date=date,
        seconds=1.0,
    ).with_arrays(arrays if arrays_kept else {})

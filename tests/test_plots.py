"""Figures for a paper: the numbers that each kind draws, and that every kind becomes a file, always the same one."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import dmlbench
from dmlbench.board.plots import KINDS, classes, draw, eps, matrix, parts, roc, scatter, tsne
from dmlbench.errors import DataError, NotComparable, UsageError
from dmlbench.intervals import PERCENT, class_intervals
from dmlbench.protocols import load_protocol
from dmlbench.results import Conditions, Evaluation, load, save

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("triplet-none", "triplet-act")


def bundled(name: str, protocol: str) -> tuple[str, Evaluation]:
    return name, load(ROOT / "leaderboard" / "submissions" / f"digits-smallcnn-{name}-{protocol}" / "run")


@pytest.fixture(scope="module")
def runs() -> list[tuple[str, Evaluation]]:
    return [bundled(name, "ers-digits") for name in MODELS]


def changed(e: Evaluation, **update: object) -> Evaluation:
    return e.model_copy(update=update).with_arrays(e.arrays, e.sample)


def named(e: Evaluation, model: str) -> Evaluation:
    return changed(e, model=e.model.model_copy(update={"id": model}))


def test_eps_of_strict_and_clustering() -> None:
    name, e = bundled("triplet-act", "strict")
    found = eps([(name, e)]).series[0]
    curve = e.extras["strict"]["curve"]
    assert found.x.tolist() == pytest.approx([0.0, *(int(row["eps"].split("/")[0]) / 255 for row in curve)])
    assert found.y.tolist() == [e.benign["recall_at_1"], *(row["recall_at_1"] for row in curve)]
    for row, low in zip(curve, found.low[1:], strict=True):  # as intervals are made today, whenever the run was
        values = e.arrays[f"strict@{row['eps']}/value"][:, None]
        assert low == pytest.approx(class_intervals(values, e.arrays["label"], [PERCENT]).columns[0][0])
    name, e = bundled("triplet-act", "clustering")
    found = eps([(name, e)]).series[0]
    lowest = [
        min(row["nmi"] for row in e.extras["clustering"]["attacks"] if row["labelled"] and row["eps"] == at)
        for at in ("10/255", "40/255")
    ]
    assert found.y.tolist() == [e.extras["clustering"]["clean"]["nmi"], *lowest]


def test_eps_of_several_runs(runs: list[tuple[str, Evaluation]]) -> None:
    name, e = runs[0]
    with pytest.raises(UsageError, match="no curve over eps"):
        eps(runs)
    half = changed(e, ers=60.0).model_copy()
    half._arrays = {key: a / 2 if key.endswith("/norm") else a for key, a in e.arrays.items()}
    (found,) = eps([(name, e), ("half", half)]).series
    assert found.y.tolist() == [60.0, e.ers] and (255 * found.x).tolist() == pytest.approx([20, 40], abs=0.1)


def test_parts_and_scatter(runs: list[tuple[str, Evaluation]]) -> None:
    found = parts(runs)
    assert found.ticks == tuple(m.component for m in runs[0][1].measurements)
    for (_, e), s in zip(runs, found.series, strict=True):
        assert s.y.tolist() == [m.score for m in e.measurements]
        assert s.high.tolist() == pytest.approx([m.interval[1] for m in e.measurements])
    points = scatter(runs)
    assert points.y_title == "ERS"
    assert [(s.x[0], s.y[0]) for s in points.series] == [(e.benign["recall_at_1"], e.ers) for _, e in runs]
    assert scatter(runs, "ES:R").series[0].y[0] == runs[0][1].part("ES:R").score
    with pytest.raises(UsageError, match="did you mean"):
        scatter(runs, "ES:RR")
    with pytest.raises(NotComparable, match="protocol"):
        parts([runs[0], bundled("triplet-act", "strict")])


def test_classes(runs: list[tuple[str, Evaluation]]) -> None:
    found = classes(runs)
    components = load_protocol("ers-digits").components
    for (_, e), s in zip(runs, found.series, strict=True):
        for tick, shown in zip(found.ticks, s.y, strict=True):
            scores = []
            for c in components:
                own = [
                    c.rescale(float(v))
                    for v, label in zip(e.arrays[f"{c.name}/value"], e.arrays["label"], strict=True)
                    if label == int(tick)
                ]
                scores.append(sum(own) / len(own))
            assert shown == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert found.series[0].y.tolist() == sorted(found.series[0].y)
    one = classes(runs, part="ES:R").series[0]
    label, value = runs[0][1].arrays["label"], runs[0][1].arrays["ES:R/value"]
    assert sorted(one.y) == pytest.approx(sorted(value[label == c].mean() for c in np.unique(label)))


def test_matrix(runs: list[tuple[str, Evaluation]]) -> None:
    a, b = (named(e, name) for name, e in zip("AB", (runs[0][1], runs[1][1]), strict=True))
    moved = [
        changed(a, partial=(f"--surrogate {s}",), conditions=Conditions(surrogate=s), ers=v)
        for s, v in (("B", 70.0), ("outside", 80.0))
    ]
    found = matrix([("a", a), ("b", b), ("ab", moved[0]), ("ao", moved[1])])
    assert [s.name for s in found.series] == ["A", "B"] and found.ticks == ("A", "B", "outside")
    assert np.array_equal(found.table, [[a.ers, 70.0, 80.0], [np.nan, b.ers, np.nan]], equal_nan=True)
    with pytest.raises(UsageError, match="two runs of A"):
        matrix([("a", a), ("again", a)])


@pytest.fixture(scope="module")
def pairs_run() -> tuple[str, Evaluation]:
    """A run of verification, at a single small eps."""
    e = dmlbench.evaluate(
        "digits-smallcnn-triplet-none", protocol="verification", eps=("1/255",), limit=24, device="cpu"
    )
    return "pairs", e


def test_roc_is_the_field_s(runs: list[tuple[str, Evaluation]], pairs_run: tuple[str, Evaluation]) -> None:
    """Its points lie on scikit-learn's curve, and only what decides about pairs has one."""
    from sklearn.metrics import roc_curve

    e = pairs_run[1]
    (found,) = roc([pairs_run]).series
    sides = [e.arrays[f"{side}/distance"] for side in ("dodging", "impersonation")]
    genuine, impostor = (d[~np.isnan(d)] for d in sides)
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    far, tar, _ = roc_curve(truth, -np.concatenate([genuine, impostor]), drop_intermediate=False)
    on = set(zip((100 * far).round(4), (100 * tar).round(4), strict=True))
    assert set(zip(found.x.round(4), found.y.round(4), strict=True)) <= on
    with pytest.raises(UsageError, match="pairs of both sorts"):
        roc(runs[:1])
    other = changed(e, conditions=Conditions(pairs="0" * 64))
    with pytest.raises(NotComparable, match="--pairs"):
        roc([pairs_run, ("other", other)])


def test_tsne_needs_the_sample_and_the_same_model(runs: list[tuple[str, Evaluation]], data: Path) -> None:
    found = tsne(runs[:1], part="ES:R")
    clean, attacked = found.series
    rows = runs[0][1].sample["rows"]
    assert len(clean.x) == len(attacked.x) == len(rows)
    assert clean.groups.tolist() == dmlbench.load_dataset("digits").labels[rows].tolist()
    assert np.array_equal(tsne(runs[:1], part="ES:R").series[1].y, attacked.y)
    bare = runs[0][1].model_copy()
    bare._sample = {}
    with pytest.raises(DataError, match="no adversarial sample"):
        tsne([("bare", bare)])
    other = changed(runs[0][1], model=runs[0][1].model.model_copy(update={"weights_sha256": "0" * 64}))
    with pytest.raises(DataError, match="other weights"):
        tsne([("other", other)])
    with pytest.raises(UsageError, match="no part 'ES:X'"):
        tsne(runs[:1], part="ES:X")


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_becomes_a_file(
    kind: str, runs: list[tuple[str, Evaluation]], pairs_run: tuple[str, Evaluation], data: Path
) -> None:
    hostile = "_$\\frac{x}$ <script>&\n中\x01\x1b[31m"
    given = [(runs[0][0], named(runs[0][1], hostile)), runs[1]]
    if kind == "eps":
        given = [bundled(name, "strict") for name in MODELS]
    if kind == "tsne":
        given = runs[:1]
    if kind == "roc":
        given = [pairs_run]
    figure = KINDS[kind](given)
    for suffix, begins in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        content = draw(figure, suffix)
        assert content.startswith(begins)
        if suffix == "svg":
            assert b"<script" not in content and draw(figure, suffix) == content
            ET.fromstring(content)
    with pytest.raises(UsageError, match="pdf, svg, png"):
        draw(figure, "gif")


def test_command(typed, runs: list[tuple[str, Evaluation]], pairs_run: tuple[str, Evaluation], tmp_path: Path) -> None:
    pairs = save(pairs_run[1], tmp_path / "pairs")
    assert typed("plot", pairs, "--kind", "roc", "--out", "f/roc.svg").out == "f/roc.svg\n"
    folders = [save(e, tmp_path / name) for name, e in runs]
    assert typed("plot", *folders, "--kind", "parts", "--out", "f/parts.pdf").out == "f/parts.pdf\n"
    told = typed("plot", *folders, "--kind", "parts", "--out", "f/parts.svg", "--json").json
    assert told["file"] == "f/parts.svg" and told["bytes"] == (tmp_path / "f" / "parts.svg").stat().st_size
    assert (tmp_path / "f" / "parts.pdf").read_bytes() == draw(parts(runs), "pdf")
    assert "did you mean 'parts'" in typed("plot", *folders, "--kind", "part", "--out", "x.pdf", code=2).err
    assert "pdf, svg, png" in typed("plot", *folders, "--kind", "parts", "--out", "x.gif", code=2).err
    assert "pairs of both sorts" in typed("plot", *folders, "--kind", "roc", "--out", "x.pdf", code=2).err
    assert "no curve over eps" in typed("plot", *folders, "--kind", "eps", "--out", "x.pdf", code=2).err
    assert not (tmp_path / "x.pdf").exists()

"""Rounds of restarts, what they miss, and the smallest eps: each against a plain loop; the same at any batch size, shard and resume."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import DEFAULT, shortened
from rich.console import Console
from scipy import integrate, stats

import dmlbench
from dmlbench.board import paper
from dmlbench.board.compare.paired import pair
from dmlbench.board.compare.verdict import compare, compare_rows
from dmlbench.board.report.page import _headline
from dmlbench.board.row import from_evaluation
from dmlbench.board.show import as_latex, as_markdown, as_table
from dmlbench.board.site.overview import cell
from dmlbench.board.table import from_csv, rank, to_csv
from dmlbench.cli.results import print_kind
from dmlbench.datasets import RetrievalDataset, TensorImages
from dmlbench.embedding import Embedder
from dmlbench.errors import ShardDone, UsageError
from dmlbench.evaluate import evaluate
from dmlbench.intervals import cluster_median, cluster_medians
from dmlbench.kinds.smallest import bracket, halvings, ladder
from dmlbench.kinds.strict import search as strict
from dmlbench.kinds.strict.record import STRICT
from dmlbench.kinds.strict.rounds import groups, missed, rounds_run
from dmlbench.kinds.strict.search import CARRIED, CLEAN_WRONG, SMALLEST, attempt
from dmlbench.objectives import margin_to_entry
from dmlbench.optimizers import OPTIMIZERS
from dmlbench.protocol import Component, Step, Threshold
from dmlbench.protocols import FOLDER, load_protocol
from dmlbench.results import load
from dmlbench.rng import Rng
from dmlbench.run.subject import measured_queries, prepare, query_order
from dmlbench.run.units import Shard, Units, Work
from dmlbench.threat import Threat, length, written


@pytest.fixture(scope="module")
def model():
    return dmlbench.load_model(DEFAULT)


@pytest.fixture(scope="module")
def whole(model):
    return evaluate(model, "digits", shortened(), limit=64)


@pytest.mark.parametrize(("norm", "start"), [("linf", "corner"), ("linf", "random"), ("l2", "corner"), ("l2", "clean")])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_run_is_the_plain_one(norm: str, start: str, steps: int) -> None:
    """Two pictures of three channels, pixel by pixel."""
    rng = Rng(3, torch.arange(2))
    clean, goal = rng.uniform(3, 2, 3), rng.normal(3, 2, 3)
    weights = rng.normal(3, 2, 3)

    def loss(x):
        return (weights * (x - goal)).flatten(1).square().sum(1).sqrt()

    threat = Threat(norm=norm, eps=0.2, steps=steps, start=start)
    found = OPTIMIZERS["cosine"](loss, clean, threat, Rng(5, torch.arange(2)))
    for b in range(2):
        c, w, g = (t[b].double().flatten().tolist() for t in (clean, weights, goal))
        n = len(c)
        begun = threat.begin(clean, Rng(5, torch.arange(2)))
        if start == "corner":
            far = [abs(p - q) for p, q in zip(begun[b].flatten().tolist(), c, strict=True)]
            if norm == "linf":
                ends = [min(max(q + s * 0.2, 0), 1) for q in c for s in (-1, 1)]
                assert all(min(abs(p - e) for e in ends) < 1e-6 for p in begun[b].flatten().tolist())
            assert max(far) > 0.1
        x, momentum = begun[b].double().flatten().tolist(), [0.0] * n
        for i in range(steps):
            value = math.sqrt(sum((w[k] * (x[k] - g[k])) ** 2 for k in range(n)))
            gradient = [w[k] ** 2 * (x[k] - g[k]) / value for k in range(n)]
            size = sum(abs(v) for v in gradient) / n
            momentum = [0.9 * m + v / size for m, v in zip(momentum, gradient, strict=True)]
            stride = 0.2 * (1 + math.cos(math.pi * i / steps)) / 2
            if norm == "linf":
                x = [x[k] - stride * math.copysign(1, momentum[k]) for k in range(n)]
                x = [min(max(x[k], c[k] - 0.2), c[k] + 0.2) for k in range(n)]
            else:
                whole_length = math.sqrt(sum(m * m for m in momentum))
                x = [x[k] - stride * momentum[k] / whole_length for k in range(n)]
                out = math.sqrt(sum((x[k] - c[k]) ** 2 for k in range(n)))
                x = [c[k] + (x[k] - c[k]) * min(1.0, 0.2 / out) for k in range(n)]
            x = [min(max(v, 0.0), 1.0) for v in x]
        np.testing.assert_allclose(found[b].flatten().numpy(), x, atol=2e-5)


def test_settled_images_leave_and_the_others_go_on(model) -> None:
    subject, p = prepare(model, dmlbench.load_dataset("digits"), limit=48), shortened(steps=24)
    step, before = p.steps[1].at(0)
    right = np.flatnonzero(strict.begin(subject).alive)
    threat = p.threat_at("20/255", step.threat)
    together = attempt(subject, step, threat, right, 0, before)
    few = right[::5]
    alone = attempt(subject, step, threat, few, 0, before)
    assert 0 < together.broken.sum() < len(right)
    np.testing.assert_array_equal(alone.broken, together.broken[::5])
    assert together.gradients < 24 * len(right)


def test_each_turn_takes_the_next_entry(model) -> None:
    subject, p = prepare(model, dmlbench.load_dataset("digits"), limit=16), shortened(steps=2)
    right = np.flatnonzero(strict.begin(subject).alive)
    scene = subject.scene[torch.from_numpy(right)]
    asked = []

    def spy(e, scene_, negative, positive):
        asked.append(negative.tolist())
        return gap(e, scene_, negative, positive)

    gap = strict.gap
    step = p.steps[1].model_copy(update={"attack": "ME", "turns": (), "aims": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict, "gap", spy)
        for r in range(4):
            attempt(subject, step, p.threat_at("1/255", step.threat), right, 0, r)
    of_round = [asked[i] for i in range(1, len(asked), len(asked) // 4)]  # the margin's, then the target's
    d = scene.distances(scene.clean).masked_fill(~scene.other, torch.inf)
    nearest = d.argsort(1)[:, :3]
    for r, rows in enumerate(of_round):
        assert rows == nearest[:, r % 3].tolist()
    aimed = scene.aimed(nearest[:, :1])
    plain = [float(d[i, nearest[i, 0]] - scene.ranked(scene.clean)[i][scene.same[i]].min()) for i in range(len(right))]
    np.testing.assert_allclose(margin_to_entry(scene.clean, aimed).numpy(), plain, atol=1e-5)


def plain_end(step: Step, broken: list[int], right: int, alive: int) -> int:
    """How many rounds a group is given: the rule as the page says it."""
    for n in range(step.rounds + 1):
        late = sum(broken[n // 2 : n])
        if sum(broken[:n]) == alive or n == step.rounds:
            return n
        spent = sum(alive - sum(broken[:r]) for r in range(n))
        if spent >= step.fewest * right and late <= step.until / 100 * right:
            return n
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), until=st.sampled_from([0.0, 2.0, 10.0]), fewest=st.integers(1, 6))
def test_the_end_of_rounds_is_the_plain_one(seed: int, until: float, fewest: int) -> None:
    draw = np.random.default_rng(seed)
    step = Step(name="R", attack="WM", optimizer="cosine", rounds=12, fewest=fewest, until=until)
    count = int(draw.integers(1, 70))
    group = groups(count, 20)
    for g in range(group.max() + 1):
        assert sorted(np.flatnonzero(group == g)) == sorted(query_order(count)[20 * g : 20 * g + 20])
    right = draw.random(count) < 0.9
    alive = right & (draw.random(count) < 0.8)
    first = np.where(alive, np.minimum(draw.geometric(draw.beta(0.3, 2, count).clip(1e-3)), 99), 0)
    first[first > 12] = 0
    for g, n in enumerate(rounds_run(step, group, right, alive, first)):
        here = group == g
        broken = [int((first[here] == r).sum()) for r in range(1, 13)]
        assert n == plain_end(step, broken, int(right[here].sum()), int(alive[here].sum()))
        for known in range(int(n)):  # what is known half way says that there are to be more
            partly = np.where(first <= known, first, 0)
            assert rounds_run(step, group, right, alive, partly)[g] > known


def test_what_is_missed_is_the_mixture_that_is_named() -> None:
    """Numerically: how many fall in rounds n + 1 to 10 n where the last half broke 7."""
    n = 400
    p = np.logspace(-8, 0, 400_001)

    def fell(a: int, b: int, density: np.ndarray) -> float:
        return float(integrate.trapezoid(((1 - p) ** a - (1 - p) ** b) * density, p))

    for density, per_late in ((np.ones_like(p), missed(7)[0] / 7), (1 / p, math.log2(10))):
        assert fell(n, 10 * n, density) / fell(n // 2, n, density) == pytest.approx(per_late, rel=0.03)
    for late in (0, 1, 7, 30):
        limit = missed(late)[1] / math.log2(10)
        assert stats.poisson.cdf(late, limit) == pytest.approx(0.05)


def test_rounds_break_more_and_are_counted(whole) -> None:
    right = whole.arrays["benign/recall_at_1"] == 100
    rule = shortened()
    for row in whole.extras["strict"]["curve"]:
        by, first = (whole.arrays[f"strict@{row['eps']}/{key}"] for key in ("broken_by", "round"))
        step = row["steps"][1]
        assert ((first > 0) == (by == 3)).all() and first.max() <= len(step["rounds"]) <= 6
        assert step["rounds"] == [int((first == r + 1).sum()) for r in range(len(step["rounds"]))]
        alive = (by == -1) | (by >= 3)
        ran = rounds_run(rule.steps[1], groups(64, 20), right, alive, first)
        assert len(step["rounds"]) == ran.max()
        late = sum(int(((first > ran[g] // 2) & (groups(64, 20) == g)).sum()) for g in range(4))
        left = int((by == -1).sum())
        assert row["missed"] == pytest.approx(100 * min(missed(late)[0], left) / 64)
        assert row["missed_at_most"] == pytest.approx(100 * min(missed(late)[1], left) / 64)
    assert sum(sum(row["steps"][1]["rounds"]) for row in whole.extras["strict"]["curve"]) > 0


def test_the_ladder_holds_the_grid_and_tells_where_a_query_stands() -> None:
    rule = Threshold(attack="WM", optimizer="cosine", parts=4, octaves=2)
    steps, places = ladder([2.0, 4.0, 10.0], rule)
    wanted = [0.5 * 2 ** (k / 4) for k in range(8)] + [2 * 2 ** (k / 4) for k in range(4)]
    wanted += [4 * 2.5 ** (k / 4) for k in range(4)] + [10.0]
    np.testing.assert_allclose(steps, wanted)
    assert steps[places].tolist() == [2.0, 4.0, 10.0] and halvings(rule) == 4
    broken = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    low, high = bracket(broken, places, len(steps))
    assert low.tolist() == [-1, 8, 12, 16] and high.tolist() == [8, 12, 16, 17]


def test_the_smallest_eps_agrees_with_the_grid_and_with_a_search_there(model, whole) -> None:
    value, p = whole.arrays[SMALLEST], shortened()
    right = whole.arrays["benign/recall_at_1"] == 100
    np.testing.assert_array_equal(np.isnan(value), ~right)
    radii = [p.threat_at(eps).radius for eps in p.grid["8"]]
    by = np.stack([whole.arrays[f"strict@{eps}/broken_by"] for eps in p.grid["8"]])
    for q in np.flatnonzero(right):
        hit = np.flatnonzero(by[:, q] >= CARRIED)
        if not len(hit):
            assert value[q] == np.inf
            continue
        assert value[q] <= radii[hit[0]] * (1 + 1e-9) and (hit[0] == 0 or value[q] > radii[hit[0] - 1])
    subject = prepare(model, dmlbench.load_dataset("digits"), limit=64)
    step = Step(name="smallest eps", attack="WM", optimizer="cosine", threat=p.threshold.threat)
    inside = right & (value < radii[-1]) & ~np.isin(np.round(value, 9), np.round(radii, 9))
    assert inside.sum() > 5
    for eps in np.unique(value[inside]):
        at = np.flatnonzero(inside & (value == eps))
        assert attempt(subject, step, p.threat_at("0", step.threat).but(eps=float(eps)), at, 0).broken.all()


def test_the_headline_is_the_median_over_right_queries(whole) -> None:
    found, value = whole.extras["strict"]["smallest_eps"], whole.arrays[SMALLEST]
    ranked = sorted(value[~np.isnan(value)])
    median = ranked[(len(ranked) - 1) // 2]
    assert found["median"] == pytest.approx(median) and found["largest"] == pytest.approx(40 / 255)
    low, high = found["interval"]
    assert low < found["median"] and (high is None or found["median"] <= high)
    assert found["gradients"] > 0


def test_a_median_by_class_is_the_plain_one() -> None:
    draw = np.random.default_rng(0)
    values, label = draw.integers(0, 9, 60).astype(float), draw.integers(0, 6, 60)
    values[:5], values[5] = np.nan, np.inf
    found = cluster_medians(values[:, None], label, seed=4, draws=30)[:, 0]
    again = np.random.default_rng(4).multinomial(6, np.full(6, 1 / 6), size=30)
    for weights, median in zip([np.ones(6, dtype=int), *again], found, strict=True):
        drawn = sorted(v for v, c in zip(values, label, strict=True) for _ in range(weights[c]) if not np.isnan(v))
        assert median == drawn[(len(drawn) - 1) // 2]
    middle, ends = cluster_median(values, label)
    assert middle == found[0] and ends is not None and ends[0] <= middle <= ends[1]
    assert cluster_median(values, np.zeros(60, dtype=int))[1] is None
    assert cluster_median(np.full(3, np.nan), np.arange(3)) == (None, None)


def same(a, b) -> None:
    for name, values in a.arrays.items():
        if name.startswith(("strict@", "smallest")):
            np.testing.assert_array_equal(values, b.arrays[name], err_msg=name)
    strip = ("seconds",)

    def bare(x):
        if isinstance(x, dict):
            return {k: bare(v) for k, v in x.items() if k not in strip}
        return [bare(v) for v in x] if isinstance(x, list) else x

    assert bare(a.extras["strict"]) == bare(b.extras["strict"])


def test_shards_and_a_killed_run_come_to_the_same_bytes(model, tmp_path) -> None:
    p = shortened(steps=4, queries=4, rounds=4)
    how = {"limit": 40, "batch_size": 10}  # blocks of 20, which are one group
    whole = evaluate(model, "digits", p, **how)
    units = Units(tmp_path / "units")
    for i in (2, 1):
        with pytest.raises(ShardDone):
            evaluate(model, "digits", p, work=Work(units, shard=Shard(i, 2)), resume=True, **how)
    same(whole, evaluate(model, "digits", p, work=Work(units, gather=True), resume=True, **how))
    for path in sorted(units.folder.glob("*.npz"))[::3]:
        path.unlink()
    same(whole, evaluate(model, "digits", p, work=Work(units), resume=True, **how))


def test_rounds_end_alike_at_any_batch_size_and_limit(model, whole) -> None:
    """Two of the three groups of queries that go on together."""
    other = evaluate(model, "digits", shortened(), limit=40, batch_size=7)
    at = np.searchsorted(whole.arrays["query"], other.arrays["query"])
    for eps in ("5/255", "10/255", "20/255", "40/255"):
        a, b = other.arrays[f"strict@{eps}/broken_by"], whole.arrays[f"strict@{eps}/broken_by"][at]
        assert (a != b).mean() <= 0.05, "but for float rounding in long searches"
    a, b = other.arrays[SMALLEST], whole.arrays[SMALLEST][at]
    assert (a != b)[~np.isnan(b)].mean() < 0.1


def test_so_many_queries_are_measured(model) -> None:
    p = shortened("strict-fast", steps=4).model_copy(update={"queries": 20})
    found = evaluate(model, "digits", p)
    data = dmlbench.load_dataset("digits")
    assert found.partial == () and found.dataset.n_queries == 20 and found.dataset.n_queries_full == len(data.query)
    np.testing.assert_array_equal(found.arrays["query"], data.query[measured_queries(len(data.query), 20)])
    np.testing.assert_array_equal(np.sort(query_order(len(data.query))[:20]), measured_queries(len(data.query), 20))
    assert evaluate(model, "digits", p, limit=8).partial == ("--limit 8",)
    assert evaluate(model, "digits", p, limit=300).partial == ()
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate(model, "digits", p, limit=0)


@pytest.mark.parametrize("text", ["0.25/255", "1/1020", "0.5/510"])
def test_a_quarter_of_a_level_is_a_length(text: str) -> None:
    assert length(text) == pytest.approx(0.25 / 255)
    assert Threat(eps=text).radius == length(text)
    assert written(length(text), "linf") == "0.25/255"
    for wrong in ("0.25/", "/255", "1/0", "1/2/3", "a/255", "-1/255"):
        with pytest.raises(UsageError, match="eps"):
            length(wrong)


def test_a_small_colour_picture_gets_the_grid_of_colour() -> None:
    images = Rng(0, torch.arange(12)).uniform(3, 32, 32)
    data = RetrievalDataset("colours", "test", TensorImages(images), np.arange(12) // 4)
    torch.manual_seed(0)
    net = Embedder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4)), (3, 32, 32))
    found = evaluate(net, data, shortened("strict-fast", steps=2))
    curve = found.extras["strict"]["curve"]
    assert [row["eps"] for row in curve] == ["0.25/255", "0.5/255", "1/255", "2/255", "4/255", "8/255"]
    assert found.arrays["strict@0.25/255/norm"].max() <= 0.25 / 255 + 1e-5


def test_nothing_left_ends_early(model) -> None:
    p = shortened(steps=8).model_copy(update={"grid": {"8": ("20/255", "200/255", "220/255")}})
    found = evaluate(model, "digits", p, limit=24)
    first, _, last = found.extras["strict"]["curve"]
    assert last["recall_at_1"] == 0 and all(s["gradients"] == 0 for s in last["steps"])
    assert first["recall_at_1"] > 0 and last["carried"] > 0 and last["missed_at_most"] == 0
    assert (found.arrays["strict@220/255/broken_by"] != CLEAN_WRONG).any()


def test_strict_from_the_command_line(typed, tmp_path) -> None:
    text = (FOLDER / "strict.toml").read_text(encoding="utf-8")
    for long, short in {
        "steps = 100": "steps = 4", "steps = 50": "steps = 4", "queries = 1000}": "queries = 4}", "rounds = 120": "rounds = 9", "fewest = 12": "fewest = 8",
        "audit = 256": "clustering_seeds = [0]", "together = 250": "together = 10",
    }.items():  # fmt: skip
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "short.toml").write_text(text, encoding="utf-8")
    done = typed("evaluate", "--model", DEFAULT, "--protocol", "short.toml", "--limit", "20", "--out", "run")
    for words in ("missed", "Rounds by eps", "smallest eps that breaks a query, median", "/255"):
        assert words in done.out
    row = load(Path("run")).extras["strict"]["curve"][0]
    assert row["eps"] == "5/255" and len(row["steps"][1]["rounds"]) >= 8


@pytest.mark.parametrize("clean", [0.0, None, float("nan")])
def test_without_a_right_query_there_is_no_headline(whole, clean) -> None:
    extras = {**whole.extras["strict"], "clean": clean}
    extras["smallest_eps"] = {**extras["smallest_eps"], "median": None, "interval": None}
    nobody = whole.model_copy(update={"extras": {**whole.extras, "strict": extras}})
    assert from_evaluation(nobody.with_arrays(whole.arrays, whole.sample)).headline is None
    out = Console(file=io.StringIO(), width=200)
    print_kind(STRICT.tables(extras), out)
    assert "median –" in out.file.getvalue()


def say_more(words: str, row, e, other, folder: Path) -> None:
    """Whatever shows the median of ``e``, of which this is the row, shows that it is beyond the grid; ``other``'s is not."""
    columns = ["smallest_eps"]
    for form in (as_table, as_markdown):
        assert words in form([row], columns) and "> " not in form([from_evaluation(other)], columns)
    assert "\\textgreater{} 0.157" in as_latex([row], columns)
    assert cell(row, "smallest_eps").text == "> 40/255"
    packaged = {"protocol": e.protocol.model_copy(update={"sha256": load_protocol("strict").sha256})}
    e, other = (one.model_copy(update=packaged).with_arrays(other.arrays, other.sample) for one in (e, other))
    runs = [("far", e), ("near", other)]
    both = paper.table(runs, columns)
    assert [c.text("smallest_eps").startswith("> ") for _, (c,) in both.rows] == [True, False]
    assert "\\textgreater{} 0.157" in paper.as_latex(both) and words in paper.as_markdown(both)
    assert paper.as_csv(both).splitlines()[1].split(",")[1] == repr(40 / 255)
    assert _headline(e)[0] == "> 40/255" and not _headline(other)[0].startswith(">")
    for compared in (compare(e, other), compare_rows(from_evaluation(e), from_evaluation(other))):
        assert [n for n in compared.notes if "beyond" in n] == [
            "smallest_eps of the base is beyond the largest eps of the grid, and counts as that"
        ]
    file = folder / "board.csv"
    file.write_bytes(to_csv([row, from_evaluation(other).model_copy(update={"model": "another"})]))
    assert [r.smallest_eps_beyond for r in from_csv(file)] == [1, None]
    assert b"smallest_eps_beyond" not in to_csv([from_evaluation(other)])


def test_the_row_of_a_board_has_the_headline(whole, tmp_path) -> None:
    row, found = from_evaluation(whole), whole.extras["strict"]["smallest_eps"]
    assert row.headline == row.smallest_eps == pytest.approx(found["median"], abs=1e-6)
    assert row.worst_case_area is None and row.worst_case_missed_at_most is not None
    assert row.interval is not None and row.interval[0] < row.smallest_eps <= row.interval[1]
    beyond = {**found, "median": None, "interval": [None, None]}
    extras = {**whole.extras, "strict": {**whole.extras["strict"], "smallest_eps": beyond}}
    far = from_evaluation(whole.model_copy(update={"extras": extras}).with_arrays(whole.arrays, whole.sample))
    assert far.smallest_eps == far.smallest_eps_lo == pytest.approx(40 / 255, abs=1e-6) and far.smallest_eps_hi is None
    assert row.smallest_eps_beyond is None and far.smallest_eps_beyond == 1
    full = [r.model_copy(update={"partial": None}) for r in (row, far)]
    full[1] = full[1].model_copy(update={"model": "another"})
    assert [r.model for r in rank(full)] == ["another", row.model]
    say_more(
        "> 0.157",
        far,
        whole.model_copy(update={"extras": extras}).with_arrays(whole.arrays, whole.sample),
        whole,
        tmp_path,
    )
    components = [
        Component(name=m.component, attack=m.attack, readout=m.readout, worst=0, best=100) for m in whole.measurements
    ]
    paired = pair(whole, whole, {c.name: c for c in components})
    metrics = {m.metric: m for m in paired}
    assert metrics["smallest_eps"].base == metrics["smallest_eps"].candidate == pytest.approx(found["median"])
    assert metrics["smallest_eps"].interval == (0.0, 0.0) and "worst_case_area" not in metrics

"""The adversary of benchmarks/strict_truth.py: its margin, ball and ascent in plain loops, and whole commands."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import strict_truth
import torch
from adversary import Ball, Field, climb, seed_of, square
from conftest import ROOT
from strict_truth import Search

import dmlbench
from dmlbench.evaluate import evaluate
from dmlbench.results import load, save

MODEL = "digits-smallcnn-triplet-none"
QUICK = (
    Search("restarts", "restart", 2, 20),
    Search("entries", "entry", 3, 20),
    Search("transfer", "transfer", 2, 10, first=0.5),
    Search("wider", "restart", 1, 20, wider=2.0),
    Search("undefended", "undefended", 3, 20),
    Search("square", "square", 1, 30),
)
LINF, L2 = Ball("linf", 0.05), Ball("l2", 0.17)


@pytest.fixture(params=["all count", "groups"])
def field(request):
    """Six queries that are entries too, two that are not; images (2, 3, 3), a network with curvature."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    net.requires_grad_(False)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2])
    images = (torch.rand(3, 2, 3, 3) * 0.8)[labels] + torch.rand(12, 2, 3, 3) * 0.2
    own = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1])
    asked = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11])
    groups = torch.tensor([[0, -1, 1, 1, 0, -1, 2, 2, 0, 3, 0, 2], [-1, -1, 4, -1, -1, -1, -1, 4, -1, -1, -1, 4]]).T
    known = (groups[asked], groups[:10]) if request.param == "groups" else None
    return Field(net, net(images[:10]), labels[:10], labels[asked], own, images[asked], known)


def counts(field, q, j):
    """Whether an entry counts for a query, by hand."""
    if field.groups is None:
        return True
    pairs = zip(field.groups[0][q].tolist(), field.groups[1][j].tolist(), strict=True)
    return not any(mine == theirs >= 0 for mine, theirs in pairs)


def plain_margin(field, image, q):
    """Margin, nearest wrong and nearest right entry of one image, one entry at a time."""
    e = field.embed(image[None])[0].double()
    wrong, right = (math.inf, -1), (math.inf, -1)
    for j, entry in enumerate(field.entries.double()):
        if not counts(field, q, j):
            continue
        square = sum(float(a - b) ** 2 for a, b in zip(e, entry, strict=True))
        if field.classes[j] != field.labels[q]:
            wrong = min(wrong, (square, j))
        elif j != field.own[q]:
            right = min(right, (square, j))
    return right[0] - wrong[0], wrong[1], right[1]


def test_the_margin_is_that_of_a_plain_loop(field) -> None:
    images, q = torch.rand(8, 2, 3, 3), torch.arange(8)
    margins, wrong, right = field.margin(field.embed(images), q)
    for i in range(8):
        expected = plain_margin(field, images[i], i)
        assert float(margins[i]) == pytest.approx(expected[0], abs=1e-5)
        assert (int(wrong[i]), int(right[i])) == expected[1:]


def test_wrong_entries_are_those_of_other_classes_nearest_first(field) -> None:
    found = field.wrong_entries(torch.arange(8), 3)
    assert field.wrong_entries(torch.arange(2), 50).shape[1] < 8
    for q in range(8):
        e = field.embed(field.clean[q : q + 1])[0]
        order = (field.entries - e).norm(dim=1).argsort().tolist()
        order = [j for j in order if field.classes[j] != field.labels[q] and counts(field, q, j)]
        assert found[q].tolist() == order[:3]


@pytest.mark.parametrize("ball", [LINF, L2])
@pytest.mark.parametrize("corner", [False, True])
def test_starts_and_projections_stay_inside_and_corners_are_at_the_rim(ball, corner) -> None:
    clean = torch.rand(40, 1, 4, 4) * 0.2 + 0.4
    start = ball.start(clean, [seed_of(1, i) for i in range(40)], corner)
    projected = ball.project(clean + torch.randn(40, 1, 4, 4), clean)
    for images in (start, projected):
        moved = (images - clean).flatten(1)
        size = moved.abs().amax(1) if ball.norm == "linf" else moved.norm(dim=1)
        assert float(size.max()) <= ball.eps + 1e-6
    moved = (start - clean).flatten(1)
    if corner and ball.norm == "linf":
        assert torch.allclose(moved.abs(), torch.full_like(moved, ball.eps))
    elif corner:
        assert torch.allclose(moved.norm(dim=1), torch.full((40,), ball.eps))
    else:
        assert len(np.unique(moved.abs().amax(1).numpy())) == 40
    assert torch.equal(start, ball.start(clean, [seed_of(1, i) for i in range(40)], corner))
    beyond = ball.project(torch.full((1, 1, 4, 4), 3.0), torch.ones(1, 1, 4, 4))
    assert float(beyond.max()) == 1.0


def plain_climb(field, ball, q, start, steps, momentum, first, wider):
    """One image at a time, until it is misranked or the steps are spent: (broken, image, largest margin)."""
    clean, x, v, best = field.clean[q], start.clone(), torch.zeros_like(start), -math.inf
    for k in range(steps + 1):
        reach = 1 + (wider - 1) * max(0.0, 1 - 2 * k / steps)
        margin, wrong, right = plain_margin(field, x, q)
        if reach == 1:
            best = max(best, margin)
            if margin >= 0:
                return True, x, best
        if k == steps:
            return False, start, best
        moving = x.clone().requires_grad_(True)
        e = field.embed(moving[None])[0]
        gain = (e - field.entries[right]).square().sum() - (e - field.entries[wrong]).square().sum()
        g = torch.autograd.grad(gain, moving)[0]
        v = momentum * v + g / g.abs().mean()
        length = first * ball.eps * 0.5 * (1 + math.cos(math.pi * k / steps))
        if ball.norm == "linf":
            x = x + length * torch.sign(v)
            x = torch.max(torch.min(x, clean + reach * ball.eps), clean - reach * ball.eps)
        else:
            x = x + length * v / v.norm()
            size = float((x - clean).norm())
            x = clean + (x - clean) * min(1.0, reach * ball.eps / size)
        x = x.clamp(0, 1)


@pytest.mark.parametrize("ball", [LINF, L2])
@pytest.mark.parametrize(("momentum", "first", "wider"), [(0.75, 1.0, 1.0), (0.0, 0.5, 1.0), (0.9, 1.0, 2.0)])
def test_the_ascent_is_that_of_a_plain_loop(field, ball, momentum, first, wider) -> None:
    q = torch.arange(8)
    start = ball.start(field.clean, [seed_of(i) for i in range(8)], True)
    found = climb(field, ball, q, start, steps=12, momentum=momentum, first=first, wider=wider)
    expected = [plain_climb(field, ball, i, start[i], 12, momentum, first, wider) for i in range(8)]
    assert found.broken.tolist() == [e[0] for e in expected]
    assert len({e[0] for e in expected}) == 2  # some fall and some do not
    for i, (_, image, best) in enumerate(expected):
        assert torch.allclose(found.images[i], image, atol=1e-4)
        assert float(found.best[i]) == pytest.approx(best, abs=1e-4)


def test_the_ascent_can_follow_the_margin_of_another_model(field) -> None:
    hidden = replace(field, embed=lambda images: field.embed((images * 16).round() / 16))
    q = torch.arange(8).repeat(3)
    start = LINF.start(field.clean[q], [seed_of(i) for i in range(24)], False)
    blind, guided = climb(hidden, LINF, q, start, steps=20), climb(hidden, LINF, q, start, steps=20, along=field)
    assert len(set(q[guided.broken].tolist())) > len(set(q[blind.broken].tolist()))
    for i in guided.broken.nonzero()[:, 0].tolist():
        assert plain_margin(hidden, guided.images[i], int(q[i]))[0] >= -1e-6
    assert torch.equal(
        climb(field, LINF, q, start, steps=20, along=field).images, climb(field, LINF, q, start, steps=20).images
    )


def test_other_attempts_of_a_query_end_once_one_has_broken_it(field) -> None:
    q = torch.arange(8).repeat(6)
    start = LINF.start(field.clean[q], [seed_of(i) for i in range(48)], False)
    found = climb(field, LINF, q, start, steps=30)
    alone = climb(field, LINF, q[:1], start[:1], steps=30)
    fallen = set(q[found.broken].tolist())
    assert 0 < len(fallen) < 8
    assert found.passes < 48 * 31 - 5 * 10 * len(fallen)  # nobody goes on for long with what is broken
    assert alone.passes <= 31


@pytest.mark.parametrize("ball", [LINF, L2])
def test_square_never_loses_margin_and_finds_what_it_says(field, ball) -> None:
    q = torch.arange(8)
    seeds = [seed_of(i) for i in range(8)]
    short, long = (square(field, ball, q, seeds, queries=n) for n in (3, 400))
    assert bool(long.broken.any())
    assert bool((long.best >= short.best.minimum(torch.zeros(8)) - 0.05).all())
    for i in long.broken.nonzero()[:, 0].tolist():
        assert plain_margin(field, long.images[i], i)[0] >= -1e-6
        moved = (long.images[i] - field.clean[i]).flatten()
        assert float(moved.abs().max() if ball.norm == "linf" else moved.norm()) <= ball.eps + 1e-6


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    return claiming(MODEL, tmp_path_factory.mktemp("claims") / "run")


def claiming(model, folder):
    """A run that claims every right query survives everywhere, on a model that stands nothing at 40/255."""
    run = evaluate(dmlbench.load_model(model), "digits", dmlbench.load_protocol("strict-fast"), limit=40)
    clean = run.arrays["benign/recall_at_1"]
    strict = {**run.extras["strict"], "curve": [{"eps": "1/255000"}, {"eps": "40/255", "missed_at_most": 1.0}]}
    fields = {name: getattr(run, name) for name in type(run).model_fields} | {"extras": {"strict": strict}}
    arrays = {**run.arrays, "strict@1/255000/value": clean, "strict@40/255/value": clean}
    return save(type(run)(**fields).with_arrays(arrays), folder)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(strict_truth, "SEARCHES", QUICK)


def rows(out):
    return json.loads((out / "strict_truth.json").read_text())


def test_false_claims_are_found_and_true_ones_left(claims, quick, tmp_path, capsys) -> None:
    assert strict_truth.main([str(claims), "--out", str(tmp_path), "--threads", "2"]) == 0
    small, large = rows(tmp_path)
    assert small["survivors"] == large["survivors"] == large["right"] > 30
    assert (small["broken"], small["truth"], small["broken_by"]) == (0, small["strict"], {})
    assert small["passes"]["square"] == 30 * small["right"] and small["passes"]["undefended"] == 0
    assert large["broken"] == large["right"] and large["truth"] == 0
    assert (small["bound"], small["bound_holds"]) == (None, None)
    assert (large["bound"], large["bound_holds"]) == (1.0, False)
    said = capsys.readouterr().out
    assert said == (tmp_path / "strict_truth.md").read_text() and "**fails**" in said


@pytest.mark.parametrize(("broken", "holds", "word"), [(0, None, "open"), (1, None, "open"), (2, False, "**fails**")])
def test_a_bound_is_of_all_queries_of_the_run(broken, holds, word) -> None:
    few = {"bound": 1.0, "counted": 10, "of": 100}
    assert strict_truth.held(few, broken) is holds
    assert strict_truth.held(few | {"counted": 100}, broken) is (broken < 2)
    assert strict_truth.held(few | {"bound": None}, broken) is None
    assert strict_truth.held({"bound": 1.0, "counted": 10}, broken) is None
    about = (
        few
        | dict.fromkeys(("model", "dataset", "protocol", "eps", "effort"), "x")
        | {"queries": 10, "right": 10, "spent": 1}
    )
    by = np.array([0] * broken + [-1] * (10 - broken))
    passes = np.zeros(len(strict_truth.SEARCHES), dtype=np.int64)
    cell = strict_truth.Cell(
        about, np.ones(10, bool), by, {}, np.zeros(10), 0, 0, np.zeros(0, dtype=np.int64), passes, 0, 0.0
    )
    assert f"| 1.0 {word} |" in strict_truth.table([strict_truth.row_of(cell)])


def test_a_defended_model_falls_to_images_of_the_undefended_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(strict_truth, "SEARCHES", [search for search in QUICK if search.kind == "undefended"])
    run = claiming(f"defended:bits(3,naive):{MODEL}", tmp_path / "run")
    assert strict_truth.main([str(run), "--out", str(tmp_path), "--eps", "40/255"]) == 0
    (row,) = rows(tmp_path)
    assert row["broken_by"] == {"undefended": row["broken"]} and row["broken"] > 0.5 * row["right"] > 10


def test_a_break_counts_only_if_dmlbench_reads_it_so(claims, quick, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(strict_truth, "recall_at_1", lambda e, scene: torch.full((len(e),), 100.0))
    assert strict_truth.main([str(claims), "--out", str(tmp_path), "--eps", "40/255"]) == 0
    (row,) = rows(tmp_path)
    assert row["broken"] == 0 and row["refused"] >= row["right"]


def test_an_interrupted_command_goes_on_and_says_the_same(claims, quick, tmp_path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--eps", "40/255", "--queries", "20", "--threads", "1", "--effort", "0.5"]
    assert strict_truth.main([str(claims), "--out", str(whole), *words]) == 0
    calls, once = [], strict_truth.absorb

    def interrupted(*given):
        calls.append(given)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        once(*given)

    monkeypatch.setattr(strict_truth.Bench, "batch", 7)
    monkeypatch.setattr(strict_truth, "absorb", interrupted)
    codes = [strict_truth.main([str(claims), "--out", str(parts), *words]) for _ in range(3)]
    assert codes == [130, 130, 0]
    (a,), (b,) = rows(whole), rows(parts)
    assert a["queries"] == 20
    assert (a["broken_by"], a["truth"]) == (b["broken_by"], b["truth"])
    assert strict_truth.main([str(claims), "--out", str(parts), *words, "--seed", "5"]) == 2


def test_what_falls_at_one_eps_falls_at_every_larger_one(claims, quick, tmp_path, monkeypatch) -> None:
    run = load(claims)
    curve = [{"eps": "40/255"}, {"eps": "41/255"}]
    fields = {name: getattr(run, name) for name in type(run).model_fields} | {
        "extras": {"strict": {"norm": "linf", "curve": curve}}
    }
    arrays = {**run.arrays, "strict@41/255/value": run.arrays["strict@40/255/value"]}
    folder = save(type(run)(**fields).with_arrays(arrays), tmp_path / "run")
    assert strict_truth.main([str(folder), "--out", str(tmp_path)]) == 0
    first, second = rows(tmp_path)
    assert second["broken_by"] == {strict_truth.SMALLER: first["broken"]} and sum(second["passes"].values()) == 0


def test_the_command_makes_a_run_first(tmp_path) -> None:
    words = ["--model", MODEL, "--protocol", "strict-fast", "--queries", "12", "--effort", "0.01", "--eps", "40/255"]
    command = [sys.executable, str(ROOT / "benchmarks" / "strict_truth.py"), *words, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"| {MODEL} | 40/255 | 12 |" in done.stdout


def test_a_wrong_request_is_one_line(claims, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path)]
    assert strict_truth.main(out) == 2
    assert strict_truth.main([str(claims), *out, "--eps", "3/255"]) == 2
    assert strict_truth.main([str(claims), *out, "--queries", "0"]) == 2
    assert strict_truth.main([str(tmp_path), *out]) == 4
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 4 and all(line.startswith("error: ") for line in said)

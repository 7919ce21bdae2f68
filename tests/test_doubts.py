"""Models that no search can follow, or that answer with NaN: refused or flagged under every kind of protocol."""

import copy

import numpy as np
import pytest
import torch
from masks import APART, CHEATS, JUMPS, MASKS
from torch import nn

import dmlbench
from dmlbench.board.build import load_boards
from dmlbench.checkpoints import packaged
from dmlbench.doubts.audit import CHECKS, FLAGS, SURVEYED, glance
from dmlbench.doubts.checks import doubts_about
from dmlbench.doubts.questions import PASSES, direction
from dmlbench.doubts.unseen import ASKED, STEPS
from dmlbench.errors import DataError
from dmlbench.evaluate import evaluate
from dmlbench.metrics import retrieval
from dmlbench.optimizers import autograd, watched
from dmlbench.protocol import counted, ers_of
from dmlbench.protocols import load_protocol
from dmlbench.results import Evaluation, Measurement
from dmlbench.rng import Rng
from dmlbench.run.subject import Subject, prepare

PLAIN = "digits-smallcnn-triplet-none"
KINDS = ("ers-digits", "strict-fast", "clustering", "panum-28-l2")


def short(name: str):
    """A packaged protocol with two steps of each search."""
    p = load_protocol(name)
    few = tuple(s.model_copy(update={"threat": {**s.threat, "steps": 2}}) for s in p.steps)
    grid = {side: eps[-1:] for side, eps in p.grid.items()}
    own = tuple(c for c in p.components if c.name in ("LTM", "ES:D", "PGD:R@1"))
    joint = p.joint and p.joint.model_copy(update={"steps": 2, "restarts": 1})
    changed = {"threat": {**p.threat, "steps": 2}, "steps": few, "grid": grid, "components": own, "joint": joint}
    return p.model_copy(update={**changed, "clustering_seeds": (0,)})


class Front(nn.Module):
    """A network behind a function of its images."""

    def __init__(self, function, network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, x):
        return self.function(x, self.network)


def spoilt(function):
    """The undefended digits model behind a function, which no load has looked at."""
    model = copy.deepcopy(dmlbench.load_model(PLAIN))
    model.network, model.name = Front(function, model.network), "spoilt"
    return model


def nan_gradient(x, network):
    """The same values; the square root's slope at zero, times that of abs, is inf * 0."""
    return network(x + (x - x.detach()).abs().sqrt())


def nan_away_from_the_data(x, network):
    """NaN for images whose pixels are not sixteenths, as those of the data set are."""
    off = ((x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3)[:, None]
    return network(x).masked_fill(off, torch.nan)


def flags(found: Evaluation) -> dict[str, str]:
    return {w.flag: w.message for w in found.warnings}


@pytest.mark.parametrize("kind", KINDS)
def test_nan_embeddings_of_perturbed_images_end_the_run(kind: str) -> None:
    with pytest.raises(DataError, match=r"model 'spoilt' gives NaN or infinite embeddings for \d+ "):
        evaluate(spoilt(nan_away_from_the_data), "digits", short(kind), limit=16, device="cpu")


def test_a_search_that_saw_nan_does_not_count_as_survived() -> None:
    """The margin is NaN at the perturbed images alone, so the search goes back to the clean one, which is right."""
    with pytest.raises(DataError, match="images that step W1 looked at, at eps 40/255"):
        evaluate(spoilt(nan_away_from_the_data), "digits", short("strict-fast"), limit=16, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_nan_gradients_are_counted_and_told(kind: str) -> None:
    found = flags(evaluate(spoilt(nan_gradient), "digits", short(kind), limit=16, device="cpu"))
    assert int(found["nonfinite-gradients"].split()[0]) >= 16 and "taken as zero" in found["nonfinite-gradients"]
    assert "exactly zero, NaN or infinite for 100.0 % of the queries" in found["zero-gradients"]


def test_the_audit_counts_nan_gradients_as_missing() -> None:
    p = short("strict").model_copy(update={"audit": 16})
    found = evaluate(spoilt(nan_gradient), "digits", p, limit=16, device="cpu")
    f2 = next(f for f in found.extras["audit"] if f["check"] == "F2")
    assert f2["verdict"] == "fail" and f2["value"] == 100.0 and "NaN or infinite" in f2["message"]
    assert "zero-gradients" not in flags(found), "the audit has said so"


def test_only_the_rows_that_are_not_finite_are_zeroed() -> None:
    def loss(x):
        return (x * torch.tensor([1.0, torch.nan, torch.inf, 1.0])[:, None]).sum(1)

    x = torch.ones(4, 3)
    with watched() as trouble:
        _, gradient = autograd(loss, x, Rng(0, torch.arange(4)))
    assert trouble.count == 2
    assert gradient[[1, 2]].eq(0).all() and gradient[[0, 3]].eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask, flag", [("detached", "zero-gradients"), ("input-noise", "random")])
def test_every_kind_of_protocol_doubts_a_masked_model(kind: str, mask: str, flag: str) -> None:
    torch.manual_seed(0)
    found = flags(evaluate(MASKS[mask](dmlbench.load_model(PLAIN)), "digits", short(kind), limit=16, device="cpu"))
    assert flag in found and "docs/audit.md" in found[flag]
    assert len({"zero-gradients", "random"} & set(found)) == 1


@pytest.mark.parametrize("attacks", [["LTM@square"], ["LTM@noise", "ES@spsa"]])
def test_a_run_without_gradients_does_not_miss_them(attacks: list[str]) -> None:
    p = short("ers-digits")
    p = p.model_copy(update={"threat": {**p.threat, "steps": 1, "queries": 2}})
    masked = MASKS["detached"](dmlbench.load_model(PLAIN))
    assert flags(evaluate(masked, "digits", p, attacks=attacks, limit=8, device="cpu")) == {}


def test_the_surrogates_gradient_is_the_one_that_counts() -> None:
    plain, masked = dmlbench.load_model(PLAIN), MASKS["detached"](dmlbench.load_model(PLAIN))
    options = {"attacks": ["LTM"], "limit": 16, "device": "cpu"}
    assert flags(evaluate(masked, "digits", short("ers-digits"), surrogate=plain, **options)) == {}
    assert set(flags(evaluate(plain, "digits", short("ers-digits"), surrogate=masked, **options))) == {"zero-gradients"}


@pytest.mark.parametrize("name", [PLAIN, "digits-smallcnn-triplet-act", "digits-smallcnn-triplet-hm-lga-ics"])
@pytest.mark.parametrize("kind", KINDS)
def test_honest_models_are_not_doubted(name: str, kind: str) -> None:
    assert flags(evaluate(name, "digits", short(kind), limit=48, device="cpu")) == {}


def test_a_glance_does_not_depend_on_the_batch_size_and_takes_no_more_than_it_says() -> None:
    seen = []

    def counted(x, network):
        seen.append(len(x))
        return network(x.detach())

    subject = prepare(spoilt(counted), dmlbench.load_dataset("digits"), device="cpu")
    recall = np.full(len(subject.rows), 100.0)
    seen.clear()
    small = list(glance(subject, recall, {"pgd"}, 60))
    few = (len(subject.rows) + 3) // 4
    passes = (
        2 * (PASSES - 2) + 3 + 2 + 3 + 3 * (1 + STEPS + 1)
    )  # of history; of altered; of nearness and least bits; of each start of the searches
    assert max(seen) == 60 and sum(seen) == 3 * 256 + min(SURVEYED, few) * passes + 60 + ASKED
    assert small == list(glance(subject, recall, {"pgd"}, 1000)) and [f.flag for f in small] == ["zero-gradients"]
    assert list(glance(subject, np.zeros_like(recall), {"pgd"}, 7)) == []


def test_the_gradients_check_does_not_depend_on_the_batches() -> None:
    """Which step its changes agree at is a question of all queries."""
    cheat, _ = CHEATS["partly turned gradient"]
    subject = prepare(cheat(dmlbench.load_model(PLAIN)), dmlbench.load_dataset("digits"), device="cpu")
    positions = np.arange(0, len(subject.rows), 14)
    whole, parts, small = (direction(subject, np.array_split(positions, count)) for count in (1, 4, 8))
    assert whole.verdict == parts.verdict == small.verdict == "warn" and "correlate" in whole.message
    assert parts.value == pytest.approx(whole.value, abs=1e-5)
    assert small.value == pytest.approx(whole.value, abs=1e-4)  # below 16 rows some CPUs add up in another order


def turned_at_first(x, network):
    """The gradient is another one until so many were asked for."""
    if x.requires_grad:
        network.asked = getattr(network, "asked", 0) + 1
        if network.asked <= 3:
            x = 2 * x.detach() - x
    return network(x)


def turned_in_large_batches(x, network):
    return network(2 * x.detach() - x if len(x) > 128 else x)


@pytest.mark.parametrize("kind", ["ers-digits", "strict-fast", "strict", "universal"])
@pytest.mark.parametrize("cheat", [turned_at_first, turned_in_large_batches])
def test_searches_that_are_shown_another_gradient_than_the_look_afterwards_are_told(cheat, kind: str) -> None:
    found = flags(evaluate(spoilt(cheat), "digits", short(kind), limit=160, device="cpu"))
    (message,) = (found[flag] for flag in ("remembers", "audit-F5") if flag in found)
    assert "of its length from what it was before the searches" in message


def doubted(subject: Subject) -> set[str]:
    """Flags of a result that reads ES:D, found without the attacks."""
    clean = retrieval(subject.scene)["recall_at_1"]
    shift = Measurement(
        component="ES:D", attack="ES", optimizer="pgd", readout="embedding_shift", better="lower", value=1.0, score=50.0,
        n=len(clean),
    )  # fmt: skip
    return {f.flag for f in (*doubts_about(subject, [shift]), *glance(subject, clean, {"pgd"}, 256))}


@pytest.mark.parametrize("name", [*CHEATS, *APART, *JUMPS])
def test_cheats_are_doubted(name: str) -> None:
    torch.manual_seed(0)
    cheat, flag = {**CHEATS, **APART, **JUMPS}[name]
    subject = prepare(cheat(dmlbench.load_model(PLAIN)), dmlbench.load_dataset("digits"), limit=120, device="cpu")
    clean = retrieval(subject.scene)["recall_at_1"]
    assert np.nanmean(clean) > 50, "it retrieves"
    assert flag in doubted(subject)


def test_there_are_many_masks_and_cheats_of_which_many_set_nothing() -> None:
    assert len(MASKS) + len(CHEATS) + len(APART) >= 24 and len(APART) >= 12
    assert len({*CHEATS, *APART, *JUMPS}) == len(CHEATS) + len(APART) + len(JUMPS)


@pytest.mark.parametrize("name", [PLAIN, "digits-smallcnn-triplet-hm-lga-ics", "digits-smallcnn-triplet-min-max"])
def test_the_models_that_cheats_are_made_of_are_not_doubted(name: str) -> None:
    subject = prepare(dmlbench.load_model(name), dmlbench.load_dataset("digits"), limit=120, device="cpu")
    assert doubted(subject) == set()


def test_parts_out_of_range_are_told_and_cut() -> None:
    p = load_protocol("ers-digits")
    threat = {**p.threat, "steps": 2}
    p = p.model_copy(
        update={"threat": threat, "components": tuple(c for c in p.components if c.name in ("CA+", "LTM"))}
    )
    torch.manual_seed(0)
    trap = evaluate(CHEATS["trap"][0](dmlbench.load_model(PLAIN)), "digits", p, limit=64, device="cpu")
    first, second = (trap.part(name).score for name in ("CA+", "LTM"))
    assert first is not None and second is not None and first > 150 and 0 <= second <= 100
    assert trap.ers == pytest.approx((100 + second) / 2) and f"CA+ {first:.1f}" in flags(trap)["out-of-range"]
    assert trap.ers_interval is not None and trap.ers_interval[0] <= trap.ers <= trap.ers_interval[1]


def test_scores_are_moved_into_range_as_a_whole() -> None:
    scores = np.array([[150.0, 10.0, -30.0], [170.0, 20.0, np.nan]])
    moved = counted(scores)
    assert np.nanmean(moved, axis=0).tolist() == [100.0, 15.0, 0.0]
    assert (moved[1] - moved[0])[:2].tolist() == [20.0, 10.0] and np.isnan(moved[1, 2])
    inside = scores[:, 1:2]
    assert counted(inside) is inside
    assert ers_of([150.0, 20.0, -3.0]) == 40.0 and ers_of([1.0, None]) is None and ers_of([]) is None


def test_every_flag_has_one_meaning() -> None:
    raised = {
        f for rows in load_boards(packaged("leaderboard")).values() for r in rows for f in (r.flags or "").split()
    }
    assert raised <= set(FLAGS)
    assert {f"audit-{name}" for name in CHECKS} <= set(FLAGS)


def test_a_network_may_change_its_images_in_place() -> None:
    """In place or not, the numbers are the same: what it is fed is its own."""

    def results(function):
        found = evaluate(spoilt(function), "digits", short("strict-fast"), limit=16, device="cpu")
        return found.benign, [m.value for m in found.measurements], flags(found)

    assert results(lambda x, net: net(x.sub_(0.1).div_(0.9))) == results(lambda x, net: net((x - 0.1) / 0.9))

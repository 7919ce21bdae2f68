"""Every defence's search and loss against plain loops on a hand-sized batch."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmlbench.embedding import Embedder
from dmlbench.errors import UsageError
from dmlbench.models import ARCHITECTURES
from dmlbench.optimizers import pgd
from dmlbench.rng import Rng
from dmlbench.threat import Threat
from dmlbench.training.defenses import DEFENSES, DESTINATIONS, Batch, Inner, Learner, base
from dmlbench.training.defenses.base import Miner, frozen
from dmlbench.training.defenses.manipulation import BOOST
from dmlbench.training.defenses.proxies import diversity
from dmlbench.training.losses import build_loss, hardness, proxy_anchor_each, triplet
from dmlbench.training.sampling import SAMPLINGS, draw

MARGIN = 0.2


def learner(loss: str = "triplet", ensemble: bool = False, norms: int = 0) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        small = {"width": 2, "embed_dim": 6}
        network = (
            ARCHITECTURES["ensemble"](member="smallcnn", members=2, **small)
            if ensemble
            else ARCHITECTURES["smallcnn-bn" if norms else "smallcnn"](**small)
        )
        embedder = Embedder(network, (1, 8, 8))
        params = {"margin": MARGIN} if loss == "triplet" else {}
        criteria = [build_loss(loss, 3, 6, embedder.distance, params) for _ in range(2 if ensemble else 1)]
    return Learner(embedder.train(), nn.ModuleList(criteria), loss, MARGIN, norms)


@pytest.mark.parametrize("margin", [MARGIN, 0.7])
def test_semihard_mining_takes_the_margin_of_the_recipe(monkeypatch, margin: float) -> None:
    """By the loss's own mining and by a defence's; 0.2 is what it always was."""
    seen = []

    def spy(*given):
        seen.append(given)
        return draw(*given)

    monkeypatch.setattr("dmlbench.training.defenses.base.draw", spy)
    model, b = learner(), batch()
    model.margin = margin
    model.outer(model.embedder(b.images), b, "M")
    mined = Miner(model, b).triplets("M")
    assert [given[-1] for given in seen] == [margin, margin]
    wide = Rng(3, torch.arange(2000))
    d, labels = torch.tensor([[0.0, 0.1, 0.4, 0.9]]).repeat(2000, 1), torch.tensor([0, 0, 1, 1])
    negatives = draw("M", d, labels, torch.zeros(2000, dtype=torch.long), 8, wide, margin)[:, 2]
    assert set(negatives.tolist()) == (
        {2, 3} if margin == MARGIN else {2}
    )  # no band at 0.2: any; 0.4 is in that of 0.7
    assert mined.shape == (len(b.anchors), 3)


def batch(iteration: int = 0, rows: tuple[int, ...] = (4, 9, 2, 3, 11, 6)) -> Batch:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    images = Rng(8, torch.arange(6)).uniform(1, 8, 8)
    return Batch(images, labels, torch.tensor([0, 2, 4]), np.array(rows), seed=21, iteration=iteration)


class Recorder:
    """PGD that keeps what it was asked."""

    def __init__(self, model: Learner) -> None:
        self.model = model
        self.calls: list[tuple] = []

    def __call__(self, loss, images, threat, rng):
        assert not any(p.requires_grad for p in self.model.parameters())
        assert not any(m.training for m in self.model.modules())
        moved = pgd(loss, images, threat, rng)
        assert threat.contains(moved, images).all()
        self.calls.append((images, moved, loss(images).detach(), loss(moved).detach(), threat))
        return moved


def run(name: str, loss: str | None = None, iteration: int = 0, **params):
    entry = DEFENSES[name]
    loss = loss or (entry.losses or ("triplet",))[0]
    model = learner(loss, entry.ensemble, entry.norms)
    model.previous.fill_(0.12)
    recorder = Recorder(model)
    inner = Inner(Threat(eps="40/255", step="8/255", steps=6), recorder)
    b = batch(iteration)
    value = entry.step(model, b, inner, **entry.parameters(params))
    return model, b, recorder.calls, value


def trained(name: str, **params):
    """As :func:`run`, the value a plain number."""
    *rest, value = run(name, **params)
    return *rest, value.detach()


def distance(x, y) -> float:
    return math.dist(x.tolist(), y.tolist())


def embedded(model: Learner, images):
    with torch.no_grad():
        return model.embedder(images)


def triplet_mean(e) -> float:
    """e: (t, 3, d)"""
    return sum(max(0.0, distance(a, p) - distance(a, n) + MARGIN) for a, p, n in e) / len(e)


@pytest.mark.parametrize("name", [n for n in DEFENSES if n not in ("none", "noise", "adp")])
def test_searches_improve_inside_the_ball_and_leave_the_model_as_it_was(name: str) -> None:
    params = {"hm": {"source": "R", "destination": "H"}, "mdprop": {"targets": 1}}
    model, _, calls, value = run(name, **params.get(name, {}))
    assert calls
    assert all(bool((after.sum() < before.sum()) or before.sum() == 0) for _, _, before, after, _ in calls)
    assert any(bool((moved != images).any()) for images, moved, *_ in calls)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert value.requires_grad
    value.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.embedder.parameters() if p.dim() > 1)


def test_none_is_the_triplet_loss_of_the_clean_batch() -> None:
    model, b, calls, value = trained("none")
    rows = triplets_of_outer(model, b)
    assert not calls
    assert value.item() == pytest.approx(triplet_mean(embedded(model, b.images)[rows]), abs=1e-5)


def test_noise_is_that_loss_on_noisy_images() -> None:
    model, b, calls, value = trained("noise", sigma=0.3)
    noisy = b.images + 0.3 * b.stream("noise", b.images).normal(*b.images.shape[1:])
    assert not calls and 0.25 < float((noisy - b.images).std()) < 0.35 and float(noisy.min()) < 0
    rows = triplets_of_outer(model, replace(b, images=noisy))
    assert value.item() == pytest.approx(triplet_mean(embedded(model, noisy)[rows]), abs=1e-5)
    with pytest.raises(UsageError, match=r"sigma 0\.0 must be above 0"):
        run("noise", sigma=0.0)


def triplets_of_outer(model: Learner, b: Batch):
    from dmlbench.training.sampling import draw

    d = torch.zeros(3, 6)
    return draw("R", d, b.labels, b.anchors, 6, b.stream("outer", b.anchors))


def test_est_maximises_the_shift_and_learns_from_the_moved_batch() -> None:
    model, b, calls, value = trained("est")
    ((images, moved, _, after, _),) = calls
    assert torch.equal(images, b.images)
    clean, shifted = embedded(model, images), embedded(model, moved)
    for i in range(6):
        assert -float(after[i]) == pytest.approx(distance(clean[i], shifted[i]), abs=1e-5)
    assert value.item() == pytest.approx(triplet_mean(shifted[triplets_of_outer(model, b)]), abs=1e-5)


def test_act_draws_positive_and_negative_together() -> None:
    model, b, calls, value = trained("act")
    ((images, moved, _, after, _),) = calls
    rows = Miner(model, b).triplets("R")
    assert torch.equal(images, torch.cat([b.images[rows[:, 1]], b.images[rows[:, 2]]]))
    e = embedded(model, moved)
    clean = embedded(model, b.images)[rows[:, 0]]
    for i in range(3):
        assert float(after[i]) == pytest.approx(distance(e[i], e[3 + i]), abs=1e-5)
    assert value.item() == pytest.approx(triplet_mean([(clean[i], e[i], e[3 + i]) for i in range(3)]), abs=1e-5)


def test_min_max_maximises_the_triplet_loss() -> None:
    model, _, calls, value = trained("min-max")
    ((_, moved, _, after, _),) = calls
    e = embedded(model, moved).view(3, 3, -1)
    for i in range(3):
        assert -float(after[3 * i]) == pytest.approx(triplet_mean(e[i : i + 1]), abs=1e-5)
    assert value.item() == pytest.approx(triplet_mean(e), abs=1e-5)


def destination(name: str, clean, rows, previous: float) -> list[float]:
    """H_D of each anchor in plain words."""
    u = MARGIN
    ratio = min(u, previous) / u
    if name in ("LGA", "square", "sqrt", "constant"):
        value = {"LGA": -MARGIN * ratio, "square": -MARGIN * ratio**2, "sqrt": -MARGIN * ratio**0.5, "constant": -0.15}
        return [value[name]] * len(rows)
    hard = [distance(clean[a], clean[p]) - distance(clean[a], clean[n]) for a, p, n in rows.tolist()]
    return [h + BOOST * (1 - ratio) for h in hard] if name.startswith("B(") else hard


@pytest.mark.parametrize("ics", [0.0, 0.5])
@pytest.mark.parametrize("name", list(DESTINATIONS))
def test_hm_by_hand(name: str, ics: float) -> None:
    model, b, calls, value = trained("hm", source="R", destination=name, constant=-0.15, ics=ics)
    ((images, moved, before, after, _),) = calls
    miner = Miner(model, b)
    rows = miner.triplets("R")
    clean = embedded(model, b.images)
    sampling = name.removeprefix("B(").removesuffix(")")
    aim = miner.triplets(sampling, "destination") if len(sampling) == 1 and sampling != "R" else rows
    wanted = destination(name, clean, aim, 0.12)
    e = embedded(model, moved).view(3, 3, -1)
    for i, (a, p, n) in enumerate(rows.tolist()):
        start = distance(clean[a], clean[p]) - distance(clean[a], clean[n])
        end = distance(e[i, 0], e[i, 1]) - distance(e[i, 0], e[i, 2])
        assert float(before[3 * i]) == pytest.approx(max(0.0, wanted[i] - start) ** 2, abs=1e-5)
        assert float(after[3 * i]) == pytest.approx(max(0.0, wanted[i] - end) ** 2, abs=1e-5)
        if start >= wanted[i] or name == "R":
            assert torch.equal(images[3 * i : 3 * i + 3], moved[3 * i : 3 * i + 3])
    loss = triplet_mean(e)
    assert float(model.previous) == pytest.approx(loss, abs=1e-5)
    for i, (a, p, _) in enumerate(rows.tolist()):
        loss += ics / 3 * max(0.0, distance(clean[a], e[i, 0]) - distance(clean[a], clean[p]))
    assert value.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("name", list(SAMPLINGS))
def test_hm_to_its_own_source_perturbs_nothing(name: str) -> None:
    _, _, calls, _ = trained("hm", source=name, destination=name)
    ((images, moved, _, _, _),) = calls
    assert torch.equal(images, moved)


def test_hm_starts_with_the_gentlest_adversary() -> None:
    """Before the first step there is no loss: H_D is -γ, as for any loss of γ or more."""
    model = learner()
    miner = Miner(model, batch())
    assert float(DESTINATIONS["LGA"](model, miner, miner.triplets, 0.0)) == pytest.approx(-MARGIN)
    model.previous.fill_(0.0)
    assert float(DESTINATIONS["LGA"](model, miner, miner.triplets, 0.0)) == 0.0


def test_hm_with_a_small_margin_minds_the_constant_only_where_it_is_used() -> None:
    model = learner()
    model.margin = 0.05
    inner = Inner(Threat(eps="40/255", step="8/255", steps=1))
    assert torch.isfinite(DEFENSES["hm"].step(model, batch(), inner, destination="LGA"))
    with pytest.raises(UsageError, match=r"constant -0.1 must lie in \[-0.05, 0\]"):
        DEFENSES["hm"].step(model, batch(), inner, destination="constant")


@pytest.mark.parametrize("loss", ["triplet", "contrastive"])
@pytest.mark.parametrize("element", ["a", "p", "n"])
def test_robust_moves_one_element_against_fixed_others(element: str, loss: str) -> None:
    model, b, calls, value = trained("robust", loss=loss, element=element, sampling="M")
    ((images, moved, _, after, threat),) = calls
    rows = Miner(model, b).triplets("M")
    which = "apn".index(element)
    assert threat.start == "random" and torch.equal(images, b.images[rows[:, which]])
    e = embedded(model, b.images)[rows]
    e[:, which] = embedded(model, moved)
    total = 0.0
    for i in range(3):
        ap, an = distance(e[i, 0], e[i, 1]), distance(e[i, 0], e[i, 2])
        assert -float(after[i]) == pytest.approx(ap - an, abs=1e-5)
        total += max(0.0, ap - an + MARGIN) if loss == "triplet" else ap**2 + max(0.0, 1 - an) ** 2
    assert value.item() == pytest.approx(total / 3, abs=1e-5)


def test_robust_attack_rate_zero_is_clean_training() -> None:
    model, b, _, value = trained("robust", attack_rate=0.0)
    rows = Miner(model, b).triplets("M")
    assert value.item() == pytest.approx(triplet_mean(embedded(model, b.images)[rows]), abs=1e-5)


@pytest.mark.parametrize("iteration", [0, 1])
def test_ca_tride_alternates_and_is_gentle_near_collapse(iteration: int) -> None:
    model, b, calls, value = trained("ca-tride", iteration=iteration, temperature=0.1)
    ((images, moved, _, _, _),) = calls
    rows = Miner(model, b).triplets("S")
    part = [0] if iteration == 0 else [1, 2]
    clean = embedded(model, b.images)
    triples = b.images[rows].clone()
    moved = moved.view(3, len(part), 1, 8, 8)
    assert torch.equal(images.view_as(moved), triples[:, part])
    for i, (a, p, n) in enumerate(rows.tolist()):
        ap, an = distance(clean[a], clean[p]), distance(clean[a], clean[n])
        strength = 1 - math.exp(ap / 0.1) / (math.exp(ap / 0.1) + math.exp(an / 0.1))
        for j, k in enumerate(part):
            triples[i, k] += strength * (moved[i, j] - triples[i, k])
    e = embedded(model, triples.view(9, 1, 8, 8)).view(3, 3, -1)
    assert value.item() == pytest.approx(triplet_mean(e), abs=1e-4)


def test_at_and_trades() -> None:
    model, b, calls, value = trained("at")
    ((images, moved, before, _, _),) = calls
    e = embedded(model, images)
    torch.testing.assert_close(-before, proxy_anchor_each(e, b.labels, model.criteria[0].proxies))
    torch.testing.assert_close(
        value, model.criteria[0](embedded(model, moved), b.labels).detach(), atol=1e-4, rtol=1e-4
    )

    model, b, calls, value = trained("trades", beta=2.0)
    ((images, moved, _, after, _),) = calls
    clean, shifted = embedded(model, images), embedded(model, moved)
    shift = [distance(x, y) for x, y in zip(clean, shifted, strict=True)]
    assert (-after).tolist() == pytest.approx(shift, abs=1e-5)
    assert value.item() == pytest.approx(model.criteria[0](clean, b.labels).item() + 2.0 * sum(shift) / 6, abs=1e-4)


def test_eat_trains_members_on_their_split_and_on_everyones_adversaries() -> None:
    model, b, calls, value = trained("eat")
    members = model.embedder.network.members
    splits = [[i for i, row in enumerate(b.rows) if row % 2 == m] for m in range(2)]
    assert [len(images) for images, *_ in calls] == [len(splits[0]), len(splits[1]), 6]

    def loss(m: int, images, labels) -> float:
        with torch.no_grad():
            return float(model.criteria[m](nn.functional.normalize(members[m](images), dim=1), labels))

    sets = [(calls[m][1], b.labels[splits[m]]) for m in range(2)] + [(calls[2][1], b.labels)]
    expected = sum(
        loss(m, b.images[splits[m]], b.labels[splits[m]]) + sum(loss(m, x, y) for x, y in sets) / 3 for m in range(2)
    )
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_eat_keeps_members_and_splits_together_where_a_split_is_empty() -> None:
    """All rows are odd: member 0 has no image of its own, and member 1 must not be taken for it."""
    model, b = learner("proxy-anchor", ensemble=True), batch(rows=(5, 9, 1, 3, 11, 7))
    recorder = Recorder(model)
    value = DEFENSES["eat"].step(model, b, Inner(Threat(eps="40/255", step="8/255", steps=6), recorder))
    members = model.embedder.network.members
    (images, moved, before, _, _), (_, whole, *_) = recorder.calls
    assert torch.equal(images, b.images)
    with torch.no_grad():
        e = [[nn.functional.normalize(m(x), dim=1) for x in (images, moved, whole)] for m in members]
        torch.testing.assert_close(-before, proxy_anchor_each(e[1][0], b.labels, model.criteria[1].proxies))
        loss = [[float(model.criteria[m](x, b.labels)) for x in e[m]] for m in range(2)]
    expected = loss[1][0] + sum(loss[m][k] for m in range(2) for k in (1, 2)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert all(p.grad is not None for p in model.parameters())


def normed(part):
    """Embeddings of a batch in training by an untrained model, and the statistics that its batch norms then have."""
    model = learner(norms=1)
    with torch.no_grad():
        e = model.embedder(part)
    return e, [m.running_mean for m in base.batch_norms(model.embedder).values()]


@pytest.mark.parametrize("targets", [1, 3])
def test_mdprop_moves_each_half_to_its_targets_through_its_own_batch_norms(targets: int) -> None:
    model, b, calls, value = trained("mdprop", targets=targets)
    still = learner(norms=1).embedder.eval()
    moved = [after for _, after, *_ in calls]
    for which, (images, end, before, after, _) in enumerate(calls):
        assert torch.equal(images, b.images[3 * which : 3 * which + 3])
        order = b.stream(f"targets {which}", images).uniform(targets if which else 1).argsort(0)
        with torch.no_grad():
            aims, start, end = still(images), still(images), still(end)
        for column in order.t():
            assert sorted(column.tolist()) == [0, 1, 2]
        for i in range(3):
            for said, e in ((before, start), (after, end)):
                wanted = sum(distance(e[i], aims[j]) for j in order[i]) / order.shape[1]
                assert float(said[i]) == pytest.approx(wanted, abs=1e-4)
    parts = [normed(part) for part in (b.images, *moved)]
    rows = draw("R", torch.zeros(6, 12), b.labels.repeat(2), torch.tensor([0, 2, 4, 6, 8, 10]), 6,
                b.stream("outer", torch.zeros(6)))  # fmt: skip
    assert value.item() == pytest.approx(triplet_mean(torch.cat([e for e, _ in parts])[rows]), abs=1e-5)
    sets = [base.batch_norms(model.embedder).values(), *model.norms]
    for norms, (_, wanted) in zip(sets, parts, strict=True):
        for norm, mean in zip(norms, wanted, strict=True):
            torch.testing.assert_close(norm.running_mean, mean)
            assert int(norm.num_batches_tracked) == 1


def test_another_set_of_batch_norms_learns_and_leaves_the_embedders_alone() -> None:
    model, x = learner(norms=2), batch().images
    with torch.no_grad():
        for i, norm in enumerate(model.norms[1]):
            norm.weight.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))
            norm.bias.fill_(0.1 * i)
    before = {k: v.clone() for k, v in model.embedder.state_dict().items()}
    own = base.batch_norms(model.embedder)
    e = model.through(1, x)
    e.square()[:, 0].sum().backward()
    assert all(n.weight.grad is not None for n in model.norms[1])
    assert all(n.weight.grad is None for n in (*own.values(), *model.norms[0]))
    assert all(torch.equal(v, before[k]) for k, v in model.embedder.state_dict().items())
    twin = learner(norms=1)
    for norm, theirs in zip(base.batch_norms(twin.embedder).values(), model.norms[1], strict=True):
        norm.weight.data.copy_(theirs.weight.data), norm.bias.data.copy_(theirs.bias.data)
    torch.testing.assert_close(embedded(twin, x), e.detach())


def test_separate_batch_norms_need_a_network_that_has_some() -> None:
    with pytest.raises(UsageError, match="this network has no batch norm"):
        Learner(learner().embedder, nn.ModuleList(), "triplet", MARGIN, norms=1)


def plain_diversity(cosines, label: int, temperature: float) -> tuple[float, float]:
    """Entropy of the mean prediction and log det(VᵀV + 1e-6) of one image, from (members, classes) cosines."""
    soft = [[math.exp(c / temperature) for c in row] for row in cosines]
    soft = [[v / sum(row) for v in row] for row in soft]
    mean = [sum(column) / len(soft) for column in zip(*soft, strict=True)]
    directions = []
    for row in soft:
        others = np.array([v for c, v in enumerate(row) if c != label])
        directions.append(others / math.sqrt(sum(others**2)))
    gram = [[float(a @ b) + 1e-6 * (a is b) for b in directions] for a in directions]
    return -sum(p * math.log(p) for p in mean), math.log(np.linalg.det(np.array(gram)))


def test_adp_rewards_uncertain_and_different_members() -> None:
    model, b, calls, value = trained("adp", entropy=1.5, diverse=0.3, temperature=0.4)
    assert not calls
    with torch.no_grad():
        e = [nn.functional.normalize(m(b.images), dim=1) for m in model.embedder.network.members]
    losses = [c(x, b.labels).item() for c, x in zip(model.criteria, e, strict=True)]
    expected = sum(losses)
    proxies = [nn.functional.normalize(c.proxies.detach(), dim=1) for c in model.criteria]
    for i in range(6):
        cosines = [[float(x[i] @ p) for p in its] for x, its in zip(e, proxies, strict=True)]
        entropy, diverse = plain_diversity(cosines, int(b.labels[i]), 0.4)
        expected -= (1.5 * entropy + 0.3 * diverse) / 6
    assert value.item() == pytest.approx(expected, rel=1e-4)
    *_, value = run("adp")
    value.backward()
    assert trained("adp", entropy=0.0, diverse=0.0)[-1].item() == pytest.approx(sum(losses))


def test_diversity_is_the_volume_of_the_members_directions() -> None:
    """0 for members that are sure of different wrong classes, of no volume for members that agree."""
    apart = torch.tensor([[[0.6, 0.4, 0.0]], [[0.7, 0.0, 0.3]]])
    alike = torch.tensor([[[0.6, 0.4, 0.0]], [[0.7, 0.3, 0.0]]])
    labels = torch.tensor([0])
    assert float(diversity(apart, labels)[1]) == pytest.approx(0.0, abs=1e-5)
    assert float(diversity(alike, labels)[1]) == pytest.approx(math.log(2e-6), abs=0.1)
    sure = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    assert float(diversity(sure, labels)[0]) == pytest.approx(math.log(2))


def test_adp_needs_a_wrong_class_for_each_member() -> None:
    model = learner("proxy-anchor", ensemble=True)
    model.criteria = nn.ModuleList(build_loss("proxy-anchor", 2, 6, model.embedder.distance, {}) for _ in range(2))
    with pytest.raises(UsageError, match=r"more classes than members.* 2 and 2"):
        DEFENSES["adp"].step(model, batch(), Inner(Threat()))


def test_the_search_follows_the_loss_that_is_trained() -> None:
    """alpha and margin of the proxy-anchor loss are the adversary's too."""
    model, b = learner("proxy-anchor"), batch()
    model.criteria[0] = build_loss("proxy-anchor", 3, 6, model.embedder.distance, {"alpha": 4.0, "margin": 0.3})
    recorder = Recorder(model)
    DEFENSES["at"].step(model, b, Inner(Threat(eps="40/255", step="8/255", steps=2), recorder))
    ((images, _, before, *_),) = recorder.calls
    e = embedded(model, images)
    expected = proxy_anchor_each(e, b.labels, model.criteria[0].proxies, margin=0.3, alpha=4.0).detach()
    torch.testing.assert_close(-before, expected)


def test_ensemble_distance_is_the_mean_of_its_members() -> None:
    model = learner("proxy-anchor", ensemble=True)
    x = batch().images
    whole = embedded(model, x)
    parts = [nn.functional.normalize(m(x), dim=1).detach() for m in model.embedder.network.members]
    for i in range(5):
        square = sum(distance(p[i], p[i + 1]) ** 2 for p in parts) / 2
        assert distance(whole[i], whole[i + 1]) ** 2 == pytest.approx(square, abs=1e-5)


def test_frozen_restores_modes_and_gradients() -> None:
    model = learner()
    model.embedder.network[0].weight.requires_grad_(False)
    model.embedder.network[2].eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("hm", {"sorce": "S"}, "did you mean 'source'"),
        ("hm", {"source": "X"}, "unknown sampling 'X'"),
        ("hm", {"destination": "LGB"}, "did you mean 'LGA'"),
        ("hm", {"ics": "much"}, "must be a float"),
        ("hm", {"destination": "constant", "constant": 0.5}, "must lie in"),
        ("hm", {"ics": -0.5}, "ics -0.5 must be 0"),
        ("hm", {"ics": math.nan}, "ics nan must be 0"),
        ("ca-tride", {"temperature": 0.0}, "must be above 0"),
        ("mdprop", {"targets": 0}, "targets 0 must be 1 or more"),
        ("adp", {"entropy": -1.0}, "entropy -1.0 must be 0 or more"),
        ("adp", {"diverse": math.nan}, "diverse nan must be 0 or more"),
        ("adp", {"temperature": 0.0}, "must be above 0"),
        ("robust", {"element": "q"}, "must be one of a, p, n"),
        ("robust", {"attack_rate": 1.5}, "must lie in"),
    ],
)
def test_bad_parameters(name: str, params: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(name, **params)


def test_unknown_defence() -> None:
    with pytest.raises(UsageError, match="did you mean 'trades'"):
        DEFENSES["trade"]


def test_the_defence_of_the_docs_works() -> None:
    """The example of docs/training.md, as written there, moves the negative towards the anchor."""
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names = {**vars(base), "triplet": triplet, "hardness": hardness}
    exec(code, names)  # our own page
    model, b = learner(), batch()
    recorder = Recorder(model)
    value = names["nearest_negative"](model, b, Inner(Threat(eps="40/255", step="8/255", steps=6), recorder)).detach()
    ((_, moved, before, after, _),) = recorder.calls
    assert float(after.sum()) < float(before.sum())
    rows = Miner(model, b).triplets("R")
    e = torch.stack([*embedded(model, b.images)[rows[:, :2]].unbind(1), embedded(model, moved)], 1)
    assert value.item() == pytest.approx(triplet_mean(e), abs=1e-5)

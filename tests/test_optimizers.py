"""Every optimizer keeps the ball and the range; APGD, Square and the rest minimise functions whose minimum is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.errors import UsageError
from dmlbench.optimizers import OPTIMIZERS, autograd
from dmlbench.optimizers.apgd import apgd, checkpoints
from dmlbench.optimizers.black import estimated
from dmlbench.optimizers.square import _bump, share, side
from dmlbench.rng import Rng
from dmlbench.threat import BALLS, Threat


def bowl(target: torch.Tensor):
    """A quadratic with its lowest point at ``target``."""
    return lambda x: (x - target).flatten(1).square().sum(1)


def best_in_ball(target: torch.Tensor, clean: torch.Tensor, threat: Threat) -> torch.Tensor:
    """The lowest point of the bowl inside the Linf ball and [0, 1]: each pixel alone."""
    return target.clamp(0, 1).minimum(clean + threat.radius).maximum(clean - threat.radius)


def rows(n: int, seed: int = 0) -> Rng:
    return Rng(seed, torch.arange(n))


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000), norm=st.sampled_from(sorted(BALLS)), eps=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    black=st.booleans(), start=st.sampled_from(["clean", "random"]),
)  # fmt: skip
def test_every_optimizer_keeps_the_ball_and_the_range(seed, norm, eps, black, start) -> None:
    draw = rows(3, seed)
    clean = (draw.uniform(2, 6, 6) * 1.6 - 0.3).clamp(0, 1)  # a third of the pixels at an end
    loss = bowl(draw.normal(2, 6, 6) * 2) if black else lambda x: -(x - clean).flatten(1).norm(dim=1)
    threat = Threat(norm=norm, eps=eps, step=0.1, steps=4, queries=12, start=start)
    before = clean.clone()
    for name, optimizer in OPTIMIZERS.items():
        moved = optimizer(loss, clean, threat, rows(3, seed))
        assert moved.shape == clean.shape and bool(threat.contains(moved, clean).all()), name
        assert torch.equal(clean, before), f"{name} wrote into its input"
        if eps == 0:
            assert torch.equal(moved, clean), name


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if not OPTIMIZERS[n].whole_set])
def test_an_image_is_attacked_alone(name: str) -> None:
    clean, goal = rows(5).uniform(1, 6, 6), rows(5, 1).uniform(1, 6, 6)
    threat = Threat(eps=0.2, step=0.05, steps=4, queries=20)
    together = OPTIMIZERS[name](bowl(goal), clean, threat, rows(5))
    some = torch.tensor([3, 1])
    alone = OPTIMIZERS[name](bowl(goal[some]), clean[some], threat, rows(5)[some])
    torch.testing.assert_close(alone, together[some], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name,gap", [
    ("pgd", 0.01), ("pgd-restarts", 0.01), ("mi-fgsm", 0.05), ("apgd", 0.001), ("cw", 0.05), ("spsa", 0.3),
    ("square", 0.5), ("fgsm", 0.5), ("nes", 0.6), ("r-fgsm", 1.0), ("noise", 1.0),
])  # fmt: skip
def test_known_minimum_of_a_bowl(name: str, gap: float) -> None:
    clean, goal = rows(4).uniform(1, 6, 6), rows(4, 1).uniform(1, 6, 6)
    threat = Threat(eps=0.2, step=0.02, steps=40, queries=600)
    loss, best = bowl(goal), best_in_ball(goal, clean, threat)
    moved = OPTIMIZERS[name](loss, clean, threat, rows(4))
    reached = (loss(moved) - loss(best)) / (loss(clean) - loss(best))  # 0 at the minimum, 1 at the clean image
    assert float(reached.max()) < gap and float(reached.min()) > -1e-5


@pytest.mark.parametrize("name,gap", [("apgd", 0.001), ("square", 0.8), ("pgd", 0.01), ("cw", 0.1)])
def test_known_minimum_of_a_bowl_l2(name: str, gap: float) -> None:
    clean = 0.4 + 0.2 * rows(4).uniform(1, 8, 8)  # so far from 0 and 1 that only the ball counts
    goal = clean + 0.3 * rows(4, 1).normal(1, 8, 8)
    threat = Threat(norm="l2", eps=0.3, step=0.03, steps=60, queries=2000)
    moved = OPTIMIZERS[name](bowl(goal), clean, threat, rows(4))
    far = (goal - clean).flatten(1).norm(dim=1)
    lowest, highest = (far - 0.3).square(), far.square()
    assert float(((bowl(goal)(moved) - lowest) / (highest - lowest)).max()) < gap


def test_apgd_needs_no_step_and_finds_narrow_valleys() -> None:
    """A valley bent like Rosenbrock's, where fixed steps of any one length do badly."""
    clean = torch.full((1, 1, 1, 2), 0.2)

    def valley(x):
        a, b = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        return (0.9 - a).square() + 100 * (b - a.square()).square()

    threat = Threat(eps=0.8, step=0.05, steps=400)
    found = valley(apgd(valley, clean, threat, rows(1)))
    fixed = valley(OPTIMIZERS["pgd"](valley, clean, threat, rows(1)))
    assert float(found) < 0.02 < float(fixed)


def test_apgd_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]  # gaps 22, 19, 16, 13, 10, 7, 6, 6
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]


def test_restarts_keep_the_best_of_each_image() -> None:
    def two_pits(x):  # from 0.5 the left pit is nearer, the right one is deeper
        v = x.flatten(1)[:, 0]
        return torch.minimum((v - 0.3).square(), (v - 0.9).square() - 0.1)

    clean = torch.full((6, 1, 1, 1), 0.5)
    one = apgd(two_pits, clean, Threat(eps=0.5, steps=20, start="random"), rows(6))
    ten = apgd(two_pits, clean, Threat(eps=0.5, steps=20, start="random", restarts=10), rows(6))
    assert bool((two_pits(ten) <= two_pits(one) + 1e-6).all())
    assert float((ten - 0.9).abs().max()) < 0.02


class Target:
    """A loss that calls an even image settled once its first pixel was above 0.6, and remembers who was asked."""

    def __init__(self, asked: list, at: torch.Tensor, most: torch.Tensor) -> None:
        self.asked, self.at, self.most = asked, at, most

    def __call__(self, x):
        self.asked.append(self.at.tolist())
        first = x.flatten(1)[:, 0]
        self.most = torch.maximum(self.most, first.detach())
        return -first * (self.at % 2 == 0) + 0 * x.flatten(1).sum(1)

    def __getitem__(self, index):
        return Target(self.asked, self.at[index], self.most[index])

    def unsettled(self):
        return (self.most <= 0.6) | (self.at % 2 == 1)


@pytest.mark.parametrize("name", ["apgd", "square"])
def test_settled_images_are_left_out(name: str) -> None:
    asked: list = []
    clean = torch.full((4, 1, 4, 4), 0.5)
    moved = OPTIMIZERS[name](
        Target(asked, torch.arange(4), torch.zeros(4)), clean, Threat(eps=0.3, steps=40, queries=80), rows(4)
    )
    assert asked[0] == [0, 1, 2, 3] and asked[-1] == [1, 3]
    assert bool((moved[[0, 2], 0, 0, 0] > 0.6).all())


def test_square_window_shrinks_as_in_the_paper() -> None:
    sizes = [side(q, 10_000, 28, 28) for q in (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert sizes == [max(1, round(math.sqrt(0.8 / 2**i * 784))) for i in range(10)]
    assert share(10, 10_000) == 0.8 and share(1, 1000) == 0.8 and share(2, 1000) == 0.4


def test_l2_bump_is_a_pyramid_above_its_negative() -> None:
    size, half = 6, 3
    plain = np.zeros((half, size))
    for y in range(half):
        for x in range(size):
            ring = max(abs(y - half // 2), abs(x - size // 2))
            plain[y, x] = sum(1 / (k + 1) ** 2 for k in range(ring, size // 2 + 1))
    found = _bump(size, torch.device("cpu")).numpy()
    np.testing.assert_allclose(found[:half], plain / np.linalg.norm(np.vstack([plain, plain])), rtol=1e-5)
    np.testing.assert_allclose(found[half:], -found[:half], rtol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1)


def test_estimated_gradient_points_along_the_true_one() -> None:
    x, slope = rows(3).uniform(1, 4, 4), rows(3, 1).normal(1, 4, 4)
    _, g = estimated(
        lambda y: (y * slope).flatten(1).sum(1), 0.3 + 0.4 * x, rows(3), draw=lambda i, r: r.signs(1, 4, 4), length=0.01
    )
    assert bool((torch.nn.functional.cosine_similarity(g.flatten(1), slope.flatten(1)) > 0.7).all())


def test_universal_is_one_perturbation() -> None:
    clean = 0.4 + 0.2 * rows(300).uniform(1, 4, 4)
    moved = OPTIMIZERS["universal"](bowl(torch.ones(1, 1, 4, 4)), clean, Threat(eps=0.1, step=0.02, steps=8), rows(300))
    torch.testing.assert_close(moved - clean, torch.full_like(clean, 0.1), atol=1e-6, rtol=0)


def test_a_loss_without_a_gradient_has_a_zero_one() -> None:
    x = rows(2).uniform(1, 3, 3)
    values, g = autograd(lambda y: (y > 0.5).float().flatten(1).sum(1), x, rows(2))
    assert values.shape == (2,) and torch.equal(g, torch.zeros_like(x))


class Counting:
    """A loss that counts the images it is asked about, with a gradient and without."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.gradients, self.values = rows, torch.zeros(len(rows)), torch.zeros(len(rows))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        counts = self.gradients if x.requires_grad else self.values
        counts += 1
        return (x - 0.3).flatten(1).square().sum(1)


class CountingParts(Counting):
    """The same, that can be asked about some images alone."""

    def __getitem__(self, index):
        part = CountingParts(self.rows[index])
        part.gradients, part.values = self.gradients[index], self.values[index]  # views of a slice
        return part


@pytest.mark.parametrize("kind", [Counting, CountingParts])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 1},
        {"steps": 0},
        {"restarts": 3},
        {"restarts": 12, "start": "random"},
        {"eps": 0.0},
        {"norm": "l2"},
    ],
)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_spends_what_it_states(name: str, changes, kind) -> None:
    threat = Threat(**{"eps": 0.1, "step": 0.02, "steps": 5, "queries": 17, **changes})
    clean, loss = rows(3).uniform(1, 6, 6), kind(torch.arange(3))
    with torch.no_grad():  # as attacks are crafted
        OPTIMIZERS[name](loss, clean, threat, rows(3))
    gradients, values = OPTIMIZERS[name].passes(threat)
    assert loss.gradients.tolist() == [gradients] * 3 and loss.values.tolist() == [values] * 3
    assert OPTIMIZERS[name].passes(threat.but(eot=4)) == (4 * gradients, 4 * values)


def test_square_refuses_triplets() -> None:
    with pytest.raises(UsageError, match="needs images"):
        OPTIMIZERS["square"](lambda x: x.flatten(1).sum(1), torch.rand(2, 3, 1, 4, 4), Threat(), rows(2))

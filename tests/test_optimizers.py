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


# --- the published algorithms once more, picture by picture in numpy -------------------------------------------


class Wavy:
    """Pictures of three channels, and for each a bowl with waves in it, in float64: once for torch, once for numpy."""

    def __init__(self, side: int, waves: float = 0.2, count: int = 3) -> None:
        draw = rows(count, 21)
        self.clean, self.low = (draw.uniform(3, side, side).double() for _ in range(2))
        self.weight, self.waves = 0.1 + draw.uniform(3, side, side).double(), waves

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * ((x - self.low) ** 2 + self.waves * torch.cos(20 * x))).flatten(1).sum(1)

    def one(self, i: int):
        """The picture i, the value of its loss and the slope: (3, h, w) to a number and to (3, h, w)."""
        low, weight = self.low[i].numpy(), self.weight[i].numpy()
        return (
            self.clean[i].numpy(),
            lambda x: float((weight * ((x - low) ** 2 + self.waves * np.cos(20 * x))).sum()),
            lambda x: weight * (2 * (x - low) - 20 * self.waves * np.sin(20 * x)),
        )


def size(delta, threat: Threat) -> float:
    return float(np.abs(delta).max() if threat.norm == "linf" else np.sqrt((delta**2).sum()))


def back(x, clean, threat: Threat):
    """The nearest picture of the ball, and of those in [0, 1]."""
    delta = x - clean
    if threat.norm == "linf":
        delta = np.clip(delta, -threat.radius, threat.radius)
    elif size(delta, threat) > threat.radius:
        delta = delta * threat.radius / size(delta, threat)
    return np.clip(clean + delta, 0, 1)


def steepest(slope, threat: Threat):
    return np.sign(slope) if threat.norm == "linf" else slope / size(slope, threat)


def plain_pgd(clean, value, slope, threat, draw, saw):
    x = clean
    for _ in range(threat.steps):
        x = back(x - threat.stride * steepest(slope(x), threat), clean, threat)
    return x


def plain_fgsm(clean, value, slope, threat, draw, saw):
    return back(clean - threat.radius * steepest(slope(clean), threat), clean, threat)


def plain_r_fgsm(clean, value, slope, threat, draw, saw):
    x = back(clean + threat.radius / 2 * steepest(draw("normal", *clean.shape), threat), clean, threat)
    return back(x - threat.radius / 2 * steepest(slope(x), threat), clean, threat)


def plain_mi_fgsm(clean, value, slope, threat, draw, saw):
    """Dong et al., algorithm 1: g <- g + slope / |slope|_1."""
    x, g = clean, np.zeros_like(clean)
    for _ in range(threat.steps):
        g = g + slope(x) / np.abs(slope(x)).sum()
        if size(steepest(g, threat) - steepest(slope(x), threat), threat) > 0.1:
            saw.add("another way than the slope")
        x = back(x - threat.stride * steepest(g, threat), clean, threat)
    return x


def plain_apgd(clean, value, slope, threat, draw, saw):
    """Croce and Hein, algorithm 1, minimising; the step is halved, and the search goes on from the best image, where

    1. fewer than 75 % of the steps since the last checkpoint lowered the loss, or
    2. at that checkpoint the step was not halved, and the lowest loss is still what it was there.
    """
    x = last = best = clean
    step, marks, mark, gains, halved, lowest_then = 2 * threat.radius, checkpoints(threat.steps), 0, 0, True, value(x)
    for k in range(1, threat.steps + 1):
        z = back(x - step * steepest(slope(x), threat), clean, threat)
        new = z if k == 1 else back(x + 0.75 * (z - x) + 0.25 * (x - last), clean, threat)
        gains += value(new) < value(x)
        last, x = x, new
        if value(x) < value(best):
            best = x
        if k in marks:
            first, second = gains < 0.75 * (k - mark), not halved and value(best) == lowest_then
            saw.add(f"first {first}, second {second}")
            mark, gains, halved, lowest_then = k, 0, first or second, value(best)
            if halved:
                step, x = step / 2, best
    return best


def plain_cw(clean, value, slope, threat, draw, saw):
    """Carlini and Wagner, section VI: Adam on w with x = (tanh w + 1) / 2, and a search for the weight c of the loss."""
    low, high, c, best = 0.0, math.inf, 1.0, clean
    for _ in range(6):
        w = np.arctanh(0.98 * (2 * clean - 1))
        mean, square = np.zeros_like(w), np.zeros_like(w)
        for i in range(1, threat.steps + 1):
            x = (np.tanh(w) + 1) / 2
            if size(x - clean, threat) <= threat.radius and value(x) < value(best):
                best = x
            past = np.abs(x - clean) > threat.radius  # Linf: the slope of the sum of what passes eps
            pull = np.sign(x - clean) * past if threat.norm == "linf" else 2 * (x - clean)
            g = (pull + c * slope(x)) * (1 - np.tanh(w) ** 2) / 2
            mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
            w = w - 5 / threat.steps * (mean / (1 - 0.9**i)) / (np.sqrt(square / (1 - 0.999**i)) + 1e-8)
        x = (np.tanh(w) + 1) / 2
        if value(back(x, clean, threat)) < value(best):
            best = back(x, clean, threat)
        if size(x - clean, threat) <= threat.radius:
            low = c
        else:
            high = c
        saw.add("raised" if high == math.inf else "bisected")
        c = c * 10 if high == math.inf else (low + high) / 2
    return best


def plain_estimate(value, probe: float, noise):
    """The slope from 50 mirrored pairs of probes, clipped to [0, 1]."""

    def slope(x):
        total = np.zeros_like(x)
        for _ in range(50):
            u = noise()
            total += (value(np.clip(x + probe * u, 0, 1)) - value(np.clip(x - probe * u, 0, 1))) / (2 * probe) * u / 50
        return total

    return slope


def plain_nes(clean, value, slope, threat, draw, saw):
    """Normal noise of sigma 2 eps; at 224x224 each number of a 32x32 picture fills 7x7 pixels."""

    def noise():
        if clean.shape != (3, 224, 224):
            return draw("normal", *clean.shape)
        return np.stack([np.kron(channel, np.ones((7, 7))) for channel in draw("normal", 3, 32, 32)])

    return plain_pgd(clean, value, plain_estimate(value, 2 * threat.radius, noise), threat, draw, saw)


def plain_spsa(clean, value, slope, threat, draw, saw):
    guessed = plain_estimate(value, 0.01, lambda: draw("signs", *clean.shape))
    return plain_pgd(clean, value, guessed, threat, draw, saw)


def plain_square(clean, value, slope, threat, draw, saw):
    """Andriushchenko et al., algorithms 1 and 2: stripes, then windows of one colour; each channel has a sign of its own."""
    channels, height, width = clean.shape
    stripes, x = draw("signs", channels, 1, width), clean.copy()
    for c in range(channels):
        for column in range(width):
            x[c, :, column] += threat.radius * stripes[c, 0, column]
    best = back(x, clean, threat)
    for query in range(1, threat.queries):
        s = side(query, threat.queries, height, width)
        top, left = int(draw("integers", height - s + 1)), int(draw("integers", width - s + 1))
        signs, x = draw("signs", channels, 1, 1)[:, 0, 0], best.copy()
        for c in range(channels):
            window = (c, slice(top, top + s), slice(left, left + s))
            x[window] = clean[window] + threat.radius * signs[c]
        if value(back(x, clean, threat)) < value(best):
            best = back(x, clean, threat)
            saw.add("one sign" if len(set(signs)) == 1 else "two signs")
    return best


def plain_noise(clean, value, slope, threat, draw, saw):
    """In turn uniform in the ball, and as far out as it goes: the signs of normal noise (Linf) or its direction (L2)."""
    tries = []
    for i in range(threat.queries):
        if i % 2:
            delta = threat.radius * steepest(draw("normal", *clean.shape), threat)
        elif threat.norm == "linf":
            delta = threat.radius * (2 * draw("uniform", *clean.shape) - 1)
        else:
            direction = steepest(draw("normal", *clean.shape), threat)
            delta = threat.radius * direction * draw("uniform") ** (1 / clean.size)
        tries.append(back(clean + delta, clean, threat))
    best = min(range(threat.queries), key=lambda i: value(tries[i]))
    saw.add("corner" if best % 2 else "inside")
    return tries[best]


TWINS = [
    *[
        (twin, norm, *case)
        for norm in ("linf", "l2")
        for twin, *case in (
            (plain_pgd, 6, 0.2, {}, set()),
            (plain_fgsm, 6, 0.2, {}, set()),
            (plain_r_fgsm, 6, 0.2, {}, set()),
            (plain_mi_fgsm, 6, 0.2, {}, {"another way than the slope"}),
            (plain_nes, 4, 0.2, {"steps": 2}, set()),
            (plain_spsa, 4, 0.2, {"steps": 2}, set()),
            (plain_noise, 1, 0.0, {"queries": 6}, {"inside", "corner"}),
        )
    ],
    (plain_apgd, "linf", 4, 0.1, {"steps": 20}, {"first False, second True"}),
    (plain_apgd, "l2", 4, 0.5, {"steps": 20, "eps": 0.5}, {"first False, second True"}),
    (plain_cw, "linf", 2, 0.2, {"steps": 16}, {"raised", "bisected"}),
    (plain_cw, "l2", 2, 0.05, {"steps": 8}, {"raised", "bisected"}),
    (plain_nes, "linf", 224, 0.2, {"steps": 1}, set()),
    (plain_square, "linf", 6, 0.2, {"queries": 12}, {"two signs"}),
]
"""A twin of an optimizer, the norm, the width of the pictures, the height of the waves, what the threat says, and what must
happen to some picture for the case to tell the search from a lesser one."""


def written(twin) -> str:
    """The optimizer that a function here is the twin of."""
    return twin.__name__.removeprefix("plain_").replace("_", "-")


@pytest.mark.parametrize(
    ("twin", "norm", "width", "waves", "threat", "happens"),
    TWINS,
    ids=[f"{written(t)}-{n}-{w}" for t, n, w, *_ in TWINS],
)
def test_a_search_is_that_of_the_plain_loop(twin, norm: str, width: int, waves: float, threat, happens) -> None:
    loss, saw = Wavy(width, waves, count=3 if width < 224 else 1), set()
    threat = Threat(**{"norm": norm, "eps": 0.2 if norm == "linf" else 1.0, "step": 0.05, "steps": 5, **threat})
    found = OPTIMIZERS[written(twin)](loss, loss.clean, threat, rows(len(loss.clean), 8))
    for i, picture in enumerate(found.numpy()):
        rng = Rng(8, torch.tensor([i]))
        plain = twin(*loss.one(i), threat, lambda kind, *of, rng=rng: getattr(rng, kind)(*of)[0].numpy(), saw)
        np.testing.assert_allclose(picture, plain, atol=1e-6)
    assert happens <= saw


@pytest.mark.parametrize("norm", list(BALLS))
def test_the_shared_perturbation_is_that_of_the_plain_loop(norm: str) -> None:
    loss, threat = Wavy(4), Threat(norm=norm, eps=0.2 if norm == "linf" else 1.0, step=0.15, steps=9)
    found = OPTIMIZERS["universal"](loss, loss.clean, threat, rows(3))
    pictures = [loss.one(i) for i in range(3)]
    shared = np.zeros_like(pictures[0][0])
    for _ in range(threat.steps):
        total = sum(slope(back(clean + shared, clean, threat)) for clean, _, slope in pictures)
        shared = shared - threat.stride * steepest(total, threat)
        shared = shared * min(1, threat.radius / size(shared, threat)) if norm == "l2" else shared.clip(-0.2, 0.2)
    for i, (clean, _, _) in enumerate(pictures):
        np.testing.assert_allclose(found[i].numpy(), back(clean + shared, clean, threat), atol=1e-6)


class Side:
    """The side of a bent line that a picture of three channels is on, in float64: 0 or less on the far one; it can show such a picture."""

    def __init__(self, shows: bool) -> None:
        draw = rows(3, 31)
        self.clean, self.weight = 0.25 + 0.1 * draw.uniform(3, 4, 4).double(), draw.normal(3, 4, 4).double()
        if shows:
            self.shown = lambda: (self.clean - 0.6 * self.weight.sign()).clamp(0, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 0.8 + (self.weight * (x - self.clean) + 0.3 * (x - self.clean) ** 2).flatten(1).sum(1)

    def one(self, i: int):
        clean, weight = self.clean[i].numpy(), self.weight[i].numpy()
        return clean, lambda x: 0.8 + (weight * (x - clean) + 0.3 * (x - clean) ** 2).sum() <= 0


def plain_hopskipjump(clean, flipped, threat, draw, shown):
    """Chen, Jordan and Wainwright, algorithm 2, until the queries are spent: (nearest flipped picture, how often it went round)."""
    pixels, best, left, turns = clean.size, None, threat.queries, 0

    class Spent(Exception):
        pass

    def ask(x) -> bool:
        nonlocal best, left
        if left == 0:
            raise Spent
        left -= 1
        if flipped(x) and (best is None or size(x - clean, threat) < size(best - clean, threat)):
            best = x
        return flipped(x)

    def towards(x, alpha):
        return clean + np.clip(x - clean, -alpha, alpha) if threat.norm == "linf" else (1 - alpha) * clean + alpha * x

    def boundary(x):
        low, high = 0.0, size(x - clean, threat) if threat.norm == "linf" else 1.0
        theta = 1 / pixels**2 if threat.norm == "linf" else 1 / (math.sqrt(pixels) * pixels)
        width = high
        while high - low > theta * width:
            middle = (low + high) / 2
            low, high = (low, middle) if ask(towards(x, middle)) else (middle, high)
        return towards(x, high)

    try:
        x = clean
        if shown is not None:
            assert ask(shown)
            x = shown
        else:
            tries = [(tried := draw("uniform", *clean.shape), ask(tried)) for _ in range(20)]
            x = next((tried for tried, hit in tries if hit), clean)
        for t in range(1, 1000):
            x = boundary(x)
            away = size(x - clean, threat)
            delta = 0.1 if t == 1 else away / pixels
            steps, signs = [], []
            for _ in range(int(100 * math.sqrt(t))):
                u = 2 * draw("uniform", *clean.shape) - 1 if threat.norm == "linf" else draw("normal", *clean.shape)
                probe = np.clip(x + delta * u / np.sqrt((u**2).sum()), 0, 1)
                steps.append((probe - x) / delta)
                signs.append(1.0 if ask(probe) else -1.0)
            mean = np.mean(signs)
            if abs(mean) == 1:
                slope = mean * np.mean(steps, axis=0)
            else:
                slope = np.mean([(s - mean) * step for s, step in zip(signs, steps, strict=True)], axis=0)
            candidates = [np.clip(x + away / math.sqrt(t) / 2**k * steepest(slope, threat), 0, 1) for k in range(10)]
            x = next((c for c, hit in [(c, ask(c)) for c in candidates] if hit), x)
            turns += 1
    except Spent:
        pass
    return clean if best is None else best, turns


@pytest.mark.parametrize("norm", list(BALLS))
@pytest.mark.parametrize("shows", [True, False])
def test_the_search_by_decisions_is_that_of_the_plain_loop(norm: str, shows: bool) -> None:
    loss = Side(shows)
    threat = Threat(norm=norm, eps=1.0 if norm == "linf" else 9.0, queries=470)
    found = OPTIMIZERS["hopskipjump"](loss, loss.clean, threat, rows(3, 8))
    for i, picture in enumerate(found.numpy()):
        rng = Rng(8, torch.tensor([i]))
        shown = loss.shown()[i].numpy() if shows else None
        plain, turns = plain_hopskipjump(
            *loss.one(i), threat, lambda kind, *of, rng=rng: getattr(rng, kind)(*of)[0].double().numpy(), shown
        )
        assert turns >= 2 and loss.one(i)[1](plain) and size(plain - loss.clean[i].numpy(), threat) > 0
        np.testing.assert_allclose(picture, plain, atol=1e-6)


def test_the_search_by_decisions_comes_near_the_line() -> None:
    """A straight boundary whose distance is known; what is outside the ball is brought into it, and is then not flipped."""
    weight = rows(3, 5).normal(3, 4, 4).double()
    clean = torch.full_like(weight, 0.5)
    lengths = weight.flatten(1).norm(dim=1)

    def side(x):
        return 0.3 * lengths + (weight * (x - clean)).flatten(1).sum(1)

    near = Threat(norm="l2", eps=5.0, queries=4000)
    far = (OPTIMIZERS["hopskipjump"](side, clean, near, rows(3, 2)) - clean).flatten(1).norm(dim=1)
    assert bool(((far >= 0.3) & (far < 0.33)).all())
    small = OPTIMIZERS["hopskipjump"](side, clean, near.but(eps=0.2), rows(3, 2))
    assert bool((side(small) > 0).all()) and bool(near.but(eps=0.2).contains(small, clean).all())


def test_every_optimizer_has_a_twin() -> None:
    """That of cosine is in test_strict_rounds.py, where the runs are made of it; restarts are PGD's, with a test above."""
    others = {"universal", "cosine", "pgd-restarts", "hopskipjump"}
    assert {written(twin) for twin, *_ in TWINS} | others == set(OPTIMIZERS)

"""Images whose hinge is satisfied leave PGD, and nothing that is read changes by a bit."""

import numpy as np
import pytest
import torch

import dmlbench
from dmlbench.attacks import ATTACKS, AttackLoss
from dmlbench.evaluate import evaluate
from dmlbench.fast import sweep
from dmlbench.objectives import OBJECTIVES
from dmlbench.optimizers import OPTIMIZERS, gradient, watched
from dmlbench.protocols import load_protocol
from dmlbench.rng import Rng
from dmlbench.run.search import aimed, searches
from dmlbench.run.subject import prepare
from dmlbench.threat import Threat

MODEL = "digits-smallcnn-triplet-none"


class Fence:
    """relu(image's sum - its fence), a hinge; ``asked`` remembers who was asked, ``broken`` whose gradient is NaN."""

    steady = True

    def __init__(
        self, fence: torch.Tensor, asked: list, broken: int | None = None, at: torch.Tensor | None = None
    ) -> None:
        self.fence, self.asked, self.broken = fence, asked, broken
        self.at = torch.arange(len(fence)) if at is None else at

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(self.at.tolist())
        values = (x.flatten(1).sum(1) - self.fence[self.at]).relu()
        return values * torch.where(self.at == (-1 if self.broken is None else self.broken), torch.nan, 1.0)

    def thinned(self, alive: torch.Tensor) -> "Fence":
        return Fence(self.fence, self.asked, self.broken, self.at[alive])


def plainly(loss: Fence, images: torch.Tensor, threat: Threat) -> torch.Tensor:
    """PGD of a fence without anybody leaving, pixel by pixel."""
    out = images.clone()
    for image, clean, fence in zip(out, images, loss.fence.tolist(), strict=True):
        for _ in range(threat.steps):
            if float(image.sum()) > fence:
                image.copy_((image - threat.stride).maximum(clean - threat.radius).clamp(0, 1))
    return out


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_satisfied_images_leave_and_stay_what_they_were(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, threat = 40, Threat(norm=norm, eps=0.4 if norm == "linf" else 2.0, step=0.03, steps=12)
    images = 0.3 + 0.5 * Rng(0, torch.arange(count)).uniform(1, 3, 3)
    fence = images.flatten(1).sum(1) - torch.linspace(-1, 5, count)  # some never, some soon, some not within 12 steps
    asked: list = []
    found = OPTIMIZERS["pgd"](Fence(fence, asked), images, threat, Rng(0, torch.arange(count)))
    if norm == "linf":
        torch.testing.assert_close(found, plainly(Fence(fence, []), images, threat), rtol=0, atol=1e-6)
    assert len(asked[0]) == count and gradient.LEAST <= len(asked[-1]) < count
    last = (found.flatten(1).sum(1) > fence).nonzero()[:, 0].tolist()
    assert set(last) <= set(asked[-1])  # who is not satisfied stays
    monkeypatch.setattr(gradient, "SHARE", 2.0)
    everyone: list = []
    whole = OPTIMIZERS["pgd"](Fence(fence, everyone), images, threat, Rng(0, torch.arange(count)))
    assert torch.equal(found, whole) and {len(at) for at in everyone} == {count}


def test_a_search_ends_once_everybody_is_satisfied() -> None:
    asked: list = []
    images, rng = torch.full((20, 1, 2, 2), 0.5), Rng(0, torch.arange(20))
    threat = Threat(eps=0.5, step=0.05, steps=50)
    OPTIMIZERS["pgd"](Fence(torch.full((20,), 1.9), asked), images, threat, rng)
    assert len(asked) == gradient.LOOK_EVERY


def test_nobody_leaves_where_gradients_are_not_numbers_or_losses_make_no_promise() -> None:
    images, rng = torch.full((40, 1, 2, 2), 0.5), Rng(0, torch.arange(40))
    threat, fence = Threat(eps=0.5, step=0.05, steps=9), torch.full((40,), 1.9)
    for loss in (Fence(fence, [], broken=3), Fence(fence, [])):
        loss.steady = loss.broken is not None
        with watched() as trouble:
            OPTIMIZERS["pgd"](loss, images, threat, rng)
        assert [len(at) for at in loss.asked] == [40] * 9
        assert trouble.count == (9 if loss.steady else 0)  # every step of the broken one is counted


def test_only_float32_on_a_cpu_of_a_model_without_doubts_promises() -> None:
    subject = prepare(dmlbench.load_model(MODEL), dmlbench.load_dataset("digits"), limit=8, device="cpu")
    loss = AttackLoss(subject.embedder, OBJECTIVES["match"], subject.scene)
    assert loss.steady and loss.thinned(torch.arange(8) < 4).steady
    assert not AttackLoss(subject.embedder, OBJECTIVES["match"], subject.scene, eot=2).steady
    for attribute, value in (("precision", "bfloat16"), ("precision", "int8"), ("doubts", (("randomised", "it is"),))):
        kept = getattr(subject.embedder, attribute)
        setattr(subject.embedder, attribute, value)
        assert not loss.steady
        setattr(subject.embedder, attribute, kept)


@pytest.mark.parametrize("attack", ["CA+", "CA-", "LTM"])
def test_blocks_stay_as_they_were_for_who_is_left(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of some images of a batch by whose size the gallery is cut into blocks."""
    monkeypatch.setattr(sweep, "CPU_BLOCK", 1 << 14)
    subject = prepare(dmlbench.load_model(MODEL), dmlbench.load_dataset("digits"), limit=160, device="cpu")
    rules = load_protocol("ers-digits")
    search = next(s for s in searches(rules, rules.components) if s.attack == attack)
    images, rng = subject.images(0, 160), subject.rng(0)
    loss = AttackLoss(subject.embedder, OBJECTIVES[ATTACKS[attack].objective], aimed(subject, search, 0))
    values, slopes = gradient.autograd(loss, images, rng)
    half, few = torch.arange(160) < 80, torch.arange(80) % 4 == 0
    left = loss.thinned(half).thinned(few)
    assert left.scene.abreast == 160 and len(left.scene) == 20
    some = gradient.autograd(left, images[:80:4], rng)
    assert torch.equal(some[0], values[:80:4]) and torch.equal(some[1], slopes[:80:4])


def test_a_whole_run_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = dmlbench.load_model(MODEL), load_protocol("ers-digits")
    options = {"attacks": ["QA+", "CA-", "TMA"], "limit": 256, "device": "cpu"}
    left: list[int] = []
    thinned = AttackLoss.thinned

    def noted(self: AttackLoss, alive: torch.Tensor) -> AttackLoss:
        left.append(int((~alive).sum()))
        return thinned(self, alive)

    monkeypatch.setattr(AttackLoss, "thinned", noted)
    found = evaluate(model, "digits", rules, **options)
    assert sum(left) >= 32  # many of them do leave
    monkeypatch.setattr(gradient, "SHARE", 2.0)
    whole, before = evaluate(model, "digits", rules, **options), len(left)
    assert len(left) == before
    for name, values in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], values)
    for name, values in whole.sample.items():
        np.testing.assert_array_equal(found.sample[name], values)

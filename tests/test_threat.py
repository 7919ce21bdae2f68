"""The ball of each norm: every search stays inside, whatever the input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlbench.errors import UsageError
from dmlbench.rng import Rng
from dmlbench.threat import BALLS, Threat, length


@pytest.mark.parametrize("norm", list(BALLS))
@given(eps=st.floats(0, 1), seed=st.integers(0, 2**40), scale=st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_projection_and_samples_stay_inside(norm: str, eps: float, seed: int, scale: float) -> None:
    rng = Rng(seed, torch.arange(3))
    clean = rng.uniform(2, 4, 4)
    threat = Threat(norm=norm, eps=eps)
    wild = clean + scale * rng.normal(2, 4, 4)
    assert threat.contains(threat.project(wild, clean), clean).all()
    assert threat.contains(threat.sample(clean, rng), clean).all()
    inside = threat.project(wild, clean)
    torch.testing.assert_close(threat.project(inside, clean), inside)


@pytest.mark.parametrize("norm", list(BALLS))
def test_ascent_is_the_steepest_unit_step(norm: str) -> None:
    rng = Rng(1, torch.arange(2))
    g = rng.normal(3, 5, 5)
    step = BALLS[norm].ascent(g)
    torch.testing.assert_close(BALLS[norm].size(step), torch.ones(2))
    gain = (step * g).flatten(1).sum(1)
    for _ in range(50):
        other = rng.normal(3, 5, 5)
        other = other / BALLS[norm].size(other).view(-1, 1, 1, 1)
        assert ((other * g).flatten(1).sum(1) <= gain + 1e-4).all()


def test_contains_refuses_what_is_outside() -> None:
    clean = torch.full((1, 1, 2, 2), 0.5)
    assert not Threat(eps=0.1).contains(clean + 0.11, clean)
    assert not Threat(norm="l2", eps=0.1).contains(clean + 0.06, clean)
    assert not Threat(eps=1).contains(clean + 0.6, clean)


def test_lengths_in_words() -> None:
    assert length("8/255") == pytest.approx(8 / 255)
    for bad in ("8/0", "x", "-1/255"):
        with pytest.raises(UsageError):
            length(bad)
    with pytest.raises(UsageError, match="outside"):
        Threat(eps="300/255")
    with pytest.raises(UsageError, match="did you mean 'linf'"):
        Threat(norm="linff")


def test_streams_belong_to_images() -> None:
    whole, part = Rng(5, torch.arange(10)), Rng(5, torch.arange(4, 7))
    torch.testing.assert_close(whole.uniform(3)[4:7], part.uniform(3), rtol=0, atol=0)
    later = whole[torch.arange(10) > 7].normal(2)
    torch.testing.assert_close(later, whole.normal(2)[8:], rtol=0, atol=0)


def test_streams_are_random() -> None:
    u = Rng(3, torch.arange(200)).uniform(500)
    assert abs(float(u.mean()) - 0.5) < 0.005 and abs(float(u.var()) - 1 / 12) < 0.002
    assert abs(float(torch.corrcoef(u[:2])[0, 1])) < 0.15
    n = Rng(3, torch.arange(200)).normal(500)
    assert abs(float(n.mean())) < 0.02 and abs(float(n.std()) - 1) < 0.02
    assert set(Rng(3, torch.arange(200)).integers(4, 50).unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [{"steps": 3.5}, {"eot": 1.5}, {"restarts": True}, {"queries": "10"}, {"eps": True}])
def test_a_threat_is_made_of_numbers_of_their_kind(wrong) -> None:
    (key,) = wrong
    with pytest.raises(UsageError, match=f"{key} .* is not a"):
        Threat.of({"eps": "8/255", **wrong})
    assert Threat.of({"eps": "8/255", "steps": 3}) == Threat(eps="8/255", steps=3)

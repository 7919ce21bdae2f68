"""The adversary beside clustering's own: its soft NMI, and that a search stays in the ball and lowers what it reads."""

import clustering_truth as truth
import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

import dmlbench
from dmlbench.kinds.clustering import search as clustering
from dmlbench.kinds.clustering import summary
from dmlbench.run.subject import prepare


def test_soft_nmi_of_hard_clusters_is_scikit_learns() -> None:
    e = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 2, 0, 2, 1]), 3).float()
    classes = torch.tensor([0, 1, 1, 0, 0, 2, 2])
    wanted = normalized_mutual_info_score(classes, e.argmax(1))
    assert float(truth.soft_nmi(e, classes, torch.eye(3), 1e-3)) == pytest.approx(wanted, abs=1e-4)


def test_the_slope_in_pixels_is_that_of_differences() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    x, classes = torch.rand(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    middles = [torch.randn(3, 3, dtype=torch.float64)]
    g, at, h = truth.slope(network, x, classes, middles, 0.5), (2, 0, 1, 0), 1e-5

    def value(shift: float) -> float:
        moved = x.clone()
        moved[at] += shift
        with torch.no_grad():
            return float(truth.soft_nmi(network(moved), classes, middles[0], 0.5))

    assert float(g[at]) == pytest.approx((value(h) - value(-h)) / (2 * h), rel=1e-3)


def test_a_short_hunt_lowers_nmi() -> None:
    subject = prepare(dmlbench.load_model("digits-smallcnn-triplet-none"), dmlbench.load_dataset("digits"), limit=80)
    low, lows = truth.hunt(subject, 40 / 255, 2, 6, 3, (0, 1))
    clean = clustering.readings(subject, subject.scene.clean, subject.scene.labels.numpy(), (0, 1))
    labels = subject.scene.labels.numpy()
    assert low == min(lows) and len(lows) == 2
    assert low < summary.numbers(labels, clean["clusters"], np.zeros(80))["nmi"] - 5

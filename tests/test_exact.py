"""Results are read in true float32, whatever torch is set to, and its settings are put back."""

import numpy as np
import pytest
import torch
from torch import nn

import dmlbench
from dmlbench.evaluate import evaluate
from dmlbench.fast.exact import settings, true_float32


def standing():
    return [setting.read() for setting in settings()]


@pytest.fixture
def loose():
    """A program that lets torch compute float32 products in less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_settings_are_exact_within_and_put_back_after_an_error(loose):
    before = standing()
    with pytest.raises(KeyError), true_float32():
        assert standing() == [setting.exact for setting in settings()]
        with true_float32():
            pass
        assert standing() == [setting.exact for setting in settings()]
        raise KeyError
    assert standing() == before != [setting.exact for setting in settings()]


def test_a_program_that_allows_less_changes_no_result(loose):
    options = {"limit": 24, "batch_size": 24, "device": "cpu", "attacks": ["TMA", "LTM"]}
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    rough = a @ b
    less = evaluate("digits-smallcnn-triplet-none", **options)
    torch.set_float32_matmul_precision("highest")
    if torch.equal(rough, a @ b):
        pytest.skip("products on this machine are the same at any setting")
    full = evaluate("digits-smallcnn-triplet-none", **options)
    for name, values in full.arrays.items():
        np.testing.assert_array_equal(values, less.arrays[name], err_msg=name)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reads_convolutions_in_float32():
    """TF32, which torch allows cuDNN by default, is wrong by about 1e-3 here."""
    network = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten())
    model = dmlbench.load_model(network, input_shape=(64, 12, 12)).eval()
    images = torch.rand(4, 64, 12, 12)
    wanted = nn.functional.normalize(network.double()(images.double()), dim=1).float()
    network.float()
    on = model.cuda()
    with torch.no_grad(), true_float32():
        found = on(images.cuda()).cpu()
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)

"""The refiner: its starting point and its warm start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.refine import Refiner
from models.unet import DualModalUNet
from tests.test_unet import CONFIG, SIZES, noise, randomised


def test_refinement_starts_from_the_blend():
    network, x = Refiner(SIZES, CONFIG), noise()
    assert torch.equal(network("b", x["a"], x["b"]), x["b"])
    network.net("b").blend.copy_(torch.tensor([0.5, 2.0, 0.25]))
    torch.testing.assert_close(network("b", torch.ones_like(x["a"]), x["b"]), 0.5 * x["b"] + 2.25)


@pytest.mark.parametrize("fusion, groups", [("late", 0), ("early", 0), ("early", 2)])
def test_a_warm_start_is_the_prior_at_fixed_timesteps(fusion, groups):
    torch.manual_seed(0)
    config, x, clean, t = replace(CONFIG, fusion=fusion), noise(2), torch.tensor([0, 0]), torch.tensor([500, 500])
    prior, refiner = randomised(DualModalUNet(SIZES, config, groups)), Refiner(SIZES, config)
    refiner.set_means({modality: prior.net(modality).mean[:1] for modality in SIZES})
    refiner.start_from(prior, 500)
    assert torch.equal(refiner("b", x["a"], x["b"]), x["b"])  # the head is still zero
    net = prior.net("b")
    refiner.net("b").head.load_state_dict(net.head.state_dict())
    gain = net.gain(nn.functional.silu(net.condition(clean, t, clean)[1]))[:, :, None, None, None]
    expected = prior(x, {"a": clean, "b": t})["b"] - gain * x["b"] + x["b"]
    torch.testing.assert_close(refiner("b", x["a"], x["b"]), expected, atol=1e-4, rtol=1e-4)

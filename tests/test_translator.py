"""The translator: one evaluation at t = T without noise."""

import pytest
import torch

from models.translator import Translator
from models.unet import DualModalUNet
from tests.test_unet import CONFIG, SIZES, noise, randomised


@pytest.mark.parametrize("groups", [0, 2])
def test_it_is_minus_the_network_at_the_last_timestep_without_noise(groups):
    torch.manual_seed(0)
    network, x = randomised(DualModalUNet(SIZES, CONFIG, groups)), noise(2)
    t, nothing = {"a": torch.tensor([0, 0]), "b": torch.tensor([900, 900])}, torch.zeros_like(x["b"])
    translator = Translator(network, 900)
    assert torch.equal(translator("b", x["a"]), -network({"a": x["a"], "b": nothing}, t)["b"])
    assert torch.equal(translator("b", x["a"], x["b"]), -network(x, t)["b"])  # a coarse volume in the noise's place
    assert not torch.allclose(translator("b", x["a"]), translator("b", x["a"], x["b"]))


def test_source_and_mean_reach_the_output_directly():
    """A new network with gains alone is a blend of noisy target, source on the target's grid, and mean."""
    network, x = DualModalUNet(SIZES, CONFIG), noise()
    network.set_means({modality: torch.full_like(network.net(modality).mean, 3.0) for modality in SIZES})
    with torch.no_grad():
        network.net("b").gain.bias.copy_(torch.tensor([-0.5, -2.0, -0.25]))
    output = Translator(network, 900)("b", torch.ones_like(x["a"]), x["b"])
    torch.testing.assert_close(output, 0.5 * x["b"] + 2.75)


def test_the_mean_of_flips_does_not_change_when_the_source_is_mirrored():
    torch.manual_seed(0)
    translator, x = Translator(randomised(DualModalUNet(SIZES, CONFIG), 0.05), 900), noise()
    one, other = (translator.translate("b", volume, flips=True) for volume in (x["a"], x["a"].flip(2)))
    torch.testing.assert_close(one, other.flip(2), atol=1e-5, rtol=0)
    single = translator.translate("b", x["a"])
    assert not torch.allclose(one, single, atol=1e-3) and 0 < single.abs().max() <= 1 and not single.requires_grad
    translator.network.set_means({modality: torch.full((1, 1, *size), 100.0) for modality, size in SIZES.items()})
    assert translator.translate("b", x["a"], flips=True).abs().max() == 1

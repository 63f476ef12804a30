"""The dual-modal network: any grid, every weight, groups, gradient checkpointing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models.layers import Attention, resize_to
from models.unet import DualModalUNet, NetworkConfig

SIZES = {"a": (11, 14, 13), "b": (17, 12, 15)}
CONFIG = NetworkConfig(channels=8, depth=3, blocks=2, output_blocks=2, patch=1, fusion="early", attention_tokens=500,
                       dropout=0.0)
T5 = {modality: torch.tensor([5]) for modality in SIZES}


def noise(batch: int = 1) -> dict[str, torch.Tensor]:
    return {modality: torch.randn(batch, 1, *size) for modality, size in SIZES.items()}


def randomised(network: nn.Module, std: float = 0.1) -> nn.Module:
    """The network, with no weight at its initial zero, and mean volumes."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    network.set_means({modality: torch.randn_like(network.net(modality).mean) for modality in network.sizes})
    return network


@pytest.mark.parametrize("fusion, patch, depth", [("late", 1, 1), ("late", 2, 3), ("early", 1, 3), ("early", 3, 1)])
def test_any_grid_works_and_every_weight_learns(fusion, patch, depth):
    torch.manual_seed(0)
    network = DualModalUNet(SIZES, replace(CONFIG, fusion=fusion, patch=patch, depth=depth))
    x, t, optimiser = noise(2), dict.fromkeys(SIZES, torch.tensor([3, 700])), torch.optim.SGD(network.parameters(), 0.1)
    assert all(torch.equal(output, 0 * x[modality]) for modality, output in network(x, t).items())
    for _ in range(3):
        output = network(x, t)
        optimiser.zero_grad()
        sum((output[modality] - x[modality]).square().mean() for modality in SIZES).backward()
        optimiser.step()
    assert [name for name, p in network.named_parameters() if p.grad.abs().sum() == 0] == []


def test_attention_only_where_tokens_are_few_and_only_requested_targets():
    for tokens, expected in ((9999, [False, True, True]), (100, [False, False, True])):  # never on the finest level
        network = DualModalUNet(SIZES, replace(CONFIG, attention_tokens=tokens))  # 2002, 294 and 48 positions
        assert [isinstance(layer, Attention) for layer in network.net("b").body.attend] == expected
    assert set(network(noise(), T5, {"b"})) == {"b"}


def test_mean_volume_and_group_change_the_prediction_and_no_group_is_index_0():
    torch.manual_seed(0)
    network, x = randomised(DualModalUNet(SIZES, CONFIG, groups=2)), noise()
    outputs = [network(x, T5, group=group)["a"] for group in (None, *torch.arange(3).view(3, 1))]
    network.set_means(noise(3))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(network(x, T5)["a"], outputs[0])
    assert not torch.allclose(outputs[1], outputs[2]) and not torch.allclose(outputs[2], outputs[3])


@pytest.mark.parametrize("patch, kept", [(1, 0.4), (2, 0.3)])  # with patches, much of the memory is Detail's
def test_gradient_checkpointing_keeps_the_gradient_and_saves_memory(patch, kept):
    torch.manual_seed(0)
    network = randomised(DualModalUNet(SIZES, replace(CONFIG, dropout=0.2, patch=patch)))
    x, gradients, saved = noise(), [], [[], []]
    for recompute in (False, True):
        network.set_recompute(recompute)
        network.zero_grad()
        torch.manual_seed(1)  # the same features are dropped
        with saved_tensors_hooks(lambda each, sizes=saved[recompute]: sizes.append(each.nbytes) or each, lambda x: x):
            output = network(x, T5, {"b"})["b"]
        output.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert sum(saved[True]) < kept * sum(saved[False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_what_reaches_the_output_directly_is_not_rounded(dtype):
    torch.manual_seed(0)
    net, x = DualModalUNet(SIZES, CONFIG), noise()
    nn.init.constant_(net.net("b").gain.bias, 0.9)  # the head's weights are 0
    with torch.autocast("cpu", dtype):
        output = net(x, T5, {"b"})["b"]
    expected = 0.9 * (x["b"] + resize_to(x["a"], x["b"].shape[2:]) + net.net("b").mean[:1])
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)

"""Building blocks: patches, convolutions, embeddings, attention."""

import pytest
import torch
from torch import nn

from models.layers import Attention, Conv3d, ResBlock, from_patches, timestep_embedding, to_patches


@pytest.mark.parametrize("patch, grid", [(1, (5, 8, 7)), (2, (3, 4, 4)), (3, (2, 3, 3)), (4, (2, 2, 2))])
def test_from_patches_inverts_to_patches(patch, grid):
    x = torch.randn(2, 3, 5, 8, 7)
    assert to_patches(x, patch).shape == (2, 3 * patch**3, *grid)
    assert torch.equal(from_patches(to_patches(x, patch), patch, x.shape[2:]), x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_convolution_and_its_gradient_are_those_of_pytorch(batch, kernel, stride):
    layers = [layer(4, 6, kernel, stride, padding=kernel // 2) for layer in (Conv3d, nn.Conv3d)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(batch, 4, 7, 6, 5, requires_grad=True)
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
                                 for layer, output in zip(layers, outputs)), rtol=1e-4, atol=1e-4)


def test_every_timestep_has_its_own_embedding():
    embeddings = timestep_embedding(torch.arange(1001), 32)
    assert embeddings.shape == (1001, 32) and torch.cdist(embeddings, embeddings).fill_diagonal_(9).min() > 1e-2


def test_blocks_start_as_identity_and_attention_ignores_the_order_of_positions():
    attention, x = Attention(16), torch.randn(1, 16, 4, 3, 2)
    assert torch.equal(attention(x), x) and torch.equal(ResBlock(16, 16, 8)(x, torch.randn(1, 8)), x)
    nn.init.normal_(attention.out.weight)
    torch.testing.assert_close(attention(x.flip(2)), attention(x).flip(2), atol=1e-5, rtol=1e-4)

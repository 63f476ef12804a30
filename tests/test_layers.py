"""Building blocks: patches, convolutions, embeddings, attention."""

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from models.layers import (
    Attention,
    Conv3d,
    ResBlock,
    from_patches,
    fused_norm_silu,
    resize_by_products,
    resize_to,
    timestep_embedding,
    to_patches,
)
from tests.conftest import CHILD, ROOT


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


FUSED_NORM = """
import torch
import torch.nn.functional as F
from models import fused_norm
from models.fused_norm import NormSiLU

torch.manual_seed(0)
fused_norm.PROGRAMS = 4
for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for channels, groups, size in ((12, 4, (7, 6, 5)), (64, 8, (9, 16, 15))):  # the last: many tiles of few programs
        norm = torch.nn.GroupNorm(groups, channels)
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias)
        x = (torch.randn(2, channels, *size) * 3 + 2).to(dtype)
        results = []
        for fused in (True, False):
            norm.zero_grad()
            volume = x.clone().requires_grad_() if fused else x.double().requires_grad_()
            out = (NormSiLU.apply(volume, norm.weight, norm.bias, groups, norm.eps) if fused else
                   F.silu(F.group_norm(volume, groups, norm.weight.double(), norm.bias.double(), norm.eps)))
            assert not fused or (out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d))
            out.backward(torch.linspace(-1, 2, out.numel()).to(dtype).to(out.dtype).view_as(out))
            results.append([each.double() for each in (out, volume.grad, norm.weight.grad, norm.bias.grad)])
        for found, expected in zip(*results):
            assert (found - expected).abs().max() <= tolerance * expected.abs().max(), (dtype, channels)
"""


def test_the_fused_norm_and_its_gradient_are_those_of_pytorch_in_the_layout_of_the_volume():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", FUSED_NORM], cwd=ROOT, capture_output=True, text=True,
                          env={**CHILD, "TRITON_INTERPRET": "1"})  # on the CPU, read where Triton is imported
    assert done.returncode == 0, done.stderr


def test_where_triton_cannot_compile_a_note_says_so(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("models.fused_norm.grid_of", Mock(side_effect=RuntimeError("Failed to find C compiler")))
    assert fused_norm_silu.__wrapped__(torch.device("cpu")) is None
    assert "Triton does not work here (Failed to find C compiler)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernels_of_the_fused_norm_compile_for_a_gpu_that_is_not_here(backward, dtype):
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from models.fused_norm import map_kernel, sum_kernel
    for kernel, absent in ((sum_kernel, ("gradient", "scale", "shift")), (map_kernel, ("gradient", "slope", "offset"))):
        constants = {"BACKWARD": backward, "VOXELS": 128, "ROWS": 64, "WIDTH": 64,
                     **dict.fromkeys(() if backward else absent)}
        signature = {name: "constexpr" if name in constants else "i32" if name in ("S", "C") else
                     f"*{dtype}" if name in ("x", "gradient", "out") else "*fp32" for name in kernel.arg_names}
        source = compiler.ASTSource(kernel, signature, constants)
        assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]  # of an H100


@pytest.mark.parametrize("size", [(9, 4, 5), (14, 13, 10), (7, 6, 5), (3, 6, 9)])
def test_products_of_matrices_resize_as_pytorch_does(size):
    x = torch.randn(2, 3, 7, 6, 5).to(memory_format=torch.channels_last_3d).requires_grad_()
    results = []
    for resize in (resize_to, resize_by_products):
        x.grad = None
        out = resize(x, size)
        (out * torch.arange(out.numel()).view_as(out) / out.numel()).sum().backward()
        results.append((out, x.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert resize_by_products(x, size).is_contiguous(memory_format=torch.channels_last_3d)


def test_every_timestep_has_its_own_embedding():
    embeddings = timestep_embedding(torch.arange(1001), 32)
    assert embeddings.shape == (1001, 32) and torch.cdist(embeddings, embeddings).fill_diagonal_(9).min() > 1e-2


def test_blocks_start_as_identity_and_attention_ignores_the_order_of_positions():
    attention, x = Attention(16), torch.randn(1, 16, 4, 3, 2)
    assert torch.equal(attention(x), x) and torch.equal(ResBlock(16, 16, 8)(x, torch.randn(1, 16, 1, 1, 1)), x)
    nn.init.normal_(attention.out.weight)
    torch.testing.assert_close(attention(x.flip(2)), attention(x).flip(2), atol=1e-5, rtol=1e-4)

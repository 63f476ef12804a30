"""Building blocks of the networks. Volumes are (B, C, X, Y, Z); grids may have any size.

On GPUs, PyTorch's group normalisation leaves the channels-last layout of the convolutions and the 16 bits of autocast,
and the gradient of its trilinear interpolation is neither channels-last nor the same every time: that costs more than
they do. Large volumes have versions of their own, here and in models/fused_norm.py.
"""

import functools
import math
import subprocess
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.tensors import one_line

LARGE = 2**20  # values in a tensor of a GPU; smaller ones are fastest in the fewest operations
ONEDNN_MIN_SIZE = 20_480  # channels x X x Y above which PyTorch 2.14 uses oneDNN for a single volume, too


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t (B,) -> (B, channels), wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    angles = t.float()[:, None] * frequencies(channels // 2, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@functools.cache  # recorded steps read it, so it must stay
def frequencies(count: int, device: torch.device) -> Tensor:
    return torch.exp(-math.log(10_000) * torch.arange(count, device=device) / count)


def is_large_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.numel() >= LARGE


def resize_to(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate (B, C, X, Y, Z) trilinearly to another grid with the same field of view."""
    if x.shape[2:] == size:
        return x
    if is_large_on_gpu(x) and x.shape[1] > 1:  # a single channel has no layout to keep
        return resize_by_products(x, tuple(size))
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


def resize_by_products(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """`resize_to` as a product with a matrix per axis: in the dtype and layout (channels-last) of x, and, other than
    F.interpolate on a GPU, with the same gradient every time."""
    h = x.movedim(1, -1)  # (B, X, Y, Z, C)
    with torch.autocast(x.device.type, enabled=False):
        for axis, n in sorted(enumerate(size, start=1), key=lambda each: each[1] / h.shape[each[0]]):  # shrink first
            if h.shape[axis] != n:
                before, after = h.shape[:axis], h.shape[axis + 1:]
                weights = linear_weights(h.shape[axis], n, h.device).to(h.dtype)
                h = weights @ h.reshape(math.prod(before), h.shape[axis], math.prod(after))
                h = h.reshape(*before, n, *after)
    return h.movedim(-1, 1)


@functools.cache
def linear_weights(n: int, new: int, device: torch.device) -> Tensor:
    """(new, n): interpolates an axis linearly; the outer edges coincide."""
    return F.interpolate(torch.eye(n)[None], size=new, mode="linear", align_corners=False)[0].mT.contiguous().to(device)


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU of the group-normalised volume."""
    if is_large_on_gpu(x) and (fused := fused_norm_silu(x.device)):
        return fused(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


@functools.lru_cache(1)
def fused_norm_silu(device: torch.device) -> Callable[..., Tensor] | None:
    """`norm_silu` in Triton, if it is there and can compile; otherwise prints a note."""
    try:
        from models.fused_norm import NormSiLU
        NormSiLU.apply(torch.ones(1, 8, 1, 1, 1, device=device), *torch.ones(2, 8, device=device), 8, 1e-5)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:  # it also needs a C compiler
        print(f"note: Triton does not work here ({one_line(error)}): a step on large volumes takes up to twice as long")
        return None
    return NormSiLU.apply


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C patch^3, ceil(X / patch), ...): each block of voxels becomes one position's channels."""
    if patch == 1:
        return x
    X, Y, Z = x.shape[2:]
    if any(n % patch for n in (X, Y, Z)):
        x = F.pad(x, (0, -Z % patch, 0, -Y % patch, 0, -X % patch), mode="replicate")
    B, C, X, Y, Z = x.shape
    x = x.reshape(B, C, X // patch, patch, Y // patch, patch, Z // patch, patch)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * patch**3, X // patch, Y // patch, Z // patch)


def from_patches(x: Tensor, patch: int, size: torch.Size) -> Tensor:
    """The inverse of `to_patches`; `size` is the original grid (X, Y, Z)."""
    if patch == 1:
        return x
    B, C, X, Y, Z = x.shape
    x = x.reshape(B, C // patch**3, patch, patch, patch, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C // patch**3, X * patch, Y * patch, Z * patch)[..., :size[0], :size[1], :size[2]]


class Conv3d(nn.Conv3d):
    """nn.Conv3d that is as fast for a single small volume on a CPU as for several.

    PyTorch does not use oneDNN for it, which takes three times as long as convolving it twice (measured).
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and x.device.type == "cpu" and x[..., 0].numel() <= ONEDNN_MIN_SIZE:
            return super().forward(torch.cat([x, x]))[:1]
        return super().forward(x)


class Recomputed(nn.Module):
    """A module that computes with `compute`. recompute: keep only its inputs for the backward pass, and compute the
    rest again (gradient checkpointing, Chen et al. 2016)."""

    recompute = False

    def forward(self, *inputs: Tensor) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        return checkpoint(self.compute, *inputs, use_reentrant=False) if again else self.compute(*inputs)


class ResBlock(Recomputed):
    """Two convolutions with group normalisation, a shortcut, and a shift by the embedded timesteps."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, in_channels), nn.GroupNorm(8, out_channels)
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1)
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1)
        self.shift = nn.Linear(emb_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as its shortcut
        nn.init.zeros_(self.conv2.bias)

    def compute(self, x: Tensor, shift: Tensor) -> Tensor:
        """shift: (B, out_channels, 1, 1, 1) of this block, from `shifts`."""
        h = self.conv1(norm_silu(x, self.norm1)) + shift
        return self.shortcut(x) + self.conv2(self.dropout(norm_silu(h, self.norm2)))


def shifts(blocks: list[ResBlock], emb: Tensor) -> dict[ResBlock, Tensor]:
    """What the embedded timesteps (B, emb_channels) add in each block: one product for all of them."""
    weight, bias = (torch.cat([getattr(block.shift, name) for block in blocks]) for name in ("weight", "bias"))
    each = F.linear(F.silu(emb), weight, bias).split([len(block.shift.bias) for block in blocks], dim=1)
    return dict(zip(blocks, (shift[:, :, None, None, None] for shift in each)))


def res_blocks(count: int, in_channels: int, channels: int, emb_channels: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels if n else in_channels, channels, emb_channels, dropout)
                         for n in range(count))


class Attention(nn.Module):
    """Self-attention over all positions of a coarse level, with heads of 32 channels (8 if 32 does not divide them)."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // (32 if channels % 32 == 0 else 8)
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = Conv3d(channels, 3 * channels, 1)
        self.out = Conv3d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, C = x.shape[:2]
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, -1)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, tokens, channels of a head)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(x.shape))

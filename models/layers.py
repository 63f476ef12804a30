"""Building blocks of the networks. Volumes are (B, C, X, Y, Z); grids may have any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEW_POSITIONS = 512  # up to so many, a volume's weights cost more memory traffic than its features
LARGEST_LONELY = 20_480  # channels x X x Y of a single volume up to which PyTorch 2.14 does not call oneDNN


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t (B,) -> (B, channels), wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(channels // 2, device=t.device) / (channels // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layout(size: tuple[int, ...]) -> torch.memory_format:
    """The memory layout in which convolutions on this grid (X, Y, Z) are fastest (measured: benchmarks/step.py)."""
    return torch.contiguous_format if math.prod(size) <= FEW_POSITIONS else torch.channels_last_3d


def lay_out(part: nn.Module, size: tuple[int, ...]) -> None:
    """Keep the weights of a part that works on this grid in its layout."""
    for weight in part.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=layout(size))


def laid_out(x: Tensor) -> Tensor:
    """x (B, C, X, Y, Z) in the layout of its grid; costs nothing where it is already."""
    return x.contiguous(memory_format=layout(x.shape[2:]))


def resize_to(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate (B, C, X, Y, Z) to another grid over the same field of view; the same grid costs nothing."""
    if x.shape[2:] == size:
        return x
    x = x.contiguous(memory_format=layout(size))  # of the grid it goes to, which the result then has
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C patch^3, ceil(X / patch), ...): each block of voxels becomes one position's channels."""
    if patch == 1:
        return x
    X, Y, Z = x.shape[2:]
    x = F.pad(x, (0, -Z % patch, 0, -Y % patch, 0, -X % patch), mode="replicate")
    B, C, X, Y, Z = x.shape
    x = x.reshape(B, C, X // patch, patch, Y // patch, patch, Z // patch, patch)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * patch**3, X // patch, Y // patch, Z // patch)


def from_patches(x: Tensor, patch: int, size: torch.Size) -> Tensor:
    """Undo `to_patches`; `size` is the grid (X, Y, Z) it started from."""
    if patch == 1:
        return x
    B, C, X, Y, Z = x.shape
    x = x.reshape(B, C // patch**3, patch, patch, patch, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C // patch**3, X * patch, Y * patch, Z * patch)[..., :size[0], :size[1], :size[2]]


class Conv3d(nn.Conv3d):
    """nn.Conv3d, with kernels of 1 or 3, that is as fast for a single volume, and with a single thread, as otherwise.

    For one volume of few channels PyTorch leaves oneDNN on the CPU in float32, and with it the channels-last layout,
    and takes three times as long: such a volume goes in as two halves. With one thread it does so for kernels of 1,
    which are products of matrices.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] == 1:
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        lonely = (len(x) == 1 and x.device.type == "cpu" and x[..., 0].numel() <= LARGEST_LONELY
                  and layout(x.shape[2:]) != torch.contiguous_format)
        if not lonely:
            return super().forward(x)
        if self.stride[0] == 2:
            return super().forward(torch.cat([x, x]))[:1]
        X, half = x.shape[2], (x.shape[2] + 1) // 2
        x = F.pad(x, (0, 0, 0, 0, 1, 1 + X % 2))
        y = F.conv3d(torch.cat([x[:, :, :half + 2], x[:, :, half:]]), self.weight, self.bias, padding=(0, 1, 1))
        return torch.cat([y[:1], y[1:]], dim=2)[:, :, :X]


class ResBlock(nn.Module):
    """Two convolutions with group normalisation, a shortcut, and (if emb_channels) a shift by the embedded timestep.

    recompute: keep only the block's input until the backward pass, which computes the rest again (gradient
    checkpointing; Chen et al. 2016): less memory for more time, and the same gradient.
    """

    recompute = False

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, in_channels), nn.GroupNorm(8, out_channels)
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1)
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1)
        self.shift = nn.Linear(emb_channels, out_channels) if emb_channels else None
        self.dropout = nn.Dropout(dropout)
        self.shortcut = Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as its shortcut
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.shift is not None:
            h = h + self.shift(F.silu(emb))[:, :, None, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention over all positions of a coarse level, heads of 32 channels (or 8 where fewer are at hand)."""

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

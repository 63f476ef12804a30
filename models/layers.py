"""Building blocks of the networks. Volumes are (B, C, X, Y, Z); grids may have any size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ONEDNN_MIN_SIZE = 20_480  # channels x X x Y above which PyTorch 2.14 uses oneDNN for a single volume, too


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t (B,) -> (B, channels), wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(channels // 2, device=t.device) / (channels // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def resize_to(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate (B, C, X, Y, Z) trilinearly to another grid with the same field of view."""
    return x if x.shape[2:] == size else F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


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


class ResBlock(nn.Module):
    """Two convolutions with group normalisation, a shortcut, and a shift by the embedded timesteps.

    recompute: keep only the block's input for the backward pass and compute the rest again (gradient checkpointing,
    Chen et al. 2016).
    """

    recompute = False

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

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        recompute = self.recompute and torch.is_grad_enabled()
        return checkpoint(self._forward, x, emb, use_reentrant=False) if recompute else self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(F.silu(emb))[:, :, None, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


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

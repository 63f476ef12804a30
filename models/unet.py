"""The networks of PDS: a 3-D U-Net body per direction, and the dual-modal model made of two of them.

One direction (source -> target): the body runs on the source's grid, its features are resampled to the target's grid
and joined with a stem of the target, and an output block predicts at the target's grid. Sizes need not be multiples
of anything. Stage 1 gives noisy volumes and timesteps; stage 2 the source and the coarse target, without timesteps.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    Attention,
    Conv3d,
    ResBlock,
    from_patches,
    laid_out,
    lay_out,
    resize_to,
    timestep_embedding,
    to_patches,
)


class UNet(nn.Module):
    """The body: (B, in_channels, X, Y, Z) -> (B, channels, X, Y, Z); level k has channels 2^k.

    attention_tokens: self-attention on the levels below the finest with at most this many positions.
    size: the grid it will see, which decides where attention is.
    """

    def __init__(self, in_channels: int, channels: int, depth: int, blocks: int, emb_channels: int,
                 size: tuple[int, ...], attention_tokens: int, dropout: float):
        super().__init__()
        widths = [channels * 2**level for level in range(depth)]
        self.stem = Conv3d(in_channels, channels, 3, padding=1)
        self.down, self.up, self.attend = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList(ResBlock(width, width, emb_channels, dropout) for _ in range(blocks)))
            tokens = size[0] * size[1] * size[2]
            attends = level > 0 and tokens <= attention_tokens
            self.attend.append(Attention(width) if attends else nn.Identity())
            if level < depth - 1:
                self.shrink.append(Conv3d(width, widths[level + 1], 3, stride=2, padding=1))
                self.grow.append(Conv3d(widths[level + 1], width, 1))
                self.up.append(nn.ModuleList(ResBlock(2 * width if first else width, width, emb_channels, dropout)
                                             for first in [True] + [False] * (blocks - 1)))
            else:
                self.middle = ResBlock(width, width, emb_channels, dropout)
            rest = (self.up[-1], self.shrink[-1]) if level < depth - 1 else (self.middle,)
            for part in (self.down[-1], self.attend[-1], *rest):
                lay_out(part, size)
            size = tuple((n + 1) // 2 for n in size)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h, skips = self.stem(x), []
        for level, blocks in enumerate(self.down):
            h = laid_out(h)
            for block in blocks:
                h = block(h, emb)
            h = self.attend[level](h)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        h = self.middle(h, emb)
        for level in reversed(range(len(self.grow))):
            skip = skips.pop()
            h = laid_out(torch.cat([skip, resize_to(self.grow[level](h), skip.shape[2:])], dim=1))
            for block in self.up[level]:
                h = block(h, emb)
        return h


class DirectionNet(nn.Module):
    """source (B, 1, Xs, Ys, Zs), target (B, 1, Xt, Yt, Zt), timesteps -> (B, 1, Xt, Yt, Zt).

    The buffer `mean`, the target's mean training volume, goes into the body and the target's stem beside their inputs:
    scans of a study show the same body part in about the same place, which convolutions alone cannot know. With
    diagnostic groups it is the mean of the group that is told, the group is also embedded beside the timesteps, and
    what its mean has over that of all is added to the output with a learned gain per timestep: the difference is too
    small against what differs between subjects to be learnt through the convolutions in a short training.
    fusion "early" also gives the body the target and the stem the source, each resampled to the other's grid; after
    `to_patches` a resampling could no longer place what is inside a patch.
    timesteps: how many the network is told: 2 in stage 1 (the source's and the target's), 0 in stage 2. With timesteps,
    the noisy target is also added to the output with a learned gain per timestep: the noise need not be carried through
    the convolutions. groups: how many there are.
    """

    def __init__(self, source_size: tuple[int, ...], target_size: tuple[int, ...], timesteps: int, groups: int, *,
                 channels: int, depth: int, blocks: int, output_blocks: int, patch: int, fusion: str,
                 attention_tokens: int, dropout: float):
        super().__init__()
        self.patch, self.early, self.channels = patch, fusion == "early", channels
        emb_channels = 4 * channels if timesteps else 0
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(2 * channels, emb_channels), nn.SiLU(),
                                                 nn.Linear(emb_channels, emb_channels)) for _ in range(timesteps))
        grid = tuple(-(-n // patch) for n in source_size)
        self.register_buffer("mean", torch.zeros(1 + groups, 1, *target_size))  # the first: of all groups
        inputs = patch**3 * (3 if self.early else 2)
        self.body = UNet(inputs, channels, depth, blocks, emb_channels, grid,
                         attention_tokens, dropout)
        self.target_stem = Conv3d(inputs, channels, 3, padding=1)
        self.output = nn.ModuleList(ResBlock(2 * channels if first else channels, channels, emb_channels, dropout)
                                    for first in [True] + [False] * (output_blocks - 1))
        self.norm = nn.GroupNorm(8, channels)
        self.head = Conv3d(channels, patch**3, 3, padding=1)
        self.gain = nn.Linear(emb_channels, 1) if timesteps else None
        for part, grid in ((self.body.stem, source_size), (self.target_stem, target_size), (self.output, target_size),
                           (self.head, target_size)):
            lay_out(part, tuple(-(-n // patch) for n in grid))
        self.group = nn.Embedding(1 + groups, emb_channels) if groups else None  # row 0: not told
        self.group_gain = nn.Linear(emb_channels, 1) if groups else None
        for layer in (self.head, self.gain, self.group, self.group_gain):
            for weight in layer.parameters() if layer is not None else ():
                nn.init.zeros_(weight)

    def embedded(self, *t: Tensor, group: Tensor | None = None) -> Tensor:
        """The sum of the embeddings of timesteps and group: (B, 4 channels). group (B,): from 1; 0: not told."""
        emb = sum(embed(timestep_embedding(each, 2 * self.channels)) for embed, each in zip(self.embed, t))
        if self.group is not None:
            emb = emb + self.group(torch.zeros_like(t[0]) if group is None else group)
        return emb

    def forward(self, source: Tensor, target: Tensor, *t: Tensor, group: Tensor | None = None) -> Tensor:
        emb = self.embedded(*t, group=group) if t else None
        mean = self.mean[:1].expand_as(target) if group is None else self.mean[group]
        to_body, to_stem = [source, resize_to(mean, source.shape[2:])], [target, mean]
        if self.early:
            to_body.append(resize_to(target, source.shape[2:]))
            to_stem.append(resize_to(source, target.shape[2:]))
        features = self.body(to_patches(torch.cat(to_body, dim=1), self.patch), emb)
        stem = self.target_stem(to_patches(torch.cat(to_stem, dim=1), self.patch))
        h = laid_out(torch.cat([resize_to(features, stem.shape[2:]), stem], dim=1))
        for block in self.output:
            h = block(h, emb)
        h = from_patches(self.head(F.silu(self.norm(h))), self.patch, target.shape[2:]).float()
        if self.gain is not None:
            h = h + self.gain(F.silu(emb)).float()[:, :, None, None, None] * target
        if self.group_gain is not None:
            h = h + self.group_gain(F.silu(emb)).float()[:, :, None, None, None] * (mean - self.mean[:1])
        return h


class TwoDirections(nn.Module):
    """One DirectionNet per direction between two modalities; sizes: modality -> (X, Y, Z)."""

    def __init__(self, sizes: dict[str, tuple[int, int, int]], timesteps: int, groups: int, **network):
        super().__init__()
        self.directions = tuple(permutations(sizes, 2))  # (source, target)
        self.nets = nn.ModuleDict({
            f"{source}_to_{target}": DirectionNet(sizes[source], sizes[target], timesteps, groups, **network)
            for source, target in self.directions})

    def recompute(self, wanted: bool) -> None:
        """Gradient checkpointing of every residual block, on or off."""
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.recompute = wanted

    def direction(self, source: str, target: str) -> DirectionNet:
        return self.nets[f"{source}_to_{target}"]

    def set_means(self, means: dict[str, Tensor]) -> None:
        """Give every direction its target's mean training volumes, (1 + groups, 1, X, Y, Z)."""
        for source, target in self.directions:
            self.direction(source, target).mean.copy_(means[target])


class DualModalUNet(TwoDirections):
    """The dual-modal model of stage 1: one DirectionNet per direction.

    xt: {modality: (B, 1, X, Y, Z)} noisy volumes; t: {modality: (B,)}; returns {modality: prediction} for `targets`
    (all where None: a translation needs one direction only). group: (B,) numbers from 1, 0 or None where not told.
    sizes: modality -> (X, Y, Z). A prediction is epsilon or v, see models/diffusion.py.
    """

    def __init__(self, sizes: dict[str, tuple[int, int, int]], groups: int = 0, **network):
        super().__init__(sizes, 2, groups, **network)

    def forward(self, xt: dict[str, Tensor], t: dict[str, Tensor], targets: Collection[str] | None = None,
                group: Tensor | None = None) -> dict[str, Tensor]:
        return {target: self.direction(source, target)(xt[source], xt[target], t[source], t[target], group=group)
                for source, target in self.directions if targets is None or target in targets}

"""The networks of PDS: a 3-D U-Net body per direction, and the dual-modal model made of two of them.

One direction (source -> target): the body runs on the source's grid; its features are resampled to the target's grid,
joined with a stem of the target, and an output block predicts on the target's grid. Any grid size works.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    Attention,
    Conv3d,
    Recomputed,
    ResBlock,
    from_patches,
    norm_silu,
    res_blocks,
    resize_to,
    shifts,
    timestep_embedding,
    to_patches,
)

DETAIL_CHANNELS = 8  # of single voxels: 16 are no better (docs/results.md)


@dataclass(frozen=True)
class NetworkConfig:
    """What the networks of both stages are built from, besides the image sizes; the settings of opt.py."""

    channels: int  # of the finest level; level k has channels 2^k
    depth: int  # resolution levels
    blocks: int  # residual blocks per level
    output_blocks: int  # residual blocks on the target's grid
    patch: int  # voxels per axis of a block that becomes one position (space-to-depth)
    fusion: str  # "late" or "early": see DirectionNet
    attention_tokens: int  # self-attention on coarser levels with at most this many positions
    dropout: float


class UNet(nn.Module):
    """The body: (B, in_channels, X, Y, Z) -> (B, channels, X, Y, Z). size: its grid, which decides where attention is.
    """

    def __init__(self, in_channels: int, emb_channels: int, size: tuple[int, ...], config: NetworkConfig):
        super().__init__()
        widths = [config.channels * 2**level for level in range(config.depth)]
        self.stem = Conv3d(in_channels, config.channels, 3, padding=1)
        self.down, self.up, self.attend = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(res_blocks(config.blocks, width, width, emb_channels, config.dropout))
            attends = level > 0 and size[0] * size[1] * size[2] <= config.attention_tokens
            self.attend.append(Attention(width) if attends else nn.Identity())
            if level < config.depth - 1:
                self.shrink.append(Conv3d(width, widths[level + 1], 3, stride=2, padding=1))
                self.grow.append(Conv3d(widths[level + 1], width, 1))
                self.up.append(res_blocks(config.blocks, 2 * width, width, emb_channels, config.dropout))
            else:
                self.middle = ResBlock(width, width, emb_channels, config.dropout)
            size = tuple((n + 1) // 2 for n in size)

    def forward(self, x: Tensor, shift: dict[ResBlock, Tensor]) -> Tensor:
        h, skips = self.stem(x), []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, shift[block])
            h = self.attend[level](h)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        h = self.middle(h, shift[self.middle])
        for level in reversed(range(len(self.grow))):
            skip = skips.pop()
            h = torch.cat([skip, resize_to(self.grow[level](h), skip.shape[2:])], dim=1)
            for block in self.up[level]:
                h = block(h, shift[block])
        return h


class Detail(Recomputed):
    """What patches cannot place: two convolutions at full resolution, of the features of the patches around and of the
    volumes there. (B, channels, X / patch, ...) and (B, volumes, X, Y, Z) -> (B, 1, X, Y, Z)."""

    def __init__(self, channels: int, patch: int, volumes: int):
        super().__init__()
        self.patch = patch
        self.features = Conv3d(channels, DETAIL_CHANNELS * patch**3, 1)
        self.hidden = Conv3d(DETAIL_CHANNELS + volumes, DETAIL_CHANNELS, 3, padding=1)
        self.head = Conv3d(DETAIL_CHANNELS, 1, 3, padding=1)

    def compute(self, features: Tensor, volumes: Tensor) -> Tensor:
        fine = from_patches(self.features(features), self.patch, volumes.shape[2:])
        return self.head(F.silu(self.hidden(torch.cat([fine, volumes], dim=1))))


class DirectionNet(nn.Module):
    """source (B, 1, Xs, Ys, Zs), target (B, 1, Xt, Yt, Zt), mean and embedding -> (B, 1, Xt, Yt, Zt).

    `mean`, (1 + groups, 1, Xt, Yt, Zt), holds the target's mean training volume, then that of each group; scans of a
    study show the same body part in about the same place, which convolutions alone cannot know. fusion "early" also
    gives the target to the body and the source to the stem, each resampled to the other's grid.

    Noisy target, source and mean also reach the output directly, each with a learned gain per pair of timesteps, so
    that the convolutions need carry neither the noise nor what is already there; so does the difference of the group's
    mean, which is small beside the variation between subjects.
    """

    def __init__(self, source_size: tuple[int, ...], target_size: tuple[int, ...], config: NetworkConfig,
                 groups: int = 0):
        super().__init__()
        channels, patch = config.channels, config.patch
        self.patch, self.early, self.channels = patch, config.fusion == "early", channels
        emb_channels = 4 * channels
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(2 * channels, emb_channels), nn.SiLU(),
                                                 nn.Linear(emb_channels, emb_channels))
                                   for _ in range(2))  # the source's timestep and the target's
        self.register_buffer("mean", torch.zeros(1 + groups, 1, *target_size))
        inputs = patch**3 * (3 if self.early else 2)
        self.body = UNet(inputs, emb_channels, tuple(-(-n // patch) for n in source_size), config)
        self.target_stem = Conv3d(inputs, channels, 3, padding=1)
        self.output = res_blocks(config.output_blocks, 2 * channels, channels, emb_channels, config.dropout)
        self.norm = nn.GroupNorm(8, channels)
        self.head = Conv3d(channels, patch**3, 3, padding=1)
        direct = 4 if groups else 3  # volumes
        self.detail = Detail(channels, patch, direct) if patch > 1 else None
        self.gain = nn.Linear(emb_channels, direct)
        self.group = nn.Embedding(1 + groups, emb_channels) if groups else None  # row 0: no group given
        self.blocks = [block for block in self.modules() if isinstance(block, ResBlock)]
        for layer in filter(None, (self.head, self.detail and self.detail.head, self.gain, self.group)):
            for weight in layer.parameters():
                nn.init.zeros_(weight)

    def forward(self, source: Tensor, target: Tensor, t_source: Tensor, t_target: Tensor,
                group: Tensor | None = None) -> Tensor:
        """Volumes as above; timesteps and group indices are (B,)."""
        if self.group is not None and group is None:
            group = torch.zeros_like(t_target)
        with torch.autocast(source.device.type, enabled=False):  # an error of a gain is an error of the volume
            sinusoids = timestep_embedding(torch.cat([t_source, t_target]), 2 * self.channels).chunk(2)
            emb, of_target = (embed(each) for embed, each in zip(self.embed, sinusoids))
            emb = emb + of_target if self.group is None else emb + of_target + self.group(group)
            gains = self.gain(F.silu(emb))
        shift = shifts(self.blocks, emb)
        source_there = resize_to(source, target.shape[2:])
        mean, mean_there = (each.expand(len(target), -1, -1, -1, -1) if self.group is None else each[group]
                            for each in (self.mean, resize_to(self.mean, source.shape[2:])))
        to_body, to_stem = [source, mean_there], [target, mean]
        if self.early:  # before `to_patches`: afterwards a resampling could not place what is inside a patch
            to_body.append(resize_to(target, source.shape[2:]))
            to_stem.append(source_there)
        features = self.body(to_patches(torch.cat(to_body, dim=1), self.patch), shift)
        stem = self.target_stem(to_patches(torch.cat(to_stem, dim=1), self.patch))
        h = torch.cat([resize_to(features, stem.shape[2:]), stem], dim=1)
        for block in self.output:
            h = block(h, shift[block])
        h = norm_silu(h, self.norm)
        direct = [target, source_there, self.mean[:1].expand_as(target)]
        if self.group is not None:
            direct.append(mean - self.mean[:1])
        direct = torch.cat(direct, dim=1)
        output = from_patches(self.head(h), self.patch, target.shape[2:])
        if self.detail is not None:
            output = output + self.detail(h, direct)
        with torch.autocast(source.device.type, enabled=False):
            output = output.float()
            return torch.baddbmm(output.flatten(2), gains[:, None], direct.flatten(2)).view_as(output)


class DualModalUNet(nn.Module):
    """One DirectionNet per target; with two modalities the source is the other one. sizes: modality -> (X, Y, Z).

    Stage 1 trains it to predict epsilon or v (models/diffusion.py); stage 2 trains it on at t = (0, T)
    (models/translator.py). groups: how many it distinguishes.
    """

    def __init__(self, sizes: dict[str, tuple[int, int, int]], config: NetworkConfig, groups: int = 0):
        super().__init__()
        self.sizes = {modality: tuple(size) for modality, size in sizes.items()}
        self.directions = tuple(permutations(sizes, 2))  # (source, target)
        self.nets = nn.ModuleDict({f"to_{target}": DirectionNet(sizes[source], sizes[target], config, groups)
                                   for source, target in self.directions})
        self.to(memory_format=torch.channels_last_3d)  # the fastest layout for convolutions on CPUs and GPUs

    def net(self, target: str) -> DirectionNet:
        return self.nets[f"to_{target}"]

    def source(self, target: str) -> str:
        """The other modality."""
        return next(source for source, each in self.directions if each == target)

    def set_recompute(self, recompute: bool) -> None:
        """Switch gradient checkpointing on or off."""
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = recompute

    def set_means(self, means: dict[str, Tensor]) -> None:
        """Copy the mean training volumes (1 + groups, 1, X, Y, Z) of each modality."""
        for _, target in self.directions:
            self.net(target).mean.copy_(means[target])

    def forward(self, xt: dict[str, Tensor], t: dict[str, Tensor], targets: Collection[str] | None = None,
                group: Tensor | None = None) -> dict[str, Tensor]:
        """Noisy volumes {modality: (B, 1, X, Y, Z)} and timesteps {modality: (B,)} -> {target: prediction}.

        targets: what to predict (all by default). group: (B,) from 1; 0, or None, where no group is given.
        """
        return {target: self.net(target)(xt[source], xt[target], t[source], t[target], group)
                for source, target in self.directions if targets is None or target in targets}

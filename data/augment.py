"""Load batches of a study; augment both modalities of a pair and their masks alike."""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from data.study import Study
from utils.device import to_device

MAX_ANGLE, MAX_SCALE, MAX_SHIFT = 5.0, 0.05, 3.0  # rotation about each axis (degrees), change of size, and shift (mm)
MAX_LOG_GAMMA = 0.25  # natural logarithm of the exponent of the intensities


class PairTransform:
    """A random transform for each pair of a batch, which depends on the generator of the pair alone.

    kinds: as in opt.augment; extent: (3,) mm, the field of view of both modalities. Volumes are (B, 1, X, Y, Z).
    """

    def __init__(self, kinds: Collection[str], modalities: tuple[str, ...], extent: Tensor,
                 generators: list[torch.Generator]):
        # the same draws whatever the kinds: (B, 8 + modalities) in [-1, 1]
        draws = torch.stack([torch.rand(8 + len(modalities), generator=generator) * 2 - 1 for generator in generators])
        self.flips = (draws[:, 0] > 0) & ("flip" in kinds)
        self.matrices = torch.stack([_affine_matrix(draw, extent) for draw in draws]) if "affine" in kinds else None
        gammas = (draws[:, 8:] * MAX_LOG_GAMMA).exp()
        self.gammas = dict(zip(modalities, gammas.unbind(1))) if "intensity" in kinds else {}

    def volume(self, modality: str, volume: Tensor) -> Tensor:
        """Transform volumes in [-1, 1], on their device; gamma keeps -1 and 1."""
        moved = self._move(volume, "bilinear")
        if not self.gammas:
            return moved
        gamma = to_device(self.gammas[modality].to(volume.dtype), volume.device)
        return ((moved + 1) / 2).clamp(0, 1) ** gamma.view(-1, 1, 1, 1, 1) * 2 - 1

    def mask(self, mask: Tensor) -> Tensor:
        """Move masks of 0 and 1."""
        return self._move(mask, "nearest")

    def _move(self, volume: Tensor, mode: str) -> Tensor:
        if self.matrices is not None:
            matrices = to_device(self.matrices.to(volume.dtype), volume.device)
            grid = F.affine_grid(matrices, volume.shape, align_corners=False)
            volume = F.grid_sample(volume, grid, mode, padding_mode="border", align_corners=False)
        return torch.where(to_device(self.flips, volume.device).view(-1, 1, 1, 1, 1), volume.flip(2), volume)


def _affine_matrix(draw: Tensor, extent: Tensor) -> Tensor:
    """Rotation, size and shift about the centre of the field of view, (3, 4) for affine_grid; draw: in [-1, 1]."""
    rotation, angles = torch.eye(3), draw[1:4] * math.radians(MAX_ANGLE)
    for a, b, angle in zip((1, 0, 0), (2, 2, 1), angles):  # the plane of each rotation
        step = torch.eye(3)
        step[a, a] = step[b, b] = angle.cos()
        step[a, b], step[b, a] = -angle.sin(), angle.sin()
        rotation = step @ rotation
    half = extent.to(torch.float32) / 2
    linear, shift = rotation * (1 + draw[4] * MAX_SCALE) * half / half[:, None], draw[5:8] * MAX_SHIFT / half
    # affine_grid measures in half fields of view and expects the last axis first
    return torch.cat([linear, shift[:, None]], dim=1)[[2, 1, 0]][:, [2, 1, 0, 3]]


def load_batch(study: Study, batch: list[int], transform: PairTransform | None,
               device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Volumes and pattern masks of these pairs, {modality: (B, 1, X, Y, Z)}, on the device and transformed there."""
    volumes, masks = study.volumes(batch, device), study.masks(batch, device)
    if transform:
        volumes = {modality: transform.volume(modality, volume) for modality, volume in volumes.items()}
        masks = {modality: transform.mask(mask) for modality, mask in masks.items()}
    return volumes, masks

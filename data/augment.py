"""Load batches of a study; augment both modalities of a pair and their masks alike."""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from data.study import Study

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
        gammas = (draws[:, 8:] * MAX_LOG_GAMMA * ("intensity" in kinds)).exp()
        self.gammas = dict(zip(modalities, gammas.unbind(1)))

    def volume(self, modality: str, volume: Tensor) -> Tensor:
        """Transform volumes in [-1, 1]; gamma keeps -1 and 1."""
        moved, gamma = self._move(volume, "bilinear"), self.gammas[modality].to(volume)
        if (gamma == 1).all():
            return moved
        return ((moved + 1) / 2).clamp(0, 1) ** gamma.view(-1, 1, 1, 1, 1) * 2 - 1

    def mask(self, mask: Tensor) -> Tensor:
        """Move masks of 0 and 1."""
        return self._move(mask, "nearest")

    def _move(self, volume: Tensor, mode: str) -> Tensor:
        if self.matrices is not None:
            grid = F.affine_grid(self.matrices.to(volume), volume.shape, align_corners=False)
            volume = F.grid_sample(volume, grid, mode, padding_mode="border", align_corners=False)
        return torch.where(self.flips.to(volume.device).view(-1, 1, 1, 1, 1), volume.flip(2), volume)


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
    """Volumes and pattern masks of these pairs, {modality: (B, 1, X, Y, Z)}, transformed, on the device."""
    volumes, masks = study.volumes(batch), study.masks(batch)
    if transform:
        volumes = {modality: transform.volume(modality, volume) for modality, volume in volumes.items()}
        masks = {modality: transform.mask(mask) for modality, mask in masks.items()}
    return ({modality: to_device(volume, device) for modality, volume in volumes.items()},
            {modality: to_device(mask, device) for modality, mask in masks.items()})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; on the CPU, return the tensor itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

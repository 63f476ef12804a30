"""Augmentation that keeps a pair a pair: both modalities, their masks and what was made from them move together."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

ANGLE, SCALE, SHIFT = 5.0, 0.05, 3.0  # largest rotation about each axis (degrees), growth, and shift (mm)
GAMMA = 0.25  # largest |log| of the exponent that bends the intensities


class PairTransform:
    """What happens to the pairs of one batch; one generator per pair decides, so it depends on their keys alone.

    kinds: any of "flip" left and right, "affine" (rotation, size and shift), "intensity" (a bent scale of grey,
    one per modality). extent: (3,) mm, the field of view that both modalities share. Volumes are (B, 1, X, Y, Z).
    """

    def __init__(self, kinds: Collection[str], modalities: tuple[str, ...], extent: Tensor,
                 generators: list[torch.Generator]):
        self.affine = "affine" in kinds
        flips, matrices, bends = [], [], []
        for generator in generators:
            draw = torch.rand(8 + len(modalities), generator=generator) * 2 - 1  # the same number whatever the kinds
            flips.append(bool(draw[0] > 0) and "flip" in kinds)
            matrices.append(_matrix(draw[1:4] * math.radians(ANGLE), draw[4] * SCALE, draw[5:8] * SHIFT, extent))
            bends.append(draw[8:] * GAMMA * ("intensity" in kinds))
        self.flips, self.matrices = torch.tensor(flips), torch.stack(matrices)
        self.exponents = dict(zip(modalities, torch.stack(bends).exp().unbind(1)))

    def volume(self, name: str, volume: Tensor) -> Tensor:
        """A volume of the modality `name`, in [-1, 1]: moved, and its intensities bent; -1 and 1 stay."""
        moved, exponent = self._moved(volume, "bilinear"), self.exponents[name].to(volume)
        if (exponent == 1).all():
            return moved
        return ((moved + 1) / 2).clamp(0, 1) ** exponent.view(-1, 1, 1, 1, 1) * 2 - 1

    def mask(self, mask: Tensor) -> Tensor:
        """A mask, 0 or 1: moved only."""
        return self._moved(mask, "nearest")

    def _moved(self, volume: Tensor, mode: str) -> Tensor:
        if self.affine:
            grid = F.affine_grid(self.matrices.to(volume), volume.shape, align_corners=False)
            volume = F.grid_sample(volume, grid, mode, padding_mode="border", align_corners=False)
        return torch.where(self.flips.to(volume.device).view(-1, 1, 1, 1, 1), volume.flip(2), volume)


def _matrix(angles: Tensor, growth: Tensor, shift: Tensor, extent: Tensor) -> Tensor:
    """(3, 4) for affine_grid: angles (3,) rad, shift (3,) mm, about the centre of a field of view of `extent` mm.

    affine_grid counts in half fields of view, and names the last axis first.
    """
    turn = torch.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (i for i in range(3) if i != axis)
        one = torch.eye(3)
        one[a, a] = one[b, b] = angle.cos()
        one[a, b], one[b, a] = -angle.sin(), angle.sin()
        turn = one @ turn
    half = extent.to(torch.float32) / 2
    return torch.cat([turn * (1 + growth) * half / half[:, None], (shift / half)[:, None]], dim=1)[
        [2, 1, 0]][:, [2, 1, 0, 3]]

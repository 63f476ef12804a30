"""Stage 2: refined = blend of (coarse, source) + what a network adds, for both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from models.layers import resize_to
from models.unet import TwoDirections


class RefineNet(TwoDirections):
    """One DirectionNet without timestep per direction: the source through the body, the coarse volume to the output.

    The residual path starts from a fixed linear blend of the coarse volume, the source (resampled to the target's
    grid) and a constant (models/losses.py, blend_weights), so that copying what is right is free.
    sizes: modality -> (X, Y, Z).
    """

    def __init__(self, sizes: dict[str, tuple[int, int, int]], **network):
        super().__init__(sizes, timesteps=0, **network)
        for source, target in self.directions:  # weights of coarse, source, constant
            self.direction(source, target).register_buffer("blend", torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, source: str, target: str, volume: Tensor, coarse: Tensor) -> Tensor:
        """Refine one direction: source volume (B, 1, Xs, Ys, Zs) and coarse target (B, 1, Xt, Yt, Zt) -> target."""
        net = self.direction(source, target)
        weights = net.blend
        start = weights[0] * coarse + weights[1] * resize_to(volume, coarse.shape[2:]) + weights[2]
        return start + net(volume, coarse)

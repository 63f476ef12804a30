"""Stage 2: refined = blend of (coarse, source) + what a network adds, for both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import ResBlock, resize_to
from models.unet import DualModalUNet, TwoDirections


class RefineNet(TwoDirections):
    """One DirectionNet without timestep per direction: the source through the body, the coarse volume to the output.

    The residual path starts from a fixed linear blend of the coarse volume, the source (resampled to the target's
    grid) and a constant (models/losses.py, blend_weights), so that copying what is right is free.
    sizes: modality -> (X, Y, Z).
    """

    def __init__(self, sizes: dict[str, tuple[int, int, int]], **network):
        super().__init__(sizes, 0, 0, **network)
        for source, target in self.directions:  # weights of coarse, source, constant
            self.direction(source, target).register_buffer("blend", torch.tensor([1.0, 0.0, 0.0]))

    @torch.no_grad()
    def start_from(self, backbone: DualModalUNet, t: int) -> None:
        """Take over the trunks of the stage-1 networks, as they are for a clean source and a target at timestep t.

        There the embedded timesteps only shift the features of each block, which is what a bias does. The last layer
        stays zero, so that training still starts from the blend.
        """
        for source, target in self.directions:
            mine, theirs = self.direction(source, target), backbone.direction(source, target)
            weights = {name: value for name, value in theirs.state_dict().items()
                       if name in mine.state_dict() and not name.startswith("head.") and name != "mean"}
            device = theirs.mean.device
            emb = F.silu(theirs.embedded(torch.tensor([0], device=device), torch.tensor([t], device=device)))
            for name, block in theirs.named_modules():
                if isinstance(block, ResBlock):
                    weights[f"{name}.conv1.bias"] = block.conv1.bias + block.shift(emb)[0]
            mine.load_state_dict(weights, strict=False)  # all but head and blend: asserted by the tests

    def forward(self, source: str, target: str, volume: Tensor, coarse: Tensor) -> Tensor:
        """Refine one direction: source volume (B, 1, Xs, Ys, Zs) and coarse target (B, 1, Xt, Yt, Zt) -> target."""
        net = self.direction(source, target)
        start = sum(weight * each for weight, each in zip(net.blend, self.candidates(volume, coarse))) + net.blend[-1]
        return start + net(volume, coarse)

    @staticmethod
    def candidates(volume: Tensor, coarse: Tensor) -> list[Tensor]:
        """What is blended: the coarse volume and the source on its grid, each (B, 1, Xt, Yt, Zt)."""
        return [coarse, resize_to(volume, coarse.shape[2:])]

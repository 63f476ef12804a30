"""Stage 2: refined = blend of (coarse, source) + what a network adds, in both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import ResBlock, resize_to
from models.unet import DualModalUNet, NetworkConfig, PairedNetworks


class Refiner(PairedNetworks):
    """A DirectionNet without timesteps per target: the source goes through the body, the coarse volume to the output.

    The residual path starts from a fixed linear blend of the coarse volume, the source (resampled to the target's grid)
    and a constant (models/losses.py, blend_weights), so copying what is already right costs nothing.
    """

    def __init__(self, sizes: dict[str, tuple[int, int, int]], config: NetworkConfig):
        super().__init__(sizes, config, timesteps=False)
        for _, target in self.directions:  # weights of coarse volume, source and constant
            self.net(target).register_buffer("blend", torch.tensor([1.0, 0.0, 0.0]))

    @classmethod
    def from_checkpoint(cls, state: dict, device: torch.device) -> "Refiner":
        """The frozen EMA model of a stage-2 checkpoint's content."""
        network = cls(state["sizes"], NetworkConfig(**state["network"]))
        network.load_state_dict(state["ema"]["model"])
        return network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def start_from(self, prior: DualModalUNet, t: int) -> None:
        """Copy the trunks of the stage-1 networks, as they are for a clean source and a target at timestep t.

        At fixed timesteps the embedding only shifts the features of each block, which is what a bias does. The head
        stays zero, so training still starts from the blend.
        """
        for _, target in self.directions:
            mine, theirs = self.net(target), prior.net(target)
            weights = {name: value for name, value in theirs.state_dict().items()
                       if name in mine.state_dict() and not name.startswith("head.") and name != "mean"}
            clean, noisy = (torch.tensor([each], device=theirs.mean.device) for each in (0, t))
            emb = F.silu(theirs.condition(clean, noisy, clean)[1])
            for name, block in theirs.named_modules():
                if isinstance(block, ResBlock):
                    weights[f"{name}.conv1.bias"] = block.conv1.bias + block.shift(emb)[0]
            mine.load_state_dict(weights, strict=False)  # all but head and blend: the tests check that

    def forward(self, target: str, volume: Tensor, coarse: Tensor) -> Tensor:
        """Source volume (B, 1, Xs, Ys, Zs) and coarse target (B, 1, Xt, Yt, Zt) -> refined target."""
        net = self.net(target)
        blend = sum(weight * each for weight, each in zip(net.blend, self.candidates(volume, coarse))) + net.blend[-1]
        return blend + net(volume, coarse, self.mean(target).expand_as(coarse))

    def mean(self, target: str) -> Tensor:
        """The target's mean training volume (1, 1, X, Y, Z)."""
        return self.net(target).mean[:1]

    @staticmethod
    def candidates(volume: Tensor, coarse: Tensor) -> list[Tensor]:
        """What is blended: the coarse volume, and the source on its grid; each (B, 1, Xt, Yt, Zt)."""
        return [coarse, resize_to(volume, coarse.shape[2:])]

"""Translation in one evaluation of the dual-modal network: at t = T, without noise, with the source given."""

import torch
from torch import Tensor, nn

from models.unet import DualModalUNet


class Translator(nn.Module):
    """x0 of one modality at timesteps (0, T): the expected volume of stage 1, and what stage 2 trains on.

    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (models/diffusion.py), and alpha_bar_T is about 0: at T the noise
    says nothing about x0, and the network's best v, in the mean square, is -E[x0 | source]. So noise is left out, and
    minus the output is the expected volume. One-step regression at T: E2E-FT (Garcia et al., WACV 2025), YODA (Rassmann
    et al. 2025).
    """

    def __init__(self, network: DualModalUNet, timesteps: int):
        super().__init__()
        self.network, self.timesteps = network, timesteps

    def forward(self, target: str, volume: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Source volumes (B, 1, Xs, Ys, Zs), NaN where unknown -> volumes of the target (B, 1, Xt, Yt, Zt).

        coarse: what the network sees in the place of the noisy target, if stage 2 is given a coarse volume.
        """
        source, size = self.network.source(target), self.network.sizes[target]
        volume, start = known(volume), volume.new_zeros(len(volume), 1, *size) if coarse is None else coarse
        clean = torch.zeros(len(volume), dtype=torch.long, device=volume.device)
        t = {source: clean, target: clean + self.timesteps}
        return -self.network({source: volume, target: start}, t, {target})[target]

    @torch.no_grad()
    def translate(self, target: str, volume: Tensor, coarse: Tensor | None = None, flips: bool = False) -> Tensor:
        """As `forward`, in [-1, 1] and without gradients. flips: the mean with that of the mirrored volumes (X)."""
        translated = self(target, volume, coarse)
        if flips:
            mirrored = self(target, volume.flip(2), None if coarse is None else coarse.flip(2))
            translated = (translated + mirrored.flip(2)) / 2
        return translated.clamp(-1, 1)


def known(volume: Tensor) -> Tensor:
    """What a network sees of a volume: background, -1, where it is NaN, because the scan does not reach there."""
    return volume.nan_to_num(-1.0)

"""Synthetic sources for targets whose partner is missing (back-translation: Sennrich et al. 2016), with texture.

A translation lacks what its source does not determine, and hides in its details what the source was. A network that is
trained to translate it back learns to read these. So it gets what a real volume has beside its expectation: Gaussian
noise with the power spectrum of the errors that the prior's expected volumes have on the training pairs.
"""

import math

import torch
from torch import Tensor

from data.study import Study
from models.diffusion import keyed_noise
from models.prior import Prior
from utils.stop import interruptible

MOST_PAIRS = 32  # whose errors are looked at
BODY = -0.95  # above: not background, which has no texture


def error_spectra(prior: Prior, study: Study) -> dict[str, Tensor]:
    """modality -> amplitudes (X, Y, Z // 2 + 1) of `texture`, of the discrete Fourier transform over a volume."""
    totals = {modality: 0.0 for modality in study.modalities}
    members = study.roles["train"][:MOST_PAIRS]
    for i in interruptible(members):
        volumes = study.volumes([i])
        for source, target in prior.network.directions:
            truth = volumes[target]
            error = (truth - prior.expected(target, volumes[source]).cpu().float()).nan_to_num(0)[0, 0]
            body = (truth > BODY).float().mean()
            totals[target] = totals[target] + torch.fft.rfftn(error).abs().square() / body.clamp(min=0.01)
    return {modality: (total / len(members) / math.prod(study.sizes[modality])).sqrt()
            for modality, total in totals.items()}


def texture(amplitudes: Tensor, size: tuple[int, int, int], *keys: tuple[int, ...]) -> Tensor:
    """Gaussian noise (len(keys), 1, X, Y, Z) with these amplitudes."""
    white = keyed_noise({"": size}, *keys)[""]
    return torch.fft.irfftn(torch.fft.rfftn(white, dim=(2, 3, 4)) * amplitudes, s=size, dim=(2, 3, 4))


def with_texture(made: Tensor, noise: Tensor) -> Tensor:
    """Synthetic sources (B, 1, X, Y, Z) in [-1, 1] with noise from `texture`, but for the background."""
    return (made + noise * (made > BODY)).clamp(-1, 1)

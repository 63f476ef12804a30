"""Samplers: from noise to volumes. A denoiser is a function (volumes, t) -> estimates of x0, both {modality: tensor}.

Symbols as in models/diffusion.py, and (Lu et al. 2022) lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), which is
infinite at t = 0. Coefficients are float64; volumes keep their own precision. The denoiser: models/prior.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.diffusion import Volumes

Denoiser = Callable[[Volumes, int], Volumes]
LAMBDA_RANGE = (-2.0, 4.5)  # between these, DPM-Solver++'s timesteps are about even in lambda; outside, even in t


@dataclass(frozen=True)
class Sampling:
    """How volumes are sampled: sampler "ddim" or "dpmpp", network evaluations, and eta of DDIM (0: deterministic)."""

    sampler: str
    steps: int
    eta: float = 0.0


def timestep_spacing(timesteps: int, steps: int, sampler: str) -> list[int]:
    """steps + 1 distinct timesteps from T to 0: even in t for DDIM, mostly even in lambda for DPM-Solver++.

    lambda is infinite at t = 0 and about -10 at T, where almost nothing of x0 is visible: steps even in lambda alone
    would be wasted there. The cosine schedule is nearly t / T = 2 / pi arctan(exp(-lambda)); cut that curve at both
    ends and stretch the rest to reach 0 and T. Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} steps do not fit into {timesteps} timesteps")
    x = np.linspace(1, 0, steps + 1)
    if sampler == "dpmpp":
        x = np.arctan(np.exp(x * (LAMBDA_RANGE[1] - LAMBDA_RANGE[0]) - LAMBDA_RANGE[1]))
        x = (x - x[-1]) / (x[0] - x[-1])
    times = [timesteps]
    for place, t in enumerate(np.rint(timesteps * x[1:]).astype(int), start=1):
        times.append(int(np.clip(t, steps - place, times[-1] - 1)))  # leaves room for all that follow
    return times


def ddim(denoise: Denoiser, noise: Volumes, times: list[int], alpha_bar: Tensor, eta: float = 0.0,
         fresh_noise: Callable[[int], Volumes] | None = None) -> Volumes:
    """DDIM (Song et al. 2021, eq. 12 and 16). alpha_bar: (T + 1,); fresh_noise: t -> noise, needed where eta > 0."""
    x = dict(noise)
    for t, t_next in zip(times, times[1:]):
        x0 = denoise(x, t)
        now, following = alpha_bar[t].item(), alpha_bar[t_next].item()
        variance = eta**2 * (1 - following) / (1 - now) * (1 - now / following)
        fresh = fresh_noise(t_next) if eta else {}
        for modality, estimate in x0.items():
            epsilon = (x[modality] - math.sqrt(now) * estimate) / math.sqrt(1 - now)
            x[modality] = math.sqrt(following) * estimate + math.sqrt(max(0.0, 1 - following - variance)) * epsilon
            if eta:
                x[modality] = x[modality] + math.sqrt(variance) * fresh[modality]
    return x


def dpmpp(denoise: Denoiser, noise: Volumes, times: list[int], alpha_bar: Tensor) -> Volumes:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). The first step and the step to t = 0 are of first order."""
    def lambda_of(t: int) -> float:
        return 0.5 * (math.log(alpha_bar[t].item()) - math.log1p(-alpha_bar[t].item()))

    x, previous = dict(noise), {}
    for t_previous, t, t_next in zip([0, *times], times, times[1:]):
        x0 = denoise(x, t)
        if t_next == 0:  # lambda is infinite: all noise goes, the estimate stays
            return {**x, **x0}
        h = lambda_of(t_next) - lambda_of(t)
        signal = math.sqrt(alpha_bar[t_next].item())
        sigma_ratio = math.sqrt((1 - alpha_bar[t_next].item()) / (1 - alpha_bar[t].item()))
        for modality, estimate in x0.items():
            if previous:
                ratio = (lambda_of(t) - lambda_of(t_previous)) / h
                estimate = estimate + (estimate - previous[modality]) / (2 * ratio)
            x[modality] = sigma_ratio * x[modality] - signal * math.expm1(-h) * estimate
        previous = x0
    return x

"""Samplers: from noise to volumes, jointly or with one modality given. A network is a function of (xt, t).

Symbols as in models/diffusion.py, and (Lu et al. 2022) lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), which is
infinite at t = 0. Steps are computed from float64 coefficients in the volumes' own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.diffusion import Diffusion, Volumes, keyed_noise

SAMPLERS = ("ddim", "dpmpp")


LAMBDAS = (-2.0, 4.5)  # between these DPM-Solver++'s timesteps are about even in lambda, outside even in t


def spacing(timesteps: int, steps: int, sampler: str) -> list[int]:
    """steps + 1 timesteps from T to 0, none twice: even in t for DDIM, mostly even in lambda for DPM-Solver++.

    lambda is infinite at t = 0 and about -10 at T, where next to nothing of x0 is seen: steps that are even in lambda
    alone would waste themselves there. With t / T = 2 / pi arctan(exp(-lambda)), which the cosine schedule nearly is,
    the ends are cut off and the rest is stretched to reach 0 and T. Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} steps do not fit into {timesteps} timesteps")
    x = np.linspace(1, 0, steps + 1)
    if sampler == "dpmpp":
        x = np.arctan(np.exp(x * (LAMBDAS[1] - LAMBDAS[0]) - LAMBDAS[1]))
        x = (x - x[-1]) / (x[0] - x[-1])
    times = [timesteps]
    for place, t in enumerate(np.rint(timesteps * x[1:]).astype(int), start=1):
        times.append(int(np.clip(t, steps - place, times[-1] - 1)))  # room for all that follow
    return times


def ddim_step(diffusion: Diffusion, xt: Tensor, x0: Tensor, t: int, t_next: int, eta: float = 0.0,
              noise: Tensor | None = None) -> Tensor:
    """One step of DDIM (Song et al. 2021, eq. 12 and 16) from t to t_next < t, given the estimate of x0."""
    alpha_bar, alpha_bar_next = (diffusion.alpha_bar[each].item() for each in (t, t_next))
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    epsilon = (xt - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    stepped = math.sqrt(alpha_bar_next) * x0 + math.sqrt(max(0.0, 1 - alpha_bar_next - variance)) * epsilon
    return stepped if eta == 0 else stepped + math.sqrt(variance) * noise


def dpmpp_step(diffusion: Diffusion, xt: Tensor, x0: Tensor, t: int, t_next: int, x0_before: Tensor | None = None,
               t_before: int = 0) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) from t to t_next < t, given the estimate of x0.

    x0_before, t_before: estimate and timestep of the step before; without them, and for the step to t = 0, first order.
    """
    if t_next == 0:  # lambda is infinite: what is left of the noise goes, x0 stays
        return x0
    (signal, sigma), (signal_next, sigma_next) = (_signal_sigma(diffusion, each) for each in (t, t_next))
    h = math.log(signal_next / sigma_next) - math.log(signal / sigma)
    if x0_before is not None:
        before = _signal_sigma(diffusion, t_before)
        ratio = (math.log(signal / sigma) - math.log(before[0] / before[1])) / h
        x0 = x0 + (x0 - x0_before) / (2 * ratio)
    return sigma_next / sigma * xt - signal_next * math.expm1(-h) * x0


def _signal_sigma(diffusion: Diffusion, t: int) -> tuple[float, float]:
    alpha_bar = diffusion.alpha_bar[t].item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


@torch.no_grad()
def sample(diffusion: Diffusion, network: Callable[..., Volumes], noise: Volumes, steps: int, *, sampler: str = "dpmpp",
           eta: float = 0.0, given: Volumes | None = None, coupling: str = "independent",
           keys: list[tuple[int, ...]] = (), clip: bool = True, progress=iter,
           trace: Callable | None = None) -> Volumes:
    """From noise {modality: (B, 1, X, Y, Z)} to volumes, in [-1, 1] where x0 is clipped.

    network: (xt, t, wanted modalities) -> {modality: prediction}.
    sampler: "ddim" (with eta) or "dpmpp", DPM-Solver++(2M), which is deterministic.
    given: modalities that are known. With coupling "independent" the network sees them clean, at t = 0; with
    "shared" they are imposed by replacement: noised, with their own noise, to the current t at every step.
    keys: one per sample, for the fresh noise of eta > 0. progress: wraps the list of steps.
    trace: called with (t, noisy volumes, estimates of the clean ones) in each step.
    """
    given, x, before = given or {}, dict(noise), {}
    times, wanted = spacing(diffusion.timesteps, steps, sampler), noise.keys() - given.keys()
    batch, device = len(next(iter(noise.values()))), next(iter(noise.values())).device
    for last, now, after in progress(list(zip([0, *times], times[:-1], times[1:]))):
        t = {name: torch.full((batch,), now, device=device) for name in x}
        for name, volume in given.items():
            if coupling == "independent":
                x[name], t[name] = volume, torch.zeros_like(t[name])
            else:
                x[name] = diffusion.noisy(volume, noise[name], t[name])
        output = network(x, t, wanted)
        fresh = keyed_noise({name: volume.shape[2:] for name, volume in x.items()},
                            *((*key, after) for key in keys)) if eta else {}
        noisy = dict(x)
        for name in wanted:
            x0 = diffusion.x0(x[name], output[name].to(x[name].dtype), t[name], clip)
            if sampler == "ddim":
                x[name] = ddim_step(diffusion, x[name], x0, now, after, eta, fresh[name].to(device) if eta else None)
            else:
                x[name] = dpmpp_step(diffusion, x[name], x0, now, after, before.get(name), last)
            before[name] = x0
        if trace is not None:
            trace(now, noisy, before)
    return {**x, **given}

"""The diffusion process: schedule, noising, targets and DDIM. It knows no network: a network is a function of (xt, t).

Symbols (Ho et al. 2020; Song et al. 2021; Salimans & Ho 2022): x0 clean volume, xt noisy volume, t timestep with
t = 0 clean and t = 1..T noisy, alpha_bar cumulative alpha,
    xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise,   v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0.
Volumes of both modalities travel as {modality: (B, 1, X, Y, Z)}, timesteps as {modality: (B,)}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """Second number of every noise key, so that no two uses share their noise."""

    TRAINING, TIMESTEPS, VALIDATION, PICTURES, COARSE, WITHHOLD, DROPOUT, AUGMENT = range(8)


LARGEST_BETA = 0.999  # as published with the cosine schedule: keeps alpha_bar_T above 0
Volumes = dict[str, Tensor]


def cosine_alpha_bar(timesteps: int, s: float = 0.008) -> Tensor:
    """alpha_bar of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), float64 (T + 1,); alpha_bar[0] = 1."""
    f = np.array([math.cos((t / timesteps + s) / (1 + s) * math.pi / 2) ** 2 for t in range(timesteps + 1)])
    betas = np.minimum(1 - f[1:] / f[:-1], LARGEST_BETA)
    return torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))


def keyed_generator(*key: int) -> torch.Generator:
    """A private random generator that depends on the key alone: (seed, purpose, step or sample, ...)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def keyed_noise(sizes: dict[str, tuple[int, ...]], *keys: tuple[int, ...]) -> Volumes:
    """Standard normal noise for each modality, one volume for each key: it does not depend on ranks or batches."""
    noise = {name: [] for name in sizes}
    for key in keys:
        generator = keyed_generator(*key)
        for name, size in sizes.items():
            noise[name].append(torch.randn(1, *size, generator=generator))
    return {name: torch.stack(volumes) for name, volumes in noise.items()}


class Diffusion:
    """The schedule with `timesteps` steps, and what network outputs mean: prediction "epsilon" or "v"."""

    def __init__(self, timesteps: int, prediction: str):
        self.timesteps, self.prediction = timesteps, prediction
        self.alpha_bar = cosine_alpha_bar(timesteps)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) as (B, 1, 1, 1, 1) float32, on the device of t (B,)."""
        alpha_bar = self.alpha_bar[t.cpu()].view(-1, 1, 1, 1, 1)
        return alpha_bar.sqrt().float().to(t.device), (1 - alpha_bar).sqrt().float().to(t.device)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """xt of x0 (B, 1, X, Y, Z) at t (B,)."""
        signal, sigma = self.weights(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at t."""
        signal, sigma = self.weights(t)
        return noise if self.prediction == "epsilon" else signal * noise - sigma * x0

    def x0(self, xt: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean volume that a network's output means, clipped to [-1, 1]."""
        signal, sigma = self.weights(t)
        x0 = (xt - sigma * output) / signal if self.prediction == "epsilon" else signal * xt - sigma * output
        return x0.clamp(-1, 1)

    def ddim_step(self, xt: Tensor, x0: Tensor, t: Tensor, t_next: Tensor, eta: float = 0.0,
                  noise: Tensor | None = None) -> Tensor:
        """One step of DDIM (Song et al. 2021, eq. 12 and 16) from t to t_next < t (B,), given the estimate of x0."""
        alpha_bar, alpha_bar_next = (self.alpha_bar[each.cpu()].view(-1, 1, 1, 1, 1) for each in (t, t_next))
        variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        rest = (1 - alpha_bar_next - variance).clamp(min=0).sqrt().float().to(xt.device)
        signal, sigma = self.weights(t)
        epsilon = (xt - signal * x0) / sigma
        stepped = alpha_bar_next.sqrt().float().to(xt.device) * x0 + rest * epsilon
        return stepped if eta == 0 else stepped + variance.sqrt().float().to(xt.device) * noise

    def spacing(self, steps: int) -> list[int]:
        """steps + 1 timesteps from T to 0, evenly spaced, none twice."""
        return np.rint(np.linspace(self.timesteps, 0, steps + 1)).astype(int).tolist()

    @torch.no_grad()
    def sample(self, network: Callable[..., Volumes], noise: Volumes, steps: int, *, eta: float = 0.0,
               given: Volumes | None = None, coupling: str = "independent", keys: list[tuple[int, ...]] = (),
               progress=iter) -> Volumes:
        """DDIM from noise {modality: (B, 1, X, Y, Z)} to volumes in [-1, 1], in float32.

        network: (xt, t, wanted modalities) -> {modality: prediction}.
        given: modalities that are known. With coupling "independent" the network sees them clean, at t = 0; with
        "shared" they are imposed by replacement: noised, with their own noise, to the current t at every step.
        keys: one per sample, for the fresh noise of eta > 0.
        """
        given, x = given or {}, dict(noise)
        times, wanted = self.spacing(steps), noise.keys() - given.keys()
        batch, device = len(next(iter(noise.values()))), next(iter(noise.values())).device
        for now, after in progress(list(zip(times[:-1], times[1:]))):
            t = {name: torch.full((batch,), now, device=device) for name in x}
            t_next = torch.full((batch,), after, device=device)
            for name, volume in given.items():
                if coupling == "independent":
                    x[name], t[name] = volume, torch.zeros_like(t[name])
                else:
                    x[name] = self.noisy(volume, noise[name], t[name])
            output = network(x, t, wanted)
            fresh = keyed_noise({name: volume.shape[2:] for name, volume in x.items()},
                                *((*key, after) for key in keys)) if eta else {}
            for name in wanted:
                x0 = self.x0(x[name], output[name].float(), t[name])
                x[name] = self.ddim_step(x[name], x0, t[name], t_next, eta,
                                         fresh[name].to(device) if eta else None)
        return {**x, **given}


def training_timesteps(coupling: str, timesteps: int, modalities: tuple[str, str],
                       keys: list[tuple[int, ...]]) -> Volumes:
    """{modality: (B,)} timesteps for one step of training; key: one per pair.

    "shared": one t for both. "independent": one each, and for a quarter of the draws per direction the source is given
    (t = 0), so that the same network learns to translate.
    """
    drawn = {name: [] for name in modalities}
    for key in keys:
        generator = keyed_generator(*key)
        t = torch.randint(1, timesteps + 1, (2,), generator=generator).tolist()
        if coupling == "shared":
            t = [t[0], t[0]]
        else:
            case = int(torch.randint(0, 4, (1,), generator=generator))
            if case < 2:
                t[case] = 0
        for name, each in zip(modalities, t):
            drawn[name].append(each)
    return {name: torch.tensor(each) for name, each in drawn.items()}

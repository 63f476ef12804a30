"""The diffusion process: schedule, noising, targets, and what a network's output means. Samplers: models/samplers.py.

Symbols (Ho et al. 2020; Song et al. 2021; Salimans & Ho 2022): x0 clean volume, xt noisy volume, t timestep with
t = 0 clean and t = 1..T noisy, alpha_bar cumulative alpha,
    xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise,   v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0.
Volumes of both modalities travel as {modality: (B, 1, X, Y, Z)}, timesteps as {modality: (B,)}.
"""

from __future__ import annotations

import math
import zlib
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """Second number of every noise key, so that no two uses share their noise."""

    TRAINING, TIMESTEPS, VALIDATION, PICTURES, COARSE, WITHHOLD, DROPOUT, AUGMENT, JOINT, GROUP = range(10)


GIVEN = 0.75  # fraction of the training draws in which one modality is given: measured, see the README
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


def name_key(name: str) -> int:
    """A subject's number in noise keys: it does not depend on who else is in the study."""
    return zlib.crc32(name.encode())


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
        self._tables: dict[torch.device, Tensor] = {}  # alpha_bar where it was used, so that no step waits for a copy

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) as (B, 1, 1, 1, 1), default type, where t (B,) is."""
        if t.device not in self._tables:
            self._tables[t.device] = self.alpha_bar.to(t.device)
        alpha_bar, kind = self._tables[t.device][t].view(-1, 1, 1, 1, 1), torch.get_default_dtype()
        return alpha_bar.sqrt().to(kind), (1 - alpha_bar).sqrt().to(kind)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """xt of x0 (B, 1, X, Y, Z) at t (B,)."""
        signal, sigma = self.weights(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at t."""
        signal, sigma = self.weights(t)
        return noise if self.prediction == "epsilon" else signal * noise - sigma * x0

    def x0(self, xt: Tensor, output: Tensor, t: Tensor, clip: bool = True) -> Tensor:
        """The clean volume that a network's output means, clipped to [-1, 1] unless told otherwise."""
        signal, sigma = self.weights(t)
        x0 = (xt - sigma * output) / signal if self.prediction == "epsilon" else signal * xt - sigma * output
        return x0.clamp(-1, 1) if clip else x0


def training_timesteps(coupling: str, timesteps: int, modalities: tuple[str, str],
                       keys: list[tuple[int, ...]]) -> Volumes:
    """{modality: (B,)} timesteps for one step of training; key: one per pair.

    "shared": one t for both. "independent": one each, and in GIVEN of the draws one of the two, either as often, is
    given clean (t = 0), so that the same network learns to translate. The other's t is then the larger of two draws:
    what the source tells is decided where the target is still noise.
    """
    drawn = {name: [] for name in modalities}
    for key in keys:
        generator = keyed_generator(*key)
        t = torch.randint(1, timesteps + 1, (2,), generator=generator).tolist()
        if coupling == "shared":
            t = [t[0], t[0]]
        else:
            case = float(torch.rand(1, generator=generator)) / GIVEN
            if case < 1:
                t = [max(t)] * 2
                t[int(2 * case)] = 0
        for name, each in zip(modalities, t):
            drawn[name].append(each)
    return {name: torch.tensor(each) for name, each in drawn.items()}

"""The diffusion process: schedule, noising, targets, and the clean volume that a network's output implies.

Symbols (Ho et al. 2020; Song et al. 2021; Salimans & Ho 2022): x0 clean volume, xt noisy volume, t timestep with
t = 0 clean and t = 1..T noisy, alpha_bar cumulative alpha,
    xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise,   v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0.
Volumes of both modalities travel as {modality: (B, 1, X, Y, Z)}, timesteps as {modality: (B,)}.
"""

import math
import zlib
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """Second number of every noise key: no two uses share their noise."""

    TRAINING, TIMESTEPS, VALIDATION, PICTURES, COARSE, DROPOUT, AUGMENT, JOINT, GROUP, TEXTURE = range(10)


GIVEN_FRACTION = 0.75  # of a direction's training draws in which the source is given clean (docs/results.md)
EXPECTED_FRACTION = 0.5  # of these, in which the target is at T, without noise: the expected volume
MAX_BETA = 0.999  # as published with the cosine schedule: keeps alpha_bar_T above 0
Volumes = dict[str, Tensor]


def cosine_alpha_bar(timesteps: int, s: float = 0.008) -> Tensor:
    """alpha_bar of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), float64 (T + 1,); alpha_bar[0] = 1."""
    f = np.array([math.cos((t / timesteps + s) / (1 + s) * math.pi / 2) ** 2 for t in range(timesteps + 1)])
    betas = np.minimum(1 - f[1:] / f[:-1], MAX_BETA)
    return torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))


def keyed_generator(*key: int) -> torch.Generator:
    """A random generator that depends on its key alone: (seed, purpose, step or sample, ...)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def name_key(name: str) -> int:
    """A subject's number in noise keys, which does not depend on the other subjects of the study."""
    return zlib.crc32(name.encode())


def keyed_noise(sizes: dict[str, tuple[int, ...]], *keys: tuple[int, ...]) -> Volumes:
    """Standard normal noise, {modality: (len(keys), 1, X, Y, Z)}: the same on any number of ranks, in any batch."""
    noise = {name: [] for name in sizes}
    for key in keys:
        generator = keyed_generator(*key)
        for name, size in sizes.items():
            noise[name].append(torch.randn(1, *size, generator=generator))
    return {name: torch.stack(volumes) for name, volumes in noise.items()}


class Diffusion:
    """The noise schedule, and what the network predicts: prediction "epsilon" or "v"."""

    def __init__(self, timesteps: int, prediction: str):
        self.timesteps, self.prediction = timesteps, prediction
        self.alpha_bar = cosine_alpha_bar(timesteps)
        self._weights: dict[tuple, Tensor] = {}  # (T + 1, 2), copied once per device: no step waits for them

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1, 1), for t (B,)."""
        key = t.device, torch.get_default_dtype()
        if key not in self._weights:
            self._weights[key] = torch.stack([self.alpha_bar, 1 - self.alpha_bar], dim=1).sqrt().to(*key)
        return self._weights[key][t].view(-1, 2, 1, 1, 1, 1).unbind(1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """xt for x0 (B, 1, X, Y, Z) at t (B,)."""
        signal, sigma = self.weights(t)
        return torch.addcmul(sigma * noise, signal, x0)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at t."""
        signal, sigma = self.weights(t)
        return noise if self.prediction == "epsilon" else torch.addcmul(signal * noise, sigma, x0, value=-1)

    def to_x0(self, xt: Tensor, output: Tensor, t: Tensor, clip: bool = True) -> Tensor:
        """The clean volume that the network's output implies, by default clipped to [-1, 1]."""
        signal, sigma = self.weights(t)
        x0 = (xt - sigma * output) / signal if self.prediction == "epsilon" else signal * xt - sigma * output
        return x0.clamp(-1, 1) if clip else x0


def training_timesteps(coupling: str, timesteps: int, keys: list[tuple[int, ...]],
                       expected_fraction: float = EXPECTED_FRACTION) -> tuple[Tensor, Tensor]:
    """Timesteps of source and target, each (B,), for training a direction on pairs with these keys.

    "shared": one t for both. "independent": one each, and in GIVEN_FRACTION of the draws the source is given clean
    (t = 0), so that the network learns to translate, too. The target's t is then T in expected_fraction of them, else
    the larger of two draws: the source matters most where the target is noise.
    """
    drawn = []
    for key in keys:
        generator = keyed_generator(*key)
        first, second = torch.randint(1, timesteps + 1, (2,), generator=generator).tolist()
        case = float(torch.rand((), generator=generator)) / GIVEN_FRACTION
        if coupling == "shared":
            drawn.append((first, first))
        elif case >= 1:
            drawn.append((first, second))
        else:
            drawn.append((0, timesteps if case < expected_fraction else max(first, second)))
    return torch.tensor([t for t, _ in drawn]), torch.tensor([t for _, t in drawn])

"""The stage-1 model as it is used: network, diffusion process and precision together."""

from __future__ import annotations

import torch
from torch import Tensor

from models.diffusion import Diffusion, Volumes, keyed_noise
from models.samplers import sample
from models.unet import DualModalUNet


class Backbone:
    """Calls the network in the right precision, and samples. Volumes are {modality: (B, 1, X, Y, Z)} in [-1, 1]."""

    def __init__(self, network: DualModalUNet, diffusion: Diffusion, coupling: str, device: torch.device,
                 dtype: torch.dtype):
        self.network, self.diffusion, self.coupling = network, diffusion, coupling
        self.device, self.dtype = device, dtype

    @classmethod
    def from_checkpoint(cls, state: dict, device: torch.device, dtype: torch.dtype) -> Backbone:
        """The frozen EMA model of a stage-1 checkpoint's content. Raises RuntimeError where its weights do not fit."""
        network = DualModalUNet(state["sizes"], **state["network"])
        network.load_state_dict(state["ema"]["model"])
        options = state["options"]
        return cls(network.to(device).eval().requires_grad_(False),
                   Diffusion(options["timesteps"], options["prediction"]), options["timestep_coupling"], device,
                   dtype)

    def __call__(self, xt: Volumes, t: Volumes, wanted=None) -> Volumes:
        with self.autocast():
            return self.network(xt, t, wanted)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sample(self, keys: list[tuple[int, ...]], sizes: dict[str, tuple[int, ...]], steps: int, sampler: str,
               eta: float, given: dict[str, Tensor] | None = None, progress=iter) -> Volumes:
        """One sample of every modality per noise key; `given` modalities stay as they are."""
        noise = {name: each.to(self.device) for name, each in keyed_noise(sizes, *keys).items()}
        given = {name: each.to(self.device) for name, each in (given or {}).items()}
        return sample(self.diffusion, self, noise, steps, sampler=sampler, eta=eta, given=given, coupling=self.coupling,
                      keys=keys, progress=progress)

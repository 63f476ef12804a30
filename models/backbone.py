"""The stage-1 model as it is used: network, diffusion process and precision together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion import Diffusion, Volumes, keyed_noise
from models.samplers import sample
from models.unet import DualModalUNet


class Backbone:
    """Calls the network in the right precision, and samples. Volumes are {modality: (B, 1, X, Y, Z)} in [-1, 1].

    groups: the names of the diagnostic groups that the network is told apart, none without opt.condition_on_group.
    """

    def __init__(self, network: DualModalUNet, diffusion: Diffusion, coupling: str, device: torch.device,
                 dtype: torch.dtype, groups: tuple[str, ...] = ()):
        self.network, self.diffusion, self.coupling = network, diffusion, coupling
        self.device, self.dtype, self.groups = device, dtype, tuple(groups)

    @classmethod
    def from_checkpoint(cls, state: dict, device: torch.device, dtype: torch.dtype) -> Backbone:
        """The frozen EMA model of a stage-1 checkpoint's content. Raises RuntimeError where its weights do not fit."""
        groups, options = tuple(state.get("groups", ())), state["options"]
        network = DualModalUNet(state["sizes"], len(groups), **state["network"])
        network.load_state_dict(state["ema"]["model"])
        return cls(network.to(device).eval().requires_grad_(False),
                   Diffusion(options["timesteps"], options["prediction"]), options["timestep_coupling"], device,
                   dtype, groups)

    def __call__(self, xt: Volumes, t: Volumes, wanted=None, group: Tensor | None = None) -> Volumes:
        with self.autocast():
            return self.network(xt, t, wanted, group)

    def numbered(self, groups: list[str]) -> Tensor | None:
        """The numbers (B,) by which the network knows these groups: from 1, 0 for others; None if it knows none."""
        if not self.groups:
            return None
        return torch.tensor([self.groups.index(name) + 1 if name in self.groups else 0 for name in groups],
                            device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sample(self, keys: list[tuple[int, ...]], sizes: dict[str, tuple[int, ...]], steps: int, sampler: str,
               eta: float, given: dict[str, Tensor] | None = None, progress=iter,
               groups: list[str] | None = None, trace: Callable | None = None) -> Volumes:
        """One sample of every modality per noise key; `given` modalities stay as they are. groups: their names."""
        noise = {name: each.to(self.device) for name, each in keyed_noise(sizes, *keys).items()}
        given = {name: each.to(self.device) for name, each in (given or {}).items()}
        network = functools.partial(self, group=self.numbered(groups) if groups else None)
        return sample(self.diffusion, network, noise, steps, sampler=sampler, eta=eta, given=given,
                      coupling=self.coupling, keys=keys, progress=progress, trace=trace)

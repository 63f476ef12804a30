"""Exponential moving average of a network's parameters."""

import copy

import torch
from torch import nn

from utils.tensors import load_weights


class EMA:
    """Holds `model`, a copy whose parameters follow the trained ones; buffers are copied, not averaged.

    The decay warms up as (1 + n) / (10 + n) after n updates, so the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for averaged, trained in zip(self.model.buffers(), model.buffers()):
            averaged.copy_(trained)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError, or what nn.Module.load_state_dict raises, where the state does not fit."""
        if type(state["updates"]) is not int or state["updates"] < 0:
            raise ValueError(f"updates = {state['updates']!r}")
        self.updates = state["updates"]
        load_weights(self.model, state["model"])

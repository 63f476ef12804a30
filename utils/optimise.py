"""The optimiser step that both trainers share: precision, learning-rate schedule, clipping, and when to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError
from utils.distributed import any_rank, summed, unsynchronised, world

BAD_STEPS_IN_A_ROW = 5
ORDER = "memory"  # of what an optimiser keeps for a weight: that of the weight in memory, which differs between layouts
NOT_HIDDEN = {"stem", "target_stem", "head", "gain"}  # layers at the networks' ends
MUON_RATE = 20.0  # times Adam's rate: Muon's update has length 1 for each row of a matrix, Adam's about 1 per weight


class TrainingError(ValueError):
    """Training that cannot go on; the message says at which step, with which subjects, and what to do."""


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as asked, or with "auto" where matrices are multiplied in it in hardware.

    A processor that only converts to it (AVX512-BF16 without AMX) takes 1.5 times as long as in float32 (measured).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


class Optimiser:
    """Muon or Adam with warm-up and cosine decay by optimiser step, and gradient clipping.

    kind "muon" (torch.optim.Muon; Jordan et al. 2024) makes the update of every weight matrix inside the blocks
    orthogonal, a convolution being the matrix from its inputs and taps to its outputs; the first and the last layers
    (stem, head, gain), biases and norms stay with Adam. "adam": all of them. learning_rate is Adam's peak.
    """

    def __init__(self, model: nn.Module, learning_rate: float, warmup_steps: int, total_steps: int,
                 gradient_clip: float, kind: str = "adam"):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        hidden = {name: p for name, p in named.items() if kind == "muon" and p.ndim > 1
                  and not set(name.split(".")) & NOT_HIDDEN}
        rest = [p for name, p in named.items() if name not in hidden]
        self.matrices = [(p, nn.Parameter(_rows(p.detach(), p))) for p in hidden.values()]  # (out, in)
        self.parts = {"adam": torch.optim.Adam(rest, lr=learning_rate, fused=True)}
        if self.matrices:
            self.parts["muon"] = torch.optim.Muon([matrix for _, matrix in self.matrices], lr=learning_rate,
                                                  weight_decay=0.0)
        self.peak, self.warmup, self.total, self.clip = learning_rate, warmup_steps, total_steps, gradient_clip
        self.bad_in_a_row = 0

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: rises linearly to the peak, then falls as half a cosine towards 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def update(self, network: nn.Module, losses: Iterable[Callable[[], Tensor]], step: int,
               subjects: list[str]) -> tuple[float, float]:
        """Compute and back-propagate each part of the loss, and step on their sum over all parts and ranks.

        network: as `parallel` returned it; every rank needs at least one part. Returns the loss and the gradient norm,
        the same on all ranks. What is not finite is not stepped on; several in a row raise TrainingError.
        """
        remaining, total = iter(losses), 0.0
        part = next(remaining)
        while part:  # gradients are exchanged with those of the last part
            following = next(remaining, None)
            with unsynchronised(network) if following else contextlib.nullcontext():
                loss = part()
                (loss * world()).backward()  # DistributedDataParallel takes the mean over the ranks
            total, part = total + loss.detach(), following
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        total, norm = torch.stack([total, norm]).tolist()  # here the step waits for the device
        total = summed(total)[0]
        if math.isfinite(norm) and math.isfinite(total):
            self._step(self.rate(step))
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
                raise TrainingError(f"step {step}: loss or gradient was not finite {self.bad_in_a_row} times in a row, "
                                    f"last with {', '.join(subjects)}; none of these was taken. Start again in another "
                                    'opt.checkpoint_dir with a lower learning rate or opt.precision = "fp32"')
        for parameter in self.parameters:
            parameter.grad = None
        return total, norm

    def _step(self, rate: float) -> None:
        for parameter, matrix in self.matrices:
            matrix.grad = None if parameter.grad is None else _rows(parameter.grad, parameter)
        for name, part in self.parts.items():
            part.param_groups[0]["lr"] = rate * (MUON_RATE if name == "muon" else 1)
            part.step()

    def state_dict(self) -> dict:
        return {"order": ORDER, **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Raises CheckpointError for a state in the order of an earlier version, which would be taken for this one's.
        """
        if state.get("order") != ORDER:
            raise CheckpointError("the checkpoint is of an earlier version of PDS: it can still be refined, but not be "
                                  "continued; set opt.checkpoint_dir and opt.result_dir to other folders")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight or its gradient as a matrix (out, in), in the order of the weight in memory, of which it is a view."""
    return (tensor if weight.is_contiguous() else tensor.movedim(1, -1)).flatten(1)


class StopRequest:
    """True once SIGTERM or SIGINT came, or `minutes` (0: no limit) are over. Use as a context manager."""

    def __init__(self, minutes: float):
        self.reason = ""
        self._deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame: object) -> None:
        self.reason = f"asked to by {signal.Signals(number).name}"
        signal.signal(number, self._before[number])  # a second one acts at once
        print("\nStopping after this step; once more stops at once.", file=sys.stderr)

    def agreed(self) -> bool:
        """Whether any rank is to stop: asked at the same step, all leave at the same."""
        if any_rank(self) and not self.reason:
            self.reason = "another rank was asked to"
        return bool(self.reason)

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "opt.max_minutes are over"
        return bool(self.reason)

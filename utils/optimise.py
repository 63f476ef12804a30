"""The optimiser step that both trainers share: precision, learning-rate schedule, clipping, and when to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.distributed import any_rank, summed, unsynchronised, world, writes

BAD_STEPS_IN_A_ROW = 5
COUNTERS = ("taken", "bad_in_a_row", "scale", "since_overflow")  # of an optimiser, kept with its state
FORM = 2  # of state_dict; what is kept of a weight is in the order of the weight in memory
FIRST_SCALE, STEPS_BEFORE_HIGHER = 2.0**16, 2000  # of the loss in float16 (Micikevicius et al. 2018)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # of a queue, of Ctrl-C, of a terminal that closes
NOT_HIDDEN = {"stem", "target_stem", "head", "gain", "group", "group_gain"}  # layers at the networks' ends
MUON_RATE = 20.0  # times Adam's rate: Muon's update has length 1 for each row of a matrix, Adam's about 1 per weight


class TrainingError(ValueError):
    """Training that cannot go on; the message says at which step, with which subjects, and what to do."""


def number_type(precision: str, device: torch.device) -> torch.dtype:
    """What to compute in: as asked, or with "auto" bfloat16 where matrices are multiplied in it in hardware.

    A processor that only converts to it (AVX512-BF16 without AMX) takes 1.5 times as long as in float32 (measured).
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


class Optimiser:
    """Muon or Adam with warm-up and cosine decay by optimiser step, and gradient clipping.

    kind "muon" (torch.optim.Muon; Jordan et al. 2024) makes the update of every weight matrix inside the blocks
    orthogonal, a convolution being the matrix from its inputs and taps to its outputs; the first and the last layers
    (stem, head, gain), biases and norms stay with Adam. "adam": all of them. learning_rate is Adam's peak.
    With `float16` the loss is scaled, so that small gradients do not vanish: less after an overflow, more after
    STEPS_BEFORE_HIGHER without.
    """

    def __init__(self, model: nn.Module, learning_rate: float, warmup_steps: int, total_steps: int,
                 gradient_clip: float, kind: str = "adam", float16: bool = False):
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
        self.taken, self.bad_in_a_row = 0, 0  # steps that were taken: the position in the schedule
        self.float16, self.since_overflow = float16, 0
        self.scale = FIRST_SCALE if float16 else 1.0

    def rate(self) -> float:
        """Learning rate of the next step: rises linearly to the peak, then falls as half a cosine towards 0."""
        if self.taken < self.warmup:
            return self.peak * (self.taken + 1) / self.warmup
        done = (self.taken - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def update(self, network: nn.Module, losses: Iterable[Callable[[], Tensor]], step: int,
               subjects: list[str]) -> dict[str, float]:
        """Compute and back-propagate each part of the loss, and step on their sum over all parts and ranks.

        network: as `parallel` returned it; every rank needs at least one part. Returns what is logged, the same on all
        ranks: loss, gradient_norm, learning_rate, and whether a step was taken. What is not finite is not stepped on;
        several in a row raise TrainingError.
        """
        remaining, total = iter(losses), 0.0
        part = next(remaining)
        while part:  # gradients are exchanged with those of the last part
            following = next(remaining, None)
            with unsynchronised(network) if following else contextlib.nullcontext():
                loss = part()
                (loss * world() * self.scale).backward()  # DistributedDataParallel takes the mean over the ranks
            total, part = total + loss.detach(), following
        if self.scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        total, norm = torch.stack([total, norm]).tolist()  # here the step waits for the device
        total, rate = summed(total)[0], self.rate()
        if taken := math.isfinite(norm) and math.isfinite(total):
            self._step(rate)
        else:
            self._skip(step, subjects, overflow=self.scale > 1 and math.isfinite(total))
        for parameter in self.parameters:
            parameter.grad = None
        return {"loss": total, "gradient_norm": norm, "learning_rate": rate if taken else 0.0, "taken": taken}

    def _skip(self, step: int, subjects: list[str], overflow: bool) -> None:
        """Leave weights, averages and schedule as they are; after an overflow scale the loss less from now on."""
        told = f"step {step + 1}, with {', '.join(subjects)}: loss or gradient was not finite"
        self.since_overflow = 0
        if overflow:
            self.scale /= 2
            tqdm.write(f"note: {told}; it was not taken. The loss is now scaled by {self.scale:.0f} (float16)")
            return
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            raise TrainingError(f"{told}, for the {self.bad_in_a_row}th time in a row; none of these was taken. Look "
                                "at these volumes, or start again in another opt.checkpoint_dir with a lower "
                                'opt.learning_rate (stage 2: opt.refine_learning_rate) or opt.precision = "fp32"')
        tqdm.write(f"note: {told}; it was not taken")

    def _step(self, rate: float) -> None:
        self.taken, self.bad_in_a_row, self.since_overflow = self.taken + 1, 0, self.since_overflow + 1
        if self.float16 and self.since_overflow % STEPS_BEFORE_HIGHER == 0:
            self.scale *= 2
        for parameter, matrix in self.matrices:
            matrix.grad = None if parameter.grad is None else _rows(parameter.grad, parameter)
        for name, part in self.parts.items():
            part.param_groups[0]["lr"] = rate * (MUON_RATE if name == "muon" else 1)
            part.step()

    def state_dict(self) -> dict:
        return {"form": FORM, **{name: getattr(self, name) for name in COUNTERS},
                **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for a state of an earlier version, which would be taken for this one's."""
        if state.get("form") != FORM:
            raise ValueError("the optimiser's state is of an earlier version")
        for name in COUNTERS:
            setattr(self, name, state[name])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight or its gradient as a matrix (out, in), in the order of the weight in memory, of which it is a view."""
    return (tensor if weight.is_contiguous() else tensor.movedim(1, -1)).flatten(1)


def leave(status: int) -> None:
    """End the program with this status, whatever signals come until it has ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


class Interrupted(Exception):
    """A stop was asked for in the middle of something that is done again when the run continues."""


class StopRequest:
    """True once SIGTERM, SIGINT or SIGHUP came, or a time is over. Use as a context manager.

    A second signal, more than a second after the first, acts as it would without: torchrun and queues send several.
    """

    def __init__(self):
        self.reason, self.signals = "", 0
        self._begun, self._first, self._deadline = time.monotonic(), math.inf, math.inf
        self._before: dict[int, object] = {}

    def end_after(self, minutes: float) -> None:
        """Become true so many minutes after this object was made; 0: never."""
        self._deadline = self._begun + 60 * minutes if minutes else math.inf

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame: object) -> None:
        self.signals += 1
        if time.monotonic() > self._first + 1:
            self.__exit__()
            os.kill(os.getpid(), number)
            return
        self._first = min(self._first, time.monotonic())
        self.reason = self.reason or f"asked to by {signal.Signals(number).name}"
        if self.signals == 1 and writes():
            with contextlib.suppress(OSError):  # not by print, which may be interrupted here
                os.write(2, b"\nStopping as soon as all is saved; once more stops at once.\n")

    def watch(self, items: Iterable) -> Iterator:
        """The same items, one by one; Interrupted in the place of the next once a stop is asked for."""
        for item in items:
            if self:
                raise Interrupted
            yield item

    def agreed(self) -> bool:
        """Whether any rank is to stop: asked at the same step, all leave at the same."""
        if any_rank(self) and not self.reason:
            self.reason = "another rank was asked to"
        return bool(self.reason)

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "opt.max_minutes are over"
        return bool(self.reason)

"""The optimiser of both stages: Adam or Muon, learning-rate schedule, gradient clipping, steps that are skipped."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.distributed import all_reduce_sum, world_size
from training.muon import Muon
from utils.errors import UserError
from utils.tensors import copied

MAX_BAD_STEPS = 5  # in a row
FIRST_SCALE, STEPS_BEFORE_RAISE = 2.0**16, 2000  # of the loss in float16 (Micikevicius et al. 2018)
OUTER_LAYERS = {"stem", "target_stem", "head", "gain", "group"}  # at the ends of the networks
MUON_RATE = 20.0  # times Adam's rate: Muon's update has length 1 per row of a matrix, Adam's about 1 per weight
MUON_DECAY = 0.3  # of weights, times the rate: updates have a fixed length, so weights that grow would learn ever less
DECAY_FRACTION = 0.25  # of the steps after warm-up, at the end
MOMENTS = {"adam": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}  # torch.optim's names
COUNTERS = ("taken", "bad_in_a_row", "loss_scale", "since_overflow")  # saved with the optimiser's state


class Optimiser:
    """Muon or Adam with warm-up, decay at the end and gradient clipping. learning_rate is Adam's peak.

    kind "muon" (Jordan et al. 2024) orthogonalises the update of every hidden weight matrix, where a
    convolution is the matrix from its inputs and taps to its outputs; the networks' outer layers, biases and norms stay
    with Adam. float16: scale the loss, so that small gradients do not vanish; the scale falls after an overflow and
    rises after STEPS_BEFORE_RAISE steps without one.
    """

    def __init__(self, model: nn.Module, learning_rate: float, warmup_steps: int, total_steps: int,
                 gradient_clip: float, kind: str = "adam", float16: bool = False):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        hidden = {name: p for name, p in named.items() if kind == "muon" and p.ndim > 1
                  and not set(name.split(".")) & OUTER_LAYERS}
        self.matrices = [(p, nn.Parameter(as_matrix(p.detach(), p))) for p in hidden.values()]  # (out, in)
        self.optimisers = {"adam": torch.optim.Adam([p for name, p in named.items() if name not in hidden],
                                                    lr=learning_rate, fused=True)}
        if self.matrices:
            self.optimisers["muon"] = Muon([matrix for _, matrix in self.matrices], learning_rate, MUON_DECAY)
        self.peak, self.warmup, self.total, self.clip = learning_rate, warmup_steps, total_steps, gradient_clip
        self.taken, self.bad_in_a_row = 0, 0  # steps that were taken: the position in the schedule
        self.float16, self.since_overflow = float16, 0
        self.loss_scale = FIRST_SCALE if float16 else 1.0

    def learning_rate(self) -> float:
        """Of the next step: rises linearly to the peak, stays there, and falls as half a cosine towards 0 (Hu et al.
        2024). Weights that are averaged do not need a longer decay."""
        if self.taken < self.warmup:
            return self.peak * (self.taken + 1) / self.warmup
        start = self.warmup + (1 - DECAY_FRACTION) * (self.total - self.warmup)
        done = (self.taken - start) / max(1, self.total - start)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to back-propagate: scaled for float16, and for DDP, which takes the mean over the ranks."""
        return loss * world_size() * self.loss_scale

    def step(self, loss: Tensor, where: str) -> dict[str, float]:
        """Take one step on the gradients of `loss` (this rank's share, already back-propagated), and clear them.

        A step that is not finite is skipped, and changes neither weights, averages nor schedule. where: the step and
        its subjects, for messages. Returns loss, gradient_norm, learning_rate and taken, the same on all ranks. Raises
        UserError after MAX_BAD_STEPS skipped steps in a row.
        """
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.loss_scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        total, norm = torch.stack([loss, norm]).tolist()  # waits for the device
        total, rate = all_reduce_sum(total)[0], self.learning_rate()
        if taken := math.isfinite(norm) and math.isfinite(total):
            self._take(rate)
        elif self.loss_scale > 1 and math.isfinite(total):
            self.loss_scale, self.since_overflow = self.loss_scale / 2, 0
            tqdm.write(f"note: {where}: gradient overflow in float16, step skipped; the loss scale is now "
                       f"{self.loss_scale:.0f}")
        else:
            self._count_bad_step(where)
        for parameter in self.parameters:
            parameter.grad = None
        return {"loss": total, "gradient_norm": norm, "learning_rate": rate if taken else 0.0, "taken": taken}

    def _take(self, rate: float) -> None:
        self.taken, self.bad_in_a_row, self.since_overflow = self.taken + 1, 0, self.since_overflow + 1
        if self.float16 and self.since_overflow % STEPS_BEFORE_RAISE == 0:
            self.loss_scale *= 2
        for parameter, matrix in self.matrices:
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad, parameter)
        for name, optimiser in self.optimisers.items():
            optimiser.param_groups[0]["lr"] = rate * (MUON_RATE if name == "muon" else 1)
            optimiser.step()

    def _count_bad_step(self, where: str) -> None:
        self.bad_in_a_row, self.since_overflow = self.bad_in_a_row + 1, 0
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise UserError(f"{where}: loss or gradient is not finite, {self.bad_in_a_row} steps in a row; none of "
                            "them was taken. Look at these volumes, or start again in another opt.checkpoint_dir with "
                            'a lower opt.learning_rate (stage 2: opt.refine_learning_rate) or opt.precision = "fp32"')
        tqdm.write(f"note: {where}: loss or gradient is not finite, step skipped")

    def state_dict(self) -> dict:
        """Counters, and of each optimiser and parameter the tensors of MOMENTS, if it has had a gradient."""
        return {**{name: getattr(self, name) for name in COUNTERS},
                **{kind: [dict(optimiser.state.get(p, {})) for p in optimiser.param_groups[0]["params"]]
                   for kind, optimiser in self.optimisers.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Copy a state into tensors of its own. Raises one of UNFIT (utils/tensors.py) where it does not fit."""
        for name in COUNTERS:
            kind = float if name == "loss_scale" else int
            if type(state[name]) is not kind or not 0 <= state[name] < math.inf:
                raise ValueError(f"{name} = {state[name]!r}")
            setattr(self, name, state[name])
        for kind, optimiser in self.optimisers.items():
            parameters, moments = optimiser.param_groups[0]["params"], state[kind]
            if len(moments) != len(parameters):
                raise ValueError(f"{kind} has moments of {len(moments)} parameters instead of {len(parameters)}")
            for parameter, found in zip(parameters, moments):
                if not found:
                    continue
                likes = {"step": parameter.new_zeros((), dtype=torch.float32)}
                optimiser.state[parameter] = {name: copied(found[name], likes.get(name, parameter.detach()))
                                              for name in MOMENTS[kind]}


def as_matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight or its gradient as a matrix (out, in): a view, in the order in which the weight lies in memory."""
    return (tensor if weight.is_contiguous() else tensor.movedim(1, -1)).flatten(1)

"""The optimiser of both stages: Adam or Muon, learning-rate schedule, gradient clipping, steps that are skipped."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.distributed import world_size
from training.muon import Muon
from utils.errors import UserError
from utils.tensors import copied

MAX_BAD_STEPS = 5  # in a row
FIRST_SCALE, STEPS_BEFORE_RAISE = 2.0**16, 2000  # of the loss in float16 (Micikevicius et al. 2018)
OUTER_LAYERS = {"stem", "target_stem", "head", "gain", "group"}  # at the ends of the networks
MUON_RATE = 20.0  # times Adam's rate: Muon's update has length 1 per row of a matrix, Adam's about 1 per weight
MUON_DECAY = 0.3  # of weights, times the rate: updates have a fixed length, so weights that grow would learn ever less
DECAY_FRACTION = 0.25  # of the steps after warm-up, at the end
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam, torch.optim's names


class Optimiser:
    """Muon or Adam with warm-up, decay at the end and gradient clipping. learning_rate is Adam's peak.

    kind "muon" (Jordan et al. 2024) orthogonalises the update of every hidden weight matrix, where a
    convolution is the matrix from its inputs and taps to its outputs; the networks' outer layers, biases and norms stay
    with Adam. float16: scale the loss, so that small gradients do not vanish; the scale falls after an overflow and
    rises after STEPS_BEFORE_RAISE steps without one.

    `step` does not wait for the device: a step that is not finite is skipped there, and `judge` hears of it later.
    """

    def __init__(self, model: nn.Module, learning_rate: float, warmup_steps: int, total_steps: int,
                 gradient_clip: float, kind: str = "adam", float16: bool = False):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        hidden = {name: p for name, p in named.items() if kind == "muon" and p.ndim > 1
                  and not set(name.split(".")) & OUTER_LAYERS}
        self.hidden = list(hidden.values())
        device = self.parameters[0].device
        self.rate = torch.tensor(float(learning_rate), device=device)  # of the next step
        self.adam = torch.optim.Adam([p for name, p in named.items() if name not in hidden], fused=True,
                                     capturable=device.type == "cuda")
        self.adam.param_groups[0]["lr"] = self.rate
        self.muon = Muon([as_matrix(p.detach(), p) for p in self.hidden], MUON_DECAY) if hidden else None
        self.momenta = self.muon.momenta if self.muon else []
        self.peak, self.warmup, self.total, self.clip = learning_rate, warmup_steps, total_steps, gradient_clip
        self.float16, self.bad_in_a_row = float16, 0
        self.loss_scale = torch.tensor(FIRST_SCALE if float16 else 1.0, device=device)
        self.since_overflow = torch.zeros((), dtype=torch.int32, device=device)

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, ...: rises linearly to the peak, stays there, and falls as half a cosine towards 0 (Hu et al.
        2024). Weights that are averaged do not need a longer decay."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        start = self.warmup + (1 - DECAY_FRACTION) * (self.total - self.warmup)
        done = (step - start) / max(1, self.total - start)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to back-propagate: scaled for float16, and for DDP, which takes the mean over the ranks."""
        loss = loss * self.loss_scale if self.float16 else loss
        return loss * world_size() if world_size() > 1 else loss

    def step(self, loss: Tensor) -> Tensor:
        """Take a step of `rate` on the gradients of `loss` (summed over the ranks), and clear them.

        A step that is not finite changes neither weights nor momenta. Returns the gradient norm, still on the device:
        with the loss scale after the step, it is for `judge`.
        """
        if self.float16:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.loss_scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        ok = (norm + loss).abs() < math.inf
        self.adam.found_inf = 1 - ok.float()  # then it skips the step
        self.adam.step()
        if self.muon:
            gradients = [None if p.grad is None else as_matrix(p.grad, p) for p in self.hidden]
            self.muon.step(gradients, MUON_RATE * self.rate, ok)
        if self.float16:
            overflow = (loss.abs() < math.inf) & ~ok  # a loss that is not finite says nothing about the scale
            torch._amp_update_scale_(self.loss_scale, self.since_overflow, overflow.float(), 2.0, 0.5,
                                     STEPS_BEFORE_RAISE)
            self.loss_scale.clamp_(min=0.5)  # below 1: gradients overflow without a scale, see `judge`
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def judge(self, loss: float, norm: float, scale: float, where: str) -> bool:
        """Whether a step was taken, once its numbers are known; tell the user if not. where: step and subjects.

        Raises UserError after MAX_BAD_STEPS skipped steps in a row.
        """
        if math.isfinite(loss + norm):
            self.bad_in_a_row = 0
            return True
        if self.float16 and math.isfinite(loss) and scale >= 1:
            tqdm.write(f"note: {where}: gradient overflow in float16, step skipped; the loss scale is now {scale:.0f}")
            return False
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise UserError(f"{where}: loss or gradient is not finite, {self.bad_in_a_row} steps in a row; none of "
                            "them was taken. Look at these volumes, or start again in another opt.checkpoint_dir with "
                            'a lower opt.learning_rate (stage 2: opt.refine_learning_rate) or opt.precision = "fp32"')
        tqdm.write(f"note: {where}: loss or gradient is not finite, step skipped")
        return False

    def state_dict(self) -> dict:
        """Counters, the tensors of MOMENTS of each of Adam's parameters that has had a gradient, and Muon's momenta."""
        return {"bad_in_a_row": self.bad_in_a_row, "loss_scale": self.loss_scale.item(),
                "since_overflow": self.since_overflow.item(),
                "adam": [dict(self.adam.state.get(p, {})) for p in self.adam.param_groups[0]["params"]],
                "muon": [{"momentum_buffer": momentum} for momentum in self.momenta]}

    def load_state_dict(self, state: dict) -> None:
        """Copy a state into tensors of its own. Raises one of UNFIT (utils/tensors.py) where it does not fit."""
        for name, kind, most in (("bad_in_a_row", int, 2**31), ("loss_scale", float, math.inf),
                                 ("since_overflow", int, 2**31)):
            if type(state[name]) is not kind or not 0 <= state[name] < most:
                raise ValueError(f"{name} = {state[name]!r}")
        self.bad_in_a_row = state["bad_in_a_row"]
        self.loss_scale.fill_(state["loss_scale"])
        self.since_overflow.fill_(state["since_overflow"])
        parameters = self.adam.param_groups[0]["params"]
        for kind, mine in (("adam", parameters), ("muon", self.momenta)):
            if len(state[kind]) != len(mine):
                raise ValueError(f"{kind} has moments of {len(state[kind])} parameters instead of {len(mine)}")
        for parameter, found in zip(parameters, state["adam"]):
            if found:
                likes = {"step": parameter.new_zeros((), dtype=torch.float32)}
                self.adam.state[parameter] = {name: copied(found[name], likes.get(name, parameter.detach()))
                                              for name in MOMENTS}
        for momentum, found in zip(self.momenta, state["muon"]):
            if found:
                momentum.copy_(copied(found["momentum_buffer"], momentum))


def as_matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight or its gradient as a matrix (out, in): a view, in the order in which the weight lies in memory."""
    return (tensor if weight.is_contiguous() else tensor.movedim(1, -1)).flatten(1)

"""What training will need, before it starts: memory, arithmetic and time, and whether that fits."""

from __future__ import annotations

import math
import os
import time
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from models.diffusion import GIVEN
from models.layers import Conv3d
from models.refine import RefineNet
from models.unet import DualModalUNet
from utils.distributed import ranks_here, world

GIB = 2**30
PROGRAM = 0.7 * GIB  # Python, PyTorch and its scratch memory (measured on the CPU)
KEPT_FREE = 1.4  # so much more memory than tensors hold: what is freed is kept in pieces (measured on the CPU)
CONVOLUTIONS = 0.7  # about this part of a step is spent in the network's convolutions (benchmarks/step.py)


@dataclass
class Cost:
    """Of one rank's share of a step: bytes at its peak, as expected and of the tensors alone; FLOP; parameters."""

    memory: float
    least: float
    flop: float
    parameters: int


class Attention(TorchFunctionMode):
    """Stands in for scaled_dot_product_attention, whose kernels tensors without content do not reach; counts its FLOP.
    """

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            B, heads, tokens, channels = args[0].shape
            self.flop += 7 * 2 * B * heads * tokens**2 * channels  # 2 matrix products forward, 5 backward
            return args[2]
        return func(*args, **(kwargs or {}))


class Work(TorchDispatchMode):
    """Adds up the storages that are alive, `peak` is the most there ever were, in bytes; and the arithmetic, `flop`."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.flop = set(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        if counts := flop_registry.get(func.overloadpacket):
            self.flop += counts(*args, **(kwargs or {}), out_val=made)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def step_cost(opt, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Cost:
    """Walk through one step, direction after direction as the trainers do, with tensors that have no content."""
    mine = math.ceil(opt.batch_size / world())  # of each direction
    together = math.ceil(mine / min(opt.accumulate, mine))
    with torch.device("meta"):
        network = (RefineNet if opt.refine else DualModalUNet)(sizes, **opt.network_arguments())
        network.recompute(opt.gradient_checkpointing)

        def walk() -> None:
            for source, target in network.directions:
                volumes = {name: torch.empty(together, 1, *size) for name, size in sizes.items()}
                t = () if opt.refine else (torch.ones(together),) * 2
                net = network.direction(source, target)
                net(volumes[source], volumes[target], *t).square().mean().backward()

        with Attention() as attention, Work() as work:
            walk()
    flop = (work.flop + attention.flop) * mine / together
    flop *= math.ceil(2 * opt.batch_size / world()) / (2 * mine)  # what is dealt are single directions
    if not opt.refine and opt.timestep_coupling == "independent":
        flop *= 1 - GIVEN / 2  # what is given is not computed
    parameters = sum(p.numel() for p in network.parameters())
    # weights, EMA, and two averages of Adam's; the backbone, and its checkpoint
    kept, gradients = 4 * parameters * (4 + (2 if opt.refine else 0)), 4 * parameters
    features = work.peak - gradients
    half = dtype != torch.float32
    least = features / (2 if half else 1) + gradients + kept
    expected = KEPT_FREE * features * (0.7 if half else 1) + gradients + kept + PROGRAM  # norms stay float32
    return Cost(expected, least, flop, parameters)


def convolution_rate(channels: int, size: tuple[int, ...], pairs: int, device: torch.device,
                     dtype: torch.dtype) -> float:
    """FLOP per second of a convolution of these channels on this grid, forward and backward, on this device now."""
    layer = Conv3d(channels, channels, 3, padding=1).to(device, dtype, memory_format=torch.channels_last_3d)
    x = torch.randn(pairs, channels, *size).to(device, dtype, memory_format=torch.channels_last_3d).requires_grad_()
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        y = layer(x)
        torch.autograd.grad(y, [x, layer.weight], torch.ones_like(y))[0].flatten()[0].item()  # waits for the device
    return 3 * 2 * 27 * channels**2 * pairs * math.prod(size) / (time.perf_counter() - start)


def free_memory(device: torch.device) -> tuple[float, float] | None:
    """(bytes that are free, bytes there are) on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        with open("/proc/meminfo") as file:
            found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file}
        limit = math.inf
        for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            if os.path.exists(name):
                with open(name) as file:
                    limit = min(limit, float(file.read().replace("max", "inf")))
        return min(found["MemAvailable"], limit), min(found["MemTotal"], limit)
    except (OSError, ValueError, KeyError, IndexError):
        return None


@dataclass
class Expected:
    """What training is expected to need: bytes of all ranks on this device, those of tensors alone, (free, all) of the
    device; seconds, which are not taken (0) where it cannot fit.

    whole and epoch: without validation and pictures.
    """

    memory: float
    least: float
    free: tuple[float, float] | None
    parameters: int
    step: float
    epoch: float
    whole: float

    def __str__(self) -> str:
        free = f" ({gib(self.free[0])} free)" if self.free else ""
        return (f"about {gib(self.memory)} of memory{free}, {_duration(self.step)} a step, {_duration(self.epoch)} an "
                f"epoch, {_duration(self.whole)} in all (validation and pictures apart)")


def expect(opt, sizes: dict[str, tuple[int, ...]], steps: int, steps_per_epoch: int, device: torch.device,
           dtype: torch.dtype) -> Expected:
    """Memory and time of training `steps` steps, from the arithmetic of a step and how fast this device is now."""
    cost = step_cost(opt, sizes, dtype)
    ranks, free = 1 if device.type == "cuda" else ranks_here(), free_memory(device)
    fits = not free or cost.least * ranks <= free[1]
    grid = tuple(-(-n // opt.patch_size) for n in max(sizes.values(), key=math.prod))
    pairs = math.ceil(opt.batch_size / world() / opt.accumulate)
    rate = convolution_rate(opt.base_channels, grid, pairs, device, dtype) if fits else math.inf
    seconds = cost.flop / rate / CONVOLUTIONS
    return Expected(cost.memory * ranks, cost.least * ranks, free, cost.parameters, seconds, seconds * steps_per_epoch,
                    seconds * steps)


def remedies(opt) -> list[str]:
    """Settings that lower the memory of a step, those first that leave the result as it is."""
    share = math.ceil(opt.batch_size / world())
    return [*(["fewer ranks on this machine"] if ranks_here() > 1 else []),
            *([f"opt.accumulate = {share}"] if opt.accumulate < share else []),
            *(["opt.gradient_checkpointing = True"] if not opt.gradient_checkpointing else []),
            *(["opt.patch_size = 2"] if opt.patch_size < 2 else []),
            "fewer opt.base_channels", "a smaller opt.image_size (with opt.resize)",
            *(["a smaller opt.batch_size"] if opt.batch_size > world() else [])]


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"

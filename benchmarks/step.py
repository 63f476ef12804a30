"""What a training step costs: time, arithmetic, how much of it are the network's own convolutions, and memory.

    python -m benchmarks.step
    python -m benchmarks.step --configs paper --sizes 32x32x16/48x48x32 --stages 1 --json
    python -m benchmarks.step --configs small --sizes own --precision bf16       [any options of main.py]

Every case is a process of its own, on random volumes: a step to warm up, then steps of the real trainer, and after each
the convolutions that it made, alone: same shapes, layout and precision, forward and backward. `exponent` is the slope
of log time over log voxels between the sizes of a configuration. With --json: one list on standard output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
import train_refine
from main import choose_device
from models import layers
from models.backbone import Backbone
from models.diffusion import Diffusion
from models.unet import DualModalUNet
from opt import PRESETS
from refinement import Refinement
from utils.arguments import parse_arguments
from utils.distributed import keep_freed_memory, parallel
from utils.ema import EMA
from utils.optimise import Optimiser, number_type

OWN = "own"  # the sizes of the configuration itself
SIZES = ["32x32x18/48x48x30", "48x48x27/72x72x45", "64x64x36/96x96x60"]
PEAK = 2**20 if sys.platform == "linux" else 2**30  # ru_maxrss counts KiB on Linux, bytes on macOS


class RandomStudy:
    """Random volumes in the place of a data/study.py Study."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], pairs: int):
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.modalities, self.fingerprint, self.extent = sizes, tuple(sizes), "", torch.full((3,), 200.0)
        self.everything = {name: 2 * torch.rand(pairs, 1, *size, generator=generator) - 1
                           for name, size in sizes.items()}
        self.pairs = [argparse.Namespace(name=f"sub-{i + 1}") for i in range(pairs)]

    def volumes(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return {name: volumes[positions] for name, volumes in self.everything.items()}

    def masks(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(volume) for name, volume in self.volumes(positions).items()}

    def mean_volumes(self) -> dict[str, torch.Tensor]:
        return {name: volumes.mean(dim=0, keepdim=True) for name, volumes in self.everything.items()}


def trainer(settings, stage: int, device: torch.device):
    """(one step of a trainer as a function of its number, the network it trains) on random volumes."""
    study = RandomStudy(settings.image_sizes(), settings.batch_size + 1)  # so that none is the mean volume
    batch, dtype = list(range(settings.batch_size)), number_type(settings.precision, device)
    network = DualModalUNet(study.sizes, **settings.network_arguments()).to(device)
    diffusion = Diffusion(settings.timesteps, settings.prediction)
    backbone = Backbone(parallel(network, device) if stage == 1 else network, diffusion, settings.timestep_coupling,
                        device, dtype)
    if stage == 2:
        settings.coarse, settings.warm_start = "none", False  # as much work as with coarse volumes, none to sample
        network = train_refine.new_network(settings, study, backbone)
        work = Refinement(settings, study, backbone, "")
    network.recompute(settings.gradient_checkpointing)
    kind = settings.refine_optimiser if stage == 2 else settings.optimiser
    optimiser = Optimiser(network, 1e-4, 1, 1000, settings.gradient_clip, kind)
    ema = EMA(network, settings.ema_decay)
    if stage == 2:
        trained = parallel(network, device)
        return lambda step: train_refine.train_step(trained, ema, optimiser, work, batch, step), network
    return lambda step: train.train_step(backbone, ema, optimiser, settings, study, batch, step), network


class Recorded:
    """The convolutions that a network makes: those of one step after another."""

    def __init__(self, network: nn.Module):
        self.calls: list[tuple] = []
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d):
                layer.register_forward_hook(self._saw)

    def _saw(self, layer: nn.Conv3d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            x = inputs[0]
            channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
            self.calls.append((layer, tuple(x.shape), x.dtype, channels_last, x.requires_grad))

    def seconds(self, dtype: torch.dtype) -> float:
        """Time of all recorded convolutions alone, forward and backward; equal ones are timed once. Forgets them."""
        total, known = 0.0, {}
        for layer, *how in self.calls:
            key = (*layer.weight.shape, *layer.stride, *how)
            if key not in known:
                known[key] = convolution_seconds(layer, dtype, *how)
            total += known[key]
        self.calls.clear()
        return total


def convolution_seconds(layer: nn.Conv3d, precision: torch.dtype, shape: tuple[int, ...], dtype: torch.dtype,
                        channels_last: bool, needs_gradient: bool) -> float:
    """Seconds of one convolution, forward and backward: the mean of two after one to warm up."""
    device, wanted = layer.weight.device, list(layer.parameters())
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if needs_gradient:
        wanted.append(x.requires_grad_())
    for attempt in range(3):
        if attempt == 1:
            synchronise(device)
            start = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            y = layer.forward(x)  # past the hook that records
        torch.autograd.grad(y, wanted, torch.ones_like(y))
    synchronise(device)
    return (time.perf_counter() - start) / 2


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use_defaults_of_pytorch() -> None:
    """Undo what makes the networks fast, for --plain: the same arithmetic in the default memory format."""
    layers.layout = lambda size: torch.contiguous_format
    layers.Conv3d.forward = nn.Conv3d.forward


def measure(settings, config: str, stage: int, steps: int, plain: bool) -> dict:
    """One row of the table."""
    if plain:
        use_defaults_of_pytorch()
    else:
        keep_freed_memory()
    torch.manual_seed(0)
    device = choose_device(settings.device)
    step, network = trainer(settings, stage, device)
    convolutions, seconds, alone = Recorded(network), [], []
    dtype = number_type(settings.precision, device)
    step(0)
    convolutions.calls.clear()
    for number in range(steps):
        synchronise(device)
        start = time.perf_counter()
        step(number)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        alone.append(convolutions.seconds(dtype))  # anew after every step, so that both see the same machine
    peak = (torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PEAK)
    with FlopCounterMode(display=False) as counter:  # last, because it keeps tensors alive
        for number in range(steps):  # the same steps: with timesteps of their own, they differ in work
            step(number)
    sizes = settings.image_sizes()
    return {"config": config, "stage": stage, "sizes": "/".join("x".join(map(str, size)) for size in sizes.values()),
            "batch_size": settings.batch_size, "precision": str(dtype).removeprefix("torch."),
            "voxels": sum(int(np.prod(size)) for size in sizes.values()),
            "seconds_per_step": sum(seconds) / steps, "seconds_of_steps": seconds,
            "tflop": counter.get_total_flops() / steps / 1e12, "conv_seconds": sum(alone) / steps,
            "fraction_of_conv": sum(alone) / sum(seconds), "peak_gib": peak}


def case(arguments: tuple) -> dict:
    """`measure` in a process of its own, whose peak memory is that of the case."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def add_exponents(rows: list[dict]) -> None:
    """To every row the slope of log seconds over log voxels of its configuration and stage, or None for one size."""
    for row in rows:
        alike = [each for each in rows if (each["family"], each["stage"]) == (row["family"], row["stage"])]
        voxels, seconds = (np.log([each[key] for each in alike]) for key in ("voxels", "seconds_per_step"))
        several = np.ptp(voxels) > 0
        row["exponent"] = float(np.polyfit(voxels, seconds, 1)[0]) if several else None


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| configuration | stage | sizes | batch | precision | s per step | TFLOP | own convolutions alone | "
             "peak GiB | exponent |", f"|{'---|' * 10}"]
    for row in rows:
        exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        lines.append(f"| {row['config']} | {row['stage']} | {row['sizes']} | {row['batch_size']} | {row['precision']} "
                     f"| {row['seconds_per_step']:.3g} | {row['tflop']:.3g} | {row['fraction_of_conv']:.0%} "
                     f"| {row['peak_gib']:.1f} | {exponent} |")
    return "\n".join(lines)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--configs", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], help=f"{OWN}, or one as 32x32x18/48x48x30")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--steps", type=int, default=2, help="timed steps; ten times as many of small()")
    parser.add_argument("--plain", action="store_true", help="in PyTorch's default memory format, to compare with")
    parser.add_argument("--json", action="store_true")
    own, rest = parser.parse_known_args()
    rows = []
    for config in own.configs:
        for size in own.sizes:
            preset = PRESETS[config]()
            settings = parse_arguments(preset, PRESETS, rest, "settings of the trainer")
            if size != OWN:
                settings.image_size = tuple(tuple(map(int, each.split("x"))) for each in size.split("/"))
            settings.validate()
            for stage in own.stages:
                steps = own.steps * (10 if config == "small" else 1)
                name = config if settings.image_sizes() == preset.image_sizes() else f"{config} at another size"
                print(f"{config}, stage {stage}, {size} ...", file=sys.stderr, flush=True)
                rows.append({**case((settings, name, stage, steps, own.plain)), "family": config})
    add_exponents(rows)
    print(json.dumps(rows, indent=1) if own.json else table(rows))


if __name__ == "__main__":
    run()

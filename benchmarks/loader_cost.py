"""What does reading pairs from the memory-mapped cache cost, as a part of a training step?

    python -m benchmarks.loader_cost [any options of main.py]

Trains stage 1 for some steps, in turn with the study as it is and with all its volumes as tensors in memory (the
cheapest loader there can be), and prints the ratio of their times, step by step, and the time of loading alone.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import main
import train
from benchmarks.ablation import Trial, batches_of
from benchmarks.step import synchronise
from data.study import Study
from opt import PRESETS, opt
from utils.arguments import parse_arguments

STEPS = 40


def in_memory(study: Study) -> None:
    """Replace the study's loader by one that only indexes tensors."""
    everything = study.volumes(list(range(len(study.pairs))))
    study.volumes = lambda positions: {name: volumes[positions] for name, volumes in everything.items()}


def measure(settings) -> dict[str, np.ndarray]:
    """Seconds of each step with the cache and with tensors, and of loading alone, (STEPS,) each."""
    settings.validate()
    cached, tensors = main.read_study(settings), main.read_study(settings)
    in_memory(tensors)
    device = main.choose_device(settings.device)
    trial = Trial(settings, cached, STEPS + 2, device)
    seconds = {"cache": [], "tensors": [], "loading": []}
    for step, batch in zip(range(STEPS + 2), batches_of(cached, settings)):
        order = ("cache", "tensors") if step % 2 else ("tensors", "cache")
        for name in order:
            study = cached if name == "cache" else tensors
            start = time.perf_counter()
            train.train_step(trial.backbone, trial.ema, trial.optimiser, settings, study, batch, step)
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        train.load_batch(cached, batch, train.augmentation(settings, cached, step, list(range(len(batch)))), device)
        seconds["loading"].append(time.perf_counter() - start)
    return {name: np.array(each[2:]) for name, each in seconds.items()}  # the first two warm up


if __name__ == "__main__":
    seconds = measure(parse_arguments(opt, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
    low, middle, high = np.percentile(seconds["cache"] / seconds["tensors"], [25, 50, 75])
    share = np.median(seconds["loading"]) / np.median(seconds["tensors"])
    print(f"step with the cache / step with tensors in memory: median {middle:.3f} (quartiles {low:.3f} .. {high:.3f}, "
          f"{len(seconds['cache'])} steps each)\nloading a batch alone: {share:.1%} of a step")

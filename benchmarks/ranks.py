"""What several ranks are worth: throughput of 1 .. N processes, each bound to a core of its own.

    python -m benchmarks.ranks --ranks 2 --stages 1 2 [any options of main.py]

Each run is torchrun with that many ranks on random volumes, over Gloo, one thread each, turn and turn about: with
opt.batch_size pairs a step for all ranks together (the same run, sooner) and for each of them (more pairs in the same
time). Prints the time per step, the pairs per second against one rank, and what is exchanged in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch

from benchmarks.step import trainer
from opt import PRESETS, opt
from utils.arguments import parse_arguments
from utils.distributed import cores, joined, rank, world


def worker(stage: int, steps: int, pairs: int, words: list[str]) -> None:
    """One rank: binds itself to a core, trains, and (the first) prints its seconds per step and the losses."""
    os.sched_setaffinity(0, {cores()[int(os.environ["LOCAL_RANK"]) % len(cores())]})  # Linux only
    torch.set_num_threads(1)
    settings = parse_arguments(opt, PRESETS, words, "settings of the trainer")
    settings.batch_size = pairs
    with joined(torch.device("cpu")):
        torch.manual_seed(0)
        step, network = trainer(settings, stage, torch.device("cpu"))
        seconds, losses = [], []
        for number in range(steps + 2):  # two to warm up
            start = time.perf_counter()
            losses.append(step(number)["loss"])
            seconds.append(time.perf_counter() - start)
        if rank() == 0:
            megabytes = 4 * sum(p.numel() for p in network.parameters()) / 1e6
            print(json.dumps({"ranks": world(), "pairs": pairs, "seconds": seconds[2:], "losses": losses,
                              "megabytes": megabytes}))


def run(ranks: int, stage: int, pairs: int, steps: int, words: list[str]) -> dict:
    """The worker under torchrun with this many ranks and pairs per step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                "benchmarks.ranks", "--worker", str(stage), str(steps), str(pairs), *words]
    done = subprocess.run(launcher, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(stage: int, ranks: int, rounds: int, pairs: int, steps: int, words: list[str]) -> list[str]:
    """One line for each number of ranks and size of the batch; every round measures each once."""
    cases = {(1, pairs): []} | {(count, size): [] for count in range(2, ranks + 1) for size in (pairs, count * pairs)}
    for _ in range(rounds):
        for (count, size), runs in cases.items():
            runs.append(run(count, stage, size, steps, words))
    lines = []
    for (count, size), runs in cases.items():
        speed = [[run["pairs"] / np.mean(run["seconds"]) for run in each] for each in (runs, cases[1, pairs])]
        ratios = np.divide(*speed)
        seconds, exchanged = np.mean([run["seconds"] for run in runs]), runs[0]["megabytes"] if count > 1 else 0
        lines.append(f"stage {stage}, ranks: {count}, pairs per step: {size}: {seconds:.3f} s a step, "
                     f"{np.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) times the pairs per second of "
                     f"one rank, {exchanged:.0f} MB exchanged per step")
        if size == pairs:
            apart = max(abs(a - b) for one, several in zip(cases[1, pairs], runs)
                        for a, b in zip(one["losses"], several["losses"]))
            lines[-1] += f", losses at most {apart:.1e} from its"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case has its turn")
    own, rest = parser.parse_known_args()
    pairs = parse_arguments(opt, PRESETS, rest, "settings of the trainer").batch_size
    for stage in own.stages:
        print("\n".join(compare(stage, own.ranks, own.rounds, pairs, own.steps, rest)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*map(int, sys.argv[2:5]), sys.argv[5:])
    else:
        main()

"""What several ranks are worth: throughput of 1 .. N processes, each bound to a core of its own, for the same batch.

    python -m benchmarks.ranks --ranks 2 --stages 1 2 [any options of main.py]

Each run is torchrun with that many ranks on random volumes, over Gloo, one thread each, turn and turn about. Prints the
time per step, the throughput against one rank, and what is exchanged in each step.
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
from utils.distributed import joined, rank, world


def worker(stage: int, steps: int, words: list[str]) -> None:
    """One rank: binds itself to a core, trains, and (the first) prints its seconds per step and the losses."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]})
    torch.set_num_threads(1)
    settings = parse_arguments(opt, PRESETS, words, "settings of the trainer")
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
            print(json.dumps({"ranks": world(), "seconds": seconds[2:], "losses": losses, "megabytes": megabytes}))


def run(ranks: int, stage: int, steps: int, words: list[str]) -> dict:
    """The worker under torchrun with this many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                "benchmarks.ranks", "--worker", str(stage), str(steps), *words]
    done = subprocess.run(launcher, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="how often each number of ranks has its turn")
    own, rest = parser.parse_known_args()
    for stage in own.stages:
        found = {ranks: [] for ranks in range(1, own.ranks + 1)}
        for _ in range(own.rounds):
            for ranks, runs in found.items():
                runs.append(run(ranks, stage, own.steps, rest))
        for ranks, runs in found.items():
            ratios = [np.mean(one["seconds"]) / np.mean(several["seconds"]) for one, several in zip(found[1], runs)]
            apart = max(abs(a - b) for one, several in zip(found[1], runs)
                        for a, b in zip(one["losses"], several["losses"]))
            print(f"stage {stage}, {ranks} ranks: {np.mean([run['seconds'] for run in runs]):.3f} s a step, throughput "
                  f"{np.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) times that of one rank, losses "
                  f"differ by at most {apart:.1e}; {runs[0]['megabytes']:.0f} MB of gradients exchanged per step")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()

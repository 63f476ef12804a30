"""What a training step costs: time, arithmetic, loading of data, and memory, on the CPU or a GPU.

    python -m benchmarks.step
    python -m benchmarks.step --presets paper --sizes own 32x32x18/48x48x30 --stages 1 --json
    OMP_NUM_THREADS=1 python -m benchmarks.step --presets small --ranks 1 2 --batch_size 8     [any options of main.py]

Each case trains a stage on random volumes with the program's own loop, in a process of its own: some steps to warm up,
then the timed ones, then the same steps again to count their operations: those dispatched by PyTorch, most of which are
one kernel on a GPU, and their arithmetic. Loading is the share of the time that it takes, or on a GPU would take: it
draws and reads the next step's data meanwhile. With several ranks, batch_size pairs are shared by all of them, and the
peak is that of the main rank. With --json: one list on standard output.
"""

import argparse
import contextlib
import csv
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import zoom
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import STAGE_1_FIRST
from data.study import Study, read_study
from opt import PRESETS, opt
from train import Stage1
from train_refine import Stage2
from training.checkpoint import STAGE_1
from training.distributed import all_reduce_sum, process_group, world_size
from training.ema import EMA
from training.launch import choose_device, precision_name
from training.loop import Stage, fit
from utils.arguments import parse_arguments
from utils.stop import Interrupted

OWN = "own"  # the sizes of the preset
SIZES = [OWN, "32x32x18/48x48x30", "48x48x27/72x72x45"]
COUNTED_STEPS = 2  # counting takes several times as long
RSS_PER_GIB = 2**20 if sys.platform == "linux" else 2**30  # ru_maxrss counts KiB on Linux, bytes on macOS
OF_A_RANDOM_STUDY = ["--folds=1", "--space=native", "--resize=none"]
NOTHING_BUT_STEPS = [*OF_A_RANDOM_STUDY, *STAGE_1_FIRST, "--no-tensorboard", "--epochs=1000", "--refine_epochs=1000",
                     "--validate_every=1000000", "--checkpoint_every=1000000", "--max_steps=0"]


def write_random_study(folder: Path, sizes: dict[str, tuple[int, ...]], pairs: int) -> Path:
    """Write pairs of smooth random volumes, of which both show the same, and their table."""
    random = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", *sizes])
        for i in range(pairs):
            table.writerow([f"sub-{i}", *(f"{i}_{modality}.nii" for modality in sizes)])
            field = random.random((4, 4, 4), np.float32)
            for modality, size in sizes.items():
                volume = zoom(field, [n / 4 for n in size], order=1)
                nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / f"{i}_{modality}.nii")
    return folder / "pairs.csv"


def new_stage(number: int, settings, study: Study, device: torch.device) -> Stage:
    stage = Stage1(settings, study, device)
    if number == 2:
        state = {**stage.metadata, "stage": STAGE_1, "step": 0, "ema": {"model": stage.network.state_dict()},
                 "best": 0.0, "run_id": "0" * 32, "sizes": dict(study.sizes), "network": settings.network_arguments()}
        stage = Stage2(settings, study, device, state)
    stage.save_every = 10**9
    return stage


def train_steps(stage: Stage, warmup: int, steps: int, measure: Callable[[], object]) -> list:
    """Train with `fit`; returns what `measure` returns where each step after the warm-up begins, and after the last.

    The GPU is waited for only at the first and the last of them: in each step, that would slow it down.
    """
    marks, done, update = [], itertools.count(1), EMA.update

    def marked_update(ema: EMA, model: nn.Module) -> None:  # the last that `fit` calls in each step
        update(ema, model)
        if (number := next(done)) >= warmup:
            if stage.device.type == "cuda" and number in (warmup, warmup + steps):
                torch.cuda.synchronize(stage.device)
            marks.append(measure())
            if number == warmup + steps:
                raise Interrupted

    with mock.patch.object(EMA, "update", marked_update), contextlib.suppress(Interrupted), \
            mock.patch.object(Stage, "steps_per_epoch", 10**6):  # no checkpoint between steps
        fit(stage)
    return marks


class Operations(TorchDispatchMode):
    """Counts operations that compute something: not views, nor new memory."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.removeprefix("aten::")
        self.count += not (function.is_view or name in ("_unsafe_view", "lift_fresh") or "empty" in name
                           or "::" in name)  # the profiler's
        return function(*arguments, **(named or {}))


def measure(number: int, warmup: int, steps: int, settings, more: Callable[[Stage], dict] = lambda stage: {}) -> None:
    """Print one row of the table as JSON, measured in this process and the other ranks; `more` adds to it."""
    device = choose_device(settings.device)
    with process_group(device):
        study = read_study(settings)
        stage = new_stage(number, settings, study, device)
        load, loading = stage.load, 0.0

        def timed_load(*arguments: object) -> tuple:
            nonlocal loading
            start = time.perf_counter()
            with _disable_current_modes():  # the host draws and reads, on a GPU meanwhile
                data = load(*arguments)
            loading += time.perf_counter() - start
            return data

        stage.load = timed_load
        seconds, loaded = np.diff(train_steps(stage, warmup, steps, lambda: (time.perf_counter(), loading)), axis=0).T
        peak = (torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda"
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_PER_GIB)
        added, counted = more(stage), min(steps, COUNTED_STEPS)
        with mock.patch("training.loop.may_record", lambda *_: False):  # a graph's operations cannot be seen
            with Operations() as operations:
                counts = train_steps(stage, warmup, counted, lambda: operations.count)
            with FlopCounterMode(display=False) as counter:  # last: it keeps tensors
                flops = train_steps(stage, warmup, counted, counter.get_total_flops)
        tflop = all_reduce_sum((flops[-1] - flops[0]) / counted / 1e12)[0]
        print(json.dumps({  # only the main rank's output is shown
            "stage": number, "sizes": "/".join("x".join(map(str, size)) for size in study.sizes.values()),
            "batch_size": settings.batch_size, "ranks": world_size(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": precision_name(settings.precision, stage.dtype),
            "million_parameters": sum(p.numel() for p in stage.network.parameters()) / 1e6,
            "seconds_per_step": seconds.mean(), "seconds": seconds.tolist(),
            "pairs_per_second": settings.batch_size / seconds.mean(), "loading": loaded.sum() / seconds.sum(),
            "operations": (counts[-1] - counts[0]) / counted, "tflop": tflop,
            "tflop_per_second": tflop / seconds.mean(), "peak_gib": peak, **added}))


def run_case(options: list[str], stage: int, warmup: int = 2, steps: int = 8, ranks: int = 1,
             module: str = "benchmarks.step", timeout: float | None = None, own_data: bool = False) -> dict:
    """`measure` in a new process, or one per rank: `python -m module --case`. Raises TimeoutExpired and SystemExit.

    own_data: on the study that the options name, not on random volumes.
    """
    settings = parse_arguments(opt, PRESETS, options, "")
    settings.validate()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"--{name}_dir={folder}/{name}" for name in ("checkpoint", "result")]
        more = [word for word in NOTHING_BUT_STEPS if not (own_data and word in OF_A_RANDOM_STUDY)]
        if not own_data:
            table = write_random_study(Path(folder), settings.image_sizes(), settings.batch_size)
            folders += [f"--cache_dir={folder}/cache", f"--data_root={table}"]
        case = ["--case", *map(str, (stage, warmup, steps)), *options, *more]
        done = subprocess.run([sys.executable, *launcher, "-m", module, *case, *folders],
                              capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| preset | stage | sizes | batch | ranks | precision | s per step | pairs per s | loading | operations | "
             "TFLOP | TFLOP/s | peak GiB |", f"|{'---|' * 13}"]
    lines += ["| {preset} | {stage} | {sizes} | {batch_size} | {ranks} | {precision} | {seconds_per_step:.3g} | "
              "{pairs_per_second:.3g} | {loading:.1%} | {operations:.0f} | {tflop:.3g} | {tflop_per_second:.3g} | "
              "{peak_gib:.1f} |"
              .format(**row) for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--sizes", nargs="+", default=SIZES, help=f"{OWN}, or one per modality: 32x32x18/48x48x30")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1], help="numbers of ranks to compare")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--json", action="store_true")
    own, options = parser.parse_known_args()
    if own.warmup < 1:
        parser.error("--warmup: at least 1, the step that makes what later ones keep")
    modalities, rows = parse_arguments(opt, PRESETS, options, "").modalities, []
    for preset, size, stage, ranks in itertools.product(own.presets, own.sizes, own.stages, own.ranks):
        print(f"{preset}, {size}, stage {stage}, ranks: {ranks} ...", file=sys.stderr, flush=True)
        sizes = [] if size == OWN else ["--image_size", *map("=".join, zip(modalities, size.split("/"), strict=True))]
        row = run_case(["--preset", preset, *sizes, *options], stage, own.warmup, own.steps, ranks)
        rows.append({"preset": preset, **row})
    print(json.dumps(rows, indent=1) if own.json else table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        measure(*map(int, sys.argv[2:5]), parse_arguments(opt, PRESETS, sys.argv[5:], ""))
    else:
        main()

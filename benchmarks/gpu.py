"""Is PDS right and fast on this GPU? Losses and volumes against the CPU's, speed and kernels, and the demo's score.

    python -m benchmarks.gpu                                        everything, in at most 5 minutes
    python -m benchmarks.gpu --parts demo --minutes 15 --out results/gpu-demo
    python -m benchmarks.gpu --rehearse                             the same in a small form, on the CPU
    python -m benchmarks.gpu --parts speed --optimiser adam         [any options of main.py]

Prints tables, also written to gpu.md, and writes gpu.json. What does not fit into --minutes is listed as not run.
Exit status: 1 if a check of correctness or the demo's score failed, else 0.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import STAGE_1_FIRST, step
from opt import PRESETS, opt
from training.launch import choose_device
from training.loop import Stage
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("correctness", "speed", "demo")
SIZES = {"fmri": (12, 13, 11), "dmri": (16, 17, 14)}
TINY = ["--image_size", "fmri=12x13x11", "dmri=16x17x14", "--base_channels", "8", "--unet_depth", "2"]
STEPS = 8
SHORT = [*STAGE_1_FIRST, *TINY, "--epochs=100", "--refine_epochs=100", "--batch_size=3", "--sampling_steps=3",
         "--folds=3", "--warmup_steps=2", "--num_samples=1", "--validate_every=100", "--no-tensorboard",
         f"--max_steps={STEPS}", "--checkpoint_every=2", "--max_overhead=1", "--space=native", "--align=grid",
         "--learning_rate=1e-4", "--refine_learning_rate=1e-4"]
# Largest relative difference to the CPU's losses in fp32: of the first one (forward pass only), and of all. On a CPU
# these precisions, or noise of 3e-7 in the weights, change losses by up to 2e-5 in stage 1 and 2e-4 in stage 2; a
# network that does not learn, by 0.1 to 0.2. Higher learning rates amplify the last bits (5e-4: 0.06 in stage 2)
TOLERANCES = {"fp32": (5e-5, 5e-3), "tf32": (2e-4, 5e-3), "bf16": (1e-3, 1e-2), "fp16": (2e-4, 5e-3)}
# Relative to the range of the volumes; on a CPU bf16 changed them by 3e-3, fp16 by 4e-4
VOLUME_TOLERANCES = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2, "fp16": 2e-3}
RESUMED = 2e-4  # of stage 1 on a GPU, where the last bits vary; a momentum that is lost changes 1e-3. On a CPU: 0
# main.py, but killed where the sixth step is loaded: after it has saved, and before it has ended
KILLED = """import itertools, os, runpy, signal
from training.loop import Stage
calls, micro_batches = itertools.count(1), Stage.micro_batches
def kill(stage, batch):
    if next(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return micro_batches(stage, batch)
Stage.micro_batches = kill
runpy.run_path('main.py', run_name='__main__')"""
# main.py with the operations that a GPU uses for large volumes only
AS_LARGE = "import models.layers, runpy; models.layers.LARGE = 0; runpy.run_path('main.py', run_name='__main__')"
PROGRAMS = {" until killed": KILLED, " as large": AS_LARGE}
# The most important first: a part, or preset, stage and precision of a case of speed
PLAN = [("correctness",), ("paper", 1, "auto"), ("small", 1, "auto"), ("small", 2, "auto"), ("paper", 2, "auto"),
        ("demo",), ("small", 1, "tf32"), ("paper", 1, "tf32"), ("small", 2, "tf32"), ("small", 1, "fp32"),
        ("paper", 1, "fp32"), ("small", 2, "fp32"), ("paper", 2, "tf32"), ("paper", 2, "fp32")]
REHEARSAL = [("correctness",), ("small", 1, "fp32"), ("paper", 2, "fp32"), ("demo",)]
NUMBER_OF_STEPS = {"small": (5, 20), "paper": (3, 8)}  # to warm up, and timed
DEVICE_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories in a trace of torch.profiler
GROUPS = {"norm and SiLU": r"^(sum|map)_kernel",  # the first that matches counts
          "attention": r"sdpa|flash|fmha|attention|softmax",
          "changes of layout": r"nchwToNhwc|nhwcToNchw|convertTensor|transpose",
          "convolutions": r"cudnn|conv|fprop|dgrad|wgrad|winograd|implicit|vol2col|col2vol",
          "matrix products": r"gemm|nvjet|cutlass|cublas|dot_kernel", "copies": r"^Mem(cpy|set)", "others": ""}
LONGEST = 15  # kernels listed
README = {"fmri->dmri": (28.18, 0.896), "dmri->fmri": (28.45, 0.865)}  # the demo on the CPU: PSNR in dB, SSIM
PSNR_TOLERANCE = 0.15  # dB
SECONDS = {"correctness": 40, "small": 15, "paper": 25, "demo": 100}  # without so many left, a part is not begun


def child(program: list[str], words: list[str], folder: Path, limit: float,
          **environment: str) -> tuple[int | None, str]:
    """Run a Python program in `folder`; returns its exit status (None: not finished in time) and its output."""
    try:
        done = subprocess.run([sys.executable, *program, *words], cwd=folder, timeout=max(1.0, limit), text=True,
                              errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, **environment})
    except subprocess.TimeoutExpired:
        return None, f"not finished within {limit:.0f} s"
    return done.returncode, done.stdout


def last_lines(output: str) -> str:
    """The end of what a program printed, on one line of a table."""
    return " / ".join(line.strip() for line in output.splitlines() if line.strip())[-400:]


def judge(name: str, measured: float | None, tolerance: float | None, expected: float | None = None,
          note: str = "") -> dict:
    """A row of a table; ok is None without a tolerance. What was not measured, or is NaN, is not ok."""
    ok = None if tolerance is None else measured is not None and abs(measured - (expected or 0.0)) <= tolerance
    return {"name": name, "measured": measured, "expected": expected, "tolerance": tolerance, "ok": ok, "note": note}


# ---- Correctness

def losses(folder: Path, stage: str) -> dict[int, float]:
    """Step -> loss in log.csv."""
    with open(folder / "result" / stage / "log.csv", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["kind"] == "training"}


def loss_difference(ours: dict[int, float], theirs: dict[int, float], steps: int = STEPS) -> float:
    """Largest relative difference of the losses of steps 1 .. `steps`; infinite where one of these is missing."""
    if not set(range(1, steps + 1)) <= ours.keys() & theirs.keys():
        return math.inf
    return float(np.max([abs(ours[n] / theirs[n] - 1) for n in range(1, steps + 1)]))  # a NaN stays NaN


def volume_difference(ours: Path, theirs: Path) -> float:
    """Largest difference of the synthesised volumes in two folders, relative to their range."""
    pairs = [[nib.load(file).get_fdata() for file in (ours / path.relative_to(theirs), path)]
             for path in theirs.rglob("*.nii.gz")]
    return float(np.max([np.abs(a - b).max() / np.ptp(b) for a, b in pairs])) if pairs else math.inf


def correctness(folder: Path, device: str, precisions: tuple[str, ...], options: list[str],
                left: Callable[[], float]) -> list[dict]:
    """Train and sample a tiny study on the CPU in fp32 and on `device`, several processes at once."""
    table, done, on_gpu = step.write_random_study(folder, SIZES, 6), {}, device != "cpu"
    workers = min(14, os.cpu_count() or 1) if on_gpu else 1

    def start(pool: ThreadPoolExecutor, name: str, on: str, precision: str, *more: str, program: str = "main.py"):
        run = folder / name.removesuffix(" until killed")
        words = [*SHORT, *options, f"--data_root={table}", "--device", on, "--precision", precision, *more,
                 *(f"--{each}_dir={run / each}" for each in ("checkpoint", "result", "cache", "sample"))]
        command = next((["-c", code] for end, code in PROGRAMS.items() if name.endswith(end)), [program])
        done[name] = pool.submit(lambda: child(command, words, ROOT, left(), OMP_NUM_THREADS="1"))

    def row(name: str, tolerance: float, measure: Callable[[Path, Path], float], *children: str) -> dict:
        """measure(folders of the last two children), if all children ended as they should."""
        for each in children:
            status, output = done[each].result()
            if status != (-signal.SIGKILL if each.endswith("until killed") else 0):
                return judge(name, None, tolerance, note=f"{each}: status {status}: {last_lines(output)}")
        try:
            return judge(name, measure(folder / children[-2], folder / children[-1]), tolerance)
        except (OSError, LookupError, ValueError) as error:  # a file that is missing, or not as it should be
            return judge(name, None, tolerance, note=f"{type(error).__name__}: {error}")

    def compare(stage: str, steps: int, ours: Path, theirs: Path) -> float:
        return loss_difference(losses(ours, stage), losses(theirs, stage), steps)

    def compare_resumed(ours: Path, theirs: Path) -> float:
        starts = json.loads((ours / "result/stage1/run.json").read_text())["starts"]
        from_checkpoint = len(starts) == 2 and 0 < starts[1]["step"] < STEPS
        return compare("stage1", STEPS, ours, theirs) if from_checkpoint else math.inf

    with ThreadPoolExecutor(workers) as pool:
        start(pool, "cpu", "cpu", "fp32")
        start(pool, "moved until killed", "cpu", "fp32")
        start(pool, "resumed until killed", device, "fp32")
        start(pool, "fp32 as large", device, "fp32")
        for precision in precisions:
            start(pool, precision, device, precision)
    prior = ("--resume_path", str(folder / "cpu/checkpoint/best_model.pth"))
    with ThreadPoolExecutor(workers) as pool:
        start(pool, "moved", device, "fp32")
        start(pool, "resumed", device, "fp32")
        for name, on, precision in (("cpu", "cpu", "fp32"), *((each, device, each) for each in precisions)):
            start(pool, f"refine {name}", on, precision, "--refine", *prior)
            start(pool, f"sample {name}", on, precision, *prior, program="sample.py")
    rows, place = [], "GPU" if on_gpu else "CPU again"
    for stage, prefix in (("stage1", ""), ("refine", "refine ")):
        for precision, steps in itertools.product(precisions, (1, STEPS)):
            rows.append(row(f"{stage}: {'first loss' if steps == 1 else f'{steps} losses'}, {precision}, {place}",
                            TOLERANCES[precision][steps > 1], functools.partial(compare, stage, steps),
                            f"{prefix}{precision}", f"{prefix}cpu"))
    rows.append(row(f"stage1: {STEPS} losses, operations of large volumes, fp32, {place}", TOLERANCES["fp32"][1],
                    functools.partial(compare, "stage1", STEPS), "fp32 as large", "cpu"))
    tolerance = RESUMED if on_gpu else 0.0
    rows += [row(f"{words}, {place}", tolerance, compare_resumed, f"{name} until killed", name, reference)
             for words, name, reference in (("killed and resumed", "resumed", "fp32"),
                                            ("killed on the CPU and resumed", "moved", "cpu"))]
    rows += [row(f"sample.py: volumes, {precision}, {place}", VOLUME_TOLERANCES[precision], volume_difference,
                 f"sample {precision}", "sample cpu") for precision in precisions]
    return rows


# ---- Speed

def kernel_table(events: list[dict], steps: int) -> dict:
    """What the GPU did in `steps` steps, from events of a trace: {"name", "ts", "dur"}, in microseconds.

    The GPU is busy where at least one event runs. Shares are of the sum of all durations.
    """
    if not events:
        return {"busy_ms": None, "kernels": None, "shares": dict.fromkeys(GROUPS), "longest": []}
    busy, until, groups, calls, duration = 0.0, -math.inf, Counter(), Counter(), Counter()
    for event in sorted(events, key=lambda event: event["ts"]):
        name, end = event["name"], event["ts"] + event["dur"]
        busy, until = busy + max(0.0, end - max(event["ts"], until)), max(until, end)
        groups[next(group for group, words in GROUPS.items() if re.search(words, name))] += event["dur"]
        calls[name] += 1
        duration[name] += event["dur"]
    total = sum(duration.values())
    return {"busy_ms": busy / 1e3 / steps, "kernels": len(events) / steps,
            "shares": {group: groups[group] / total for group in GROUPS},
            "longest": [{"name": name[:110], "ms": time / 1e3 / steps, "calls": calls[name] / steps,
                         "share": time / total} for name, time in duration.most_common(LONGEST)]}


def profile_steps(stage: Stage, warmup: int = 3, steps: int = 5) -> dict:
    """`kernel_table` of a few steps under torch.profiler."""
    activity = ProfilerActivity.CUDA if stage.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        marks = step.train_steps(stage, warmup, steps, lambda: time.time_ns() / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        trace.export_chrome_trace(f"{folder}/trace.json")
        found = json.loads(Path(folder, "trace.json").read_text())
    first, last = (mark - found.get("baseTimeNanoseconds", 0) / 1e3 for mark in (marks[0], marks[-1]))
    return kernel_table([event for event in found["traceEvents"] if event.get("cat") in DEVICE_EVENTS
                         and first <= event["ts"] < last], steps)


def speed(preset: str, stage: int, precision: str, options: list[str], steps: tuple[int, int], limit: float) -> dict:
    """Time and profile the steps of one case in a process of its own; "failed" says why there is nothing else.

    "busy" is a fraction of the time of a step without the profiler, which slows the launches of kernels.
    """
    case = {"preset": preset, "stage": stage, "asked": precision}
    try:
        row = step.run_case(["--preset", preset, *options, "--precision", precision], stage, *steps,
                            module="benchmarks.gpu", timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        return {**case, "failed": f"not finished within {limit:.0f} s"}
    except SystemExit as error:
        return {**case, "failed": f"failed: {last_lines(str(error))}"}
    busy = row["busy_ms"] and min(1.0, row["busy_ms"] / 1e3 / row["seconds_per_step"])
    return {**case, **row, "precision": f"{precision} ({row['precision']})", "busy": busy}


# ---- The demo

def demo(folder: Path, options: list[str], reference: dict, left: Callable[[], float]) -> list[dict]:
    """The README's two commands in an empty folder, and the mean scores of the test subjects."""
    rows = []
    for stage, more in ((1, []), (2, ["--refine", "--resume_path", "./checkpoints/best_model.pth"])):
        start = time.perf_counter()
        status, output = child([str(ROOT / "main.py")], [*STAGE_1_FIRST, *options, *more], folder, left())
        if status != 0:  # to be out of time is not to fail
            return [*rows, judge(f"stage {stage}", None, None if status is None else 0.0,
                                 note=f"status {status}: {last_lines(output)}")]
        rows.append(judge(f"stage {stage}, seconds", time.perf_counter() - start, None))
    with open(folder / "results/refine/metrics.csv", newline="") as file:
        scores = [row for row in csv.DictReader(file) if (row["volume"], row["region"]) == ("refined", "volume")]
    for direction in sorted({row["direction"] for row in scores} | reference.keys()):
        of_direction, expected = [row for row in scores if row["direction"] == direction], reference.get(direction)
        for i, metric in enumerate(("psnr", "ssim")):
            mean = sum(float(row[metric]) for row in of_direction) / max(1, len(of_direction))
            rows.append(judge(f"{direction}, {metric}", mean, PSNR_TOLERANCE if expected and metric == "psnr" else None,
                              expected and expected[i]))
    return rows


# ---- The report

def versions(device: torch.device) -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "gpu": None, "driver": None, "cudnn": None, "cores": os.cpu_count()}
    if device.type == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null"
        found |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version(),
                  "driver": subprocess.getoutput(query).split("\n")[0]}
    return found


def markdown(report: dict) -> str:
    """All tables that have rows."""
    def table(title: str, header: str, rows: list[list]) -> list[str]:
        cells = [["-" if each is None else f"{each:.4g}" if isinstance(each, float) else str(each).replace("|", "/")
                  for each in row] for row in rows]
        rule = "---|" * (header.count("|") + 1)
        lines = [f"{title}\n", f"| {header} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in cells), ""]
        return lines if rows else []

    lines = [f"# PDS on {report['versions']['gpu'] or 'a CPU (a rehearsal)'}\n",
             ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value) + "\n"]
    for part in ("correctness", "demo"):
        lines += table(f"## {part.capitalize()}", "check | measured | expected | tolerance | ok | note", [
            [row["name"], row["measured"], row["expected"], row["tolerance"],
             {True: "ok", False: "FAILED", None: None}[row["ok"]], row["note"]] for row in report[part]])
    cases = {f"{row['preset']} {row['stage']} {row['asked']}": row for row in report["speed"]}
    lines += [f"Speed of {case}: {row['failed']}\n" for case, row in cases.items() if "failed" in row]
    measured = {case: row for case, row in cases.items() if "failed" not in row}
    lines += [f"## Speed\n\n{step.table(list(measured.values()))}\n"] if measured else []
    lines += table("Where the GPU's time goes (fractions):", f"case | busy | kernels per step | {' | '.join(GROUPS)}", [
        [case, row["busy"], row["kernels"], *row["shares"].values()] for case, row in measured.items()])
    for case, row in measured.items():
        lines += table(f"The longest kernels of {case}:", "ms per step | calls per step | fraction | kernel",
                       [[each["ms"], each["calls"], each["share"], each["name"]] for each in row["longest"]])
    return "\n".join([*lines, f"Not run, for lack of time: {', '.join(report['not run']) or 'nothing'}", ""])


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in a small form")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=5.0, help="what does not fit is not run")
    own, options = parser.parse_known_args()
    try:
        device = choose_device("cpu" if own.rehearse else parse_arguments(opt, PRESETS, options, "").device)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if device.type != "cuda" and not own.rehearse:
        raise SystemExit("PyTorch uses no GPU here: run this on a machine with an NVIDIA GPU, without --device cpu, or "
                         "try it on the CPU with --rehearse")
    report = {"arguments": sys.argv[1:], "versions": versions(device), **{part: [] for part in PARTS}, "not run": []}
    plan = REHEARSAL if own.rehearse else PLAN
    own.out.mkdir(parents=True, exist_ok=True)
    options += ["--device", str(device)]

    def left() -> float:
        return 60 * own.minutes - (time.monotonic() - start)

    with tempfile.TemporaryDirectory() as temporary:
        for case in plan:
            part, title = case[0] if len(case) == 1 else "speed", " ".join(map(str, case))
            if part not in own.parts:
                continue
            if left() < SECONDS[case[0]]:
                report["not run"].append(title)
                continue
            print(f"{title} ({left():.0f} s left) ...", file=sys.stderr, flush=True)
            folder = Path(temporary, part)
            folder.mkdir(exist_ok=True)
            if part == "correctness":
                precisions = ("fp32",) if own.rehearse else tuple(TOLERANCES)
                report[part] = correctness(folder, str(device), precisions, options, left)
            elif part == "speed":
                steps = (1, 3) if own.rehearse else NUMBER_OF_STEPS[case[0]]
                report[part].append(speed(*case, [*TINY, *options] if own.rehearse else options, steps, left()))
            elif own.rehearse:
                table = step.write_random_study(folder, SIZES, 6)
                report[part] = demo(folder, [*SHORT, *options, f"--data_root={table}"], {}, left)
            else:
                report[part] = demo(folder, options, README, left)
            write_text(own.out / "gpu.json", json.dumps(report, indent=1) + "\n")
    write_text(own.out / "gpu.md", markdown(report))
    print(markdown(report), end="")
    sys.exit(any(row["ok"] is False for row in report["correctness"] + report["demo"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        step.measure(*map(int, sys.argv[2:5]), parse_arguments(opt, PRESETS, sys.argv[5:], ""), profile_steps)
    else:
        main()

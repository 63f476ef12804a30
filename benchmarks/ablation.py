"""Which choices of stage 1 are worth their time: one factor at a time from the defaults, at equal wall-clock.

    python -m benchmarks.ablation --seconds 75 --seeds 3 --out results/ablation [any options of main.py]

Every variant gets as many steps as fit into `seconds` by its own measured time per step, and is scored on validation
subjects. Writes runs.csv, subjects.csv (a finished run is not repeated) and table.md, with mean and spread over seeds,
and the paired effect of the pattern weight inside and outside the networks.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import main
from benchmarks.stage1_quality import joint_scores, translation_scores
from data.study import Study, training_batch
from models.backbone import Backbone
from models.diffusion import Diffusion
from models.unet import DualModalUNet
from opt import PRESETS, opt
from train import train_step, validate
from utils.arguments import parse_arguments
from utils.ema import EMA
from utils.metrics import paired_gain
from utils.optimise import Optimiser, number_type

JOINT = 12  # joint samples of each run
FACTORS = {"default": {}, "timesteps shared": {"timestep_coupling": "shared"}, "epsilon": {"prediction": "epsilon"},
           "fusion late": {"fusion": "late"}, "loss L1": {"loss": "l1"}, "pattern weight 0": {"pattern_weight": 0.0},
           "published topology": {"fusion": "late", "res_blocks": 2, "output_blocks": 1, "patch_size": 1}}
RUN_COLUMNS = ("variant", "seed", "steps", "x0_error", "joint", "mean_shift", "std_ratio", "spread_ratio", "nearest",
               "nearest_real")
SUBJECT_COLUMNS = ("variant", "seed", "subject", "direction", "psnr_single", "ssim_single", "psnr_of_8", "ssim_of_8",
                   "mean_volume", "inside", "outside")


def batches_of(study: Study, settings) -> Iterator[list[int]]:
    """The training batches of one step after the other, without end."""
    for step in itertools.count():
        yield training_batch(study.roles["train"], settings.batch_size, settings.seed, step)


class Trial:
    """One variant being trained: its network, averages and optimiser."""

    def __init__(self, settings, study: Study, steps: int, device: torch.device):
        torch.manual_seed(settings.seed)
        self.settings, self.study, self.steps = settings, study, steps
        network = DualModalUNet(study.sizes, **settings.network_arguments()).to(device)
        network.set_means(study.mean_volumes())
        self.ema = EMA(network, settings.ema_decay)
        self.optimiser = Optimiser(network, settings.learning_rate, settings.warmup_steps, steps,
                                   settings.gradient_clip, settings.optimiser)
        how = (Diffusion(settings.timesteps, settings.prediction), settings.timestep_coupling, device,
               number_type(settings.precision, device))
        self.backbone, self.smooth = (Backbone(each, *how) for each in (network, self.ema.model))

    def train(self, progress=iter) -> float:
        """All steps; returns the median of their seconds."""
        seconds = []
        for step, batch in zip(progress(range(self.steps)), batches_of(self.study, self.settings)):
            start = time.perf_counter()
            train_step(self.backbone, self.ema, self.optimiser, self.settings, self.study, batch, step)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds))


def run(name: str, settings, study: Study, steps: int, device: torch.device) -> tuple[list[dict], list[dict]]:
    """Rows of runs.csv and subjects.csv of one variant and seed."""
    trial = Trial(settings, study, steps, device)
    trial.train(lambda each: tqdm(each, desc=f"{name}, seed {settings.seed}", unit="step"))
    label = {"variant": name, "seed": settings.seed}
    error = validate(trial.smooth, study, 0, settings.batch_size)
    runs = [{**label, "steps": steps, "x0_error": error, "joint": modality, **values}
            for modality, values in joint_scores(trial.smooth, study, settings, JOINT).items()]
    rows = translation_scores(trial.smooth, study, settings, study.roles["validation"], swapped=False)
    return runs, [{**label, **row} for row in rows]


def append(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                        for row in rows)


def read(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a file; of those that are there twice, after an interruption, the last. columns: that tell them."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list({tuple(row[column] for column in columns): row for row in csv.DictReader(file)}.values())


def mean_and_spread(rows: list[dict], column: str, digits: int) -> str:
    """Mean over everything, and standard deviation between the seeds' means."""
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(float(row[column]))
    means = [np.mean(values) for values in by_seed.values()]
    return f"{np.mean(means):.{digits}f} +- {np.std(means, ddof=1) if len(means) > 1 else 0:.{digits}f}"


def table(runs: list[dict], subjects: list[dict]) -> str:
    """Markdown: one line per variant, and the effect of the pattern weight."""
    directions = list(dict.fromkeys(row["direction"] for row in subjects))
    modalities = list(dict.fromkeys(row["joint"] for row in runs))
    heads = ["variant", "steps", "x0 error", *(f"{each}, one sample, dB" for each in directions),
             *(f"{each}, mean of 8, dB / SSIM" for each in directions), "error inside / outside networks",
             *(f"joint {each}: shift, std, spread, nearest / real" for each in modalities)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for variant in dict.fromkeys(row["variant"] for row in runs):
        mine, scores = ([row for row in rows if row["variant"] == variant] for rows in (runs, subjects))
        cells = [variant, mean_and_spread(mine, "steps", 0).split()[0], mean_and_spread(mine, "x0_error", 4)]
        ways = [[row for row in scores if row["direction"] == each] for each in directions]
        cells += [mean_and_spread(way, "psnr_single", 2) for way in ways]
        cells += [f"{mean_and_spread(way, 'psnr_of_8', 2)} / {mean_and_spread(way, 'ssim_of_8', 3)}" for way in ways]
        cells.append(f"{mean_and_spread(scores, 'inside', 4)} / {mean_and_spread(scores, 'outside', 4)}")
        for modality in modalities:
            joint = [row for row in mine if row["joint"] == modality]
            values = [np.mean([float(row[key]) for row in joint]) for key in RUN_COLUMNS[5:]]
            cells.append("{:+.3f}, {:.2f}, {:.2f}, {:.3f} / {:.3f}".format(*values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *pattern_effect(subjects)])


def pattern_effect(subjects: list[dict]) -> list[str]:
    """Error with the pattern weight minus error without it, paired by subject (mean of directions and seeds)."""
    lines = []
    for region in ("inside", "outside"):
        values = {}
        for row in subjects:
            values.setdefault(row["variant"], {}).setdefault(row["subject"], []).append(float(row[region]))
        if {"default", "pattern weight 0"} <= values.keys():
            with_weight, without = (np.array([np.mean(values[name][subject]) for subject in sorted(values[name])])
                                    for name in ("default", "pattern weight 0"))
            if len(with_weight) == len(without):
                gain, low, high = (each / without.mean() for each in paired_gain(with_weight, without))
                lines.append(f"default against pattern weight 0, {region} the networks: mean absolute error "
                             f"{gain:+.1%} ({low:+.1%} .. {high:+.1%}, over subjects, for these seeds)")
    return lines


def ablate(settings, seconds: float, seeds: int, out: Path, names: list[str]) -> None:
    settings.validate()
    study, device = main.read_study(settings), main.choose_device(settings.device)
    out.mkdir(parents=True, exist_ok=True)
    variants = {}
    for name in names:
        variants[name] = copy.deepcopy(settings)
        for key, value in FACTORS[name].items():
            setattr(variants[name], key, value)
    plan = out / "steps.json"  # timed once, so that a continued ablation gives all seeds the same
    steps = json.loads(plan.read_text()) if plan.exists() else {}
    for name in [each for each in names if each not in steps]:
        steps[name] = max(1, round(seconds / min(Trial(variants[name], study, 6, device).train() for _ in range(2))))
    plan.write_text(json.dumps(steps))
    results = {"runs.csv": ("variant", "seed", "joint"), "subjects.csv": ("variant", "seed", "subject", "direction")}
    for seed in range(seeds):
        for name, each in variants.items():
            each.seed = seed
            finished = read(out / "runs.csv", results["runs.csv"])
            if any(row["variant"] == name and int(row["seed"]) == seed for row in finished):
                continue
            runs, subjects = run(name, each, study, steps[name], device)
            append(out / "subjects.csv", SUBJECT_COLUMNS, subjects)
            append(out / "runs.csv", RUN_COLUMNS, runs)
            (out / "table.md").write_text(table(*(read(out / name, keys) for name, keys in results.items())) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=75, help="of training per variant and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/ablation"))
    parser.add_argument("--variants", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    own, rest = parser.parse_known_args()
    ablate(parse_arguments(opt, PRESETS, rest, "settings of the runs"), own.seconds, own.seeds, own.out, own.variants)

"""Which parts of stage 2 are worth their time: one at a time left out of the defaults, at equal total wall-clock.

    python -m benchmarks.refine_ablation --seconds 300 --stage1 0.5 --seeds 2 [any options of main.py]

Every variant has `seconds` for all it needs: the share `stage1` of it for the backbone (trained once per seed), then
the coarse volumes, and the rest for stage 2; what needs no backbone has all of it for stage 2. Scored on the
validation subjects. Writes subjects.csv (a finished run is not repeated) and table.md with mean and spread over seeds
and the paired gain of the default.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import main
from benchmarks.ablation import Trial, append, batches_of, mean_and_spread, read
from data.study import Study
from models.backbone import Backbone
from models.refine import RefineNet
from opt import PRESETS, opt
from refinement import Refinement
from train_refine import fit_blend, new_network, train_step
from utils.arguments import parse_arguments
from utils.ema import EMA
from utils.metrics import paired_gain, score
from utils.optimise import Optimiser

VARIANTS = {"default": {}, "no prior": {"coarse": "none"}, "no stage 1": {"coarse": "none", "warm_start": False},
            "joint prior": {"coarse": "joint"}, "random trunk": {"warm_start": False},
            "no residual path": {"residual": False}, "no microstructure loss": {"microstructure_weight": 0.0},
            "no structure loss": {"structure_weight": 0.0}, "Adam": {"refine_optimiser": "adam"}}
COLUMNS = ("variant", "seed", "steps", "stage1", "sampling", "stage2", "subject", "direction", "psnr", "ssim", "coarse")


class RefineTrial:
    """Stage 2 of one variant on a given backbone."""

    def __init__(self, settings, study: Study, backbone: Backbone):
        start = time.perf_counter()
        self.settings, self.study = settings, study
        self.work = Refinement(settings, study, backbone, "")
        self.sampling = 0.0 if settings.coarse == "none" else time.perf_counter() - start
        self.network = new_network(settings, study, backbone)
        fit_blend(self.network, self.work)
        self.ema = EMA(self.network, settings.ema_decay)

    def train(self, steps: int, progress=iter) -> list[float]:
        """Train; returns the seconds of every step."""
        optimiser, seconds = Optimiser(self.network, self.settings.refine_learning_rate, self.settings.warmup_steps,
                                       steps, self.settings.gradient_clip, self.settings.refine_optimiser), []
        for step, batch in zip(progress(range(steps)), batches_of(self.study, self.settings)):
            start = time.perf_counter()
            train_step(self.network, self.ema, optimiser, self.work, batch, step)
            seconds.append(time.perf_counter() - start)
        return seconds

    def scores(self) -> list[dict]:
        """PSNR and SSIM of the refined, and PSNR of the coarse volumes of the validation subjects."""
        network: RefineNet = self.ema.model
        rows = []
        for i in self.study.roles["validation"]:
            for source, target in network.directions:
                truth = self.study.volumes([i])[target][0, 0].numpy()
                refined, coarse = (score(volume[0, 0].numpy(), truth, {})["volume"] for volume in (
                    self.work.refined(network, source, target, [i]), self.work.coarse(target, [i])))
                rows.append({"subject": self.study.pairs[i].name, "direction": f"{source}->{target}",
                             "psnr": refined["psnr"], "ssim": refined["ssim"], "coarse": coarse["psnr"]})
        return rows


def train_backbone(settings, study: Study, steps: int, device: torch.device) -> tuple[Backbone, float]:
    """Stage 1; its smoothed network, and the seconds that it took."""
    trial, start = Trial(settings, study, steps, device), time.perf_counter()
    trial.train(lambda each: tqdm(each, desc=f"stage 1, seed {settings.seed}", unit="step"))
    return trial.smooth, time.perf_counter() - start


def run(name: str, settings, study: Study, backbone: Backbone, seconds: float, stage_1: float) -> list[dict]:
    """Rows of one variant and seed."""
    with tempfile.TemporaryDirectory() as folder:
        settings.cache_dir = folder  # the coarse volumes are made anew, and timed
        trial = RefineTrial(settings, study, backbone)
        before = 0.0 if settings.coarse == "none" and not settings.warm_start else stage_1
        pace = float(np.median(RefineTrial(settings, study, backbone).train(4)))
        steps = round((seconds - before - trial.sampling) / pace)
        if steps < 1:
            raise SystemExit(f"{name}: {seconds:g} seconds are over after {before:.0f} of stage 1 and "
                             f"{trial.sampling:.0f} of sampling; give more with --seconds, or less with --stage1")
        spent = trial.train(steps, lambda each: tqdm(each, desc=f"{name}, seed {settings.seed}", unit="step"))
        label = {"variant": name, "seed": settings.seed, "steps": steps, "stage1": before, "sampling": trial.sampling,
                 "stage2": sum(spent)}
        return [{**label, **row} for row in trial.scores()]


def table(rows: list[dict]) -> str:
    """Markdown: one line per variant."""
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    heads = ["variant", "seconds: stage 1, coarse, stage 2", "steps of stage 2",
             *(f"{each}, PSNR (dB) / SSIM" for each in directions),
             *(f"{each}, default is better by (dB)" for each in directions)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    values: dict[str, dict] = {}
    for row in rows:
        values.setdefault(row["direction"], {}).setdefault(row["variant"], {}).setdefault(row["subject"], []).append(
            float(row["psnr"]))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        spent = ", ".join(f"{np.mean([float(row[key]) for row in mine]):.0f}" for key in ("stage1", "sampling",
                                                                                       "stage2"))
        cells = [variant, spent, mean_and_spread(mine, "steps", 0).split()[0]]
        ways = [[row for row in mine if row["direction"] == each] for each in directions]
        cells += [f"{mean_and_spread(way, 'psnr', 2)} / {mean_and_spread(way, 'ssim', 3)}" for way in ways]
        for direction in directions:
            pair = [values[direction].get(name, {}) for name in ("default", variant)]
            subjects = sorted(set(pair[0]) & set(pair[1]))
            gain, low, high = paired_gain(*(np.array([np.mean(each[name]) for name in subjects]) for each in pair))
            cells.append("" if variant == "default" else f"{gain:+.2f} ({low:+.2f} .. {high:+.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablate(settings, seconds: float, share: float, seeds: int, out: Path) -> None:
    settings.validate()
    study, device = main.read_study(settings), main.choose_device(settings.device)
    out.mkdir(parents=True, exist_ok=True)
    plan, wanted = out / "plan.json", {"seconds": seconds, "share": share, "data": study.fingerprint,
                                       "settings": repr({**settings.resolved(), "cache_dir": "", "data_root": ""})}
    if not plan.exists():  # timed once, so that a continued ablation repeats the same stage 1
        pace = min(Trial(settings, study, 6, device).train() for _ in range(2))
        plan.write_text(json.dumps({**wanted, "steps": max(1, round(share * seconds / pace))}))
    known = json.loads(plan.read_text())
    if {**known, **wanted} != known:
        raise SystemExit(f"{plan} is of an ablation with other settings or data; give another --out")
    for seed in range(seeds):
        finished = {row["variant"] for row in read(out / "subjects.csv", COLUMNS[:2]) if int(row["seed"]) == seed}
        if not set(VARIANTS) - finished:
            continue
        settings.seed = seed
        backbone, spent = train_backbone(settings, study, known["steps"], device)
        for name in VARIANTS:
            if name in finished:
                continue
            changed = copy.deepcopy(settings)
            for key, value in VARIANTS[name].items():
                setattr(changed, key, value)
            append(out / "subjects.csv", COLUMNS, run(name, changed, study, backbone, seconds, spent))
            rows = read(out / "subjects.csv", ("variant", "seed", "subject", "direction"))
            (out / "table.md").write_text(table(rows) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=300, help="of each variant and seed, for everything")
    parser.add_argument("--stage1", type=float, default=0.5, help="share of the seconds that stage 1 has")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/refine_ablation"))
    own, rest = parser.parse_known_args()
    if not (0 < own.seconds < 1e6 and 0 <= own.stage1 < 1 and own.seeds >= 1):
        parser.error("--seconds must be above 0, --stage1 at least 0 and below 1, --seeds at least 1")
    ablate(parse_arguments(opt, PRESETS, rest, "settings of the runs"), own.seconds, own.stage1, own.seeds, own.out)

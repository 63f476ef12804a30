"""What is the stage-1 model worth by itself, on subjects that it was not trained on?

    python -m benchmarks.stage1_quality checkpoints/best_model.pth [any options of main.py, as the run had them]

Prints, over the test subjects: translation both ways (single samples and the mean of 8, against the mean training
volume, and with another subject's source in place of the own one), and joint samples against real volumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import main
from data.study import Study
from models.backbone import Backbone
from models.diffusion import Purpose
from opt import PRESETS, opt
from train import STAGE
from utils.arguments import parse_arguments
from utils.checkpoint import read_checkpoint, refuse_another_run
from utils.metrics import paired_gain, score
from utils.optimise import number_type

SAMPLES = 8  # of each subject and direction
JOINT = 24  # joint samples


def translations(backbone: Backbone, study: Study, opt, i: int, source: str, target: str, giver: int) -> np.ndarray:
    """(SAMPLES, X, Y, Z) of subject i's target, given the source of the subject `giver`."""
    keys = [(opt.seed, Purpose.PICTURES, i, k) for k in range(SAMPLES)]
    given = {source: study.volumes([giver])[source].expand(SAMPLES, -1, -1, -1, -1)}
    made = backbone.sample(keys, study.sizes, opt.sampling_steps, opt.sampler, opt.eta, given)[target]
    return made[:, 0].cpu().numpy()


def translation_scores(backbone: Backbone, study: Study, opt, members: list[int], swapped: bool) -> list[dict]:
    """One row per subject and direction; inside and outside: mean absolute error of the mean of samples."""
    rows, means = [], study.mean_volumes()
    for place, i in enumerate(members):
        real, masks = study.volumes([i]), study.masks([i])
        for source, target in backbone.network.directions:
            truth, inside = real[target][0, 0].numpy(), masks[target][0, 0].numpy() > 0
            made = translations(backbone, study, opt, i, source, target, i)
            single = [score(each, truth, {})["volume"] for each in made]
            mean = score(made.mean(0), truth, {"inside": inside, "outside": ~inside})
            row = {"subject": study.pairs[i].name, "direction": f"{source}->{target}",
                   "psnr_single": np.mean([each["psnr"] for each in single]),
                   "ssim_single": np.mean([each["ssim"] for each in single]),
                   "psnr_of_8": mean["volume"]["psnr"], "ssim_of_8": mean["volume"]["ssim"],
                   "mean_volume": score(means[target][0, 0].numpy(), truth, {})["volume"]["psnr"],
                   "inside": mean.get("inside", {}).get("mae", float("nan")), "outside": mean["outside"]["mae"]}
            if swapped:
                other = translations(backbone, study, opt, i, source, target, members[(place + 1) % len(members)])
                row["psnr_swapped"] = score(other.mean(0), truth, {})["volume"]["psnr"]
            rows.append(row)
    return rows


def joint_scores(backbone: Backbone, study: Study, opt, count: int) -> dict[str, dict[str, float]]:
    """modality -> how `count` joint samples compare to the real volumes of all subjects.

    mean_shift: of all voxels; std_ratio: of all voxels; spread_ratio: variance between samples over that between
    subjects, mean over voxels; nearest, nearest_real: mean RMSE of a sample, and of a subject that was not trained on,
    to the training volume that is nearest to it.
    """
    made = {name: [] for name in study.modalities}
    for start in range(0, count, 8):
        keys = [(opt.seed, Purpose.PICTURES, 10**6 + k) for k in range(start, min(start + 8, count))]
        for name, each in backbone.sample(keys, study.sizes, opt.sampling_steps, opt.sampler, opt.eta).items():
            made[name].append(each.cpu())
    scores = {}
    for name in study.modalities:
        samples, real = torch.cat(made[name]), study.volumes(list(range(len(study.pairs))))[name]
        train, others = real[study.roles["train"]], real[study.roles["validation"] + study.roles["test"]]

        def nearest(volumes: torch.Tensor, train: torch.Tensor = train) -> float:
            voxels = volumes[0].numel()
            return float(torch.cdist(volumes.flatten(1), train.flatten(1)).min(1).values.mean() / voxels**0.5)

        scores[name] = {"mean_shift": float(samples.mean() - real.mean()),
                        "std_ratio": float(samples.std() / real.std()),
                        "spread_ratio": float(samples.var(0).mean() / real.var(0).mean()),
                        "nearest": nearest(samples), "nearest_real": nearest(others)}
    return scores


def open_run(checkpoint: Path, settings) -> tuple[Study, Backbone]:
    """A stage-1 model and the study that it was trained on; refuses another study or split."""
    settings.validate()
    study, device = main.read_study(settings), main.choose_device(settings.device)
    state = read_checkpoint(checkpoint, (STAGE,))
    refuse_another_run(checkpoint, state, {}, {"data": study.fingerprint, "split": study.split_fingerprint})
    return study, Backbone.from_checkpoint(state, device, number_type(settings.precision, device))


def report(checkpoint: Path, settings) -> None:
    study, backbone = open_run(checkpoint, settings)
    rows = translation_scores(backbone, study, settings, study.roles["test"], swapped=True)
    for direction in dict.fromkeys(row["direction"] for row in rows):
        mine = [row for row in rows if row["direction"] == direction]
        mean = {key: np.array([row[key] for row in mine]) for key in set(mine[0]) - {"subject", "direction"}}
        single, of_8 = (f"{mean[f'psnr_{kind}'].mean():.2f} dB / {mean[f'ssim_{kind}'].mean():.3f}"
                        for kind in ("single", "of_8"))
        print(f"{direction}: one sample {single}, mean of {SAMPLES} {of_8} ({len(mine)} subjects)")
        for label, key in (("the mean training volume", "mean_volume"), ("another subject's source", "psnr_swapped")):
            gain, low, high = paired_gain(mean["psnr_of_8"], mean[key])
            print(f"    over {label}: {gain:+.2f} dB ({low:+.2f} .. {high:+.2f})")
    for name, values in joint_scores(backbone, study, settings, JOINT).items():
        print(f"joint {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    report(Path(sys.argv[1]), parse_arguments(opt, PRESETS, sys.argv[2:], __doc__.splitlines()[0]))

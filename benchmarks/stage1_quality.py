"""Quality of the stage-1 model on subjects that it was not trained on.

    python -m benchmarks.stage1_quality checkpoints/best_model.pth

Prints, over the test subjects: translation both ways (single samples, their mean, and the expected volume, compared
with that mean, the mean training volume and the expected volume given another subject's source; and its share of the
time of 8 samples), and joint samples compared with real volumes.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import open_run, run_report
from data.study import Study
from models.diffusion import Purpose, Volumes
from models.prior import Prior
from models.samplers import Sampling
from training.checkpoint import STAGE_1
from utils.errors import UserError
from utils.metrics import basic_scores, gain_text

SAMPLES = 8  # per subject and direction, and per batch of joint samples
JOINT = 24  # joint samples


def open_prior(checkpoint: Path, settings) -> tuple[Study, Prior]:
    """The study of a stage-1 model, and the model. Raises UserError as `open_run`, and without expected volumes."""
    study, model = open_run(checkpoint, settings, (STAGE_1,))
    if not model.prior.has_expected_volume:
        raise UserError(f"{checkpoint}: has no expected volume (opt.prediction, opt.timestep_coupling)")
    return study, model.prior


def sampling_of(settings) -> Sampling:
    return Sampling(settings.sampler, settings.sampling_steps, settings.eta)


def translation_scores(prior: Prior, study: Study, settings, members: list[int]) -> list[dict]:
    """One row per subject and direction; swapped: the expected volume of the next of these subjects."""
    def timed(target: str, call: Callable[..., Tensor | Volumes], *arguments: object) -> tuple[np.ndarray, float]:
        start, made = time.perf_counter(), call(*arguments)
        made = made[target] if isinstance(made, dict) else made
        return made[:, 0].cpu().numpy(), time.perf_counter() - start  # the copy waits for the device

    rows, means = [], study.mean_volumes()
    for i, other in zip(members, [*members[1:], members[0]]):
        real = study.volumes([i])
        for source, target in prior.network.directions:
            truth, keys = real[target][0, 0].numpy(), [(settings.seed, Purpose.PICTURES, i, k) for k in range(SAMPLES)]
            given = {source: real[source].expand(SAMPLES, -1, -1, -1, -1)}
            samples, long = timed(target, prior.sample, keys, sampling_of(settings), given)
            (expected,), short = timed(target, prior.expected, target, real[source])
            (other_expected,), _ = timed(target, prior.expected, target, study.volumes([other])[source])
            single = [basic_scores(sample, truth) for sample in samples]
            mean = basic_scores(samples.mean(axis=0), truth)
            expected, swapped = (basic_scores(each, truth) for each in (expected, other_expected))
            rows.append({"subject": study.pairs[i].name, "direction": f"{source}->{target}",
                         "psnr_single": np.mean([scores["psnr"] for scores in single]),
                         "ssim_single": np.mean([scores["ssim"] for scores in single]),
                         "psnr_mean": mean["psnr"], "ssim_mean": mean["ssim"], "psnr_swapped": swapped["psnr"],
                         "psnr_expected": expected["psnr"], "ssim_expected": expected["ssim"], "share": short / long,
                         "psnr_mean_volume": basic_scores(means[target][0, 0].numpy(), truth)["psnr"]})
    return rows


def joint_scores(prior: Prior, study: Study, settings, count: int) -> dict[str, dict[str, float]]:
    """modality -> how `count` joint samples compare with the real volumes of all subjects.

    mean_shift, std_ratio: over all voxels; spread_ratio: variance between samples over variance between subjects, mean
    over voxels; nearest, nearest_real: mean RMSE of samples, and of held-out subjects, to the nearest training volume.
    """
    keys = [(settings.seed, Purpose.PICTURES, 10**6 + k) for k in range(count)]
    batches = [prior.sample(keys[start:start + SAMPLES], sampling_of(settings)) for start in range(0, count, SAMPLES)]
    scores, everyone, roles = {}, study.volumes(list(range(len(study.pairs)))), study.roles
    for modality in study.modalities:
        samples = torch.cat([batch[modality].cpu() for batch in batches])[:, 0].numpy()
        real = everyone[modality][:, 0].numpy()
        train = real[[i for i in study.trained_on if study.has(modality, i)]]
        held_out = real[roles["validation"] + roles["test"]]
        nearest, nearest_real = (np.mean([np.sqrt(np.nanmean(np.square(train - volume), axis=(1, 2, 3))).min()
                                          for volume in volumes]) for volumes in (samples, held_out))
        scores[modality] = {"mean_shift": samples.mean() - np.nanmean(real),
                            "std_ratio": samples.std() / np.nanstd(real),
                            "spread_ratio": samples.var(axis=0).mean() / np.nanmean(np.nanvar(real, axis=0)),
                            "nearest": nearest, "nearest_real": nearest_real}
    return scores


def report(checkpoint: Path, settings) -> None:
    study, prior = open_prior(checkpoint, settings)
    rows = translation_scores(prior, study, settings, study.roles["test"])
    for direction in dict.fromkeys(row["direction"] for row in rows):
        scores = [row for row in rows if row["direction"] == direction]
        values = {key: np.array([row[key] for row in scores]) for key in scores[0] if key.startswith(("psnr", "ssim"))}
        single, mean, expected = (f"{values[f'psnr_{kind}'].mean():.2f} dB / {values[f'ssim_{kind}'].mean():.3f}"
                        for kind in ("single", "mean", "expected"))
        share = np.median([row["share"] for row in scores])
        print(f"{direction}: one sample {single}, mean of {SAMPLES} {mean}, expected volume {expected} ({len(scores)} "
              f"subjects), in 1/{1 / share:.0f} of the time of {SAMPLES} samples")
        for label, key in ((f"the mean of {SAMPLES} samples", "psnr_mean"),
                           ("the mean training volume", "psnr_mean_volume"),
                           ("another subject's source", "psnr_swapped")):
            print(f"    expected volume over {label}: {gain_text(values['psnr_expected'], values[key], '+.2f', ' dB')}")
    for modality, scores in joint_scores(prior, study, settings, JOINT).items():
        print(f"joint {modality}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))


if __name__ == "__main__":
    run_report(report, __doc__, "best_model.pth")

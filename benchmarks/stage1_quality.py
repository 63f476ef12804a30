"""Quality of the stage-1 model on subjects that it was not trained on.

    python -m benchmarks.stage1_quality checkpoints/best_model.pth [options of main.py, as the run had them]

Prints, over the test subjects: translation both ways (single samples and the mean of 8, compared with the mean training
volume and with a translation of another subject's source), and joint samples compared with real volumes.
"""

from pathlib import Path

import numpy as np
import torch

from benchmarks import run_report
from data.study import Study, read_study
from models.diffusion import Purpose
from models.prior import Prior
from models.samplers import Sampling
from training.checkpoint import STAGE_1, read_checkpoint, refuse_another_run
from training.launch import choose_device, compute_dtype
from utils.metrics import paired_gain, score

SAMPLES = 8  # per subject and direction, and per batch of joint samples
JOINT = 24  # joint samples


def open_run(checkpoint: Path, settings) -> tuple[Study, Prior]:
    """A stage-1 model and the study that it was trained on. Raises UserError where the study or its split differs."""
    settings.validate()
    study, device, state = read_study(settings), choose_device(settings.device), read_checkpoint(checkpoint, (STAGE_1,))
    refuse_another_run(checkpoint, state, {}, {"data": study.fingerprint, "split": study.split_fingerprint})
    return study, Prior.from_checkpoint(state, device, compute_dtype(settings.precision, device))


def sampling_of(settings) -> Sampling:
    return Sampling(settings.sampler, settings.sampling_steps, settings.eta)


def translation_scores(prior: Prior, study: Study, settings, members: list[int]) -> list[dict]:
    """One row per subject and direction; swapped: given the source of the next of these subjects."""
    def translate(i: int, source: str, target: str, giver: int) -> np.ndarray:
        keys = [(settings.seed, Purpose.PICTURES, i, k) for k in range(SAMPLES)]
        given = {source: study.volumes([giver])[source].expand(SAMPLES, -1, -1, -1, -1)}
        return prior.sample(keys, sampling_of(settings), given)[target][:, 0].cpu().numpy()  # (SAMPLES, X, Y, Z)

    rows, means = [], study.mean_volumes()
    for i, other in zip(members, [*members[1:], members[0]]):
        real = study.volumes([i])
        for source, target in prior.network.directions:
            truth, samples = real[target][0, 0].numpy(), translate(i, source, target, giver=i)
            single = [score(sample, truth, {})["volume"] for sample in samples]
            mean = score(samples.mean(axis=0), truth, {})["volume"]
            swapped = score(translate(i, source, target, giver=other).mean(axis=0), truth, {})["volume"]
            rows.append({"subject": study.pairs[i].name, "direction": f"{source}->{target}",
                         "psnr_single": np.mean([scores["psnr"] for scores in single]),
                         "ssim_single": np.mean([scores["ssim"] for scores in single]),
                         "psnr_mean": mean["psnr"], "ssim_mean": mean["ssim"], "psnr_swapped": swapped["psnr"],
                         "psnr_mean_volume": score(means[target][0, 0].numpy(), truth, {})["volume"]["psnr"]})
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
        train, held_out = real[roles["train"]], real[roles["validation"] + roles["test"]]
        nearest, nearest_real = (np.mean([np.sqrt(np.square(train - volume).mean(axis=(1, 2, 3))).min()
                                          for volume in volumes]) for volumes in (samples, held_out))
        scores[modality] = {"mean_shift": samples.mean() - real.mean(), "std_ratio": samples.std() / real.std(),
                            "spread_ratio": samples.var(axis=0).mean() / real.var(axis=0).mean(),
                            "nearest": nearest, "nearest_real": nearest_real}
    return scores


def report(checkpoint: Path, settings) -> None:
    study, prior = open_run(checkpoint, settings)
    rows = translation_scores(prior, study, settings, study.roles["test"])
    for direction in dict.fromkeys(row["direction"] for row in rows):
        scores = [row for row in rows if row["direction"] == direction]
        values = {key: np.array([row[key] for row in scores]) for key in scores[0] if key.startswith(("psnr", "ssim"))}
        single, mean = (f"{values[f'psnr_{kind}'].mean():.2f} dB / {values[f'ssim_{kind}'].mean():.3f}"
                        for kind in ("single", "mean"))
        print(f"{direction}: one sample {single}, mean of {SAMPLES} {mean} ({len(scores)} subjects)")
        for label, key in (("the mean training volume", "psnr_mean_volume"),
                           ("another subject's source", "psnr_swapped")):
            gain, low, high = paired_gain(values["psnr_mean"], values[key])
            print(f"    over {label}: {gain:+.2f} dB ({low:+.2f} .. {high:+.2f})")
    for modality, scores in joint_scores(prior, study, settings, JOINT).items():
        print(f"joint {modality}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))


if __name__ == "__main__":
    run_report(report, __doc__, "best_model.pth")

"""Do the prior's samples know more about the error of a translation than residuals of other subjects do?

    python -m benchmarks.calibration checkpoints/best_refine.pth --uncertainty_samples 16

Even a spread that knows nothing can lower the CRPS (continuous ranked probability score; Gneiting & Raftery 2007)
against a single volume, so samples are compared with two controls that know only the validation subjects' residuals
(truth minus translation). Each way gives a distribution of every voxel of the test subjects, around the translation:

    translation            a single value: its CRPS is the absolute error
    residual map           a normal distribution, with the root mean square of the residuals in this voxel
    resampled residuals    the translation plus the residuals of one validation subject each
    prior's samples        the translation plus samples of the prior minus their mean

CRPS of voxels, and of means over blocks of 4^3 voxels, which a spread without correlations gets wrong; and the
fraction of voxels in the central intervals that should hold 50 and 90 % (K members can hold (K - 1) / (K + 1) at most).
In the brain; mean over test subjects, and the gain of the samples over each other way, paired by subject, with its 95 %
interval.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm
from skimage.measure import block_reduce

from benchmarks import open_run, run_report
from data.intensity import brain_region
from data.study import Study
from models.diffusion import name_key
from synthesis.model import TrainedModel
from utils.errors import UserError
from utils.metrics import gain_text

BLOCK = 4  # voxels
INTERVALS = (0.5, 0.9)
COLUMNS = ("crps", "crps_blocks", *(f"in_{interval:.0%}" for interval in INTERVALS))
SAMPLES = "prior's samples"


def crps_of_members(members: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) for K >= 1 equally likely members (K, N), in the fair form, which does not depend on K (Ferro 2014)."""
    K = len(members)
    ranked = np.sort(members, axis=0)
    weights = 2 * np.arange(1, K + 1) - K - 1  # sum over pairs of |x_i - x_j| = sum of weights * ranked
    spread = np.tensordot(weights, ranked, 1) / max(1, K * (K - 1))
    return np.abs(members - truth).mean(axis=0) - spread


def crps_of_normal(mean: np.ndarray, deviation: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) for normal distributions (Gneiting & Raftery 2007, eq. 21); the absolute error where the deviation is 0."""
    z = (truth - mean) / np.maximum(deviation, 1e-9)
    return np.where(deviation > 1e-9, deviation * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)),
                    np.abs(truth - mean))


def scores(distribution: tuple, truth: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """COLUMNS of ("members", (K, X, Y, Z)) or ("normal", mean, deviation) against the truth (X, Y, Z) in the brain."""
    blocks = block_reduce(brain, BLOCK, np.mean) >= 0.5

    def block_means(volumes: np.ndarray) -> np.ndarray:
        return np.stack([block_reduce(np.where(brain, volume, 0), BLOCK, np.mean)[blocks] for volume in volumes])

    real, of_blocks = truth[brain], block_means(truth[None])[0]
    if distribution[0] == "normal":
        mean, deviation = distribution[1][brain], distribution[2][brain]
        blurred = block_means(np.stack([distribution[1], distribution[2] ** 2]))
        # voxels are independent in this control: the variance of a mean is the mean variance over their number
        found = [crps_of_normal(mean, deviation, real).mean(),
                 crps_of_normal(blurred[0], np.sqrt(blurred[1] / BLOCK**3), of_blocks).mean()]
        half = [norm.ppf(0.5 + interval / 2) * deviation for interval in INTERVALS]
        found += [np.mean(np.abs(real - mean) <= each) for each in half]
    else:
        members = distribution[1][:, brain]
        found = [crps_of_members(members, real).mean(),
                 crps_of_members(block_means(distribution[1]), of_blocks).mean()]
        for interval in INTERVALS:  # of K members and the truth, all K + 1 ranks are equally likely
            low, high = (np.quantile(members, p, axis=0, method="weibull") for p in (0.5 - interval / 2,
                                                                                    0.5 + interval / 2))
            found.append(np.mean((low <= real) & (real <= high)) if len(members) > 1 else np.nan)
    return dict(zip(COLUMNS, map(float, found)))


def distributions(study: Study, model: TrainedModel, source: str, target: str, members: int) -> dict[str, list[dict]]:
    """Way -> scores of each test subject."""
    def translated(i: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        volumes = {modality: volume[0] for modality, volume in study.volumes([i]).items()}  # (1, X, Y, Z)
        made = model.translate(source, target, volumes[source].numpy(), [name_key(study.pairs[i].name)])["synth"][0]
        return made, volumes[target][0].numpy(), volumes[source][None].to(model.prior.device)

    residuals = np.stack([np.nan_to_num(truth - made) for made, truth, _ in map(translated,
                                                                               study.roles["validation"])])
    deviation, found = np.sqrt(np.mean(residuals**2, axis=0)), {}
    for i in study.roles["test"]:
        made, truth, given = translated(i)
        samples = model.samples(source, target, given, [name_key(study.pairs[i].name)], members)[0].cpu().numpy()
        brain, truth = brain_region(truth) & ~np.isnan(truth), np.nan_to_num(truth, nan=-1)
        ways = {"translation": ("members", made[None]), "residual map": ("normal", made, deviation),
                "resampled residuals": ("members", np.clip(made + residuals, -1, 1)),
                SAMPLES: ("members", np.clip(made + samples - samples.mean(axis=0), -1, 1))}
        for way, distribution in ways.items():
            found.setdefault(way, []).append(scores(distribution, truth, brain))
    return found


def table(found: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown, from direction -> way -> scores of each test subject."""
    lines = [f"| direction | way | {' | '.join(COLUMNS)} | CRPS of the samples lower by | CRPS of blocks lower by |",
             f"|{'---|' * (len(COLUMNS) + 4)}"]
    for direction, ways in found.items():
        for way, each in ways.items():
            values = {name: np.array([row[name] for row in each]) for name in COLUMNS}
            cells = [f"{values[name].mean():.4f}" if "crps" in name else f"{values[name].mean():.2f}"
                     for name in COLUMNS]
            for name in COLUMNS[:2]:
                of_samples = np.array([row[name] for row in ways[SAMPLES]])
                cells.append("" if way == SAMPLES else gain_text(values[name], of_samples, "+.4f"))
            lines.append(f"| {direction} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(checkpoint: Path, settings) -> None:
    if not settings.uncertainty_samples:
        raise UserError("opt.uncertainty_samples = 0: give the number of samples, for example 16")
    study, model = open_run(checkpoint, settings)
    print(table({f"{source}->{target}": distributions(study, model, source, target, settings.uncertainty_samples)
                 for source, target in itertools.permutations(study.modalities, 2)}))


if __name__ == "__main__":
    run_report(report, __doc__, "checkpoint of either stage")

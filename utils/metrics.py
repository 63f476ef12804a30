"""Scores of synthesised volumes, and their table. Volumes are (X, Y, Z) in [-1, 1], so the data range is 2."""

import math
from pathlib import Path

import numpy as np
from scipy.ndimage import minimum_filter
from scipy.stats import bootstrap
from skimage.metrics import structural_similarity

from utils.files import write_table

DATA_RANGE = 2.0
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # voxels, of the Gaussian window, also of the loss
COLUMNS = ("subject", "direction", "volume", "region", "psnr", "ssim", "mae")


def score(candidate: np.ndarray, truth: np.ndarray, regions: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Compute PSNR (dB), SSIM and MAE per region, and of the whole "volume". regions: name -> bool (X, Y, Z).

    Both volumes are clipped to [-1, 1]; only voxels count in which the truth is known, that is, not NaN. SSIM uses a
    Gaussian window (sigma 1.5, scikit-image); in a region it is the mean of the SSIM map, of the volume without a
    border of half a window. Windows that touch unknown voxels do not count: NaN where none is left.
    """
    candidate, truth = (np.clip(volume, -1, 1).astype(np.float64) for volume in (candidate, truth))
    known, candidate = ~np.isnan(truth), np.nan_to_num(candidate, nan=-1)  # a copied source may see less than the truth
    _, ssim_map = structural_similarity(candidate, np.where(known, truth, candidate), data_range=DATA_RANGE,
                                        gaussian_weights=True, sigma=SSIM_SIGMA, use_sample_covariance=False, full=True)
    windows = minimum_filter(known, 2 * SSIM_RADIUS + 1, mode="nearest")
    inner = np.pad(np.ones(np.subtract(known.shape, 2 * SSIM_RADIUS), bool), SSIM_RADIUS)
    error, scores = candidate - truth, {}
    for name, region in {"volume": known, **regions}.items():
        if (region := region & known).any():
            ssim = ssim_map[region & windows & (inner if name == "volume" else True)]
            scores[name] = {"psnr": psnr(error[region]), "ssim": float(ssim.mean()) if ssim.size else math.nan,
                            "mae": float(np.abs(error[region]).mean())}
    return scores


def quality(scores: dict[str, float]) -> str:
    """PSNR and SSIM as a caption."""
    return f"{scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}"


def psnr(error: np.ndarray) -> float:
    """Peak signal-to-noise ratio (dB) of an error, NaN where it is unknown; infinite for zero error."""
    mean_square = float(np.nanmean(np.square(error, dtype=np.float64)))
    return float(10 * np.log10(DATA_RANGE**2 / mean_square)) if mean_square else float("inf")


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Write rows with the keys of COLUMNS as CSV. Raises UserError."""
    write_table(path, COLUMNS, rows, ".5f")


def paired_gain(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean of first - second (N,) over the same subjects, and its 95 % bootstrap interval (10,000 draws).

    Subjects for which one of both is NaN take no part.
    """
    gain = np.asarray(first) - np.asarray(second)
    gain = gain[~np.isnan(gain)]
    if len(gain) < 2 or np.ptp(gain) == 0:
        return float(gain.mean()) if len(gain) else math.nan, math.nan, math.nan
    interval = bootstrap((gain,), np.mean, n_resamples=10_000, method="percentile",
                         rng=np.random.default_rng(0)).confidence_interval
    return float(gain.mean()), float(interval.low), float(interval.high)


def summary(rows: list[dict]) -> str:
    """A table to print: whole-volume scores of every kind of volume, and how much better the refined one is."""
    groups = {}
    for row in sorted((row for row in rows if row["region"] == "volume"), key=lambda row: row["subject"]):
        groups.setdefault((row["direction"], row["volume"]), []).append((row["psnr"], row["ssim"]))
    better = "refined is better by (95 % interval)" if any(volume == "refined" for _, volume in groups) else ""
    lines = [f"direction        volume      PSNR (dB)       SSIM            {better}".rstrip()]
    for (direction, volume), scores in groups.items():
        refined, line, gains = groups.get((direction, "refined")), f"{direction:<16} {volume:<11}", ""
        for column, digits, unit in ((0, 2, " dB"), (1, 3, "")):
            values = np.array(scores)[:, column]
            line += f" {np.nanmean(values):6.{digits}f} +- {np.nanstd(values):5.{digits}f}"
            if refined and volume != "refined":
                gain, low, high = paired_gain(np.array(refined)[:, column], values)
                gains += f"  {gain:+.{digits}f}{unit} ({low:+.{digits}f} .. {high:+.{digits}f})"
        lines.append(line + gains)
    return "\n".join(lines)

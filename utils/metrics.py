"""Scores of synthesised volumes, and their table. Volumes are (X, Y, Z) in [-1, 1], so the data range is 2."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, spearmanr
from skimage.metrics import structural_similarity

from utils.files import write_table

DATA_RANGE = 2.0
DEVIATIONS = np.geomspace(1e-3, 1.0, 25)  # edges of the bins in which a standard deviation is compared with errors
COLUMNS = ("subject", "direction", "volume", "region", "psnr", "ssim", "mae")


def score(candidate: np.ndarray, truth: np.ndarray, regions: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """region -> psnr (dB), ssim, mae; `regions`: name -> bool (X, Y, Z). "volume" is always scored.

    Both volumes are clipped to [-1, 1]. SSIM is scikit-image's with a Gaussian window (sigma 1.5); in a region it is
    the mean of the SSIM map there.
    """
    candidate, truth = (np.clip(each, -1, 1).astype(np.float64) for each in (candidate, truth))
    mean_ssim, ssim_map = structural_similarity(candidate, truth, data_range=DATA_RANGE, gaussian_weights=True,
                                                sigma=1.5, use_sample_covariance=False, full=True)
    error = candidate - truth
    scores = {"volume": {"psnr": psnr(error), "ssim": float(mean_ssim), "mae": float(np.abs(error).mean())}}
    for name, region in regions.items():
        if region.any():
            scores[name] = {"psnr": psnr(error[region]), "ssim": float(ssim_map[region].mean()),
                            "mae": float(np.abs(error[region]).mean())}
    return scores


def quality(scores: dict[str, float]) -> str:
    """PSNR and SSIM as a caption."""
    return f"{scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}"


def psnr(error: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of an error, data range 2; infinite where there is none."""
    mean_square = float(np.mean(np.square(error, dtype=np.float64)))
    return float(10 * np.log10(DATA_RANGE**2 / mean_square)) if mean_square else float("inf")


def reliability(deviation: np.ndarray, error: np.ndarray, region: np.ndarray) -> dict:
    """How well a standard deviation in each voxel tells how large the error is there; (X, Y, Z), region: bool.

    rank_correlation: Spearman's, of deviation and absolute error, 0 where one is constant. bins: of DEVIATIONS,
    [voxels, sum of variances, sum of squared errors] each, which add up over volumes; deviations outside go to the
    first or the last.
    """
    deviation, error = deviation[region].astype(np.float64), error[region].astype(np.float64)
    constant = len(deviation) < 2 or np.ptp(deviation) == 0 or np.ptp(np.abs(error)) == 0
    place = np.clip(np.digitize(deviation, DEVIATIONS), 1, len(DEVIATIONS) - 1) - 1
    bins = [np.bincount(place, each, len(DEVIATIONS) - 1).tolist()
            for each in (np.ones_like(error), deviation**2, error**2)]
    return {"rank_correlation": 0.0 if constant else float(spearmanr(deviation, np.abs(error)).statistic),
            "bins": [list(each) for each in zip(*bins)]}


def nearest(volumes: np.ndarray, others: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """RMSE of each volume (N, X, Y, Z) to the nearest of the others (X, Y, Z), and which that is, (N,) both."""
    distance, place = np.full(len(volumes), np.inf), np.zeros(len(volumes), dtype=int)
    for number, other in enumerate(others):
        found = np.sqrt(np.square(volumes - other).mean(axis=(1, 2, 3), dtype=np.float64))
        place[found < distance] = number
        distance = np.minimum(distance, found)
    return distance, place


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Write rows with the keys of COLUMNS as CSV, replacing the file as a whole. Raises FileError."""
    write_table(path, COLUMNS, rows, ".5f")


def paired_gain(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean of first - second (N,) over the same subjects, and its 95 % bootstrap interval (10,000 draws)."""
    gain = np.asarray(first) - np.asarray(second)
    if len(gain) < 2 or np.ptp(gain) == 0:
        return float(gain.mean()), float("nan"), float("nan")
    interval = bootstrap((gain,), np.mean, n_resamples=10_000, method="percentile",
                         rng=np.random.default_rng(0)).confidence_interval
    return float(gain.mean()), float(interval.low), float(interval.high)


def summary(rows: list[dict]) -> str:
    """A table for people: scores of every volume over the whole volume, and the paired gain of refined over it."""
    rows = [row for row in rows if row["region"] == "volume"]
    subjects = sorted({row["subject"] for row in rows})
    lines = [f"{'direction':<16} {'volume':<8}   PSNR (dB)       SSIM            "
             "refined is better by (95 % interval)"]
    for direction in dict.fromkeys(row["direction"] for row in rows):
        scores = {}
        for row in rows:
            if row["direction"] == direction:
                scores.setdefault(row["volume"], {})[row["subject"]] = row
        for volume, by_subject in scores.items():
            values = {key: np.array([by_subject[name][key] for name in subjects]) for key in ("psnr", "ssim")}
            line = f"{direction:<16} {volume:<8} " + " ".join(
                f"{each.mean():6.{digits}f} +- {each.std():5.{digits}f}"
                for each, digits in zip(values.values(), (2, 3)))
            if volume != "refined" and "refined" in scores:
                for key, digits, unit in (("psnr", 2, " dB"), ("ssim", 3, "")):
                    gain, low, high = paired_gain([scores["refined"][name][key] for name in subjects], values[key])
                    line += f"  {gain:+.{digits}f}{unit} ({low:+.{digits}f} .. {high:+.{digits}f})"
            lines.append(line)
    return "\n".join(lines)

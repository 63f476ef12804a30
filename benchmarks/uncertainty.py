"""Is the standard deviation of translations larger where their error is larger, and as large?

    python sample.py --resume_path ./checkpoints/best_refine.pth --uncertainty_samples 32
    python -m benchmarks.uncertainty results/synthesis/translated --resume_path ./checkpoints/best_refine.pth

Give the options that sample.py had, for example --data_root. Compares, in the brain of each visit whose target is
known, desc-std with the error of desc-synth. Writes uncertainty.csv and calibration.png to the folder: root mean
squares of both and their rank correlation (Spearman) per visit, and the error as a function of the expected error.
"""

import math
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks import run_report
from benchmarks.chart import save_chart
from data.cache import load_volume
from data.intensity import brain_region, scale
from data.pairs import Pair, find_pairs
from data.problems import raise_if_fatal
from data.volumes import on_grid, read_volume
from synthesis.derivatives import parameters, read_sidecars
from synthesis.model import TrainedModel, open_model
from training.launch import choose_device
from utils.errors import UserError
from utils.files import write_table

COLUMNS = ("subject", "direction", "deviation", "error", "rank_correlation")
DEVIATIONS = np.geomspace(1e-3, 1.0, 25)  # edges of the bins in which standard deviations are compared with errors
MIN_VOXELS = 200  # of a point in the calibration chart


def reliability(deviation: np.ndarray, error: np.ndarray) -> dict:
    """Compare the standard deviation expected in each voxel (N,) with its error (N,).

    deviation, error: root mean squares. rank_correlation: Spearman's, with the absolute error; 0 if one is constant.
    bins: [voxels, sum of variances, sum of squared errors] in each bin of DEVIATIONS, the outer ones open.
    """
    constant = len(error) < 2 or np.ptp(deviation) == 0 or np.ptp(np.abs(error)) == 0
    index = np.clip(np.digitize(deviation, DEVIATIONS), 1, len(DEVIATIONS) - 1) - 1
    sums = [np.bincount(index, values, len(DEVIATIONS) - 1) for values in (np.ones(len(error)), deviation**2, error**2)]
    return {"deviation": math.sqrt(np.mean(deviation**2)), "error": math.sqrt(np.mean(error**2)),
            "rank_correlation": 0.0 if constant else float(spearmanr(deviation, np.abs(error)).statistic),
            "bins": np.stack(sums, axis=1)}


def read_voxels(model: TrainedModel, target: str, std: Path, pair: Pair,
                cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Expected deviations (N,) and errors (N,) of the voxels in the brain, of [-1, 1], on the grid of training."""
    file, metadata = model.read(pair.files, cache)[target]
    truth, affine, (low, high) = load_volume(file), np.array(metadata["affine"]), model.ranges[target]
    synthesised = std.with_name(std.name.replace("_desc-std_", "_desc-synth_"))
    deviation, made = (on_grid(read_volume(path, "first"), truth.shape, affine) for path in (std, synthesised))
    deviation = deviation * 2 / (high - low)
    brain = brain_region(truth) & ~np.isnan(made)
    return deviation[brain].astype(float), (scale(made, low, high) - truth)[brain].astype(float)


def write_report(folder: Path, rows: list[dict]) -> None:
    """Write the table and the chart, and print a line per direction. rows: subject, direction, and `reliability`."""
    write_table(folder / "uncertainty.csv", COLUMNS, rows, ".5f")
    curves = {}
    for direction in dict.fromkeys(row["direction"] for row in rows):
        found = [row for row in rows if row["direction"] == direction]
        bins, correlations = sum(row["bins"] for row in found), [row["rank_correlation"] for row in found]
        filled = bins[bins[:, 0] >= MIN_VOXELS]
        if len(filled):
            curves[direction] = np.sqrt(filled[:, 1:] / filled[:, :1])
        deviation, error = np.sqrt(bins.sum(axis=0)[1:] / bins[:, 0].sum())
        print(f"{direction}: standard deviation {deviation:.3f}, error {error:.3f} (root mean squares in the brain, of "
              f"[-1, 1]); rank correlation {np.mean(correlations):.2f} "
              f"({min(correlations):.2f} .. {max(correlations):.2f})")
    if curves:
        save_chart(folder / "calibration.png", curves, "expected: standard deviation of the samples, of [-1, 1]",
                   "observed: root mean square error in the brain, of [-1, 1]", diagonal=True)


def report(folder: Path, settings) -> None:
    model, rows = open_model(settings, choose_device(settings.device)), []
    if parameters(folder).get("Weights") != model.provenance["Weights"]:
        raise UserError(f"{folder}: no translations of the model opt.resume_path = {settings.resume_path!r}")
    pairs, problems = find_pairs(Path(settings.data_root), model.modalities, tuple(settings.exclude),
                                 settings.bids_suffix, settings.share_scans, needed=0)
    raise_if_fatal(problems)
    pairs = {pair.name: pair for pair in pairs}
    for std, sidecar in read_sidecars(folder, "std"):
        pair, target = pairs.get(sidecar["Subject"]), sidecar["Direction"].split("->")[1]
        if pair and target in pair.files:
            voxels = read_voxels(model, target, std, pair, Path(settings.cache_dir))
            rows.append({"subject": pair.name, "direction": sidecar["Direction"], **reliability(*voxels)})
    if not rows:
        raise UserError(f"{folder}: no visit with a desc-std volume and its target in opt.data_root = "
                        f"{settings.data_root!r}: run sample.py with --uncertainty_samples first")
    write_report(folder, rows)


if __name__ == "__main__":
    run_report(report, __doc__, "folder of the translations that sample.py wrote")

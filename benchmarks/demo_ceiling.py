"""How close do refined volumes of the demo come to a perfect synthesis?

    python -m benchmarks.demo_ceiling [results/refine/metrics.csv] [data/demo]

The demo can be rendered without noise, which is the best that any synthesis could do. Prints, per direction and over
the test subjects of metrics.csv, the PSNR of the mean training volume, of the refined volumes and of the noise-free
rendering, and the fraction of the gap (in dB) between the first and the last that the refined volumes close.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from data import demo
from data.intensity import normalise, scale
from data.pairs import find_pairs
from data.volumes import read_volume
from utils.metrics import psnr


def ceiling(path: Path, anatomy: demo.Anatomy, modality: str) -> float:
    """PSNR in dB of the noise-free rendering against the scan in `path`, both in the scan's own [-1, 1]."""
    truth, low, high = normalise(read_volume(path).voxels, path)
    clean = demo.render(anatomy, modality, noise=False).mean(-1) * demo.FULL_SCALE
    return psnr(scale(clean, low, high) - truth)


def main(metrics: Path, root: Path) -> None:
    with open(metrics, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["region"] == "volume"]
    files = {pair.name: pair.files for pair in find_pairs(root, tuple(demo.GRIDS))[0]}
    anatomies = {subject.name: subject for subject in map(demo.Anatomy, range(demo.SUBJECTS))}
    print(f"{'direction':<14} mean   refined  noise-free  gap closed (mean, lowest of the subjects)")
    for direction in dict.fromkeys(row["direction"] for row in rows):
        target, values = direction.split("->")[1], {"mean": {}, "refined": {}}
        for row in rows:
            if row["direction"] == direction and row["volume"] in values:
                values[row["volume"]][row["subject"]] = float(row["psnr"])
        subjects = sorted(values["mean"])
        mean, refined = (np.array([scores[name] for name in subjects]) for scores in values.values())
        best = np.array([ceiling(files[name][target], anatomies[name], target) for name in subjects])
        closed = (refined - mean) / (best - mean)
        total = (refined.mean() - mean.mean()) / (best.mean() - mean.mean())
        print(f"{direction:<14} {mean.mean():5.2f}  {refined.mean():5.2f}    {best.mean():5.2f}       "
              f"{total:4.0%}, {closed.min():4.0%}   ({len(subjects)} subjects, {refined.mean() - mean.mean():+.2f} dB)")


if __name__ == "__main__":
    defaults = ["results/refine/metrics.csv", "data/demo"]
    main(*map(Path, sys.argv[1:] + defaults[len(sys.argv) - 1:]))

"""utils/metrics.py: scores and their table."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from utils.metrics import paired_gain, score, summary, write_metrics


def test_scores_of_known_errors():
    truth = np.random.default_rng(0).uniform(-0.5, 0.5, (14, 13, 12))
    inside = np.zeros(truth.shape, bool)
    inside[4:8] = True
    candidate = np.where(inside, truth + 0.2, truth)
    scores = score(candidate, truth, {"brain": inside, "pattern": np.zeros_like(inside)})
    assert scores["brain"]["psnr"] == pytest.approx(20.0) and scores["brain"]["mae"] == pytest.approx(0.2)
    assert scores["volume"]["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, candidate, data_range=2))
    assert "pattern" not in scores and scores["volume"]["ssim"] < 1
    assert score(truth, truth, {})["volume"] == {"psnr": float("inf"), "ssim": pytest.approx(1), "mae": 0}
    assert score(truth + 9, truth, {})["volume"]["mae"] == pytest.approx((1 - truth).mean())  # clipped to [-1, 1]


def test_paired_gain_lies_in_its_interval():
    gain, low, high = paired_gain(np.array([3.0, 4, 5, 6]), np.array([2.0, 2.5, 4, 5]))
    assert gain == pytest.approx(1.125) and 1 <= low < gain < high <= 1.5
    assert paired_gain(np.array([2.0]), np.array([1.0]))[0] == 1


def test_metrics_file_and_printed_table(tmp_path):
    rows = [{"subject": f"s{n}", "direction": "a->b", "volume": volume, "region": "volume", "psnr": 20.0 + n + better,
             "ssim": 0.8, "mae": 0.1} for n in range(4) for volume, better in (("refined", 2), ("mean", 0))]
    write_metrics(tmp_path / "metrics.csv", rows)
    assert "psnr,ssim,mae\ns0,a->b,refined,volume,22.00000,0.80000,0.10000\n" in (tmp_path / "metrics.csv").read_text()
    table = summary([*rows, {**rows[0], "region": "brain", "psnr": 99.0}])
    assert "23.50 +-  1.12" in table and "+2.00 dB" in table and len(table.splitlines()) == 3

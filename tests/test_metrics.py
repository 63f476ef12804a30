"""utils/metrics.py: scores and their table."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import convolve, gaussian_filter, uniform_filter
from scipy.signal import fftconvolve
from skimage.metrics import normalized_mutual_information, peak_signal_noise_ratio, structural_similarity

from utils.metrics import (
    COLUMNS,
    METRICS,
    MS_SSIM_EXPONENTS,
    basic_scores,
    gain_text,
    gms_map,
    ms_ssim,
    paired_gain,
    score,
    summary,
    write_metrics,
)

SHAPE = (26, 24, 22)


def smooth(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A smooth random volume within (-0.5, 0.5)."""
    volume = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1)
    return volume / np.abs(volume).max() / 2.01


def ball(shape: tuple[int, int, int] = SHAPE, radius: float = 0.8) -> np.ndarray:
    return sum(np.square(axis) for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in shape),
                                                       indexing="ij")) < radius**2


def whole(candidate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return score(candidate, truth, {})["volume"]


def test_scores_of_known_errors():
    truth = np.random.default_rng(0).uniform(-0.5, 0.5, (14, 13, 12))
    inside = np.zeros(truth.shape, bool)
    inside[4:8] = True
    candidate = np.where(inside, truth + 0.2, truth)
    scores = score(candidate, truth, {"brain": inside, "pattern": np.zeros_like(inside)})
    assert scores["brain"]["psnr"] == pytest.approx(20.0) and scores["brain"]["mae"] == pytest.approx(0.2)
    assert scores["volume"]["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, candidate, data_range=2))
    assert "pattern" not in scores and scores["volume"]["ssim"] < 1
    assert whole(truth + 9, truth)["mae"] == pytest.approx((1 - truth).mean())  # clipped to [-1, 1]
    squares = np.square((truth[4:8] + 1) / 2).sum()  # an error of 0.1 of 1
    assert scores["brain"]["nmse"] == pytest.approx(0.01 * inside.sum() / squares)
    assert scores["brain"]["nmi"] == normalized_mutual_information(candidate[inside], truth[inside])


def test_a_perfect_candidate():
    truth = smooth(0)
    scores = score(truth, truth, {"brain": ball()})
    perfect = {"psnr": math.inf, "ssim": 1, "mae": 0, "ssim_01": 1, "ms_ssim": 1, "nmse": 0, "nmi": 2, "gmsd": 0,
               "psnr_affine": math.inf, "sharpness": 0}
    assert tuple(perfect) == METRICS
    assert scores["volume"] == pytest.approx(perfect)
    assert scores["brain"] == pytest.approx({**perfect, "sharpness": math.nan}, nan_ok=True)


def test_ssim_is_that_of_scikit_image_on_both_ranges_with_one_border_for_all_regions():
    truth = smooth(0)
    candidate = truth + smooth(1) / 2
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    means, maps = zip(structural_similarity(candidate, truth, data_range=2, **how),
                      structural_similarity((candidate + 1) / 2, (truth + 1) / 2, data_range=1, **how))
    half, edge = np.zeros((2, *SHAPE), bool)
    half[:13], edge[:5] = True, True
    scores = score(candidate, truth, {"half": half, "edge": edge, "all": np.ones(SHAPE, bool)})
    for column, mean, each in zip(("ssim", "ssim_01"), means, maps):
        assert scores["volume"][column] == pytest.approx(mean) == scores["all"][column]
        assert scores["half"][column] == pytest.approx(each[5:13, 5:-5, 5:-5].mean())
        assert math.isnan(scores["edge"][column])
    assert abs(means[0] - means[1]) > 0.01 and np.isfinite([scores["edge"][name] for name in ("psnr", "nmi")]).all()


def synthrad_ms_ssim(candidate: np.ndarray, truth: np.ndarray, region: np.ndarray,
                     exponents: Sequence[float] = MS_SSIM_EXPONENTS) -> float:
    """From the three factors of SSIM."""
    product, images = 1.0, [np.where(region, volume, 0) for volume in (candidate, truth)]
    for exponent in exponents:
        x, y = images
        mean_x, mean_y, xx, yy, xy = (uniform_filter(each, 7) for each in (x, y, x * x, y * y, x * y))
        var_x, var_y, cov = (343 / 342 * each for each in (xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y))
        std_x, std_y = (np.sqrt(np.maximum(each, 0)) for each in (var_x, var_y))
        luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        contrast = (2 * std_x * std_y + 9e-4) / (var_x + var_y + 9e-4)
        structure = np.maximum((cov + 4.5e-4) / (std_x * std_y + 4.5e-4), 0)
        result = luminance**exponent * contrast**exponent * structure**exponent
        product *= result[3:-3, 3:-3, 3:-3][region[3:-3, 3:-3, 3:-3]].mean()
        images = [fftconvolve(each, np.full((2, 2, 2), 1 / 8), mode="same")[::2, ::2, ::2] for each in images]
        region = region[::2, ::2, ::2]
    return product


def test_ms_ssim_is_that_of_synthrad_2025():
    """Its own code gave these values, too."""
    shape = (100, 97, 98)
    truth, noise = (0.5 + smooth(seed, shape) for seed in (2, 3))
    candidate, region = 0.8 * truth + 0.2 * noise, ball(shape)
    inverted = np.where(np.arange(98) < 60, candidate, 1 - candidate)  # negative SSIM
    for made, each in ((candidate, region), (candidate, np.ones(shape, bool)), (inverted, region)):
        assert ms_ssim(made, truth, each) == pytest.approx(synthrad_ms_ssim(made, truth, each), rel=1e-9)
    assert 0.5 < ms_ssim(candidate, truth, region) < 0.99
    around = np.zeros(shape, bool)
    around[4:20] = True  # no voxel of the coarsest scale, of which only those in the middle count
    assert math.isnan(ms_ssim(candidate, truth, around))


@pytest.mark.parametrize("smallest, exponents", [(12, [1]), (13, [0.0448 / 0.3304, 0.2856 / 0.3304]),
                                                 (25, [0.0448 / 0.6305, 0.2856 / 0.6305, 0.3001 / 0.6305])])
def test_small_volumes_have_as_many_scales_of_ms_ssim_as_fit(smallest, exponents):
    truth, noise = (0.5 + smooth(seed, (30, 28, smallest)) for seed in (2, 3))
    candidate, region = 0.8 * truth + 0.2 * noise, ball(truth.shape, 1.2)
    expected = synthrad_ms_ssim(candidate, truth, region, 1.0001 * np.array(exponents))  # the sum of all five
    assert ms_ssim(candidate, truth, region) == pytest.approx(expected, rel=1e-9) and expected < 0.99
    assert math.isnan(ms_ssim(*np.zeros((2, 30, 28, 6)), np.ones((30, 28, 6), bool)))


def test_gmsd_of_ramps_and_of_a_volume_that_is_the_same_in_all_slices():
    """Two slopes, half of the voxels each, give two similarities; in 2-D it is the published score."""
    x = np.arange(32) / 32
    truth = np.broadcast_to(0.8 * x[:, None, None], (32, 32, 16)).copy()
    candidate = truth.copy()
    candidate[:, 16:] = 0.4 * x[:, None, None]
    regions = np.zeros(truth.shape, bool)
    regions[:, 4:12] = regions[:, 20:28] = True  # away from the edge between both
    steep, flat = 0.8 / 32 * 4, 0.4 / 32 * 4  # over two coarse voxels
    similarity = (2 * steep * flat + 0.0026) / (steep**2 + flat**2 + 0.0026)
    scores = score(2 * candidate - 1, 2 * truth - 1, {"both": regions})
    assert scores["both"]["gmsd"] == pytest.approx((1 - similarity) / 2)

    a, b = (np.random.default_rng(seed).random((24, 20)) for seed in (0, 1))
    kernel, magnitudes = np.array([[1, 0, -1]] * 3) / 3, []
    for image in (a, b):
        coarse = image.reshape(12, 2, 10, 2).mean((1, 3))
        magnitudes.append(np.hypot(convolve(coarse, kernel), convolve(coarse, kernel.T)))
    first, second = (magnitude[1:-1, 1:-1] for magnitude in magnitudes)
    expected = (2 * first * second + 0.0026) / (first**2 + second**2 + 0.0026)
    stacked = [np.repeat(image[:, :, None], 12, axis=2) for image in (a, b)]
    np.testing.assert_allclose(gms_map(*stacked)[1:-1, 1:-1, 3], expected)
    assert whole(*(2 * volume - 1 for volume in stacked))["gmsd"] == pytest.approx(expected.std())


def test_which_scores_are_blind_to_tone():
    truth = smooth(0)
    candidate = truth + smooth(1)
    plain, toned = (whole(each, truth) for each in (candidate, 0.7 * candidate - 0.2))
    assert toned["nmi"] == pytest.approx(plain["nmi"], abs=1e-3)
    assert toned["psnr_affine"] == pytest.approx(plain["psnr_affine"])
    gain, offset = np.polyfit(candidate.ravel(), truth.ravel(), 1)
    assert plain["psnr_affine"] == pytest.approx(
        peak_signal_noise_ratio(truth, gain * candidate + offset, data_range=2)) and plain["psnr_affine"] < 40
    assert toned["psnr"] < plain["psnr"] - 1 and toned["nmse"] > 2 * plain["nmse"]
    only_tone = whole(0.5 * truth + 0.1, truth)
    assert max(only_tone[name] for name in ("ssim", "ssim_01", "ms_ssim")) < 0.98 and only_tone["gmsd"] > 0.01
    assert only_tone["psnr_affine"] > 200 and only_tone["nmi"] == pytest.approx(2, abs=0.01) and plain["nmi"] < 1.5


def test_sharpness_is_fine_power_in_decibels():
    truth = np.random.default_rng(0).uniform(-0.5, 0.5, SHAPE)
    assert whole(truth / 2, truth)["sharpness"] == pytest.approx(20 * math.log10(0.5))
    assert whole(gaussian_filter(truth, 1), truth)["sharpness"] < -5
    assert whole(truth + smooth(1) * 0.05, truth)["sharpness"] == pytest.approx(0, abs=0.1)
    x = np.arange(48)[:, None, None] * np.ones((1, 24, 24))
    slow, fine = (np.sin(2 * np.pi * frequency * x) for frequency in (1 / 16, 3 / 8))
    assert whole(0.6 * slow + 0.1 * fine, 0.3 * slow + 0.2 * fine)["sharpness"] == pytest.approx(-6.02, abs=0.1)


def test_unknown_voxels_take_no_part_in_any_score():
    truth = smooth(0).astype(np.float32)
    candidate = truth + smooth(1).astype(np.float32) / 2
    hidden, other, nothing = truth.copy(), candidate.copy(), candidate.copy()
    hidden[19:] = np.nan
    other[19:], nothing[19:] = 0.9, np.nan
    expected = score(candidate, hidden, {"brain": ball()})
    assert all(np.isfinite(expected["volume"][name]) for name in METRICS)
    for made in (other, nothing):
        assert score(made, hidden, {"brain": ball()}) == {region: pytest.approx(values, nan_ok=True)
                                                          for region, values in expected.items()}
    cut = whole(candidate[:19], truth[:19])
    for name in set(METRICS) - {"ms_ssim", "sharpness"}:  # of these, the one pads, the other one sees an edge
        assert expected["volume"][name] == pytest.approx(cut[name])
        assert expected["volume"][name] != pytest.approx(whole(candidate, truth)[name], rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 8, 6), (11, 11, 11), (97, 11, 20)])
def test_constant_and_tiny_volumes_and_empty_regions_neither_fail_nor_warn(shape):
    truth, flat, black = smooth(0, shape), np.full(shape, 0.3), np.full(shape, -1.0)
    corner = np.zeros(shape, bool)
    corner[0, 0, 0] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for candidate, real in ((truth, truth), (flat, truth), (truth, flat), (flat, flat), (black, black),
                                (flat, black), (truth, np.full(shape, np.nan))):
            scores = score(candidate, real, {"corner": corner, "none": corner & ~corner})
            assert set(scores) == (set() if np.isnan(real).all() else {"volume", "corner"})
        assert whole(flat, truth)["sharpness"] == -math.inf and math.isnan(whole(truth, flat)["sharpness"])
        assert whole(flat, truth)["nmi"] == pytest.approx(1) and math.isnan(whole(flat, flat)["nmi"])
        assert math.isnan(whole(flat, black)["nmse"]) and whole(truth, flat)["psnr_affine"] > 300
        assert math.isnan(whole(truth, truth)["ssim"]) == (min(shape) < 11)
        rows = [{"subject": f"s{n}", "direction": "a->b", "volume": volume, "region": "volume", **whole(each, truth)}
                for n in range(3) for volume, each in (("refined", truth), ("mean", flat))]
        assert ("inf +-   nan" in summary(rows)) and len(summary(rows).splitlines()) == 3


def test_pictures_have_the_scores_of_the_table():
    truth = smooth(0).astype(np.float32)
    truth[:3] = np.nan
    candidate = smooth(1).astype(np.float32)
    basic, full = basic_scores(candidate, truth), whole(candidate, truth)
    assert set(basic) == {"psnr", "ssim"} and all(basic[name] == full[name] for name in basic)


def test_paired_gain_lies_in_its_interval():
    gain, low, high = paired_gain(np.array([3.0, 4, 5, 6]), np.array([2.0, 2.5, 4, 5]))
    assert gain == pytest.approx(1.125) and 1 <= low < gain < high <= 1.5
    assert paired_gain(np.array([2.0]), np.array([1.0]))[0] == 1
    assert gain_text(np.array([2.0]), np.array([1.0]), "+.2f", " dB") == "+1.00 dB (no interval)"
    assert paired_gain([2.0, math.inf, 4.0], [1.0, 1.0, math.nan])[0] == 1


def test_metrics_file_and_printed_table(tmp_path):
    others = dict.fromkeys(set(METRICS) - {"psnr", "ssim", "mae"}, math.nan)
    rows = [{"subject": f"s{n}", "direction": "a->b", "volume": volume, "region": "volume", "psnr": 20.0 + n + better,
             "ssim": 0.8, "mae": 0.1, **others} for n in range(4) for volume, better in (("refined", 2), ("mean", 0))]
    write_metrics(tmp_path / "metrics.csv", rows)
    head, first = (tmp_path / "metrics.csv").read_text().splitlines()[:2]
    assert head == ",".join(COLUMNS) and head.startswith("subject,direction,volume,region,psnr,ssim,mae,ssim_01,")
    assert first == "s0,a->b,refined,volume,22.00000,0.80000,0.10000" + ",nan" * 7
    table = summary([*rows, {**rows[0], "region": "brain", "psnr": 99.0}])
    assert "23.50 +-  1.12" in table and "+2.00 dB" in table and len(table.splitlines()) == 3

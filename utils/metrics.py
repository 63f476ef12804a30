"""Scores of synthesised volumes, and their table. Volumes are (X, Y, Z) in [-1, 1], so the data range is 2."""

import math
from pathlib import Path

import numpy as np
from scipy.ndimage import minimum_filter, prewitt
from scipy.stats import bootstrap
from skimage.measure import block_reduce
from skimage.metrics import normalized_mutual_information, structural_similarity

from utils.files import write_table

DATA_RANGE = 2.0
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # voxels, of the Gaussian window, also of the loss
MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from fine to coarse (Wang et al. 2003, section 3.2)
MS_SSIM_WINDOW = 7  # voxels, along each axis
GMS_CONSTANT = 0.0026  # for a data range of 1 (Xue et al. 2014: 170 for 255)
SPECTRUM_BINS = 16  # up to 0.5 cycles per voxel
FINE = 0.25  # cycles per voxel, above which power is called fine
METRICS = ("psnr", "ssim", "mae", "ssim_01", "ms_ssim", "nmse", "nmi", "gmsd", "psnr_affine", "sharpness")
DIGITS = {"psnr": 2, "psnr_affine": 2, "sharpness": 2}  # in a table, in dB; of other scores 3
COLUMNS = ("subject", "direction", "volume", "region", *METRICS)


def score(candidate: np.ndarray, truth: np.ndarray, regions: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Compute METRICS per region, and of the whole "volume". regions: name -> bool (X, Y, Z); empty ones are left out.

    Both volumes are clipped to [-1, 1]. Only voxels count in which the truth is known, that is, not NaN, and beyond the
    border nothing is known: windows of SSIM and GMSD that reach there do not count, in no region. NaN where none is
    left, and where a score is not defined.

    psnr, psnr_affine: dB; the latter after the gain and offset that suit the region best, so it is blind to tone.
    ssim: means of the SSIM map (Wang et al. 2004; scikit-image, Gaussian window of sigma 1.5). ssim_01: the same on
    [0, 1]: SSIM's luminance term is made for intensities >= 0, and on [-1, 1] has its singularity in mid-grey tissue.
    mae: mean absolute error. nmse: sum of squared errors over sum of squared truth, on [0, 1]. Others: see below.
    """
    candidate, truth, known = _comparable(candidate, truth)
    unit_candidate, unit_truth = (candidate + 1) / 2, (truth + 1) / 2  # [0, 1]
    ssim, ssim_01 = ssim_map(candidate, truth, DATA_RANGE), ssim_map(unit_candidate, unit_truth, 1.0)
    gms = gms_map(unit_candidate, unit_truth)
    windows, gms_windows = _whole(known, 2 * SSIM_RADIUS + 1), _whole(halved(known, np.all), 3)
    scores = {}
    for name, region in {"volume": known, **regions}.items():
        region = region & known
        if region.any():
            made, real = candidate[region], truth[region]
            power = np.sum(np.square(unit_truth[region]))
            scores[name] = {
                "psnr": psnr(made - real), "ssim": _mean(ssim[region & windows]),
                "mae": float(np.abs(made - real).mean()), "ssim_01": _mean(ssim_01[region & windows]),
                "ms_ssim": ms_ssim(unit_candidate, unit_truth, region),
                "nmse": float(np.sum(np.square(made - real)) / DATA_RANGE**2 / power) if power else math.nan,
                "nmi": nmi(made, real), "gmsd": gmsd(gms[gms_windows & (halved(region) >= 0.5)]),
                "psnr_affine": psnr(affine_error(made, real)),
                "sharpness": sharpness(*(np.where(known, volume, -1) for volume in (candidate, truth)))
                if name == "volume" else math.nan}
    return scores


def basic_scores(candidate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of the whole volume, as `score` has them, in a fifth of its time: for pictures and logs."""
    candidate, truth, known = _comparable(candidate, truth)
    windows = _whole(known, 2 * SSIM_RADIUS + 1)
    return {"psnr": psnr((candidate - truth)[known]), "ssim": _mean(ssim_map(candidate, truth, DATA_RANGE)[windows])}


def _comparable(candidate: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both volumes, clipped, and where the truth is known, bool (X, Y, Z); elsewhere it is the candidate."""
    candidate, truth = (np.clip(volume, -1, 1).astype(np.float64) for volume in (candidate, truth))
    known, candidate = ~np.isnan(truth), np.nan_to_num(candidate, nan=-1)  # a copied source may see less than the truth
    return candidate, np.where(known, truth, candidate), known


def _whole(known: np.ndarray, size: int) -> np.ndarray:
    """Centres of the windows of size^3 voxels that have only known voxels, none beyond the border; bool (X, Y, Z)."""
    return minimum_filter(known, size, mode="constant", cval=0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def halved(volume: np.ndarray, reduce=np.mean) -> np.ndarray:
    """Means, or another reduction, of blocks of 2^3 voxels; a last odd voxel is left out."""
    return block_reduce(volume[tuple(slice(n // 2 * 2) for n in volume.shape)], 2, reduce)


def ssim_map(candidate: np.ndarray, truth: np.ndarray, data_range: float) -> np.ndarray:
    """SSIM of each voxel's window (Wang et al. 2004), (X, Y, Z); NaN if the window is larger than the volume."""
    if min(truth.shape) <= 2 * SSIM_RADIUS:
        return np.full(truth.shape, np.nan)
    return structural_similarity(candidate, truth, data_range=data_range, gaussian_weights=True, sigma=SSIM_SIGMA,
                                 use_sample_covariance=False, full=True)[1]


def ms_ssim(candidate: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """Masked multi-scale SSIM of volumes in [0, 1], as SynthRAD2025 scores (SynthRAD2025/evaluation, image_metrics.py).

    Outside the region both are 0. On five scales, the map of SSIM (uniform 7^3 windows, sample covariance; negative
    values are 0) to the power of the scale's exponent, luminance included, is averaged over the region, without a
    border of 3 voxels; the score is the product. The region keeps every second voxel of the scale above. Five scales
    need 97 voxels along every axis, to which SynthRAD2025 pads. Padding would be most of a small volume, and a single
    voxel its coarsest scale: here smaller volumes have as many scales as fit, whose exponents are raised to the same
    sum. So compare scores of volumes of one size only. NaN if a scale has no voxel of the region.
    """
    radius, count = MS_SSIM_WINDOW // 2, len(MS_SSIM_EXPONENTS)
    scales = [2**k for k in range(count) if math.ceil(min(region.shape) / 2**k) >= MS_SSIM_WINDOW]
    if not scales:
        return math.nan
    exponents = np.array(MS_SSIM_EXPONENTS[:len(scales)])
    exponents *= sum(MS_SSIM_EXPONENTS) / exponents.sum() if len(scales) < count else 1
    inner, product = (slice(radius, -radius),) * 3, 1.0
    candidate, truth = (np.where(region, volume, 0) for volume in (candidate, truth))
    for step, exponent in zip(scales, exponents):
        if step > 1:
            candidate, truth = (halved(np.pad(volume, (1, 0))) for volume in (candidate, truth))
        chosen = region[::step, ::step, ::step][inner]
        if not chosen.any():
            return math.nan
        _, ssim = structural_similarity(candidate, truth, win_size=MS_SSIM_WINDOW, data_range=1.0, full=True)
        product *= float(np.mean(np.maximum(ssim[inner][chosen], 0) ** exponent))
    return product


def nmi(candidate: np.ndarray, truth: np.ndarray) -> float:
    """Normalised mutual information of voxels (N,), 1 (independent) to 2 (Studholme et al. 1999; scikit-image).

    It is blind to a linear change of tone, because its 100 bins lie between the extremes. A few hundred voxels leave
    most of the 100^2 bins empty, which raises it. NaN if both are constant.
    """
    return float(normalized_mutual_information(candidate, truth)) if np.ptp(candidate) or np.ptp(truth) else math.nan


def gms_map(candidate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Gradient magnitude similarity (Xue et al. 2014, eq. 1-3) of volumes in [0, 1], in 3-D: (X // 2, Y // 2, Z // 2).

    As there, of means of 2^3 voxels, with the Prewitt operator, whose weights are 1/9 instead of 1/3.
    """
    a, b = (np.sqrt(sum(np.square(prewitt(volume, axis) / 9) for axis in range(3)))
            for volume in map(halved, (candidate, truth)))
    return (2 * a * b + GMS_CONSTANT) / (a**2 + b**2 + GMS_CONSTANT)


def gmsd(similarities: np.ndarray) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014, eq. 5), 0 for equal volumes; NaN for less than two."""
    return float(similarities.std()) if similarities.size > 1 else math.nan


def affine_error(candidate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Error (N,) after the gain and offset of the candidate (N,) with the least squares."""
    made, real = candidate - candidate.mean(), truth - truth.mean()
    return (made @ real / (made @ made) if np.ptp(candidate) else 0.0) * made - real


def spectrum(volume: np.ndarray) -> np.ndarray:
    """Mean power of (X, Y, Z) in shells of equal width up to 0.5 cycles per voxel, with a Hann window."""
    for axis, n in enumerate(volume.shape):
        volume = volume * np.hanning(n + 2)[1:-1].reshape([-1 if a == axis else 1 for a in range(3)])
    power = np.abs(np.fft.fftn(volume)) ** 2
    radius = np.sqrt(sum(np.square(each) for each in np.meshgrid(*map(np.fft.fftfreq, volume.shape), indexing="ij")))
    shell = np.minimum((radius / 0.5 * SPECTRUM_BINS).astype(int), SPECTRUM_BINS)  # the last, the corners, is left out
    totals, counts = (np.bincount(shell.ravel(), each, SPECTRUM_BINS + 1)[:-1] for each in (power.ravel(), None))
    return totals / np.maximum(counts, 1)  # a small grid leaves shells empty


def sharpness(candidate: np.ndarray, truth: np.ndarray) -> float:
    """Power of the candidate at 0.25 .. 0.5 cycles per voxel over the truth's, in dB: 0 as sharp, negative blurred.

    Noise counts as sharpness. -inf for a constant candidate, NaN for a constant truth. Unknown
    voxels are background (-1) in both. A spectrum needs a box: NaN in regions.
    """
    if not np.ptp(candidate) or not np.ptp(truth):
        return -math.inf if np.ptp(truth) else math.nan
    made, real = (spectrum(volume)[round(SPECTRUM_BINS * FINE / 0.5):].sum() for volume in (candidate, truth))
    return float(10 * np.log10(made / real))


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

    Subjects for which one of both is NaN or infinite take no part.
    """
    first, second = np.asarray(first), np.asarray(second)
    finite = np.isfinite(first) & np.isfinite(second)
    gain = first[finite] - second[finite]
    if len(gain) < 2 or np.ptp(gain) == 0:
        return float(gain.mean()) if len(gain) else math.nan, math.nan, math.nan
    interval = bootstrap((gain,), np.mean, n_resamples=10_000, method="percentile",
                         rng=np.random.default_rng(0)).confidence_interval
    return float(gain.mean()), float(interval.low), float(interval.high)


def gain_text(first: np.ndarray, second: np.ndarray, form: str, unit: str = "") -> str:
    """`paired_gain` in words, such as "+1.23 dB (+0.98 .. +1.50)"."""
    gain, low, high = paired_gain(first, second)
    return f"{gain:{form}}{unit} " + ("(no interval)" if math.isnan(low) else f"({low:{form}} .. {high:{form}})")


def summary(rows: list[dict]) -> str:
    """A table to print: PSNR and SSIM of the whole volumes of each kind, and how much better the refined ones are."""
    groups = {}
    for row in sorted((row for row in rows if row["region"] == "volume"), key=lambda row: row["subject"]):
        groups.setdefault((row["direction"], row["volume"]), []).append((row["psnr"], row["ssim"]))
    better = "refined is better by (95 % interval)" if any(volume == "refined" for _, volume in groups) else ""
    lines = [f"direction        volume      PSNR (dB)       SSIM            {better}".rstrip()]
    for (direction, volume), scores in groups.items():
        refined, line, gains = groups.get((direction, "refined")), f"{direction:<16} {volume:<11}", ""
        for column, digits, unit in ((0, 2, " dB"), (1, 3, "")):
            values = np.array(scores)[:, column]
            known = values[~np.isnan(values)]
            spread = known.std() if np.isfinite(known).all() and known.size else math.nan
            line += f" {_mean(known):6.{digits}f} +- {spread:5.{digits}f}"
            if refined and volume != "refined":
                gains += "  " + gain_text(np.array(refined)[:, column], values, f"+.{digits}f", unit)
        lines.append(line + gains)
    return "\n".join(lines)

"""Map intensities of volumes (X, Y, Z) between file units and [-1, 1]."""

from pathlib import Path

import numpy as np
from scipy.ndimage import binary_fill_holes, label
from skimage.filters import threshold_otsu

from data.problems import VolumeError

PERCENTILES = (0.1, 99.9)  # robust: a few outliers do not set the contrast of the rest
SHARE = 1e-4  # of the voxels between the extremes, that must stay between -1 and 1
RESOLUTION = 1e-6  # differences of this part of a number vanish in float32
TINY = 1e-30  # so do differences below this when they are divided


def brain_region(volume: np.ndarray) -> np.ndarray:
    """Bool (X, Y, Z): the largest connected component above Otsu's threshold, holes filled."""
    components, _ = label(volume > threshold_otsu(volume[np.isfinite(volume)]))  # nothing is larger than NaN
    voxels = np.bincount(components.ravel())
    voxels[0] = 0  # the background
    return binary_fill_holes(components == voxels.argmax()) & ~np.isnan(volume)


def normalise(volume: np.ndarray, path: Path, intensity: str = "percentile") -> tuple[np.ndarray, float, float]:
    """Map an intensity range linearly to [-1, 1] and clip; returns the volume and the ends of the range.

    intensity: the range is the 0.1 to 99.9 percentiles ("percentile") or minimum to maximum ("minmax") of all voxels,
    or of those of the brain ("brain_..."). NaN, where a scan sees nothing, takes no part, and stays. path: for the
    message. Raises VolumeError if the volume is constant, or so nearly that float32 cannot tell.
    """
    known = volume[np.isfinite(volume)]
    smallest, largest = float(known.min()), float(known.max())
    if largest - smallest <= max(TINY, RESOLUTION * max(-smallest, largest)):
        values = f"is {smallest:g}" if smallest == largest else f"lies within {smallest!r} .. {largest!r}: too close"
        raise VolumeError(path, f"every voxel {values}", "repair the file, or list it in opt.exclude")
    voxels = volume[brain_region(volume)] if intensity.startswith("brain") else known
    low, high = np.percentile(voxels, PERCENTILES) if "percentile" in intensity else (voxels.min(), voxels.max())
    low, high = map(float, (low, high) if high - low > TINY else (smallest, largest))  # if nearly all are equal
    scaled = scale(volume, low, high)
    between = ((known > smallest) & (known < largest)).sum(), (np.abs(scaled) < 1 - RESOLUTION).sum()
    if between[1] < SHARE * between[0]:
        raise VolumeError(path, f"nearly all voxels become -1 or 1, because a few reach {smallest:g} or {largest:g}",
                          "repair the file, choose another opt.intensity, or list it in opt.exclude")
    return scaled, low, high


def scale(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities in file units -> [-1, 1], clipped."""
    return np.clip((volume - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def to_units(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """[-1, 1] -> intensities in file units."""
    return ((volume + 1) / 2 * (high - low) + low).astype(np.float32)

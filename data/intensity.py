"""Intensities: which of a volume's become -1 and +1, there and back. Volumes are (X, Y, Z)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import binary_fill_holes, label
from skimage.filters import threshold_otsu

from data.problems import VolumeError

PERCENTILES = (0.1, 99.9)  # robust: a few outliers do not decide the contrast of all the rest
INTENSITY = ("percentile", "minmax", "brain_percentile", "brain_minmax")


def brain_region(volume: np.ndarray) -> np.ndarray:
    """Bool (X, Y, Z): the largest connected part above Otsu's threshold, holes filled."""
    parts, _ = label(volume > threshold_otsu(volume))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return binary_fill_holes(parts == sizes.argmax())


def normalise(volume: np.ndarray, path: Path, how: str = "percentile") -> tuple[np.ndarray, float, float]:
    """Map two intensities to -1 and 1 and clip; returns the volume and both intensities.

    how: they are the 0.1 and 99.9 percentiles ("percentile") or the smallest and largest value ("minmax") of all
    voxels, or of the brain's only ("brain_..."). Raises VolumeError where the volume is constant.
    """
    if volume.min() == volume.max():
        raise VolumeError(path, f"every voxel is {volume.min():g}", "exclude the subject or repair the file")
    voxels = volume[brain_region(volume)] if how.startswith("brain") else volume
    low, high = ((float(p) for p in np.percentile(voxels, PERCENTILES)) if how.endswith("percentile")
                 else (float(voxels.min()), float(voxels.max())))
    if not high > low:  # nearly all voxels alike: the full range is all there is
        low, high = float(volume.min()), float(volume.max())
    return scale(volume, low, high), low, high


def scale(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities in file units -> [-1, 1], clipped."""
    return np.clip((volume - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def to_units(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """[-1, 1] -> intensities in file units."""
    return ((volume + 1) / 2 * (high - low) + low).astype(np.float32)

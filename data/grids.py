"""Interpolate volumes (X, Y, Z) onto other voxel grids. Affines map voxels to mm."""

import itertools

import numpy as np
from scipy.ndimage import affine_transform, spline_filter

COARSER, MUCH_COARSER = 1.001, 1.5  # old voxels per new voxel, from which on a new voxel averages


def interpolate(volume: np.ndarray, to_old: np.ndarray, size: tuple[int, int, int], sharp: bool = False) -> np.ndarray:
    """Interpolate onto `size` voxels; to_old: (4, 4), new voxel -> old voxel. Repeats the edges outside.

    Along axes that become coarser, each new voxel averages three samples, against aliasing. Samples are linear, which
    blurs between voxels; sharp: quadratic splines, unless an axis becomes much coarser.
    """
    coarser = np.linalg.norm(to_old[:3, :3], axis=0) > (MUCH_COARSER if sharp else COARSER)
    order = 2 if sharp and not coarser.any() else 1
    steps = [(-column / 3, 0 * column, column / 3) if averages else (0 * column,)
             for column, averages in zip(to_old[:3, :3].T, coarser)]
    places = [sum(offsets) for offsets in itertools.product(*steps)]
    weights = spline_filter(volume, order, np.float32, "nearest") if order > 1 else volume
    total = np.zeros(size, np.float32)  # a running sum: 27 volumes would need too much memory
    for place in places:
        total += affine_transform(weights, to_old[:3, :3], to_old[:3, 3] + place, output_shape=size, order=order,
                                  mode="nearest", prefilter=False)
    return total / np.float32(len(places))


def resample(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume onto `size` voxels over the same field of view; returns it and its affine."""
    zoom = np.array(volume.shape) / np.array(size)  # old voxels per new voxel
    to_old = np.diag([*zoom, 1.0])
    to_old[:3, 3] = (zoom - 1) / 2  # the outer voxel edges of both grids coincide
    return interpolate(volume, to_old, size), affine @ to_old


def pad_crop(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Crop a volume around its centre, or pad it with its minimum, to `size`; returns it and its affine."""
    first = (np.array(volume.shape) - size) // 2  # old index of the first new voxel: negative where padded
    kept = volume[tuple(slice(max(0, f), f + n) for f, n in zip(first, size))]
    padding = [(max(0, -f), n - k - max(0, -f)) for f, n, k in zip(first, size, kept.shape)]
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    return np.pad(kept, padding, constant_values=volume.min()), moved


RESIZE = {"resample": resample, "pad_crop": pad_crop}


def onto_grid(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int], to_affine: np.ndarray,
              outside: float) -> np.ndarray:
    """Interpolate a volume onto another grid, sharply, within its own range of intensities.

    Voxels whose centre is not in its field of view become `outside`.
    """
    to_old = np.linalg.inv(affine) @ to_affine
    made = np.clip(interpolate(volume, to_old, size, sharp=True), volume.min(), volume.max())
    return np.where(inside(to_old, size, volume.shape), made, np.float32(outside))


def inside(to_old: np.ndarray, size: tuple[int, int, int], old_size: tuple[int, int, int]) -> np.ndarray:
    """Bool (X, Y, Z) of `size`: is the centre of a new voxel in the old field of view, up to its outer voxel edges?"""
    x, y, z = np.ogrid[tuple(slice(n) for n in size)]
    within = np.ones(size, bool)
    for (a, b, c, d), n in zip(to_old[:3], old_size):
        old = a * x + b * y + c * z + d
        within &= (old > -0.5 - 1e-3) & (old < n - 0.5 + 1e-3)
    return within


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size (3,) in mm of an affine (4, 4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)

"""Interpolate volumes (X, Y, Z) onto other voxel grids. Affines map voxels to mm."""

import itertools

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter


def resample(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume linearly onto `size` voxels over the same field of view; returns it and its affine.

    Along axes that become coarser, each new voxel averages three samples, against aliasing.
    """
    zoom = np.array(volume.shape) / np.array(size)  # old voxels per new voxel
    to_old = np.diag([*zoom, 1.0])
    to_old[:3, 3] = (zoom - 1) / 2  # the outer voxel edges of both grids coincide
    places = list(itertools.product(*((-z / 3, 0.0, z / 3) if z > 1 else (0.0,) for z in zoom)))
    total = np.zeros(size, np.float32)  # a running sum: 27 volumes would need too much memory
    for place in places:
        total += affine_transform(volume, to_old[:3, :3], to_old[:3, 3] + place, output_shape=size, order=1,
                                  mode="nearest")
    return total / np.float32(len(places)), affine @ to_old


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
    """Interpolate a volume onto another grid by quadratic splines, within its own range of intensities.

    Where voxels become larger, the volume is smoothed first, by a Gaussian with the variance that an average over the
    new voxel adds. Voxels whose centre is not in its field of view become `outside`.
    """
    to_old = np.linalg.inv(affine) @ to_affine
    width = np.linalg.norm(to_old[:3, :3], axis=1)  # of a new voxel along the old axes, in old voxels
    smooth = gaussian_filter(volume, np.sqrt(np.maximum(0, width**2 - 1) / 12), mode="nearest", truncate=1.5)
    order = 2 if width.max() < 2 else 1  # a spline adds nothing to a smooth volume
    made = affine_transform(smooth, to_old[:3, :3], to_old[:3, 3], output_shape=size, order=order, mode="nearest")
    made = np.clip(made, volume.min(), volume.max()).astype(np.float32)
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

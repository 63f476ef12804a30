"""Interpolate volumes (X, Y, Z) onto other voxel grids. Affines map voxels to mm."""

import itertools

import numpy as np
from scipy.ndimage import affine_transform

COARSER = 1.001  # old voxels per new voxel, from which on a new voxel averages


def interpolate(volume: np.ndarray, to_old: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Interpolate linearly onto `size` voxels; to_old: (4, 4), new voxel -> old voxel. Repeats the edges outside.

    Along axes that become coarser, each new voxel averages three samples, against aliasing.
    """
    steps = [(-column / 3, 0 * column, column / 3) if np.linalg.norm(column) > COARSER else (0 * column,)
             for column in to_old[:3, :3].T]
    places = [sum(offsets) for offsets in itertools.product(*steps)]
    total = np.zeros(size, np.float32)  # a running sum: 27 volumes would need too much memory
    for place in places:
        total += affine_transform(volume, to_old[:3, :3], to_old[:3, 3] + place, output_shape=size, order=1,
                                  mode="nearest")
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
    """Interpolate a volume onto another grid; voxels whose centre is not in its field of view become `outside`."""
    to_old = np.linalg.inv(affine) @ to_affine
    seen = inside(to_old, size, volume.shape)
    return np.where(seen, interpolate(volume, to_old, size), np.float32(outside))


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

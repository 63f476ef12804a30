"""Interpolate volumes (X, Y, Z) onto other voxel grids. Affines map voxels to mm."""

import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import affine_transform


def resample(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume linearly onto `size` voxels over the same field of view; returns it and its affine.

    Along axes that become coarser, each new voxel averages three samples, against aliasing.
    """
    zoom = np.array(volume.shape) / np.array(size)  # old voxels per new voxel
    to_old = np.diag([*zoom, 1.0])
    to_old[:3, 3] = (zoom - 1) / 2  # the outer voxel edges of both grids coincide
    dx, dy, dz = [(-z / 3, 0.0, z / 3) if z > 1 else (0.0,) for z in zoom]
    samples = [affine_transform(volume, to_old[:3, :3], to_old[:3, 3] + (x, y, z), output_shape=size, order=1,
                                mode="nearest") for x in dx for y in dy for z in dz]
    return np.mean(samples, axis=0, dtype=np.float32), affine @ to_old


def pad_crop(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Crop a volume around its centre, or pad it with its minimum, to `size`; returns it and its affine."""
    first = (np.array(volume.shape) - size) // 2  # old index of the first new voxel: negative where padded
    kept = volume[tuple(slice(max(0, f), f + n) for f, n in zip(first, size))]
    padding = [(max(0, -f), n - k - max(0, -f)) for f, n, k in zip(first, size, kept.shape)]
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    return np.pad(kept, padding, constant_values=volume.min()), moved


RESIZE = {"resample": resample, "pad_crop": pad_crop}


def onto_grid(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int], to_affine: np.ndarray) -> np.ndarray:
    """Interpolate a volume linearly onto another grid; outside its field of view the result is its minimum."""
    to_old = np.linalg.inv(affine) @ to_affine
    moved = affine_transform(volume, to_old[:3, :3], to_old[:3, 3], output_shape=size, order=1, mode="nearest")
    old = apply_affine(to_old, np.moveaxis(np.indices(size), 0, -1))  # (X, Y, Z, 3), old voxels
    inside = ((old > -0.5 - 1e-3) & (old < np.array(volume.shape) - 0.5 + 1e-3)).all(axis=-1)  # the edges of the grid
    return np.where(inside, moved.astype(np.float32), volume.min())


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size (3,) in mm of an affine (4, 4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)

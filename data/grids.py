"""Voxel grids in space: bringing a volume (X, Y, Z) onto another grid, and comparing fields of view. Units: mm."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy.ndimage import affine_transform

CORNERS = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])


def resample(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume (X, Y, Z) linearly onto `size` voxels over the same field of view; returns also its affine.

    Where the grid gets coarser, the volume is averaged over the new voxels first (three taps each way).
    """
    zoom = np.array(volume.shape) / np.array(size)  # old voxels per new voxel
    to_old = np.diag([*zoom, 1.0])
    to_old[:3, 3] = (zoom - 1) / 2  # voxel edges of both grids coincide
    shifts = [(-z / 3, 0.0, z / 3) if z > 1 else (0.0,) for z in zoom]
    samples = [affine_transform(volume, to_old[:3, :3], to_old[:3, 3] + (dx, dy, dz), output_shape=size, order=1,
                                mode="nearest")
               for dx in shifts[0] for dy in shifts[1] for dz in shifts[2]]
    return np.mean(samples, axis=0, dtype=np.float32), affine @ to_old


def pad_crop(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cut a volume (X, Y, Z), or pad it with its minimum, to `size` around its centre; returns also its affine."""
    first = [(old - new) // 2 for old, new in zip(volume.shape, size)]  # voxel that comes first; negative where padded
    out = np.full(size, volume.min(), dtype=volume.dtype)
    into = tuple(slice(max(0, -f), max(0, -f) + min(old, f + new) - max(0, f))
                 for f, old, new in zip(first, volume.shape, size))
    out[into] = volume[tuple(slice(max(0, f), min(old, f + new)) for f, old, new in zip(first, volume.shape, size))]
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    return out, moved


RESIZE = {"resample": resample, "pad_crop": pad_crop}


def onto_grid(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int], to_affine: np.ndarray) -> np.ndarray:
    """The volume (X, Y, Z) interpolated linearly onto another grid; its minimum stands outside its field of view."""
    made = resample_from_to(nib.Nifti1Image(volume, affine), (size, to_affine), order=1, mode="nearest")
    voxels = np.moveaxis(np.indices(size), 0, -1) @ to_affine[:3, :3].T + to_affine[:3, 3] - affine[:3, 3]
    places = voxels @ np.linalg.inv(affine[:3, :3]).T  # in voxels of `volume`, whose edges are at -0.5 and n - 0.5
    inside = ((places > -0.5 - 1e-3) & (places < np.array(volume.shape) - 0.5 + 1e-3)).all(axis=-1)
    return np.where(inside, np.asarray(made.dataobj, dtype=np.float32), volume.min())


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size (3,) in mm of an affine (4, 4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def field_of_view(affine: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """The eight outer corners (8, 3), mm, of a grid."""
    return (CORNERS * size - 0.5) @ affine[:3, :3].T + affine[:3, 3]


def compare_fields(a: tuple[np.ndarray, tuple], b: tuple[np.ndarray, tuple]) -> tuple[bool, float]:
    """Whether two grids (affine, size) overlap, and the largest distance, mm, between their corners."""
    first, second = field_of_view(*a), field_of_view(*b)
    overlap = ((first.min(0) < second.max(0)) & (second.min(0) < first.max(0))).all()
    return bool(overlap), float(np.linalg.norm(first - second, axis=1).max())

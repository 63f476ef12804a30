"""The disease-related brain networks as masks: ROIs of Dosenbach et al., Science 329 (2010) 1358-1361.

The table holds 160 ROIs in six networks with MNI coordinates in mm, as distributed with nilearn.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

TABLE = Path(__file__).with_name("dosenbach160.csv")


class AtlasError(ValueError):
    """Networks that the table does not have; the message names the option and the choices."""


def roi_centres(networks: tuple[str, ...]) -> np.ndarray:
    """MNI coordinates (N, 3), mm, of the ROIs of these networks. Raises AtlasError for an unknown network."""
    with open(TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    known = sorted({row["network"] for row in rows})
    if unknown := sorted(set(networks) - set(known)):
        raise AtlasError(f"opt.pattern_networks names {', '.join(unknown)}; choose from {', '.join(known)}")
    return np.array([[float(row[axis]) for axis in "xyz"] for row in rows if row["network"] in networks]).reshape(-1, 3)


def pattern_mask(size: tuple[int, int, int], affine: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """Spheres of `radius` mm around `centres` (N, 3, mm) on a grid: bool (X, Y, Z).

    The voxel that holds a centre always belongs to it, so that no ROI vanishes on a coarse grid.
    """
    voxels = np.moveaxis(np.indices(size), 0, -1).reshape(-1, 3)
    distance, _ = cKDTree(centres).query(voxels @ affine[:3, :3].T + affine[:3, 3])
    mask = (distance <= radius).reshape(size)
    holders = np.rint((centres - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    inside = ((holders >= 0) & (holders < size)).all(axis=1)
    mask[tuple(holders[inside].T)] = True
    return mask

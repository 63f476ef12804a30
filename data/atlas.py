"""The disease-related brain networks as masks: ROIs of Dosenbach et al., Science 329 (2010) 1358-1361, or own labels.

The table holds 160 ROIs in six networks with MNI coordinates in mm, as distributed with nilearn.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform
from scipy.spatial import cKDTree

from data.volumes import read_volume

TABLE = Path(__file__).with_name("dosenbach160.csv")


class AtlasError(ValueError):
    """Networks or labels that are not there; the message names the option and the choices."""


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


class LabelImage:
    """A NIfTI image of labels, over the volumes in space; of `labels` (all but 0 where there are none) it makes masks.

    Raises VolumeError where the file cannot be read, AtlasError where it does not have a label.
    """

    def __init__(self, path: Path, labels: tuple[int, ...]):
        scan = read_volume(path, "first")
        voxels, self.affine = np.rint(scan.voxels), scan.affine
        if absent := sorted(set(labels) - set(np.unique(voxels).astype(int).tolist())):
            there = np.unique(voxels[voxels > 0]).astype(int).tolist()
            raise AtlasError(f"opt.pattern_labels names {', '.join(map(str, absent))}, but {path} has only "
                             f"{', '.join(map(str, there[:30]))}{' ...' if len(there) > 30 else ''}")
        self.chosen = (np.isin(voxels, labels) if labels else voxels > 0).astype(np.float32)

    def mask(self, size: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        """Bool (X, Y, Z) on another grid: at least half of a voxel's 27 points are of the chosen labels."""
        to_labels = np.linalg.inv(self.affine) @ affine
        steps = [to_labels[:3, :3] @ (np.array(shift) - 1) / 3 for shift in np.ndindex(3, 3, 3)]
        hits = sum(affine_transform(self.chosen, to_labels[:3, :3], to_labels[:3, 3] + step, output_shape=size, order=0,
                                    mode="grid-constant") for step in steps)  # up to the outer edges of its voxels
        return hits >= len(steps) / 2

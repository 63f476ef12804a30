"""Pattern masks: regions of disease-related brain networks, or labels of the user's own image.

dosenbach160.csv: 160 ROIs in six networks (Dosenbach et al., Science 329 (2010) 1358-1361), as nilearn distributes it.
"""

from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import affine_transform
from scipy.spatial import cKDTree

from data.volumes import read_volume
from utils.errors import UserError


def roi_centres(networks: tuple[str, ...]) -> np.ndarray:
    """MNI coordinates (N, 3), mm, of the ROIs of these networks. Raises UserError for an unknown network."""
    table = np.genfromtxt(Path(__file__).with_name("dosenbach160.csv"), delimiter=",", names=True, dtype=None,
                          encoding="utf-8")
    known = set(table["network"].tolist())
    if unknown := sorted(set(networks) - known):
        raise UserError(f"opt.pattern_networks names {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    rows = table[np.isin(table["network"], networks)]
    return np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=-1)


def pattern_mask(size: tuple[int, int, int], affine: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """Spheres of `radius` mm around `centres` (N, 3, mm) on a grid: bool (X, Y, Z)."""
    voxels = apply_affine(affine, np.moveaxis(np.indices(size), 0, -1))  # (X, Y, Z, 3), mm
    mask = cKDTree(centres).query(voxels)[0] <= radius
    nearest = np.rint(apply_affine(np.linalg.inv(affine), centres)).astype(int)
    inside = ((nearest >= 0) & (nearest < size)).all(axis=1)
    mask[tuple(nearest[inside].T)] = True  # so that no ROI vanishes on a coarse grid
    return mask


class LabelImage:
    """A NIfTI image of labels; labels: those of the pattern, () for all but 0. Raises VolumeError, UserError."""

    def __init__(self, path: Path, labels: tuple[int, ...]):
        scan = read_volume(path, "first")
        voxels, self.affine = np.rint(scan.voxels), scan.affine
        present = np.unique(voxels[voxels > 0]).astype(int).tolist()
        if missing := sorted(set(labels) - set(present)):
            raise UserError(f"opt.pattern_labels names {', '.join(map(str, missing))}, but {path} has only "
                            f"{', '.join(map(str, present))}; correct one of them")
        self.chosen = np.isin(voxels, labels or present).astype(np.float32)

    def mask(self, size: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        """Bool (X, Y, Z) on another grid: at least half of 27 points in each voxel have a label of the pattern."""
        to_labels = np.linalg.inv(self.affine) @ affine
        offsets = [to_labels[:3, :3] @ (np.array(index) - 1) / 3 for index in np.ndindex(3, 3, 3)]
        hits = sum(affine_transform(self.chosen, to_labels[:3, :3], to_labels[:3, 3] + offset, output_shape=size,
                                    order=0, mode="grid-constant")  # up to the outer edges of its voxels
                   for offset in offsets)
        return hits >= len(offsets) / 2

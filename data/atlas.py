"""Masks: regions of disease-related brain networks, or labels of the user's own images.

dosenbach160.csv: 160 ROIs in six networks (Dosenbach et al., Science 329 (2010) 1358-1361), as nilearn distributes it.
"""

import dataclasses
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import affine_transform
from scipy.spatial import cKDTree

from data.pairs import Pair
from data.problems import Problem, VolumeError, or_leave_out
from data.volumes import read_volume
from utils.errors import UserError
from utils.stop import interruptible


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
    mask[tuple(voxels_at(size, affine, centres).T)] = True  # so that no ROI vanishes on a coarse grid
    return mask


def voxels_at(size: tuple[int, int, int], affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Indices (M, 3) of the voxels of a grid that are nearest to those of the points (N, 3), mm, that lie in it."""
    nearest = np.rint(apply_affine(np.linalg.inv(affine), points)).astype(int)
    return nearest[((nearest >= 0) & (nearest < size)).all(axis=1)]


class LabelImage:
    """A NIfTI image of labels, integers above 0. Raises VolumeError where it cannot be read."""

    def __init__(self, path: Path):
        scan = read_volume(path, "first")
        self.voxels, self.affine = np.rint(scan.voxels), scan.affine
        self.labels = set(np.unique(self.voxels[self.voxels > 0]).astype(int).tolist())

    def mask(self, labels: tuple[int, ...], size: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        """Bool (X, Y, Z) on another grid: at least half of 27 points in each voxel have one of the labels; (): any."""
        chosen = np.isin(self.voxels, labels or list(self.labels)).astype(np.float32)
        to_labels = np.linalg.inv(self.affine) @ affine
        offsets = [to_labels[:3, :3] @ (np.array(index) - 1) / 3 for index in np.ndindex(3, 3, 3)]
        hits = sum(affine_transform(chosen, to_labels[:3, :3], to_labels[:3, 3] + offset, output_shape=size,
                                    order=0, mode="grid-constant")  # up to the outer edges of its voxels
                   for offset in offsets)
        return hits >= len(offsets) / 2


def uses_rois(opt, pair: Pair) -> bool:
    """Whether the ROIs of opt.pattern_networks make the masks of a pair."""
    in_mni = opt.space == "mni" or (opt.space == "auto" and pair.in_mni)
    return in_mni and bool(opt.pattern_networks) and not opt.pattern_file


def outside_rois(pair: Pair, path: Path) -> Problem:
    """The problem of a scan of such a pair whose mask would be empty."""
    return or_leave_out(Problem(
        str(path), "no voxel of it lies in the ROIs", "correct its header, or exclude the subject (opt.exclude); or "
        'set opt.space = "native" if no scan is in MNI space', pair.name), pair.is_complete)


def unreadable_labels(opt, pairs: list[Pair]) -> list[Problem]:
    """What is wrong with the images of opt.pattern_file, each read once; an incomplete visit may lack its own."""
    problems, read = [], set()
    for pair in interruptible(pairs if opt.pattern_file else []):
        file = pair.file_of(opt.pattern_file)
        if file in read or not (pair.is_complete or file.exists()):
            continue
        read.add(file)
        try:
            LabelImage(file)
        except VolumeError as error:
            problems += [dataclasses.replace(problem, subject=pair.name) for problem in error.problems]
    return problems


def region_masks(opt, pair: Pair, size: tuple[int, int, int], affine: np.ndarray) -> dict[str, np.ndarray]:
    """The regions of opt.region_labels in a pair's opt.region_file: name -> bool (X, Y, Z) on a grid, maybe empty."""
    if not opt.region_file:
        return {}
    image = LabelImage(pair.file_of(opt.region_file))
    return {name: image.mask(labels, size, affine) for name, labels in opt.regions().items()}


def empty_regions(opt, pairs: list[Pair]) -> list[Problem]:
    """Regions that no pair has. Raises VolumeError where an image of theirs cannot be read."""
    if not opt.region_file or not pairs:
        return []
    found = set().union(*(LabelImage(pair.file_of(opt.region_file)).labels for pair in pairs))
    return [Problem(f"opt.region_labels, {name}", f"no image of {opt.region_file} has such a label",
                    "correct one of them, or there will be no scores of it", fatal=False)
            for name, labels in opt.regions().items() if found.isdisjoint(labels)]

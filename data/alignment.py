"""Where the volumes of a pair lie: edge to edge, or over one box in world space, through the affines of their files.

In world space both modalities are sampled over a common box along the axes R, A, S, each on a grid of its own. In a
template space the box is the same for all pairs, so that mean volume and ROIs keep their meaning. In native space it
has one size, and lies around the middle of what both scans of a pair see: this needs headers only, most of the box is
known, and a scan that is cut on one side moves the box towards what it shows. Lengths are in mm.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, from_matvec

from data.cache import Reading
from data.grids import inside, spacing_of
from data.pairs import Pair
from data.problems import DataError, Problem
from data.volumes import read_grid
from utils.stop import interruptible

LEAST_OVERLAP = 0.25  # of the common box, that all scans of a pair must see
POINTS = (24, 24, 24)  # at which this is looked at
CORNERS = np.array(list(np.ndindex(2, 2, 2)))
Grids = dict[str, tuple[np.ndarray, tuple[int, int, int]]]  # modality -> affine (4, 4), RAS, and size of a file


@dataclass(frozen=True)
class Alignment:
    """How a study's volumes are brought together, in plain values: part of a checkpoint.

    how: "grid" (edge to edge) or "world". box: (3,) its size. centre: (3,) of the box of all pairs; (): each pair has
    its own. offsets: modality -> (3,) from the centre of a scan's field of view to that of its pair's box, median over
    the pairs: they place a scan without a partner.
    """

    how: str = "grid"
    box: tuple[float, ...] = ()
    centre: tuple[float, ...] = ()
    offsets: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        where = "at the same place for all pairs" if self.centre else "for each pair around what both scans see"
        return "edge to edge" if self.how == "grid" else f"in world space, a box of {self.size} {where}"

    @property
    def size(self) -> str:
        return "x".join(f"{length:.0f}" for length in self.box) + " mm"

    def readings(self, readings: dict[str, Reading], files: dict[str, Path]) -> dict[str, Reading]:
        """How the scans of a pair, or one of them, are read. Raises DataError where they see too little of the box.

        A reading without a size, to check a study, gets that of POINTS.
        """
        readings = {modality: readings[modality] for modality in files}
        if self.how == "grid":
            return readings
        grids = {modality: read_grid(file) for modality, file in files.items()}
        points = self.affine(grids, POINTS)
        seen = np.mean(np.logical_and.reduce([inside(np.linalg.inv(affine) @ points, POINTS, size)
                                              for affine, size in grids.values()]))
        if seen < LEAST_OVERLAP:
            raise DataError(Problem(
                " and ".join(map(str, files.values())), f"{'both see' if len(files) > 1 else 'sees'} only {seen:.0%} "
                f"of the common box of {self.size}, less than {LEAST_OVERLAP:.0%}", "register the scans, correct their "
                "affines, exclude the subject (opt.exclude), or choose another opt.box_size"))
        affines = {modality: self.affine(grids, reading.size or POINTS) for modality, reading in readings.items()}
        return {modality: dataclasses.replace(reading, size=reading.size or POINTS,
                                              affine=tuple(map(tuple, affines[modality].tolist())))
                for modality, reading in readings.items()}

    def affine(self, grids: Grids, size: tuple[int, int, int]) -> np.ndarray:
        """Voxel -> mm (4, 4) of `size` voxels over the box of these scans."""
        if self.centre:
            centre = np.array(self.centre)
        elif len(grids) > 1:
            centre = common_view(grids).mean(axis=0)
        else:
            (modality, grid), = grids.items()
            centre = view(grid).mean(axis=0) + self.offsets[modality]
        spacing = np.array(self.box) / size
        return from_matvec(np.diag(spacing), centre - (np.array(size) - 1) / 2 * spacing)


def align(opt, pairs: list[Pair]) -> Alignment:
    """The alignment that opt.align asks for; pairs with an unreadable header take no part. Raises Interrupted."""
    if opt.align == "grid":
        return Alignment()
    found = []
    for pair in interruptible([pair for pair in pairs if pair.is_complete]):
        try:
            found.append((pair, {modality: read_grid(file) for modality, file in pair.files.items()}))
        except DataError:  # reported when the file is read
            continue
    if not found or (opt.align == "auto" and not any(misalignment(pair, *grids.values()) for pair, grids in found)):
        return Alignment()
    overlapping = [(grids, ends) for _, grids in found for ends in [common_view(grids)] if (ends[0] < ends[1]).all()]
    if not overlapping:
        raise DataError(Problem(opt.data_root, "the two scans of no pair overlap in space", "register them and correct "
                                "their affines, or set opt.align = \"grid\" to overlay them edge to edge", "all"))
    size = np.median([ends[1] - ends[0] for _, ends in overlapping], axis=0)
    centre = np.median([ends.mean(axis=0) for _, ends in overlapping], axis=0)
    offsets = {modality: np.median([ends.mean(axis=0) - view(grids[modality]).mean(axis=0)
                                    for grids, ends in overlapping], axis=0) for modality in opt.modalities}
    one_place = opt.space in ("mni", "template") or (opt.space == "auto" and all(pair.in_mni for pair, _ in found))
    return Alignment("world", rounded(opt.box_size or size), rounded(centre) if one_place else (),
                     {modality: rounded(offset) for modality, offset in offsets.items()})


def misalignment(pair: Pair, *grids: tuple[np.ndarray, tuple[int, int, int]]) -> Problem | None:
    """A warning if corners of both fields of view are more than one (larger) voxel apart."""
    first, second = (apply_affine(affine, CORNERS * size - 0.5) for affine, size in grids)  # (8, 3)
    distance = np.linalg.norm(first - second, axis=1).max()
    if distance <= max(spacing_of(affine).max() for affine, _ in grids):
        return None
    apart = ((first.min(0) >= second.max(0)) | (second.min(0) >= first.max(0))).any()
    what = "do not overlap in space" if apart else f"differ by up to {distance:.0f} mm"
    return Problem(" and ".join(file.name for file in pair.files.values()), f"their fields of view {what}",
                   'they are overlaid edge to edge all the same; opt.align = "world" goes by their affines', pair.name,
                   fatal=False)


def view(grid: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
    """(2, 3) lower and upper ends of a field of view along the axes of the world."""
    corners = apply_affine(grid[0], CORNERS * grid[1] - 0.5)
    return np.array([corners.min(axis=0), corners.max(axis=0)])


def common_view(grids: Grids) -> np.ndarray:
    """(2, 3) ends of what all scans see; the upper one is below the lower one where they see nothing in common."""
    views = np.array([view(grid) for grid in grids.values()])
    return np.array([views[:, 0].max(axis=0), views[:, 1].min(axis=0)])


def rounded(numbers: np.ndarray) -> tuple[float, ...]:
    """Plain values: micrometres are enough."""
    return tuple(round(float(number), 3) for number in numbers)

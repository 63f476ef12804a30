"""Do the two scans of a pair show the same place? Compares coarse volumes of both, whatever their contrasts."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage.metrics import normalized_mutual_information

from data.alignment import Alignment
from data.grids import onto_grid, resample, spacing_of
from data.intensity import brain_region, normalise
from data.pairs import Pair
from data.problems import Problem
from data.volumes import Scan
from utils.figures import Panel, save_grid

COARSE, FINE = (24, 24, 24), (64, 64, 64)  # voxels: to compare, and to draw
PAIRS_SHOWN = 6
LEAST_SHIFT = 12.0  # mm, that is worth a warning
BINS = 16
FAR = 4  # coarse voxels: the search starts from shifts by this much, too
LEAST_GAIN = 0.02  # in mutual information, that makes a shift believable
LEAST_SEEN = 0.2  # of the box, on which shifted volumes are compared


@dataclass(frozen=True)
class Overlay:
    """Both scans of a pair on one grid, as training overlays them; similarity: mutual information."""

    name: str
    similarity: float
    volumes: dict[str, np.ndarray]  # modality -> (X, Y, Z) in [-1, 1]
    spacing: np.ndarray  # (3,) mm


def overlay(pair: Pair, alignment: Alignment, scans: dict[str, Scan]) -> tuple[Overlay, list[Problem]]:
    """Bring the scans of a pair together; a warning where they would fit better if one were shifted."""
    grids = {modality: (scan.affine, scan.voxels.shape) for modality, scan in scans.items()}
    affine, size = next(iter(grids.values()))
    extent = alignment.box or size * spacing_of(affine)

    def on(size: tuple[int, int, int]) -> dict[str, np.ndarray]:
        if alignment.how == "grid":
            return {modality: resample(scan.voxels, scan.affine, size)[0] for modality, scan in scans.items()}
        affine = alignment.affine(grids, size)
        return {modality: onto_grid(scan.voxels, scan.affine, size, affine, np.nan) for modality, scan in scans.items()}

    similarity, shift = best_shift(*on(COARSE).values())
    shift = shift * extent / COARSE
    problems, (first, second) = [], pair.files
    if (length := np.linalg.norm(shift)) >= LEAST_SHIFT:
        problems = [Problem(" and ".join(file.name for file in pair.files.values()),
                            f"the {second} fits the {first} better if it is moved by about {length:.0f} mm (R, A, S: "
                            f"{', '.join(f'{each:+.0f}' for each in shift)})", "look at check.png; if they do not show "
                            "the same place, register the scans or correct an affine", pair.name, fatal=False)]
    volumes = {modality: normalise(volume, pair.files[modality])[0] for modality, volume in on(FINE).items()}
    return Overlay(pair.name, similarity, volumes, np.array(extent) / FINE), problems


def save_overlays(path: Path, overlays: list[Overlay]) -> None:
    """Save a picture: a row per pair, each scan with the outline of the brain or head of the other one."""
    rows = []
    for each in overlays:
        heads = {modality: brain_region(volume) for modality, volume in each.volumes.items()}
        rows.append((each.name, [Panel(volume, each.spacing, f"mutual information {each.similarity:.2f}", outline=head)
                                 for volume, head in zip(each.volumes.values(), reversed(heads.values()))]))
    first, second = overlays[0].volumes
    columns = [f"{first}, outline of {second}", f"{second}, outline of {first}"]
    save_grid(path, "As training overlays them, the least alike first", columns, rows)


def best_shift(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """Normalised mutual information (Studholme et al. 1999), 1 .. 2, of two volumes (X, Y, Z) as they lie, and the
    shift (3,) of the second one in voxels that raises it most: zeros where that is less than LEAST_GAIN."""
    a, b = (np.clip(volume, *np.nanpercentile(volume, (1, 99))) for volume in (first, second))

    @functools.cache
    def similarity(shift: tuple[int, int, int]) -> float:
        one = a[tuple(slice(max(0, step), n + min(0, step)) for step, n in zip(shift, a.shape))]
        other = b[tuple(slice(max(0, -step), n + min(0, -step)) for step, n in zip(shift, b.shape))]
        seen = ~(np.isnan(one) | np.isnan(other))
        if seen.sum() < LEAST_SEEN * a.size or np.ptp(one[seen]) == 0 or np.ptp(other[seen]) == 0:
            return 1.0  # they tell nothing about each other
        return float(normalized_mutual_information(one[seen], other[seen], bins=BINS))

    best = max(itertools.product((0, -FAR, FAR), repeat=3), key=similarity)
    while (better := max((tuple(np.add(best, step).tolist()) for step in itertools.product((0, -1, 1), repeat=3)),
                         key=similarity)) != best:
        best = better
    here = similarity((0, 0, 0))
    return here, np.array(best if similarity(best) > here + LEAST_GAIN else (0, 0, 0))

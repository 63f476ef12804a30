"""Does alignment work? Writes the demo anew, each scan on a grid of its own, as scanners do.

    python -m benchmarks.moved_demo data/moved
    python main.py --check --data_root data/moved/pairs.csv
    python main.py --data_root data/moved/pairs.csv --box_size 192 192 135            [folders of its own, both stages]

The same anatomies and noise levels; fields of view are shifted by up to 40 mm, cut on one side, 10 degrees oblique,
with other spacings, half of them stored in LAS order. Prints how well volumes, read with that alignment, agree with the
demo's. With --wrong 30, the affines of the second modality are wrong by so many mm: `--check` should find that.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from tqdm import tqdm

from data import demo
from data.alignment import align
from data.cache import to_grid
from data.study import find_study
from data.volumes import read_volume, save_image
from opt import Options

MAX_SHIFT, CUT, ANGLE = 40.0, 20.0, 10.0  # mm, mm of the demo's field of view on the side away from the shift, degrees
SPACINGS = {"fmri": (5.0, 6.5), "dmri": (3.5, 4.5)}  # mm, smallest and largest


def moved_grid(subject: demo.Anatomy, modality: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A grid over most of the demo's field of view: affine (4, 4) and size."""
    random = np.random.default_rng([subject.noise_seed, 7, list(demo.GRIDS).index(modality)])
    extent, shift = np.multiply(*demo.GRIDS[modality]), np.zeros(3)
    shift[random.integers(3)] = random.uniform(-MAX_SHIFT, MAX_SHIFT)
    rotation = euler2mat(*(np.radians(ANGLE) * np.eye(3)[random.integers(3)] * random.choice((-1, 1))))
    spacing = random.uniform(*SPACINGS[modality], 3)
    size = np.ceil((extent + 2 * np.abs(shift) - 2 * CUT * (shift != 0)) / spacing).astype(int)
    centre = demo.CENTRE + shift
    return from_matvec(rotation * spacing, centre - rotation * spacing @ (size - 1) / 2), tuple(size.tolist())


def moved_scan(subject: demo.Anatomy, modality: str, wrong: np.ndarray) -> nib.Nifti1Image:
    """A scan on its moved grid, int16; wrong: (3,) mm by which its header is wrong."""
    affine, size = moved_grid(subject, modality)
    series = demo.render(subject, modality, affine=affine, size=size)
    voxels = np.rint(series * demo.FULL_SCALE).astype(np.int16).squeeze()
    image = nib.Nifti1Image(voxels, from_matvec(np.eye(3), wrong) @ affine)
    image.set_sform(image.affine, code=4)
    image.set_qform(image.affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    return image if int(subject.noise_seed) % 2 else image.as_reoriented([[0, -1], [1, 1], [2, 1]])  # LAS


def write_moved(folder: Path, subjects: int = demo.SUBJECTS, wrong: float = 0.0) -> Path:
    """Write subjects of the demo with fields of view of their own; returns their table. wrong: mm, as --wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["subject", "group", *demo.GRIDS])]

    def write(number: int) -> str:
        subject, files = demo.Anatomy(number), []
        for place, (modality, (_, name)) in enumerate(demo.NAMES.items()):
            files.append(f"{subject.name}_{name}.nii.gz")
            shift = np.array([wrong * place, 0, 0])
            save_image(folder / files[-1], moved_scan(subject, modality, shift))
        return ",".join([subject.name, subject.group, *files])

    with ThreadPoolExecutor(2) as pool:
        lines += tqdm(pool.map(write, range(subjects)), total=subjects, unit="subject", disable=None)
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def agreement(moved: Options, original: Options) -> Iterator[tuple[str, float, float]]:
    """For each scan, as read: modality, correlation with the demo's on the same grid, distance of centres in voxels."""
    pairs, _, readings = find_study(moved)
    scans, alignment = {pair.name: pair.files for pair in find_study(original)[0]}, align(moved, pairs)
    for pair in tqdm(pairs, unit="pair", disable=None):
        for modality, reading in alignment.readings(readings, pair.files).items():
            one, other = (to_grid(read_volume(files[modality]), files[modality], reading)[0]
                          for files in (pair.files, scans[pair.name]))
            seen = ~(np.isnan(one) | np.isnan(other))
            places = np.argwhere(seen)
            centres = [np.average(places, axis=0, weights=volume[seen] + 1) for volume in (one, other)]
            yield modality, np.corrcoef(one[seen], other[seen])[0, 1], float(np.linalg.norm(np.subtract(*centres)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wrong", type=float, default=0.0, help="mm by which the second modality's affines are wrong")
    own = parser.parse_args()
    table = write_moved(own.folder, wrong=own.wrong)
    found = list(agreement(Options(data_root=str(table), box_size=(192.0, 192.0, 135.0)), Options()))
    for name in demo.GRIDS:
        correlations, distances = zip(*((each[1], each[2]) for each in found if each[0] == name))
        print(f"{name}: correlation with the demo {min(correlations):.4f} .. {max(correlations):.4f}; centres at most "
              f"{max(distances):.2f} voxels apart ({len(correlations)} scans)")


if __name__ == "__main__":
    main()

"""The demo: analytic brains as a small paired data set, written as a BIDS tree of real NIfTI files.

Each subject has its own shape (axes, a smooth warp, gyri, ventricles, cortical thickness); the group label (NC, MCI,
AD) thins the cortex inside the pattern networks and widens the ventricles. Two contrasts of the same anatomy: BOLD-like
(bright CSF, dark white matter, drop-out near the sinuses, four time points) and diffusion-like (dark CSF, bright white
matter with tracts). `render(..., noise=False)` tells how far a perfect synthesis could get.

Coordinates are MNI-like millimetres; signals are in units of CSF's BOLD signal before they are written times 1000.
This data set is frozen: figures in the README refer to it, and a test compares it with a recorded hash.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial import cKDTree

from data.atlas import roi_centres
from data.volumes import save_image
from utils.files import write_text

SUBJECTS = 60
GROUPS = ("NC", "MCI", "AD")
SEED = 2025
GRIDS = {"fmri": ((32, 32, 18), (6.0, 6.0, 7.5)), "dmri": ((48, 48, 30), (4.0, 4.0, 4.5))}  # voxels, spacing in mm
CENTRE = np.array([0.0, -18.0, 10.0])  # of the field of view, mm
NAMES = {"fmri": ("func", "task-rest_space-MNI152NLin6Asym_bold"), "dmri": ("dwi", "space-MNI152NLin6Asym_dwi")}
SIGNAL = {"fmri": {"csf": 1.0, "gm": 0.74, "wm": 0.54, "deep": 0.60},
          "dmri": {"csf": 0.14, "gm": 0.52, "wm": 0.76, "deep": 0.62}}
NOISE = {"fmri": 0.050, "dmri": 0.026}  # standard deviation of each channel of the Rician noise, per time point
TIME_POINTS = {"fmri": 4, "dmri": 1}
FULL_SCALE = 1000.0
PATTERN_NETWORKS = ("cingulo-opercular", "default", "fronto-parietal")
PATTERN_REACH = 9.0  # mm: how far around an ROI's centre the cortex thins
COMPLETE = "dataset_description.json"  # written last: its presence says that the data set is whole


@dataclass(frozen=True)
class Anatomy:
    """What makes one subject: all lengths in mm, phases in radians."""

    name: str
    group: str
    axes: np.ndarray  # (3,) scale of the head along x, y, z
    warp: np.ndarray  # (3, 4) amplitudes of the smooth displacement
    warp_phase: np.ndarray  # (3, 4)
    gyri_phase: np.ndarray  # (6,)
    gyri_depth: float
    thickness: float  # of the cortex
    ventricles: float  # scale
    tracts: float  # contrast of the tracts in white matter
    drop_out: float  # fraction of signal lost at the centre of a drop-out
    seed: int  # of the noise


def anatomies(first: int = 0, last: int | None = None) -> list[Anatomy]:
    """The subjects of the demo, always the same, or (first .. last - 1, from SUBJECTS on) others of their kind."""
    subjects = []
    for number in range(first, SUBJECTS if last is None else last):
        random = np.random.default_rng([SEED, number])
        severity = number % len(GROUPS)
        subjects.append(Anatomy(
            name=f"sub-{number + 1:02d}", group=GROUPS[severity], axes=random.normal(1.0, 0.03, 3),
            warp=random.normal(0.0, 1.6, (3, 4)), warp_phase=random.uniform(0, 2 * np.pi, (3, 4)),
            gyri_phase=random.normal(0.0, 0.7, 6), gyri_depth=random.normal(12.0, 1.0),
            thickness=random.normal(4.2, 0.3), ventricles=random.normal(1.0 + 0.16 * severity, 0.10),
            tracts=random.uniform(0.05, 0.15), drop_out=random.uniform(0.4, 0.9), seed=SEED + number))
    return subjects


def affine_of(modality: str) -> np.ndarray:
    """Voxel -> mm (4, 4) of a modality's grid; its field of view is centred at CENTRE."""
    size, spacing = GRIDS[modality]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = CENTRE - (np.array(size) - 1) / 2 * spacing
    return affine


def render(subject: Anatomy, modality: str, noise: bool = True) -> np.ndarray:
    """Signal of one scan, (X, Y, Z, time points), float64. Every voxel is the mean of 2x2x2 points."""
    size, _ = GRIDS[modality]
    pattern = roi_centres(PATTERN_NETWORKS)
    voxels = np.moveaxis(np.indices(size, dtype=np.float64), 0, -1)  # (X, Y, Z, 3)
    affine, clean = affine_of(modality), np.zeros(size)
    distance, _ = cKDTree(pattern).query(_to_template(subject, voxels @ affine[:3, :3].T + affine[:3, 3]))
    in_pattern = np.exp(-(distance**2) / (2 * PATTERN_REACH**2))  # smooth enough to be taken at the voxels' centres
    for corner in np.ndindex(2, 2, 2):
        points = (voxels + (np.array(corner) - 0.5) / 2) @ affine[:3, :3].T + affine[:3, 3]
        clean += _signal(subject, modality, points, in_pattern) / 8
    series = np.repeat(clean[..., None], TIME_POINTS[modality], axis=-1)
    if not noise:
        return series
    random = np.random.default_rng([subject.seed, list(GRIDS).index(modality)])
    real, imaginary = (random.normal(0.0, NOISE[modality], series.shape) for _ in range(2))
    return np.hypot(series + real, imaginary)  # magnitude images have Rician noise


def _signal(subject: Anatomy, modality: str, points: np.ndarray, in_pattern: np.ndarray) -> np.ndarray:
    place = _to_template(subject, points)
    tissue = _tissues(subject, place, in_pattern)
    tone = SIGNAL[modality]
    x, y, z = np.moveaxis(place, -1, 0)
    if modality == "dmri":  # tracts: bright and dark bands along white matter, fixed in the template
        bands = np.sin(2 * np.pi * (np.abs(x) / 26 + y / 60)) * np.cos(2 * np.pi * z / 44)
        tone = tone | {"wm": tone["wm"] * (1 + subject.tracts * bands)}
    signal = sum(fraction * tone[name] for name, fraction in tissue.items())
    loss = subject.drop_out * (1.0 if modality == "fmri" else 0.4)  # the spin echo of diffusion imaging loses less
    for centre, reach in (((0, 38, -20), 17), ((48, -22, -26), 13), ((-48, -22, -26), 13)):
        signal = signal * (1 - loss * np.exp(-((place - centre) ** 2).sum(-1) / (2 * reach**2)))
    coil = 1.0 + 0.12 * ((y + 18) / 90) ** 2 - 0.08 * (z - 10) / 70  # receive field
    return signal * (coil if modality == "fmri" else 2.0 - coil)


def _to_template(subject: Anatomy, points: np.ndarray) -> np.ndarray:
    """Subject's mm -> template's mm: axes about CENTRE and a smooth warp of 100 to 190 mm wavelength."""
    scaled = (points - CENTRE) / subject.axes
    directions = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    waves = 2 * np.pi / np.array([[190.0], [170.0], [150.0], [140.0]]) * directions
    angle = scaled @ waves.T  # (..., 4)
    shift = np.stack([(subject.warp[axis] * np.sin(angle + subject.warp_phase[axis])).sum(-1) for axis in range(3)], -1)
    return scaled + CENTRE + shift


def _ellipsoid(place: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    """About the signed distance to an ellipsoid's surface, mm, negative inside."""
    radii = np.array(radii, dtype=float)
    return (np.sqrt((((place - centre) / radii) ** 2).sum(-1)) - 1) * radii.min()


def _inside(distance: np.ndarray, softness: float = 1.2) -> np.ndarray:
    """Distance in mm -> fraction inside, with a soft edge."""
    return 0.5 * (1 - np.tanh(distance / softness))


def _tissues(subject: Anatomy, place: np.ndarray, in_pattern: np.ndarray) -> dict[str, np.ndarray]:
    """Fractions of CSF, cortical grey, white and deep grey matter at points (..., 3) of the template."""
    x, y, z = np.abs(place[..., 0]), place[..., 1], place[..., 2]
    sides = np.stack([x, y, z], axis=-1)  # the hemispheres mirror each other up to the gyri
    cerebrum = _ellipsoid(place, (0, -18, 14), (66, 86, 60))
    temporal = _ellipsoid(sides, (44, -14, -18), (22, 44, 22))
    cerebellum = _ellipsoid(place, (0, -64, -34), (50, 34, 24))
    stem = _ellipsoid(place, (0, -28, -38), (12, 13, 34))
    surface = np.minimum(np.minimum(cerebrum, temporal), cerebellum)
    severity = GROUPS.index(subject.group)
    thickness = subject.thickness * (1 - 0.22 * severity * in_pattern)
    sulci = _folds(subject, place)  # 0 on a gyrus, 1 in a sulcus
    pial = surface + 0.55 * subject.gyri_depth * sulci
    white = surface + thickness + subject.gyri_depth * sulci
    callosum = 38 * np.exp(-(((y + 12) / 42) ** 4))  # the fissure between the hemispheres ends above it
    brain = _inside(np.minimum(pial, stem)) * (1 - _inside(x - 2.0) * _inside(callosum - z))
    white_matter = _inside(np.minimum(white, stem))
    ventricle = np.minimum.reduce([
        _ellipsoid(sides, (11, -8, 20), np.array((7, 33, 8)) * subject.ventricles),
        _ellipsoid(sides, (26, -48, 10), np.array((6, 18, 8)) * subject.ventricles),
        _ellipsoid(place, (0, -14, 2), np.array((4, 14, 10)) * subject.ventricles)])
    nuclei = np.minimum.reduce([_ellipsoid(sides, (12, -18, 7), (8, 13, 9)), _ellipsoid(sides, (27, 3, 2), (7, 16, 11)),
                                _ellipsoid(sides, (14, 14, 10), (6, 11, 9))])
    csf = np.maximum(_inside(surface - 2.0) * (1 - brain), _inside(ventricle))
    deep = _inside(nuclei) * (1 - csf)
    wm = white_matter * brain * (1 - csf) * (1 - deep)
    gm = brain * (1 - white_matter) * (1 - csf) * (1 - deep)
    return {"csf": csf, "gm": gm, "wm": wm, "deep": deep}


def _folds(subject: Anatomy, place: np.ndarray) -> np.ndarray:
    """Smooth pattern of gyri (0) and sulci (1), 26 to 42 mm apart; the phases are the subject's own."""
    directions = np.array([[1, 0.3, 0.2], [-0.4, 1, 0.3], [0.2, -0.3, 1], [0.7, 0.7, -0.2], [-0.6, 0.4, 0.8],
                           [0.3, -0.8, 0.6]])
    wavelengths = np.array([34.0, 30.0, 36.0, 42.0, 28.0, 26.0])
    angle = place @ (2 * np.pi * directions / wavelengths[:, None] / np.linalg.norm(directions, axis=1)[:, None]).T
    waves = np.sin(angle + np.arange(6) + subject.gyri_phase).sum(-1)
    return 1 / (1 + np.exp(-2.5 * (waves - 0.5)))


def scan(subject: Anatomy) -> dict[str, nib.Nifti1Image]:
    """Both scans of a subject as they are written: int16, MNI affine."""
    scans = {}
    for modality in GRIDS:
        voxels = np.rint(render(subject, modality) * FULL_SCALE).astype(np.int16)
        image = nib.Nifti1Image(voxels if voxels.shape[-1] > 1 else voxels[..., 0], affine_of(modality))
        for set_form in (image.set_sform, image.set_qform):
            set_form(affine_of(modality), code=4)  # 4: MNI 152 coordinates
        image.header.set_xyzt_units("mm", "sec")
        if voxels.shape[-1] > 1:
            image.header["pixdim"][4] = 2.0  # repetition time, s
        scans[modality] = image
    return scans


def write_demo(folder: Path, progress=lambda subjects: subjects) -> None:
    """Write the demo as a BIDS tree into `folder`, two subjects at a time; `progress` wraps the list of subjects."""
    subjects = anatomies()
    with ThreadPoolExecutor(2) as pool:
        for subject, scans in zip(progress(subjects), pool.map(scan, subjects)):
            for modality, image in scans.items():
                kind, name = NAMES[modality]
                save_image(folder / subject.name / kind / f"{subject.name}_{name}.nii.gz", image)
    write_text(folder / "participants.tsv", "participant_id\tgroup\n"
               + "".join(f"{subject.name}\t{subject.group}\n" for subject in subjects))
    description = {"Name": "PDS demo: analytic brains", "BIDSVersion": "1.9.0", "DatasetType": "derivative",
                   "GeneratedBy": [{"Name": "PDS", "Description": "data/phantom.py"}]}
    write_text(folder / COMPLETE, json.dumps(description, indent=2) + "\n")

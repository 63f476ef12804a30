"""The demo: analytic brains as a small paired data set, written as a BIDS tree of NIfTI files.

Each subject has its own anatomy; disease (NC, MCI, AD) thins the cortex inside the pattern networks and widens the
ventricles. The contrasts are BOLD-like (bright CSF, drop-out near the sinuses) and diffusion-like (bright white matter
with tracts). Coordinates are MNI-like, in mm; signals are in units of CSF's BOLD signal. The data set is frozen.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial import cKDTree
from tqdm import tqdm

from data.atlas import roi_centres
from data.volumes import save_image
from utils.files import write_text
from utils.stop import interruptible

DEMO_ROOT = "./data/demo"  # the default of opt.data_root
COMPLETE = "dataset_description.json"  # written last: its presence says that the data set is complete
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
FULL_SCALE = 1000.0  # signal 1 in the files
PATTERN_NETWORKS = ("cingulo-opercular", "default", "fronto-parietal")
PATTERN_REACH = 9.0  # mm: how far around the centre of an ROI the cortex thins


class Anatomy:
    """Subject number 0, 1, ..., SUBJECTS - 1, or another one like them: lengths in mm, phases in radians."""

    def __init__(self, number: int):
        random, severity = np.random.default_rng([SEED, number]), number % len(GROUPS)
        self.name, self.group, self.noise_seed = f"sub-{number + 1:02d}", GROUPS[severity], SEED + number
        self.axes = random.normal(1.0, 0.03, 3)  # scale of the head along x, y, z
        self.warp = random.normal(0.0, 1.6, (3, 4))  # amplitudes of the smooth displacement
        self.warp_phase = random.uniform(0, 2 * np.pi, (3, 4))
        self.gyri_phase = random.normal(0.0, 0.7, 6)
        self.gyri_depth = random.normal(12.0, 1.0)
        self.thickness = random.normal(4.2, 0.3)  # of the cortex
        self.ventricles = random.normal(1.0 + 0.16 * severity, 0.10)  # scale
        self.tracts = random.uniform(0.05, 0.15)  # contrast of the tracts in white matter
        self.drop_out = random.uniform(0.4, 0.9)  # fraction of signal lost at the centre of a drop-out


def affine_of(modality: str) -> np.ndarray:
    """Voxel -> mm (4, 4) of the grid of a modality, which is centred at CENTRE."""
    size, spacing = GRIDS[modality]
    return from_matvec(np.diag(spacing), CENTRE - (np.array(size) - 1) / 2 * spacing)


def render(subject: Anatomy, modality: str, noise: bool = True, affine: np.ndarray | None = None,
           size: tuple[int, int, int] | None = None) -> np.ndarray:
    """Signal of one scan, (X, Y, Z, time points), float64; each voxel is the mean of 2x2x2 points.

    affine, size: of another grid than the demo's.
    """
    affine = affine_of(modality) if affine is None else affine
    voxels = np.moveaxis(np.indices(size or GRIDS[modality][0], dtype=np.float64), 0, -1)  # (X, Y, Z, 3)
    distance, _ = cKDTree(roi_centres(PATTERN_NETWORKS)).query(_to_template(subject, apply_affine(affine, voxels)))
    in_pattern = np.exp(-(distance**2) / (2 * PATTERN_REACH**2))  # smooth: the centres of the voxels are enough
    signal = sum(_signal(subject, modality, apply_affine(affine, voxels + (np.array(corner) - 0.5) / 2), in_pattern) / 8
                 for corner in np.ndindex(2, 2, 2))
    series = np.repeat(signal[..., None], TIME_POINTS[modality], axis=-1)
    if noise:
        random = np.random.default_rng([subject.noise_seed, list(GRIDS).index(modality)])
        real, imaginary = (random.normal(0.0, NOISE[modality], series.shape) for _ in range(2))
        series = np.hypot(series + real, imaginary)  # magnitude images have Rician noise
    return series


def _to_template(subject: Anatomy, points: np.ndarray) -> np.ndarray:
    """mm of the subject -> mm of the template: scaled about CENTRE and warped, with wavelengths of 100 to 190 mm."""
    scaled = (points - CENTRE) / subject.axes
    directions = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    waves = 2 * np.pi / np.array([[190.0], [170.0], [150.0], [140.0]]) * directions
    angle = scaled @ waves.T  # (..., 4)
    shift = np.stack([(subject.warp[axis] * np.sin(angle + subject.warp_phase[axis])).sum(-1) for axis in range(3)], -1)
    return scaled + CENTRE + shift


def _signal(subject: Anatomy, modality: str, points: np.ndarray, in_pattern: np.ndarray) -> np.ndarray:
    """Noise-free signal at points (..., 3) of the subject."""
    points = _to_template(subject, points)
    intensity = SIGNAL[modality]
    x, y, z = np.moveaxis(points, -1, 0)
    if modality == "dmri":  # tracts: bright and dark bands along white matter, fixed in the template
        bands = np.sin(2 * np.pi * (np.abs(x) / 26 + y / 60)) * np.cos(2 * np.pi * z / 44)
        intensity = intensity | {"wm": intensity["wm"] * (1 + subject.tracts * bands)}
    fractions = _tissues(subject, points, in_pattern)
    signal = sum(fraction * intensity[tissue] for tissue, fraction in fractions.items())
    loss = subject.drop_out * (1.0 if modality == "fmri" else 0.4)  # the spin echo of diffusion imaging loses less
    for centre, reach in (((0, 38, -20), 17), ((48, -22, -26), 13), ((-48, -22, -26), 13)):
        signal = signal * (1 - loss * np.exp(-((points - centre) ** 2).sum(-1) / (2 * reach**2)))
    coil = 1.0 + 0.12 * ((y + 18) / 90) ** 2 - 0.08 * (z - 10) / 70  # receive field
    return signal * (coil if modality == "fmri" else 2.0 - coil)


def _tissues(subject: Anatomy, points: np.ndarray, in_pattern: np.ndarray) -> dict[str, np.ndarray]:
    """Fractions of CSF, cortical grey, white and deep grey matter at points (..., 3) of the template."""
    x, y, z = np.abs(points[..., 0]), points[..., 1], points[..., 2]  # the hemispheres differ by their gyri only
    mirrored = np.stack([x, y, z], axis=-1)

    def distance(*ellipsoids: tuple[tuple, tuple], scale: float = 1.0) -> np.ndarray:
        """Approximate signed distance to the surface of ellipsoids (centre, radii), mm, negative inside."""
        return np.minimum.reduce([(np.sqrt((((mirrored - centre) / (np.array(radii) * scale)) ** 2).sum(-1)) - 1)
                                  * (min(radii) * scale) for centre, radii in ellipsoids])

    def inside(distance: np.ndarray) -> np.ndarray:
        """Distance in mm -> fraction inside, with a soft edge."""
        return 0.5 * (1 - np.tanh(distance / 1.2))

    surface = distance(((0, -18, 14), (66, 86, 60)), ((44, -14, -18), (22, 44, 22)), ((0, -64, -34), (50, 34, 24)))
    stem = distance(((0, -28, -38), (12, 13, 34)))
    nuclei = distance(((12, -18, 7), (8, 13, 9)), ((27, 3, 2), (7, 16, 11)), ((14, 14, 10), (6, 11, 9)))
    ventricles = distance(((11, -8, 20), (7, 33, 8)), ((26, -48, 10), (6, 18, 8)), ((0, -14, 2), (4, 14, 10)),
                          scale=subject.ventricles)
    thickness = subject.thickness * (1 - 0.22 * GROUPS.index(subject.group) * in_pattern)
    directions = np.array([[1, 0.3, 0.2], [-0.4, 1, 0.3], [0.2, -0.3, 1],
                           [0.7, 0.7, -0.2], [-0.6, 0.4, 0.8], [0.3, -0.8, 0.6]])
    wavelengths = np.array([34.0, 30.0, 36.0, 42.0, 28.0, 26.0])  # mm
    angle = points @ (2 * np.pi * directions / wavelengths[:, None] / np.linalg.norm(directions, axis=1)[:, None]).T
    waves = np.sin(angle + np.arange(6) + subject.gyri_phase).sum(-1)
    sulci = 1 / (1 + np.exp(-2.5 * (waves - 0.5)))  # smooth: 0 on gyri, 1 in sulci
    pial = surface + 0.55 * subject.gyri_depth * sulci
    white = surface + thickness + subject.gyri_depth * sulci
    callosum = 38 * np.exp(-(((y + 12) / 42) ** 4))  # the fissure between the hemispheres ends above it
    brain = inside(np.minimum(pial, stem)) * (1 - inside(x - 2.0) * inside(callosum - z))
    white_matter = inside(np.minimum(white, stem))
    csf = np.maximum(inside(surface - 2.0) * (1 - brain), inside(ventricles))
    deep = inside(nuclei) * (1 - csf)
    return {"csf": csf, "gm": brain * (1 - white_matter) * (1 - csf) * (1 - deep),
            "wm": white_matter * brain * (1 - csf) * (1 - deep), "deep": deep}


def scan(subject: Anatomy) -> dict[str, nib.Nifti1Image]:
    """modality -> scan of a subject: int16, MNI affine."""
    scans = {}
    for modality in GRIDS:
        voxels, affine = np.rint(render(subject, modality) * FULL_SCALE).astype(np.int16), affine_of(modality)
        image = scans[modality] = nib.Nifti1Image(voxels.squeeze(), affine)
        image.set_sform(affine, code=4)  # 4: MNI 152 coordinates
        image.set_qform(affine, code=4)
        image.header.set_xyzt_units("mm", "sec")
        if image.ndim == 4:
            image.header["pixdim"][4] = 2.0  # repetition time, s
    return scans


def write_demo(folder: Path) -> None:
    """Write the demo as a BIDS tree into `folder`. Raises UserError, and Interrupted between two subjects."""
    subjects, pool = [Anatomy(number) for number in range(SUBJECTS)], ThreadPoolExecutor(2)
    scans = tqdm(pool.map(scan, subjects), total=SUBJECTS, unit="subject", disable=None)
    try:
        for subject, images in zip(subjects, interruptible(scans)):
            for modality, image in images.items():
                kind, name = NAMES[modality]
                save_image(folder / subject.name / kind / f"{subject.name}_{name}.nii.gz", image)
    finally:
        pool.shutdown(cancel_futures=True)
    write_text(folder / "participants.tsv", "participant_id\tgroup\n"
               + "".join(f"{subject.name}\t{subject.group}\n" for subject in subjects))
    description = {"Name": "PDS demo: analytic brains", "BIDSVersion": "1.9.0", "DatasetType": "derivative",
                   "GeneratedBy": [{"Name": "PDS", "Description": "data/demo.py"}]}
    write_text(folder / COMPLETE, json.dumps(description, indent=2) + "\n")

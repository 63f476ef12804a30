"""A tiny study and the program as a child process, for all tests."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data.cache import Reading, cached_volume, load_volume

ROOT = Path(__file__).resolve().parent.parent
CHILD = {**os.environ, "OMP_NUM_THREADS": "2"}
SIZES = {"fmri": (12, 13, 11), "dmri": (16, 17, 14)}
SPACING = {"fmri": 14.0, "dmri": 11.0}
TINY = ["--image_size", "fmri=12x13x11", "dmri=16x17x14", "--base_channels", "8", "--unet_depth", "2", "--epochs", "3",
        "--refine_epochs", "3", "--batch_size", "2", "--sampling_steps", "3", "--warmup_steps", "2",
        "--coarse_samples", "1", "--num_samples", "1", "--validate_every", "1", "--folds", "3", "--precision", "fp32",
        "--device", "cpu", "--no-tensorboard"]


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """As in the children: the last bits of a sum depend on how many threads it is divided among."""
    torch.set_num_threads(2)


# Ahead of the program: after the n-th call of module.name, or before it, a signal
SIGNAL = """
import importlib, os, signal, sys, time
module, name, count, number = importlib.import_module({module!r}), {name!r}, {count}, {number}
whole, calls = getattr(module, name), []
def asked(*arguments, **named):
    calls.append(1)
    if {after}:
        result = whole(*arguments, **named)
    if len(calls) == count:
        print("signal at", time.time(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), number)
    return result if {after} else whole(*arguments, **named)
setattr(module, name, asked)
import {program}
sys.exit({program}.main(sys.argv[1:]))
"""


def signalled(module: str, name: str, count: int, number: int, after: bool = False, program: str = "main") -> str:
    """A program that is `main.py` (or another), but sends itself a signal at the count-th call of a function."""
    return SIGNAL.format(module=module, name=name, count=count, number=int(number), after=after, program=program)


def run_code(code: str, *words: str) -> subprocess.CompletedProcess:
    """`python -c code` with these words in a child process."""
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=CHILD)


def brain(size: tuple[int, int, int], radius: float, contrast: float, seed: int) -> np.ndarray:
    """A noisy ball with a core, which stands for a brain; (X, Y, Z) float32."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"))
    distance = np.sqrt((grid**2).sum(0))
    noise = np.random.default_rng(seed).normal(0, 0.02, size)
    return ((distance < radius) * 0.5 + (distance < radius / 2) * contrast + noise).astype(np.float32) * 900


def turned(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same image stored in another orientation."""
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine),
                                                               nib.orientations.axcodes2ornt(codes)))


def write_pairs(folder: Path, subjects: int = 6, name: str = "{}_space-MNI_{}.nii.gz", codes: str = "RAS") -> Path:
    """Write a CSV study of tiny pairs, stored in the orientation `codes`; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(1, subjects + 1):
        row = {"subject": f"sub-{number:02d}"}
        for modality, size in SIZES.items():
            radius = 0.6 + 0.03 * number
            volume = brain(size, radius, 0.4 if modality == "fmri" else -0.3, 100 * number + len(size))
            affine = np.diag([SPACING[modality]] * 3 + [1.0])
            affine[:3, 3] = -np.array(size) / 2 * SPACING[modality]
            image = turned(nib.Nifti1Image(volume, affine), codes)
            row[modality] = name.format(row["subject"], modality)
            nib.save(image, folder / row[modality])
        rows.append(row)
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["subject", *SIZES])
        table.writeheader()
        table.writerows(rows)
    return folder / "pairs.csv"


@pytest.fixture(scope="session")
def study_csv(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("study"))


def arguments(csv_file: Path, folder: Path, *more: str) -> list[str]:
    """Command-line words of a tiny run that writes below `folder`."""
    return [*TINY, "--data_root", str(csv_file), "--checkpoint_dir", str(folder / "checkpoints"), "--result_dir",
            str(folder / "results"), "--cache_dir", str(folder / "cache"), *more]


def run_program(*words: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """`python main.py` with these words in a child process."""
    return subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env=CHILD)


def decoded(path: Path, reading: Reading, cache_dir: Path) -> tuple[np.ndarray, dict]:
    """A file as it is trained on, and what is known of it."""
    file, facts = cached_volume(path, reading, cache_dir)
    return load_volume(file), facts


def refine_arguments(csv_file: Path, folder: Path, *more: str) -> list[str]:
    """Words of a tiny stage 2 on the backbone in the same folder."""
    return arguments(csv_file, folder, "--refine", "--resume_path", str(folder / "checkpoints/best_model.pth"), *more)


@pytest.fixture(scope="session")
def trained(study_csv, tmp_path_factory) -> Path:
    """A folder with a finished stage 1 and stage 2."""
    folder = tmp_path_factory.mktemp("trained")
    for number, words in enumerate((arguments(study_csv, folder), refine_arguments(study_csv, folder)), start=1):
        done = run_program(*words)
        assert done.returncode == 0, done.stderr
        (folder / f"stage{number}.txt").write_text(done.stdout)
    return folder


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)


BOTH = ("fmri", "dmri")
AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 4.0, -30], [0, 0, 0, 1]])
LGG = ROOT.parent / "shared/data/lgg/pairs.csv"
TRACTOR = ROOT.parent / "shared/data/tractor"
needs_shared = pytest.mark.skipif(not (LGG.exists() and TRACTOR.exists()), reason="the shared volumes are not here")


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI file; returns its path."""
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def ball(*size: int, seed: int = 0) -> np.ndarray:
    """Noise around 10, float32."""
    return np.random.default_rng(seed).normal(10, 2, size).astype(np.float32)

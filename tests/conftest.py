"""Tiny studies, and the program in this process or in a child, for all tests."""

import csv
import itertools
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torchvision.models import vgg16

from data.cache import Reading, cached_volume, load_volume
from models.losses import VGG16_LAYERS
from utils.files import write_table

ROOT = Path(__file__).resolve().parent.parent
CHILD = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZES = {"fmri": (12, 13, 11), "dmri": (16, 17, 14)}
SPACING = {"fmri": 14.0, "dmri": 11.0}
TINY = ["--image_size", "fmri=12x13x11", "dmri=16x17x14", "--base_channels", "8", "--unet_depth", "2", "--epochs", "3",
        "--refine_epochs", "3", "--batch_size", "2", "--sampling_steps", "3", "--warmup_steps", "2",
        "--num_samples", "1", "--validate_every", "1", "--folds", "3", "--precision", "fp32",
        "--device", "cpu", "--no-tensorboard", "--max_overhead", "1"]
BOTH = ("fmri", "dmri")
AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 4.0, -30], [0, 0, 0, 1]])
LGG = ROOT.parent / "shared/data/lgg/pairs.csv"
TRACTOR = ROOT.parent / "shared/data/tractor"
needs_shared = pytest.mark.skipif(not (LGG.exists() and TRACTOR.exists()), reason="the shared volumes are not here")


torch.set_num_threads(1)  # networks this small gain nothing from more, and the last bits of a sum depend on the number

# ---- The program


def arguments(csv_file: Path, folder: Path, *more: str) -> list[str]:
    """Command-line arguments of a tiny run that writes below `folder`."""
    return [*TINY, "--data_root", str(csv_file), "--checkpoint_dir", str(folder / "checkpoints"), "--result_dir",
            str(folder / "results"), "--cache_dir", str(folder / "cache"), *more]


def refine_arguments(csv_file: Path, folder: Path, *more: str) -> list[str]:
    """Arguments of a tiny stage 2 on the backbone in the same folder."""
    return arguments(csv_file, folder, "--refine", "--resume_path", str(folder / "checkpoints/best_model.pth"), *more)


FORK_SERVER = multiprocessing.get_context("forkserver")  # has imported PyTorch, which takes 3 seconds, and run nothing
FORK_SERVER.set_forkserver_preload(["main", "sample", "tests.conftest"])
PROGRAM = "import runpy; runpy.run_path('main.py', run_name='__main__')"


class Child:
    """`python main.py` with these arguments in a child process, or `python -c code`."""

    def __init__(self, words: list[str], code: str = PROGRAM, **environment: str):
        self._output = tempfile.TemporaryDirectory()
        self.process = FORK_SERVER.Process(target=_run_child, daemon=True,
                                           args=(words, code, Path(self._output.name), environment))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Kill the process after `timeout` seconds; returns its status (-9: killed) and output."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        files = {path.name: path.read_text() for path in Path(self._output.name).iterdir()}
        return subprocess.CompletedProcess((), self.process.exitcode, files.get("1", ""), files.get("2", ""))


def _run_child(words: list[str], code: str, output: Path, environment: dict[str, str]) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(output / str(descriptor), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = ["main.py", *words]
    exec(code, {"__name__": "__main__"})


def run_code(code: str, *words: str) -> subprocess.CompletedProcess:
    """`python -c code` with these arguments in a child process."""
    return Child(list(words), code).wait(240)


def run_program(*words: str) -> subprocess.CompletedProcess:
    return run_code(PROGRAM, *words)


def signal_at(patch: pytest.MonkeyPatch, target: str, count: int, number: int, only: str = "") -> None:
    """Send this process a signal before the count-th call of a function whose arguments mention `only`."""
    function, calls = pkgutil.resolve_name(target), itertools.count(1)

    def call(*arguments, **named):
        if only in repr(arguments) and next(calls) == count:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    patch.setattr(target, call)


def signalled(module: str, name: str, count: int, number: int, program: str = "main", only: str = "") -> str:
    """Code of a program that is `main.py` (or another), but sends itself a signal; see `signal_at`."""
    return (f"import sys, pytest, {program}\nfrom tests.conftest import signal_at\n"
            f"signal_at(pytest.MonkeyPatch(), '{module}.{name}', {count}, {int(number)}, '{only}')\n"
            f"sys.exit({program}.main(sys.argv[1:]))")


# ---- Studies


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


def write_pairs(folder: Path, subjects: int = 6, name: str = "{}_space-MNI_{}.nii.gz", codes: str = "RAS",
                incomplete: int = 0) -> Path:
    """Write a CSV study of tiny pairs, stored in the orientation `codes`, and as many visits more that lack a modality,
    in turn; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"subject": f"sub-{number:02d}"} for number in range(1, subjects + incomplete + 1)]
    for number, row in enumerate(rows, start=1):
        for modality, size in [*SIZES.items()] if number <= subjects else [[*SIZES.items()][number % 2]]:
            radius, contrast = 0.6 + 0.03 * min(number, 12), 0.4 if modality == "fmri" else -0.3
            volume = brain(size, radius, contrast, 100 * number + len(size))
            affine = np.diag([SPACING[modality]] * 3 + [1.0])
            affine[:3, 3] = -np.array(size) / 2 * SPACING[modality]
            row[modality] = name.format(row["subject"], modality)
            nib.save(turned(nib.Nifti1Image(volume, affine), codes), folder / row[modality])
    write_table(folder / "pairs.csv", ("subject", *SIZES), rows)
    return folder / "pairs.csv"


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI file; returns its path."""
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def ball(*size: int, seed: int = 0) -> np.ndarray:
    """Noise around 10, float32."""
    return np.random.default_rng(seed).normal(10, 2, size).astype(np.float32)


@pytest.fixture(scope="session")
def study_csv(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def incomplete_csv(tmp_path_factory) -> Path:
    """sub-07 and sub-09 have a dmri only, sub-08 an fmri."""
    return write_pairs(tmp_path_factory.mktemp("incomplete"), incomplete=3)


@pytest.fixture(scope="session")
def trained(study_csv, tmp_path_factory) -> Path:
    """A folder with a finished stage 1 and stage 2, and what they printed. Tests do not write there, caches apart."""
    folder = tmp_path_factory.mktemp("trained")
    for number, words in enumerate((arguments(study_csv, folder), refine_arguments(study_csv, folder)), start=1):
        done = run_program(*words)
        assert done.returncode == 0, done.stderr
        (folder / f"stage{number}.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def vgg_weights() -> dict[str, torch.Tensor]:
    """Random weights of VGG16's features; the classifier's 120 million are not needed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16(weights=None).features[:VGG16_LAYERS[-1] + 1].state_dict()
    return {f"features.{name}": torch.randn(each.shape) * 0.05 for name, each in shapes.items()}


def decoded(path: Path, reading: Reading, cache_dir: Path) -> tuple[np.ndarray, dict]:
    """A file as it is trained on, and its metadata."""
    file, metadata = cached_volume(path, reading, cache_dir)
    return load_volume(file), metadata


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict:
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)

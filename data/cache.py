"""Cache of decoded volumes: each file is read, resized and normalised once, so that an epoch decodes nothing.

The folder can be deleted between two runs.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.grids import RESIZE, onto_grid
from data.intensity import normalise
from data.problems import Problem, VolumeError
from data.volumes import Scan, b_values_file, read_volume
from utils.files import replace_file, write_text

CACHE_FORMAT = 3  # raise it whenever the same file and settings give another volume


@dataclass(frozen=True)
class Reading:
    """How the files of one modality become volumes: the settings of opt.py for this modality."""

    modality: str
    size: tuple[int, int, int] | None  # None: as in the file, to check a study
    reduce: str = "mean"
    resize: str = "none"
    intensity: str = "percentile"
    affine: tuple | None = None  # of the grid in world space (data/alignment.py); None: edge to edge, as resize says


def cached_volume(path: Path, reading: Reading, cache_dir: Path) -> tuple[Path, dict]:
    """Return the cache file of a volume, for `load_volume`, and its metadata; decode the volume if it is not cached.

    metadata: low, high (intensities in file units that became -1 and 1), affine, repaired (number of voxels), content,
    scan (content before resampling).
    The key holds all settings, and path, size and times of the file (and its .bval). Raises VolumeError, UserError.
    """
    b_values = _file_state(b_values_file(path)) if reading.reduce in ("b0", "shell") else ()
    key = hashlib.sha256(repr((CACHE_FORMAT, _file_state(path), reading, b_values)).encode())
    voxels_file, metadata_file = (cache_dir / f"{key.hexdigest()[:32]}.{ending}" for ending in ("npy", "json"))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: decode the volume again
        metadata = json.loads(metadata_file.read_text())
        if content(load_volume(voxels_file)) == metadata["content"]:
            return voxels_file, metadata
    scan = read_volume(path, reading.reduce)
    volume, low, high, affine = to_grid(scan, path, reading)
    metadata = {"low": low, "high": high, "affine": affine.tolist(), "repaired": scan.repaired,
                "content": content(volume), "scan": content(scan.voxels)}
    save_volume(voxels_file, volume)
    write_text(metadata_file, json.dumps(metadata))
    return voxels_file, metadata


def _file_state(path: Path) -> tuple:
    """What changes whenever a file is replaced; () if it cannot be accessed."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ()


def save_volume(path: Path, volume: np.ndarray) -> None:
    """Write a volume for `load_volume`. Raises UserError."""
    replace_file(path, lambda file: np.save(file, volume))


def load_volume(path: Path) -> np.ndarray:
    """Read a volume (X, Y, Z) of the cache. Raises VolumeError, and removes the file, if it cannot be read."""
    try:
        with open(path, "rb") as file:  # not memory-mapped: a disk error would kill the process (SIGBUS)
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise VolumeError(path, f"has become unreadable ({error})", "run the same command to make it again and resume "
                          "from the last checkpoint") from error


def to_grid(scan: Scan, path: Path, reading: Reading) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Resample and normalise; returns the volume, the intensities that became -1 and 1, and the affine.

    A voxel of a grid in world space that the scan does not see is NaN.
    """
    volume, affine = scan.voxels, scan.affine
    if reading.affine:
        affine = np.array(reading.affine)
        volume = onto_grid(volume, scan.affine, reading.size, affine, np.nan)
    elif reading.size and volume.shape != tuple(reading.size):
        if reading.resize == "none":
            found, wanted = ("x".join(map(str, size)) for size in (volume.shape, reading.size))
            raise VolumeError(path, f"has size {found}, but opt.image_size is {wanted} for {reading.modality}",
                              f'set --image_size {reading.modality}={found}, or opt.resize = "resample" or "pad_crop"')
        volume, affine = RESIZE[reading.resize](volume, affine, reading.size)
    return *normalise(volume, path, reading.intensity), affine


def content(volume: np.ndarray) -> str:
    """Hash of a volume's voxels: equal for two copies of one scan."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()


def identical_scans(scans: Iterable[tuple[str, Path, str, str]]) -> list[Problem]:
    """A problem for each scan that is a copy of an earlier one, in its file or as read: (pair name, file, contents)."""
    earlier, problems = {}, []
    for name, path, *contents in scans:
        others = [earlier.setdefault(hashed, (name, path)) for hashed in contents]
        if other := next((other for other in others if other[1] != path), None):
            owner, first = other
            problems.append(Problem(str(path), f"holds the same scan as {first} of {owner}",
                                    "keep only one: no subject may be in both the training and the test set", name))
    return problems

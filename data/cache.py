"""Cache of decoded volumes: each file is read, resized and normalised once, so that an epoch decodes nothing.

The folder can be deleted between two runs.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.grids import RESIZE, onto_grid
from data.intensity import normalise
from data.pairs import Pair
from data.problems import Problem, VolumeError
from data.volumes import Scan, b_values_file, read_volume
from utils.files import open_regular, read_json, replace_file, write_text

HEADER = re.compile(rb"\x93NUMPY\x01\x00v\x00\{'descr': '<f4', 'fortran_order': False, "
                    rb"'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n")  # of np.save
AGAIN = "run the same command to make it again and resume from the last checkpoint"
CACHE_FORMAT = 4  # raise it whenever the same file and settings give another volume


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

    metadata: low, high (intensities in file units that became -1 and 1), affine, doubts (of Scan), content, scan
    (content before resampling).
    The key holds all settings, and path, size and times of the file (and its .bval). Raises VolumeError, UserError.
    """
    b_values = _file_state(b_values_file(path)) if reading.reduce in ("b0", "shell") else ()
    key = hashlib.sha256(repr((CACHE_FORMAT, _file_state(path), reading, b_values)).encode())
    voxels_file, metadata_file = (cache_dir / f"{key.hexdigest()[:32]}.{ending}" for ending in ("npy", "json"))
    try:
        metadata, checksum = read_json(metadata_file)
        if checksum == _checksum(metadata) and content(_load(voxels_file)) == metadata["content"]:
            return voxels_file, metadata
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or damaged: it is decoded again
        pass
    except OSError as error:
        raise _cannot_read(metadata_file, error) from error
    scan = read_volume(path, reading.reduce)
    volume, low, high, affine = to_grid(scan, path, reading)
    metadata = {"low": low, "high": high, "affine": affine.tolist(), "doubts": scan.doubts,
                "content": content(volume), "scan": content(scan.voxels)}
    save_volume(voxels_file, volume)
    write_text(metadata_file, json.dumps([metadata, _checksum(metadata)]))
    return voxels_file, metadata


def _checksum(metadata: dict) -> str:
    return hashlib.sha256(json.dumps(metadata).encode()).hexdigest()


def _file_state(path: Path) -> tuple:
    """What changes whenever a file is replaced; () if it cannot be accessed."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ()


def save_volume(path: Path, volume: np.ndarray) -> None:
    """Write a volume for `load_volume`. Raises UserError."""
    replace_file(path, lambda file: np.save(file, np.ascontiguousarray(volume, "<f4")))


def load_volume(path: Path) -> np.ndarray:
    """Read a volume (X, Y, Z) of the cache. Raises VolumeError where it cannot be read; a damaged file is removed."""
    try:
        return _load(path)
    except OSError as error:
        raise _cannot_read(path, error) from error
    except ValueError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise VolumeError(path, f"has become unreadable ({error})", AGAIN) from error


def _load(path: Path) -> np.ndarray:
    with open_regular(path) as file:  # not memory-mapped: a disk error would kill the process (SIGBUS)
        if not (header := HEADER.fullmatch(file.read(128))):  # numpy evaluates it, and fails in many ways
            raise ValueError("its header is not that of a volume")
        return np.fromfile(file, "<f4").reshape(tuple(map(int, header.groups())))  # as much as there is


def _cannot_read(path: Path, error: OSError) -> VolumeError:
    """For an error that may pass: the content stays."""
    return VolumeError(path, f"cannot be read right now ({error.strerror or error})", "fix the cause, or delete the "
                       f"file; then {AGAIN}")


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
                              f'set opt.resize = "resample" or "pad_crop", exclude the subject (opt.exclude), or, if '
                              f"all have this size, set --image_size {reading.modality}={found}")
        volume, affine = RESIZE[reading.resize](volume, affine, reading.size)
    return *normalise(volume, path, reading.intensity), affine


def content(volume: np.ndarray) -> str:
    """Hash of a volume's voxels: equal for two copies of one scan."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()


def identical_scans(scans: Iterable[tuple[Pair, str, str, str]]) -> list[Problem]:
    """A problem for each scan that another person, or the other modality, has, too, in its file or as read.

    scans: pair, modality, contents. The sessions of one person may share a scan.
    """
    earlier, problems = {}, []
    for pair, modality, *contents in scans:
        owner = pair.person, modality
        file = pair.paths[modality]
        others = [earlier.setdefault(hashed, (*owner, pair.name, file)) for hashed in contents]
        if other := next((other for other in others if other[:2] != owner), None):
            *_, name, its_file = other
            problems.append(Problem(file, f"holds the same scan as {its_file} of {name}, but is the "
                                    f"{modality} of {pair.name}", "keep only one: no subject may be in both the "
                                    "training and the test set", pair.name))
    return problems


def doubts(pair: Pair, modality: str, found: Iterable[tuple[str, str]]) -> list[Problem]:
    """Warnings for the doubts of a Scan."""
    return [Problem(pair.paths[modality], what, remedy, pair.name, fatal=False) for what, remedy in found]

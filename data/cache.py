"""Decoded volumes on disk: every file is read, put on its grid and normalised once.

An epoch afterwards decodes nothing and needs no worker processes. The cache can be deleted between two runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.grids import RESIZE
from data.intensity import normalise
from data.problems import Problem, VolumeError
from data.volumes import Scan, b_values_file, read_volume
from utils.files import replace_file, write_text

FACTS = {"low", "high", "affine", "repaired", "content"}
CACHE_FORMAT = 2  # raise it whenever the way from file to volume changes


@dataclass(frozen=True)
class Reading:
    """How the files of one modality become volumes: the settings of opt.py, for this modality."""

    modality: str
    size: tuple[int, int, int] | None  # None only while a study is checked whose image_size is yet to be chosen
    reduce: str = "mean"
    resize: str = "none"
    intensity: str = "percentile"


def cached_volume(path: Path, reading: Reading, cache_dir: Path) -> tuple[Path, dict]:
    """One file as it is trained on: (what `load_volume` reads it from, facts: low, high, affine, ...).

    Keyed by path, size and times of the file and by all settings, so that what is found is never stale. Files appear
    whole, so several processes may fill the same folder. Raises VolumeError, FileError.
    """
    key = hashlib.sha256(repr((CACHE_FORMAT, _state(path), reading, _b_values_state(path, reading))).encode())
    voxels_file, facts_file = (cache_dir / f"{key.hexdigest()[:32]}.{ending}" for ending in ("npy", "json"))
    with contextlib.suppress(OSError, ValueError, AttributeError, VolumeError):  # not there, or damaged: made again
        facts = json.loads(facts_file.read_text())
        if facts.keys() >= FACTS and content(load_volume(voxels_file)) == facts["content"]:
            return voxels_file, facts
    scan = read_volume(path, reading.reduce)
    volume, low, high, affine = to_grid(scan, path, reading)
    facts = {"low": low, "high": high, "affine": affine.tolist(), "repaired": scan.repaired,
             "content": content(volume)}
    save_volume(voxels_file, volume)
    write_text(facts_file, json.dumps(facts))
    return voxels_file, facts


def save_volume(path: Path, volume: np.ndarray) -> None:
    """Write what `load_volume` reads. Raises FileError."""
    replace_file(path, lambda file: np.save(file, volume), volume.nbytes)


def load_volume(path: Path) -> np.ndarray:
    """A volume (X, Y, Z) of the cache. Raises VolumeError where it has become unreadable.

    It is read, not mapped into memory: where a map's file shrinks or its disk fails, the process just dies.
    """
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise VolumeError(path, f"has become unreadable ({error})", "the same command makes it again, and continues "
                          "from the last checkpoint; opt.cache_dir names the folder") from error


def _state(path: Path) -> tuple:
    """What changes whenever a file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()  # reading will say what is wrong with it
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _b_values_state(path: Path, reading: Reading) -> tuple:
    return _state(b_values_file(path)) if reading.reduce in ("b0", "shell") else ()


def to_grid(scan: Scan, path: Path, reading: Reading) -> tuple[np.ndarray, float, float, np.ndarray]:
    """(volume of reading.size in [-1, 1], the intensities that became -1 and 1, affine). Raises VolumeError."""
    volume, affine = scan.voxels, scan.affine
    if volume.shape != tuple(reading.size):
        if reading.resize == "none":
            raise wrong_size(path, volume.shape, reading)
        volume, affine = RESIZE[reading.resize](volume, affine, reading.size)
    return *normalise(volume, path, reading.intensity), affine


def wrong_size(path: Path, found: tuple[int, int, int], reading: Reading) -> VolumeError:
    """The refusal of a volume of another size."""
    found, wanted = ("x".join(map(str, shape)) for shape in (found, reading.size))
    return VolumeError(path, f"has size {found}, but opt.image_size asks {wanted} of {reading.modality}",
                       f"set opt.image_size (on the command line --image_size {reading.modality}={found}, and the "
                       'other modality likewise) or opt.resize = "resample" or "pad_crop"')


def content(volume: np.ndarray) -> str:
    """Hash of a volume's voxels: the same for two copies of one scan, whatever their files are called."""
    return hashlib.sha256(np.ascontiguousarray(volume).tobytes()).hexdigest()


def identical_scans(scans: Iterable[tuple[str, Path, str]]) -> list[Problem]:
    """A problem for every scan that is a copy of an earlier one; scans: (name of the pair, file, content)."""
    seen, problems = {}, []
    for name, path, hashed in scans:
        owner, first = seen.setdefault(hashed, (name, path))
        if path != first:
            problems.append(Problem(str(path), f"holds the same scan as {first} of {owner}",
                                    "keep one of the two: a subject must not be trained and tested on", name))
    return problems

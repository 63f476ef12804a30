"""A study ready for training: every pair decoded once, normalised to [-1, 1], memory-mapped, and split by subject."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from data.atlas import pattern_mask, roi_centres
from data.files import replace_file
from data.pairs import Pair, in_mni_space
from data.volumes import VolumeError, b_values_file, normalise, read_volume, resample

CACHE_FORMAT = 1  # raise it whenever the way from file to volume changes


class Study:
    """The pairs of two modalities. Volumes and masks come as {modality: tensor (B, 1, X, Y, Z)}.

    sizes: modality -> (X, Y, Z); roles: {"train", "validation", "test"} -> positions in pairs;
    ranges[modality]: (N, 2) intensities, in file units, that became -1 and 1; affines[modality]: N of (4, 4).
    """

    def __init__(self, pairs: list[Pair], roles: dict[str, list[int]], sizes: dict[str, tuple[int, int, int]],
                 reduce: dict[str, str], resize: str, cache_dir: Path, progress=iter):
        self.pairs, self.roles, self.sizes = pairs, roles, sizes
        self.modalities = tuple(sizes)
        self._volumes = {name: [] for name in sizes}
        self.ranges = {name: [] for name in sizes}
        self.affines = {name: [] for name in sizes}
        self._masks: dict[tuple, torch.Tensor] = {}
        self.pattern_centres, self.pattern_radius, self.in_mni = None, 0.0, [False] * len(pairs)
        content = hashlib.sha256()
        for pair in progress(pairs):
            for name in sizes:
                volume, facts = cached_volume(pair.files[name], name, reduce[name], sizes[name], resize, cache_dir)
                self._volumes[name].append(volume)
                self.ranges[name].append((facts["low"], facts["high"]))
                self.affines[name].append(np.array(facts["affine"]))
                content.update(f"{pair.name} {name} {facts['crc']}".encode())
        self.fingerprint = content.hexdigest()
        self.split_fingerprint = hashlib.sha256(json.dumps(
            {role: [pairs[i].name for i in members] for role, members in roles.items()}).encode()).hexdigest()

    def set_pattern(self, networks: tuple[str, ...], radius: float, space: str) -> int:
        """Choose the brain networks of the pattern mask; returns how many pairs are in MNI space and thus have one."""
        self.pattern_centres, self.pattern_radius = roi_centres(networks), radius
        self.in_mni = [space == "mni" or (space == "auto" and in_mni_space(pair)) for pair in self.pairs]
        return sum(self.in_mni)

    def apart(self) -> list[str]:
        """Names of the pairs whose two fields of view differ by more than one (larger) voxel at some corner, in mm."""
        names, corners = [], np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
        for i, pair in enumerate(self.pairs):
            ends, voxel = [], 0.0
            for name, size in self.sizes.items():
                affine = self.affines[name][i]
                ends.append((corners * size - 0.5) @ affine[:3, :3].T + affine[:3, 3])
                voxel = max(voxel, np.linalg.norm(affine[:3, :3], axis=0).max())
            if np.linalg.norm(ends[0] - ends[1], axis=1).max() > voxel:
                names.append(pair.name)
        return names

    def volumes(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} float32 in [-1, 1], copied out of the memory map."""
        return {name: torch.from_numpy(np.stack([self._volumes[name][i] for i in positions])[:, None])
                for name in self.modalities}

    def masks(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} pattern masks, 0 or 1; all 0 for a pair that is not in MNI space."""
        return {name: torch.stack([self._mask(name, i) for i in positions]) for name in self.modalities}

    def _mask(self, name: str, position: int) -> torch.Tensor:
        affine = self.affines[name][position]
        key = (name, affine.round(4).tobytes() if self.in_mni[position] else b"")
        if key not in self._masks:
            mask = np.zeros(self.sizes[name], dtype=bool)
            if self.in_mni[position] and len(self.pattern_centres):
                mask = pattern_mask(self.sizes[name], affine, self.pattern_centres, self.pattern_radius)
            self._masks[key] = torch.from_numpy(mask.astype(np.float32))[None]
        return self._masks[key]

    def mean_volumes(self) -> dict[str, torch.Tensor]:
        """{modality: (1, 1, X, Y, Z)} mean of the training volumes: the simplest synthesis there is."""
        train = self.roles["train"]
        return {name: torch.from_numpy(sum(self._volumes[name][i].astype(np.float64) for i in train) / len(train))
                .float()[None, None] for name in self.modalities}

    def train_range(self, name: str) -> tuple[float, float]:
        """Medians over the training volumes of the intensities that became -1 and 1: the units of what is made."""
        low, high = np.median([self.ranges[name][i] for i in self.roles["train"]], axis=0)
        return float(low), float(high)


def epoch_batches(positions: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All positions once, shuffled by (seed, epoch) alone, so that a continued run sees the same order.

    The last batch may be smaller.
    """
    order = np.random.default_rng([seed, epoch]).permutation(positions).tolist()
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def cached_volume(path: Path, modality: str, reduce: str, size: tuple[int, int, int], resize: str,
                  cache_dir: Path) -> tuple[np.ndarray, dict]:
    """One file as it is trained on: (memory-mapped volume (X, Y, Z) in [-1, 1], facts: low, high, affine, crc).

    Decoded once: the cache is keyed by path, size and time of the file and by all settings. Raises VolumeError.
    """
    try:
        state = path.stat()
    except OSError:
        raise VolumeError(f"{path}: there is no such file; correct the path in the manifest") from None
    beside = b_values_file(path)
    b_values = beside.read_bytes() if reduce in ("b0", "shell") and beside.exists() else b""
    key = hashlib.sha256(repr((CACHE_FORMAT, str(path.resolve()), state.st_size, state.st_mtime_ns, reduce, size,
                               resize, b_values)).encode()).hexdigest()[:32]
    voxels_file, facts_file = cache_dir / f"{key}.npy", cache_dir / f"{key}.json"
    if not (facts_file.exists() and voxels_file.exists()):
        volume, affine = read_volume(path, reduce)
        if volume.shape != tuple(size):
            volume, affine = _resized(volume, affine, path, modality, size, resize)
        volume, low, high = normalise(volume, path)
        facts = {"low": low, "high": high, "affine": affine.tolist(), "crc": zlib.crc32(volume.tobytes())}
        replace_file(voxels_file, lambda file: np.save(file, volume))
        # last: that the facts are there says that the voxels are
        replace_file(facts_file, lambda file: file.write(json.dumps(facts).encode()))
    return np.load(voxels_file, mmap_mode="r"), json.loads(facts_file.read_text())


def _resized(volume: np.ndarray, affine: np.ndarray, path: Path, modality: str, size: tuple[int, int, int],
             resize: str) -> tuple[np.ndarray, np.ndarray]:
    if resize == "resample":
        return resample(volume, affine, size)
    found, wanted = ("x".join(map(str, shape)) for shape in (volume.shape, size))
    raise VolumeError(f"{path}: has size {found}, but opt.image_size asks {wanted} of {modality}; set opt.image_size "
                      f'(on the command line --image_size {modality}={found}, and the other modality likewise) '
                      f'or opt.resize = "resample"')

"""A study ready for training: every pair decoded once, normalised to [-1, 1], and split by subject."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.atlas import AtlasError, LabelImage, pattern_mask, roi_centres
from data.cache import Reading, cached_volume, identical_scans, load_volume
from data.grids import compare_fields, spacing_of
from data.pairs import Pair, in_mni_space
from data.problems import Problem, refuse


class Study:
    """The pairs of two modalities. Volumes and masks come as {modality: tensor (B, 1, X, Y, Z)}.

    readings: modality -> how its files are read; roles: {"train", "validation", "test"} -> positions in pairs;
    ranges[modality]: (N, 2) intensities, in file units, that became -1 and 1; affines[modality]: N of (4, 4);
    problems: what was found and is only to be told. Raises VolumeError, and PairError for scans that are there twice.
    """

    def __init__(self, pairs: list[Pair], roles: dict[str, list[int]], readings: dict[str, Reading], cache_dir: Path,
                 progress=iter):
        self.pairs, self.roles = pairs, roles
        self.sizes = {name: tuple(reading.size) for name, reading in readings.items()}
        self.modalities = tuple(readings)
        self._files = {name: [] for name in readings}
        self.ranges = {name: [] for name in readings}
        self.affines = {name: [] for name in readings}
        self._masks: dict[tuple, torch.Tensor] = {}  # pairs on the same grid share theirs
        self._mask_of = {name: [None] * len(pairs) for name in readings}
        self.has_pattern = [False] * len(pairs)
        content, scans, self.problems = hashlib.sha256(), [], []
        for pair in progress(pairs):
            for name, reading in readings.items():
                file, facts = cached_volume(pair.files[name], reading, cache_dir)
                self._files[name].append(file)
                self.ranges[name].append((facts["low"], facts["high"]))
                self.affines[name].append(np.array(facts["affine"]))
                scans.append((pair.name, pair.files[name], facts["content"]))
                place = np.round(facts["affine"], 3) + 0.0  # no negative zeros: they would hash differently
                content.update(f"{pair.name} {name} {facts['content']} {place.tolist()}".encode())
                if facts["repaired"]:
                    self.problems.append(repaired(pair, name, facts["repaired"]))
        refuse(identical_scans(scans))
        self.fingerprint = content.hexdigest()
        self.split = {role: [pairs[i].name for i in members] for role, members in roles.items()}
        self.split_fingerprint = hashlib.sha256(json.dumps(self.split).encode()).hexdigest()

    def set_pattern(self, networks: tuple[str, ...], radius: float, space: str, file: str = "",
                    labels: tuple[int, ...] = ()) -> int:
        """Make the pattern masks; returns how many pairs have one.

        They are the ROIs of these networks where the pair is in MNI space, or the labels of an image of the user's own,
        whose path may hold {subject} and {session}. Raises AtlasError where a mask turns out empty.
        """
        centres, images = roi_centres(networks), {}
        self._masks.clear()  # of other networks or labels
        for i, pair in enumerate(self.pairs):
            if file:
                path = Path(file.replace("{subject}", pair.subject).replace("{session}", pair.session))
                if path not in images:
                    images = {path: LabelImage(path, labels)}  # one at a time: each subject may have its own
                paint, origin = images[path].mask, str(path)
            elif len(centres) and (space == "mni" or (space == "auto" and in_mni_space(pair))):
                paint, origin = functools.partial(pattern_mask, centres=centres, radius=radius), "the ROIs"
            else:
                paint, origin = None, ""
            self.has_pattern[i] = paint is not None
            for name in self.modalities:
                self._mask_of[name][i] = self._painted(name, i, paint, origin)
        return sum(self.has_pattern)

    def pattern_fingerprint(self) -> str:
        """Hash of all pattern masks."""
        digest, known = hashlib.sha256(), {}
        for name in self.modalities:
            for mask in self._mask_of[name]:
                if mask is not None and id(mask) not in known:
                    known[id(mask)] = hashlib.sha256(mask.numpy().tobytes()).digest()
                digest.update(known.get(id(mask), b""))
        return digest.hexdigest()

    def _painted(self, name: str, i: int, paint: Callable | None, origin: str) -> torch.Tensor:
        """The mask (1, X, Y, Z) of one volume; those on the same grid share theirs."""
        size, affine = self.sizes[name], self.affines[name][i]
        key = (size, origin, affine.round(4).tobytes() if paint else b"")
        if key not in self._masks:
            mask = paint(size, affine) if paint else np.zeros(size, dtype=bool)
            if paint and not mask.any():
                raise AtlasError(f"{self.pairs[i].files[name]}: no voxel of it lies in {origin}; correct "
                                 'opt.pattern_file, or set opt.space = "native" if it is not in MNI space')
            self._masks[key] = torch.from_numpy(mask)[None]
        return self._masks[key]

    def apart(self) -> list[Problem]:
        """The pairs whose two fields of view differ by more than one (larger) voxel at some corner, in mm."""
        return [problem for i, pair in enumerate(self.pairs)
                if (problem := fields_apart(pair, {name: (self.affines[name][i], self.sizes[name])
                                                   for name in self.modalities}))]

    @functools.cached_property
    def extent(self) -> torch.Tensor:
        """(3,) mm, median over the pairs of the first modality's field of view, which both are overlaid on."""
        name = self.modalities[0]
        sides = [spacing_of(affine) * self.sizes[name] for affine in self.affines[name]]
        return torch.from_numpy(np.median(sides, axis=0))

    def volumes(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} float32 in [-1, 1]. Raises VolumeError where one has become unreadable."""
        return {name: torch.from_numpy(np.stack([load_volume(self._files[name][i]) for i in positions])[:, None])
                for name in self.modalities}

    def masks(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} pattern masks, 0 or 1; all 0 for a pair that has none."""
        return {name: torch.stack([self._mask_of[name][i] for i in positions]).float() for name in self.modalities}

    def mean_volumes(self, groups: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """{modality: (1 + groups, 1, X, Y, Z)} mean of the training volumes, the simplest synthesis there is; then of
        those of each group."""
        train = self.roles["train"]
        members = [train, *([i for i in train if self.pairs[i].group == group] for group in groups)]
        return {name: torch.stack([self._mean(name, each) for each in members])[:, None] for name in self.modalities}

    def _mean(self, name: str, positions: list[int]) -> torch.Tensor:
        volumes = (load_volume(self._files[name][i]).astype(np.float64) for i in positions)
        return torch.from_numpy(sum(volumes) / len(positions)).float()

    def train_range(self, name: str) -> tuple[float, float]:
        """Medians over the training volumes of the intensities that became -1 and 1: the units of what is made."""
        low, high = np.median([self.ranges[name][i] for i in self.roles["train"]], axis=0)
        return float(low), float(high)


def repaired(pair: Pair, name: str, count: int) -> Problem:
    """What is told about voxels that were no numbers."""
    return Problem(str(pair.files[name]), f"{count} voxels were NaN or infinite",
                   "they are set to the smallest finite value; look at the volume", pair.name, fatal=False)


def fields_apart(pair: Pair, grids: dict[str, tuple[np.ndarray, tuple]]) -> Problem | None:
    """A problem, not fatal, where the fields of view of the two grids (affine, size) are not the same."""
    overlap, distance = compare_fields(*grids.values())
    if overlap and distance <= max(spacing_of(affine).max() for affine, _ in grids.values()):
        return None
    what = f"differ by up to {distance:.0f} mm" if overlap else "do not overlap in space"
    return Problem(" and ".join(pair.files[name].name for name in grids), f"their fields of view {what}",
                   "PDS overlays the two grids edge to edge: co-register and crop them alike", pair.name, fatal=False)


def steps_per_epoch(positions: list[int], batch_size: int) -> int:
    return math.ceil(len(positions) / batch_size)


def training_batch(positions: list[int], batch_size: int, seed: int, step: int) -> list[int]:
    """The batch of step 0, 1, ...: an epoch is all positions once, and its last batch may be smaller.

    Shuffled by (seed, epoch) alone, so that a continued run sees the same order.
    """
    epoch, place = divmod(step, steps_per_epoch(positions, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(positions).tolist()
    return order[place * batch_size:(place + 1) * batch_size]

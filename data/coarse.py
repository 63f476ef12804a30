"""The coarse volumes of stage 2 on disk: sampled once, and continued where that was interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.cache import load_volume, save_volume
from data.problems import VolumeError


class CoarseVolumes:
    """Samples (X, Y, Z) in [-1, 1] of every target and pair, `count` of each; a coarse volume is a mean of them.

    folder: its name has to depend on everything that the samples depend on. names: of all pairs.
    sizes: target -> (X, Y, Z).
    """

    def __init__(self, folder: Path, names: list[str], sizes: dict[str, tuple[int, ...]], count: int):
        self.folder, self.names, self.sizes, self.count = folder, names, sizes, count

    def prepare(self, sample: Callable[..., dict[str, np.ndarray]], together: bool, at_once: int, progress) -> None:
        """Make what is missing. Raises VolumeError, FileError.

        sample: (targets, [(pair, sample), ...]) -> {target: (B, X, Y, Z)}, for `at_once` of them. together: whether it
        makes all targets in one go. progress wraps the list of jobs, and may end it early.
        """
        groups = [tuple(self.sizes)] if together else [(name,) for name in self.sizes]
        pairs, jobs = range(len(self.names)), []
        for targets, k, start in itertools.product(groups, range(self.count), pairs[::at_once]):
            batch = [(i, k) for i in pairs[start:start + at_once]]  # the same whatever is there: so are its last bits
            if not all(self._whole(target, *each) for target in targets for each in batch):
                jobs.append((targets, batch))
        for targets, batch in progress(jobs):
            for target, volumes in sample(targets, batch).items():
                for (i, k), volume in zip(batch, volumes):
                    self._keep(target, i, k, volume)

    def _keep(self, target: str, i: int, k: int, volume: np.ndarray) -> None:
        save_volume(self._path(target, i, k), volume)
        if not self._whole(target, i, k):
            raise VolumeError(self._path(target, i, k), "is not what was just sampled", "look whether the backbone's "
                              "samples are finite, or set another opt.cache_dir")

    def _path(self, target: str, i: int, k: int) -> Path:
        return self.folder / f"{self.names[i]}_{target}_{k}.npy"

    def _whole(self, target: str, i: int, k: int) -> bool:
        """Whether a sample is there, of the right size, and finite; if not it is made again."""
        try:
            volume = load_volume(self._path(target, i, k))
        except VolumeError:
            return False
        return volume.shape == tuple(self.sizes[target]) and volume.dtype == np.float32 and np.isfinite(volume).all()

    def volumes(self, target: str, positions: list[int], chosen: list[list[int]] | None = None) -> torch.Tensor:
        """(B, 1, X, Y, Z): the mean of all samples of each pair, or of those that `chosen` names for it."""
        chosen = chosen or [list(range(self.count))] * len(positions)
        means = [np.mean([load_volume(self._path(target, i, k)) for k in each], axis=0)
                 for i, each in zip(positions, chosen)]
        return torch.from_numpy(np.stack(means)[:, None])

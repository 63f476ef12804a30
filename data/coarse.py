"""The coarse volumes of stage 2 on disk: sampled once, memory-mapped, and continued where that was interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.files import replace_file
from data.problems import VolumeError

NO_CACHE = "make room and remove what is in its place, or set another opt.cache_dir"


class CoarseVolumes:
    """Samples (X, Y, Z) in [-1, 1] of every target and pair, `count` of each; a coarse volume is a mean of them.

    folder: its name has to depend on everything that the samples depend on. names: of all pairs.
    sizes: target -> (X, Y, Z).
    """

    def __init__(self, folder: Path, names: list[str], sizes: dict[str, tuple[int, ...]], count: int):
        self.folder, self.names, self.sizes, self.count = folder, names, sizes, count
        self._samples: dict[tuple[str, int, int], np.ndarray] = {}

    def prepare(self, sample: Callable[..., dict[str, np.ndarray]], together: bool, at_once: int, progress) -> None:
        """Make what is missing, and map all of it into memory.

        sample: (targets, [(pair, sample), ...]) -> {target: (B, X, Y, Z)}, for `at_once` of them. together: whether it
        makes all targets in one go. progress wraps the list of jobs, and may end it early.
        """
        groups = [tuple(self.sizes)] if together else [(name,) for name in self.sizes]
        pairs, jobs = range(len(self.names)), []
        for targets, k, start in itertools.product(groups, range(self.count), pairs[::at_once]):
            batch = [(i, k) for i in pairs[start:start + at_once]]  # the same whatever is there: so are its last bits
            if not all([self._mapped(target, *each) for target in targets for each in batch]):
                jobs.append((targets, batch))
        for targets, batch in progress(jobs):
            for target, volumes in sample(targets, batch).items():
                for (i, k), volume in zip(batch, volumes):
                    self._keep(target, i, k, volume)

    def _keep(self, target: str, i: int, k: int, volume: np.ndarray) -> None:
        """Write one sample, and map its file into memory. Raises VolumeError where that fails."""
        path = self._path(target, i, k)
        try:
            replace_file(path, lambda file: np.save(file, volume))
        except OSError as error:
            raise VolumeError(path, f"cannot be written ({error.strerror})", NO_CACHE) from error
        if not self._mapped(target, i, k):
            raise VolumeError(path, "is not what was just sampled", NO_CACHE)

    def _path(self, target: str, i: int, k: int) -> Path:
        return self.folder / f"{self.names[i]}_{target}_{k}.npy"

    def _mapped(self, target: str, i: int, k: int) -> bool:
        """Map one file into memory; False where it is missing or not whole, so that it is made again."""
        path = self._path(target, i, k)
        try:
            volume = np.lib.format.open_memmap(path, mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return False
        except OSError as error:
            raise VolumeError(path, f"cannot be read ({error.strerror})", NO_CACHE) from error
        self._samples[target, i, k] = volume
        return volume.shape == tuple(self.sizes[target]) and volume.dtype == np.float32 and np.isfinite(volume).all()

    def volumes(self, target: str, positions: list[int], chosen: list[list[int]] | None = None) -> torch.Tensor:
        """(B, 1, X, Y, Z): the mean of all samples of each pair, or of those that `chosen` names for it."""
        chosen = chosen or [list(range(self.count))] * len(positions)
        means = [np.mean([self._samples[target, i, k] for k in each], axis=0) for i, each in zip(positions, chosen)]
        return torch.from_numpy(np.stack(means)[:, None])

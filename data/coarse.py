"""The coarse volumes of stage 2 on disk: made once, memory-mapped, and continued where their making was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from data.files import replace_file


class CoarseVolumes:
    """(source, target, position of the pair) -> coarse volume of the target, (X, Y, Z) in [-1, 1].

    folder: its name has to depend on everything that the volumes depend on. names: of all pairs.
    """

    def __init__(self, folder: Path, names: list[str], directions: Iterable[tuple[str, str]]):
        self.folder, self.names, self.directions = folder, names, tuple(directions)
        self._volumes: dict[tuple[str, str, int], np.ndarray] = {}

    def prepare(self, sample: Callable[[str, str, list[int]], np.ndarray], at_once: int, progress) -> None:
        """Make what is missing and map all of it into memory.

        sample: (source, target, positions) -> (B, X, Y, Z), for `at_once` pairs; progress wraps the list of batches.
        """
        batches = []
        for source, target in self.directions:
            missing = [i for i in range(len(self.names)) if not self._path(source, target, i).exists()]
            batches += [(source, target, missing[start:start + at_once]) for start in range(0, len(missing), at_once)]
        for source, target, batch in progress(batches):
            for i, volume in zip(batch, sample(source, target, batch)):
                replace_file(self._path(source, target, i), lambda file, volume=volume: np.save(file, volume))
        self._volumes = {(source, target, i): np.load(self._path(source, target, i), mmap_mode="r")
                         for source, target in self.directions for i in range(len(self.names))}

    def _path(self, source: str, target: str, position: int) -> Path:
        return self.folder / f"{self.names[position]}_{source}_to_{target}.npy"

    def volumes(self, source: str, target: str, positions: list[int]) -> torch.Tensor:
        """(B, 1, X, Y, Z) coarse volumes of the target."""
        return torch.from_numpy(np.stack([self._volumes[source, target, i] for i in positions])[:, None])

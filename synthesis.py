"""A trained model of either stage as sample.py uses it: it translates volumes and draws pairs. All in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm import tqdm

import train
import train_refine
from data.cache import Reading, cached_volume, load_volume
from data.problems import VolumeError
from models.backbone import Backbone
from models.diffusion import Purpose
from models.refine import RefineNet
from opt import OptionError
from utils.checkpoint import UNFIT, CheckpointError, content_hash, read_checkpoint
from utils.optimise import number_type

# Voxels (Gaussian) over which the samples' variance is averaged: K samples tell that of a voxel to 1 / sqrt(2 K).
# Chosen on the demo's validation subjects, with 16 samples: rank correlation with the error 0.38 / 0.29 for stage 1,
# 0.36 / 0.21 without
POOLED = 0.7
SAMPLING = ("seed", "sampler", "sampling_steps", "eta", "coarse_samples")


class Model:
    """The model in opt.resume_path, and how it samples: stage 2 as it was trained, stage 1 as `opt` says.

    readings: modality -> how its files are read; affines: of the first training pair's grids, RAS; ranges: modality ->
    intensities, in file units, that -1 and 1 stand for; groups: those it can draw pairs of; how: what made a volume.
    Raises CheckpointError, OptionError.
    """

    def __init__(self, opt, device: torch.device):
        state = read_checkpoint(Path(opt.resume_path), (train.STAGE, train_refine.STAGE))
        if not isinstance(state.get("affines"), dict):
            raise CheckpointError(f"{opt.resume_path}: is of an earlier version, which does not keep where the grids "
                                  "lie in space; train again to use it here")
        first = state["stage"] == train.STAGE
        try:
            self.backbone = Backbone.from_checkpoint(state if first else state["backbone"], device,
                                                     number_type(opt.precision, device))
            self.refiner: RefineNet | None = None if first else train_refine.open_refined(state, device)
            saved, how = state["options"], opt.resolved() if first else state["options"]
            self.seed, self.count = how["seed"], how["coarse_samples"]
            self.coarse = "given" if first else how["coarse"]  # only stage 2 has learnt to use another
            self.sampler = {"steps": how["sampling_steps"], "sampler": how["sampler"], "eta": how["eta"]}
            self.readings = {name: Reading(name, tuple(size), saved["reduce"][name], saved["resize"],
                                           saved["intensity"][name]) for name, size in state["sizes"].items()}
            self.affines = {name: np.array(state["affines"][name], dtype=float) for name in state["sizes"]}
            self.ranges = {name: tuple(map(float, state["ranges"][name])) for name in state["sizes"]}
            self.split = {name: saved[name] for name in ("folds", "fold", "validation_fraction", "seed")}
            self.fingerprints, self.flipped = dict(state["fingerprints"]), "flip" in saved["augment"]
        except UNFIT as error:
            raise CheckpointError(f"{opt.resume_path}: does not fit this version of PDS ({error})") from error
        if opt.uncertainty_samples and self.coarse != "given":
            raise OptionError(f"opt.uncertainty_samples = {opt.uncertainty_samples}: {opt.resume_path} was refined "
                              f"with opt.coarse = {self.coarse!r}: its prior does not see the source, and cannot "
                              "tell what that leaves open; set it to 0")
        if self.sampler["steps"] > self.backbone.diffusion.timesteps:
            raise OptionError(f"opt.sampling_steps = {self.sampler['steps']}: the model in {opt.resume_path} has "
                              f"{self.backbone.diffusion.timesteps} timesteps; choose at most that many")
        self.names, self.groups, self.at_once = tuple(self.readings), self.backbone.groups, opt.batch_size
        self.cache, self._seen, joint = Path(opt.cache_dir), {}, opt.joint_samples > 0
        self.seed = opt.seed if joint else self.seed
        made_by = {"Prior": self.backbone.network} | ({} if first or joint else {"Refinement": self.refiner})
        self.how = {"Stage": "stage 1" if joint else state["stage"],
                    "Weights": {name: content_hash(network) for name, network in made_by.items()},
                    "Precision": str(self.backbone.dtype).removeprefix("torch."), "Sampler": self.sampler,
                    "Seed": self.seed, "Given": "nothing" if joint else self.coarse,
                    "Samples": 1 if joint else self.count,
                    "Training": {name: self.fingerprints[name] for name in ("data", "split")}}
        ignored = [f"{name} = {how[name]!r}" for name in SAMPLING if not first and how[name] != opt.resolved()[name]]
        self.note = f"stage 2 samples as it was trained: {', '.join(ignored)}" if ignored else ""

    def read(self, name: str, file: Path) -> tuple[np.ndarray, dict]:
        """A file's volume (X, Y, Z) as the model sees it, and what is known of it. Raises VolumeError, FileError."""
        voxels, facts = self._cached(name, file)
        return load_volume(voxels), facts

    def content(self, name: str, file: Path | None) -> str:
        """Hash of a file's volume as the model sees it; of no file none."""
        return self._cached(name, file)[1]["content"] if file else ""

    def _cached(self, name: str, file: Path) -> tuple[Path, dict]:
        if (name, file) not in self._seen:
            try:
                self._seen[name, file] = cached_volume(file, self.readings[name], self.cache)
            except VolumeError as error:
                problem, size = error.problems[0], "x".join(map(str, self.readings[name].size))
                remedy = (f"resample the file to {size}, the size that the model was trained on"
                          if "opt.image_size" in problem.remedy else problem.remedy)
                raise VolumeError(problem.where, problem.what, f"{remedy}; or leave the subject out with opt.exclude"
                                  ) from error
            if count := self._seen[name, file][1]["repaired"]:
                tqdm.write(f"note: {file}: {count} voxels were NaN or infinite, and are taken for the smallest value")
        return self._seen[name, file]

    def _drawn(self, keys: list[tuple[int, ...]], target: str, given: dict[str, Tensor], watch: Callable) -> Tensor:
        """A sample of the target by the prior for each noise key, a batch at a time."""
        made = []
        for start in range(0, len(keys), self.at_once):
            part = slice(start, start + self.at_once)
            made.append(self.backbone.sample(keys[part], self._sizes(), **self.sampler, progress=watch,
                                             given={name: each[part] for name, each in given.items()})[target])
        return torch.cat(made)

    def _sizes(self) -> dict[str, tuple[int, int, int]]:
        return {name: reading.size for name, reading in self.readings.items()}

    @torch.no_grad()
    def translate(self, source: str, target: str, volumes: np.ndarray, keys: list[int], uncertain: int,
                  watch: Callable) -> dict[str, np.ndarray]:
        """Sources (B, X, Y, Z) -> {"synth": targets}, and with `uncertain` samples "mean" and "std", alike.

        mean: what is made of the mean of so many samples of the prior, as synth is of fewer; std: the samples' standard
        deviation. keys: one per source: its noise depends on (seed, key, number of the sample). watch: may raise
        Interrupted.
        """
        given = torch.from_numpy(volumes)[:, None].to(self.backbone.device)
        B, count = len(given), max(self.count, uncertain)
        if self.coarse == "none":
            drawn = self.refiner.direction(source, target).mean.expand(B, 1, *self.readings[target].size)
        else:
            drawn = self._drawn([(self.seed, Purpose.COARSE, key, k) for key in keys for k in range(count)], target,
                                {source: given.repeat_interleave(count, dim=0)} if self.coarse == "given" else {},
                                watch).unflatten(0, (B, count))[:, :, 0]
        counts = {"synth": self.count, **({"mean": uncertain} if uncertain else {})}
        made = {name: self._refined(source, target, given, drawn[:, :some].mean(dim=1, keepdim=True))
                for name, some in counts.items()}
        made = {name: each[:, 0].cpu().numpy() for name, each in made.items()}
        if uncertain:
            variance = drawn[:, :uncertain].var(dim=1).cpu().numpy()
            made["std"] = np.sqrt(gaussian_filter(variance, POOLED, axes=(1, 2, 3)))
        return made

    def _refined(self, source: str, target: str, volumes: Tensor, coarse: Tensor) -> Tensor:
        if self.refiner is None:
            return coarse.float()
        with self.backbone.autocast():
            return self.refiner(source, target, volumes, coarse).clamp(-1, 1).float()

    def draw(self, numbers: list[tuple[int, int]], watch: Callable) -> dict[str, np.ndarray]:
        """New pairs by the prior of stage 1, {modality: (B, X, Y, Z)}; numbers: (number, group from 1 or 0) of each."""
        made = self.backbone.sample([(self.seed, Purpose.JOINT, *number) for number in numbers], self._sizes(),
                                    **self.sampler, progress=watch,
                                    groups=[self.groups[group - 1] if group else "" for _, group in numbers])
        return {name: each[:, 0].cpu().numpy() for name, each in made.items()}

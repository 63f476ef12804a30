"""A trained model of either stage in use: it translates volumes and draws new pairs. Volumes are in [-1, 1]."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from data.cache import Reading
from models.diffusion import Purpose
from models.prior import Prior
from models.refine import Refiner
from models.samplers import Sampling
from training.checkpoint import STAGE_1, STAGE_2, UNFIT, content_hash, read_checkpoint
from training.launch import compute_dtype
from utils.errors import UserError

# Gaussian (sigma) over which the variance of K samples is averaged: that of one voxel is known to 1 / sqrt(2 K) only.
# Demo, validation subjects, K = 16: rank correlation with the error 0.38 / 0.29 in stage 1, without it 0.36 / 0.21
STD_SMOOTHING_VOXELS = 0.7
SAMPLING_OPTIONS = ("sampler", "sampling_steps", "eta", "seed")


@dataclass(frozen=True)
class TrainedModel:
    """Networks, the settings to use them with, and how files become volumes."""

    prior: Prior
    refiner: Refiner | None  # None: the prior alone translates
    options: dict  # settings to sample with
    sampling: Sampling  # of these
    provenance: dict  # all that its volumes depend on in common, in plain values
    modalities: tuple[str, str]
    readings: dict[str, Reading]
    ranges: dict[str, tuple[float, float]]  # intensities, in file units, of -1 and 1
    affines: dict[str, np.ndarray]  # (4, 4), RAS, of the first training pair

    def translate(self, source: str, target: str, volumes: np.ndarray, keys: list[int],
                  uncertainty_samples: int = 0) -> dict[str, np.ndarray]:
        """Source volumes (B, X, Y, Z) -> {description: target volumes}. keys: of the noise, one per volume.

        "synth": the (refined) mean of opt.coarse_samples samples of the prior. With uncertainty_samples also "mean",
        the same from that many samples, and "std", their standard deviation. Raises Interrupted.
        """
        volumes = torch.from_numpy(volumes)[:, None].to(self.prior.device)
        counts = {"synth": self.options["coarse_samples"]}
        if uncertainty_samples:
            counts["mean"] = uncertainty_samples
        samples = self._coarse_samples(source, target, volumes, keys, max(counts.values()))  # (B, count, X, Y, Z)
        translated = {}
        for description, count in counts.items():
            volume = samples[:, :count].mean(dim=1, keepdim=True)
            if self.refiner:
                with self.prior.autocast():
                    volume = self.refiner(target, volumes, volume).clamp(-1, 1)
            translated[description] = volume[:, 0].float().cpu().numpy()
        if uncertainty_samples:
            variance = samples[:, :uncertainty_samples].var(dim=1).cpu().numpy()
            translated["std"] = np.sqrt(gaussian_filter(variance, STD_SMOOTHING_VOXELS, axes=(1, 2, 3)))
        return translated

    def _coarse_samples(self, source: str, target: str, volumes: Tensor, keys: list[int], count: int) -> Tensor:
        if self.options["coarse"] == "none":
            return self.refiner.mean(target).expand(len(keys), -1, -1, -1, -1)
        noise_keys = [(self.options["seed"], Purpose.COARSE, key, k) for key in keys for k in range(count)]
        sources, samples, size = volumes.repeat_interleave(count, dim=0), [], self.options["batch_size"]
        for batch in (slice(start, start + size) for start in range(0, len(noise_keys), size)):
            given = {source: sources[batch]} if self.options["coarse"] == "given" else {}
            samples.append(self.prior.sample(noise_keys[batch], self.sampling, given)[target])
        return torch.cat(samples).unflatten(0, (len(keys), count))[:, :, 0]

    def draw(self, numbers: list[int], groups: list[str]) -> dict[str, np.ndarray]:
        """New pairs {modality: (B, X, Y, Z)}, one per number and group. Raises Interrupted."""
        keys = [(self.options["seed"], Purpose.JOINT, *key)
                for key in zip(numbers, self.prior.group_indices(groups).tolist())]
        drawn = self.prior.sample(keys, self.sampling, groups=groups if self.prior.groups else None)
        return {modality: volumes[:, 0].cpu().numpy() for modality, volumes in drawn.items()}


def open_model(opt, device: torch.device) -> TrainedModel:
    """Open the checkpoint in opt.resume_path; new pairs are drawn by its prior alone. Raises UserError."""
    if not opt.resume_path:
        raise UserError('opt.resume_path = "": give a trained model, for example "./checkpoints/best_refine.pth"')
    state = read_checkpoint(Path(opt.resume_path), (STAGE_1, STAGE_2))
    trained, stage = state["options"], STAGE_1 if opt.joint_samples else state["stage"]
    options = {**(trained if stage == STAGE_2 else opt.resolved() | {"coarse": "given"}), "batch_size": opt.batch_size}
    try:
        prior = Prior.from_checkpoint(state.get("backbone", state), device, compute_dtype(opt.precision, device))
        refiner = Refiner.from_checkpoint(state, device) if stage == STAGE_2 else None
        readings = {modality: Reading(modality, tuple(size), trained["reduce"][modality], trained["resize"],
                                      trained["intensity"][modality]) for modality, size in state["sizes"].items()}
        ranges, affines = state["ranges"], {name: np.array(affine, float) for name, affine in state["affines"].items()}
    except UNFIT as error:
        raise UserError(f"{opt.resume_path}: does not fit this version of PDS ({error}); train again") from error
    if opt.uncertainty_samples and options["coarse"] != "given":
        raise UserError(f"opt.uncertainty_samples: {opt.resume_path} was refined with opt.coarse = "
                        f"{trained['coarse']!r}, so its samples do not depend on the source; set it to 0")
    sampling, timesteps = Sampling(*(options[name] for name in SAMPLING_OPTIONS[:3])), prior.diffusion.timesteps
    if sampling.steps > timesteps:
        raise UserError(f"opt.sampling_steps = {sampling.steps}: the model has {timesteps} timesteps; use fewer steps")
    if ignored := [name for name in (*SAMPLING_OPTIONS, "coarse_samples") if getattr(opt, name) != options[name]]:
        print(f"note: stage 2 translates as it was trained; ignored: opt.{', opt.'.join(ignored)}")
    provenance = {"Stage": stage, "Weights": [content_hash(network) for network in (prior.network, refiner) if network],
                  "Training": {name: state["fingerprints"][name] for name in ("data", "split")},
                  "Precision": str(prior.dtype), **{name: options[name] for name in SAMPLING_OPTIONS}}
    return TrainedModel(prior, refiner, options, sampling, provenance, tuple(readings), readings, ranges, affines)

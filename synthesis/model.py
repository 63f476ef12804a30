"""A trained model of either stage in use: it translates volumes and draws new pairs. Volumes are in [-1, 1]."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from data.alignment import Alignment
from data.cache import Reading, cached_volume
from models.diffusion import Purpose
from models.prior import Prior
from models.samplers import Sampling
from models.translator import Translator
from training.checkpoint import STAGE_1, STAGE_2, content_hash, read_checkpoint
from training.launch import precision_name, set_precision
from utils.errors import UserError
from utils.tensors import UNFIT, load_weights

# Gaussian (sigma) over which the variance of K samples is averaged: that of one voxel is known to 1 / sqrt(2 K) only.
# Demo, validation subjects, K = 16: rank correlation with the error 0.38 / 0.29 in stage 1, without it 0.36 / 0.21
STD_SMOOTHING_VOXELS = 0.7
SAMPLING_OPTIONS = ("sampler", "sampling_steps", "eta", "seed")


@dataclass(frozen=True)
class TrainedModel:
    """Networks, the settings to use them with, and how files become volumes."""

    prior: Prior
    refiner: Translator | None  # None: the prior alone translates
    options: dict  # settings to sample with
    sampling: Sampling  # of these
    provenance: dict  # all that its volumes depend on in common, in plain values
    modalities: tuple[str, str]
    readings: dict[str, Reading]
    ranges: dict[str, tuple[float, float]]  # intensities, in file units, of -1 and 1
    affines: dict[str, np.ndarray]  # (4, 4), RAS, of the first training pair
    alignment: Alignment
    seen_scans: frozenset[str] = frozenset()  # hashes of the scans that it was trained or validated on

    def read(self, files: dict[str, Path], cache_dir: Path) -> dict[str, tuple[Path, dict]]:
        """The scans of a visit, as in training: modality -> cache file, metadata (data/cache.py). Raises DataError."""
        return {modality: cached_volume(files[modality], reading, cache_dir)
                for modality, reading in self.alignment.readings(self.readings, files).items()}

    def has_seen(self, scans: dict[str, tuple[Path, dict]]) -> bool:
        """Whether it was trained or validated on one of the scans that `read` returns."""
        return any(metadata["scan"] in self.seen_scans for _, metadata in scans.values())

    def translate(self, source: str, target: str, volumes: np.ndarray, keys: list[int], flips: bool = False,
                  realism: float = 0.0, uncertainty_samples: int = 0) -> dict[str, np.ndarray]:
        """Source volumes (B, X, Y, Z) -> {description: target volumes}. keys: of the noise, one per volume. flips: as
        for `Translator.translate`.

        "synth": what the model expects, plus realism x what a sample of the prior adds to the prior's expected volume:
        a straight line from little error (0) to a sample's texture (1), as between the two ends of the trade (Freirich
        et al. 2021). With uncertainty_samples also "std", the standard deviation of so many samples. Raises
        Interrupted.
        """
        given = torch.from_numpy(volumes)[:, None].to(self.prior.device)
        noise_keys = [(self.options["seed"], Purpose.COARSE, key, 0) for key in keys]
        if self.refiner:
            joint = self.options["coarse"] == "joint"
            coarse = self.prior.sample(noise_keys, self.sampling)[target] if joint else None
            with self.prior.autocast():
                volume = self.refiner.translate(target, given, coarse, flips)
        else:
            volume = self.prior.translate(target, given, noise_keys, self.sampling, flips)
        if realism:
            texture = self.samples(source, target, given, keys, 1) - self.prior.expected(target, given)
            volume = (volume + realism * texture).clamp(-1, 1)
        translated = {"synth": volume[:, 0].float().cpu().numpy()}
        if uncertainty_samples:
            samples = self.samples(source, target, given, keys, uncertainty_samples)
            translated["std"] = np.sqrt(gaussian_filter(samples.var(dim=1).cpu().numpy(), STD_SMOOTHING_VOXELS,
                                                        axes=(1, 2, 3)))
        return translated

    def samples(self, source: str, target: str, given: Tensor, keys: list[int], count: int) -> Tensor:
        """Samples of the prior, (B, count, X, Y, Z)."""
        noise_keys = [(self.options["seed"], Purpose.COARSE, key, k) for key in keys for k in range(count)]
        sources, samples, size = given.repeat_interleave(count, dim=0), [], self.options["batch_size"]
        for batch in (slice(start, start + size) for start in range(0, len(noise_keys), size)):
            samples.append(self.prior.sample(noise_keys[batch], self.sampling, {source: sources[batch]})[target])
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
    joint = stage == STAGE_2 and trained["coarse"] == "joint"  # then samples are part of its translations
    options = {**(trained if joint else opt.resolved()), "coarse": trained["coarse"], "batch_size": opt.batch_size}
    try:
        prior = Prior.from_checkpoint(state.get("backbone", state), device, set_precision(opt.precision, device))
        refiner = None
        if stage == STAGE_2:  # the same network, trained on
            refiner = Translator(copy.deepcopy(prior.network), prior.diffusion.timesteps)
            load_weights(refiner, state["ema"]["model"])
        readings = {modality: Reading(modality, tuple(size), trained["reduce"][modality], trained["resize"],
                                      trained["intensity"][modality]) for modality, size in state["sizes"].items()}
        ranges, affines = state["ranges"], {name: np.array(affine, float) for name, affine in state["affines"].items()}
        alignment = Alignment(**state["alignment"])
    except UNFIT as error:
        raise UserError(f"{opt.resume_path}: does not fit this version of PDS ({error}); train again") from error
    needs = "realism" if opt.realism else "average_flips" if opt.average_flips and not refiner else ""
    if needs and not opt.joint_samples and not prior.has_expected_volume:
        raise UserError(f"opt.{needs} = {getattr(opt, needs)}: {opt.resume_path} has no expected volume "
                        f"(opt.prediction = {prior.diffusion.prediction!r}, opt.timestep_coupling = "
                        f"{prior.coupling!r}); leave it out")
    sampling, timesteps = Sampling(*(options[name] for name in SAMPLING_OPTIONS[:3])), prior.diffusion.timesteps
    if sampling.steps > timesteps:
        raise UserError(f"opt.sampling_steps = {sampling.steps}: the model has {timesteps} timesteps; use fewer steps")
    if ignored := [name for name in SAMPLING_OPTIONS if getattr(opt, name) != options[name]]:
        print(f"note: stage 2 translates with joint samples as it was trained; ignored: opt.{', opt.'.join(ignored)}")
    provenance = {"Stage": stage, "Weights": [content_hash(network) for network in (prior.network, refiner) if network],
                  "Training": {name: state["fingerprints"][name] for name in ("data", "split")},
                  "Precision": precision_name(opt.precision, prior.dtype),
                  **{name: options[name] for name in SAMPLING_OPTIONS}}
    return TrainedModel(prior, refiner, options, sampling, provenance, tuple(readings), readings, ranges, affines,
                        alignment, frozenset(state.get("seen_scans", [])))

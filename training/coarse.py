"""The coarse volumes of stage 2: samples of the frozen prior, kept on disk; a coarse volume is a mean of several."""

import contextlib
import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.cache import load_volume, save_volume
from data.problems import VolumeError
from data.study import Study
from models.diffusion import Purpose, keyed_generator, name_key
from models.prior import Prior
from models.samplers import Sampling, timestep_spacing
from training.distributed import any_rank, barrier, shard, stop_requested_on_any_rank, world_size
from utils.metrics import psnr
from utils.stop import Interrupted, interruptible

BATCH = 8  # samples drawn at once


class CoarseVolumes:
    """`opt.coarse_samples` samples (X, Y, Z) in [-1, 1] of every target and pair, or with opt.coarse = "none" the mean
    training volume.

    prior_hash: of the prior's weights. The name of the cache folder depends on everything that the samples depend on.
    """

    def __init__(self, opt, study: Study, prior: Prior, prior_hash: str):
        self.opt, self.study, self.prior, self.means = opt, study, prior, study.mean_volumes()
        self.sampling = Sampling(opt.sampler, opt.sampling_steps, opt.eta)
        times = timestep_spacing(prior.diffusion.timesteps, opt.sampling_steps, opt.sampler)
        key = (prior_hash, prior.diffusion.prediction, prior.coupling, opt.coarse, self.sampling, times, opt.seed,
               prior.dtype, study.fingerprint)
        self.folder = Path(opt.cache_dir) / "coarse" / hashlib.sha256(repr(key).encode()).hexdigest()[:24]

    def prepare(self) -> None:
        """Sample what is missing, divided among the ranks. Raises Interrupted on all ranks, UserError."""
        if self.opt.coarse == "none":
            return
        missing = self._missing()
        barrier()  # no rank samples before all have listed what is missing
        self._sample(shard(missing))
        if any_rank(world_size() > 1 and self._missing()):  # this machine does not share the disk of the others
            self._sample(self._missing())

    def _missing(self) -> list[tuple[tuple[str, ...], list[tuple[int, int]]]]:
        """Jobs (targets, [(pair, number of the sample), ...]). The batches do not depend on what is on disk."""
        groups = [self.study.modalities] if self.opt.coarse == "joint" else [(each,) for each in self.study.modalities]
        pairs, jobs = range(len(self.study.pairs)), []
        for targets, k, start in itertools.product(groups, range(self.opt.coarse_samples), pairs[::BATCH]):
            batch = [(i, k) for i in pairs[start:start + BATCH]]
            if not all(self._is_complete(target, i, k) for target in targets for i, k in batch):
                jobs.append((targets, batch))
        return jobs

    def _sample(self, jobs: list[tuple[tuple[str, ...], list[tuple[int, int]]]]) -> None:
        with contextlib.suppress(Interrupted):  # the ranks meet below
            for targets, batch in interruptible(tqdm(jobs, desc="coarse volumes", unit="batch", disable=not jobs)):
                given = {} if self.opt.coarse == "joint" else {
                    modality: volume for modality, volume in self.study.volumes([i for i, _ in batch]).items()
                    if modality not in targets}
                keys = [(self.opt.seed, Purpose.COARSE, name_key(self.study.pairs[i].name), k) for i, k in batch]
                samples = self.prior.sample(keys, self.sampling, given)
                for target, (place, (i, k)) in itertools.product(targets, enumerate(batch)):
                    path = self._path(target, i, k)
                    save_volume(path, samples[target][place, 0].cpu().numpy())
                    if not self._is_complete(target, i, k):
                        raise VolumeError(path, "differs from what was just sampled", "check whether the prior's "
                                          "samples are finite, or set opt.cache_dir to another folder")
        if stop_requested_on_any_rank():
            raise Interrupted

    def _path(self, target: str, i: int, k: int) -> Path:
        return self.folder / f"{self.study.pairs[i].name}_{target}_{k}.npy"

    def _is_complete(self, target: str, i: int, k: int) -> bool:
        """Whether a sample is on disk, has the right size and is finite; if not, it is sampled again."""
        try:
            volume = load_volume(self._path(target, i, k))
        except VolumeError:
            return False
        return volume.shape == self.study.sizes[target] and volume.dtype == np.float32 and np.isfinite(volume).all()

    def volumes(self, target: str, positions: list[int], chosen: list[list[int]] | None = None) -> torch.Tensor:
        """Coarse volumes (B, 1, X, Y, Z): for each pair the mean of all its samples, or of the chosen ones."""
        if self.opt.coarse == "none":
            return self.means[target].expand(len(positions), -1, -1, -1, -1)
        chosen = chosen or [list(range(self.opt.coarse_samples))] * len(positions)
        means = [np.mean([load_volume(self._path(target, i, k)) for k in numbers], axis=0)
                 for i, numbers in zip(positions, chosen)]
        return torch.from_numpy(np.stack(means)[:, None])

    def varied(self, target: str, positions: list[int], step: int, places: list[int]) -> torch.Tensor:
        """Coarse volumes to train on, keyed by (seed, step, place): means of random subsets of the samples.

        With probability opt.coarse_dropout the mean training volume is used instead, so that refinement does not rely
        on the prior too much.
        """
        opt, count, chosen, dropped = self.opt, self.opt.coarse_samples, [], []
        for place in places:
            generator = keyed_generator(opt.seed, Purpose.WITHHOLD, step, place, self.study.modalities.index(target))
            dropped.append(bool(torch.rand((), generator=generator) < opt.coarse_dropout))
            size = int(torch.randint(1, count + 1, (), generator=generator))
            chosen.append(torch.randperm(count, generator=generator)[:size].tolist())
        return torch.where(torch.tensor(dropped).view(-1, 1, 1, 1, 1), self.means[target],
                           self.volumes(target, positions, chosen))

    def generalisation_gap(self) -> str:
        """How much better coarse volumes are on the subjects that the prior was trained on than on new ones."""
        lines = []
        for target in self.study.modalities:
            mean = {role: np.mean([psnr((self.volumes(target, [i]) - self.study.volumes([i])[target]).numpy())
                                   for i in self.study.roles[role]]) for role in ("train", "test")}
            lines.append(f"coarse {target}: {mean['train']:.2f} dB on training pairs, {mean['test']:.2f} dB on test "
                         "pairs")
        return "\n".join(lines)

"""The coarse volumes of stage 2: what the frozen prior says about a target before refinement."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.cache import load_volume, save_volume
from data.problems import VolumeError
from data.study import Study
from models.diffusion import Purpose, name_key
from models.prior import Prior
from models.samplers import Sampling, timestep_spacing
from training.distributed import any_rank, barrier, shard, stop_requested_on_any_rank, world_size
from utils.stop import Interrupted, interruptible


class CoarseVolumes:
    """opt.coarse "expected": the expected volume, computed when it is asked for; "joint": a sample of both modalities,
    which does not know the source and is kept on disk; "none": the mean training volume. All in [-1, 1].

    prior_hash: of the prior's weights. The name of the cache folder depends on everything that the samples depend on.
    """

    def __init__(self, opt, study: Study, prior: Prior, prior_hash: str):
        self.opt, self.study, self.prior = opt, study, prior
        self.sampling = Sampling(opt.sampler, opt.sampling_steps, opt.eta)
        times = timestep_spacing(prior.diffusion.timesteps, opt.sampling_steps, opt.sampler)
        key = (prior_hash, prior.diffusion.prediction, prior.coupling, self.sampling, times, opt.seed, prior.dtype,
               opt.batch_size, study.identity["data"])
        self.folder = Path(opt.cache_dir) / "coarse" / hashlib.sha256(repr(key).encode()).hexdigest()[:24]

    def volumes(self, target: str, members: list[int]) -> torch.Tensor:
        """Coarse volumes (B, 1, X, Y, Z) of these pairs."""
        if self.opt.coarse == "expected":
            source = self.prior.network.source(target)
            return self.prior.expected(target, self.study.volumes(members)[source]).cpu()
        if self.opt.coarse == "joint":
            return torch.from_numpy(np.stack([load_volume(self._path(target, i))[None] for i in members]))
        return self.mean(target).expand(len(members), -1, -1, -1, -1)

    def mean(self, target: str) -> torch.Tensor:
        """The target's mean training volume (1, 1, X, Y, Z)."""
        return self.prior.network.net(target).mean[:1].cpu()

    def input(self, target: str, members: list[int]) -> torch.Tensor | None:
        """What stage 2 sees in the place of the noisy target: joint samples, or else nothing."""
        return self.volumes(target, members) if self.opt.coarse == "joint" else None

    def prepare(self) -> None:
        """Draw the joint samples that are missing, divided among the ranks. Raises Interrupted on all ranks, UserError.
        """
        if self.opt.coarse != "joint":
            return
        missing = self._missing()
        barrier()  # no rank samples before all have listed what is missing
        self._sample(shard(missing))
        if any_rank(world_size() > 1 and (missing := self._missing())):  # this disk is not shared with the others
            self._sample(missing)

    def _missing(self) -> list[list[int]]:
        """Batches of pairs, which do not depend on what is on disk."""
        pairs, size = [i for i, pair in enumerate(self.study.pairs) if pair.is_complete], self.opt.batch_size
        batches = [pairs[start:start + size] for start in range(0, len(pairs), size)]
        return [batch for batch in batches
                if not all(self._is_complete(target, i) for target in self.study.modalities for i in batch)]

    def _sample(self, batches: list[list[int]]) -> None:
        with contextlib.suppress(Interrupted):  # the ranks meet below
            for batch in interruptible(tqdm(batches, desc="coarse volumes", unit="batch", disable=not batches)):
                keys = [(self.opt.seed, Purpose.COARSE, name_key(self.study.pairs[i].name), 0) for i in batch]
                for target, volumes in self.prior.sample(keys, self.sampling).items():
                    for i, volume in zip(batch, volumes):
                        save_volume(self._path(target, i), volume[0].cpu().numpy())
                        if not self._is_complete(target, i):
                            raise VolumeError(self._path(target, i), "differs from what was just sampled", "check "
                                              "whether the prior's samples are finite, or set opt.cache_dir to another "
                                              "folder")
        if stop_requested_on_any_rank():
            raise Interrupted

    def _path(self, target: str, i: int) -> Path:
        return self.folder / f"{self.study.pairs[i].name}_{target}.npy"

    def _is_complete(self, target: str, i: int) -> bool:
        """Whether a sample is on disk, has the right size and is finite; if not, it is sampled again."""
        try:
            volume = load_volume(self._path(target, i))
        except VolumeError:
            return False
        return volume.shape == self.study.sizes[target] and volume.dtype == np.float32 and np.isfinite(volume).all()

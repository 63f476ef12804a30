"""Stage 1: train the dual-modal diffusion model, a joint prior of both modalities that also translates.

    python main.py

Writes checkpoints/best_model.pth and last_model.pth, and in results/stage1/ log.csv, sample grids and their volumes.
Volumes are {modality: (B, 1, X, Y, Z)} in [-1, 1]. The loop is training/loop.py.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.augment import load_batch
from data.split import groups_to_learn
from data.study import Study
from models.diffusion import (
    EXPECTED_FRACTION,
    Diffusion,
    Purpose,
    keyed_generator,
    keyed_noise,
    training_timesteps,
)
from models.losses import x0_error
from models.prior import Prior
from models.samplers import Sampling
from models.translator import known
from models.unet import DualModalUNet, NetworkConfig
from opt import names_affecting
from training.checkpoint import STAGE_1, Checkpoint
from training.distributed import is_main_rank, shard
from training.launch import set_precision
from training.loop import Stage
from utils.device import to_device
from utils.figures import save_grid
from utils.metrics import basic_scores, quality
from utils.stop import interruptible

save_every = 100  # steps between two sample grids in results/

GROUP_DROPOUT = 0.1  # fraction of the draws without a given modality in which the network does not see the group
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # fractions of T at which the error in x0 is measured
STRIP_COLUMNS = 6  # of the picture from noise to volume


class Stage1(Stage):
    name, folder_name, save_every = STAGE_1, "stage1", save_every
    columns = ("kind", "step", "epoch", "loss", "gradient_norm", "learning_rate", "x0_error", "translation_error",
               "psnr", "ssim")
    higher_is_better = False

    def __init__(self, opt, study: Study, device: torch.device):
        super().__init__(opt, study, device)
        torch.manual_seed(opt.seed)
        groups = groups_to_learn(opt, study.pairs, study.roles)
        self.network = DualModalUNet(study.sizes, NetworkConfig(**opt.network_arguments()), len(groups)).to(device)
        self.network.set_means(study.mean_volumes(groups))
        self.network.set_recompute(opt.gradient_checkpointing)
        self.dtype = set_precision(opt.precision, device)
        self.prior = Prior(self.network, Diffusion(opt.timesteps, opt.prediction), opt.timestep_coupling, study.sizes,
                           device, self.dtype, groups)
        self.metrics = ("x0_error", "translation_error") if self.prior.has_expected_volume else ("x0_error",)
        self.epochs, self.learning_rate, self.optimiser = opt.epochs, opt.learning_rate, opt.optimiser
        self.metadata["groups"] = list(groups)
        if groups:
            labels = [(pair.name, pair.group) for pair in study.pairs]
            self.metadata["fingerprints"]["groups"] = hashlib.sha256(json.dumps(labels).encode()).hexdigest()
        self.may_change = names_affecting("nothing", "stage 2", "sampling", "sample.py")
        self.resume_from = Path(opt.resume_path) if opt.resume_path else None

    def begin(self) -> None:
        if is_main_rank() and self.opt.pattern_weight:
            self.draw_pattern()

    def load(self, target: str, places: list[int], batch: list[int], step: int) -> tuple:
        """Volumes, masks, noise and timesteps by modality, `Prior.expects`, and group indices; keyed by (seed, step,
        place, target)."""
        opt, study, group = self.opt, self.study, None
        x0, masks = load_batch(study, [batch[place] for place in places], self.transform(step, places), self.device)
        source, keys = self.network.source(target), [(step, place, study.modalities.index(target)) for place in places]
        noise = keyed_noise(study.sizes, *((opt.seed, Purpose.TRAINING, *key) for key in keys))
        times = training_timesteps(opt.timestep_coupling, opt.timesteps,
                                   [(opt.seed, Purpose.TIMESTEPS, *key) for key in keys],
                                   EXPECTED_FRACTION if self.prior.has_expected_volume else 0.0)
        t = dict(zip((source, target), times))
        if self.prior.groups:
            shown = [self.shows_group(key, pair_times) for key, *pair_times in zip(keys, *times)]
            group = self.prior.group_indices([study.pairs[batch[place]].group if show else ""
                                              for place, show in zip(places, shown)])
        expected = self.prior.expects(target, t)
        noise[target][expected] = 0
        noise, t = ({modality: to_device(each, self.device) for modality, each in values.items()}
                    for values in (noise, t))
        return x0, masks, noise, t, to_device(expected, self.device), group

    def shows_group(self, key: tuple[int, ...], times: list[Tensor]) -> bool:
        """Whether the network sees a pair's group: never in a translation, which should often help to find it."""
        draw = torch.rand((), generator=keyed_generator(self.opt.seed, Purpose.GROUP, *key))
        return all(times) and bool(draw >= GROUP_DROPOUT)

    def loss(self, network: nn.Module, target: str, data: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        x0, masks, noise, t, expected, group = data
        losses = replace(self.prior, network=network).loss(target, x0, noise, t, expected, group, masks[target],
                                                           self.opt.pattern_weight, self.opt.loss)
        return losses.mean(), {}

    @torch.no_grad()
    def validate(self, network: nn.Module) -> Iterator[tuple[str, float]]:
        """Unweighted mean absolute errors in x0 of the validation subjects, of both uses of the model.

        x0_error: both modalities are noised to the same t, with the same noise every time, so the number is comparable
        between all settings. translation_error: of the expected volumes, given the other modality.
        """
        prior, members, size = replace(self.prior, network=network), self.study.roles["validation"], self.opt.batch_size
        jobs = itertools.product(VALIDATION_TIMES, range(0, len(members), size))
        for fraction, start in interruptible(shard(list(jobs))):
            batch, time = members[start:start + size], max(1, round(fraction * self.opt.timesteps))
            noise = keyed_noise(self.study.sizes,
                                *((self.opt.seed, Purpose.VALIDATION, i, round(100 * fraction)) for i in batch))
            x0 = self.study.volumes(batch, self.device)
            t = {modality: torch.full((len(batch),), time, device=self.device) for modality in x0}
            xt = {modality: prior.diffusion.add_noise(known(volume), to_device(noise[modality], self.device),
                                                      t[modality]) for modality, volume in x0.items()}
            for modality, output in prior.predict(xt, t).items():
                errors = x0_error(prior.diffusion.to_x0(xt[modality], output, t[modality]), x0[modality])
                yield from (("x0_error", error) for error in errors.tolist())
        for i in interruptible(shard(members if prior.has_expected_volume else [])):
            x0 = self.study.volumes([i], self.device)
            for source, target in network.directions:
                error = x0_error(prior.expected(target, x0[source]), x0[target])
                yield "translation_error", error.item()

    def draw(self, network: nn.Module, step: int) -> tuple[Path, dict[str, float]]:
        """Real, translated and jointly sampled volumes of validation subjects; always the same subjects and noise."""
        opt, study, prior = self.opt, self.study, replace(self.prior, network=network)
        shown = study.roles["validation"][:opt.num_samples]
        real, masks, states, rows, scores = study.volumes(shown), study.masks(shown), [], [], []
        keys = [(opt.seed, Purpose.PICTURES, i) for i in shown]
        sampling = Sampling(opt.sampler, opt.sampling_steps, opt.eta)
        joint = prior.sample(keys, sampling, groups=[study.pairs[i].group for i in shown], record=states)
        translated = {target: prior.translate(target, real[source], keys, sampling)
                      for source, target in prior.network.directions}
        for (place, i), modality in itertools.product(enumerate(shown), study.modalities):
            volumes = {kind: each[modality][place, 0].cpu().numpy()
                       for kind, each in (("real", real), ("translated", translated), ("joint", joint))}
            scores.append(basic_scores(volumes["translated"], volumes["real"]))
            difference = volumes["translated"] - volumes["real"]
            rows.append((f"{study.pairs[i].name}\n{modality}\n{study.pairs[i].group}", [
                self.panel(modality, i, volumes["real"], outline=masks[modality][place, 0].numpy() > 0),
                self.panel(modality, i, volumes["translated"], quality(scores[-1])),
                self.panel(modality, i, difference, kind="difference"),
                self.panel(modality, i, volumes["joint"])]))
            for kind in ("translated", "joint"):
                self.write_sample(modality, i, volumes[kind], kind, step)
        self.draw_denoising(states, shown[0], step)
        return self.write_grid(step, ["real", "translated from the other modality", "translated minus real",
                                      "sampled jointly from noise"], rows, scores)

    def draw_denoising(self, states: list, i: int, step: int) -> None:
        """How the first jointly sampled pair comes out of noise."""
        chosen = [states[n] for n in sorted({round(x) for x in np.linspace(0, len(states) - 1, STRIP_COLUMNS)})]
        rows = [(f"{modality}\n{words}", [self.panel(modality, i, state[place][modality]) for state in chosen])
                for modality in self.study.modalities for words, place in (("noisy", 1), ("estimated\nvolume", 2))]
        save_grid(self.folder / f"denoising_{step:06d}.png", f"Stage 1, step {step}: one pair, from noise",
                  [f"t = {state[0]}" for state in chosen], rows)

    def draw_pattern(self) -> None:
        """The pattern mask over the first training subject that has one; once per result folder."""
        path, study = self.folder / "pattern_mask.png", self.study
        first = next((i for i in study.roles["train"] if study.has_pattern[i]), None)
        if first is None or path.exists():
            return
        real, masks = study.volumes([first]), study.masks([first])
        rows = [(f"{study.pairs[first].name}\n{modality}",
                 [self.panel(modality, first, real[modality][0, 0].numpy(), overlay=masks[modality][0, 0].numpy() > 0)])
                for modality in study.modalities]
        save_grid(path, "Orange: where the loss has more weight", ["the slices with most of it"], rows)

    def finish(self, run: Checkpoint) -> None:
        print(f"\nStage 1 is finished: {run.step} steps, best validation error {run.best_value:.4f} (mean of "
              f"{' and '.join(self.metrics)}).\nPictures: {self.folder}. Model: {run.best}\n"
              f"Next: stage 2, the same command with --refine --resume_path {run.best}\n"
              "Or train longer: the same command with higher opt.epochs (or opt.max_steps, if it is set)")

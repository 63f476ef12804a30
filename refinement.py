"""What stage 2 works with and leaves: coarse and refined volumes, scores and pictures."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.coarse import CoarseVolumes
from data.grids import spacing_of
from data.intensity import brain_region, to_units
from data.study import Study
from data.volumes import write_volume
from models.backbone import Backbone
from models.diffusion import Purpose, keyed_generator, name_key
from models.perceptual import PerceptualLoss
from models.refine import RefineNet
from models.samplers import spacing
from utils.distributed import any_rank, share, wait, world
from utils.figures import Panel, save_grid
from utils.metrics import psnr, quality, score
from utils.optimise import Interrupted, StopRequest

COARSE_BATCH = 8  # samples drawn at once


def dealt(jobs: list) -> list:
    """This rank's share, once all ranks have listed what is missing: before, none makes any of it."""
    wait()
    return share(jobs)


class Refinement:
    """What every part of stage 2 works with: settings, study, coarse and mean volumes, and where it computes."""

    def __init__(self, opt, study: Study, backbone: Backbone, backbone_hash: str,
                 perceptual: PerceptualLoss | None = None, stop: StopRequest | None = None):
        """Samples the coarse volumes that are missing, unless a stop is asked for: then some may still be missing."""
        self.opt, self.study, self.backbone, self.perceptual = opt, study, backbone, perceptual
        self.device, self.autocast = backbone.device, backbone.autocast
        self.means, self.watch = study.mean_volumes(), iter if stop is None else stop.watch
        diffusion = backbone.diffusion
        sampler = (backbone_hash, diffusion.prediction, backbone.coupling, opt.coarse, opt.sampler,
                   spacing(diffusion.timesteps, opt.sampling_steps, opt.sampler), opt.eta, opt.seed, backbone.dtype,
                   study.fingerprint, "keyed by name")
        folder = Path(opt.cache_dir) / "coarse" / hashlib.sha256(repr(sampler).encode()).hexdigest()[:24]
        self.samples = CoarseVolumes(folder, [pair.name for pair in study.pairs], study.sizes, opt.coarse_samples)
        if opt.coarse != "none":
            self._prepare(dealt)
            if world() > 1 and not any_rank(stop):
                self._prepare(list)  # finds what other ranks made, and makes it where their disk is another

    def _prepare(self, mine: Callable[[list], list]) -> None:
        """Sample what is missing and `mine` selects."""
        with contextlib.suppress(Interrupted):  # the ranks meet afterwards
            self.samples.prepare(self._sample, self.opt.coarse == "joint", COARSE_BATCH, lambda jobs: tqdm(
                mine(jobs), desc="coarse volumes", unit="batch", disable=not jobs))

    def _sample(self, targets: tuple[str, ...], batch: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        """A sample of these targets, {target: (B, X, Y, Z)}, for each (pair, number of the sample)."""
        opt, members = self.opt, [i for i, _ in batch]
        given = {name: volume for name, volume in self.study.volumes(members).items()
                 if opt.coarse == "given" and name not in targets}
        made = self.backbone.sample([(opt.seed, Purpose.COARSE, name_key(self.study.pairs[i].name), k)
                                     for i, k in batch], self.study.sizes,
                                    opt.sampling_steps, opt.sampler, opt.eta, given, progress=self.watch)
        return {name: made[name][:, 0].cpu().numpy() for name in targets}

    def coarse(self, target: str, members: list[int], chosen: list[list[int]] | None = None) -> torch.Tensor:
        """Coarse volumes (B, 1, X, Y, Z): the means of all samples, or of the chosen; without a prior the mean volume.
        """
        if self.opt.coarse == "none":
            return self.means[target].expand(len(members), -1, -1, -1, -1)
        return self.samples.volumes(target, members, chosen)

    def varied_coarse(self, target: str, members: list[int], step: int, places: list[int]) -> torch.Tensor:
        """Coarse volumes to train on, keyed by (seed, step, place): means of random parts of the samples, now and then
        withheld (the mean volume stands in), so that refinement does not over-trust them."""
        opt, count = self.opt, self.opt.coarse_samples
        chosen, withheld = [], []
        for place in places:
            generator = keyed_generator(opt.seed, Purpose.WITHHOLD, step, place, self.study.modalities.index(target))
            withheld.append(bool(torch.rand((), generator=generator) < opt.coarse_dropout))
            size = int(torch.randint(1, count + 1, (), generator=generator))
            chosen.append(torch.randperm(count, generator=generator)[:size].tolist())
        return torch.where(torch.tensor(withheld).view(-1, 1, 1, 1, 1), self.means[target],
                           self.coarse(target, members, chosen))

    @torch.no_grad()
    def refined(self, network: RefineNet, source: str, target: str, positions: list[int]) -> torch.Tensor:
        """Refined volumes (B, 1, X, Y, Z) in [-1, 1], on the CPU, made one pair at a time."""
        made = []
        for i in positions:
            volume, coarse = self.study.volumes([i])[source].to(self.device), self.coarse(target, [i]).to(self.device)
            with self.autocast():
                made.append(network(source, target, volume, coarse).clamp(-1, 1).cpu())
        return torch.cat(made)


def report(network: RefineNet, work: Refinement) -> list[dict]:
    """Rows of metrics.csv: every test pair, direction, volume (refined, coarse, mean, source) and region.

    Raises Interrupted when a stop is asked for.
    """
    study, rows = work.study, []
    for i in work.watch(study.roles["test"]):
        real, masks = study.volumes([i]), study.masks([i])
        for source, target in network.directions:
            truth = real[target][0, 0].numpy()
            candidates = {"refined": work.refined(network, source, target, [i]), "coarse": work.coarse(target, [i]),
                          "mean": work.means[target]}
            if work.opt.coarse == "none":
                del candidates["coarse"]
            if study.sizes[source] == study.sizes[target]:
                candidates["source"] = real[source]
            regions = {"brain": brain_region(truth), "pattern": masks[target][0, 0].numpy() > 0}
            for volume, candidate in candidates.items():
                for region, scores in score(candidate[0, 0].numpy(), truth, regions).items():
                    rows.append({"subject": study.pairs[i].name, "direction": f"{source}->{target}", "volume": volume,
                                 "region": region, **scores})
    return rows


def coarse_on_new_subjects(work: Refinement) -> str:
    """How much better the coarse volumes look on the subjects that the backbone was trained on than on new ones."""
    lines = []
    for target in work.study.modalities:
        values = {}
        for role in ("train", "test"):
            members = work.study.roles[role]
            errors = (work.coarse(target, [i]) - work.study.volumes([i])[target] for i in members)
            values[role] = np.mean([psnr(error.numpy()) for error in errors])
        lines.append(f"coarse {target}: {values['train']:.2f} dB on training pairs, {values['test']:.2f} dB on test "
                     "pairs")
    return "\n".join(lines)


def write_samples(network: RefineNet, work: Refinement, folder: Path, step: int) -> tuple[Path, dict[str, float]]:
    """A grid of source, coarse, refined, truth and their difference for validation subjects; refined volumes as NIfTI.

    Returns the grid's path, and mean psnr and ssim of the refined volumes.
    """
    study, rows, scores = work.study, [], []
    for i in work.watch(study.roles["validation"][:work.opt.num_samples]):
        pair, real = study.pairs[i], study.volumes([i])
        for source, target in network.directions:
            coarse, refined = work.coarse(target, [i]), work.refined(network, source, target, [i])
            spacing = {name: spacing_of(study.affines[name][i]) for name in (source, target)}
            truth, made = real[target][0, 0].numpy(), [each[0, 0].numpy() for each in (coarse, refined)]
            pattern = study.masks([i])[target][0, 0].numpy() > 0
            found = [score(each, truth, {})["volume"] for each in made]
            scores.append(found[1])
            rows.append((f"{pair.name}\n{source} -> {target}\n{pair.group}", [
                Panel(real[source][0, 0].numpy(), spacing[source]),
                *(Panel(each, spacing[target], quality(values)) for each, values in zip(made, found)),
                Panel(truth, spacing[target], outline=pattern if pattern.any() else None),
                Panel(made[1] - truth, spacing[target], kind="difference")]))
            write_volume(folder / "samples" / f"step_{step:06d}" / f"{pair.name}_{target}_refined.nii.gz",
                         to_units(refined[0, 0].numpy(), *study.train_range(target)), study.affines[target][i],
                         pair.files[target])
    path = folder / f"step_{step:06d}.png"
    yellow = ". Yellow: the networks" if any(study.has_pattern) else ""
    save_grid(path, f"Stage 2, step {step}, validation subjects{yellow}",
              ["source", "coarse", "refined", "truth", "refined minus truth"], rows)
    return path, {key: float(np.mean([each[key] for each in scores])) for key in ("psnr", "ssim")}

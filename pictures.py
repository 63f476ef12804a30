"""What stage 1 shows: the pattern mask, grids of samples, and how a pair comes out of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.grids import spacing_of
from data.intensity import to_units
from data.study import Study
from data.volumes import write_volume
from models.backbone import Backbone
from models.diffusion import Purpose, Volumes
from utils.figures import Panel, save_grid
from utils.metrics import quality, score

STATES = 6  # columns of the strip from noise to volume


def draw_pattern(study: Study, path: Path) -> None:
    """Once per result folder: the pattern mask over the first training subject that has one, to look at."""
    if path.exists() or (place := next((i for i in study.roles["train"] if study.has_pattern[i]), None)) is None:
        return
    real, masks = study.volumes([place]), study.masks([place])
    rows = [(f"{study.pairs[place].name}\n{name}",
             [Panel(real[name][0, 0].numpy(), spacing_of(study.affines[name][place]),
                    overlay=masks[name][0, 0].numpy() > 0)]) for name in study.modalities]
    save_grid(path, "Red: where the loss weighs more", ["the slices with most of it"], rows)


def write_samples(backbone: Backbone, opt, study: Study, folder: Path, step: int,
                  watch: Callable) -> tuple[Path, dict[str, float]]:
    """Grids of real, translated and jointly sampled volumes of validation subjects, and the sampled volumes as NIfTI.

    The subjects and their noise are the same every time, so that two grids can be flipped between. watch: may raise
    Interrupted between two steps of the sampler. Returns the grid's path, and mean psnr and ssim of the translations.
    """
    def progress(steps: list) -> Iterable:
        return watch(tqdm(steps, desc="sampling", leave=False, disable=None))

    shown, states = study.roles["validation"][:opt.num_samples], States(opt.sampling_steps)
    real, masks, rows, scores = study.volumes(shown), study.masks(shown), [], []
    keys = [(opt.seed, Purpose.PICTURES, i) for i in shown]
    how = (study.sizes, opt.sampling_steps, opt.sampler, opt.eta)
    groups = [study.pairs[i].group for i in shown]
    made = {"translated": {}, "joint": backbone.sample(keys, *how, progress=progress, groups=groups, trace=states)}
    for source, target in backbone.network.directions:
        given = {source: real[source]}
        made["translated"][target] = backbone.sample(keys, *how, given, progress=progress)[target]
    for place, i in enumerate(shown):
        pair = study.pairs[i]
        for name in study.modalities:
            volumes = {kind: each[name][place, 0].cpu().numpy() for kind, each in {"real": real, **made}.items()}
            spacing, network = spacing_of(study.affines[name][i]), masks[name][place, 0].numpy() > 0
            scores.append(score(volumes["translated"], volumes["real"], {})["volume"])
            rows.append((f"{pair.name}\n{name}\n{pair.group}", [
                Panel(volumes["real"], spacing, outline=network if network.any() else None),
                Panel(volumes["translated"], spacing, quality(scores[-1])),
                Panel(volumes["translated"] - volumes["real"], spacing, kind="difference"),
                Panel(volumes["joint"], spacing)]))
            for kind in made:
                write_volume(folder / "samples" / f"step_{step:06d}" / f"{pair.name}_{name}_{kind}.nii.gz",
                             to_units(volumes[kind], *study.train_range(name)), study.affines[name][i],
                             pair.files[name])
    draw_states(states.kept, study, shown[0], folder / f"denoising_{step:06d}.png", step)
    path = folder / f"step_{step:06d}.png"
    yellow = ". Yellow: the networks" if any(study.has_pattern[i] for i in shown) else ""
    save_grid(path, f"Stage 1, step {step}, validation subjects{yellow}",
              ["real", "sampled, given the other modality", "sampled minus real", "sampled jointly, from noise"], rows)
    return path, {key: float(np.mean([each[key] for each in scores])) for key in ("psnr", "ssim")}


class States:
    """Keeps (t, noisy volumes, estimates of the clean ones) of the first sample at STATES of a sampler's steps."""

    def __init__(self, steps: int):
        self.wanted, self.seen, self.kept = {round(x) for x in np.linspace(0, steps - 1, STATES)}, 0, []

    def __call__(self, t: int, *volumes: Volumes) -> None:
        if self.seen in self.wanted:
            self.kept.append((t, *({name: volume[0, 0].float().cpu().numpy() for name, volume in each.items()}
                                   for each in volumes)))
        self.seen += 1


def draw_states(states: list, study: Study, i: int, path: Path, step: int) -> None:
    """How the first of the jointly sampled pairs came out of noise. i: a pair whose spacing it has."""
    rows = []
    for name in study.modalities:
        spacing = spacing_of(study.affines[name][i])
        for words, place in (("noisy", 1), ("estimate\nof the volume", 2)):
            rows.append((f"{name}\n{words}", [Panel(state[place][name], spacing) for state in states]))
    save_grid(path, f"Stage 1, step {step}: one pair, from noise", [f"t = {state[0]}" for state in states], rows)

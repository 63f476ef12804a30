"""Do refined volumes keep the difference between diagnostic groups inside the disease-related networks?

    python -m benchmarks.group_difference checkpoints/best_refine.pth

Per direction, over the test subjects: the map of the mean NC volume minus the mean AD volume inside the pattern masks,
of real, coarse and refined volumes. Prints its mean over the voxels; its RMS, both in units of [-1, 1]; and "kept", its
projection on the real map: 100 % for the same map, about 0 % for an unrelated map of the same size, with the 95 %
bootstrap interval over the subjects of both groups. The mean says little: a volume is scaled by its own intensities,
and the demo's real means differ by less than half a standard deviation between the groups.
"""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks import open_run, run_report
from data.study import Study
from models.diffusion import name_key
from synthesis.model import TrainedModel
from training.checkpoint import STAGE_2
from utils.errors import UserError

GROUPS = ("NC", "AD")
DRAWS = 2_000
Maps = dict[str, dict[str, np.ndarray]]  # direction -> kind of volume -> (N, voxels)


def voxels_inside(study: Study, model: TrainedModel, members: list[int]) -> Maps:
    """The voxels of real, coarse and refined volumes that all scans see, where any pair has its pattern mask."""
    prior_only, masks = dataclasses.replace(model, refiner=None), study.masks(members)
    known = {modality: ~volumes.isnan().any(dim=0)[0].numpy() for modality, volumes in study.volumes(members).items()}
    inside = {modality: (mask > 0).any(dim=0)[0].numpy() & known[modality] for modality, mask in masks.items()}
    found = {f"{source}->{target}": {"real": [], "coarse": [], "refined": []}
             for source, target in model.prior.network.directions}
    for i in members:
        volumes = {modality: volume[:, 0].numpy() for modality, volume in study.volumes([i]).items()}
        for source, target in model.prior.network.directions:
            key, kinds = [name_key(study.pairs[i].name)], found[f"{source}->{target}"]
            kinds["real"].append(volumes[target][0][inside[target]])
            for kind, translator in (("coarse", prior_only), ("refined", model)):
                translated = translator.translate(source, target, volumes[source], key)["synth"]
                kinds[kind].append(translated[0][inside[target]])
    return {direction: {kind: np.stack(each) for kind, each in kinds.items()} for direction, kinds in found.items()}


def difference(voxels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of the first group minus mean of the second, (voxels,)."""
    first, second = (voxels[groups == group].mean(axis=0) for group in GROUPS)
    return first - second


def projection(synthetic: np.ndarray, real: np.ndarray) -> float:
    """Slope of the regression of the map `synthetic` on the map `real`: how much of `real` it contains."""
    return float(synthetic @ real / (real @ real))


def kept(synthetic: np.ndarray, real: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Projection of the group difference of `synthetic` on that of `real`, (N, voxels), and its 95 % interval."""
    random, members = np.random.default_rng(0), [np.flatnonzero(groups == group) for group in GROUPS]
    draws = [np.concatenate([random.choice(each, len(each)) for each in members]) for _ in range(DRAWS)]
    values = [projection(*(difference(each[draw], groups[draw]) for each in (synthetic, real))) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return projection(difference(synthetic, groups), difference(real, groups)), float(low), float(high)


def report(checkpoint: Path, settings) -> None:
    study, model = open_run(checkpoint, settings, (STAGE_2,))
    members = [i for i in study.roles["test"] if study.pairs[i].group in GROUPS]
    groups = np.array([study.pairs[i].group for i in members])
    if set(groups) != set(GROUPS):
        raise UserError(f"test subjects of both groups {GROUPS} are needed; there are only {sorted(set(groups))}")
    if not all(study.has_pattern[i] for i in members):
        raise UserError("test subjects without a pattern mask: set opt.space or opt.pattern_file")
    counts = ", ".join(f"{(groups == group).sum()} {group}" for group in GROUPS)
    print(f"{'direction':<14} {'volume':<8} mean     RMS     kept (95 % interval); {counts}")
    for direction, kinds in voxels_inside(study, model, members).items():
        for kind, voxels in kinds.items():
            ratio, low, high = kept(voxels, kinds["real"], groups)
            change = difference(voxels, groups)
            rms = np.sqrt(np.square(change).mean())
            print(f"{direction:<14} {kind:<8} {change.mean():+.4f}  {rms:.4f}  {ratio:.0%} ({low:.0%} .. {high:.0%})")


if __name__ == "__main__":
    run_report(report, __doc__, "best_refine.pth")

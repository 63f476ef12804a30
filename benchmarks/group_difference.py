"""Do refined volumes keep the difference between diagnostic groups inside the disease-related networks?

    python -m benchmarks.group_difference checkpoints/best_refine.pth [--data_root ... --cache_dir ...]

Per direction, over the test subjects: the map of the mean NC volume minus the mean AD volume inside the pattern
masks, of real, refined and coarse volumes. Its mean over the voxels; its RMS, both in [-1, 1] units; and "kept", its
projection on the real map: 100 % where it is the same, about 0 % for a map of other differences of the same size, with
the 95 % bootstrap interval over the subjects of both groups. The mean tells little: a volume is scaled by its own
intensities, and the demo's real means differ by less than half a standard deviation between the groups.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import main
from models.refine import RefineNet
from opt import PRESETS, opt
from refinement import Refinement
from train_refine import STAGE, open_backbone, open_refined
from utils.arguments import parse_arguments
from utils.checkpoint import content_hash, read_checkpoint
from utils.optimise import number_type

GROUPS = ("NC", "AD")
DRAWS = 2_000


def inside(work: Refinement, network: RefineNet, members: list[int]) -> dict[str, dict[str, np.ndarray]]:
    """direction -> kind of volume -> the voxels (N, voxels) of these pairs where any of them has its pattern mask."""
    study, found = work.study, {}
    for source, target in network.directions:
        mask = (study.masks(members)[target] > 0).any(dim=0)
        volumes = {"real": study.volumes(members)[target], "coarse": work.coarse(target, members),
                   "refined": work.refined(network, source, target, members)}
        found[f"{source}->{target}"] = {kind: each[:, mask].numpy() for kind, each in volumes.items()}
    return found


def difference(voxels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of the first group minus mean of the second, (voxels,)."""
    first, second = (voxels[groups == name].mean(axis=0) for name in GROUPS)
    return first - second


def projection(made: np.ndarray, real: np.ndarray) -> float:
    """How much of the map `real` is in the map `made`: the slope of the regression on it."""
    return float(made @ real / (real @ real))


def kept(made: np.ndarray, real: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Projection of the group difference of `made` on that of `real`, (N, voxels), and its 95 % interval."""
    generator, found = np.random.default_rng(0), []
    places = [np.flatnonzero(groups == name) for name in GROUPS]
    for _ in range(DRAWS):
        drawn = np.concatenate([generator.choice(each, len(each)) for each in places])
        found.append(projection(*(difference(each[drawn], groups[drawn]) for each in (made, real))))
    low, high = np.percentile(found, (2.5, 97.5))
    return projection(difference(made, groups), difference(real, groups)), float(low), float(high)


def report(checkpoint: Path, settings) -> None:
    state = read_checkpoint(checkpoint, (STAGE,))
    for name, value in state["options"].items():  # as the run had them, but for where things are
        if name not in ("data_root", "cache_dir", "device"):
            setattr(settings, name, value)
    settings.resume_path = str(checkpoint)
    settings.validate()
    study, device = main.read_study(settings), main.choose_device(settings.device)
    backbone = open_backbone(settings, study, device, state, number_type(settings.precision, device))
    work = Refinement(settings, study, backbone, content_hash(backbone.network))
    members = [i for i in study.roles["test"] if study.pairs[i].group in GROUPS]
    groups = np.array([study.pairs[i].group for i in members])
    if set(groups) != set(GROUPS):
        sys.exit(f"this needs test subjects of both groups {GROUPS}; there are only those of {sorted(set(groups))}")
    if not all(study.has_pattern[i] for i in members):
        sys.exit("this needs the pattern masks of the test subjects: see opt.space and opt.pattern_file")
    counts = ", ".join(f"{(groups == name).sum()} {name}" for name in GROUPS)
    print(f"{'direction':<14} {'volume':<8} mean     RMS     kept (95 % interval); {counts}")
    for direction, values in inside(work, open_refined(state, device), members).items():
        for kind, voxels in values.items():
            ratio, low, high = kept(voxels, values["real"], groups)
            change = difference(voxels, groups)
            size = np.sqrt(np.square(change).mean())
            print(f"{direction:<14} {kind:<8} {change.mean():+.4f}  {size:.4f}  {ratio:.0%} ({low:.0%} .. {high:.0%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="best_refine.pth")
    own, rest = parser.parse_known_args()
    try:
        report(own.checkpoint, parse_arguments(opt, PRESETS, rest, "where the study and the cache are"))
    except main.REFUSALS as error:
        parser.error(str(error))

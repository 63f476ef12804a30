"""Can a classifier of diagnostic groups learn from synthetic pairs alone?

    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 100      (of a model with groups)
    python -m benchmarks.augmentation results/synthesis/joint/pairs.csv [any options of main.py, as the run had them]

A ridge classifier (scikit-learn; penalty by leave-one-out among what it is trained on) of both volumes of a pair,
smoothed by one voxel, is trained on the real training pairs, and on as many synthetic ones of each group, drawn at
random DRAWS times. It is tested on real subjects: the study's test subjects, and for the demo also FRESH new ones that
are rendered as the demo's are, because 12 subjects tell little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import balanced_accuracy_score
from tqdm import tqdm

import main
from data import phantom
from data.cache import Reading, cached_volume, load_volume
from data.derivatives import parameters
from data.pairs import Pair, find_pairs
from data.problems import refuse
from data.volumes import save_image
from opt import PRESETS, opt, small
from utils.arguments import parse_arguments

DRAWS = 20
FRESH = 120
PENALTIES = np.geomspace(1e1, 1e7, 25)


def features(pairs: list[Pair], readings: dict[str, Reading], cache: Path) -> np.ndarray:
    """(N, voxels of both modalities), smoothed by one voxel."""
    found = []
    for pair in pairs:
        volumes = [load_volume(cached_volume(pair.files[name], readings[name], cache)[0]) for name in readings]
        found.append(np.concatenate([gaussian_filter(volume, 1).ravel() for volume in volumes]))
    return np.stack(found)


def fresh_pairs(folder: Path) -> list[Pair]:
    """Subjects of the demo's kind that are not in the demo, written to `folder`."""
    subjects, pairs = phantom.anatomies(phantom.SUBJECTS, phantom.SUBJECTS + FRESH), []
    with ThreadPoolExecutor(2) as pool:
        for subject, scans in zip(tqdm(subjects, desc="new subjects"), pool.map(phantom.scan, subjects)):
            files = {name: folder / f"{subject.name}_{name}.nii.gz" for name in scans}
            for name, image in scans.items():
                save_image(files[name], image)
            pairs.append(Pair(subject.name, "", subject.group, None, files))
    return pairs


def groups_of(pairs: list[Pair]) -> np.ndarray:
    return np.array([pair.group for pair in pairs])


def alike(groups: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Positions of as many of each group as `wanted` has, at random; exits where there are too few."""
    chosen = []
    for name in sorted(set(wanted)):
        there, count = np.flatnonzero(groups == name), int((wanted == name).sum())
        if len(there) < count:
            sys.exit(f"this needs {count} synthetic pairs of group {name}; there are {len(there)}: draw more")
        chosen.append(generator.choice(there, count, replace=False))
    return np.concatenate(chosen)


def accuracies(train: tuple[np.ndarray, np.ndarray], tests: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Balanced accuracy of a classifier trained on (features, groups), on each of the tests."""
    classifier = RidgeClassifierCV(alphas=PENALTIES).fit(*train)
    return [float(balanced_accuracy_score(groups, classifier.predict(volumes))) for volumes, groups in tests.values()]


def report(table: Path, settings) -> None:
    settings.validate()
    study = main.read_study(settings)
    if parameters(table.parent).get("Training") != {"data": study.fingerprint, "split": study.split_fingerprint}:
        sys.exit(f"{table}: was not drawn by a model that was trained on these training subjects; give the settings of "
                 "its run (--fold, --data_root, ...)")
    _, _, readings = main.find_study(settings)
    synthetic, problems = find_pairs(table, study.modalities)
    refuse(problems)

    def known(pairs: list[Pair], cache: Path = Path(settings.cache_dir)) -> tuple[np.ndarray, np.ndarray]:
        if not all(groups := groups_of(pairs)):
            sys.exit("this needs pairs that all have a group")
        return features(pairs, readings, cache), groups

    real, made = known([study.pairs[i] for i in study.roles["train"]]), known(synthetic)
    tests = {"test subjects": known([study.pairs[i] for i in study.roles["test"]])}
    if settings.data_root == small().data_root:
        with tempfile.TemporaryDirectory() as folder:
            tests["new subjects"] = known(fresh_pairs(Path(folder)), Path(folder) / "cache")
    generator, chance = np.random.default_rng(0), 1 / len(set(real[1]))
    drawn = [alike(made[1], real[1], generator) for _ in range(DRAWS)]
    by_real = accuracies(real, tests)
    by_made = np.array([accuracies((made[0][places], made[1][places]), tests) for places in drawn])
    both = tuple(np.concatenate(parts) for parts in zip(real, made))
    counts = ", ".join(f"{len(test[1])} {name}" for name, test in tests.items())
    print(f"balanced accuracy on {counts}; chance {chance:.2f}")
    rows = {f"{len(real[1])} real pairs": (by_real, None),
            f"{len(real[1])} synthetic pairs, {DRAWS} draws": (by_made.mean(axis=0), by_made.std(axis=0)),
            f"all {len(made[1])} synthetic pairs": (accuracies(made, tests), None),
            f"{len(real[1])} real and all synthetic pairs": (accuracies(both, tests), None)}
    for name, (values, spread) in rows.items():
        cells = []
        for place, value in enumerate(values):
            kept = (value - chance) / (by_real[place] - chance) if by_real[place] > chance else float("nan")
            cells.append(f"{value:.3f}{'' if spread is None else f' +- {spread[place]:.3f}'} (kept {kept:.0%})")
        print(f"{name:<40} {'   '.join(cells)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", type=Path, help="pairs.csv of the tree that sample.py left")
    own, rest = parser.parse_known_args()
    report(own.table, parse_arguments(opt, PRESETS, rest, "the settings of the run"))

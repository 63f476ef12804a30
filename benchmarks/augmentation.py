"""Can a classifier of diagnostic groups learn from synthetic pairs alone?

    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 100      (of a model with groups)
    python -m benchmarks.augmentation results/synthesis/joint/pairs.csv [options of main.py, as the run had them]
    python -m benchmarks.augmentation results/synthesis/joint/pairs.csv --resume_path regression/best_refine.pth

Trains a ridge classifier (scikit-learn; penalty by leave-one-out on its training data) of both volumes of a pair,
smoothed by one voxel, on the real training pairs, and on random draws of as many synthetic pairs of each group. Tests
it on real subjects: the study's test subjects, and for the demo also on new ones rendered like the demo's, because 12
subjects say little. With --resume_path also on translations by that model, for example of a stage 2 trained with
--coarse none, a plain regression: each training pair twice, with one of its volumes made from the other.
"""

import itertools
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import balanced_accuracy_score
from tqdm import tqdm

from benchmarks import run_report
from data import demo
from data.alignment import Alignment
from data.cache import Reading, cached_volume, load_volume
from data.pairs import Pair, find_pairs
from data.problems import raise_if_fatal
from data.study import Study, find_study, read_study
from data.volumes import save_image
from models.diffusion import name_key
from synthesis.derivatives import parameters
from synthesis.model import TrainedModel, open_model
from training.launch import choose_device
from utils.errors import UserError

DRAWS = 20
NEW_SUBJECTS = 120
PENALTIES = np.geomspace(1e1, 1e7, 25)
Labelled = tuple[np.ndarray, np.ndarray]  # features (N, voxels of both modalities), groups (N,)


def labelled(pairs: list[Pair], readings: dict[str, Reading], alignment: Alignment, cache: Path) -> Labelled:
    """Features and groups of these pairs. Raises UserError where a pair has no group."""
    if without := [pair.name for pair in pairs if not pair.group]:
        raise UserError(f"{', '.join(without)}: no group; fill the column group for all pairs")
    features = [features_of(load_volume(cached_volume(pair.files[modality], reading, cache)[0]) for modality, reading
                            in alignment.readings(readings, pair.files).items()) for pair in pairs]
    return np.stack(features), np.array([pair.group for pair in pairs])


def features_of(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Of both volumes of a pair, (X, Y, Z) each."""
    return np.concatenate([gaussian_filter(np.nan_to_num(volume, nan=-1), 1).ravel() for volume in volumes])


def translated(model: TrainedModel, study: Study) -> Labelled:
    """Each training pair twice: with its first volume translated from the second, and the reverse."""
    features, groups = [], []
    for i in study.roles["train"]:
        real = {modality: volume[:, 0].numpy() for modality, volume in study.volumes([i]).items()}
        for source, target in itertools.permutations(study.modalities):
            made = model.translate(source, target, real[source], [name_key(study.pairs[i].name)])["synth"]
            features.append(features_of({**real, target: made}[modality][0] for modality in study.modalities))
            groups.append(study.pairs[i].group)
    return np.stack(features), np.array(groups)


def new_subjects(settings, folder: Path) -> list[Pair]:
    """Write subjects like the demo's, which the demo does not have; without any for another study."""
    if settings.data_root != demo.DEMO_ROOT:
        return []
    anatomies, pairs = [demo.Anatomy(demo.SUBJECTS + number) for number in range(NEW_SUBJECTS)], []
    with ThreadPoolExecutor(2) as pool:
        for anatomy, images in zip(tqdm(anatomies, desc="new subjects"), pool.map(demo.scan, anatomies)):
            files = {modality: folder / f"{anatomy.name}_{modality}.nii.gz" for modality in images}
            for modality, image in images.items():
                save_image(files[modality], image)
            pairs.append(Pair(anatomy.name, "", anatomy.group, None, files))
    return pairs


def draw_alike(groups: np.ndarray, like: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Random positions in `groups` of as many members of each group as `like` has. Raises UserError."""
    chosen = []
    for group in sorted(set(like)):
        members, count = np.flatnonzero(groups == group), int((like == group).sum())
        if len(members) < count:
            raise UserError(f"{len(members)} synthetic pairs of group {group}, but {count} are needed: draw more "
                            "(python sample.py --joint_samples)")
        chosen.append(random.choice(members, count, replace=False))
    return np.concatenate(chosen)


def accuracies(train: Labelled, tests: list[Labelled]) -> list[float]:
    """Balanced accuracy of a classifier on each of the tests."""
    classifier = RidgeClassifierCV(alphas=PENALTIES).fit(*train)
    return [float(balanced_accuracy_score(groups, classifier.predict(features))) for features, groups in tests]


def report(table: Path, settings) -> None:
    study, cache = read_study(settings), Path(settings.cache_dir)
    if parameters(table.parent).get("Training") != study.identity:
        raise UserError(f"{table}: drawn by a model that was trained on other subjects; give the settings of its run "
                        "(--fold, --data_root, ...)")
    readings = find_study(settings)[2]
    pairs, problems = find_pairs(table, study.modalities)
    raise_if_fatal(problems)

    def read(pairs: list[Pair], cache: Path) -> Labelled:
        return labelled(pairs, readings, study.alignment, cache)

    synthetic = read(pairs, cache)
    real, test = (read([study.pairs[i] for i in study.roles[role]], cache) for role in ("train", "test"))
    tests, names = [test], [f"{len(test[1])} test subjects"]
    with tempfile.TemporaryDirectory() as folder:
        if new := new_subjects(settings, Path(folder)):
            tests.append(read(new, Path(folder) / "cache"))
            names.append(f"{len(new)} new subjects")
    random, chance = np.random.default_rng(0), 1 / len(set(real[1]))
    draws = [draw_alike(synthetic[1], real[1], random) for _ in range(DRAWS)]
    by_draw = np.array([accuracies((synthetic[0][draw], synthetic[1][draw]), tests) for draw in draws])
    both = tuple(np.concatenate(parts) for parts in zip(real, synthetic))
    rows = {f"{len(real[1])} real pairs": accuracies(real, tests),
            f"{len(real[1])} synthetic pairs, {DRAWS} draws": by_draw.mean(axis=0),
            f"all {len(synthetic[1])} synthetic pairs": accuracies(synthetic, tests),
            f"{len(real[1])} real and all synthetic pairs": accuracies(both, tests)}
    print(f"balanced accuracy on {', '.join(names)} (kept: of the accuracy above chance, {chance:.2f}, with real "
          f"pairs); standard deviation over the draws {', '.join(f'{spread:.3f}' for spread in by_draw.std(axis=0))}")
    if settings.resume_path:
        model = open_model(settings, choose_device(settings.device))
        if model.provenance["Training"] != study.identity:
            raise UserError(f"opt.resume_path = {settings.resume_path!r}: was trained on other subjects")
        made = translated(model, study)
        rows |= {f"{len(made[1])} pairs, one volume translated": accuracies(made, tests),
                 f"{len(real[1])} real and these pairs": accuracies(
                     tuple(np.concatenate(parts) for parts in zip(real, made)), tests)}
    with_real = next(iter(rows.values()))
    for name, values in rows.items():
        cells = [f"{value:.3f} (kept {(value - chance) / (best - chance) if best > chance else float('nan'):.0%})"
                 for value, best in zip(values, with_real)]
        print(f"{name:<40} {'   '.join(cells)}")


if __name__ == "__main__":
    run_report(report, __doc__, "pairs.csv of the tree that sample.py wrote")

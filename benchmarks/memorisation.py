"""Are new pairs copies of training volumes? Held-out subjects show how close other subjects come to these.

    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 20
    python -m benchmarks.memorisation results/synthesis/joint --resume_path ./checkpoints/best_model.pth

Reads the study that the model was trained on; if that has moved, give --data_root. Writes memorisation.csv to the
folder. A distance is the root mean square difference of two volumes in [-1, 1]. A sample is flagged if it is closer to
a training volume than each of H held-out subjects; by chance, one of H + 1 samples is.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import open_run, run_report
from data.intensity import scale
from data.study import Study
from data.volumes import read_volume
from synthesis.derivatives import parameters, read_sidecars
from utils.errors import UserError
from utils.files import write_table
from utils.stop import interruptible

COLUMNS = ("subject", "modality", "nearest", "distance", "held_out_smallest", "held_out_median", "flagged")
BATCH = 64  # volumes in memory while the training set is read once


def nearest_training_volumes(study: Study, modality: str, volumes: Iterator[np.ndarray],
                             flips: bool) -> list[tuple[float, str]]:
    """(distance, pair) of the training volume closest to each volume (X, Y, Z). flips: mirrored ones count, too."""
    found = []
    while batch := list(itertools.islice(volumes, BATCH)):
        nearest, queries = [(np.inf, "")] * len(batch), np.stack(batch)
        seen = [i for i in study.trained_on if study.has(modality, i)]
        for i in interruptible(tqdm(seen, desc=f"comparing {modality}", disable=None, leave=False)):
            reference = study.volumes([i])[modality][0, 0].numpy()
            for flip in (1, -1) if flips else (1,):
                squares = np.nanmean(np.square(queries - reference[::flip]), axis=(1, 2, 3), dtype=np.float64)
                nearest = [min(best, (distance, study.pairs[i].name))
                           for best, distance in zip(nearest, np.sqrt(squares).tolist())]
        found += nearest
    return found


def report(folder: Path, settings) -> None:
    study, model = open_run(settings.resume_path, settings)
    if parameters(folder).get("Training") != study.identity:
        raise UserError(f"{folder}: no new pairs of the model opt.resume_path = {settings.resume_path!r}")
    held_out = sorted({*study.roles["validation"], *study.roles["test"]} - {*study.roles["train"]})
    if not held_out:
        raise UserError("there are no held-out subjects to compare with: the model was trained with opt.folds = 1")
    rows, tree = [], list(read_sidecars(folder))
    for modality in study.modalities:
        samples = [(path, sidecar["Subject"]) for path, sidecar in tree if sidecar["Direction"] == f"->{modality}"]
        nearest = nearest_training_volumes(study, modality, itertools.chain(
            (study.volumes([i])[modality][0, 0].numpy() for i in held_out),
            (scale(read_volume(path, "first").voxels, *model.ranges[modality]) for path, _ in samples)),
            "flip" in settings.augment)
        others, nearest = [distance for distance, _ in nearest[:len(held_out)]], nearest[len(held_out):]
        smallest, median = min(others), float(np.median(others))
        flagged = [subject for (_, subject), (distance, _) in zip(samples, nearest) if distance < smallest]
        rows += [{"subject": subject, "modality": modality, "nearest": name, "distance": distance,
                  "held_out_smallest": smallest, "held_out_median": median,
                  "flagged": "yes" if subject in flagged else "no"}
                 for (_, subject), (distance, name) in zip(samples, nearest)]
        print(f"{modality}: {len(flagged)} of {len(samples)} samples are closer to a training volume than any held-out "
              f"subject ({smallest:.3f}){': ' * bool(flagged)}{', '.join(flagged[:5])}; about "
              f"{len(samples) / (len(held_out) + 1):.1f} are expected by chance. Median distance: samples "
              f"{np.median([distance for distance, _ in nearest]):.3f}, held-out subjects {median:.3f}")
    write_table(folder / "memorisation.csv", COLUMNS, rows, ".5f")


if __name__ == "__main__":
    run_report(report, __doc__, "folder of the new pairs that sample.py drew")

"""Are joint samples copies of training volumes? Distances to the nearest of them, beside those of held-out subjects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.intensity import scale
from data.pairs import find_pairs
from data.problems import DataError, PairError, Problem, refuse
from data.split import split_subjects
from data.study import Study
from data.volumes import read_volume
from synthesis import Model
from utils.files import write_table
from utils.metrics import nearest

COLUMNS = ("subject", "modality", "nearest", "distance", "held_out_smallest", "held_out_median", "flagged")
AT_ONCE = 64  # volumes in memory


def training_study(opt, model: Model) -> Study:
    """The pairs that the model was trained on, from opt.data_root. Raises DataError where it does not hold them."""
    pairs, problems = find_pairs(Path(opt.data_root), model.names, tuple(opt.exclude), opt.bids_suffix)
    refuse(problems)
    study = Study(pairs, split_subjects(pairs, **model.split), model.readings, model.cache)
    if (study.fingerprint, study.split_fingerprint) != (model.fingerprints["data"], model.fingerprints["split"]):
        raise PairError(Problem(f"opt.data_root = {opt.data_root!r}", "does not hold the pairs that the model was "
                                "trained on, or not all, or others", "name the study that it was trained on"))
    return study


def check_memorisation(opt, model: Model, samples: list[tuple[str, str, Path]], folder: Path,
                       watch: Callable) -> list[str]:
    """memorisation.csv; returns lines to print. samples: (name, modality, file) of each volume.

    A sample is flagged that is nearer (root mean square difference, of [-1, 1]) to a training volume than every
    held-out subject is; of H held-out ones, that happens to one of H + 1 samples by chance. Where training flipped
    volumes, mirrored ones count as well. Without the training volumes, or held-out ones, the lines say so.
    """
    table = folder / "memorisation.csv"
    try:
        study = training_study(opt, model)
    except DataError as error:
        table.unlink(missing_ok=True)  # of other samples
        return [f"note: not checked for copies of training volumes: opt.data_root = {opt.data_root!r} is not the study "
                f"that the model was trained on, or cannot be read as it was then ({error})"]
    train = study.roles["train"]
    held_out = sorted(set(study.roles["validation"] + study.roles["test"]) - set(train))
    if not held_out:
        table.unlink(missing_ok=True)
        return ["note: not checked for copies of training volumes: no subject was held out to compare with"]
    rows, lines = [], []
    for name in model.names:
        mine = [(subject, file) for subject, modality, file in samples if modality == name]
        found, smallest = _compared(model, study, name, mine, held_out, watch)
        flagged = [row["subject"] for row in found if row["flagged"] == "yes"]
        named = f" ({', '.join(flagged[:5])}{' ...' if len(flagged) > 5 else ''})" if flagged else ""
        usual = np.median([row["distance"] for row in found])
        lines.append(f"{name}: nearest training volume at {usual:.3f} (median), of {len(held_out)} held-out subjects "
                     f"at {found[0]['held_out_median']:.3f}; nearer than all of these ({smallest:.3f}): {len(flagged)} "
                     f"of {len(found)}{named}; by chance {len(found) / (len(held_out) + 1):.1f} would be")
        rows += found
    write_table(table, COLUMNS, rows, ".5f")
    return lines


def _compared(model: Model, study: Study, name: str, samples: list[tuple[str, Path]], held_out: list[int],
              watch: Callable) -> tuple[list[dict], float]:
    """Rows of memorisation.csv of one modality, and the smallest distance of a held-out subject."""
    real = [distance for i in held_out for distance, _ in _nearest(model, study, name, _real(study, name, i)[None])]
    rows, parts = [], [samples[start:start + AT_ONCE] for start in range(0, len(samples), AT_ONCE)]
    for part in watch(tqdm(parts, desc=f"looking for copies, {name}", disable=None, leave=False)):
        volumes = np.stack([scale(read_volume(file, "first").voxels, *model.ranges[name]) for _, file in part])
        rows += [{"subject": subject, "modality": name, "nearest": nearest_one, "distance": distance,
                  "held_out_smallest": min(real), "held_out_median": float(np.median(real)),
                  "flagged": "yes" if distance < min(real) else "no"}
                 for (subject, _), (distance, nearest_one) in zip(part, _nearest(model, study, name, volumes))]
    return rows, min(real)


def _nearest(model: Model, study: Study, name: str, volumes: np.ndarray) -> list[tuple[float, str]]:
    """Distance to the nearest training volume, and whose it is, of each of the volumes (N, X, Y, Z)."""
    train, mirrored = study.roles["train"], (False, True) if model.flipped else (False,)
    others = (np.flip(volume, 0) if flip else volume
              for volume in (_real(study, name, i) for i in train) for flip in mirrored)
    return [(float(distance), study.pairs[train[place // len(mirrored)]].name)
            for distance, place in zip(*nearest(volumes, others))]


def _real(study: Study, name: str, i: int) -> np.ndarray:
    return study.volumes([i])[name][0, 0].numpy()

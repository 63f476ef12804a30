"""Are joint samples copies of training volumes? Distances to the nearest of them, beside those of held-out subjects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.intensity import scale
from data.pairs import find_pairs
from data.problems import DataError, refuse
from data.split import split_subjects
from data.study import Study
from data.volumes import read_volume
from synthesis import Model
from utils.files import write_table
from utils.metrics import nearest

COLUMNS = ("subject", "modality", "nearest", "distance", "held_out_smallest", "held_out_median", "flagged")
AT_ONCE = 64  # samples in memory


def training_study(opt, model: Model) -> Study:
    """The pairs that the model was trained on, from opt.data_root. Raises DataError where it does not hold them."""
    split = dict(model.split)
    pairs, problems = find_pairs(Path(opt.data_root), model.names, tuple(opt.exclude), opt.bids_suffix)
    refuse(problems)
    study = Study(pairs, split_subjects(pairs, **split), model.readings, model.cache)
    if (study.fingerprint, study.split_fingerprint) != (model.fingerprints["data"], model.fingerprints["split"]):
        raise DataError()
    return study


def check_memorisation(opt, model: Model, samples: list[tuple[str, str, Path]], folder: Path, watch: Callable) -> str:
    """memorisation.csv; returns a summary. samples: (name, modality, file) of each volume.

    A sample is flagged that is nearer (root mean square difference, of [-1, 1]) to a training volume than every
    held-out subject is. Without the training volumes, or held-out ones, the summary says so.
    """
    try:
        study = training_study(opt, model)
    except DataError:
        return (f"note: not checked for copies of training volumes: opt.data_root = {opt.data_root!r} does not hold "
                "the pairs that the model was trained on, as it was trained on them")
    train = study.roles["train"]
    held_out = sorted(set(study.roles["validation"] + study.roles["test"]) - set(train))
    if not held_out:
        return "note: not checked for copies of training volumes: no subject was held out to compare with"
    rows, lines = [], []
    for name in model.names:
        real, _ = nearest(_real(study, name, held_out), (_real(study, name, [i])[0] for i in train))
        mine = [(subject, file) for subject, modality, file in samples if modality == name]
        parts = [mine[start:start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
        for part in watch(tqdm(parts, desc=f"memorisation, {name}", disable=None, leave=False)):
            volumes = np.stack([scale(read_volume(file, "first").voxels, *model.ranges[name]) for _, file in part])
            found = nearest(volumes, (_real(study, name, [i])[0] for i in train))
            rows += [{"subject": subject, "modality": name, "nearest": study.pairs[train[place]].name,
                      "distance": float(distance), "held_out_smallest": float(real.min()),
                      "held_out_median": float(np.median(real)), "flagged": "yes" if distance < real.min() else "no"}
                     for (subject, _), distance, place in zip(part, *found)]
        distances = np.array([row["distance"] for row in rows if row["modality"] == name])
        flagged = [row["subject"] for row in rows if row["modality"] == name and row["flagged"] == "yes"]
        named = f" ({', '.join(flagged[:5])}{' ...' if len(flagged) > 5 else ''})" if flagged else ""
        lines.append(f"{name}: nearest training volume at {np.median(distances):.3f} (median), of {len(held_out)} "
                     f"held-out subjects at {np.median(real):.3f}; nearer than all of these: {len(flagged)} of "
                     f"{len(distances)}{named}")
    write_table(folder / "memorisation.csv", COLUMNS, rows, ".5f")
    return "\n".join(lines)


def _real(study: Study, name: str, positions: list[int]) -> np.ndarray:
    return study.volumes(positions)[name][:, 0].numpy()

"""`python main.py --check`: read every volume to its end, train nothing, and report all problems of a study at once."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data.alignment import Alignment, align, misalignment
from data.atlas import empty_regions, outside_rois, pattern_mask, roi_centres, unreadable_labels, uses_rois, voxels_at
from data.cache import Reading, content, doubts, identical_scans, to_grid
from data.grids import spacing_of
from data.overlay import PAIRS_SHOWN, overlay, save_overlays
from data.pairs import Pair, described
from data.problems import SMALLEST_AXIS, DataError, Problem, VolumeError, or_leave_out
from data.split import groups_to_learn
from data.study import find_study, split_study
from data.volumes import read_volume
from utils.files import write_table
from utils.stop import interruptible

KINDS_SHOWN = 5
OTHER_BACKGROUND = 0.5  # of the range -1 .. 1: so far from that of most scans, it is another contrast
COLUMNS = ("subject", "where", "what", "remedy", "fatal")


def check_study(opt) -> bool:
    """Print all problems and a summary, write check.csv and check.png; returns whether training can start.

    Raises Interrupted.
    """
    pairs, problems, readings = find_study(opt)
    alignment, files, overlays = None, {modality: [] for modality in readings}, []
    if any(pair.is_complete for pair in pairs):  # otherwise find_study has said so
        try:
            pairs, roles, warnings = split_study(opt, pairs)
            problems += warnings + [
                Problem(pairs[i].name, f"has only {', '.join(pairs[i].files)}, so it is used in training alone",
                        'if it has both, give them the same subject and session; opt.incomplete = "leave_out" leaves '
                        "it out", pairs[i].name, fatal=False) for i in roles.get("incomplete", [])]
            groups_to_learn(opt, pairs, roles)
            problems += empty_regions(opt, [pairs[i] for i in roles["test"]])
        except DataError as error:
            problems += error.problems
    try:
        alignment = align(opt, pairs)
    except DataError as error:  # then only what each file has of its own is looked at
        problems += error.problems
    for pair in interruptible(tqdm(pairs, desc="reading", unit="pair", disable=None)):
        examined, found = _examine(pair, readings, alignment)
        problems += [or_leave_out(problem, pair.is_complete) for problem in found]
        for modality, file in examined.items():
            files[modality].append(file)
        scans = {modality: vars(file).pop("scan") for modality, file in examined.items()}
        if alignment and len(scans) == len(readings) and not any(problem.fatal for problem in found):
            found, warnings = overlay(pair, alignment, scans)
            overlays = sorted([*overlays, found], key=lambda each: each.similarity)[:PAIRS_SHOWN]
            problems += warnings
    problems += unreadable_labels(opt, pairs) + _outside_rois(opt, itertools.chain(*files.values())) + identical_scans(
        (file.pair, modality, *file.contents) for modality, listed in files.items() for file in listed)
    how = f"brought together {alignment}" if alignment else "which cannot be brought together"
    print(f"{described(pairs)}, {how}")
    sizes, fits = {}, True
    for modality, listed in files.items():
        print(f"{modality}: {counted(listed, 'volume')} read to the end")
        if listed and alignment:
            sizes[modality], found = _describe(listed, readings[modality], alignment)
            problems += found
            fits = fits and all(file.size == sizes[modality] for file in listed)
    if len(sizes) == len(files):
        print("suggested: --image_size", *(f"{modality}={_x(size)}" for modality, size in sizes.items()),
              *(("--box_size", *map("{:g}".format, alignment.box)) if alignment.how == "world" else
                () if fits or opt.resize != "none" else ("--resize", "resample")))
    problems.sort(key=lambda problem: not problem.fatal)
    table = Path(opt.result_dir) / "check.csv"
    write_table(table, COLUMNS, map(vars, problems))
    for problem in problems:
        print(f"{'error' if problem.fatal else 'warning'}: {problem.where}: {problem.what}\n  -> {problem.remedy}")
    if overlays:
        path = Path(opt.result_dir) / "check.png"
        save_overlays(path, overlays)
        print(f"look at {path}: the outline of each scan over the other one")
    errors, warnings = ([problem for problem in problems if problem.fatal == fatal] for fatal in (True, False))
    following = ("correct the errors, and check again" if errors else "the same command without --check, with the "
                 "options suggested above, or your own choice, and its own --checkpoint_dir and --result_dir")
    print(f"{'not ready' if errors else 'ready to train'}: {counted(errors, 'error')}, {counted(warnings, 'warning')}, "
          f"listed in {table}\nNext: {following}")
    return not errors


def _examine(pair: Pair, readings: dict[str, Reading],
             alignment: Alignment | None) -> tuple[dict[str, SimpleNamespace], list[Problem]]:
    """Read both files of a pair as training would, but never from the cache; returns the readable ones and problems."""
    files, grids, problems = {}, [], []
    try:
        readings = alignment.readings(readings, pair.files) if alignment else readings
    except VolumeError:  # found again below
        pass
    except DataError as error:
        problems += [dataclasses.replace(problem, subject=pair.name) for problem in error.problems]
    for modality, path in pair.files.items():
        reading = readings[modality]
        try:
            scan = read_volume(path, reading.reduce)
            if not (alignment and (reading.affine or reading.resize != "none")):  # other problems must not be hidden
                reading = dataclasses.replace(reading, size=None)
            volume, low, high, affine = to_grid(scan, path, reading)
        except DataError as error:
            problems += [dataclasses.replace(problem, subject=pair.name) for problem in error.problems]
            continue
        grids.append((affine, volume.shape))
        files[modality] = SimpleNamespace(
            pair=pair, path=path, size=scan.voxels.shape, spacing=spacing_of(scan.affine), low=low, high=high,
            grid=grids[-1], background=_background(volume), orientation=scan.orientation, scan=scan,
            time_points=scan.time_points,
            contents=(content(scan.voxels), content(volume)))
        problems += doubts(pair, modality, scan.doubts)
    if len(grids) == 2 and alignment and alignment.how == "grid" and (warning := misalignment(pair, *grids)):
        problems.append(warning)
    return files, problems


def _background(volume: np.ndarray) -> float:
    """Median over the six faces of a volume (X, Y, Z); NaN where the scan sees none of them."""
    faces = np.concatenate([volume.take(place, axis).ravel() for axis in range(3) for place in (0, -1)])
    seen = faces[~np.isnan(faces)]
    return float(np.median(seen)) if seen.size else np.nan


def _outside_rois(opt, files: Iterable[SimpleNamespace]) -> list[Problem]:
    """The scans whose masks of opt.pattern_networks would be empty."""
    centres, in_rois, problems = roi_centres(opt.pattern_networks), {}, []
    for file in interruptible([file for file in files if uses_rois(opt, file.pair)]):
        affine, size = file.grid
        key = size, affine.round(4).tobytes()  # many scans have the same grid
        if key not in in_rois:
            in_rois[key] = (len(voxels_at(size, affine, centres)) > 0  # the rule, and fast
                            or pattern_mask(size, affine, centres, opt.pattern_radius).any())
        if not in_rois[key]:
            problems.append(outside_rois(file.pair, file.path))
    return problems


def _describe(files: list[SimpleNamespace], reading: Reading,
              alignment: Alignment) -> tuple[tuple[int, ...], list[Problem]]:
    """Print a summary of the files of one modality; returns the image_size that suits them, and all wrong sizes."""
    for label, values in (("size (RAS)", [_x(file.size) for file in files]),
                          ("spacing (mm)", [_x(file.spacing.round(3)) for file in files]),
                          ("orientation", [file.orientation for file in files]),
                          ("time points", [file.time_points for file in files])):
        kinds = Counter(values).most_common()
        print(f"  {label}:", ", ".join(f"{value} ({count})" for value, count in kinds[:KINDS_SHOWN]),
              *([f"and {len(kinds) - KINDS_SHOWN} more"] if len(kinds) > KINDS_SHOWN else []))
    low, high = [file.low for file in files], [file.high for file in files]
    print(f"  intensity that becomes -1: {min(low):.4g} .. {max(low):.4g}; 1: {min(high):.4g} .. {max(high):.4g}")
    complete = [file for file in files if file.pair.is_complete] or files  # say what is usual
    usual, problems = Counter(file.size for file in complete).most_common(1)[0][0], []
    if alignment.how == "world":  # voxels of the box as large as the files' are
        usual = np.rint(alignment.box / np.median([file.spacing for file in complete], axis=0)).astype(int).tolist()
    elif reading.resize == "none":
        problems = [or_leave_out(Problem(
            str(file.path), f"has size {_x(file.size)}, most have {_x(usual)}", 'set opt.resize = "resample" or '
            '"pad_crop", or exclude the subject (opt.exclude)', file.pair.name), file.pair.is_complete)
            for file in files if file.size != usual]
        if reading.size and usual != reading.size:
            problems.append(Problem(f"opt.image_size ({reading.modality})", f"is {_x(reading.size)}, but most volumes "
                                    f"have {_x(usual)}", "set it as suggested, or choose another opt.resize", "all"))
    known = [file.background for file in complete if not np.isnan(file.background)]
    most = np.median(known) if known else np.nan
    if 2 * sum(abs(background - most) <= OTHER_BACKGROUND for background in known) <= len(known):
        most = np.nan  # there is no majority: nothing is said
    problems += [Problem(str(file.path), f"its outermost voxels have the intensity {file.background:.2f} (of -1 .. 1), "
                         f"those of most scans {most:.2f}", "look at it: if air is grey in it, it is another kind of "
                         "image, and may make air grey in synthesised volumes; exclude the subject (opt.exclude)",
                         file.pair.name, fatal=False)
                 for file in files if abs(file.background - most) > OTHER_BACKGROUND]
    return tuple(max(n, SMALLEST_AXIS) for n in usual), problems


def counted(things: list, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _x(numbers: Iterable[float]) -> str:
    return "x".join(f"{n:g}" for n in numbers)

"""`python main.py --check`: every volume read to its end, nothing trained, all problems told at once."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import Reading, content, identical_scans, to_grid
from data.grids import spacing_of
from data.intensity import normalise
from data.pairs import Pair
from data.problems import DataError, Problem
from data.study import fields_apart, repaired
from data.volumes import Scan, read_volume
from utils.files import write_table

COLUMNS = ("subject", "file", "what", "remedy", "fatal")
LARGE = 10**6  # voxels: above this a smaller image_size is suggested; the paper's larger grid has 552,960


@dataclass(frozen=True)
class Seen:
    """What one file turned out to be; voxels are not kept."""

    size: tuple[int, int, int]  # of the file, in RAS order
    spacing: np.ndarray  # mm
    grid: tuple[np.ndarray, tuple[int, int, int]]  # affine and size, as training would see it
    orientation: str
    time_points: int
    low: float
    high: float
    repaired: int
    content: str


def examine(pair: Pair, reading: Reading) -> Seen | list[Problem]:
    """Read one file of a pair as training would, but from the file itself."""
    path = pair.files[reading.modality]
    try:
        scan: Scan = read_volume(path, reading.reduce)
        affine = scan.affine
        if scan.voxels.shape == reading.size or (reading.size and reading.resize != "none"):
            volume, low, high, affine = to_grid(scan, path, reading)
        else:  # training would refuse its size; what else is wrong is told all the same
            volume, low, high = normalise(scan.voxels, path, reading.intensity)
    except DataError as error:
        return [dataclasses.replace(problem, subject=pair.name) for problem in error.problems]
    return Seen(scan.voxels.shape, spacing_of(scan.affine), (affine, volume.shape), scan.orientation, scan.time_points,
                low, high, scan.repaired, content(volume))


def check_study(pairs: list[Pair], problems: list[Problem], readings: dict[str, Reading], smallest_axis: int,
                progress: Callable[[Iterable], Iterable]) -> tuple[list[Problem], str]:
    """All problems of a study, those that `find_pairs` found included, and a summary for people.

    smallest_axis: voxels; no smaller size is suggested.
    """
    problems, found = list(problems), {name: {} for name in readings}
    tasks = [(pair, reading) for pair in pairs for reading in readings.values()]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (pair, reading), seen in zip(tasks, progress(pool.map(lambda task: examine(*task), tasks))):
            if isinstance(seen, list):
                problems += seen
            else:
                found[reading.modality][pair.name] = seen
    by_name = {pair.name: pair for pair in pairs}
    for name, reading in readings.items():
        problems += _sizes(found[name], by_name, reading)
        problems += [repaired(by_name[who], name, seen.repaired) for who, seen in found[name].items() if seen.repaired]
        problems += [Problem(str(by_name[who].files[name]), "its header tells no orientation",
                             "NIfTI's default is taken; make sure that left and right are right", who, fatal=False)
                     for who, seen in found[name].items() if seen.orientation == "?"]
    problems += identical_scans((who, by_name[who].files[name], found[name][who].content)
                                for who in by_name for name in readings if who in found[name])
    for pair in pairs:
        grids = {name: found[name][pair.name].grid for name in readings if pair.name in found[name]}
        if len(grids) == 2 and (apart := fields_apart(pair, grids)):
            problems.append(apart)
    return problems, _summary(found, len(pairs), smallest_axis)


def _sizes(found: dict[str, Seen], by_name: dict[str, Pair], reading: Reading) -> list[Problem]:
    """One problem where image_size is not what most volumes have, and one for each volume that differs from these."""
    if not found or reading.resize != "none":
        return []
    usual, problems = _usual_size(found), []
    if reading.size and usual != reading.size:
        problems.append(Problem(
            f"opt.image_size ({reading.modality})", f"is {_x(reading.size)}, and most volumes have {_x(usual)}",
            "set it as suggested below, or choose another opt.resize", "all"))
    for who, seen in found.items():
        if seen.size != usual:
            problems.append(Problem(
                str(by_name[who].files[reading.modality]), f"has size {_x(seen.size)}, most have {_x(usual)}",
                'set opt.resize = "resample" or "pad_crop", or leave the subject out (opt.exclude)', who))
    return problems


def _usual_size(found: dict[str, Seen]) -> tuple[int, int, int]:
    return Counter(seen.size for seen in found.values()).most_common(1)[0][0]


def _x(numbers: Iterable, digits: int = 0) -> str:
    return "x".join(f"{n:.{digits}f}".rstrip("0").rstrip(".") if digits else str(n) for n in numbers)


def _counted(labels: Iterable[str]) -> str:
    counts = Counter(labels).most_common()
    told = ", ".join(f"{label} ({count})" for label, count in counts[:4])
    return told + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


def _summary(found: dict[str, dict[str, Seen]], pairs: int, smallest_axis: int) -> str:
    lines = [f"{pairs} pairs"]
    suggested = {}
    for name, by_subject in found.items():
        every = list(by_subject.values())
        lines.append(f"{name}: {len(every)} volumes read to their end")
        if not every:
            continue
        low, high = np.array([seen.low for seen in every]), np.array([seen.high for seen in every])
        lines += [f"  size (RAS)   {_counted(_x(seen.size) for seen in every)}",
                  f"  spacing, mm  {_counted(_x(seen.spacing, 3) for seen in every)}",
                  f"  orientation  {_counted(seen.orientation for seen in every)}",
                  f"  time points  {_counted(str(seen.time_points) for seen in every)}",
                  f"  intensities  -1 is {low.min():.4g} .. {low.max():.4g}, 1 is {high.min():.4g} .. {high.max():.4g}"]
        suggested[name] = _usual_size(by_subject)
        if len({seen.size for seen in every}) > 1:
            spacings = {tuple(seen.spacing.round(2)) for seen in every}
            lines.append(f'  sizes differ: opt.resize = "{"resample" if len(spacings) > 1 else "pad_crop"}" brings '
                         "all to one")
        usual, voxels = suggested[name], np.prod(suggested[name])
        if voxels > LARGE:
            lines.append(f"  its {voxels / 1e6:.1f} million voxels need much memory and time: a smaller size is "
                         "suggested")
            suggested[name] = tuple(int(n * (LARGE / voxels) ** (1 / 3)) for n in usual)
        suggested[name] = tuple(max(n, smallest_axis) for n in suggested[name])
        if suggested[name] != usual:
            lines.append('  the suggested size needs opt.resize = "resample"')
    if len(suggested) == len(found):
        lines.append("suggested: --image_size " + " ".join(f"{name}={_x(size)}" for name, size in suggested.items()))
    return "\n".join(lines)


def table(problems: list[Problem], root: Path) -> str:
    """All problems for people, nothing cut; files below `root`, or beside it where it is a table, without its path."""
    folder = f"{root if root.is_dir() else root.parent}/"
    rows = [(problem.subject or "-", problem.where.removeprefix(folder), problem.what.replace(f" {folder}", " "),
             problem.remedy) for problem in problems]
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(2)]
    lines = [f"{subject:<{widths[0]}}  {file:<{widths[1]}}  {what}\n{'':<{sum(widths) + 4}}-> {remedy}"
             for subject, file, what, remedy in rows]
    return "\n".join([f"{COLUMNS[0]:<{widths[0]}}  {COLUMNS[1]:<{widths[1]}}  {COLUMNS[2]}, -> {COLUMNS[3]}", *lines])


def write_problems(path: Path, problems: list[Problem]) -> None:
    """The same table as CSV; fatal: whether training would be refused."""
    write_table(path, COLUMNS, [dict(zip(COLUMNS, (p.subject, p.where, p.what, p.remedy, p.fatal))) for p in problems])

"""What sample.py tells of what it made: tables, a calibration chart, a page of pictures, and lines to print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.derivatives import Job, all_told, told
from data.grids import spacing_of
from data.intensity import scale
from data.volumes import read_volume
from memorisation import check_memorisation
from synthesis import Model
from utils.figures import Panel, save_chart, save_grid
from utils.files import write_table, write_text
from utils.metrics import quality, write_metrics

SHOWN = 6  # visits, or new pairs, on the page of pictures
FEW_VOXELS = 200  # a bin with fewer is not drawn into the calibration chart


def report_translations(folder: Path) -> list[str]:
    """metrics.csv, uncertainty.csv and calibration.png of all in the tree whose truth was known; lines to print."""
    kinds = {"synth": "synthesised", "mean": "averaged"}
    scored = [(facts["Subject"], facts["Direction"], kind, facts["Scores"])
              for kind in kinds for _, facts in all_told(folder, kind) if facts.get("Scores")]
    if not scored:
        return []
    write_metrics(folder / "metrics.csv", [
        {"subject": subject, "direction": direction, "volume": kinds[kind], "region": region, **values}
        for subject, direction, kind, scores in scored for region, values in scores.items()])
    lines = []
    for direction, kind in dict.fromkeys((direction, kind) for _, direction, kind, _ in scored):
        mine = [scores["volume"] for _, *each, scores in scored if each == [direction, kind]]
        psnr, ssim = (np.array([each[name] for each in mine]) for name in ("psnr", "ssim"))
        lines.append(f"{direction}, {kinds[kind]}: {psnr.mean():.2f} +- {psnr.std():.2f} dB, SSIM {ssim.mean():.3f} +- "
                     f"{ssim.std():.3f} ({len(mine)} with a truth)")
    known = [(facts["Subject"], facts["Direction"], facts["Reliability"]) for _, facts in all_told(folder, "std")
             if facts.get("Reliability")]
    return lines + (report_uncertainty(known, folder) if known else [])


def report_uncertainty(known: list[tuple[str, str, dict]], folder: Path) -> list[str]:
    """uncertainty.csv and calibration.png from (subject, direction, reliability); a line for each direction."""
    rows, curves, lines = [], {}, []
    for subject, direction, found in known:
        count, variance, error = np.sum(found["bins"], axis=0)
        rows.append({"subject": subject, "direction": direction, "deviation": np.sqrt(variance / count),
                     "error": np.sqrt(error / count), "rank_correlation": found["rank_correlation"]})
    write_table(folder / "uncertainty.csv", tuple(rows[0]), rows, ".5f")
    for direction in dict.fromkeys(direction for _, direction, _ in known):
        bins = np.sum([found["bins"] for _, each, found in known if each == direction], axis=0)
        count, variance, error = bins[bins[:, 0] >= FEW_VOXELS].T
        if len(count):
            curves[direction] = np.sqrt(variance / count), np.sqrt(error / count)
        mine = [row["rank_correlation"] for row in rows if row["direction"] == direction]
        total = np.sqrt(bins[:, 1:].sum(axis=0) / bins[:, 0].sum())
        lines.append(f"{direction}: deviation {total[0]:.3f}, error {total[1]:.3f} (root mean squares in the brain, of "
                     f"[-1, 1]); their rank correlation {np.mean(mine):.2f} ({min(mine):.2f} .. {max(mine):.2f})")
    if curves:
        save_chart(folder / "calibration.png", "Is the deviation as large as the error? Brain voxels, of [-1, 1]",
                   ("expected: the K samples' standard deviation x sqrt(1 + 1 / K)",
                    "found: root mean square error of desc-mean"), curves)
    return lines


def report_pairs(opt, model: Model, folder: Path, watch: Callable) -> list[str]:
    """pairs.csv, from which PDS can train, participants.tsv, and memorisation.csv, of all pairs that are in the tree;
    returns lines to print."""
    there = list(all_told(folder, "synth"))
    pairs = list(dict.fromkeys((facts["Subject"], facts["MadeWith"]["Group"]) for _, facts in there))
    files = {(facts["Subject"], facts["Modality"]): path.relative_to(folder).as_posix() for path, facts in there}
    write_table(folder / "pairs.csv", ("subject", "group", *model.names), [
        {"subject": subject, "group": group, **{name: files.get((subject, name), "") for name in model.names}}
        for subject, group in pairs])
    write_text(folder / "participants.tsv", "participant_id\tgroup\n"
               + "".join(f"{subject}\t{group or 'n/a'}\n" for subject, group in pairs))
    samples = [(facts["Subject"], facts["Modality"], path) for path, facts in there]
    return check_memorisation(opt, model, samples, folder, watch)


def picture(jobs: list[Job], model: Model, path: Path) -> None:
    """One page of some volumes: source, synthesised, deviation, and where it is known the truth and the difference."""
    rows, columns = [], ["source", "synthesised", "truth", "difference", "deviation"]
    visits = list({job.pair.name: [each for each in jobs if each.pair == job.pair] for job in jobs}.values())
    shown = [visits[place] for place in sorted({round(x) for x in np.linspace(0, len(visits) - 1, SHOWN)})]
    for job in (job for visit in shown for job in visit):
        scan, files, (low, high) = read_volume(job.path(), "first"), job.pair.files, model.ranges[job.target]
        panels = dict.fromkeys(columns)
        made = panels["synthesised"] = Panel(scale(scan.voxels, low, high), spacing_of(scan.affine))
        for column, name in (("source", job.source), ("truth", job.target)):
            if name in files:
                volume, facts = model.read(name, files[name])
                panels[column] = Panel(volume, spacing_of(np.array(facts["affine"])))
        scores, truth = told(job.path()).get("Scores", {}).get("volume"), panels["truth"]
        if scores:
            made.caption = quality(scores)
        if truth and truth.volume.shape == made.volume.shape:
            panels["difference"] = Panel(made.volume - truth.volume, truth.spacing, "", "difference")
        if told(job.path("std")):
            deviation = read_volume(job.path("std"), "first").voxels / (high - low) * 2
            panels["deviation"] = Panel(deviation, made.spacing, "", "deviation")
        about = job.direction.replace("->", " -> ") if job.source else f"{job.target}\n{job.pair.group}"
        rows.append((f"{job.pair.name}\n{about}", panels))
    columns = [name for name in columns if any(panels[name] for _, panels in rows)]
    save_grid(path, f"{len(rows)} of {len(jobs)} volumes", columns,
              [(name, [panels[column] for column in columns]) for name, panels in rows])

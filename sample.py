"""Use a trained model: translate subjects of whom one modality is missing, or draw new pairs.

    python sample.py --resume_path ./checkpoints/best_refine.pth --data_root new_subjects.csv
    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 20
    torchrun --nproc-per-node 4 sample.py ...                                    the same, on four devices

Leaves a BIDS derivatives tree in opt.sample_dir: volumes, a JSON beside each, tables, and a page of pictures. What is
there already, whole and made the same way, is not made again. Exit status: as that of main.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from data.derivatives import (
    begin_tree,
    label,
    refuse_same_place,
    tell,
    told,
    volume_path,
    whole,
    write_on_grid,
)
from data.grids import spacing_of
from data.intensity import brain_region, scale, to_units
from data.pairs import Pair, find_visits
from data.problems import refuse
from data.volumes import read_volume, write_volume
from memorisation import check_memorisation
from models.diffusion import name_key
from opt import PRESETS, OptionError, opt
from program import FINISHED, choose_device, guarded
from synthesis import Model
from utils.arguments import parse_arguments
from utils.distributed import first_on_each_machine, joined, share, wait, writes
from utils.figures import Panel, save_chart, save_grid
from utils.files import make_writable, remove_strays, sole_writer, write_table, write_text
from utils.metrics import quality, reliability, score, write_metrics
from utils.optimise import Interrupted, StopRequest, leave

SHOWN = 12  # volumes on the page of pictures
FEW_VOXELS = 200  # a bin with fewer is not drawn into the calibration chart


@dataclass(frozen=True)
class Job:
    """One volume to make: `target` of a visit from its `source`, or of a joint sample where there is none."""

    pair: Pair
    source: str
    target: str
    key: tuple[int, ...]  # of the noise
    folder: Path

    def path(self, description: str = "synth") -> Path:
        return volume_path(self.folder, self.pair, self.target, description)

    @property
    def direction(self) -> str:
        return f"{self.source}->{self.target}"


def translations(opt, model: Model, folder: Path) -> list[Job]:
    """What to make of each visit in opt.data_root: the modality it lacks, or, to be scored, both. Raises PairError."""
    visits, problems = find_visits(Path(opt.data_root), model.names, tuple(opt.exclude), opt.bids_suffix)
    for note in refuse(problems):
        print(f"note: {note}")
    refuse_same_place(visits, model.names[0])
    return [Job(pair, source, target, (name_key(pair.name),), folder) for pair in visits
            for source, target in (model.names, model.names[::-1]) if source in pair.files]


def batches(jobs: list, size: int, kind: Callable) -> list[list]:
    """Jobs of the same kind in parts of at most `size`: the same whatever is there already, as are their last bits."""
    kinds = dict.fromkeys(map(kind, jobs))
    alike = [[job for job in jobs if kind(job) == each] for each in kinds]
    return [each[start:start + size] for each in alike for start in range(0, len(each), size)]


def translate(opt, model: Model, folder: Path, stop: StopRequest) -> list[Job]:
    """Make what is missing of this rank's share; returns all jobs."""
    jobs = translations(opt, model, folder)
    wanted = ("mean", "std", "synth") if opt.uncertainty_samples else ("synth",)
    mine = share(batches(jobs, model.at_once, lambda job: job.direction))
    with tqdm(total=sum(map(len, mine)), desc="translating", unit="volume", disable=None) as bar:
        for batch in stop.watch(mine):
            inputs = [model.read(job.source, job.pair.files[job.source]) for job in batch]
            how = [made_with(opt, model, job) for job in batch]
            missing = [not all(whole(job.path(each), how[place][each]) for each in wanted)
                       for place, job in enumerate(batch)]
            if any(missing):
                made = model.translate(batch[0].source, batch[0].target, np.stack([volume for volume, _ in inputs]),
                                       [job.key[0] for job in batch], opt.uncertainty_samples, stop.watch)
                for place in np.flatnonzero(missing):
                    write_translation(opt, model, batch[place], {name: each[place] for name, each in made.items()},
                                      inputs[place][1], how[place])
            bar.update(len(batch))
    return jobs


def made_with(opt, model: Model, job: Job) -> dict[str, dict]:
    """What the JSON beside each kind of volume tells of how it was made, and what it was compared with."""
    how = {**model.how, "Space": opt.output_space, "Source": model.content(job.source, job.pair.files[job.source]),
           "Truth": model.content(job.target, job.pair.files.get(job.target))}
    return {"synth": how, **{name: {**how, "UncertaintySamples": opt.uncertainty_samples} for name in ("mean", "std")}}


def write_translation(opt, model: Model, job: Job, made: dict[str, np.ndarray], source: dict, how: dict) -> None:
    """Write what was made of one visit in the target's units, and what it is worth where the truth is there.

    source: what is known of the source's file. The target's grid lies to the source's as in the first training pair,
    or where its own file does if there is one.
    """
    (low, high), truth, files = model.ranges[job.target], None, job.pair.files
    grid = np.array(source["affine"]) @ np.linalg.inv(model.affines[job.source]) @ model.affines[job.target]
    if job.target in files:
        truth, facts = model.read(job.target, files[job.target])
        grid = np.array(facts["affine"])
    reference = files.get(job.source if opt.output_space == "source" else job.target)
    more = {}
    if truth is not None:
        brain = brain_region(truth)
        more = {name: {"Scores": score(made[name], truth, {"brain": brain})} for name in made if name != "std"}
        if "std" in made:
            more["std"] = {"Reliability": reliability(made["std"], made["mean"] - truth, brain)}
    for name in ("mean", "std", "synth"):  # the volume itself last
        if name in made:
            volume = made[name] * (high - low) / 2 if name == "std" else to_units(made[name], low, high)
            if reference:
                write_volume(job.path(name), volume, grid, reference)
            else:
                write_on_grid(job.path(name), volume, grid, nib.load(files[job.source]).header)
            tell(job.path(name), how[name], [files[job.source].name], **more.get(name, {}))


def draw(opt, model: Model, folder: Path, stop: StopRequest) -> list[Job]:
    """New pairs from noise alone, of each group, in the geometry of the first training pair; returns all jobs."""
    names = list(map(label, model.groups))
    names = names if len(set(names)) == len(names) and all(names) else [f"group{n + 1}" for n in range(len(names))]
    jobs = [[Job(Pair(f"sub-synth{names[group - 1] if group else ''}{number:04d}", "",
                      model.groups[group - 1] if group else "", None, {}), "", name, (number, group), folder)
             for name in model.names]
            for group in range(1, len(names) + 1) or [0] for number in range(1, opt.joint_samples + 1)]
    mine = share(batches(jobs, model.at_once, lambda pair: pair[0].key[1]))
    with tqdm(total=sum(map(len, mine)), desc="drawing", unit="pair", disable=None) as bar:
        for batch in stop.watch(mine):
            how = [{**model.how, "Group": pair[0].pair.group} for pair in batch]
            missing = [not all(whole(job.path(), how[place]) for job in pair) for place, pair in enumerate(batch)]
            if any(missing):
                made = model.draw([pair[0].key for pair in batch], stop.watch)
                for place in np.flatnonzero(missing):
                    for job in batch[place]:
                        write_on_grid(job.path(), to_units(made[job.target][place], *model.ranges[job.target]),
                                      model.affines[job.target])
                        tell(job.path(), how[place], [])
            bar.update(len(batch))
    return [job for pair in jobs for job in pair]


def report_translations(jobs: list[Job], folder: Path, uncertain: bool) -> str:
    """metrics.csv, and uncertainty.csv with calibration.png, of those whose truth is known; returns a summary."""
    kinds = {"synth": "synthesised", **({"mean": "averaged"} if uncertain else {})}
    scored = [(job, kind, facts["Scores"]) for job in jobs for kind in kinds
              if (facts := told(job.path(kind))).get("Scores")]
    if not scored:
        return ""
    write_metrics(folder / "metrics.csv", [
        {"subject": job.pair.name, "direction": job.direction, "volume": kinds[kind], "region": region, **values}
        for job, kind, scores in scored for region, values in scores.items()])
    lines = []
    for direction, kind in dict.fromkeys((job.direction, kind) for job, kind, _ in scored):
        mine = [scores["volume"] for job, each, scores in scored if (job.direction, each) == (direction, kind)]
        psnr, ssim = (np.array([each[name] for each in mine]) for name in ("psnr", "ssim"))
        lines.append(f"{direction}, {kinds[kind]}: {psnr.mean():.2f} +- {psnr.std():.2f} dB, SSIM {ssim.mean():.3f} +- "
                     f"{ssim.std():.3f} ({len(mine)} with a truth)")
    if uncertain:
        lines += report_uncertainty([(job, told(job.path("std"))["Reliability"]) for job, kind, _ in scored
                                     if kind == "mean"], folder)
    return "\n".join(lines)


def report_uncertainty(known: list[tuple[Job, dict]], folder: Path) -> list[str]:
    """uncertainty.csv and calibration.png; returns a line for each direction."""
    rows, curves, lines = [], {}, []
    for job, found in known:
        count, variance, error = np.sum(found["bins"], axis=0)
        rows.append({"subject": job.pair.name, "direction": job.direction, "deviation": np.sqrt(variance / count),
                     "error": np.sqrt(error / count), "rank_correlation": found["rank_correlation"]})
    write_table(folder / "uncertainty.csv", tuple(rows[0]), rows, ".5f")
    for direction in dict.fromkeys(job.direction for job, _ in known):
        bins = np.sum([found["bins"] for job, found in known if job.direction == direction], axis=0)
        count, variance, error = bins[bins[:, 0] >= FEW_VOXELS].T
        if len(count):
            curves[direction] = np.sqrt(variance / count), np.sqrt(error / count)
        mine = [row["rank_correlation"] for row in rows if row["direction"] == direction]
        total = np.sqrt(bins[:, 1:].sum(axis=0) / bins[:, 0].sum())
        lines.append(f"{direction}: deviation {total[0]:.3f}, error {total[1]:.3f} (root mean squares in the brain, of "
                     f"[-1, 1]); their rank correlation {np.mean(mine):.2f} ({min(mine):.2f} .. {max(mine):.2f})")
    if curves:
        save_chart(folder / "calibration.png", "Is the deviation as large as the error? Brain voxels, of [-1, 1]",
                   ("standard deviation of the samples", "root mean square error of their mean, refined"), curves)
    return lines


def report_pairs(opt, model: Model, jobs: list[Job], folder: Path, watch: Callable) -> str:
    """pairs.csv, from which PDS can train, participants.tsv, and memorisation.csv; returns a summary."""
    pairs = list(dict.fromkeys((job.pair.subject, job.pair.group) for job in jobs))
    files = {(job.pair.subject, job.target): job.path().relative_to(folder).as_posix() for job in jobs}
    write_table(folder / "pairs.csv", ("subject", "group", *model.names), [
        {"subject": subject, "group": group, **{name: files[subject, name] for name in model.names}}
        for subject, group in pairs])
    write_text(folder / "participants.tsv", "participant_id\tgroup\n"
               + "".join(f"{subject}\t{group or 'n/a'}\n" for subject, group in pairs))
    return check_memorisation(opt, model, [(job.pair.name, job.target, job.path()) for job in jobs], folder, watch)


def picture(jobs: list[Job], model: Model, path: Path) -> None:
    """One page of the first volumes: source, synthesised, deviation, and where it is known the truth and the error."""
    rows, columns = [], ["source", "synthesised", "truth", "difference", "deviation"]
    for job in jobs[:SHOWN]:
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
        if "UncertaintySamples" in told(job.path("std")).get("MadeWith", {}):
            deviation = read_volume(job.path("std"), "first").voxels / (high - low) * 2
            panels["deviation"] = Panel(deviation, made.spacing, "", "deviation")
        about = job.direction.replace("->", " -> ") if job.source else f"{job.target}\n{job.pair.group}"
        rows.append((f"{job.pair.name}\n{about}", panels))
    columns = [name for name in columns if any(panels[name] for _, panels in rows)]
    save_grid(path, f"{len(jobs)} volumes, the first {len(rows)} of them", columns,
              [(name, [panels[column] for column in columns]) for name, panels in rows])


def run(settings, stop: StopRequest) -> int:
    """Validate, open the model, make what is missing, and report; returns the exit status."""
    settings.validate()
    stop.end_after(settings.max_minutes)
    if not settings.resume_path:
        raise OptionError('sample.py needs a trained model: set opt.resume_path, for example "./checkpoints/'
                          'best_refine.pth"')
    joint = settings.joint_samples > 0
    device, folder = choose_device(settings.device), Path(settings.sample_dir) / ("joint" if joint else "translated")
    with joined(device), contextlib.ExitStack() as held:
        model = Model(settings, device)
        if joint:
            model.how |= {"Prior": "joint", "Seed": settings.seed, "Samples": 1}
        make_writable(folder, settings.cache_dir)
        if writes():
            held.enter_context(sole_writer(str(folder)))
            begin_tree(folder, model.how if joint else {**model.how, "Space": settings.output_space})
        with first_on_each_machine():
            for each in (folder, model.cache):
                remove_strays(each)
        jobs = (draw if joint else translate)(settings, model, folder, stop)
        wait()
        if stop.agreed():
            raise Interrupted
        if writes() and jobs:
            told_more = (report_pairs(settings, model, jobs, folder, stop.watch) if joint else
                         report_translations(jobs, folder, settings.uncertainty_samples > 0))
            picture(jobs, model, folder / "synthesis.png")
            print("\n".join(filter(None, (told_more, f"{len(jobs)} volumes are in {folder}; pictures: "
                                                     f"{folder / 'synthesis.png'}"))))
    return FINISHED


def main(argv: list[str]) -> int:
    return guarded(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

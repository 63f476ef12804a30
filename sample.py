"""Use a trained model: translate subjects of whom one modality is missing, or draw new pairs.

    python sample.py --resume_path ./checkpoints/best_refine.pth --data_root new_subjects.csv
    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 20
    torchrun --nproc-per-node 4 sample.py ...                                    the same, on four devices

Leaves a BIDS derivatives tree in opt.sample_dir: volumes, a JSON beside each, tables, and a page of pictures. What is
there already, whole and made the same way, is not made again. Exit status: as that of main.py.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from data.derivatives import (
    Job,
    begin_tree,
    label,
    refuse_same_place,
    remove,
    tell,
    told,
    whole,
    write_on_grid,
)
from data.intensity import brain_region, to_units
from data.pairs import Pair, find_visits
from data.problems import PairError, Problem, refuse
from data.volumes import write_volume
from models.diffusion import name_key
from opt import PRESETS, OptionError, opt
from program import FINISHED, choose_device, guarded
from reports import picture, report_pairs, report_translations
from synthesis import Model
from utils.arguments import parse_arguments
from utils.distributed import first_on_each_machine, joined, share, wait, writes
from utils.files import make_writable, remove_strays, sole_writer
from utils.metrics import reliability, score
from utils.optimise import Interrupted, StopRequest, leave

LONGEST = 30  # letters of a group's label in the names of new pairs


def translations(opt, model: Model, folder: Path) -> list[Job]:
    """What to make of each visit in opt.data_root: the modality it lacks, or, to be scored, both. Raises PairError."""
    visits, problems = find_visits(Path(opt.data_root), model.names, tuple(opt.exclude), opt.bids_suffix)
    notes = refuse(problems)
    jobs = [Job(pair, source, target, (name_key(pair.name),), folder) for pair in visits
            for source, target in (model.names, model.names[::-1]) if source in pair.files]
    if not jobs:
        raise PairError(Problem(f"opt.data_root = {opt.data_root!r}",
                                f"no visit has a file of {' or '.join(model.names)}",
                                "give a CSV with one of these columns, or a BIDS tree (opt.bids_suffix)"))
    refuse_same_place(visits, model.names[0])
    for note in [*notes, *(f"{pair.name}: left out, it has neither {' nor '.join(model.names)}"
                           for pair in visits if not pair.files)]:
        print(f"note: {note}")
    return jobs


def new_pairs(opt, model: Model, folder: Path) -> list[Job]:
    """What to draw: so many pairs of each group, in both modalities."""
    names = [label(group)[:LONGEST] for group in model.groups]
    names = names if len(set(names)) == len(names) and all(names) else [f"group{n + 1}" for n in range(len(names))]
    return [Job(Pair(f"sub-synth{names[group - 1] if group else ''}{number:06d}", "",
                     model.groups[group - 1] if group else "", None, {}), "", name, (number, group), folder)
            for group in range(1, len(names) + 1) or [0] for number in range(1, opt.joint_samples + 1)
            for name in model.names]


def batches(jobs: list, size: int, kind: Callable) -> list[list]:
    """Jobs of the same kind in parts of at most `size`: the same whatever is there already, as are their last bits."""
    kinds = dict.fromkeys(map(kind, jobs))
    alike = [[job for job in jobs if kind(job) == each] for each in kinds]
    return [each[start:start + size] for each in alike for start in range(0, len(each), size)]


def translate(opt, model: Model, jobs: list[Job], stop: StopRequest) -> None:
    """Make what is missing of this rank's share."""
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


def made_with(opt, model: Model, job: Job) -> dict[str, dict]:
    """What the JSON beside each kind of volume tells of how it was made, and what it was compared with."""
    how = {**model.how, "Space": opt.output_space, "Source": model.content(job.source, job.pair.files[job.source]),
           "Truth": model.content(job.target, job.pair.files.get(job.target))}
    return {"synth": how, **{name: {**how, "Samples": opt.uncertainty_samples} for name in ("mean", "std")}}


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
            expected = made["std"] * math.sqrt(1 + 1 / opt.uncertainty_samples)  # the mean of K samples varies, too
            more["std"] = {"Reliability": reliability(expected, made["mean"] - truth, brain)}
    for name in ("mean", "std", "synth"):  # the volume itself last
        before = told(job.path(name)).get("MadeWith", how[name])
        if before != how[name] and (name in made or before["Source"] != how[name]["Source"]):
            differ = ", ".join(key for key in how[name] if before.get(key) != how[name][key])
            tqdm.write(f"note: {job.path(name).name} was made otherwise ({differ}) and is replaced")
            remove(job.path(name))
        if name in made:
            volume = made[name] * (high - low) / 2 if name == "std" else to_units(made[name], low, high)
            if reference:
                write_volume(job.path(name), volume, grid, reference)
            else:
                write_on_grid(job.path(name), volume, grid, nib.load(files[job.source]).header)
            tell(job.path(name), how[name], [files[job.source].name], Subject=job.pair.name, Direction=job.direction,
                 **more.get(name, {}))


def draw(opt, model: Model, jobs: list[Job], stop: StopRequest) -> None:
    """New pairs from noise alone, in the geometry of the first training pair: what is missing of this rank's share."""
    width = len(model.names)
    pairs = [jobs[start:start + width] for start in range(0, len(jobs), width)]
    mine = share(batches(pairs, model.at_once, lambda pair: pair[0].key[1]))
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
                        tell(job.path(), how[place], [], Subject=job.pair.name, Modality=job.target)
            bar.update(len(batch))


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
        jobs = (new_pairs if joint else translations)(settings, model, folder)
        if model.note and not joint:
            print(f"note: {model.note}")
        make_writable(folder, settings.cache_dir)
        if writes():
            held.enter_context(sole_writer(str(folder)))
            begin_tree(folder, model.how if joint else {**model.how, "Space": settings.output_space})
        with first_on_each_machine():
            for each in (folder, model.cache):
                remove_strays(each)
        (draw if joint else translate)(settings, model, jobs, stop)
        wait()
        if stop.agreed():
            raise Interrupted
        if writes():
            lines = report_pairs(settings, model, folder, stop.watch) if joint else report_translations(folder)
            picture(jobs, model, folder / "synthesis.png")
            print("\n".join([*lines, f"The {len(jobs)} synthesised volumes are in {folder}; pictures: "
                                     f"{folder / 'synthesis.png'}"]))
    return FINISHED


def main(argv: list[str]) -> int:
    return guarded(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

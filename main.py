"""PDS: train paired-volume synthesis. Edit opt.py, or give settings for one run on the command line.

    python main.py                                                              stage 1
    python main.py --refine --resume_path ./checkpoints/best_model.pth          stage 2
    python main.py --check                                                      read the study, report all problems
    torchrun --nproc-per-node 4 main.py                                         either stage, on four devices

Exit status: 0 finished, or checked and ready; 2 refused, or checked and not ready, with a message that says what to
change; 3 stopped early: the same command continues.
torchrun ends with 0 or a status of its own.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import train
import train_refine
from data import phantom
from data.atlas import roi_centres
from data.cache import Reading
from data.check import check_study, table, write_problems
from data.pairs import Pair, find_pairs
from data.problems import DataError, Problem, refuse
from data.split import split_subjects
from data.study import Study
from estimate import expect, gib, remedies
from opt import PRESETS, SMALLEST_AXIS, OptionError, opt, small
from program import FINISHED, REFUSED, STOPPED, choose_device, guarded
from utils.arguments import parse_arguments
from utils.distributed import first_on_each_machine, joined, launched, world, writes
from utils.files import make_writable, remove_strays, sole_writer
from utils.optimise import StopRequest, leave, number_type


def find_study(opt, watch: Callable = iter) -> tuple[list[Pair], list[Problem], dict[str, Reading]]:
    """The pairs that opt describes, what is wrong with them, and how each modality is read."""
    root = Path(opt.data_root)
    if root == Path(small().data_root) and not (root / phantom.COMPLETE).exists():
        print(f"Writing the demo data set to {root} ...")
        remove_strays(root)  # of a writing that was killed
        phantom.write_demo(root, lambda subjects: watch(tqdm(subjects, unit="subject")))
    pairs, problems = find_pairs(root, tuple(opt.modalities), tuple(opt.exclude), opt.bids_suffix)
    try:
        sizes = opt.image_sizes()
    except OptionError as error:  # only a check comes so far: it suggests them
        problems.append(Problem("opt.image_size", str(error), "or set it as suggested below", "all"))
        sizes = {name: None for name in opt.modalities}
    reduce, intensity = opt.per_modality("reduce"), opt.per_modality("intensity")
    return pairs, problems, {name: Reading(name, sizes[name], reduce[name], opt.resize, intensity[name])
                             for name in opt.modalities}


def check(opt, watch: Callable = iter) -> bool:
    """Read every volume and print (and write to check.csv) all problems at once; returns whether training can start."""
    pairs, problems, readings = find_study(opt, watch)
    problems, summary = check_study(pairs, problems, readings, SMALLEST_AXIS,
                                    lambda seen: watch(tqdm(seen, desc="reading", unit="volume",
                                                             total=2 * len(pairs))))
    if pairs:
        try:
            roles = split_subjects(pairs, opt.folds, opt.fold, opt.validation_fraction, opt.seed)
            train.groups_to_learn(opt, pairs, roles)
        except DataError as error:
            problems += error.problems
        except OptionError as error:
            problems.append(Problem("opt.condition_on_group", str(error), "or set it to False", "all"))
    fatal = sum(problem.fatal for problem in problems)
    if problems:
        print(f"{table(problems, Path(opt.data_root))}\n")
    write_problems(Path(opt.result_dir) / "check.csv", problems)
    print(f"{summary}\n{f'not ready: problems to solve: {fatal}' if fatal else 'ready to train'}"
          f"{f'; to know about: {len(problems) - fatal}' if len(problems) > fatal else ''}")
    return not fatal


def read_study(opt, watch: Callable = iter) -> Study:
    """Find, check, decode and split the pairs that opt describes; says what was left out.

    watch: may raise Interrupted between two pairs; what has been decoded is kept.
    """
    pairs, problems, readings = find_study(opt, watch)
    notes = refuse(problems)
    roles = split_subjects(pairs, opt.folds, opt.fold, opt.validation_fraction, opt.seed)
    study = Study(pairs, roles, readings, Path(opt.cache_dir),
                  lambda each: watch(tqdm(each, desc="reading volumes", unit="pair", disable=None)))
    for note in [*notes, *study.problems]:
        print(f"note: {note}")
    with_pattern = study.set_pattern(tuple(opt.pattern_networks), opt.pattern_radius, opt.space, opt.pattern_file,
                                     tuple(opt.pattern_labels))
    if opt.pattern_weight and with_pattern < len(pairs):
        print(f"note: {len(pairs) - with_pattern} of {len(pairs)} pairs are not known to be in MNI space, where the "
              "ROIs of the brain networks have their coordinates: the loss weighs all their voxels alike. Set "
              'opt.space = "mni" if they are in it, or opt.pattern_file to an image of labels of your own')
    if apart := study.apart():
        print(f"note: {len(apart)} of {len(pairs)} pairs, first {apart[0].subject}: {apart[0].what}; {apart[0].remedy}")
    if opt.folds == 1:
        print("note: opt.folds = 1: the subjects trained on are also validated and reported on; scores say nothing "
              "about new subjects")
    return study


def describe(opt, study: Study, device: torch.device) -> None:
    """Print what is about to run: device, data, sizes, parameters, and the settings that differ from the defaults."""
    dtype, members = number_type(opt.precision, device), study.roles["train"]
    steps = train.total_steps(opt, opt.refine_epochs if opt.refine else opt.epochs, len(members))
    expected = expect(opt, study.sizes, steps, math.ceil(len(members) / opt.batch_size), device, dtype)
    told = (f"training will need about {gib(expected.memory)} of memory, and {gib(expected.free[0])} of "
            f"{gib(expected.free[1])} are free. What lowers it: {', '.join(remedies(opt))}") if expected.free else ""
    if told and expected.least > expected.free[1]:
        raise OptionError(f"this cannot fit: {told}")
    precision = str(dtype).removeprefix("torch.")
    subjects = {role: len({study.pairs[i].person for i in members}) for role, members in study.roles.items()}
    default = small().as_dict()
    differs = [f"{name} = {value!r}" for name, value in opt.as_dict().items() if value != default[name]]
    ranks = f", {world()} ranks" if world() > 1 else ""
    print(f"device      {device}, {torch.get_num_threads()} threads, {precision}{ranks}\n"
          f"data        {opt.data_root}: {len(study.pairs)} pairs; subjects: "
          + ", ".join(f"{count} {role}" for role, count in subjects.items()) + "\n"
          "sizes       " + ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in study.sizes.items()) + "\n"
          f"network     {expected.parameters / 1e6:.1f} million parameters\n"
          f"expected    {expected}\n"
          f"changed     {', '.join(differs) or 'nothing, all settings are the defaults'}", flush=True)
    if told and expected.memory > expected.free[0]:
        print(f"note: {told}", flush=True)


def run(settings, stop: StopRequest) -> int:
    """Validate, then check the study, or read and describe it and train the stage asked for; returns the exit status.
    """
    settings.validate()
    stop.end_after(settings.max_minutes)
    device = choose_device(settings.device)
    roi_centres(tuple(settings.pattern_networks))  # refuses unknown names before any data is read
    if settings.check:
        if launched():
            raise OptionError("opt.check = True: one process checks a study; start it as python main.py --check")
        make_writable(settings.result_dir)
        return FINISHED if check(settings, stop.watch) else REFUSED
    with joined(device), contextlib.ExitStack() as held:
        if 2 * settings.batch_size < world():
            raise OptionError(f"opt.batch_size = {settings.batch_size}: these are the pairs of a step of all {world()} "
                              "ranks together, each in two directions; set a larger one, or start fewer ranks")
        state = None
        if settings.refine:  # before any data is read
            state = train_refine.open_start(settings)
        folders = settings.checkpoint_dir, settings.result_dir, settings.cache_dir
        make_writable(*folders, Path(settings.result_dir) / ("refine" if settings.refine else "stage1"))
        if writes():
            held.enter_context(sole_writer(settings.checkpoint_dir, settings.result_dir))
        with first_on_each_machine():
            for folder in folders:
                remove_strays(Path(folder))
            study = read_study(settings, stop.watch)
        describe(settings, study, device)
        finished = (train_refine.train_refine(settings, study, device, state, stop) if settings.refine
                    else train.train(settings, study, device, stop))
    return FINISHED if finished else STOPPED


def main(argv: list[str]) -> int:
    return guarded(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""PDS: train paired-volume synthesis. Edit opt.py, or give settings for one run on the command line.

    python main.py                                                              stage 1
    python main.py --refine --resume_path ./checkpoints/best_model.pth          stage 2
    python main.py --check                                                      read the study, report all problems
    torchrun --nproc-per-node 4 main.py                                         either stage, on four devices

Exit status: 0 finished, or checked and ready; 2 refused, or checked and not ready: the message says what to change;
3 stopped early: run the same command to resume. torchrun ends with 0 or a status of its own.
"""

import contextlib
import sys
from pathlib import Path

import torch

from data.atlas import roi_centres
from data.check import check_study
from data.pairs import described
from data.study import Study, read_study
from opt import PRESETS, opt, small
from train import Stage1
from train_refine import Stage2
from training.checkpoint import STAGE_1, STAGE_2, read_checkpoint
from training.distributed import is_main_rank, local_main_first, process_group, under_torchrun, world_size
from training.launch import (
    FINISHED,
    REFUSED,
    STOPPED,
    choose_device,
    precision_name,
    run_program,
    set_precision,
)
from training.loop import fit
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.files import lock_folders, make_writable, remove_temporary_files
from utils.stop import exit_with, stop

FIRST = ("refine", "resume_path", "check", "data_root", "modalities", "image_size", "augment", "batch_size", "epochs",
         "refine_epochs", "checkpoint_dir", "result_dir")  # in --help: what people change first


def describe(settings, study: Study, device: torch.device) -> None:
    """Print what is about to run: device, data, sizes, and the settings that differ from the defaults."""
    default = small().as_dict()
    changed = [f"{name} = {value!r}" for name, value in settings.as_dict().items() if value != default[name]]
    subjects = [f"{len({study.pairs[i].person for i in members})} {role}" for role, members in study.roles.items()]
    sizes = [f"{modality} {'x'.join(map(str, size))}" for modality, size in study.sizes.items()]
    precision = precision_name(settings.precision, set_precision(settings.precision, device))
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    print(f"device      {device}, {torch.get_num_threads()} threads, {precision}{ranks}\n"
          f"data        {settings.data_root}: {described(study.pairs)}; subjects: {', '.join(subjects)}\n"
          f"sizes       {', '.join(sizes)}\n"
          f"alignment   {study.alignment}\n"
          f"output      {settings.result_dir}, {settings.checkpoint_dir}; Ctrl-C stops, the same command resumes\n"
          f"changed     {', '.join(changed) or 'nothing: all settings have their defaults'}", flush=True)


def run(settings) -> int:
    """Validate the settings; check the study, or read it and train the stage; returns the exit status."""
    settings.validate()
    stop.set_time_limit(settings.max_minutes)
    device = choose_device(settings.device)
    roi_centres(tuple(settings.pattern_networks))  # refuses unknown names before any data is read
    if settings.check:
        if under_torchrun():
            raise UserError("opt.check = True: a single process checks a study; start it as python main.py --check")
        make_writable(settings.result_dir)
        return FINISHED if check_study(settings) else REFUSED
    with process_group(device), contextlib.ExitStack() as locks:
        if 2 * settings.batch_size < world_size():
            raise UserError(f"opt.batch_size = {settings.batch_size}: that many pairs per step, in two directions, are "
                            f"too few for {world_size()} ranks; raise it, or start fewer ranks")
        state = None
        if settings.refine:  # before any data is read
            state = read_checkpoint(Path(settings.resume_path), (STAGE_1, STAGE_2))
            for unused in ("model", "optimiser"):  # they are large
                state.pop(unused, None)
        stage_folder = Path(settings.result_dir) / (Stage2 if settings.refine else Stage1).folder_name
        folders = settings.checkpoint_dir, settings.result_dir, settings.cache_dir
        make_writable(*folders, stage_folder)
        if is_main_rank():
            locks.enter_context(lock_folders(settings.checkpoint_dir, settings.result_dir))
        with local_main_first():
            for folder in folders:
                remove_temporary_files(Path(folder))  # of a process that was killed
            study = read_study(settings)
        describe(settings, study, device)
        stage = Stage2(settings, study, device, state) if settings.refine else Stage1(settings, study, device)
        return FINISHED if fit(stage) else STOPPED


def main(argv: list[str]) -> int:
    return run_program(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0], FIRST))


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))

"""PDS: train paired-volume synthesis. Edit opt.py, or give settings for one run on the command line.

    python main.py                                                              stage 1
    python main.py --refine --resume_path ./checkpoints/best_model.pth          stage 2

Exit status: 0 finished; 2 refused, with a message that says what to change; 3 stopped early: the same command
continues.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import train
import train_refine
from data import phantom
from data.atlas import AtlasError, roi_centres
from data.pairs import PairError, find_pairs, split_subjects
from data.study import Study
from data.volumes import VolumeError
from models.unet import DualModalUNet
from opt import PRESETS, OptionError, opt, small
from utils.arguments import parse_arguments
from utils.checkpoint import CheckpointError, read_checkpoint
from utils.logger import LogError
from utils.optimise import TrainingError, use_bfloat16

FINISHED, REFUSED, STOPPED = 0, 2, 3


def read_study(opt) -> Study:
    """Find, check, decode and split the pairs that opt describes; says what was left out."""
    root = Path(opt.data_root)
    if root == Path(small().data_root) and not (root / phantom.COMPLETE).exists():
        print(f"Writing the demo data set to {root} ...")
        phantom.write_demo(root, lambda subjects: tqdm(subjects, unit="subject"))
    pairs, notes = find_pairs(root, tuple(opt.modalities))
    for note in notes:
        print(f"note: {note}")
    roles = split_subjects(pairs, opt.folds, opt.fold, opt.validation_fraction, opt.seed)
    study = Study(pairs, roles, opt.image_sizes(), opt.reductions(), opt.resize, Path(opt.cache_dir),
                  lambda each: tqdm(each, desc="reading volumes", unit="pair", disable=None))
    with_pattern = study.set_pattern(tuple(opt.pattern_networks), opt.pattern_radius, opt.space)
    if opt.pattern_weight and with_pattern < len(pairs):
        print(f"note: {len(pairs) - with_pattern} of {len(pairs)} pairs are not known to be in MNI space; the loss "
              'weighs no brain networks there (opt.space = "mni" if they are)')
    if apart := study.apart():
        print(f"note: the two fields of view differ by more than a voxel in {len(apart)} of {len(pairs)} pairs, first "
              f"{apart[0]}; PDS overlays the two grids edge to edge, so co-register and crop them alike")
    if opt.folds == 1:
        print("note: opt.folds = 1: the subjects trained on are also validated and reported on; scores say nothing "
              "about new subjects")
    return study


def describe(opt, study: Study, device: torch.device) -> None:
    """Print what is about to run: device, data, sizes, parameters, and the settings that differ from the defaults."""
    with torch.device("meta"):
        network = DualModalUNet(study.sizes, **opt.network_arguments())
    precision = "bfloat16" if use_bfloat16(opt.precision, device) else "float32"
    subjects = {role: len({study.pairs[i].person for i in members}) for role, members in study.roles.items()}
    default = small().as_dict()
    differs = [f"{name} = {value!r}" for name, value in opt.as_dict().items() if value != default[name]]
    print(f"device      {device}, {torch.get_num_threads()} threads, {precision}\n"
          f"data        {opt.data_root}: {len(study.pairs)} pairs; subjects: "
          + ", ".join(f"{count} {role}" for role, count in subjects.items()) + "\n"
          "sizes       " + ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in study.sizes.items()) + "\n"
          f"network     {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters\n"
          f"changed     {', '.join(differs) or 'nothing, all settings are the defaults'}", flush=True)


def choose_device(name: str) -> torch.device:
    """The device that opt.device names. Raises OptionError where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"opt.device = {name!r}: is no device; choose auto, cpu or cuda[:N]") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"opt.device = {name!r}: PyTorch finds {torch.cuda.device_count()} GPUs on this machine; "
                          "choose auto or cpu")
    return device


def allow_many_files() -> None:
    """Raise the limit of open files as far as the system lets us: every memory-mapped volume keeps one open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_writable(*folders: str) -> None:
    """Create the output folders before any work. Raises OptionError where one cannot be written to."""
    for name in folders:
        try:
            Path(name).mkdir(parents=True, exist_ok=True)
            probe = Path(name) / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OptionError(f"the output folder {name} cannot be written to ({error.strerror}); "
                              "choose another opt.checkpoint_dir, opt.result_dir or opt.cache_dir") from error


def run(settings) -> bool:
    """Validate, read the data, describe, and train the stage that the settings ask for; returns whether it finished."""
    settings.validate()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("several processes are not supported yet; start it as python main.py")
    device = choose_device(settings.device)
    roi_centres(tuple(settings.pattern_networks))  # refuses unknown names before any data is read
    allow_many_files()
    state = None
    if settings.refine:  # before any data is read
        state = read_checkpoint(Path(settings.resume_path), (train.STAGE, train_refine.STAGE))
    make_writable(settings.checkpoint_dir, settings.result_dir, settings.cache_dir)
    study = read_study(settings)
    describe(settings, study, device)
    if settings.refine:
        return train_refine.train_refine(settings, study, device, state)
    return train.train(settings, study, device)


def main(argv: list[str]) -> int:
    settings = parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0])
    try:
        return FINISHED if run(settings) else STOPPED
    except (OptionError, AtlasError, PairError, VolumeError, CheckpointError, LogError, TrainingError) as error:
        print(f"\nPDS cannot run:\n{error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues from the last checkpoint.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

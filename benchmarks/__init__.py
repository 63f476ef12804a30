"""Measurements that the documentation's figures come from. Each is run as python -m benchmarks.NAME."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data.study import Study, read_study
from opt import PRESETS, opt
from synthesis.model import TrainedModel, open_model
from training.checkpoint import STAGE_1, STAGE_2, read_checkpoint, refuse_another_run
from training.launch import choose_device, run_program
from utils.arguments import parse_arguments

STAGE_1_FIRST = ["--no-refine", "--resume_path="]  # whatever opt.py was edited to; options behind these override them


def run_child(command: list[str]) -> int:
    """Run a program and return its exit status; it gets the signals that would end this one, and saves its state."""
    child = subprocess.Popen(command)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_run(checkpoint: str | Path, settings, stages: tuple[str, ...] = (STAGE_1, STAGE_2)
             ) -> tuple[Study, TrainedModel]:
    """A model and the study that it was trained on. Settings that are not given become those of its run, except for
    cache_dir and device. Raises UserError where the study is another one."""
    state = read_checkpoint(Path(checkpoint), stages)
    for name, value in state["options"].items():
        if name not in settings.edited | {"cache_dir", "device"}:
            setattr(settings, name, value)
    settings.resume_path = str(checkpoint)
    settings.validate()
    study = read_study(settings)
    refuse_another_run(Path(checkpoint), state, {}, study.identity, "If the study has moved, give --data_root")
    return study, open_model(settings, choose_device(settings.device))


def run_report(report: Callable[[Path, object], None], description: str, file: str) -> None:
    """Run report(FILE, settings) from the command line: a file, and options of main.py."""
    parser = argparse.ArgumentParser(description=f"{description.splitlines()[0]} Takes all options of main.py, too.",
                                     allow_abbrev=False)
    parser.add_argument("file", type=Path, help=file)
    own, options = parser.parse_known_args()
    settings = parse_arguments(opt, PRESETS, options, description.splitlines()[0])

    def run(settings) -> int | None:
        settings.validate()
        return report(own.file, settings)

    sys.exit(run_program(run, settings))

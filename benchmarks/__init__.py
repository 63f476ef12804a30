"""Measurements that the documentation's figures come from. Each is run as python -m benchmarks.NAME."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from opt import PRESETS, opt
from training.launch import run_program
from utils.arguments import parse_arguments


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


def run_report(report: Callable[[Path, object], None], description: str, file: str) -> None:
    """Run report(FILE, settings) from the command line: a file, and options of main.py."""
    parser = argparse.ArgumentParser(description=f"{description.splitlines()[0]} Takes all options of main.py, too.",
                                     allow_abbrev=False)
    parser.add_argument("file", type=Path, help=file)
    own, options = parser.parse_known_args()
    settings = parse_arguments(opt, PRESETS, options, description.splitlines()[0])
    sys.exit(run_program(lambda settings: report(own.file, settings), settings))

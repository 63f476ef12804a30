"""Measurements that the documentation's figures come from. Each is run as python -m benchmarks.NAME."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from opt import PRESETS, opt
from training.launch import run_program
from utils.arguments import parse_arguments


def run_report(report: Callable[[Path, object], None], description: str, file: str) -> None:
    """Run report(FILE, settings) from the command line: a file, and options of main.py."""
    parser = argparse.ArgumentParser(description=f"{description.splitlines()[0]} Takes all options of main.py, too.",
                                     allow_abbrev=False)
    parser.add_argument("file", type=Path, help=file)
    own, options = parser.parse_known_args()
    settings = parse_arguments(opt, PRESETS, options, description.splitlines()[0])
    sys.exit(run_program(lambda settings: report(own.file, settings), settings))

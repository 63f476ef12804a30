"""What main.py and sample.py share: exit statuses, the device, and how errors and stops become messages."""

from __future__ import annotations

import sys
from collections.abc import Callable

import nibabel as nib
import torch

from data.atlas import AtlasError
from data.problems import DataError
from models.perceptual import WeightsError
from opt import OptionError
from utils.checkpoint import CheckpointError
from utils.distributed import LaunchError, ended_by_another_rank, launched, place_on_machine, writes
from utils.files import FileError
from utils.logger import LogError, still_heard
from utils.optimise import Interrupted, StopRequest, TrainingError

FINISHED, REFUSED, STOPPED = 0, 2, 3
REFUSALS = (OptionError, AtlasError, DataError, CheckpointError, FileError, LaunchError, LogError, TrainingError,
            WeightsError)


def guarded(run: Callable[[object, StopRequest], int], settings) -> int:
    """run(settings, stop): its exit status, or that of the refusal or stop that ended it, which is told."""
    nib.imageglobals.logger.setLevel("CRITICAL")  # what it would say of a header, data/volumes.py says with the file
    try:
        with StopRequest() as stop, still_heard():
            try:
                return run(settings, stop)
            except Interrupted:
                print(f"Stopped ({stop.reason}); the same command goes on.", flush=True)
                return STOPPED
            except REFUSALS as error:
                if not ended_by_another_rank(error, stop):
                    print(f"\nPDS cannot run:\n{error}", file=sys.stderr)
                return REFUSED
            except Exception as error:
                if not ended_by_another_rank(error, stop):
                    raise
                if writes():
                    print("\nPDS stopped, because another rank has ended; the same command goes on.", file=sys.stderr)
                return STOPPED
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on.", file=sys.stderr)
        return STOPPED


def choose_device(name: str) -> torch.device:
    """The device that opt.device names; with "auto" each rank on a machine has a GPU of its own, or all its CPU.

    Raises OptionError where this machine does not have it.
    """
    if name == "auto":
        name = f"cuda:{place_on_machine()}" if torch.cuda.is_available() else "cpu"
    elif launched() and name != "cpu":
        raise OptionError(f'opt.device = {name!r}: with torchrun it must be "auto" (one GPU for each rank) or "cpu"')
    try:
        device = torch.device(f"{name}:0" if name == "cuda" else name)
    except RuntimeError:
        raise OptionError(f"opt.device = {name!r}: is no device; choose auto, cpu or cuda[:N]") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"opt.device = {name!r}: PyTorch finds {torch.cuda.device_count()} GPUs on this machine; "
                          "choose auto or cpu, or start fewer ranks")
    return device

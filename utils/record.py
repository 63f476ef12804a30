"""run.json: what a run was, so that it can be told apart from others and repeated."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from utils.checkpoint import Checkpoint
from utils.distributed import world
from utils.files import write_text

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "nibabel", "scikit-image", "tqdm", "pillow")
CODE = Path(__file__).resolve().parent.parent


def write_record(path: Path, run: Checkpoint, settings: dict, defaults: dict, split: dict[str, list[str]]) -> None:
    """Write data, split, and of every start (the last one is this) time, settings, versions, machine and commit.

    split: role -> names of its pairs. Raises FileError.
    """
    start = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "step": run.step, "code": code(),
             "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
             "machine": machine(), "settings": settings,
             "changed": {name: value for name, value in settings.items() if value != defaults[name]}}
    told = {"run_id": run.run_id, "stage": run.stage, "fingerprints": run.facts["fingerprints"], "split": split,
            "starts": [*_earlier(path, run.run_id), start]}
    write_text(path, json.dumps(told, indent=2, default=str) + "\n")


def _earlier(path: Path, run_id: str) -> list[dict]:
    """The starts of this run that are told already."""
    try:
        told = json.loads(path.read_text())
        return list(told["starts"]) if told["run_id"] == run_id else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, object]:
    """Name, system and devices."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"name": platform.node(), "system": platform.platform(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "gpus": gpus, "ranks": world()}


def code() -> dict[str, object]:
    """The git commit of this program, and whether files that git knows differ from it; nothing without git."""
    try:
        commit, changes = (subprocess.run(["git", "-C", str(CODE), *words], capture_output=True, text=True, timeout=20,
                                          check=True).stdout.strip()
                           for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": changes.splitlines()}

"""One checkpoint object: save and load walk the same named parts. Files hold plain tensors and plain values only."""

from __future__ import annotations

import hashlib
import os
import pickle
import uuid
import zipfile
from pathlib import Path

import torch
from torch import nn

from utils.distributed import writes

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong, and what to do."""


class Checkpoint:
    """Where a run stands: `step`, `best`, its `run_id`, the named parts (with state_dict and load_state_dict).

    facts: plain values that rebuild and identify the run: options, model arguments, fingerprints, normalisation.
    """

    def __init__(self, stage: str, parts: dict[str, object], facts: dict, best: float):
        self.stage, self.parts, self.facts = stage, parts, facts
        self.step, self.best, self.run_id = 0, best, uuid.uuid4().hex

    def save(self, path: Path) -> None:
        """Write to a temporary file, flush it to the disk, and rename: `path` always holds a whole checkpoint.

        Only the first rank does.
        """
        if not writes():
            return
        state = {"format": FORMAT, "stage": self.stage, "step": self.step, "best": self.best, "run_id": self.run_id,
                 **self.facts, **{name: part.state_dict() for name, part in self.parts.items()}}
        temporary = path.with_name(f".{path.name}.part")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, state: dict) -> None:
        """Take over a state that `read_checkpoint` returned and `refuse_another_run` accepted."""
        self.step, self.best, self.run_id = state["step"], state["best"], state["run_id"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class Kept:
    """A part of a checkpoint that does not change while the run goes on."""

    def __init__(self, state: dict):
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def read_checkpoint(path: Path, stages: tuple[str, ...]) -> dict:
    """The content of a checkpoint of one of these stages, on the CPU. Raises CheckpointError; runs no code from it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; set opt.resume_path to one that exists")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check the records' CRCs
            if damaged := archive.testzip():
                raise CheckpointError(f"{path}: is damaged (record {damaged}); use another checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of PDS, or a damaged one "
                              f"({str(error).splitlines()[0]}); use another one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no checkpoint of this version of PDS; train again or use its version")
    if state["stage"] not in stages:
        raise CheckpointError(f"{path}: is a checkpoint of {state['stage']}, {' or '.join(stages)} is needed; "
                              "set opt.resume_path to best_model.pth for stage 2, and leave it empty for stage 1")
    return state


def refuse_another_run(path: Path, saved: dict, options: dict, fingerprints: dict) -> None:
    """Raise CheckpointError where the checkpoint `saved` in `path` is not of the run that these options describe.

    options: those that have to be the same. fingerprints: of data, split and (stage 2) backbone.
    """
    differ = [f"{name}: {saved['options'].get(name, 'no setting yet')!r} there, {value!r} now"
              for name, value in options.items() if _plain(saved["options"].get(name)) != _plain(value)]
    differ += [f"the {name}: not the same" for name, value in fingerprints.items()
               if saved["fingerprints"].get(name) != value]
    if differ:
        raise CheckpointError(f"{path} belongs to another run:\n  " + "\n  ".join(differ) + "\nIt is left as it is. "
                              "Set opt.checkpoint_dir (and opt.result_dir) to another folder, or undo these changes")


def _plain(value: object) -> object:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def content_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights: the same weights have the same hash wherever they are stored."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

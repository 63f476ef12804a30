"""One checkpoint object: save and load walk the same named parts. Files hold plain tensors and plain values only."""

from __future__ import annotations

import errno
import hashlib
import pickle
import struct
import time
import uuid
import zipfile
from pathlib import Path

import torch
from torch import nn

from utils.distributed import same_everywhere, writes
from utils.files import replace_file, require_room

FORMAT = 1
FILES = {"stage 1": ("last_model.pth", "best_model.pth"), "stage 2": ("last_refine.pth", "best_refine.pth")}
KEYS = {"step": int, "best": float, "run_id": str, "options": dict, "fingerprints": dict, "sizes": dict,
        "network": dict, "ranges": dict, "model": dict, "ema": dict}
STAGE_2_KEYS = {"backbone": dict}
RECORD = 600  # bytes that a tensor takes beside its values
DIRECTORY = 0x10  # a bit of a zip record's attributes
NOT_NOW = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
UNREADABLE = (MemoryError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
              LookupError, AttributeError, TypeError, AssertionError, NotImplementedError, struct.error)
UNFIT = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)  # what a wrong state dict raises


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong, and what to do."""


class DamagedError(CheckpointError):
    """A file that is not, or no longer, a whole checkpoint."""


class Checkpoint:
    """Where a run stands, in two files of a folder: `last`, the newest state, and `best`, that which validated best.

    step: optimiser steps that are done; reviewed: the last of them after which all that was due (validation, pictures)
    is done, too; best_value: the best validation; parts: named, with state_dict and load_state_dict.
    facts: plain values that rebuild and identify the run: options, model arguments, fingerprints, normalisation.
    worst: what every validation is better than.
    """

    def __init__(self, stage: str, folder: Path, parts: dict[str, object], facts: dict, worst: float):
        self.stage, self.parts, self.facts, self.worst = stage, parts, facts, worst
        self.last, self.best = (folder / name for name in FILES[stage])
        self.step, self.reviewed, self.best_value, self.run_id = 0, 0, worst, uuid.uuid4().hex

    def _state(self) -> dict:
        return {"format": FORMAT, "stage": self.stage, "step": self.step, "reviewed": self.reviewed,
                "best": self.best_value, "run_id": self.run_id, **self.facts,
                **{name: part.state_dict() for name, part in self.parts.items()}}

    def save(self, path: Path) -> None:
        """Write `last` or `best` on the first rank; it always holds a whole checkpoint. Raises FileError."""
        if writes():
            state = self._state()
            replace_file(path, lambda file: torch.save(state, file), _bytes(state))

    def begin(self) -> None:
        """Write `last` for the first time. Raises FileError where the disk has no room for what is to come."""
        if writes():
            later = _bytes(self._state()) + 2 * _bytes(self.parts["model"].state_dict())  # with Adam's two averages
            require_room(self.last.parent, 3 * later)  # last and best, and one that is being written
        self.save(self.last)

    def stand_in(self, value: float) -> None:
        """Save the model of the last step, which validated as `value`, as the best: there is none any more."""
        self.best_value = value
        self.save(self.best)
        print(f"note: {self.best} was not there: the model of the last step stands in for the best")

    def load(self, path: Path, state: dict) -> None:
        """Take over the state that `read_checkpoint` found in `path`. Raises CheckpointError where it does not fit."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.reviewed = state["step"], state["reviewed"]
            self.best_value, self.run_id = state["best"], state["run_id"]
        except UNFIT as error:
            raise CheckpointError(f"{path}: does not fit this version of PDS ({_told(error)}). It can be refined, "
                                  "but not be continued: set opt.checkpoint_dir and opt.result_dir to other folders"
                                  ) from error

    def resume(self, asked: Path | None, free: set[str]) -> bool:
        """Load the newest of the folder's files and `asked` (from anywhere); False where there is none.

        A damaged file is set aside, with a warning, where another one can be loaded. free: options that may have
        changed. Without `best` the next validation writes one. Raises CheckpointError where a file is another run's:
        that is neither continued nor overwritten.
        """
        found, damaged = {}, {}
        for path in {each: None for each in (self.last, self.best, asked) if each and (each.exists() or each == asked)}:
            try:
                found[path] = read_checkpoint(path, (self.stage,))
            except DamagedError as error:
                damaged[path] = error
                continue
            compared = {name: value for name, value in self.facts["options"].items() if name not in free}
            refuse_another_run(path, found[path], compared, self.facts["fingerprints"])
        if damaged and not found:
            raise CheckpointError("\n".join(map(str, damaged.values())) + "\nThere is no other one to go on from: "
                                  "move the damaged away, or choose another opt.checkpoint_dir, to start anew")
        if len({state["run_id"] for state in found.values()}) > 1:
            raise CheckpointError(f"{' and '.join(map(str, found))} are of different runs. They are left as they are; "
                                  "move away those that do not belong here, or choose another opt.checkpoint_dir")
        if found:
            newest = max(found, key=lambda path: (found[path]["step"], found[path].get("reviewed", 0)))
            self.load(newest, found[newest])
            self.best_value = found[self.best]["best"] if self.best in found else self.worst
            print(f"Continuing {newest} after step {self.step}.")
        if not same_everywhere(self.step, self.reviewed, self.best_value, self.facts):
            raise CheckpointError(f"{self.last}: the ranks do not all see the same checkpoints, data or settings; all "
                                  "machines have to share opt.checkpoint_dir, and hold the same opt.py and data")
        for path, error in damaged.items():
            print(f"warning: {error}{self._set_aside(path)}")
        return bool(found)

    def _set_aside(self, path: Path) -> str:
        """Rename a damaged file of ours, so that it is not overwritten; what to tell of that."""
        if path not in (self.last, self.best):
            return ""
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        if writes():
            path.replace(aside)
        return f". It is kept as {aside.name}, and the other file is used"


def _bytes(value: object) -> int:
    """Bytes of a file with all tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes + RECORD
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _told(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


class Kept:
    """A part of a checkpoint that does not change while the run goes on."""

    def __init__(self, state: dict):
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def read_checkpoint(path: Path, stages: tuple[str, ...]) -> dict:
    """The content of a checkpoint of one of these stages, on the CPU; nothing in the file is trusted or run.

    Raises DamagedError where it is not whole, CheckpointError where it is of no use here.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; move it away")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; set opt.resume_path to one that exists")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check the records' CRCs
            if any(record.compress_type != zipfile.ZIP_STORED or record.external_attr & DIRECTORY
                   for record in archive.infolist()):  # torch reads what is marked as a folder as anything
                raise ValueError("its records are not as torch writes them")
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) in NOT_NOW or "allocate memory" in str(error):
            raise CheckpointError(f"{path}: cannot be read now ({_told(error)}), but may be whole; try again when that "
                                  "is mended") from error
        raise DamagedError(f"{path}: is no checkpoint of PDS, or a damaged one ({_told(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no checkpoint of this version of PDS; train again or use its version")
    if state.get("stage") not in stages:
        raise CheckpointError(f"{path}: is a checkpoint of {state.get('stage')}, {' or '.join(stages)} is needed; "
                              "set opt.resume_path to best_model.pth for stage 2, and leave it empty for stage 1")
    keys = KEYS | (STAGE_2_KEYS if state["stage"] == "stage 2" else {})
    if wrong := [name for name, kind in keys.items() if not isinstance(state.get(name), kind)]:
        raise CheckpointError(f"{path}: is no checkpoint of PDS (it lacks {', '.join(wrong)}); use another one")
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

"""Checkpoints: save and load walk the same named parts. Files hold plain tensors and plain values only, no code."""

import hashlib
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from training.distributed import is_main_rank, same_on_all_ranks
from training.schema import OF_BOTH_STAGES, problems_of_content
from utils.errors import UserError
from utils.files import replace_file
from utils.tensors import UNFIT, DamagedError, load_weights, mapped, one_line, read_tensors

FORMAT = 6
STAGE_1, STAGE_2 = "stage 1", "stage 2"
FILES = {STAGE_1: ("last_model.pth", "best_model.pth"), STAGE_2: ("last_refine.pth", "best_refine.pth")}
PARTS = ("model", "ema")
LARGE = 2**28  # bytes of the network; its checkpoint has three to four times as many
OTHER_FOLDERS = "Set opt.checkpoint_dir (and opt.result_dir) to another folder, or undo these changes"


class Checkpoint:
    """The state of a run, in two files of a folder: `last`, the newest state, and `best`, that of the best validation.

    parts: named objects with state_dict and load_state_dict. metadata: what does not change and rebuilds or identifies
    the run: options, network arguments, fingerprints, ranges. initial_best: a value that every validation improves on.
    """

    def __init__(self, stage: str, folder: Path, parts: dict[str, object], metadata: dict, initial_best: float):
        self.stage, self.parts, self.metadata, self.initial_best = stage, parts, metadata, initial_best
        self.last, self.best = (folder / name for name in FILES[stage])
        self.step, self.best_value, self.run_id = 0, initial_best, uuid.uuid4().hex
        self._thread, self._writing = ThreadPoolExecutor(1), None

    def save(self, path: Path) -> None:
        """Write `last` or `best` on the main rank; the file always holds a complete checkpoint. Raises UserError.

        A large one is copied, and written beside training: `finish_writing` waits for it, and raises what went wrong.
        """
        self.finish_writing()
        if not is_main_rank():
            return
        state = {"format": FORMAT, "stage": self.stage, "step": self.step, "best": self.best_value,
                 "run_id": self.run_id, **self.metadata,
                 **{name: part.state_dict() for name, part in self.parts.items()}}
        if sum(value.nbytes for value in state["model"].values()) < LARGE:
            replace_file(path, lambda file: torch.save(state, file))
        else:
            state = mapped(lambda tensor: tensor.detach().to("cpu", copy=True), state)
            self._writing = self._thread.submit(replace_file, path, lambda file: torch.save(state, file))

    def finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def resume(self, requested: Path | None, may_change: set[str]) -> bool:
        """Load the newest of the folder's files and the requested one (from anywhere); False where there is none.

        A damaged file is set aside with a warning where another one can be loaded. may_change: options that may differ.
        Raises UserError where a file belongs to another run: that is neither resumed nor overwritten.
        """
        candidates = [path for path in dict.fromkeys((self.last, self.best, requested))
                      if path and (path == requested or os.path.exists(path))]
        found, damaged = {}, {}
        for path in candidates:
            try:
                found[path] = read_checkpoint(path, (self.stage,))
            except DamagedError as error:
                damaged[path] = error
                continue
            must_match = {name: value for name, value in self.metadata["options"].items() if name not in may_change}
            refuse_another_run(path, found[path], must_match, self.metadata["fingerprints"])
        if damaged and not found:
            raise UserError("\n".join(map(str, damaged.values())) + "\nThere is no other checkpoint to resume from: "
                            "move the damaged files away, or choose another opt.checkpoint_dir, to start again")
        if len({state["run_id"] for state in found.values()}) > 1:
            raise UserError(f"{' and '.join(map(str, found))} belong to different runs. They are left unchanged: move "
                            "away those that do not belong here, or choose another opt.checkpoint_dir")
        if found:
            newest = max(found, key=lambda path: found[path]["step"])
            self._load(newest, found[newest])
            self.best_value = found[self.best]["best"] if self.best in found else self.initial_best
            print(f"Resuming {newest} at step {self.step}.")
            if self.best not in found and found[newest]["best"] != self.initial_best:  # it was there
                print(f"note: {self.best} is missing; the model of the next validation takes its place as the best")
        if not same_on_all_ranks(self.step, self.best_value, self.metadata["options"], self.metadata["fingerprints"]):
            raise UserError(f"{self.last}: the ranks do not all see the same checkpoints, data or settings; all "
                            "machines must share opt.checkpoint_dir and hold the same opt.py and data")
        for path, error in damaged.items():
            print(f"warning: {error}. The other checkpoint is used")
            if path in (self.last, self.best) and is_main_rank():  # not overwritten
                path.replace(path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
        return bool(found)

    def _load(self, path: Path, state: dict) -> None:
        try:
            for name, part in self.parts.items():
                load_weights(part, state[name]) if isinstance(part, nn.Module) else part.load_state_dict(state[name])
            self.step, self.best_value, self.run_id = state["step"], state["best"], state["run_id"]
        except UNFIT as error:
            raise UserError(f"{path}: does not fit this version of PDS ({one_line(error)}). It can be refined but not "
                            "resumed: set opt.checkpoint_dir and opt.result_dir to other folders") from error


def read_checkpoint(path: Path, stages: tuple[str, ...]) -> dict:
    """The content of a checkpoint of one of these stages, on the CPU; nothing in the file is executed.

    Raises DamagedError where the file is not complete, UserError where it cannot be used here.
    """
    if not os.path.isfile(path):  # no error where its folder may not be looked at
        what = "is not a file" if os.path.exists(path) else "there is no such checkpoint, or it may not be read"
        raise UserError(f"{path}: {what}. Set opt.resume_path to a checkpoint that exists: best_model.pth, which stage "
                        "1 writes, to start stage 2; last_refine.pth, which contains its backbone, to resume it; "
                        "best_refine.pth for sample.py; leave it empty for stage 1")
    state = read_tensors(path, "a checkpoint of PDS")
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("stage") not in (STAGE_1, STAGE_2):
        raise UserError(f"{path}: is not a checkpoint of this version of PDS; train again, or use the version that "
                        "wrote it")
    if state["stage"] not in stages:
        raise UserError(f"{path}: is a checkpoint of {state['stage']}, but {' or '.join(stages)} is needed; set "
                        "opt.resume_path to best_model.pth for stage 2, and leave it empty for stage 1")
    problems = problems_of_content(state, PARTS)
    if state["stage"] == STAGE_2 and not problems:
        backbone = state.get("backbone")
        has_one = isinstance(backbone, dict) and backbone.get("stage") == STAGE_1
        problems = problems_of_content(backbone, PARTS[1:]) if has_one else ["it has no backbone"]
        problems += [f"backbone/options/{name}: differs from that of the checkpoint" for name in OF_BOTH_STAGES
                     if not problems and _as_tuples(backbone["options"][name]) != _as_tuples(state["options"][name])]
    if problems:
        raise UserError("\n  ".join((f"{path}: is not a checkpoint of this version of PDS; use another:", *problems)))
    return state


def refuse_another_run(path: Path, saved: dict, options: dict, fingerprints: dict, remedy: str = OTHER_FOLDERS) -> None:
    """Raise UserError where the checkpoint `saved` in `path` does not belong to the run that these values describe.

    options: those that must be equal. fingerprints: of data, split, pattern and (stage 2) the backbone.
    """
    differences = [f"{name}: {saved['options'].get(name, 'no such setting')!r} there, {value!r} now"
                   for name, value in options.items() if _as_tuples(saved["options"].get(name)) != _as_tuples(value)]
    differences += [f"the {name}: not the same" for name, value in fingerprints.items()
                    if saved["fingerprints"].get(name) != value]
    if differences:
        raise UserError(f"{path} belongs to another run:\n  " + "\n  ".join(differences)
                        + f"\nIt is left unchanged. {remedy}")


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def content_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights, independent of how they are stored."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

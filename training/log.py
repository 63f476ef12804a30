"""What a run records about itself: log.csv, TensorBoard, run.json; and output that never ends it."""

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.checkpoint import Checkpoint
from training.distributed import is_main_rank, world_size
from utils.errors import UserError, visible
from utils.files import cannot_write, read_json, read_text, write_text

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "nibabel", "skimage", "tqdm", "PIL")


class Log:
    """Appends rows to a CSV file on the main rank, and shows their curves in TensorBoard if asked to.

    columns: "kind" (training, validation or samples), "step", and others. A run that resumes at `step` drops the
    rows of later steps, and writes none of this step twice. Raises UserError if the file belongs to another run.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int, run_id: str, tensorboard: bool = False):
        self.path, self.columns, self._board = path, columns, None
        if not is_main_rank():
            return
        owner, header = path.with_name("run_id.txt"), ",".join(columns) + "\n"
        text, known = map(_text_of, (path, owner))
        rows = re.findall(rf"^((\w+),(\d{{1,18}})(?:,[^,\n\0]*){{{len(columns) - 2}}}\n)", text, re.M)  # none is torn
        if (os.path.exists(path) and not text.startswith(header)) or (rows and known.strip() != run_id):
            raise UserError(f"{path}: belongs to another run than opt.checkpoint_dir, or cannot be read. Move the "
                            "old results away, or choose another opt.result_dir")
        write_text(path, header + "".join(row for row, _, at in rows if int(at) <= step))
        self._kept = {(kind, step) for _, kind, at in rows if int(at) == step}
        write_text(owner, run_id)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self._board = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1)  # hides later steps
            except Exception as error:
                print(f"note: no TensorBoard ({error}): curves are in log.csv only; try pip install tensorboard")

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append a row; floats with six significant digits."""
        if not is_main_rank() or (kind, step) in self._kept:
            return
        cells = [{"kind": kind, "step": step, **values}.get(name, "") for name in self.columns]
        try:
            with open(self.path, "a") as file:
                file.write(",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._show(lambda board: [board.add_scalar(f"{kind}/{name}", value, step)
                                  for name, value in values.items() if name != "epoch"])

    def picture(self, path: Path, step: int) -> None:
        """Show a picture in TensorBoard."""
        self._show(lambda board: board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC"))

    def _show(self, add: Callable) -> None:
        try:
            if self._board:
                add(self._board)
                self._board.flush()  # a killed process loses nothing that a checkpoint follows
        except Exception as error:  # TensorBoard never stops a run
            print(f"note: TensorBoard failed ({error}) and is not used any more; log.csv goes on", flush=True)
            self._board = None


def _text_of(path: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return read_text(path, errors="replace")  # a killed run leaves half a letter
    return ""


@contextlib.contextmanager
def robust_output() -> Iterator[None]:
    """Let no print in the block fail: Ctrl-C also ends the `tee` in `python main.py | tee log`, and disks fill up.

    On stdout, nothing that a file or a path holds controls the terminal; stderr has the progress bars.
    """
    streams = [each or open(os.devnull, "w") for each in (sys.stdin, sys.stdout, sys.stderr)]  # noqa: SIM115 None: closed
    for stream in streams[1:]:
        def write(text, stream=stream):
            try:
                type(stream).write(stream, visible(text) if stream is streams[1] else text)
                stream.flush()
            except OSError:  # drop it, and what the stream still holds
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        stream.reconfigure(errors="backslashreplace")  # letters that the locale lacks
        stream.write = write
    with contextlib.redirect_stdout(streams[1]), contextlib.redirect_stderr(streams[2]):
        yield


def write_run_record(path: Path, run: Checkpoint, settings: dict, defaults: dict, split: dict[str, list[str]]) -> None:
    """Write run.json: data, alignment, split (role -> pairs), and of every start time, settings, versions, machine."""
    starts = []
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        earlier = read_json(path)
        starts = list(earlier["starts"]) if earlier["run_id"] == run.run_id else []
    starts.append({
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": run.step, "settings": settings,
        "changed": {name: value for name, value in settings.items() if value != defaults[name]},
        "code": subprocess.getoutput(f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --dirty "
                                     "--abbrev=40 --exclude='*' 2> /dev/null"),
        "versions": {name: getattr(sys.modules.get(name), "__version__", "") for name in PACKAGES},
        "machine": {"name": platform.node(), "system": platform.platform(), "python": platform.python_version(),
                    "cores": os.cpu_count(), "threads": torch.get_num_threads(), "ranks": world_size(),
                    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}})
    record = {"run_id": run.run_id, "stage": run.stage, "fingerprints": run.metadata["fingerprints"],
              "alignment": run.metadata["alignment"], "split": split, "starts": starts}
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")

"""TensorBoard, where it is installed: the curves of log.csv and the sample grids. Its failure never stops a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CURVES = ("loss", "gradient_norm", "learning_rate", "x0_error", "psnr", "ssim")


class Board:
    """Writes event files into `folder`, anew at every start: from what log.csv holds of a run that continues.

    So nothing is there twice, or lost with a process that was killed. reviewed: the last step whose grid is there.
    """

    def __init__(self, folder: Path, rows: list[dict], reviewed: int):
        self._writer = None
        self._try(lambda: self._open(folder))
        for row in rows:
            self.add(row["kind"], int(row["step"]), {name: float(row[name]) for name in CURVES if row.get(name)})
        for path in sorted(folder.parent.glob("step_*.png")):
            if (found := re.fullmatch(r"step_([0-9]+)", path.stem)) and int(found[1]) <= reviewed:
                self.picture(path, int(found[1]))

    def _open(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("note: TensorBoard is not installed (pip install tensorboard): curves are in log.csv only")
            return
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(folder, flush_secs=30)

    def add(self, kind: str, step: int, values: dict) -> None:
        """The curves among these values; kind: as in log.csv, the curves' group."""
        for name in CURVES:
            if self._writer and isinstance(values.get(name), float):
                self._try(lambda name=name: self._writer.add_scalar(f"{kind}/{name}", values[name], step))

    def picture(self, path: Path, step: int) -> None:
        """A picture that was just written, for example step_000100.png, and all that was added before."""
        if self._writer:
            self._try(lambda: self._writer.add_image(path.stem.split("_")[0], np.asarray(Image.open(path)), step,
                                                     dataformats="HWC"))
        if self._writer:
            self._try(lambda: self._writer.flush())

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, training goes on
            print(f"note: TensorBoard failed ({error}) and is left out from here on; log.csv goes on", flush=True)
            self._writer = None

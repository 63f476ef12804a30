"""What a run leaves for programs to read: log.csv, one row per step and per validation; and whom it speaks to."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from utils.board import Board
from utils.distributed import writes
from utils.files import cannot_write, write_table, write_text


class Heard:
    """A text stream that goes on silently once it cannot be written: `| tee` ends with the same Ctrl-C, disks fill.

    What a file's name holds that is no text is written as an escape.
    """

    def __init__(self, stream: TextIO | None):
        stream = stream or open(os.devnull, "w")  # noqa: SIM115 closed, as by cron
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def still_heard() -> Iterator[None]:
    """Standard output and error are `Heard` in the block."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a closed one's number would be that of a file
        pass
    os.close(number)
    with contextlib.redirect_stdout(Heard(sys.stdout)), contextlib.redirect_stderr(Heard(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()


class LogError(ValueError):
    """A log that belongs to another run; the message says what to do."""


class Log:
    """Appends rows to a CSV file, on the first rank. A continued run first drops the rows of what it does again.

    columns: the first two must be "kind" (training, validation or samples) and "step". step, reviewed: the last step
    that is trained, and validated. run_id: the same for a run and its continuations, kept in run_id.txt beside the log.
    tensorboard: whether TensorBoard is written, too. Raises LogError where the file holds the steps of another run,
    FileError where it cannot be written.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int, reviewed: int, run_id: str,
                 tensorboard: bool = False):
        self.path, self.columns, self.board = path, columns, None
        if not writes():
            return
        rows, owner = [], path.with_name("run_id.txt")
        last = {"training": step, "validation": reviewed, "samples": reviewed}
        if path.exists():
            try:
                rows = self._rows()
                owned = not rows or owner.read_text(errors="replace").strip() == run_id
            except (OSError, csv.Error) as error:
                raise LogError(f"{path}, or {owner.name} beside it, cannot be read ({error}); move the old results "
                               "away, or set opt.result_dir to another folder") from error
            if not owned:
                raise LogError(f"{path} belongs to another run than the checkpoints in opt.checkpoint_dir (its run is "
                               f"named in {owner.name}). It is left as it is; set opt.result_dir to another folder, or "
                               "move the old results away")
        rows = [row for row in rows if int(row["step"]) <= last.get(row["kind"], -1)]
        write_table(path, columns, rows)
        write_text(owner, run_id)
        if tensorboard:
            self.board = Board(path.parent / "tensorboard", rows, reviewed)

    def _rows(self) -> list[dict]:
        """What the file holds, without what a power cut tore. Raises OSError, csv.Error."""
        with open(self.path, newline="", errors="replace") as file:
            reader = csv.DictReader(line.replace("\0", "") for line in file)
            if tuple(reader.fieldnames or self.columns) != self.columns:
                raise csv.Error(f"it has other columns than {', '.join(self.columns)}")
            return [row for row in reader if None not in row.values() and re.fullmatch("[0-9]+", row["step"])]

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row; floats with six significant digits."""
        if not writes():
            return
        row = {"kind": kind, "step": step, **values}
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(
                    f"{row[name]:.6g}" if isinstance(row.get(name), float) else row.get(name, "")
                    for name in self.columns)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self.board:
            self.board.add(kind, step, values)

    def picture(self, path: Path, step: int) -> None:
        """Show a sample grid that was just written in TensorBoard, too."""
        if self.board:
            self.board.picture(path, step)

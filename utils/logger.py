"""What a run leaves for programs to read: log.csv, one row per step and per validation."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from utils.distributed import writes


class LogError(ValueError):
    """A log that belongs to another run; the message says what to do."""


class Log:
    """Appends rows to a CSV file, on the first rank. A continued run first drops the rows after its step.

    columns: the first two must be "kind" (training or validation) and "step". run_id: the same for a run and its
    continuations, kept in run_id.txt beside the log. Raises LogError where the file holds the steps of another run.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int, run_id: str):
        self.path, self.columns = path, columns
        if not writes():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept, owner = [], path.with_name("run_id.txt")
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
            kept = [row for row in rows if int(row["step"]) <= step]
            if rows and (not owner.exists() or owner.read_text() != run_id):
                raise LogError(f"{path} belongs to a run whose checkpoint is not in opt.checkpoint_dir. It is left as "
                               "it is; set opt.result_dir to another folder, or move the old results away")
        owner.write_text(run_id)
        temporary = path.with_name(f".{path.name}.part")
        with open(temporary, "w", newline="") as file:
            rows = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            rows.writeheader()
            rows.writerows(kept)
        os.replace(temporary, path)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row; floats with six significant digits."""
        if not writes():
            return
        row = {"kind": kind, "step": step, **values}
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(
                f"{row[name]:.6g}" if isinstance(row.get(name), float) else row.get(name, "") for name in self.columns)

"""Kill training again and again, start it again, and count what survives.

    python -m benchmarks.kills --kills 200 [any options of main.py]

Runs of both stages, of a small network on ten subjects of the demo. Each is killed (SIGKILL) at a random moment, or by
the system at a random byte of a checkpoint that it writes, and started again with the same command, until it ends. A
kill is survived where every checkpoint then loads, no more than checkpoint_every steps are lost, and the next start is
not refused. A run that ends must have left the files that the run that was never killed has, and no others: checkpoints
equal bit for bit, tables line by line.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import phantom
from utils.checkpoint import FILES, CheckpointError, read_checkpoint

WORDS = ["--base_channels", "8", "--unet_depth", "2", "--epochs", "6", "--refine_epochs", "6", "--batch_size", "2",
         "--sampling_steps", "4", "--coarse_samples", "1", "--checkpoint_every", "5", "--validate_every", "2",
         "--num_samples", "1", "--warmup_steps", "2", "--folds", "3", "--no-tensorboard"]
SUBJECTS = 10
# Where a file grows beyond the limit, the system ends the process at that byte
LIMITED = ("import resource, runpy, signal, sys; limit = int(sys.argv.pop(1)); "
           "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
           "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); runpy.run_path('main.py', run_name='__main__')")
SAME = ("model", "ema", "optimiser", "step", "reviewed", "best")  # in the end, however often a run was killed


@dataclass
class Run:
    """A stage trained in a folder of its own, and what was found out about it."""

    stage: str
    folder: Path
    words: list[str]
    every: int = 5  # opt.checkpoint_every
    kills: int = 0
    strays: int = 0  # temporary files that kills have left, until the next start
    problems: list[str] = field(default_factory=list)

    def command(self, limit: int = 0) -> list[str]:
        folders = [f"--{name}={self.folder / part}" for name, part in
                   (("checkpoint_dir", "checkpoints"), ("result_dir", "results"), ("cache_dir", "cache"))]
        program = ["-c", LIMITED, str(limit)] if limit else ["main.py"]
        return [sys.executable, *program, *self.words, *folders]

    def checkpoints(self) -> dict[str, dict]:
        """File name -> content, of those that are there."""
        found = {}
        for name in FILES[self.stage]:
            path = self.folder / "checkpoints" / name
            try:
                found |= {name: read_checkpoint(path, (self.stage,))} if path.exists() else {}
            except CheckpointError as error:
                self.problems.append(f"kill {self.kills}: {error}")
        return found

    def logged(self) -> int:
        """The last step that was trained."""
        log = self.folder / "results" / ("stage1" if self.stage == "stage 1" else "refine") / "log.csv"
        if not log.exists():
            return 0
        with open(log, newline="") as file:
            return max([int(row["step"]) for row in csv.DictReader(file) if row["kind"] == "training"], default=0)

    def left(self) -> list[Path]:
        """Files that belong to a write or a run that is not over."""
        return [path for path in self.folder.rglob(".*") if path.suffix in (".part", ".lock") or path.name == ".lock"]

    def start(self, delay: float, limit: int = 0) -> bool:
        """Run until it ends, is killed after `delay` seconds, or ends at byte `limit` of a file; whether it was killed.
        """
        process = subprocess.Popen(self.command(limit), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            errors = process.communicate(timeout=delay)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            errors = process.communicate()[1]
        if process.returncode >= 0:
            if process.returncode:
                self.problems.append(f"start after kill {self.kills}: status {process.returncode}\n{errors[-2000:]}")
            return False
        self.kills += 1
        self.strays += sum(path.suffix == ".part" for path in self.left())
        saved = max([state["step"] for state in self.checkpoints().values()], default=0)
        if self.logged() > saved + self.every:
            self.problems.append(f"kill {self.kills}: step {self.logged()} was reached, {saved} was saved")
        return True

    def compare(self, reference: Run) -> None:
        """Note where this run, which has ended, is not what the one that was never killed is."""
        mine, theirs = self.checkpoints(), reference.checkpoints()
        self.problems += [f"{name}: {key} is not the same" for name in FILES[self.stage] for key in SAME
                          if not identical(mine.get(name, {}).get(key), theirs[name][key])]
        here, there = ({path.relative_to(run.folder): path for path in run.folder.rglob("*")
                        if path.relative_to(run.folder).parts[0] != "cache" and path.is_file()}
                       for run in (self, reference))
        self.problems += [f"{path} was left, or is missing" for path in sorted(here.keys() ^ there.keys())]
        self.problems += [f"{path} is not the same" for path in sorted(here.keys() & there.keys())
                          if path.suffix == ".csv" and here[path].read_text() != there[path].read_text()]


def identical(a: object, b: object) -> bool:
    """Whether two states hold bit-identical values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def kill_until_it_ends(run: Run, reference: Run, seconds: float, most: int, random: np.random.Generator) -> None:
    """Start, kill and start again, at most so many times; then let it end, and compare. seconds: of a whole run."""
    size = (reference.folder / "checkpoints" / FILES[run.stage][0]).stat().st_size
    while run.kills < most and not run.problems:
        in_a_write = random.random() < 0.4
        limit = int(random.uniform(0.3, 1) * size) if in_a_write else 0
        if not run.start(3 * seconds if in_a_write else random.uniform(0, seconds), limit):
            break
    if not run.problems:
        run.start(20 * seconds + 60)
    if not run.problems:
        run.compare(reference)


def small_study(folder: Path, source: Path) -> Path:
    """A table of the first subjects of the demo, which is written to `source` if it is not there."""
    if not (source / phantom.COMPLETE).exists():
        phantom.write_demo(source, tqdm)
    rows = [(name, *(source.resolve() / name / kind / f"{name}_{ending}.nii.gz"
                     for kind, ending in phantom.NAMES.values()))
            for name in sorted(path.name for path in source.glob("sub-*"))[:SUBJECTS]]
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("subject", *phantom.NAMES), *rows])
    return folder / "pairs.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("results/kills"), help="a folder that is not there yet")
    own, words = parser.parse_known_args()
    if own.out.exists():
        raise SystemExit(f"{own.out} is there already; remove it, or choose another --out")
    own.out.mkdir(parents=True)
    words = [f"--data_root={small_study(own.out, Path('data/demo'))}", *WORDS, *words]
    random, seconds = np.random.default_rng(own.seed), {}
    references = {"stage 1": Run("stage 1", own.out / "reference 1", words)}
    backbone = references["stage 1"].folder / "checkpoints" / "best_model.pth"
    references["stage 2"] = Run("stage 2", own.out / "reference 2", [*words, "--refine", f"--resume_path={backbone}"])
    for stage, reference in references.items():
        start = time.perf_counter()
        reference.start(3600)
        seconds[stage] = time.perf_counter() - start
        if reference.problems:
            raise SystemExit("\n".join(reference.problems))
    runs = []
    with tqdm(total=own.kills, unit="kill") as bar:
        while (left := own.kills - sum(run.kills for run in runs)) > 0:
            stage = ("stage 1", "stage 2")[len(runs) % 2]
            run = Run(stage, own.out / f"run {len(runs)}", references[stage].words)
            runs.append(run)
            kill_until_it_ends(run, references[stage], seconds[stage], left, random)
            bar.update(run.kills)
            bar.write(f"{run.folder.name}, {stage}: kills {run.kills}, in a write {run.strays}; "
                      f"{'; '.join(run.problems) or 'in the end as the run that was never killed, bit for bit'}")
            if not run.problems:
                shutil.rmtree(run.folder)
    survived = [run for run in runs if not run.problems]
    kills, strays, whole = (sum(values) for values in zip(*((run.kills, run.strays, run.kills * (run in survived))
                                                           for run in runs)))
    print(f"kills {kills}, of which {strays} left a file half written; survived {whole}; runs {len(runs)}, of which "
          f"{len(survived)} ended as those that were never killed")


if __name__ == "__main__":
    main()

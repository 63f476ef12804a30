"""Kill training again and again, run the same command again, and count the kills that it survives.

    python -m benchmarks.kills --kills 200 [any options of main.py]

Trains both stages of a small network on ten subjects of the demo. Each run is killed (SIGKILL) at random moments, or by
the system at a random byte of a checkpoint that it writes, and started again until it ends. A kill is survived where
every checkpoint then loads, at most checkpoint_every steps are lost, and the next start succeeds. A run that ends must
leave the same files as a run that was never killed: checkpoints equal bit for bit, tables line by line.
"""

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

from benchmarks import STAGE_1_FIRST
from data import demo
from training.checkpoint import FILES, STAGE_1, STAGE_2, read_checkpoint
from utils.errors import UserError

CHECKPOINT_EVERY = 5
OPTIONS = [*STAGE_1_FIRST, "--base_channels=8", "--unet_depth=2", "--epochs=6", "--refine_epochs=6", "--batch_size=2",
           "--sampling_steps=4", f"--checkpoint_every={CHECKPOINT_EVERY}", "--validate_every=2",
           "--num_samples=1", "--warmup_steps=2", "--folds=3", "--no-tensorboard", "--max_overhead=1"]
SUBJECTS = 10
KILLS_IN_A_WRITE = 0.4  # fraction
# Where a file grows beyond the limit, the system ends the process at that byte
LIMITED = ("import resource, runpy, signal, sys; limit = int(sys.argv.pop(1)); "
           "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
           "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); runpy.run_path('main.py', run_name='__main__')")
SAME = ("model", "ema", "optimiser", "step", "best")  # parts of a checkpoint that kills must not change


@dataclass
class Run:
    """A run of one stage in a folder of its own, and the problems found in it."""

    stage: str
    folder: Path
    options: list[str]
    kills: int = 0
    torn: int = 0  # temporary files that kills left
    problems: list[str] = field(default_factory=list)

    def start(self, seconds: float, limit: int = 0) -> bool:
        """Run until it ends, `seconds` have passed, or a file reaches `limit` bytes; returns whether it was killed."""
        folders = [f"--{name}_dir={self.folder / part}" for name, part in
                   (("checkpoint", "checkpoints"), ("result", "results"), ("cache", "cache"))]
        program = ["-c", LIMITED, str(limit)] if limit else ["main.py"]
        process = subprocess.Popen([sys.executable, *program, *self.options, *folders], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try:
            errors = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            errors = process.communicate()[1]
        if process.returncode > 0:
            self.problems.append(f"start after kill {self.kills}: status {process.returncode}\n{errors[-2000:]}")
        if process.returncode >= 0:
            return False
        self.kills += 1
        self.torn += len(list(self.folder.rglob(".*.part")))
        saved, trained = max([state["step"] for state in self.checkpoints().values()], default=0), self.last_step()
        if trained > saved + CHECKPOINT_EVERY:
            self.problems.append(f"kill {self.kills}: step {trained} was reached, {saved} was saved")
        return True

    def checkpoints(self) -> dict[str, dict]:
        """File name -> content."""
        found = {}
        for path in sorted((self.folder / "checkpoints").glob("*.pth")):
            try:
                found[path.name] = read_checkpoint(path, (self.stage,))
            except UserError as error:
                self.problems.append(f"kill {self.kills}: {error}")
        return found

    def last_step(self) -> int:
        """The last step in log.csv."""
        steps = [0]
        for log in self.folder.glob("results/*/log.csv"):
            with open(log, newline="") as file:
                steps += [int(row["step"]) for row in csv.DictReader(file) if row["kind"] == "training"]
        return max(steps)

    def compare(self, reference: "Run") -> None:
        """Note every difference between this finished run and the one that was never killed."""
        ours, theirs = self.checkpoints(), reference.checkpoints()
        self.problems += [f"{name}: {key} differs" for name in FILES[self.stage] for key in SAME
                          if not identical(ours.get(name, {}).get(key), theirs[name][key])]
        ours, theirs = ({path.relative_to(run.folder): path for path in run.folder.rglob("*")
                         if path.is_file() and path.relative_to(run.folder).parts[0] != "cache"}
                        for run in (self, reference))
        self.problems += [f"{name} is missing, or should not be there" for name in sorted(ours.keys() ^ theirs.keys())]
        self.problems += [f"{name} differs" for name in sorted(ours.keys() & theirs.keys())
                          if name.suffix == ".csv" and ours[name].read_text() != theirs[name].read_text()]


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
    """Start and kill a run, at most `most` times; then let it end and compare. seconds: how long a whole run takes."""
    size = (reference.folder / "checkpoints" / FILES[run.stage][0]).stat().st_size
    killed = True
    while killed and run.kills < most and not run.problems:
        if random.random() < KILLS_IN_A_WRITE:
            killed = run.start(3 * seconds, limit=int(random.uniform(0.3, 1) * size))
        else:
            killed = run.start(random.uniform(0, seconds))
    if killed and not run.problems:
        run.start(20 * seconds + 60)
    if not run.problems:
        run.compare(reference)


def small_study(folder: Path, source: Path) -> Path:
    """Write a table of the first subjects of the demo, which is written to `source` if it is missing."""
    if not (source / demo.COMPLETE).exists():
        demo.write_demo(source)
    rows = [(path.name, *(path.resolve() / kind / f"{path.name}_{ending}.nii.gz" for kind, ending in
                          demo.NAMES.values())) for path in sorted(source.glob("sub-*"))[:SUBJECTS]]
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("subject", *demo.NAMES), *rows])
    return folder / "pairs.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("results/kills"), help="a new folder")
    own, options = parser.parse_known_args()
    if own.out.exists():
        raise SystemExit(f"{own.out} exists; remove it, or choose another --out")
    own.out.mkdir(parents=True)
    options = [f"--data_root={small_study(own.out, Path(demo.DEMO_ROOT))}", *OPTIONS, *options]
    prior = own.out / "reference 1/checkpoints/best_model.pth"
    references = {STAGE_1: Run(STAGE_1, own.out / "reference 1", options),
                  STAGE_2: Run(STAGE_2, own.out / "reference 2", [*options, "--refine", f"--resume_path={prior}"])}
    random, seconds, runs = np.random.default_rng(own.seed), {}, []
    for stage, reference in references.items():
        start = time.perf_counter()
        reference.start(3600)
        seconds[stage] = time.perf_counter() - start
        if reference.problems:
            raise SystemExit("\n".join(reference.problems))
    with tqdm(total=own.kills, unit="kill") as bar:
        while bar.n < own.kills:
            stage = (STAGE_1, STAGE_2)[len(runs) % 2]
            run = Run(stage, own.out / f"run {len(runs)}", references[stage].options)
            runs.append(run)
            kill_until_it_ends(run, references[stage], seconds[stage], own.kills - bar.n, random)
            bar.update(run.kills)
            bar.write(f"{run.folder.name}, {stage}: {run.kills} kills, {run.torn} in a write; "
                      f"{'; '.join(run.problems) or 'ended like the run that was never killed, bit for bit'}")
            if not run.problems:
                shutil.rmtree(run.folder)
            elif not run.kills:
                break  # it does not even start
    passed = [run for run in runs if not run.problems]
    print(f"{bar.n} kills, {sum(run.torn for run in runs)} in the middle of a write: survived "
          f"{sum(run.kills for run in passed)}. {len(runs)} runs: {len(passed)} ended like those never killed")


if __name__ == "__main__":
    main()

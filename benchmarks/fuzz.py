"""Change files at random, use them, and count how that ends: checkpoints, NIfTI files, tables and trees.

    python -m benchmarks.fuzz --checkpoints 2000 --volumes 2000 --tables 1000

Every file is used in a child process of its own with limits on its memory and time, by the real program: checkpoints by
sample.py, by stage 2 and by resuming; volumes, tables and trees by `python main.py --check`. A case is survived where
the child ends with status 0, 2 or 3 within the limits, prints no traceback, and leaves every input file as it was.
Prints a table, and the number of each case that is not survived: `--only 17` repeats it.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

import main as program
import sample
from benchmarks import STAGE_1_FIRST
from data import demo
from data.volumes import save_image
from utils.files import write_table

MEMORY, SECONDS = 4 * 2**30, 60  # of a child, beyond what PyTorch has mapped; it is killed after so many seconds
SURVIVED = (0, 2, 3)
SUBJECTS = 4
SMALL = [*STAGE_1_FIRST, "--base_channels=8", "--unet_depth=2", "--epochs=2", "--refine_epochs=2", "--batch_size=2",
         "--no-tensorboard", "--sampling_steps=2", "--validate_every=1", "--num_samples=1", "--warmup_steps=1",
         "--folds=2", "--device=cpu"]
STRANGE = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, float("nan"), float("inf"), 1e300, "", "x", "\x1b[2J",
           "../x", "a\nb", "~", "$X", b"x", (), [], {}, [[]], {"a": 1}, (1, 2, 3), [0.0] * 3]
CELLS = ["", "n/a", "NaN", "~/x", "$X/y", "a\tb", '"', "'", ",", ";", "\0", "\x1b[2J", "é", "腦", "\u202e", "-1", "1e9",
         "0", "ses-1", "sub-1", "sub-01", "../..", "/dev/zero", "/", ".", "x" * 300, "\ufeff", "\r"]


def write_study(folder: Path) -> Path:
    """Some subjects of the demo and their table."""
    rows = []
    for number in range(SUBJECTS):
        anatomy = demo.Anatomy(number)
        rows.append({"subject": anatomy.name, "group": anatomy.group, "fold": str(number % 2)})
        for modality, image in demo.scan(anatomy).items():
            rows[-1][modality] = f"{anatomy.name}_{modality}.nii.gz"
            save_image(folder / rows[-1][modality], image)
    write_table(folder / "pairs.csv", ("subject", "group", "fold", "fmri", "dmri"), rows)
    return folder / "pairs.csv"


def flip_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Some bytes changed, cut, doubled or inserted, more often near the start."""
    content = bytearray(content)
    for _ in range(random.integers(1, 6)):
        at = int(len(content) * random.random() ** random.choice([1, 4]))
        kind = random.integers(5)
        if kind == 0:
            content[at:at + 1] = bytes([random.integers(256)])
        elif kind == 1:
            content[at:at + 4] = random.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f"])
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = content[at:at + random.integers(1, 400)]
        else:
            content[at:at] = random.bytes(random.integers(1, 9))
    return bytes(content)


def change_value(value: object, random: np.random.Generator, depth: int = 0) -> object:
    """Somewhere in nested values, a strange one; or a tensor of another shape, type or content."""
    if isinstance(value, dict) and value and random.random() > 0.05:
        key = list(value)[random.integers(len(value))]
        kind = random.integers(12)
        if kind == 0:
            return {name: each for name, each in value.items() if name != key}
        if kind == 1:
            return {**value, random.choice(["x", "\x1b", key * 2 if isinstance(key, str) else "y"]): value[key]}
        return {**value, key: change_value(value[key], random, depth + 1)}
    if isinstance(value, (list, tuple)) and value and random.random() > 0.3:
        at = random.integers(len(value))
        return type(value)(change_value(each, random, depth + 1) if i == at else each for i, each in enumerate(value))
    if isinstance(value, torch.Tensor) and random.random() > 0.1:
        changes = [lambda x: x * float("nan"), lambda x: x * 1e30, lambda x: x.flatten(), lambda x: x[None],
                   lambda x: x.double(), lambda x: torch.zeros(1).expand(10**9), lambda x: x.to(torch.complex64),
                   lambda x: torch.zeros((1,) * x.ndim).expand(x.shape), lambda x: x.to_sparse(), lambda x: x.bool(),
                   lambda x: x.half(), lambda x: torch.zeros(0), lambda x: x.to("meta"),
                   lambda x: x.movedim(0, -1) if x.ndim else x]
        return changes[random.integers(len(changes))](value)
    return STRANGE[random.integers(len(STRANGE))]


class Fuzz:
    """A study, checkpoints trained on it, and cases made of them: a folder of their own, a program, and its words."""

    def __init__(self, folder: Path):
        self.folder, self.table = folder, write_study(folder)
        self.words = [*SMALL, f"--data_root={self.table}", f"--checkpoint_dir={folder / 'run'}",
                      f"--result_dir={folder / 'results'}", f"--cache_dir={folder / 'cache'}"]
        for more in ([], ["--refine", f"--resume_path={folder / 'run/best_model.pth'}"]):
            if program.main([*self.words, *more]):
                raise SystemExit("the checkpoints to change could not be trained")

    def checkpoint(self, case: Path, random: np.random.Generator) -> tuple[Callable, list[str]]:
        """Bytes or values of one checkpoint changed, and a program that opens it."""
        kind = int(random.integers(3))
        name = ("best_model.pth", "best_refine.pth", "last_model.pth")[kind]
        source, target = self.folder / "run" / name, case / name
        if random.random() < 0.3:
            target.write_bytes(flip_bytes(source.read_bytes(), random))
        else:
            state = torch.load(source, weights_only=True)
            for _ in range(random.integers(1, 3)):
                state = change_value(state, random)
            torch.save(state, target)
        words = [*SMALL, f"--data_root={self.table}", f"--cache_dir={self.folder / 'cache'}"]
        if kind == 2:  # resume the run
            return program.main, [*words, "--epochs=3", f"--checkpoint_dir={case}", f"--result_dir={case / 'r'}"]
        if random.random() < 0.3:
            return program.main, [*words, "--refine", f"--resume_path={target}", f"--checkpoint_dir={case / 'c'}",
                                  f"--result_dir={case / 'r'}", "--max_steps=1"]
        joint = [["--joint_samples=1"], []][random.integers(2)]
        return sample.main, [*words, *joint, f"--resume_path={target}", f"--sample_dir={case / 's'}"]

    def volume(self, case: Path, random: np.random.Generator) -> tuple[Callable, list[str]]:
        """One scan with changed bytes, header or voxels."""
        for file in self.folder.glob("*.nii.gz"):
            (case / file.name).symlink_to(file)
        target = sorted(case.glob("*.nii.gz"))[random.integers(2 * SUBJECTS)]
        image, packed = nib.load(self.folder / target.name), random.random() < 0.8
        content = gzip.decompress(target.read_bytes())
        target.unlink()
        kind = random.integers(3)
        if kind == 0:  # a field of the header
            header = bytearray(content[:352])
            fields = image.header.template_dtype.fields
            name = list(fields)[random.integers(len(fields))]
            dtype, offset = fields[name][:2]
            value = random.choice([0, 1, 255, 127, 128, int(random.integers(256))], dtype.itemsize)
            header[offset:offset + dtype.itemsize] = bytes(value.astype(np.uint8))
            content = bytes(header) + content[352:]
        elif kind == 1:  # voxels
            voxels = np.asarray(image.dataobj, np.float32) * random.choice([1e-44, 1e-20, 1e20, 1e37, 1, -1])
            places = random.random(voxels.shape) < random.choice([1e-4, 0.01, 0.5, 1])
            voxels[places] = random.choice([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0, 2**31])
            content = nib.Nifti1Image(voxels, image.affine).to_bytes()
        else:
            content = flip_bytes(content, random)
        content = gzip.compress(content, 1) if packed else content
        target.write_bytes(flip_bytes(content, random) if random.random() < 0.3 else content)
        shutil.copy(self.table, case)
        return program.main, self.check(case / "pairs.csv", case)

    def table_or_tree(self, case: Path, random: np.random.Generator) -> tuple[Callable, list[str]]:
        """A table with changed cells or bytes, or a BIDS tree with odd names, links and participants."""
        if random.random() < 0.6:
            rows = [line.split(",") for line in self.table.read_text().splitlines()]
            for row in rows[1:]:
                row[3:] = [str(self.folder / cell) for cell in row[3:]]
            for _ in range(random.integers(1, 5)):
                row = rows[random.integers(len(rows))]
                row[random.integers(len(row))] = random.choice(CELLS)
            text = random.choice([",", ",", "\t", ";"]).join
            content = "\n".join(map(text, rows)).encode()
            (case / "pairs.csv").write_bytes(flip_bytes(content, random) if random.random() < 0.3 else content)
            return program.main, self.check(case / "pairs.csv", case)
        tree = case / "tree"
        files = sorted(self.folder.glob("*.nii.gz"))
        for number in range(random.integers(1, 9)):
            subject = f"sub-{random.choice(['1', '01', '2', '10', 'é', 'a.b', 'x' * 90])}"
            session = random.choice(["", "", "ses-1/", "ses-01/", "ses-b/"])
            suffix = random.choice(["bold", "dwi", "desc-preproc_bold", "T1w"])
            entity = random.choice(["", "run-1_", "run-10_", "echo-2_", "part-phase_"])
            label = f"_{session[:-1]}" if session else ""
            folder = tree / subject / session / random.choice(["func", "dwi", "."])
            path = folder / f"{subject}{label}_{entity}{suffix}.nii.gz"
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = random.integers(6)
                if kind == 0:
                    os.mkfifo(path)
                elif kind == 1:
                    path.parent.joinpath("loop").symlink_to(random.choice(["..", ".", "../..", "loop", "/"]))
                else:
                    path.symlink_to(files[number % len(files)] if kind > 2 else "../.git/annex/objects/x")
        tree.mkdir(exist_ok=True)
        lines = ["participant_id\tgroup", *(f"{random.choice(CELLS)}\t{random.choice(CELLS)}" for _ in range(4))]
        with contextlib.suppress(OSError):
            os.mkfifo(tree / "participants.tsv") if random.random() < 0.1 else (tree / "participants.tsv").write_bytes(
                flip_bytes("\n".join(lines).encode("utf-8", "surrogatepass"), random))
        more = ["--share_scans"] if random.random() < 0.5 else []
        return program.main, [*self.check(tree, case), *more]

    def check(self, root: Path, case: Path) -> list[str]:
        return [*SMALL, "--check", f"--data_root={root}", f"--result_dir={case / 'r'}", f"--cache_dir={case / 'cache'}"]


def in_a_child(run: Callable, words: list[str], log: Path) -> tuple[int, float]:
    """Run a program in a fork with limits; returns its status (negative: the signal that ended it) and seconds."""
    start, child = time.monotonic(), os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
            signal.alarm(SECONDS)
            status = run(words)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
            if path.is_file() and path.suffix in (".gz", ".csv", ".pth")}


def fuzz(study: Fuzz, name: str, make: Callable, count: int, seed: int, only: int | None) -> list[str]:
    """Try so many cases of a kind; returns a row of the table."""
    outcomes, lost, longest, largest, before = Counter(), [], 0.0, 0.0, fingerprint(study.folder)
    for number in tqdm(range(count) if only is None else [only], desc=name):
        case = study.folder / "case"
        case.mkdir()
        run, words = make(case, np.random.default_rng([seed, number]))
        status, seconds = in_a_child(run, words, study.folder / "log.txt")
        said = (study.folder / "log.txt").read_text(errors="replace")
        longest = max(longest, seconds)
        outcomes[status] += 1
        largest = max(largest, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)  # KiB on Linux
        fine = status in SURVIVED and "Traceback" not in said and "out of memory" not in said
        if not fine or fingerprint(study.folder) != before:
            lost.append(number)
            tqdm.write(f"{name} {number}: status {status}, {seconds:.0f} s\n{said[-1500:]}")
        elif only is not None:
            tqdm.write(said)
        shutil.rmtree(case)
        (study.folder / "log.txt").unlink()
    return [name, str(sum(outcomes.values())), *(str(outcomes[status]) for status in SURVIVED), f"{longest:.1f}",
            f"{largest:.2f}", str(len(lost)), " ".join(map(str, lost[:10]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in ("--checkpoints", "--volumes", "--tables"):
        parser.add_argument(kind, type=int, default=0, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case, and print what it says")
    own = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    with tempfile.TemporaryDirectory() as folder:
        study = Fuzz(Path(folder))
        lines = [["files", "cases", "finished", "refused", "stopped", "longest, s", "largest so far, GiB",
                  "not survived", "numbers"]]
        lines.append(["---"] * len(lines[0]))
        makers = {"checkpoints": study.checkpoint, "volumes": study.volume, "tables": study.table_or_tree}
        for name, make in makers.items():
            if count := getattr(own, name):
                lines.append(fuzz(study, name, make, count, own.seed, own.only))
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()

"""Faults while a run writes, resumes or is stopped, injected into the real program. docs/reliability.md lists them."""

import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from benchmarks.kills import SAME, Run
from models.losses import pattern_aware_loss
from tests.conftest import CHILD, PROGRAM, ROOT, Child, arguments, read_csv, signal_at, signalled, weights
from training.batches import training_batch
from training.checkpoint import FILES, read_checkpoint

STAGES = {1: "stage 1", 2: "stage 2"}
LAST, BEST = ({stage: FILES[name][number] for stage, name in STAGES.items()} for number in (0, 1))
FOLDER = {1: "stage1", 2: "refine"}


def words_of(stage: int, study_csv: Path, trained: Path, folder: Path, *more: str) -> list[str]:
    """A run of this stage in a folder of its own, with the cache of `trained`; stage 2 refines the backbone there."""
    backbone = ["--refine", "--resume_path", str(trained / "checkpoints/best_model.pth")] if stage == 2 else []
    return arguments(study_csv, folder, *backbone, "--cache_dir", str(trained / "cache"), *more)


def limit_files(size: int, killed: bool) -> str:
    """Code of a program whose files cannot grow beyond `size` bytes; the system kills it there, or the write fails."""
    then = "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    return (f"import resource, signal\n{then if killed else ''}\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n{PROGRAM}")


def hidden_files(folder: Path) -> list[Path]:
    """Temporary files and locks."""
    return [path for path in folder.rglob(".*") if path.is_file()]


def assert_same_state(path: Path, reference: Path) -> None:
    """Bit for bit."""
    mine, theirs = ({name: weights(each)[name] for name in SAME} for each in (path, reference))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def assert_same_run(stage: int, folder: Path, reference: Path) -> None:
    """Both checkpoints, all tables and the names of all results are those of the run that was never interrupted."""
    for name in (LAST[stage], BEST[stage]):
        assert_same_state(folder / "checkpoints" / name, reference / "checkpoints" / name)
    mine, theirs = ({path.relative_to(each).as_posix(): path for path in (each / "results" / FOLDER[stage]).rglob("*")}
                    for each in (folder, reference))
    assert mine.keys() == theirs.keys() and not hidden_files(folder)
    for name in mine:
        assert not name.endswith(".csv") or mine[name].read_text() == theirs[name].read_text(), name


def wait_for_rows(process: Child | subprocess.Popen, log: Path, count: int) -> None:
    """Until the log of a run has this many lines."""
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert process.poll() is None, process
        time.sleep(0.02)


# ---- Killed


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_at_random_moments_and_bytes_ends_as_if_never_killed(study_csv, trained, tmp_path, stage):
    """benchmarks/kills.py does this hundreds of times."""
    words, seed = words_of(stage, study_csv, trained, tmp_path, "--checkpoint_every", "3"), time.time_ns() % 2**32
    random, run = np.random.default_rng(seed), Run(STAGES[stage], tmp_path, words)
    size = (trained / "checkpoints" / LAST[stage]).stat().st_size
    for kill in range(5):
        child = Child(words, limit_files(int(random.uniform(0.3, 1) * size), True) if kill % 2 else PROGRAM)
        status = child.wait(random.uniform(0.1, 1))
        assert status.returncode in (0, -signal.SIGKILL, -signal.SIGXFSZ), (seed, status.stderr)
        saved = max((state["step"] for state in run.checkpoints().values()), default=0)
        assert not run.problems and run.last_step() <= saved + 3, (seed, run.problems)
    assert main.main(words) == 0
    assert_same_run(stage, tmp_path, trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_written_beside_training_are_those_of_their_step(study_csv, trained, tmp_path, stage):
    """As large models do: killed in the middle of a file and between two, and at last not killed."""
    beside = f"import training.checkpoint; training.checkpoint.LARGE = 0\n{PROGRAM}"
    words = words_of(stage, study_csv, trained, tmp_path, "--checkpoint_every", "1")
    size = (trained / "checkpoints" / LAST[stage]).stat().st_size
    for code in (f"import training.checkpoint; training.checkpoint.LARGE = 0\n{limit_files(int(0.5 * size), True)}",
                 "import training.checkpoint; training.checkpoint.LARGE = 0\n"
                 + signalled("training.optimise", "Optimiser.step", 4, signal.SIGKILL)):
        assert Child(words, code).wait().returncode in (-signal.SIGKILL, -signal.SIGXFSZ)
    done = Child(words, beside).wait()
    assert done.returncode == 0, done.stderr
    assert_same_run(stage, tmp_path, trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_between_two_steps_resumes_identically(study_csv, trained, tmp_path, stage, capsys):
    words = words_of(stage, study_csv, trained, tmp_path, "--checkpoint_every", "1")
    child = Child(words, signalled("training.optimise", "Optimiser.step", 4, signal.SIGKILL)).wait()
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert main.main(words) == 0 and "at step 3" in capsys.readouterr().out
    assert_same_run(stage, tmp_path, trained)


def test_killed_with_incomplete_visits_resumes_identically(incomplete_csv, tmp_path):
    """A synthetic source depends on the averaged weights of its step, and on the augmented target."""
    assert main.main(words_of(1, incomplete_csv, tmp_path, tmp_path, "--augment", "affine")) == 0
    code = signalled("training.optimise", "Optimiser.step", 4, signal.SIGKILL)
    for folder in ("never", "killed"):
        words = words_of(2, incomplete_csv, tmp_path, tmp_path / folder, "--checkpoint_every", "1", "--augment",
                         "affine", "--max_steps", "6")
        assert folder == "never" or Child(words, code).wait().returncode == -signal.SIGKILL
        assert main.main(words) == 0
    assert_same_run(2, tmp_path / "killed", tmp_path / "never")
    assert [row["role"] for row in read_csv(tmp_path / "never/results/refine/split.csv")].count("incomplete") == 3


@pytest.mark.parametrize("part, killed", [(0.4, True), (0.99, True), (0.5, False)])
def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_old_one(study_csv, trained, tmp_path, part, killed):
    """The system kills the program in the middle of the file, or the write fails, as where the disk is full."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    last, before = (folder / "checkpoints/last_model.pth" for folder in (tmp_path, trained))
    words = words_of(1, study_csv, trained, tmp_path, "--epochs", "4")
    child = Child(words, limit_files(int(part * last.stat().st_size), killed)).wait()
    assert child.returncode == (-signal.SIGXFSZ if killed else main.REFUSED) and "Traceback" not in child.stderr
    assert killed or ("last_model.pth: cannot be written (File too large; " in child.stderr and "MB" in child.stderr)
    assert [path.suffix for path in hidden_files(tmp_path) if path.name != ".lock"] == killed * [".part"]
    assert_same_state(last, before)
    assert main.main(words) == 0
    assert not hidden_files(tmp_path) and weights(last)["step"] == 8


@pytest.mark.parametrize("file, count", [("best_model.pth", 1), ("step_000006.png", 1), ("last_model.pth", 2)])
def test_killed_between_two_renames_resumes_identically(study_csv, trained, tmp_path, file, count):
    """Before the best model, the picture after it, or the second last_model.pth is in place."""
    words = words_of(1, study_csv, trained, tmp_path)
    child = Child(words, signalled("os", "replace", count, signal.SIGKILL, only=file)).wait()
    assert child.returncode == -signal.SIGKILL, child.stderr
    run = Run(STAGES[1], tmp_path, words)
    assert len(run.checkpoints()) == (1 if file == "best_model.pth" else 2) and not run.problems
    assert main.main(words) == 0
    assert_same_run(1, tmp_path, trained)


# ---- Asked to stop


@pytest.mark.parametrize("stage, during, count, number", [
    (1, "training.optimise.Optimiser.step", 3, signal.SIGHUP),
    (1, "data.study.cached_volume", 3, signal.SIGTERM),  # reading
    (1, "train.x0_error", 4, signal.SIGTERM),  # validating
    (1, "models.prior.Prior.sample", 1, signal.SIGINT),  # sampling for the picture
    (2, "train_refine.psnr", 3, signal.SIGTERM),  # validating
    (2, "train_refine.basic_scores", 2, signal.SIGINT),  # drawing
    (2, "train_refine.score", 2, signal.SIGTERM)])  # scoring the test subjects, at the end
def test_stopped_anywhere_resumes_identically(study_csv, trained, tmp_path, stage, during, count, number, capsys):
    cache = ["--cache_dir", str(tmp_path / "cache")] if "sample" in during else []
    words, start = words_of(stage, study_csv, trained, tmp_path, *cache), time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, during, count, number)
        assert main.main(words) == main.STOPPED
    assert time.monotonic() - start < 25
    said = capsys.readouterr()
    assert f"({signal.Signals(number).name.replace('SIG', 'received SIG')}); run the same command to resume" in said.out
    assert "Traceback" not in said.err and not hidden_files(tmp_path)
    if step := re.search("Stopped at step ([0-9]+) of 6", said.out):
        assert weights(tmp_path / "checkpoints" / LAST[stage])["step"] == int(step[1]) > 0
    assert main.main(words) == 0
    assert_same_run(stage, tmp_path, trained)


def test_stopped_by_the_time_limit(study_csv, trained, tmp_path, capsys):
    assert main.main(words_of(1, study_csv, trained, tmp_path, "--max_minutes", "1e-9")) == main.STOPPED
    assert "opt.max_minutes has passed" in capsys.readouterr().out


def test_the_reader_of_the_output_ends_with_the_same_ctrl_c(study_csv, trained, tmp_path):
    """As in `python main.py 2>&1 | tee log`."""
    code = signalled("training.optimise", "Optimiser.step", 3, signal.SIGINT)
    stopped = subprocess.Popen([sys.executable, "-c", code, *words_of(1, study_csv, trained, tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CHILD)
    stopped.stdout.read(10)
    stopped.stdout.close()
    assert stopped.wait(60) == main.STOPPED
    assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 3


def test_a_signal_after_the_end_does_not_change_the_status():
    code = ("import os, signal\nfrom utils.stop import exit_with, stop\n"
            "class Late:\n    def __del__(self): [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGINT)]\n"
            "with stop: os.kill(os.getpid(), signal.SIGTERM); status = 3 if stop else 0\n"
            "late = Late()\nexit_with(status)\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, env=CHILD).returncode == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_a_finished_run_repeats_its_end_and_says_so(study_csv, trained, tmp_path, stage, capsys):
    """The last validation writes the best model again where it is gone; the pictures are drawn again, too."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results" / FOLDER[stage] / "step_000006.png").unlink()
    (tmp_path / "checkpoints" / BEST[stage]).unlink()
    assert main.main(words_of(stage, study_csv, trained, tmp_path)) == 0
    assert f"Stage {stage} is finished: 6 steps" in capsys.readouterr().out
    assert_same_run(stage, tmp_path, trained)


# ---- Disks and files


FULL = """
import pathlib, shutil, subprocess, sys, main
disk = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], check=True)
statuses = [main.main([*sys.argv[2:], "--max_steps", "2"])]
(disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
statuses.append(main.main(sys.argv[2:]))
(disk / "filler").unlink()
statuses.append(main.main(sys.argv[2:]))
print("statuses", statuses, [str(path) for path in disk.rglob(".*")])
"""


def test_a_disk_that_is_really_full(study_csv, trained, tmp_path):
    """Checkpoints, pictures and the log on a file system of 10 MB, which only this child sees."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", disk]).returncode:
        pytest.skip("this system lets us mount no file system")
    done = subprocess.run([*inside, sys.executable, "-c", FULL, disk, *words_of(1, study_csv, trained, disk)], cwd=ROOT,
                          text=True, capture_output=True, timeout=120, env=CHILD)
    assert done.stdout.endswith("statuses [0, 2, 0] []\n") and "0.0 MB are free" in done.stderr, done.stderr


def test_the_disk_fills_while_a_picture_is_written(study_csv, trained, tmp_path, capsys, monkeypatch):
    def save(image, file, **how):
        if next(calls) in (1, 3):
            file.write(b"half a picture")
            raise OSError(28, "No space left on device")
        whole(image, file, **how)

    calls, whole, words = itertools.count(1), Image.Image.save, words_of(1, study_csv, trained, tmp_path)
    monkeypatch.setattr(Image.Image, "save", save)
    for name in ("pattern_mask", "_000006"):
        assert main.main(words) == 2
        assert f"{name}.png: cannot be written (No space left on device; " in capsys.readouterr().err
        assert not hidden_files(tmp_path)
    assert main.main(words) == 0
    assert_same_run(1, tmp_path, trained)


def flip_a_bit(path: Path) -> None:
    """In the largest tensor of the model that is contiguous."""
    content, tensors = bytearray(path.read_bytes()), weights(path)["model"].values()
    weight = max((each for each in tensors if each.is_contiguous()), key=torch.numel)
    content[content.index(weight.numpy().tobytes()) + 2 * weight.numel()] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_other_checkpoint_replaces_a_damaged_one(study_csv, trained, tmp_path, capsys, stage):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    words = words_of(stage, study_csv, trained, tmp_path)
    last, best = (tmp_path / "checkpoints" / name[stage] for name in (LAST, BEST))
    flip_a_bit(last)
    damaged = last.read_bytes()
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert f"warning: {last}: is not a checkpoint" in said and f"Resuming {best}" in said
    assert [path.read_bytes() for path in last.parent.glob("*.damaged-*")] == [damaged]  # nothing is lost
    assert_same_state(last, trained / "checkpoints" / LAST[stage])
    flip_a_bit(best)
    assert main.main(words) == 0
    assert f"warning: {best}" in capsys.readouterr().out
    read_checkpoint(best, (STAGES[stage],))
    for path in (last, best):
        flip_a_bit(path)
    before = {path: path.read_bytes() for path in last.parent.iterdir()}
    assert main.main(words) == 2
    message = capsys.readouterr().err
    assert str(last) in message and str(best) in message and "Traceback" not in message
    assert {path: path.read_bytes() for path in last.parent.iterdir()} == before


def test_another_run_in_the_same_folders_is_refused_and_left_alone(study_csv, trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for more, said in ((["--learning_rate", "0.5"], "learning_rate: 0.0005 there, 0.5 now"),
                       (["--seed", "5"], "seed: 0 there, 5 now"),
                       (["--checkpoint_dir", str(tmp_path / "elsewhere")], "result_dir")):
        assert main.main(arguments(study_csv, trained, *more)) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_no_file_runs_code(study_csv, trained, tmp_path, capsys):
    """Checkpoints, weights of VGG16, label images and tables; volumes: test_volumes.py."""
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(owned),)

    owned, best = tmp_path / "owned", trained / "checkpoints/best_model.pth"
    torch.save({"features.0.weight": Malicious()}, tmp_path / "vgg.pth")
    torch.save({"format": 3, "stage": Malicious()}, tmp_path / "torch.pth")
    shutil.copy(best, tmp_path / "flipped.pth")
    flip_a_bit(tmp_path / "flipped.pth")
    for name, content in (("empty.pth", b""), ("page.pth", b"<html></html>"), ("cut.pth", best.read_bytes()[:-1000]),
                          *((each, pickle.dumps(Malicious())) for each in
                            ("pickle.pth", "labels.nii", "labels.nii.gz", "pairs.csv"))):
        (tmp_path / name).write_bytes(content)
    checkpoints = ("torch.pth", "flipped.pth", "empty.pth", "page.pth", "cut.pth", "pickle.pth")
    for option, name in (*(("--resume_path", each) for each in checkpoints), ("--vgg_weights", "vgg.pth"),
                         ("--vgg_weights", "pickle.pth"), ("--pattern_file", "labels.nii"),
                         ("--pattern_file", "labels.nii.gz"), ("--data_root", "pairs.csv")):
        words = words_of(2, study_csv, trained, tmp_path, option, str(tmp_path / name))
        assert main.main(words) == 2, name
        message = capsys.readouterr().err
        assert name in message and "Traceback" not in message
    assert not owned.exists()


# ---- Training


def test_one_step_that_is_not_finite_is_skipped(study_csv, trained, tmp_path, capsys, monkeypatch):
    """With a note."""
    factors = itertools.chain([1, float("inf")], itertools.repeat(1))
    monkeypatch.setattr("models.prior.pattern_aware_loss", lambda *batch: pattern_aware_loss(*batch) * next(factors))
    assert main.main(words_of(1, study_csv, trained, tmp_path)) == 0
    assert re.search("note: step 1 with sub-0.*step skipped", capsys.readouterr().out)
    state = weights(tmp_path / "checkpoints/last_model.pth")
    assert state["step"] == 6 and {float(moments["step"]) for moments in state["optimiser"]["adam"]} == {5}
    assert all(torch.isfinite(value).all() for value in state["ema"]["model"].values())


def test_a_loss_that_stays_not_finite_stops_the_run(study_csv, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.prior.pattern_aware_loss", lambda prediction, *_: prediction.mean()[None] * torch.nan)
    assert main.main(words_of(1, study_csv, trained, tmp_path, "--epochs", "9")) == 2
    message = capsys.readouterr().err
    assert "step 5 with sub-0" in message and "opt.learning_rate" in message
    saved = weights(tmp_path / "checkpoints/last_model.pth")["model"]
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_an_overflow_in_float16_is_skipped_and_remembered(study_csv, trained, tmp_path, stage, capsys, monkeypatch):
    monkeypatch.setattr("training.optimise.FIRST_SCALE", 2.0**24)
    words, skipped = words_of(stage, study_csv, trained, tmp_path, "--precision", "fp16"), []
    for epochs in ("2", "6"):
        assert main.main([*words, "--epochs", epochs, "--refine_epochs", epochs]) == 0
        state = weights(tmp_path / "checkpoints" / LAST[stage])
        skipped.append(capsys.readouterr().out.count("the loss scale is now"))
        assert state["optimiser"]["loss_scale"] == 2.0 ** (24 - sum(skipped))
        taken = {float(moments["step"]) for moments in state["optimiser"]["adam"]}
        assert taken == {state["step"] - sum(skipped)}
    assert skipped[0] and taken != {0}
    logs = [read_csv(folder / "results" / FOLDER[stage] / "log.csv") for folder in (tmp_path, trained)]
    losses, exact = ([float(row["loss"]) for row in rows if row["loss"]] for rows in logs)
    assert len(losses) == 12 and np.isfinite(losses).all() and losses[0] == pytest.approx(exact[0], rel=1e-2)


def test_a_volume_becomes_unreadable_during_training(study_csv, tmp_path, capsys, monkeypatch):
    def cut_off(*batch):
        if batch[-1] == 3:
            for path in (tmp_path / "cache").glob("*.npy"):
                os.truncate(path, 1000)
        return training_batch(*batch)

    words = arguments(study_csv, tmp_path, "--checkpoint_every", "1")
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.training_batch", cut_off)
        assert main.main(words) == 2
    errors = capsys.readouterr().err
    assert re.search(r"cache/\S*\.npy: has become unreadable", errors) and "Traceback" not in errors
    assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 3
    assert main.main(words) == 0  # they are decoded again
    assert "at step 3" in capsys.readouterr().out


def test_a_second_run_in_the_same_folders_is_refused(study_csv, trained, tmp_path, capsys):
    words = words_of(1, study_csv, trained, tmp_path, "--epochs", "500", "--validate_every", "500")
    running = Child(words)
    wait_for_rows(running, tmp_path / "results/stage1/log.csv", 3)
    for more in ([], ["--checkpoint_dir", str(tmp_path / "other")], ["--result_dir", str(tmp_path / "other")],
                 ["--refine", "--resume_path", str(trained / "checkpoints/best_model.pth")]):
        assert main.main([*words, *more]) == 2
        assert f"another run is writing there (process {running.process.pid} on " in capsys.readouterr().err
    assert running.wait(0).returncode == -signal.SIGKILL
    assert main.main([*words, "--max_steps", "1"]) == 0  # the lock of a killed process holds nobody up

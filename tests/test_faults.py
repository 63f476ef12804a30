"""What goes wrong while a run writes, continues or is stopped: faults injected into the real program."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import main
from benchmarks.kills import SAME, Run, identical, kill_until_it_ends
from tests.conftest import (
    CHILD,
    ROOT,
    Malicious,
    arguments,
    read_csv,
    refine_arguments,
    signalled,
    weights,
    write_pairs,
)
from tests.test_distributed import launch
from utils import files
from utils.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from utils.ema import EMA

LAST = {1: "last_model.pth", 2: "last_refine.pth"}
BEST = {1: "best_model.pth", 2: "best_refine.pth"}
LOGS = {1: "stage1/log.csv", 2: "refine/log.csv"}


def start(*words: str, code: str = "") -> subprocess.Popen:
    """The program, or `code` in its place, in a child process."""
    return subprocess.Popen([sys.executable, *(["-c", code] if code else ["main.py"]), *words], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CHILD)


def words_of(stage: int, study_csv: Path, trained: Path, folder: Path, *more: str) -> list[str]:
    """A run of this stage in a folder of its own; stage 2 refines the backbone in `trained`."""
    backbone = ["--refine", "--resume_path", str(trained / "checkpoints/best_model.pth")] if stage == 2 else []
    return arguments(study_csv, folder, *backbone, *more)


def wait_for_rows(process: subprocess.Popen, log: Path, count: int) -> None:
    """Until the log of a run has so many lines."""
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= count):
        time.sleep(0.02)


def as_never_interrupted(stage: int, folder: Path, trained: Path) -> None:
    """Both checkpoints and the log are those of the run that was never interrupted, and nothing else was left."""
    for name in (LAST[stage], BEST[stage]):
        mine, theirs = weights(folder / "checkpoints" / name), weights(trained / "checkpoints" / name)
        for key in SAME:
            assert identical(mine[key], theirs[key]), (name, key)
    assert read_csv(folder / "results" / LOGS[stage]) == read_csv(trained / "results" / LOGS[stage])
    assert not strays(folder)


def strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


# ---- killed


@pytest.mark.parametrize("stage", [1, 2])
def test_R1_R2_killed_at_random_moments_and_bytes(study_csv, trained, tmp_path, stage):
    """`benchmarks/kills.py` does this 200 times."""
    more = ["--epochs", "6", "--refine_epochs", "6", "--checkpoint_every", "3", "--validate_every", "2"]
    runs = [Run(f"stage {stage}", tmp_path / name, words_of(stage, study_csv, trained, tmp_path, *more), every=3)
            for name in ("never", "killed")]
    begun = time.monotonic()
    assert not runs[0].start(120) and not runs[0].problems
    seed = time.time_ns() % 2**32
    kill_until_it_ends(runs[1], runs[0], time.monotonic() - begun, 4, np.random.default_rng(seed))
    assert not runs[1].problems, f"seed {seed}"


@pytest.mark.parametrize("stage", [1, 2])
def test_R2_killed_between_two_steps(study_csv, trained, tmp_path, stage, capsys):
    words = words_of(stage, study_csv, trained, tmp_path, "--checkpoint_every", "1")
    code = signalled("train" if stage == 1 else "train_refine", "train_step", 4, signal.SIGKILL)
    killed = start(*words, code=code)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    saved = weights(tmp_path / "checkpoints" / LAST[stage])["step"]
    assert saved == 3
    assert main.main(words) == 0
    assert "after step 3" in capsys.readouterr().out
    as_never_interrupted(stage, tmp_path, trained)


@pytest.fixture
def killed_in_a_write(study_csv, trained, tmp_path):
    """A function that copies the finished stage 1, and trains on until the process is killed in its first write."""
    def run(limit: int) -> Run:
        shutil.copytree(trained, tmp_path / "copy")
        run = Run("stage 1", tmp_path / "copy", arguments(study_csv, tmp_path, "--epochs", "4"), every=100)
        assert run.start(120, limit) and not run.problems
        return run
    return run


@pytest.mark.parametrize("part", [0.4, 0.99])
def test_R1_killed_in_the_middle_of_a_write(killed_in_a_write, trained, part):
    size = (trained / "checkpoints/last_model.pth").stat().st_size
    run = killed_in_a_write(int(part * size))
    assert run.strays == 1
    before, after = (weights(folder / "checkpoints/last_model.pth") for folder in (trained, run.folder))
    assert identical(before, after)
    assert main.main(run.command()[2:]) == 0
    assert not strays(run.folder) and weights(run.folder / "checkpoints/last_model.pth")["step"] == 8


def test_R3_killed_while_best_and_last_are_replaced(study_csv, trained, tmp_path):
    """Before best_model.pth, the picture after it, and the second last_model.pth."""
    cache = ["--cache_dir", str(trained / "cache")]  # full: nothing is written there
    words = {count: arguments(study_csv, tmp_path / str(count), "--max_steps", "2", *cache)
             for count in (7, 13, 14)}
    children = [start(*words[count], code=signalled("os", "replace", count, signal.SIGKILL)) for count in words]
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL
    for count, there in zip(words, (["last"], ["best", "last"], ["best", "last"])):
        found = sorted((tmp_path / str(count) / "checkpoints").glob("*.pth"))
        assert [path.name for path in found] == [f"{name}_model.pth" for name in there]
        for path in found:
            read_checkpoint(path, ("stage 1",))
    assert [main.main(each) for each in words.values()] == [0, 0, 0]
    assert all((tmp_path / str(count) / "results/stage1/step_000002.png").exists() for count in words)
    states = [{name: weights(tmp_path / str(count) / "checkpoints" / name) for name in (LAST[1], BEST[1])}
              for count in words]
    for state in states[1:]:
        for name, content in state.items():
            assert all(identical(content[key], states[0][name][key]) for key in SAME)


# ---- asked to stop


@pytest.mark.parametrize("stage, module, name, count, number", [
    (1, "train", "train_step", 3, signal.SIGHUP),
    (1, "train", "x0_error", 4, signal.SIGTERM),  # validating
    (1, "models.backbone", "sample", 2, signal.SIGTERM),  # sampling for a picture
    (1, "data.study", "cached_volume", 3, signal.SIGTERM),  # reading
    (2, "models.backbone", "sample", 2, signal.SIGTERM),  # coarse volumes
    (2, "train_refine", "psnr", 3, signal.SIGTERM),  # validating
    (2, "refinement", "score", 3, signal.SIGTERM)])  # the test subjects, at the end
def test_R4_asked_to_stop_anywhere(study_csv, trained, tmp_path, stage, module, name, count, number):
    words = words_of(stage, study_csv, trained, tmp_path)
    stopped = start(*words, code=signalled(module, name, count, number))
    said, errors = stopped.communicate(timeout=120)
    asked = float(errors.split("signal at ")[1].split()[0])
    assert time.time() - asked < 25
    assert stopped.returncode == main.STOPPED and "; the same command " in said, errors
    assert "Traceback" not in errors and not strays(tmp_path)
    assert main.main(words) == 0
    as_never_interrupted(stage, tmp_path, trained)
    if stage == 2:
        assert read_csv(tmp_path / "results/refine/metrics.csv") == read_csv(trained / "results/refine/metrics.csv")


def test_R4_the_reader_of_the_output_ends_with_the_same_ctrl_c(study_csv, trained, tmp_path):
    """As in `python main.py 2>&1 | tee log`."""
    words = arguments(study_csv, tmp_path)
    stopped = subprocess.Popen([sys.executable, "-c", signalled("train", "train_step", 3, signal.SIGINT), *words],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CHILD)
    stopped.stdout.read(10)
    stopped.stdout.close()
    assert stopped.wait(60) == main.STOPPED
    assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 3


@pytest.mark.parametrize("redirected", ["> /dev/full", "2> /dev/full", ">&-", "2>&-"])
def test_output_that_cannot_be_written(study_csv, tmp_path, redirected):
    """A disk of logs that is full, or what cron closes, ends no run."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    words = [sys.executable, "main.py", *arguments(study_csv, tmp_path, "--max_steps", "1")]
    done = subprocess.run(["sh", "-c", f"{shlex.join(words)} {redirected}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env=CHILD)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
    assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 1


def test_R4_a_signal_after_the_end_does_not_change_the_status():
    code = ("import os, signal, sys\nfrom utils.optimise import StopRequest, leave\n"
            "class Late:\n    def __del__(self): [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGINT)]\n"
            "with StopRequest() as stop: os.kill(os.getpid(), signal.SIGTERM)\n"
            "late = Late()\nleave(3 if stop else 0)\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, env=CHILD).returncode == 3


# ---- disks


def test_R5_no_room_for_a_checkpoint(study_csv, tmp_path, capsys, monkeypatch):
    words = arguments(study_csv, tmp_path)
    assert main.main([*words, "--epochs", "1"]) == 0
    before = (tmp_path / "checkpoints/last_model.pth").read_bytes()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=300_000))
        for more in ([], ["--checkpoint_dir", str(tmp_path / "new"), "--result_dir", str(tmp_path / "r")]):
            assert main.main([*words, *more]) == 2
            message = capsys.readouterr().err
            assert "MB are needed, 0.3 MB are free" in message and "Traceback" not in message
    assert (tmp_path / "checkpoints/last_model.pth").read_bytes() == before and not strays(tmp_path)
    assert not list((tmp_path / "new").iterdir())
    assert main.main(words) == 0


def test_R5_the_disk_fills_while_a_checkpoint_is_written(study_csv, trained, tmp_path):
    """As far as the program can tell: a file cannot grow, and the write fails in the middle."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(trained / "results", tmp_path / "results")
    words = arguments(study_csv, tmp_path, "--epochs", "4")
    size = (tmp_path / "checkpoints/last_model.pth").stat().st_size
    code = ("import resource, runpy, sys; sys.argv[0] = 'main.py'; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); "
            "runpy.run_path('main.py', run_name='__main__')")
    failed = start(*words, code=code)
    errors = failed.communicate(timeout=120)[1]
    assert failed.returncode == 2 and "model.pth: cannot be written (File too large; " in errors, errors
    assert "MB are free" in errors and "Traceback" not in errors and not strays(tmp_path)
    assert identical(weights(tmp_path / "checkpoints/last_model.pth"), weights(trained / "checkpoints/last_model.pth"))
    assert main.main(words) == 0


FULL = """
set -e
mount -t tmpfs -o size=10m tmpfs "$1"
shift
"$@" --max_steps 2 >&2
dd if=/dev/zero of="$DISK/filler" bs=4k 2>/dev/null || true
"$@" >&2 || echo "status $?"
rm "$DISK/filler"
find "$DISK" -name ".*" -type f
"$@" >&2 && echo finished
"""


def test_R5_a_disk_that_is_really_full(study_csv, tmp_path):
    """Checkpoints, pictures and the log on a file system of 10 MB, which only this child sees."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*inside, f"mount -t tmpfs tmpfs {disk}"]).returncode:
        pytest.skip("this system lets us mount no file system")
    words = [*arguments(study_csv, disk), "--cache_dir", str(tmp_path / "cache")]
    done = subprocess.run([*inside, FULL, "sh", str(disk), sys.executable, "main.py", *words], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, env={**CHILD, "DISK": str(disk)})
    assert done.returncode == 0 and done.stdout.split() == ["status", "2", "finished"], done.stderr
    assert "0.0 MB are free" in done.stderr and "Traceback" not in done.stderr


def test_R5_the_disk_fills_while_a_picture_is_written(study_csv, trained, tmp_path, capsys, monkeypatch):
    from PIL import Image

    def full(self, file, **_):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    words = arguments(study_csv, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert main.main([*words, "--pattern_weight", "1"]) == 2
    assert "pattern_mask.png: cannot be written (No space left on device; " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("pictures.save_grid", lambda path, *_: path.name.startswith("step") and files.replace_file(
            path, lambda file: full(None, file), 1))
        assert main.main(words) == 2
    assert "step_000006.png: cannot be written" in capsys.readouterr().err and not strays(tmp_path)
    assert main.main(words) == 0
    as_never_interrupted(1, tmp_path, trained)
    assert (tmp_path / "results/stage1/step_000006.png").exists()


def test_R6_folders_that_are_missing_or_read_only(study_csv, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/stage1").write_text("")
    assert main.main(arguments(study_csv, tmp_path)) == 2
    assert "results/stage1: cannot be written" in capsys.readouterr().err
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o555)
        assert main.main(arguments(study_csv, tmp_path, "--checkpoint_dir", str(tmp_path / "locked"))) == 2
        assert "locked: cannot be written" in capsys.readouterr().err
    elif Path("/proc/self").exists():  # where root may not write either
        assert main.main(arguments(study_csv, tmp_path, "--checkpoint_dir", "/proc/self/checkpoints")) == 2
        assert "/proc/self/checkpoints: cannot be written" in capsys.readouterr().err
    missing = arguments(study_csv, tmp_path / "not" / "there", "--max_steps", "1")
    assert main.main(missing) == 0 and (tmp_path / "not/there/checkpoints/last_model.pth").exists()


# ---- damaged and foreign files


def small_checkpoint(folder: Path) -> Path:
    model = nn.Linear(3, 3)
    facts = {name: {} for name in ("options", "fingerprints", "sizes", "network", "ranges")}
    run = Checkpoint("stage 1", folder, {"model": model, "ema": EMA(model, 0.9)}, facts, 1.0)
    run.save(run.last)
    return run.last


def test_R7_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    path, random = small_checkpoint(tmp_path), np.random.default_rng(0)
    whole, expected, noticed = path.read_bytes(), weights(path), 0
    for place in random.integers(0, 8 * len(whole), 1500):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert identical(read_checkpoint(path, ("stage 1",)), expected), place
        except CheckpointError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > 500  # the rest is padding, and what a zip file says twice
    for length in [0, 1, *random.integers(0, len(whole), 100)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="last_model.pth"):
            read_checkpoint(path, ("stage 1",))


def flip_a_bit(path: Path) -> None:
    """In the largest record, that of some weights."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda each: each.file_size)
    content = bytearray(path.read_bytes())
    start = record.header_offset + 30 + sum(struct.unpack_from("<HH", content, record.header_offset + 26))
    content[start + record.file_size // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("stage", [1, 2])
def test_R7_the_other_checkpoint_stands_in(study_csv, trained, tmp_path, capsys, stage):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    words = words_of(stage, study_csv, trained, tmp_path)
    last, best = (tmp_path / "checkpoints" / name[stage] for name in (LAST, BEST))
    flip_a_bit(last)
    damaged = last.read_bytes()
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert f"warning: {last}: is no checkpoint" in said and f"Continuing {best}" in said
    assert [path.read_bytes() for path in last.parent.glob("*.damaged-*")] == [damaged]  # nothing is lost
    for key in SAME:
        assert identical(weights(last)[key], weights(trained / "checkpoints" / LAST[stage])[key]), key
    flip_a_bit(best)
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert f"warning: {best}" in said and "stands in for the best" in said
    read_checkpoint(best, (f"stage {stage}",))
    for path in (last, best):
        flip_a_bit(path)
    before = {path: path.read_bytes() for path in last.parent.iterdir()}
    assert main.main(words) == 2
    message = capsys.readouterr().err
    assert str(last) in message and str(best) in message and "Traceback" not in message
    assert {path: path.read_bytes() for path in last.parent.iterdir()} == before


@pytest.mark.parametrize("name, content", [
    ("log.csv", None), ("log.csv", b"epoch,loss\n1,2\n"), ("log.csv", b"kind,step" + 200_000 * b"x"),
    ("run_id.txt", None), ("run_id.txt", b"\xff\xfe"), ("last_model.pth", None), ("best_model.pth", "another run")])
def test_files_of_a_run_that_are_not_its_own(study_csv, trained, tmp_path, capsys, name, content):
    for folder in ("checkpoints", "results"):
        shutil.copytree(trained / folder, tmp_path / folder)
    path = tmp_path / ("checkpoints" if name.endswith("pth") else "results/stage1") / name
    if content == "another run":
        torch.save({**weights(path), "run_id": "other"}, path)
    else:
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
    before = path.read_bytes() if path.is_file() else b""
    assert main.main(arguments(study_csv, tmp_path, "--epochs", "4")) == 2
    message = capsys.readouterr().err
    assert name in message and "Traceback" not in message
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_continued_refinement_without_its_backbone_names_the_way(study_csv, trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/best_model.pth").unlink()
    assert main.main(refine_arguments(study_csv, tmp_path)) == 2
    assert f"set opt.resume_path to {tmp_path / 'checkpoints/last_refine.pth'} or" in capsys.readouterr().err


def test_R8_no_file_runs_code(study_csv, trained, tmp_path, capsys):
    """Weights of VGG16 and label images; checkpoints: test_program.py, coarse volumes: test_refinement.py."""
    owned = tmp_path / "owned"
    torch.save({"features.0.weight": Malicious(owned)}, tmp_path / "vgg.pth")
    for name in ("legacy.pth", "labels.nii", "labels.nii.gz", "pairs.csv"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(owned)))
    for option, name in (("--vgg_weights", "vgg.pth"), ("--vgg_weights", "legacy.pth"),
                         ("--pattern_file", "labels.nii"), ("--pattern_file", "labels.nii.gz"),
                         ("--data_root", "pairs.csv")):
        words = refine_arguments(study_csv, trained, "--checkpoint_dir", str(tmp_path / "c"), "--result_dir",
                                 str(tmp_path / "r"), option, str(tmp_path / name))
        assert main.main(words) == 2, name
        message = capsys.readouterr().err
        assert name in message and "Traceback" not in message
    assert not owned.exists()


# ---- training


def test_T1_one_step_that_is_not_finite(study_csv, trained, tmp_path, capsys, monkeypatch):
    """It is told, not taken, and the run goes on, the moving average and the learning rate as if it had not been."""
    import train

    whole, seen = train.pattern_aware_loss, []

    def broken_once(*arguments):
        seen.append(1)
        return whole(*arguments) * (float("inf") if len(seen) == 2 else 1)

    monkeypatch.setattr(train, "pattern_aware_loss", broken_once)
    assert main.main(arguments(study_csv, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "note: step 1, with sub-0" in said and "it was not taken" in said
    state, rows = weights(tmp_path / "checkpoints/last_model.pth"), read_csv(tmp_path / "results" / LOGS[1])
    assert state["optimiser"]["taken"] == state["ema"]["updates"] == state["step"] - 1 == 5
    rates = [float(row["learning_rate"]) for row in rows if row["kind"] == "training"]
    expected = [float(row["learning_rate"]) for row in read_csv(trained / "results" / LOGS[1]) if row["learning_rate"]]
    assert rates == [0, *expected[:5]]
    assert all(torch.isfinite(value).all() for value in state["ema"]["model"].values())


@pytest.mark.parametrize("stage", [1, 2])
def test_T2_an_overflow_in_float16_is_skipped_and_remembered(study_csv, trained, tmp_path, stage, capsys, monkeypatch):
    monkeypatch.setattr("utils.optimise.FIRST_SCALE", 2.0**24)
    words = words_of(stage, study_csv, trained, tmp_path, "--precision", "fp16")
    skipped = []
    for epochs in ("2", "6"):
        assert main.main([*words, "--epochs", epochs, "--refine_epochs", epochs]) == 0
        state = weights(tmp_path / "checkpoints" / LAST[stage])
        skipped.append(capsys.readouterr().out.count("The loss is now scaled by"))
        assert state["optimiser"]["scale"] == 2.0 ** (24 - sum(skipped))
        assert state["optimiser"]["taken"] == state["ema"]["updates"] == state["step"] - sum(skipped)
    assert skipped[0] and state["optimiser"]["taken"]
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "results" / LOGS[stage]) if row["loss"]]
    assert len(losses) == 12 and np.isfinite(losses).all()
    exact = [float(row["loss"]) for row in read_csv(trained / "results" / LOGS[stage]) if row["loss"]]
    assert losses[0] == pytest.approx(exact[0], rel=1e-2)


def test_T3_a_volume_becomes_unreadable_during_training(study_csv, tmp_path, capsys):
    words = arguments(study_csv, tmp_path, "--epochs", "500", "--validate_every", "500", "--checkpoint_every", "1")
    running = start(*words)
    wait_for_rows(running, tmp_path / "results" / LOGS[1], 4)
    volumes = sorted((tmp_path / "cache").glob("*.npy"))
    for path in volumes:
        os.truncate(path, 1000)
    begun = time.monotonic()
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == 2 and time.monotonic() - begun < 60
    assert any(f"{path}: has become unreadable" in errors for path in volumes) and "Traceback" not in errors
    stopped = weights(tmp_path / "checkpoints/last_model.pth")["step"]
    assert main.main([*words, "--max_steps", str(stopped + 1)]) == 0  # they are made again
    assert f"after step {stopped}" in capsys.readouterr().out


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process, of those that torchrun has started."""
    found, end = {}, time.monotonic() + 5
    while len(found) < 2 and time.monotonic() < end:  # a listing of /proc may miss one while others come and go
        found |= _ranks_now(process)
    return found


def _ranks_now(process: subprocess.Popen) -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                rank = re.search(r"\0RANK=(\d+)\0", (path / "environ").read_text())
                found[int(rank[1])] = int(path.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_T4_a_rank_dies(tmp_path, victim):
    table = write_pairs(tmp_path / "pairs")
    words = arguments(table, tmp_path, "--epochs", "500", "--validate_every", "500", "--checkpoint_every", "1")
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(launch(*words), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=alone)
    wait_for_rows(running, tmp_path / "results" / LOGS[1], 4)
    os.kill(ranks_of(running)[victim], signal.SIGKILL)
    begun = time.monotonic()
    errors = running.communicate(timeout=60)[1]
    assert running.returncode and time.monotonic() - begun < 60
    if victim == 1:
        assert errors.count("PDS stopped, because another rank has ended") == 1
    stopped = read_checkpoint(tmp_path / "checkpoints/last_model.pth", ("stage 1",))["step"]
    done = subprocess.run(launch(*words, "--max_steps", str(stopped + 1)), cwd=ROOT, text=True, capture_output=True,
                          timeout=120, env=alone)
    assert done.returncode == 0 and f"after step {stopped}" in done.stdout, done.stderr
    assert not strays(tmp_path)


def test_T6_a_second_run_in_the_same_folders(study_csv, trained, tmp_path, capsys):
    words = arguments(study_csv, tmp_path, "--epochs", "500", "--validate_every", "500")
    running = start(*words)
    wait_for_rows(running, tmp_path / "results" / LOGS[1], 3)
    try:
        for more in ([], ["--checkpoint_dir", str(tmp_path / "other")], ["--result_dir", str(tmp_path / "other")],
                     ["--refine", "--resume_path", str(trained / "checkpoints/best_model.pth")]):
            assert main.main([*words, *more]) == 2
            assert f"another run writes there (process {running.pid} on " in capsys.readouterr().err
        assert running.poll() is None
    finally:
        running.kill()
        running.communicate()
    assert main.main([*words, "--max_steps", "1"]) == 0  # the lock of a process that was killed holds nobody up


def test_every_fault_has_a_test():
    told = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    missing = [f"{kind}{number}" for kind, count in (("R", 10), ("T", 8)) for number in range(1, count + 1)
               if f"def test_{kind}{number}_" not in told and f"_{kind}{number}_" not in told]
    assert not missing

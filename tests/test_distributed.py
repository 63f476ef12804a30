"""Several ranks as one: the program under torchrun, over Gloo on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from benchmarks.kills import SAME, identical
from opt import small
from tests.conftest import ROOT, arguments, read_csv, run_program, signalled, weights, write_pairs
from utils import distributed


def launch(*words: str, ranks: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "main.py",
            *words]


def run_ranks(*words: str, ranks: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(launch(*words, ranks=ranks), cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), subjects=12)


def words_of(pairs: Path, folder: Path, *more: str) -> list[str]:
    """20 steps, two of them an epoch. Adam, because torch.optim.Muon iterates in bfloat16, where a last bit can become
    a third digit: in networks as tiny as this one that shows."""
    return arguments(pairs, folder, "--batch_size", "4", "--folds", "4", "--epochs", "10", "--refine_epochs", "10",
                     "--validate_every", "5", "--refine_optimiser", "adam", *more)


def losses(folder: Path, stage: str) -> list[float]:
    return [float(row["loss"]) for row in read_csv(folder / "results" / stage / "log.csv") if row["kind"] == "training"]


@pytest.fixture(scope="module")
def both(pairs, tmp_path_factory) -> dict[int, Path]:
    """Number of ranks -> folder with both stages trained by so many. Both refine the backbone that one rank trained."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    for stage in ([], ["--refine", "--resume_path", str(folders[1] / "checkpoints/best_model.pth")]):
        for ranks, folder in folders.items():
            done = (run_ranks if ranks == 2 else run_program)(*words_of(pairs, folder, *stage))
            assert done.returncode == 0, done.stderr
            (folder / f"{'stage2' if stage else 'stage1'}.txt").write_text(done.stdout)
    return folders


@pytest.mark.parametrize("stage", ["stage1", "refine"])
def test_T5_two_ranks_have_the_curve_of_one(both, stage):
    one, two = (losses(both[ranks], stage) for ranks in (1, 2))
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, abs=1e-4)
    validated = [[float(row["x0_error" if stage == "stage1" else "psnr"]) for row in read_csv(
        both[ranks] / "results" / stage / "log.csv") if row["kind"] == "validation"] for ranks in (1, 2)]
    assert validated[1] == pytest.approx(validated[0], rel=1e-3)


def test_only_the_first_rank_writes_and_speaks(both):
    for stage, said in (("stage1", "Stage 1 is finished"), ("stage2", "Stage 2 is finished")):
        told = (both[2] / f"{stage}.txt").read_text()
        assert told.count(said) == 1 and told.count("2 ranks") == 1
    one, two = ({path.relative_to(folder) for path in folder.rglob("*") if "cache" not in path.parts}
                for folder in both.values())
    assert one == two
    refined = read_csv(both[2] / "results/refine/metrics.csv")
    assert len(refined) == len(read_csv(both[1] / "results/refine/metrics.csv"))


def test_coarse_volumes_are_divided_among_the_ranks_and_the_same(both):
    one, two = (sorted((folder / "cache/coarse").rglob("*.npy")) for folder in both.values())
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 2 * 12
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))


def test_ranks_stop_together_and_continue_exactly(pairs, both, tmp_path):
    stopped = run_ranks(*words_of(pairs, tmp_path, "--max_minutes", "1e-9"))
    assert stopped.returncode != 0  # torchrun's own, not main.py's 3
    assert "Stopped (opt.max_minutes are over)" in stopped.stdout
    process = subprocess.Popen(launch(*words_of(pairs, tmp_path)), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "results/stage1/log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert "Stopped at step" in told and 0 < weights(tmp_path / "checkpoints/last_model.pth")["step"] < 20
    done = run_ranks(*words_of(pairs, tmp_path))
    assert done.returncode == 0, done.stderr
    ended, never_stopped = (weights(folder / "checkpoints/last_model.pth") for folder in (tmp_path, both[2]))
    assert ended["step"] == never_stopped["step"] == 20
    for part in ("model", "ema", "optimiser"):
        assert identical(ended[part], never_stopped[part])


@pytest.mark.parametrize("name, count", [("x0_error", 1), ("write_samples", 1)])  # validating, and drawing pictures
def test_R4_ranks_stop_together_outside_a_step(pairs, both, tmp_path, name, count):
    """Asked to, as by torchrun, the first rank breaks off; the other one waits for it, or does its own part."""
    code = signalled("train", name, count, signal.SIGTERM)
    words = launch("-c", code, *words_of(pairs, tmp_path))
    words[words.index("main.py")] = sys.executable
    words.insert(words.index("--standalone"), "--no-python")
    stopped = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert stopped.returncode and "Traceback (most recent call last):\n  File \"<string>\"" not in stopped.stderr
    assert stopped.stdout.count("Stopped at step") == 1
    state = weights(tmp_path / "checkpoints/last_model.pth")
    assert state["reviewed"] < state["step"]
    assert run_ranks(*words_of(pairs, tmp_path)).returncode == 0
    for name in ("last_model.pth", "best_model.pth"):
        ended, never_stopped = (weights(folder / "checkpoints" / name) for folder in (tmp_path, both[2]))
        assert all(identical(ended[part], never_stopped[part]) for part in SAME)


def test_a_refusal_is_said_once(pairs, tmp_path):
    refused = run_ranks(*words_of(pairs, tmp_path, "--image_size", "16"))
    assert refused.returncode != 0 and refused.stderr.count("PDS cannot run") == 1
    assert "opt.image_size" in refused.stderr
    refused = run_ranks(*words_of(pairs, tmp_path, "--batch_size", "1"), ranks=3)
    assert "opt.batch_size = 1" in refused.stderr and "3 ranks" in refused.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 9])
def test_every_job_is_done_by_one_rank(monkeypatch, world, accumulate):
    settings, jobs = small(), [("a", 0), ("a", 2), ("a", 3), ("b", 1)]
    settings.accumulate = accumulate
    monkeypatch.setattr(distributed, "world", lambda: world)
    done, loads = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = list(train.parts(settings, jobs))
        done += [(what, place) for what, places, factor in mine if factor for place in places]
        assert mine, "a rank without a part would not exchange gradients"
        loads.append(sum(len(places) for _, places, factor in mine if factor))
    assert sorted(done) == jobs
    assert max(loads) - min(loads) <= 1


def test_one_process_is_its_own_sum():
    assert distributed.summed(1.5, 2.0) == [1.5, 2.0]
    assert distributed.any_rank("yes") and not distributed.any_rank("")
    assert distributed.same_everywhere(3) and distributed.writes()

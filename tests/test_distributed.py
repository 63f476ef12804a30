"""Several ranks that train as one, over Gloo on the CPU: under torchrun, or (faster) as forked ranks."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests.conftest import CHILD, PROGRAM, ROOT, Child, arguments, read_csv, signalled, weights, write_pairs
from tests.test_recovery import assert_same_state, hidden_files, wait_for_rows
from training import distributed
from utils.stop import stop


def torchrun(*words: str, program: str = "main.py") -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *words]
    return subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CHILD)


def run_ranks(*words: str, codes: tuple[str, str] = (PROGRAM, PROGRAM)) -> list[subprocess.CompletedProcess]:
    """Two ranks with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
           "TORCHELASTIC_RUN_ID": "test"}
    ranks = [Child(list(words), code, RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank, code in enumerate(codes)]
    return [rank.wait() for rank in ranks]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), subjects=12)


def words_of(pairs: Path, folder: Path, *more: str) -> list[str]:
    """12 steps, two per epoch. Adam, because Muon iterates in bfloat16: a last bit can become a third digit."""
    return arguments(pairs, folder, "--batch_size", "4", "--folds", "4", "--epochs", "6", "--refine_epochs", "6",
                     "--validate_every", "3", "--refine_optimiser", "adam", "--optimiser", "adam", "--coarse", "joint",
                     *more)


@pytest.fixture(scope="module")
def both(pairs, tmp_path_factory) -> dict[int, Path]:
    """Number of ranks -> folder with both stages; both refine the backbone that one rank trained."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    for stage in ([], ["--refine", "--resume_path", str(folders[1] / "checkpoints/best_model.pth")]):
        assert main.main(words_of(pairs, folders[1], *stage)) == 0
        done = run_ranks(*words_of(pairs, folders[2], *stage))
        assert [rank.returncode for rank in done] == [0, 0], done
        (folders[2] / f"{'refine' if stage else 'stage1'}.txt").write_text("".join(rank.stdout for rank in done))
    return folders


@pytest.mark.parametrize("stage, metric", [("stage1", "x0_error"), ("refine", "psnr")])
def test_two_ranks_have_the_curve_of_one(both, stage, metric):
    one, two = (read_csv(both[ranks] / "results" / stage / "log.csv") for ranks in (1, 2))
    losses, validated = ([[float(row[column]) for row in rows if row["kind"] == kind] for rows in (two, one)]
                         for kind, column in (("training", "loss"), ("validation", metric)))
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(validated[0]) == 2 and validated[0] == pytest.approx(validated[1], rel=1e-3)


def test_the_default_stage_2_starts_alike_on_two_ranks(pairs, both, tmp_path):
    """From the expected volume, with Muon."""
    for ranks in (1, 2):
        words = words_of(pairs, tmp_path / str(ranks), "--coarse", "expected", "--refine_optimiser", "muon", "--refine",
                         "--max_steps", "2", "--resume_path", str(both[1] / "checkpoints/best_model.pth"))
        assert (main.main(words) if ranks == 1 else [rank.returncode for rank in run_ranks(*words)]) in (0, [0, 0])
    one, two = ([float(row["loss"]) for row in read_csv(tmp_path / ranks / "results/refine/log.csv")
                 if row["kind"] == "training"] for ranks in "12")
    assert len(one) == 2 and one[0] == pytest.approx(two[0], rel=1e-5) and one[1] == pytest.approx(two[1], rel=0.02)


def test_two_ranks_have_the_curve_of_one_with_incomplete_visits(incomplete_csv, tmp_path):
    """Steps have an odd number of jobs, and sources are synthesised, in stage 2."""
    words = ["--batch_size", "2", "--optimiser", "adam", "--refine_optimiser", "adam", "--max_steps", "6"]
    assert main.main(arguments(incomplete_csv, tmp_path / "1", *words)) == 0
    words += ["--refine", "--resume_path", str(tmp_path / "1/checkpoints/best_model.pth")]
    assert main.main(arguments(incomplete_csv, tmp_path / "1", *words)) == 0
    done = run_ranks(*arguments(incomplete_csv, tmp_path / "2", *words))
    assert [rank.returncode for rank in done] == [0, 0], done
    one, two = ([float(row["loss"]) for row in read_csv(tmp_path / ranks / "results/refine/log.csv")
                 if row["kind"] == "training"] for ranks in "12")
    assert len(one) == 6 and two == pytest.approx(one, abs=1e-4)


def test_only_the_main_rank_writes_and_prints(both):
    for stage, said in (("stage1", "Stage 1 is finished"), ("refine", "Stage 2 is finished")):
        output = (both[2] / f"{stage}.txt").read_text()
        assert output.count(said) == 1 and output.count("2 ranks") == 1
        assert output.count("s per step") == output.count("per epoch") == 1  # after ten steps
    one, two = ({path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".txt"
                 and "cache" not in path.parts} for folder in both.values())
    assert one == two
    assert len({len(read_csv(folder / "results/refine/metrics.csv")) for folder in both.values()}) == 1


def test_coarse_volumes_are_divided_among_the_ranks_and_the_same(both):
    one, two = (sorted((folder / "cache/coarse").rglob("*.npy")) for folder in both.values())
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 2 * 12
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))


@pytest.mark.parametrize("during, rank", [("train.x0_error", 1), ("train.Stage1.draw", 0)])
def test_ranks_stop_together_and_resume_identically(pairs, both, tmp_path, during, rank):
    """One of them receives a signal while it validates or draws; the other one does its own part, or waits."""
    words = words_of(pairs, tmp_path, "--cache_dir", str(both[2] / "cache"))
    codes = [PROGRAM, PROGRAM]
    codes[rank] = signalled(*during.split(".", 1), 1, signal.SIGTERM)
    stopped = run_ranks(*words, codes=codes)
    assert [each.returncode for each in stopped] == [main.STOPPED, main.STOPPED]
    assert stopped[0].stdout.count("Stopped at step") == 1 and "Stopped" not in stopped[1].stdout
    assert "Traceback" not in "".join(each.stderr for each in stopped) and not hidden_files(tmp_path)
    assert [each.returncode for each in run_ranks(*words)] == [0, 0]
    for name in ("last_model.pth", "best_model.pth"):
        assert_same_state(tmp_path / "checkpoints" / name, both[2] / "checkpoints" / name)


def test_torchrun_prints_a_refusal_once(pairs, tmp_path):
    """It is found by one rank, while the other one waits."""
    refused = torchrun(*words_of(pairs, tmp_path, "--image_size", "16"))
    errors = refused.communicate(timeout=60)[1]
    assert refused.returncode and errors.count("PDS cannot go on") == 1 and "opt.image_size" in errors


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found in /proc")
@pytest.mark.parametrize("victim", ["torchrun", 0, 1])
def test_torchrun_stops_all_ranks_and_also_where_one_dies(pairs, both, tmp_path, victim, capsys):
    """torchrun receives SIGTERM, or a rank is killed. The same command resumes, with another number of ranks."""
    words = words_of(pairs, tmp_path, "--epochs", "500", "--validate_every", "500", "--checkpoint_every", "1",
                     "--cache_dir", str(both[2] / "cache"))
    running = torchrun(*words)
    wait_for_rows(running, tmp_path / "results/stage1/log.csv", 3)
    if victim == "torchrun":
        running.terminate()
    else:  # the ranks are listed in the order of their start
        ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(ranks[victim]), signal.SIGKILL)
    said, errors = running.communicate(timeout=60)
    assert running.returncode  # torchrun's own, not main.py's 3
    step = weights(tmp_path / "checkpoints/last_model.pth")["step"]
    assert said.count(f"Stopped at step {step} of 1000 (received SIGTERM)") == (victim == "torchrun"), errors
    assert errors.count("PDS stopped because another rank ended") == (victim == 1)  # the main rank says so
    assert main.main([*words, "--max_steps", str(step + 1)]) == 0 and not hidden_files(tmp_path)
    assert f"at step {step}" in capsys.readouterr().out


def test_a_signal_while_the_ranks_agree_counts_at_the_next_step(monkeypatch):
    def late_signal(flag: float) -> list[float]:
        stop.reason = "received SIGTERM"
        return [flag]

    monkeypatch.setattr(stop, "reason", "")
    monkeypatch.setattr(distributed, "all_reduce_sum", late_signal)
    assert not distributed.stop_requested_on_any_rank() and distributed.stop_requested_on_any_rank()

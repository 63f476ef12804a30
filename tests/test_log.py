"""training/log.py: log.csv, TensorBoard, run.json, and output that nobody reads."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.conftest import read_csv, run_code
from training.log import Log, write_run_record
from utils.errors import UserError

COLUMNS = ("kind", "step", "epoch", "loss", "psnr")


def run(folder: Path, steps: range, tensorboard: bool = False) -> Log:
    """What a training loop writes that validates and draws at the top of every other step."""
    log = Log(folder / "log.csv", COLUMNS, steps.start, "a", tensorboard)
    for step in steps:
        if step and step % 2 == 0:
            log.write("validation", step, epoch=1, psnr=20.0 + step)
            Image.new("RGB", (8, 8)).save(folder / "picture.png")
            log.write("samples", step, epoch=1, psnr=10.0 + step)
            log.picture(folder / "picture.png", step)
        log.write("training", step + 1, epoch=1, loss=1 / (step + 1), unknown=3.0)
    return log


@pytest.mark.parametrize("at", range(8))
def test_a_resumed_log_equals_that_of_one_run(tmp_path, at):
    """Whatever was written after the checkpoint, and in the middle of which row the power failed."""
    path = tmp_path / "log.csv"
    run(tmp_path, range(8))
    once = path.read_bytes()
    assert once.startswith(b"kind,step,epoch,loss,psnr\ntraining,1,1,1,\ntraining,2,1,0.5,\nvalidation,2,1,,22\n")
    path.unlink()
    run(tmp_path, range(7))
    with open(path, "ab") as file:
        file.write(b"training\n\0\0\xff\ntraining,2,\0\0,,\ntraining,1,1,0.3,")
    run(tmp_path, range(at, 8))
    assert path.read_bytes() == once


def test_a_validation_that_is_not_repeated_keeps_its_row(tmp_path):
    """Put off by opt.max_overhead, it was due at a step of no round number, at which the best model was saved."""
    run(tmp_path, range(3)).write("validation", 3, epoch=1, psnr=33.0)
    before = (tmp_path / "log.csv").read_text()
    assert before.endswith("training,3,1,0.333333,\nvalidation,3,1,,33\n")
    run(tmp_path, range(3, 4)).write("samples", 3, epoch=1, psnr=9.0)
    assert (tmp_path / "log.csv").read_text().startswith(before)


@pytest.mark.parametrize("name, replace", [
    ("log.csv", lambda path: path.write_text("epoch,loss\n1,2\n")), ("log.csv", os.mkdir), ("run_id.txt", Path.touch)])
def test_a_log_of_another_run_is_refused_and_left_alone(tmp_path, name, replace):
    run(tmp_path, range(3))
    (tmp_path / name).unlink()
    replace(tmp_path / name)
    before = {each: each.is_file() and each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(UserError, match="log.csv.*choose another opt.result_dir"):
        Log(tmp_path / "log.csv", COLUMNS, 3, "a")
    assert {each: each.is_file() and each.read_bytes() for each in tmp_path.iterdir()} == before


def test_the_curves_of_a_killed_and_resumed_run_have_every_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed = run(tmp_path, range(6), tensorboard=True)  # its event file is never closed
    run(tmp_path, range(4, 9), tensorboard=True)
    shown = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    for row in read_csv(tmp_path / "log.csv"):
        curve = shown.Scalars(f"{row['kind']}/{'loss' if row['kind'] == 'training' else 'psnr'}")
        assert {f"{each.value:.6g}" for each in curve if each.step == int(row["step"])} == {row["loss"] or row["psnr"]}
    assert [each.step for each in shown.Images("samples")] == [2, 4, 4, 6, 8] and killed.path.exists()


def test_a_failure_of_tensorboard_stops_nothing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    log = Log(tmp_path / "log.csv", COLUMNS, 0, "a", tensorboard=True)
    monkeypatch.setattr(log._board, "add_scalar", lambda *_: 1 / 0)
    log.write("training", 1, loss=1.0)
    log.write("training", 2, loss=1.0)
    assert capsys.readouterr().out.count("TensorBoard failed (division by zero)") == 1
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Log(tmp_path / "log.csv", COLUMNS, 2, "a", tensorboard=True).write("training", 3, loss=1.0)
    assert capsys.readouterr().out.count("note: no TensorBoard") == 1 and len(read_csv(tmp_path / "log.csv")) == 3


def test_every_start_is_on_record(tmp_path):
    path, split = tmp_path / "run.json", {"train": ["sub-01"], "test": ["sub-02"]}
    checkpoint = SimpleNamespace(run_id="a", stage="stage 1", step=0,
                                 metadata={"fingerprints": {"data": "x"}, "alignment": {}})
    for checkpoint.step in (0, 7):
        write_run_record(path, checkpoint, {"epochs": 3 + checkpoint.step, "seed": 0}, {"epochs": 3, "seed": 0}, split)
    record = json.loads(path.read_text())
    assert (record["fingerprints"], record["split"]) == ({"data": "x"}, split)
    assert [(start["step"], start["changed"]) for start in record["starts"]] == [(0, {}), (7, {"epochs": 10})]
    assert all(record["starts"][0][name] for name in ("time", "settings", "versions", "machine"))
    checkpoint.run_id = "b"  # another run
    for content in (path.read_text(), "[]", '{"run_id": "b", "starts": 3}', "[" * 10_000):
        path.write_text(content)
        write_run_record(path, checkpoint, {}, {}, split)
        assert len(json.loads(path.read_text())["starts"]) == 1


@pytest.mark.parametrize("before", ["os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "sys.stdout = sys.stderr = None",
                                    "sys.stdout.reconfigure(encoding='ascii')"])
def test_output_that_cannot_be_written_ends_nothing(tmp_path, before):
    """A full disk, streams that cron closed, a locale without these letters; Ctrl-C and `tee`: test_recovery.py."""
    code = f"""import os, sys
from training.log import robust_output
{before}
with robust_output():
    for n in range(2000):
        print("caf\\u00e9 \\udcff", n)
    print("a message", file=sys.stderr)
    open(sys.argv[1], "w").write("alive")"""
    done = run_code(code, str(tmp_path / "out"))
    assert done.returncode == 0 and (tmp_path / "out").read_text() == "alive" and "Traceback" not in done.stderr
    assert r"caf\xe9 \udcff 1999" in done.stdout or "ascii" not in before

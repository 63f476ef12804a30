"""Settings, command line, metrics, figures, logs and checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

import opt as settings
from data.grids import spacing_of
from opt import OptionError, Options, paper, small
from tests.conftest import run_program
from utils.arguments import comments, parse_arguments
from utils.checkpoint import Checkpoint, CheckpointError, content_hash, read_checkpoint, refuse_another_run
from utils.ema import EMA
from utils.figures import Panel, save_grid
from utils.files import FileError, remove_strays, replace_file, sole_writer, write_text
from utils.logger import Log, LogError
from utils.metrics import paired_gain, score, summary, write_metrics

# ---- settings


def test_both_presets_are_valid():
    small().validate()
    paper().validate()
    published = paper()
    assert published.image_sizes() == {"fmri": (64, 64, 36), "dmri": (96, 96, 60)}
    assert (published.base_channels, published.unet_depth, published.timesteps, published.epochs) == (64, 4, 1000, 300)
    assert (published.learning_rate, published.refine_learning_rate) == (1e-6, 1e-5)


@pytest.mark.parametrize("name, value, words", [
    ("lerning_rate", 1.0, ["opt.lerning_rate", "did you mean opt.learning_rate?"]),
    ("epochs", 2.5, ["opt.epochs = 2.5", "int"]),
    ("epochs", True, ["opt.epochs = True", "int"]),
    ("epochs", 0, ["opt.epochs = 0", "at least 1"]),
    ("learning_rate", float("nan"), ["opt.learning_rate = nan"]),
    ("pattern_weight", float("inf"), ["opt.pattern_weight = inf"]),
    ("eta", 1e300, ["opt.eta"]),
    ("fusion", "middle", ["opt.fusion = 'middle'", "late, early"]),
    ("image_size", (64, 64), ["opt.image_size", "each axis at least 11"]),
    ("image_size", {"t1": 64, "t2": 64}, ["t1, t2", "opt.modalities"]),
    ("image_size", "big", ["opt.image_size"]),
    ("modalities", ("fmri", "fmri"), ["opt.modalities", "two different names"]),
    ("fold", 5, ["opt.fold = 5", "0 .. 4"]),
    ("sampling_steps", 2000, ["opt.sampling_steps = 2000", "1000"]),
    ("reduce", "sum", ["opt.reduce = 'sum'", "choose from mean, std"]),
    ("reduce", {"fmri": "mean"}, ["opt.reduce"]),
    ("intensity", {"fmri": "minmax", "dmri": "max"}, ["opt.intensity", "choose from percentile"]),
    ("augment", ("flip", "rotate"), ["opt.augment", "choose from flip, affine, intensity"]),
    ("eta", 0.5, ["opt.eta = 0.5", 'opt.sampler = "ddim"']),
    ("pattern_labels", (0, 3), ["opt.pattern_labels", "background", "opt.pattern_file"]),
    ("image_size", 1000, ["opt.image_size = 1000", "at most"]),
    ("augment", "flip", ["opt.augment = 'flip'"]),
    ("bids_suffix", {"t1": "T1w"}, ["opt.bids_suffix", "fmri=desc-preproc_bold"]),
    ("bids_suffix", {"fmri": "../x"}, ["opt.bids_suffix"]),
    ("base_channels", 20, ["opt.base_channels = 20", "multiple of 8"]),
    ("refine", True, ["opt.refine = True", "best_model.pth"]),
    ("device", "tpu", ["opt.device = 'tpu'"])])
def test_what_cannot_work_is_refused_with_option_value_and_remedy(name, value, words):
    chosen = small()
    setattr(chosen, name, value)
    with pytest.raises(OptionError) as refusal:
        chosen.validate()
    for word in words:
        assert word in str(refusal.value)


def test_all_problems_are_told_at_once():
    chosen = small()
    chosen.fold, chosen.timesteps, chosen.sizes = 9, 1, 3
    with pytest.raises(OptionError) as refusal:
        chosen.validate()
    assert len(str(refusal.value).splitlines()) == 4  # also sampling_steps, which is now above timesteps


@pytest.mark.parametrize("size", [64, (64, 64, 64), {"fmri": 64, "dmri": (64, 64, 64)}, (64, (64, 64, 64))])
def test_every_form_of_a_size(size):
    assert dataclasses.replace(small(), image_size=size).image_sizes() == {"fmri": (64,) * 3, "dmri": (64,) * 3}


def parse(*words: str, opt: Options | None = None) -> Options:
    return parse_arguments(opt or small(), settings.PRESETS, list(words), "test")


def test_every_setting_has_a_comment_and_an_option():
    texts = comments(Options)
    for each in dataclasses.fields(Options):
        assert len(texts[each.name][1]) > 10, each.name
        assert texts[each.name][0], each.name


def test_the_command_line_goes_over_edits_over_the_preset():
    edited = small()
    edited.epochs, edited.seed = 7, 3
    chosen = parse("--preset", "paper", "--seed", "4", opt=edited)
    assert (chosen.epochs, chosen.seed, chosen.base_channels) == (7, 4, 64)
    assert edited.seed == 3


@pytest.mark.parametrize("words, name, value", [
    (["--refine"], "refine", True), (["--no-refine"], "refine", False), (["--epochs", "3"], "epochs", 3),
    (["--image_size", "64"], "image_size", 64), (["--image_size", "64", "64", "32"], "image_size", (64, 64, 32)),
    (["--image_size", "64x64x32"], "image_size", (64, 64, 32)),
    (["--image_size", "fmri=32x32x18", "dmri=48x48x30"], "image_size", {"fmri": (32, 32, 18), "dmri": (48, 48, 30)}),
    (["--modalities", "t1", "flair"], "modalities", ("t1", "flair")), (["--reduce", "std"], "reduce", "std"),
    (["--bids_suffix", "fmri=desc-preproc_bold"], "bids_suffix", {"fmri": "desc-preproc_bold"}),
    (["--pattern_labels", "3", "7"], "pattern_labels", (3, 7)),
    (["--augment", "flip", "affine"], "augment", ("flip", "affine")),
    (["--reduce", "fmri=mean", "dmri=b0"], "reduce", {"fmri": "mean", "dmri": "b0"})])
def test_values_on_the_command_line(words, name, value):
    assert getattr(parse(*words), name) == value


def test_help_and_misspelt_words_in_the_program():
    told = run_program("--help")
    assert told.returncode == 0 and "passes over the training pairs" in told.stdout
    for each in dataclasses.fields(Options):
        assert f"--{each.name}" in told.stdout
    wrong = run_program("--lerning_rate", "1")
    assert wrong.returncode == 2 and "--lerning_rate" in wrong.stderr and "--learning_rate" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# ---- metrics


def test_scores_of_known_errors():
    truth = np.random.default_rng(0).uniform(-0.5, 0.5, (14, 13, 12))
    inside = np.zeros(truth.shape, bool)
    inside[4:8] = True
    candidate = np.where(inside, truth + 0.2, truth)
    scores = score(candidate, truth, {"brain": inside, "pattern": np.zeros_like(inside)})
    assert scores["brain"]["psnr"] == pytest.approx(20.0) and scores["brain"]["mae"] == pytest.approx(0.2)
    assert scores["volume"]["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, candidate, data_range=2))
    assert "pattern" not in scores and scores["volume"]["ssim"] < 1
    assert score(truth, truth, {})["volume"] == {"psnr": float("inf"), "ssim": pytest.approx(1), "mae": 0}
    assert score(truth + 9, truth, {})["volume"]["mae"] == pytest.approx((1 - truth).mean())  # clipped to [-1, 1]


def test_paired_gain():
    gain, low, high = paired_gain(np.array([3.0, 4, 5, 6]), np.array([2.0, 2.5, 4, 5]))
    assert gain == pytest.approx(1.125) and 1 <= low < gain < high <= 1.5
    assert paired_gain(np.array([2.0]), np.array([1.0]))[0] == 1


def test_metrics_file_and_table(tmp_path):
    rows = [{"subject": f"s{n}", "direction": "a->b", "volume": volume, "region": "volume", "psnr": 20.0 + n + up,
             "ssim": 0.8, "mae": 0.1} for n in range(4) for volume, up in (("refined", 2), ("mean", 0))]
    write_metrics(tmp_path / "metrics.csv", rows)
    with open(tmp_path / "metrics.csv") as file:
        assert list(csv.DictReader(file))[0] == {"subject": "s0", "direction": "a->b", "volume": "refined",
                                                 "region": "volume", "psnr": "22.00000", "ssim": "0.80000",
                                                 "mae": "0.10000"}
    assert "23.50 +-  1.12" in summary(rows) and "+2.00 dB" in summary(rows)


# ---- pictures and logs


def test_a_grid_shows_its_volumes_in_place(tmp_path):
    bright, dark = np.ones((10, 12, 8)), -np.ones((10, 12, 8))
    spacing = spacing_of(np.diag([2.0, 2, 3, 1]))
    rows = [("a", [Panel(bright, spacing), Panel(dark, spacing)]),
            ("b", [Panel(0 * dark, spacing, kind="difference"), None])]
    save_grid(tmp_path / "grid.png", "title", ["one", "two"], rows)
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    columns = picture[60:170].mean(axis=0)
    middle = (len(columns) + 150) // 2
    assert columns[160:260].mean() > 200 and columns[middle:].mean() < 10
    assert [each.name for each in tmp_path.iterdir()] == ["grid.png"]


def test_a_continued_log_drops_what_comes_again(tmp_path):
    log = Log(tmp_path / "log.csv", ("kind", "step", "loss"), 0, 0, "a")
    for step in range(1, 6):
        log.write("training", step, loss=step / 3)
    for step in (2, 3):
        log.write("validation", step, loss=0.5)
    with open(tmp_path / "log.csv", "ab") as file:
        file.write(b"training\n\0\0\xff\ntraining,3")  # as a power cut may leave it
    log = Log(tmp_path / "log.csv", ("kind", "step", "loss"), 3, 2, "a")
    log.write("training", 4, loss=9.0)
    with open(tmp_path / "log.csv") as file:
        rows = [(row["kind"], row["step"], row["loss"]) for row in csv.DictReader(file)]
    assert rows == [("training", "1", "0.333333"), ("training", "2", "0.666667"), ("training", "3", "1"),
                    ("validation", "2", "0.5"), ("training", "4", "9")]
    with pytest.raises(LogError, match="result_dir"):
        Log(tmp_path / "log.csv", ("kind", "step"), 3, 3, "b")


# ---- checkpoints


def checkpoint(folder: Path, value: float = 1.0) -> Checkpoint:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    facts = {"options": {"a": (1, 2)}, "fingerprints": {"data": "x"}, "sizes": {}, "network": {}, "ranges": {}}
    return Checkpoint("stage 1", folder, {"model": model, "ema": EMA(model, 0.9)}, facts, math.inf)


def test_a_checkpoint_comes_back(tmp_path):
    run = checkpoint(tmp_path)
    run.step, run.reviewed = 12, 11
    run.save(run.last)
    other = checkpoint(tmp_path, 5.0)
    assert other.resume(None, set())
    assert (other.step, other.reviewed) == (12, 11) and other.run_id == run.run_id
    assert content_hash(other.parts["model"]) == content_hash(run.parts["model"])
    assert content_hash(checkpoint(tmp_path, 5.0).parts["model"]) != content_hash(run.parts["model"])
    assert [each.name for each in tmp_path.iterdir()] == ["last_model.pth"]


def test_another_stage_format_or_run_is_refused(tmp_path):
    path = tmp_path / "last_model.pth"
    checkpoint(tmp_path).save(path)
    with pytest.raises(CheckpointError, match="is a checkpoint of stage 1, stage 2 is needed"):
        read_checkpoint(path, ("stage 2",))
    saved = read_checkpoint(path, ("stage 1",))
    torch.save({"weights": 1}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no checkpoint of this version"):
        read_checkpoint(tmp_path / "other.pth", ("stage 1",))
    torch.save({**saved, "step": "many", "sizes": None}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="it lacks step, sizes"):
        read_checkpoint(tmp_path / "other.pth", ("stage 1",))
    refuse_another_run(path, saved, {"a": [1, 2]}, {"data": "x"})
    with pytest.raises(CheckpointError) as refusal:
        refuse_another_run(path, saved, {"a": (1, 3)}, {"data": "y"})
    assert "a: (1, 2) there, (1, 3) now" in str(refusal.value) and "the data: not the same" in str(refusal.value)


def test_weights_that_do_not_fit_are_not_loaded_in_part(tmp_path):
    run = checkpoint(tmp_path)
    run.save(run.last)
    saved = read_checkpoint(run.last, ("stage 1",))
    del saved["model"]["bias"]
    torch.save(saved, run.last)
    with pytest.raises(CheckpointError, match="last_model.pth: does not fit"):
        checkpoint(tmp_path).resume(None, set())


# ---- writing


def test_R5_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def fails(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"a.txt: cannot be written \(No space left on device; [\d,.]+ MB are free"):
        replace_file(path, fails, 4)
    with pytest.raises(FileError, match="MB are needed"):
        replace_file(path, fails, 2**62)
    with pytest.raises(ZeroDivisionError):  # what is not the disk's fault stays what it is
        replace_file(path, lambda file: 1 / 0, 4)
    assert path.read_text() == "before" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(FileError, match="cannot be written"):
        write_text(path / "below", "a file is no folder")


def test_strays_are_removed_but_not_from_under_a_living_writer(tmp_path):
    stray = tmp_path / "deep" / f".a.pth.{32 * '0'}.part"
    stray.parent.mkdir()
    stray.write_bytes(b"half")
    others = [tmp_path / name for name in (".a.part", "b.part", f"{32 * '0'}.part")]
    for path in others:
        path.touch()

    def write(file) -> None:
        remove_strays(tmp_path)  # as another process would
        file.write(b"whole")

    replace_file(tmp_path / "c.bin", write, 5)
    assert not stray.exists() and (tmp_path / "c.bin").read_bytes() == b"whole"
    assert all(path.exists() for path in others)


def test_one_writer_in_a_folder(tmp_path):
    refused = pytest.raises(FileError, match=f"another run writes there .process {os.getpid()} on")
    with sole_writer(str(tmp_path / "."), str(tmp_path)), refused:  # one folder under two names
        sole_writer(str(tmp_path)).__enter__()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").write_text("of a run that was killed")
    with sole_writer(str(tmp_path)):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()

"""Checkpoints: what is refused, and what is noticed. What comes back: test_recovery.py."""

import dataclasses
import errno
import math
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.kills import identical
from data.alignment import Alignment
from opt import small
from tests.conftest import weights
from training.checkpoint import STAGE_1, STAGE_2, Checkpoint, content_hash, read_checkpoint
from training.ema import EMA
from utils.errors import UserError
from utils.files import replace_file


def new_run(folder: Path, **changes) -> Checkpoint:
    model = nn.Linear(2, 2)
    each, options = ("fmri", "dmri"), small().resolved() | changes.pop("options", {})
    metadata = {"options": options, "fingerprints": {"data": "x", "split": "", "pattern": ""},
                "ranges": dict.fromkeys(each, (0.0, 1.0)),
                "affines": dict.fromkeys(each, np.eye(4).tolist()), "alignment": dataclasses.asdict(Alignment()),
                **changes}
    return Checkpoint(STAGE_1, folder, {"model": model, "ema": EMA(model, 0.9)}, metadata, math.inf)


@pytest.fixture
def run(tmp_path) -> Checkpoint:
    run = new_run(tmp_path)
    run.save(run.last)
    return run


def test_another_stage_version_or_program_is_refused(run, tmp_path):
    saved, other = weights(run.last), tmp_path / "other.pth"
    for content, message in ((saved, "is a checkpoint of stage 1, but stage 2 is needed"), ([1], "of this version"),
                             ({**saved, "format": 1}, "is not a checkpoint of this version"),
                             ({**saved, "stage": STAGE_2, "step": "x"}, "step = 'x': must be a count"),
                             ({**saved, "stage": STAGE_2}, "it has no backbone")):
        torch.save(content, other)
        with pytest.raises(UserError, match=message):
            read_checkpoint(other, (STAGE_2,))
    with pytest.raises(UserError, match="is not a file"):
        read_checkpoint(tmp_path, (STAGE_1,))
    del saved["model"]["bias"]
    torch.save(saved, run.last)
    with pytest.raises(UserError, match="last_model.pth: does not fit this version.*Missing key"):
        new_run(tmp_path).resume(None, set())


def test_another_run_is_refused_with_all_differences_and_left_alone(run, tmp_path):
    before = run.last.read_bytes()
    with pytest.raises(UserError) as refusal:
        new_run(tmp_path, options={"augment": ("flip",), "seed": 9}, fingerprints={"data": "y"}).resume(None, {"seed"})
    for words in ("augment: () there, ('flip',) now", "the data: not the same"):
        assert words in str(refusal.value)
    assert "seed:" not in str(refusal.value) and run.last.read_bytes() == before
    assert new_run(tmp_path, options={"augment": [], "seed": 9}).resume(None, {"seed"})  # a list equals a tuple
    stranger = new_run(tmp_path)  # another run_id, and other weights
    assert content_hash(stranger.parts["model"]) != content_hash(run.parts["model"])
    stranger.save(stranger.best)
    with pytest.raises(UserError, match="belong to different runs"):
        new_run(tmp_path).resume(None, set())


def test_a_flipped_bit_is_noticed_or_harmless(run):
    path, random, noticed = run.last, np.random.default_rng(0), 0
    content, expected = path.read_bytes(), read_checkpoint(path, (STAGE_1,))
    for bit in random.integers(0, 8 * len(content), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert identical(read_checkpoint(path, (STAGE_1,)), expected), bit
        except UserError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > 100  # the rest is padding, and what a zip file holds twice


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(),
                                   RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes")])
def test_a_transient_error_is_not_damage(run, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(UserError, match="may be fine: fix the cause and try again"):
        new_run(tmp_path).resume(None, set())
    assert list(tmp_path.iterdir()) == [run.last]


def test_a_large_checkpoint_is_copied_and_written_beside_training(run, monkeypatch):
    """Training changes the weights at once; what goes wrong in the thread is raised later, and the old file stays."""
    monkeypatch.setattr("training.checkpoint.LARGE", 0)
    started, finish, before = threading.Event(), threading.Event(), run.parts["model"].weight.detach().clone()

    def slow(path, write):
        started.set()
        assert finish.wait(60)
        replace_file(path, write)
    monkeypatch.setattr("training.checkpoint.replace_file", slow)
    run.step = 7
    run.save(run.last)
    assert started.wait(60) and weights(run.last)["step"] == 0
    nn.init.zeros_(run.parts["model"].weight)
    run.step = 8
    finish.set()
    run.finish_writing()
    assert weights(run.last)["step"] == 7 and torch.equal(weights(run.last)["model"]["weight"], before)
    monkeypatch.setattr("training.checkpoint.replace_file", Mock(side_effect=UserError("no space left")))
    run.save(run.best)
    for next_time in (run.finish_writing, lambda: run.save(run.last)):
        with pytest.raises(UserError, match="no space left"):
            next_time()
        run.save(run.last)
    assert weights(run.last)["step"] == 7
    with pytest.raises(UserError):
        run.finish_writing()

"""Files that are not what they seem: checkpoints, caches, locks, tables and scans that somebody made, or that change.

Each test is named after its row in docs/reliability.md, "Files that are not what they seem" (H1 .. H12, B1 .. B8).
"""

import contextlib
import errno
import math
import multiprocessing
import os
import pkgutil
import shutil
import signal
import socket
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import main
import sample
from data.cache import Reading, cached_volume, load_volume
from data.pairs import find_pairs
from data.problems import DataError, VolumeError, raise_if_fatal
from data.volumes import read_volume
from models.losses import load_perceptual_loss
from models.prior import Prior
from synthesis.derivatives import read_sidecar
from tests.conftest import (
    BOTH,
    arguments,
    ball,
    refine_arguments,
    run_code,
    save,
    signalled,
    weights,
    write_pairs,
)
from training.checkpoint import STAGE_1, STAGE_2, read_checkpoint
from training.loop import split_jobs
from training.optimise import Optimiser
from utils.errors import UserError, visible
from utils.files import MAX_TEXT, make_writable, read_json, read_text
from utils.stop import Interrupted, stop
from utils.tensors import UNFIT


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for a pipe or reads without end fails after a minute."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def changed(source: Path, target: Path, field: str, value: object) -> Path:
    """A copy of a checkpoint in which a field, "a/b/c", has another value (a function: of the old one)."""
    state = weights(source)
    *path, last = field.split("/")
    place = state
    for name in path:
        place = place[int(name) if isinstance(place, list) else name]
    last = int(last) if isinstance(place, list) else last
    place[last] = value(place[last]) if callable(value) else value
    torch.save(state, target)
    return target


# ---- H1, H2, H9, B6: tensors and checkpoints


def trained_optimiser(kind: str = "muon") -> tuple[nn.Module, Optimiser]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimiser = Optimiser(model, 0.1, 1, 10, 1.0, kind)
    loss = model(torch.ones(3, 4)).square().mean()
    loss.backward()
    optimiser.step(loss.detach())
    return model, optimiser


@pytest.mark.parametrize("kind, name, value", [
    ("adam", "exp_avg", lambda x: torch.zeros(x.numel() + 1)), ("adam", "exp_avg", lambda x: x.double()),
    ("adam", "exp_avg_sq", lambda x: x[:1]), ("adam", "step", lambda x: torch.zeros(5)), ("adam", "step", lambda x: 1),
    ("adam", "exp_avg", lambda x: x * math.nan), ("adam", "exp_avg", lambda x: None),
    ("muon", "momentum_buffer", lambda x: x.flatten()), ("muon", "momentum_buffer", lambda x: x.half()),
    ("muon", "momentum_buffer", lambda x: torch.empty(1).expand(10**6, 10**6)),
    ("adam", "step", lambda x: x.to_sparse())])
def test_h1_moments_of_another_shape_or_kind_are_refused(kind, name, value):
    state = trained_optimiser()[1].state_dict()
    state[kind][0][name] = value(state[kind][0][name])
    with pytest.raises(UNFIT):
        trained_optimiser()[1].load_state_dict(state)
    for counter, wrong in (("bad_in_a_row", -1), ("bad_in_a_row", 1.5), ("loss_scale", math.inf), ("loss_scale", 2),
                           ("since_overflow", "1"), ("since_overflow", 2**31)):
        with pytest.raises(UNFIT):
            trained_optimiser()[1].load_state_dict({**trained_optimiser()[1].state_dict(), counter: wrong})


def test_h1_an_expanded_element_is_copied_into_memory_of_its_own():
    model, optimiser = trained_optimiser("adam")
    state = optimiser.state_dict()
    for moments, parameter in zip(state["adam"], model.parameters()):
        moments["exp_avg"] = torch.full((1,), 0.25).expand(parameter.numel()).reshape(parameter.shape)
    model, optimiser = trained_optimiser("adam")
    optimiser.load_state_dict(state)
    for parameter in model.parameters():
        moment = optimiser.adam.state[parameter]["exp_avg"]
        assert moment.untyped_storage().nbytes() == 4 * parameter.numel() and (moment == 0.25).all()
    before = [parameter.clone() for parameter in model.parameters()]
    loss = model(torch.ones(3, 4)).square().mean()
    loss.backward()
    assert optimiser.step(loss.detach()).isfinite().all()
    assert all((old != new).any() for old, new in zip(before, model.parameters()))


def test_h1_a_parameter_without_a_gradient_has_no_moments_and_the_run_resumes(tmp_path):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimisers = [Optimiser(model, 0.1, 1, 10, 1.0, "muon") for _ in range(2)]
    loss = model["used"](torch.ones(1, 2)).sum()
    loss.backward()
    optimisers[0].step(loss.detach())
    one, other = optimisers[0].state_dict(), optimisers[1]
    assert [bool(moments) for moments in one["adam"]] == [True, False]
    other.load_state_dict(one)
    torch.testing.assert_close(other.state_dict(), one, rtol=0, atol=0)


def test_h1_a_resumed_run_refuses_such_moments(study_csv, trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / "checkpoints/last_model.pth"
    changed(last, last, "optimiser/adam/0/exp_avg", lambda x: torch.zeros(1).expand(3))
    before = last.read_bytes()
    assert main.main(arguments(study_csv, tmp_path, "--epochs", "4")) == 2
    assert "last_model.pth: does not fit this version of PDS" in capsys.readouterr().err and last.read_bytes() == before


FIELDS = [("options/timesteps", 0), ("options/timesteps", 10**9), ("options/timesteps", 10.0),
          ("options/patch_size", 0), ("options/unet_depth", 200_000), ("options/base_channels", 10**9),
          ("options/res_blocks", 10**9), ("options/sampler", "magic"), ("options/seed", None), ("options/seed", -1),
          ("options/batch_size", "4"), ("options/eta", math.nan), ("options/modalities", ("fm\nri", "dmri")),
          ("options/modalities", ("\x1b", "x")), ("options/modalities", ("../x", "dmri")),
          ("options/modalities", ("fmri",)), ("options/image_size", 10**6),
          ("options/image_size", {"fmri": (0, 1, 2), "dmri": 9}), ("options/reduce", {"fmri": "sum", "dmri": "b0"}),
          ("options/coarse_samples", "1"), ("options", []), ("options", {}), ("step", -5), ("step", "5"),
          ("step", True), ("step", 2**70), ("best", math.nan), ("best", None), ("run_id", "../x"),
          ("fingerprints", {}), ("fingerprints", {"data": 1}), ("seen_scans", "x"), ("seen_scans", [1]),
          ("ranges", {"fmri": (0.0, 1.0)}), ("ranges/fmri", (1.0, 1.0)),
          ("ranges/fmri", (0.0, math.inf)), ("ranges/fmri", ("0", "1")), ("affines/fmri", [[0.0] * 4] * 4),
          ("affines/fmri", [[math.nan] * 4] * 4), ("affines/fmri", [1.0]),
          ("affines/fmri", [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]),
          ("affines/fmri", [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [5, 5, 5, 7]]),
          ("affines/fmri", [[1e14, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), ("alignment/how", "sideways"),
          ("alignment/box", (1.0,)), ("alignment", {}),
          ("alignment", {"how": "world", "box": (-1.0, 1.0, 1.0), "centre": (), "offsets": {}}),
          ("groups", ["a", "a"]), ("groups", "ab"), ("ema", None), ("model", [])]


@pytest.mark.parametrize("name", ["best_model.pth", "best_refine.pth"])
@pytest.mark.parametrize("field, value", FIELDS, ids=[f"{field}-{number}" for number, (field, _) in enumerate(FIELDS)])
def test_h2_a_field_out_of_its_range_is_refused_by_name(trained, tmp_path, name, field, value):
    path = changed(trained / "checkpoints" / name, tmp_path / name, field, value)
    with pytest.raises(UserError) as refusal:
        read_checkpoint(path, (STAGE_1, STAGE_2))
    said, top = str(refusal.value), field.split("/")
    assert str(path) in said and top[0] in said and (top[0] != "options" or top[-1] in said)
    assert len(said) < 5000 and "\x1b" not in visible(said)


@pytest.mark.parametrize("field, value", [("backbone", None), ("backbone/options/timesteps", 0),
                                          ("backbone/stage", "x"), ("backbone/groups", [""]),
                                          ("backbone/options/seed", 7), ("backbone/options/folds", 4),
                                          ("backbone/ranges/dmri", (math.nan, 1.0))])
def test_h2_and_so_is_a_field_of_the_backbone(trained, tmp_path, field, value):
    path = changed(trained / "checkpoints/best_refine.pth", tmp_path / "x.pth", field, value)
    with pytest.raises(UserError, match="x.pth: is not a checkpoint of this version of PDS"):
        read_checkpoint(path, (STAGE_2,))


def test_h2_a_setting_that_opt_py_has_got_since_has_its_default(study_csv, trained, tmp_path):
    path = changed(trained / "checkpoints/best_model.pth", tmp_path / "x.pth", "options",
                   lambda options: {name: each for name, each in options.items() if name not in ("share_scans", "eta")})
    assert read_checkpoint(path, (STAGE_1,))["options"]["eta"] == 0
    assert sample.main(["--resume_path", str(path), "--data_root", str(study_csv), "--sample_dir", str(tmp_path / "s"),
                        "--cache_dir", str(tmp_path / "c"), "--device", "cpu"]) == 0


def test_h2_values_without_an_end_are_refused_at_once(trained, tmp_path):
    twice = ["x"]
    for _ in range(60):
        twice = [twice, twice]
    for value in (twice, tuple(twice), "x" * 10**6, 2**70, {"a": twice}):
        for name in ("augment", "bids_suffix", "image_size", "exclude"):
            path = changed(trained / "checkpoints/best_model.pth", tmp_path / "x.pth", f"options/{name}", value)
            with pytest.raises(UserError, match="x.pth: is not a checkpoint of this version") as refusal:
                read_checkpoint(path, (STAGE_1,))
            assert len(str(refusal.value)) < 5000


def first_weight(make):
    """Replaces one weight of a state dict by make(weight)."""
    def change(state):
        name = next(name for name, value in state.items() if value.ndim > 1 and len(value) > 1)
        return {**state, name: make(state[name])}
    return change


@pytest.mark.parametrize("make", [lambda w: w * math.nan, lambda w: w[:1], lambda w: w.flatten(), lambda w: "w",
                                  lambda w: torch.zeros(1).expand(10**6, 10**6), lambda w: w.to_sparse()[None]])
@pytest.mark.parametrize("field", ["ema/model", "backbone/ema/model"])
def test_h2_weights_that_do_not_fit_are_refused_by_every_program(study_csv, trained, tmp_path, capsys, field, make):
    path = changed(trained / "checkpoints/best_refine.pth", tmp_path / "x.pth", field, first_weight(make))
    assert sample.main(["--resume_path", str(path), "--data_root", str(study_csv), "--sample_dir", str(tmp_path / "s"),
                        "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "x.pth: does not fit this version of PDS" in said and "Traceback" not in said
    assert not (tmp_path / "s").exists()


def test_h2_a_large_network_takes_no_memory_before_its_weights_fit(trained, tmp_path):
    state = read_checkpoint(trained / "checkpoints/best_model.pth", (STAGE_1,))
    state["network"] |= {"channels": 1024, "depth": 6, "blocks": 16}  # tens of gigabytes
    with pytest.raises(UNFIT):
        Prior.from_checkpoint(state, torch.device("cpu"), torch.float32)


def test_h2_volumes_that_are_not_finite_are_never_written(study_csv, trained, tmp_path, capsys):
    path = changed(trained / "checkpoints/best_model.pth", tmp_path / "x.pth", "ema/model",
                   lambda state: {name: value * 1e18 if value.ndim > 1 else value for name, value in state.items()})
    assert sample.main(["--resume_path", str(path), "--data_root", str(study_csv), "--sample_dir", str(tmp_path / "s"),
                        "--cache_dir", str(tmp_path / "c"), "--device", "cpu", "--precision", "fp32"]) == 2
    assert "values that are not finite; it is not written" in capsys.readouterr().err
    assert not list((tmp_path / "s").rglob("*.nii.gz"))


def test_h2_a_checkpoint_without_an_optimiser_is_refined_and_not_resumed(study_csv, trained, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints/best_model.pth"
    state = weights(trained / "checkpoints/best_model.pth")
    del state["optimiser"]
    torch.save(state, path)
    assert main.main(refine_arguments(study_csv, tmp_path, "--refine_epochs", "1")) == 0
    assert main.main(arguments(study_csv, tmp_path)) == 2
    assert "best_model.pth: does not fit this version of PDS (optimiser" in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize("path", ["x" * 300, "/proc/1/root/x" if os.getuid() else "/dev/null/x", "\udcff", "a\0b"])
def test_h7_a_checkpoint_in_a_place_that_cannot_be_looked_at(path, capsys):
    for run, words in ((main.main, ["--refine"]), (main.main, []), (sample.main, [])):
        assert run([*words, "--resume_path", path, "--checkpoint_dir", "/dev/null/x"]) == 2
        assert "Traceback" not in capsys.readouterr().err


def packed(path: Path) -> Path:
    """The same archive, with compressed records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def test_h9_weights_of_vgg16_pass_the_same_checks(tmp_path, vgg_weights):
    path = tmp_path / "vgg.pth"
    huge = {name: torch.zeros(1).half().expand(*each.shape[:-1], 10**9) for name, each in vgg_weights.items()}
    for content in (huge, {**vgg_weights, "features.0.weight": torch.zeros(1).expand(10**6, 10**6)},
                    {name: each * math.nan for name, each in vgg_weights.items()}):
        torch.save(content, path)
        with pytest.raises(UserError, match="vgg.pth: cannot be used"):
            load_perceptual_loss(str(path), False)
    torch.save(vgg_weights, path)
    with pytest.raises(UserError, match="records are not as torch writes them"):
        load_perceptual_loss(str(packed(path)), False)
    torch.save(vgg_weights, path, _use_new_zipfile_serialization=False)  # as torchvision's own file
    assert load_perceptual_loss(str(path), False)
    torch.save({name: each.half() for name, each in vgg_weights.items()}, path)
    assert next(load_perceptual_loss(str(path), False).features.parameters()).dtype == torch.float32


def test_b6_stage_2_keeps_only_what_it_needs_of_stage_1(trained):
    backbone = weights(trained / "checkpoints/last_refine.pth")["backbone"]
    assert "optimiser" not in backbone and "model" not in backbone and backbone["ema"].keys() == {"model"}


# ---- H3 .. H8, H10, H12: other files


def test_h3_a_folder_or_link_in_the_place_of_a_temporary_file_is_left_alone(tmp_path, study_csv, capsys):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    for number, make in enumerate((lambda p: p.symlink_to(tmp_path / "precious"), lambda p: p.mkdir(), os.mkfifo)):
        make(tmp_path / "checkpoints" / f".host{number}.1.1.part")
    (tmp_path / "checkpoints/.lock").symlink_to(tmp_path / "precious")
    assert main.main(arguments(study_csv, tmp_path)) == 2 and ".lock: cannot be written" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_h4_a_passing_error_deletes_nothing(tmp_path, monkeypatch, number):
    path, reading = save(tmp_path / "x.nii", ball(11, 12, 13)), Reading("fmri", (11, 12, 13))
    file, _ = cached_volume(path, reading, tmp_path / "cache")
    before = {each.name: each.read_bytes() for each in (tmp_path / "cache").iterdir()}
    for where in ("data.cache.open_regular", "utils.files.open_regular"):
        with monkeypatch.context() as patch, pytest.raises((VolumeError, OSError)):
            patch.setattr(where, Mock(side_effect=OSError(number, os.strerror(number))))
            cached_volume(path, reading, tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(VolumeError, match="cannot be read right now"):
        patch.setattr("data.cache.open_regular", Mock(side_effect=OSError(number, os.strerror(number))))
        load_volume(file)
    assert {each.name: each.read_bytes() for each in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 200, "cut", "huge", "float64"])
def test_h4_bad_content_is_discarded_and_made_again(tmp_path, content):
    path, reading = save(tmp_path / "x.nii", ball(11, 12, 13)), Reading("fmri", (11, 12, 13))
    file, _ = cached_volume(path, reading, tmp_path / "cache")
    good, expected = file.read_bytes(), load_volume(file)
    for at in range(128):  # each byte of the header
        file.write_bytes(good[:at] + b" " + good[at + 1:])
        with contextlib.suppress(VolumeError):
            np.testing.assert_array_equal(load_volume(file), expected)
    file.write_bytes({"cut": good[:-5], "huge": good.replace(b"(11, 12, 13)", b"(99999,9999)"),
                      "float64": good.replace(b"<f4", b"<f8")}.get(content, content))
    with pytest.raises(VolumeError, match="has become unreadable"):
        load_volume(file)
    assert not file.exists()
    np.testing.assert_array_equal(load_volume(cached_volume(path, reading, tmp_path / "cache")[0]), expected)
    metadata_file = file.with_suffix(".json")
    metadata_file.write_text(metadata_file.read_text().replace('"low": ', '"low": 9'))  # a wrong intensity
    assert cached_volume(path, reading, tmp_path / "cache")[1]["low"] < 10


def start(folder: Path, count: int, failed) -> None:
    for _ in range(count):
        try:
            make_writable(folder)
        except UserError:
            failed.value += 1


def test_h5_twenty_thousand_starts_in_one_folder(tmp_path):
    failed = multiprocessing.get_context("fork").Value("i")
    processes = [multiprocessing.get_context("fork").Process(target=start, args=(tmp_path / "cache", 5000, failed))
                 for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert failed.value == 0 and list((tmp_path / "cache").iterdir()) == []


def huge_header(path: Path) -> None:
    """5000^3 voxels announced, none there."""
    content = bytearray(path.read_bytes()[:352])
    content[40:48] = np.array([3, 5000, 5000, 5000], "<i2").tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("fault", [Path.unlink, lambda path: os.truncate(path, 100), huge_header])
@pytest.mark.parametrize("stage", [1, 2])
def test_h6_a_scan_that_vanishes_before_a_picture_ends_the_run_with_its_state_saved(tmp_path, trained, capsys,
                                                                                   monkeypatch, stage, fault):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii")
    name, module, last = ("train.Stage1.draw", "train.Stage1", "last_model.pth") if stage == 1 else (
        "train_refine.Stage2.draw", "train_refine.Stage2", "last_refine.pth")
    if stage == 2:
        assert main.main(arguments(table, tmp_path, "--epochs", "1")) == 0
    draw = pkgutil.resolve_name(name)

    def draw_later(self, *arguments):
        for path in sorted((tmp_path / "s").glob("*.nii")):
            with contextlib.suppress(FileNotFoundError):
                fault(path)
        return draw(self, *arguments)

    monkeypatch.setattr(name, draw_later)
    monkeypatch.setattr(module + ".save_every", 3)
    words = arguments if stage == 1 else refine_arguments
    assert main.main(words(table, tmp_path, "--checkpoint_every", "1000", "--validate_every", "100")) == 2
    said = capsys.readouterr().err
    assert ".nii: " in said and "Traceback" not in said
    assert weights(tmp_path / "checkpoints" / last)["step"] == 3


SPECIAL = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": lambda path: path.mkdir(),
           "socket": lambda path: _socket(path), "huge": lambda path: (path.touch(), os.truncate(path, 2**36))}


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("kind", SPECIAL)
def test_h7_pipes_devices_folders_and_endless_files_are_refused_at_once(tmp_path, vgg_weights, kind):
    path = tmp_path / "x.nii"
    SPECIAL[kind](path)
    start = time.monotonic()
    for read in (read_volume, read_json, read_text, load_volume):
        with pytest.raises((OSError, UserError)):
            read(path)
        if kind == "huge" and not path.exists():  # the cache removes what is no volume
            SPECIAL[kind](path)
    assert read_sidecar(path) == {}
    for stages in ((STAGE_1,), (STAGE_2,)):
        with pytest.raises(UserError, match="x.nii: "):
            read_checkpoint(path, stages)
    with pytest.raises(UserError, match="x.nii: cannot be used"):
        load_perceptual_loss(str(path), False)
    with pytest.raises(DataError):
        raise_if_fatal(find_pairs(path, BOTH)[1])
    tree = tmp_path / "tree"
    for file in ("func/sub-1_bold.nii.gz", "dwi/sub-1_dwi.nii.gz"):
        (tree / "sub-1" / file).parent.mkdir(parents=True)
        (tree / "sub-1" / file).touch()
    SPECIAL[kind](tree / "participants.tsv")
    assert ["until then all groups are unknown" in str(each) for each in find_pairs(tree, BOTH)[1]] == [True]
    series = save(tmp_path / "s_dwi.nii", ball(11, 11, 11, 3))
    SPECIAL[kind](tmp_path / "s_dwi.bval")
    with pytest.raises(VolumeError, match="s_dwi.bval: cannot be read as b-values"):
        read_volume(series, "b0")
    assert time.monotonic() - start < 20


def test_h7_nested_json_long_lines_and_special_logs(tmp_path, study_csv, capsys):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply|Expecting value"):
        read_json(tmp_path / "deep.json")
    with open(tmp_path / "line.csv", "wb") as file:
        file.write(b"subject,fmri,dmri\n")
        file.truncate(MAX_TEXT + 1)
    with pytest.raises(DataError, match="more than"):
        raise_if_fatal(find_pairs(tmp_path / "line.csv", BOTH)[1])
    (tmp_path / "results/stage1").mkdir(parents=True)
    os.mkfifo(tmp_path / "results/stage1/log.csv")
    assert main.main(arguments(study_csv, tmp_path)) == 2 and "log.csv: " in capsys.readouterr().err


def test_h12_nothing_that_is_read_controls_the_terminal(tmp_path, capsys, trained):
    evil = "a\x1b[2J\x1b]0;x\x07\rb\u202e\x9b"
    (tmp_path / "t.csv").write_text(f"subject,fmri,dmri,{evil}\nsub-1,{evil},b,\n")
    for words in (["--data_root", evil], ["--data_root", str(tmp_path / "t.csv")], ["--resume_path", evil, "--refine"],
                  ["--data_root", str(tmp_path / "t.csv"), "--modalities", "t1", "t2"],
                  ["--data_root", str(tmp_path / "t.csv"), "--check"]):
        folders = [word for name in ("checkpoint_dir", "result_dir", "cache_dir")
                   for word in (f"--{name}", str(tmp_path / "out"))]
        assert main.main([*words, *folders]) == 2
        said = "".join(capsys.readouterr())
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & {*said}, words
    path = changed(trained / "checkpoints/best_model.pth", tmp_path / "x.pth", "options/sampler", evil)
    assert sample.main(["--resume_path", str(path)]) == 2 and "\x1b" not in capsys.readouterr().err


# ---- B1, B3, B4, B8


def test_b1_a_stop_ends_the_check_and_the_reading_of_one_file(tmp_path):
    table = write_pairs(tmp_path / "s")
    done = run_code(signalled("data.check", "read_volume", 2, signal.SIGTERM), *arguments(table, tmp_path, "--check"))
    assert done.returncode == 3 and "Stopped (received SIGTERM)" in done.stdout
    assert "read to the end" not in done.stdout
    path = save(tmp_path / "long.nii.gz", ball(20, 20, 20, 50))
    with stop:
        stop.reason = "test"
        for reduce in ("mean", "first", "std"):
            with pytest.raises(Interrupted):
                read_volume(path, reduce)


def test_b4_files_that_the_run_knows_by_content_may_move(tmp_path, capsys):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii.gz")
    labels = np.zeros((12, 13, 11), np.uint8)
    labels[3:8] = 1
    affine = np.diag([14.0, 14, 14, 1])
    affine[:3, 3] = -np.array((12, 13, 11)) / 2 * 14
    save(tmp_path / "labels.nii", labels, affine)
    words = ["--pattern_file", str(tmp_path / "labels.nii")]
    assert main.main(arguments(table, tmp_path, *words, "--epochs", "1")) == 0
    (tmp_path / "labels.nii").rename(tmp_path / "moved.nii")
    (tmp_path / "s").rename(tmp_path / "t")
    words = ["--pattern_file", str(tmp_path / "moved.nii"), "--epochs", "2"]
    assert main.main(arguments(tmp_path / "t/pairs.csv", tmp_path, *words)) == 0
    assert "Resuming" in capsys.readouterr().out
    labels[8:] = 1  # another content does not
    save(tmp_path / "moved.nii", labels, affine)
    assert main.main(arguments(tmp_path / "t/pairs.csv", tmp_path, *words)) == 2
    assert "the pattern: not the same" in capsys.readouterr().err


@pytest.mark.parametrize("batch, accumulate", [(1, 1), (2, 1), (3, 2), (5, 4)])
def test_b8_a_pair_counts_the_same_whatever_is_drawn_with_it(batch, accumulate):
    jobs = [(target, place) for target in BOTH for place in range(batch)]
    counts = dict.fromkeys(jobs, 0)
    for target, places, _ in split_jobs(jobs, accumulate):
        for place in places:
            counts[target, place] += 1
    assert set(counts.values()) == {1}

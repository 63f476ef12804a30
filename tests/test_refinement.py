"""Stage 2's own parts: coarse volumes on disk, how they vary, VGG16's weights, and what a run without them says."""

from __future__ import annotations

import csv
import hashlib
import signal
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import vgg16

import main
from data.coarse import CoarseVolumes
from models.perceptual import LAYERS, PerceptualLoss, WeightsError, cached_weights, load_perceptual_loss
from opt import PRESETS, opt
from refinement import Refinement
from tests.conftest import SIZES, arguments
from utils.arguments import parse_arguments
from utils.files import FileError


class Sampler:
    """Counts what it is asked for; its samples tell pair, number and target. Breaks after `limit` calls."""

    def __init__(self, limit: int = 99):
        self.calls, self.limit = [], limit

    def __call__(self, targets, batch):
        if len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append((targets, batch))
        return {name: np.stack([np.full(SIZES[name], i + 0.1 * k, np.float32) for i, k in batch]) for name in targets}


def coarse_volumes(folder: Path, count: int = 2) -> CoarseVolumes:
    return CoarseVolumes(folder, ["sub-01", "sub-02", "sub-03"], SIZES, count)


def test_coarse_volumes_are_sampled_once_and_continued(tmp_path):
    broken = Sampler(limit=2)
    with pytest.raises(KeyboardInterrupt):
        coarse_volumes(tmp_path).prepare(broken, False, 2, iter)
    damaged = tmp_path / "sub-01_fmri_0.npy"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    rest, volumes = Sampler(), coarse_volumes(tmp_path)
    volumes.prepare(rest, False, 2, iter)
    assert broken.calls == [(("fmri",), [(0, 0), (1, 0)]), (("fmri",), [(2, 0)])]
    assert rest.calls[:2] == [(("fmri",), [(0, 0), (1, 0)]), (("fmri",), [(0, 1), (1, 1)])] and len(rest.calls) == 7
    found = volumes.volumes("dmri", [2, 0])
    assert found.shape == (2, 1, *SIZES["dmri"])
    torch.testing.assert_close(found[:, 0, 0, 0, 0], torch.tensor([2.05, 0.05]))
    torch.testing.assert_close(volumes.volumes("fmri", [1], [[1]]).mean(), torch.tensor(1.1))
    nothing = Sampler(limit=0)
    coarse_volumes(tmp_path).prepare(nothing, False, 2, iter)
    more = Sampler()
    coarse_volumes(tmp_path, 3).prepare(more, False, 9, iter)  # one more of each: the others are kept
    assert more.calls == [((name,), [(0, 2), (1, 2), (2, 2)]) for name in SIZES]


@pytest.mark.parametrize("content", ["nan", "shape", "npz", "text", "object"])
def test_coarse_volumes_that_are_none_are_sampled_again(tmp_path, content):
    coarse_volumes(tmp_path, 1).prepare(Sampler(), False, 2, iter)
    path = tmp_path / "sub-02_dmri_0.npy"
    wrong = {"nan": np.full(SIZES["dmri"], np.nan, np.float32), "shape": np.zeros((2, 3, 4), np.float32),
             "object": np.array([{}] * 3)}
    if content in wrong:
        np.save(path, wrong[content])
    elif content == "npz":
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        path.write_text("no array")
    sampler, volumes = Sampler(), coarse_volumes(tmp_path, 1)
    volumes.prepare(sampler, False, 2, iter)
    assert sampler.calls == [(("dmri",), [(0, 0), (1, 0)])]
    assert volumes.volumes("dmri", [1]).mean() == 1


def test_a_folder_in_the_place_of_a_coarse_volume(tmp_path):
    (tmp_path / "sub-02_dmri_0.npy").mkdir()
    with pytest.raises(FileError, match="sub-02_dmri_0.npy.*opt.cache_dir"):
        coarse_volumes(tmp_path, 1).prepare(Sampler(), False, 2, iter)


def test_joint_samples_serve_both_targets(tmp_path):
    sampler = Sampler()
    coarse_volumes(tmp_path, 1).prepare(sampler, True, 8, iter)
    assert sampler.calls == [(tuple(SIZES), [(0, 0), (1, 0), (2, 0)])]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.fixture(scope="module")
def backbone(study_csv, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    assert main.main(arguments(study_csv, folder, "--max_steps", "2")) == 0
    return folder / "checkpoints/best_model.pth"


def words_for(backbone: Path, study_csv: Path, folder: Path, *more: str) -> list[str]:
    return arguments(study_csv, folder, "--refine", "--resume_path", str(backbone), "--max_steps", "2", *more)


def log_of(folder: Path) -> list[dict]:
    with open(folder / "results/refine/log.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "training"]


def test_training_sees_varied_coarse_volumes(study_csv, tmp_path):
    settings = parse_arguments(opt, PRESETS, arguments(study_csv, tmp_path, "--coarse", "none"), "test")
    study, work = main.read_study(settings), Refinement.__new__(Refinement)
    settings.coarse, settings.coarse_samples, settings.coarse_dropout = "given", 3, 0.25
    work.opt, work.study, work.means = settings, study, study.mean_volumes()
    work.samples = coarse_volumes(tmp_path / "c", 3)
    work.samples.prepare(Sampler(), False, 9, iter)
    seen, mean = [], float(work.means["dmri"].mean())
    for step in range(80):
        both = work.varied_coarse("dmri", [1, 2], step, [0, 1]).mean(dim=(1, 2, 3, 4))
        assert torch.equal(work.varied_coarse("dmri", [2], step, [1]).mean(dim=(1, 2, 3, 4)), both[1:])  # by place
        seen += [round(float(value), 3) for value in both]
    withheld = np.mean([abs(value - mean) < 1e-3 for value in seen])
    assert 0.15 < withheld < 0.35
    assert {1.0, 1.05, 1.1, 1.15, 1.2, 2.0, 2.1, 2.2} <= set(seen)  # parts of 0, 0.1, 0.2: one, two or all of them
    assert float(work.coarse("dmri", [1]).mean()) == pytest.approx(1.1)


@pytest.mark.parametrize("more", [["--coarse", "joint", "--coarse_samples", "2"], ["--coarse", "none"],
                                  ["--no-residual", "--no-warm_start", "--refine_optimiser", "adam"],
                                  ["--microstructure_weight", "0", "--structure_weight", "0"]])
def test_every_choice_of_stage_2_trains(backbone, study_csv, tmp_path, more, capsys):
    assert main.main(words_for(backbone, study_csv, tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert ("on training pairs" in said) == ("none" not in more)
    with open(tmp_path / "results/refine/metrics.csv", newline="") as file:
        volumes = {row["volume"] for row in csv.DictReader(file)}
    assert volumes == ({"refined", "mean"} if "none" in more else {"refined", "coarse", "mean"})
    assert all(np.isfinite(float(row["loss"])) for row in log_of(tmp_path))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights of VGG16's features; the classifier's 120 million are not needed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16(weights=None).features[:LAYERS[-1] + 1].state_dict()
    return {f"features.{name}": torch.randn(each.shape) * 0.05 for name, each in shapes.items()}


def no_connection(*_: object) -> None:
    raise AssertionError("a connection was tried")


def test_T8_without_weights_of_vgg16_stage_2_says_so_once(backbone, study_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_connection)
    assert main.main(words_for(backbone, study_csv, tmp_path)) == 0
    said = capsys.readouterr().out
    assert said.count("VGG16") == 1 and str(tmp_path / "hub/hub/checkpoints/vgg16-397923af.pth") in said
    assert all(float(row["perceptual_loss"]) == 0 for row in log_of(tmp_path))
    assert main.main(words_for(backbone, study_csv, tmp_path, "--perceptual_weight", "0", "--checkpoint_dir",
                               str(tmp_path / "c"), "--result_dir", str(tmp_path / "r"))) == 0
    assert "VGG16" not in capsys.readouterr().out


def test_with_weights_of_vgg16_their_share_is_logged(backbone, study_csv, tmp_path, weights, capsys):
    torch.save(weights, tmp_path / "vgg.pth")
    words = words_for(backbone, study_csv, tmp_path, "--vgg_weights", str(tmp_path / "vgg.pth"))
    assert main.main(words) == 0
    assert "VGG16" not in capsys.readouterr().out
    for row in log_of(tmp_path):
        share = 0.01 * float(row["perceptual_loss"]) / float(row["loss"])
        assert float(row["perceptual_share"]) == pytest.approx(share, rel=1e-3) and share > 0
        assert float(row["loss"]) == pytest.approx(
            float(row["tissue_loss"]) + 0.01 * float(row["perceptual_loss"])
            + 0.1 * (float(row["microstructure_loss"]) + float(row["structure_loss"])), rel=1e-4)
    weights["features.0.bias"] = weights["features.0.bias"] + 1  # another loss is another run
    torch.save(weights, tmp_path / "vgg.pth")
    assert main.main([*words, "--max_steps", "3"]) == 2
    assert "opt.perceptual_weight = 0 to go without): not the same" in capsys.readouterr().err


def test_the_perceptual_loss_knows_equal_from_different(weights):
    loss = PerceptualLoss(weights)
    assert not any(each.requires_grad for each in loss.parameters())
    truth = torch.rand(2, 1, 12, 13, 11)
    refined = (truth + 0.1 * torch.randn(truth.shape)).requires_grad_()
    near = loss(refined, truth)
    near.backward()
    assert loss(truth, truth) == 0 < near < loss(-truth, truth)
    assert refined.grad.abs().sum() > 0
    whole = {**weights, "classifier.0.weight": torch.zeros(1)}  # a whole VGG16 does as well
    assert torch.equal(PerceptualLoss(whole)(refined, truth), near)


def test_weights_that_are_none_are_refused(backbone, study_csv, tmp_path, weights, monkeypatch, capsys):
    broken = {**weights, "features.0.bias": torch.full((64,), float("nan"))}
    for number, content in enumerate((broken, {"features.0.weight": torch.zeros(3)}, [1, 2], torch.zeros(3))):
        torch.save(content, tmp_path / f"{number}.pth")
    (tmp_path / "4.pth").write_bytes(b"<html>")
    (tmp_path / "5.pth").write_bytes(b"")
    for name in ("0.pth", "1.pth", "2.pth", "3.pth", "4.pth", "5.pth", "none.pth"):
        words = words_for(backbone, study_csv, tmp_path, "--vgg_weights", str(tmp_path / name))
        assert main.main(words) == 2, name
        assert name in capsys.readouterr().err
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    cached_weights().parent.mkdir(parents=True)
    torch.save(weights, cached_weights())
    with pytest.raises(WeightsError, match="its hash is not that in its name"):
        load_perceptual_loss("", False)
    content = cached_weights().read_bytes()
    name = f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr("models.perceptual.URL", f"https://example.org/{name}")
    cached_weights().write_bytes(content)
    assert isinstance(load_perceptual_loss("", False), PerceptualLoss)


def test_T8_weights_are_fetched_only_when_asked_to(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def unreachable(url, path, hash_prefix):
        asked.append((url.rsplit("/", 1)[1], Path(path), hash_prefix))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    assert load_perceptual_loss("", False) is None and not asked
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_HOME", "/" + 300 * "x")  # a place that cannot be looked into
        assert load_perceptual_loss("", False) is None
    with pytest.raises(WeightsError, match="no network.*opt.vgg_download = False"):
        load_perceptual_loss("", True)
    assert asked == [("vgg16-397923af.pth", cached_weights(), "397923af")]


def test_parts_of_a_perceptual_loss_add_up(weights):
    loss = PerceptualLoss(weights)
    truth, refined = torch.rand(3, 1, 12, 13, 11), torch.rand(3, 1, 12, 13, 11)
    parts = loss(refined[:1], truth[:1]) / 3 + loss(refined[1:], truth[1:]) * 2 / 3
    assert parts.item() == pytest.approx(loss(refined, truth).item(), rel=1e-5)


def test_a_stop_while_coarse_volumes_are_sampled(backbone, study_csv, tmp_path, monkeypatch, capsys):
    words, seen = words_for(backbone, study_csv, tmp_path), []
    whole = CoarseVolumes.prepare

    def prepare(self, sample, together, at_once, progress):
        def asked_to_stop(targets, batch):
            seen.append(batch)
            if len(seen) == 2:  # the first is made and kept
                signal.raise_signal(signal.SIGTERM)
            return sample(targets, batch)
        whole(self, asked_to_stop, together, 1, progress)

    with monkeypatch.context() as patch:
        patch.setattr(CoarseVolumes, "prepare", prepare)
        assert main.main(words) == 3
    assert "Stopped before training" in capsys.readouterr().out
    assert len(seen) == 2 and len(list((tmp_path / "cache/coarse").rglob("*.npy"))) == 1
    assert main.main(words) == 0

"""Stage 2 run for real on tiny pairs: what it leaves, what its settings do, what it refuses."""

import copy
import socket

import numpy as np
import pytest
import torch

import main
from data.study import read_study
from models.diffusion import Purpose
from opt import PRESETS, opt
from tests.conftest import SIZES, arguments, read_csv, refine_arguments, weights
from tests.test_train import refusal
from train_refine import Stage2
from training.back_translation import texture, with_texture
from training.checkpoint import STAGE_1, read_checkpoint
from utils.arguments import parse_arguments
from utils.metrics import METRICS


def words_of(trained, study_csv, folder, *more: str) -> list[str]:
    """Two steps on the backbone in `trained`, with its cache, in another folder."""
    return refine_arguments(study_csv, trained, "--checkpoint_dir", str(folder / "checkpoints"), "--result_dir",
                            str(folder / "results"), "--max_steps", "2", *more)


def training_rows(folder) -> list[dict]:
    return [row for row in read_csv(folder / "results/refine/log.csv") if row["kind"] == "training"]


def test_stage_2_reports_on_the_test_subjects_and_saves_its_backbone(trained):
    rows = read_csv(trained / "results/refine/metrics.csv")
    split = {row["subject"]: row["role"] for row in read_csv(trained / "results/refine/split.csv")}
    assert {split[row["subject"]] for row in rows} == {"test"}
    assert {row["direction"] for row in rows} == {"fmri->dmri", "dmri->fmri"}
    assert {row["volume"] for row in rows} == {"refined", "coarse", "mean"}  # the grids differ: no copy of the source
    assert {row["region"] for row in rows} == {"volume", "brain", "pattern"}
    assert all(0 < float(row["psnr"]) < 60 for row in rows)  # no window of SSIM fits into the tiny pattern
    assert all(-1 <= float(row["ssim"]) <= 1 for row in rows if row["region"] != "pattern")
    assert all(np.isfinite(float(row[name])) for row in rows if row["region"] == "volume" for name in METRICS)
    said = (trained / "stage2.txt").read_text()
    assert "95 % interval" in said
    assert len(list((trained / "results/refine/samples").rglob("*_refined.nii.gz"))) == 2
    saved, backbone = (weights(trained / "checkpoints" / name) for name in ("best_refine.pth", "best_model.pth"))
    assert saved["stage"] == "stage 2" and saved["backbone"]["stage"] == "stage 1"
    assert not saved["backbone"].keys() & {"model", "optimiser"}
    torch.testing.assert_close(saved["backbone"]["ema"]["model"], backbone["ema"]["model"], rtol=0, atol=0)


def test_stage_2_starts_as_the_expected_volume_of_stage_1(trained, study_csv):
    settings = parse_arguments(opt, PRESETS, refine_arguments(study_csv, trained), "test")
    study, state = read_study(settings), read_checkpoint(trained / "checkpoints/best_model.pth", (STAGE_1,))
    stage = Stage2(settings, study, torch.device("cpu"), state)
    for source, target in stage.prior.network.directions:
        expected = stage.prior.expected(target, study.volumes([0])[source])
        assert torch.equal(stage.refined(stage.network, target, 0), expected) and expected.std() > 0.05
        assert torch.equal(stage.coarse.volumes(target, [0]), expected)


def test_a_missing_source_is_synthesised_from_the_target_which_stays_real(incomplete_csv, tmp_path):
    assert main.main(arguments(incomplete_csv, tmp_path, "--max_steps", "2")) == 0
    settings = parse_arguments(opt, PRESETS, refine_arguments(incomplete_csv, tmp_path), "test")
    study, state = read_study(settings), read_checkpoint(tmp_path / "checkpoints/best_model.pth", (STAGE_1,))
    stage, seen = Stage2(settings, study, torch.device("cpu"), state), []
    stage.ema_model = copy.deepcopy(stage.network).eval()
    with torch.no_grad():  # it differs from the network, as after a few steps
        for weight in stage.ema_model.parameters():
            weight.mul_(1.1)
    assert stage.complete == study.roles["train"] and stage.incomplete == [6, 7, 8]
    places = {target: places for target, places, _ in stage.micro_batches([0, 6, 7])}
    assert places == {"fmri": [0, 2], "dmri": [0, 1]}  # sub-07 has a dmri only, sub-08 an fmri

    def network(target: str, source: torch.Tensor, coarse: None) -> torch.Tensor:
        seen.append(source)
        return stage.network(target, source, coarse)

    stage.begin()
    data = stage.load("dmri", [0, 1], [0, 6, 7], 0)
    loss, _ = stage.loss(network, "dmri", data)
    made = stage.ema_model.translate("fmri", study.volumes([6])["dmri"])
    noise = texture(stage.spectra["fmri"], SIZES["fmri"], (settings.seed, Purpose.TEXTURE, 0, 1))
    assert torch.equal(seen[0], torch.cat([study.volumes([0])["fmri"], with_texture(made, noise)]))
    assert made.std() > 0.001 and 0.01 < noise.std() < 1
    stage.complete, settings.batch_size = [*range(8)], 4
    assert stage.steps_per_epoch == 3  # eight pairs would be two steps
    assert not seen[0].requires_grad and not torch.equal(made, stage.network.translate("fmri", data[1][1:]))
    assert torch.equal(data[1], study.volumes([0, 6])["dmri"]) and loss.isfinite() and loss.requires_grad


def test_a_prior_without_expected_volume_is_refused_for_it(trained, study_csv, tmp_path, capsys):
    state = weights(trained / "checkpoints/best_model.pth")
    state["options"]["prediction"] = "epsilon"
    torch.save(state, tmp_path / "epsilon.pth")
    words = words_of(trained, study_csv, tmp_path, "--resume_path", str(tmp_path / "epsilon.pth"))
    message = refusal(capsys, words)
    assert 'opt.coarse = "expected"' in message and "'epsilon'" in message and '"joint"' in message
    assert main.main([*words, "--coarse", "joint"]) == 0


@pytest.mark.parametrize("name, epochs", [("best_refine.pth", "4"), ("last_refine.pth", "3")])
def test_stage_2_resumes_from_its_own_checkpoint_alone(trained, study_csv, tmp_path, name, epochs):
    """Without the backbone's file, in new folders; also where it is finished."""
    words = arguments(study_csv, tmp_path, "--refine", "--resume_path", str(trained / "checkpoints" / name),
                      "--refine_epochs", epochs)
    assert main.main(words) == 0
    assert (tmp_path / "results/refine/metrics.csv").exists()
    assert weights(tmp_path / "checkpoints/last_refine.pth")["step"] == 2 * int(epochs)


@pytest.mark.parametrize("more", [["--coarse", "joint"], ["--coarse", "none"], ["--refine_optimiser", "adam"],
                                  ["--microstructure_weight=0", "--structure_weight=0", "--perceptual_weight=0"]])
def test_every_choice_of_stage_2_trains(trained, study_csv, tmp_path, more, capsys):
    assert main.main(words_of(trained, study_csv, tmp_path, *more)) == 0
    assert "VGG16" not in capsys.readouterr().out or "--perceptual_weight=0" not in more
    volumes = {row["volume"] for row in read_csv(tmp_path / "results/refine/metrics.csv")}
    assert volumes == ({"refined", "mean"} if "none" in more else {"refined", "coarse", "mean"})
    assert all(np.isfinite(float(row["loss"])) for row in training_rows(tmp_path))


def no_connection(*_: object) -> None:
    raise AssertionError("a connection was tried")


def test_without_weights_of_vgg16_stage_2_trains_and_says_so_once(trained, study_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_connection)
    assert main.main(words_of(trained, study_csv, tmp_path)) == 0
    said = capsys.readouterr().out
    assert said.count("VGG16") == 1 and str(tmp_path / "hub/hub/checkpoints/vgg16-397923af.pth") in said
    assert not any(row["perceptual_loss"] for row in training_rows(tmp_path))


def test_with_weights_of_vgg16_the_losses_add_up(trained, study_csv, tmp_path, vgg_weights, capsys):
    torch.save(vgg_weights, tmp_path / "vgg.pth")
    words = words_of(trained, study_csv, tmp_path, "--vgg_weights", str(tmp_path / "vgg.pth"))
    assert main.main(words) == 0
    assert "VGG16" not in capsys.readouterr().out
    for row in training_rows(tmp_path):
        factors = {"tissue": 1, "structure": 0.1, "microstructure": 0.1, "perceptual": 0.01}
        total = sum(factor * float(row[f"{term}_loss"]) for term, factor in factors.items())
        assert float(row["perceptual_loss"]) > 0 and float(row["loss"]) == pytest.approx(total, rel=1e-4)
    torch.save({**vgg_weights, "features.0.bias": vgg_weights["features.0.bias"] + 1}, tmp_path / "vgg.pth")
    assert "opt.perceptual_weight = 0" in refusal(capsys, words)  # another loss is another run


def test_refinement_needs_a_backbone(study_csv, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("main.read_study", no_connection)  # before any data is read
    assert "resume_path" in refusal(capsys, arguments(study_csv, tmp_path, "--refine"))
    message = refusal(capsys, refine_arguments(study_csv, tmp_path))
    assert "best_model.pth" in message and "no such checkpoint" in message
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints/last_refine.pth").symlink_to(trained / "checkpoints/last_refine.pth")
    message = refusal(capsys, refine_arguments(study_csv, tmp_path))
    assert "last_refine.pth, which contains its backbone" in message


def test_a_backbone_of_another_split_or_network_is_refused(trained, study_csv, tmp_path, capsys):
    message = refusal(capsys, words_of(trained, study_csv, tmp_path, "--fold", "1"))
    assert "fold: 0 there, 1 now" in message and "split" in message
    assert "base_channels: 8 there, 16 now" in refusal(capsys, words_of(trained, study_csv, tmp_path,
                                                                       "--base_channels", "16"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_stages_train_validate_and_draw_in_16_bits(study_csv, tmp_path, precision):
    more = ("--precision", precision, "--max_steps", "2")
    assert main.main(arguments(study_csv, tmp_path, *more)) == 0
    assert main.main(refine_arguments(study_csv, tmp_path, *more)) == 0
    for stage in ("stage1", "refine"):
        rows = read_csv(tmp_path / "results" / stage / "log.csv")
        assert [row["kind"] for row in rows][-2:] == ["validation", "samples"] and float(rows[-1]["psnr"]) > 0

"""The program run for real on tiny pairs: train, continue, refine, and refuse."""

from __future__ import annotations

import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import main
from tests.conftest import SIZES, Malicious, arguments, read_csv, refine_arguments, run_program, weights, write_pairs


def test_stage_1_leaves_what_the_readme_promises(trained):
    said = (trained / "stage1.txt").read_text()
    for word in ("device", "6 pairs", "fmri 12x13x11, dmri 16x17x14", "million parameters", "base_channels = 8"):
        assert word in said
    for name in ("best_model.pth", "last_model.pth"):
        assert weights(trained / "checkpoints" / name)["stage"] == "stage 1"
    picture = Image.open(next((trained / "results/stage1").glob("step_*.png")))
    assert np.asarray(picture).std() > 10
    rows = read_csv(trained / "results/stage1/log.csv")
    assert [row["kind"] for row in rows].count("training") == weights(trained / "checkpoints/last_model.pth")["step"]
    assert all(np.isfinite(float(row["x0_error"])) for row in rows if row["kind"] == "validation")


def test_sampled_volumes_have_the_geometry_of_their_modality(trained, study_csv):
    sampled = sorted((trained / "results/stage1/samples").rglob("*.nii.gz"))
    assert len(sampled) == 4  # one subject: two modalities, translated and joint
    for path in sampled:
        subject, modality = path.name.split("_")[:2]
        reference = nib.load(study_csv.parent / f"{subject}_space-MNI_{modality}.nii.gz")
        image = nib.load(path)
        assert image.shape == SIZES[modality]
        np.testing.assert_allclose(image.affine, reference.affine, atol=1e-5)
        assert np.isfinite(image.get_fdata()).all()


def test_stage_2_reports_on_test_subjects(trained):
    rows = read_csv(trained / "results/refine/metrics.csv")
    split = {row["subject"]: row["role"] for row in read_csv(trained / "results/refine/split.csv")}
    assert {split[row["subject"]] for row in rows} == {"test"}
    assert {row["direction"] for row in rows} == {"fmri->dmri", "dmri->fmri"}
    assert {row["volume"] for row in rows} == {"refined", "coarse", "mean"}  # the grids differ: no copy of the source
    assert {row["region"] for row in rows} == {"volume", "brain", "pattern"}
    assert all(0 < float(row["psnr"]) < 60 and -1 <= float(row["ssim"]) <= 1 for row in rows)
    assert "95 % interval" in (trained / "stage2.txt").read_text()
    saved = weights(trained / "checkpoints/best_refine.pth")
    assert saved["stage"] == "stage 2" and saved["backbone"]["stage"] == "stage 1"


def test_a_finished_run_says_so(trained, study_csv):
    for words in (arguments(study_csv, trained), refine_arguments(study_csv, trained)):
        again = run_program(*words)
        assert again.returncode == 0 and "is finished" in again.stdout


def test_R9_another_run_is_refused_and_left_alone(trained, study_csv):
    before = (trained / "checkpoints/last_model.pth").read_bytes()
    refused = run_program(*arguments(study_csv, trained, "--learning_rate", "0.5"))
    assert refused.returncode == 2
    assert "learning_rate" in refused.stderr and "checkpoint_dir" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (trained / "checkpoints/last_model.pth").read_bytes() == before


def test_another_result_folder_is_left_alone(trained, study_csv, tmp_path):
    words = arguments(study_csv, trained, "--checkpoint_dir", str(tmp_path / "elsewhere"))
    refused = run_program(*words)
    assert refused.returncode == 2 and "result_dir" in refused.stderr


def test_wrong_image_size_is_one_message(study_csv, tmp_path):
    refused = run_program(*arguments(study_csv, tmp_path, "--image_size", "fmri=12x13x12", "dmri=16x17x14"))
    assert refused.returncode == 2
    for word in ("sub-01_space-MNI_fmri.nii.gz", "12x13x11", "12x13x12", "opt.image_size",
                 "--image_size fmri=12x13x11"):
        assert word in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


def test_resampling_takes_any_size(study_csv, tmp_path, capsys):
    words = arguments(study_csv, tmp_path, "--image_size", "fmri=11x11x12", "dmri=14x14x14", "--resize", "resample",
                      "--max_steps", "2")
    assert main.main(words) == 0
    for path in (tmp_path / "results/stage1/samples").rglob("*_joint.nii.gz"):
        assert nib.load(path).shape == SIZES[path.name.split("_")[1]]  # back on the native grid


def test_D9_the_program_gives_each_frame_its_own_back(study_csv, tmp_path):
    """The same study stored as LAS, LPS and RAS: the same synthesis, and each output lies on its source."""
    made = {}
    for codes in ("RAS", "LAS", "LPS"):
        table = write_pairs(tmp_path / codes / "study", codes=codes)
        words = arguments(table, tmp_path / codes, "--augment", "flip", "affine", "intensity", "--max_steps", "4")
        assert main.main(words) == 0
        for path in sorted((tmp_path / codes / "results/stage1/samples").rglob("*.nii.gz")):
            subject, modality, kind = path.name.removesuffix(".nii.gz").split("_")
            source = nib.load(table.parent / f"{subject}_space-MNI_{modality}.nii.gz")
            image = nib.load(path)
            assert nib.aff2axcodes(image.affine) == tuple(codes) and image.shape == source.shape
            np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
            made.setdefault((subject, modality, kind), []).append(nib.as_closest_canonical(image))
    assert len(made) == 4
    for images in made.values():
        for other in images[1:]:
            np.testing.assert_allclose(other.affine, images[0].affine, atol=1e-4)
            np.testing.assert_allclose(other.get_fdata(), images[0].get_fdata(), atol=1e-2)  # of about 600


def test_augmentation_changes_both_stages(trained, study_csv, tmp_path):
    for words, log in ((arguments(study_csv, tmp_path), "stage1"), (refine_arguments(study_csv, trained), "refine")):
        folders = ["--checkpoint_dir", str(tmp_path / log), "--result_dir", str(tmp_path / "results")]
        assert main.main([*words, *folders, "--augment", "flip", "affine", "--max_steps", "2"]) == 0
        losses = [[row["loss"] for row in read_csv(folder / log / "log.csv")][:2]
                  for folder in (tmp_path / "results", trained / "results")]
        assert losses[0] != losses[1] and all(np.isfinite(float(loss)) for loss in losses[0])


def test_the_pattern_mask_is_drawn_once(trained, study_csv, tmp_path, capsys):
    picture = trained / "results/stage1/pattern_mask.png"
    pixels = np.asarray(Image.open(picture)).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1]) > 60).sum() > 200  # red
    native = write_pairs(tmp_path / "native", name="{}_{}.nii.gz")
    assert main.main(arguments(native, tmp_path, "--max_steps", "1")) == 0
    assert "6 of 6 pairs are not known to be in MNI space" in capsys.readouterr().out
    assert not (tmp_path / "results/stage1/pattern_mask.png").exists()
    labels = str(native.parent / "sub-01_fmri.nii.gz")  # any image over the volumes; all above 0 counts
    words = arguments(native, tmp_path, "--max_steps", "1", "--pattern_file", labels)
    folders = ["--checkpoint_dir", str(tmp_path / "c"), "--result_dir", str(tmp_path / "r")]
    assert main.main([*words, *folders]) == 0 and "MNI" not in capsys.readouterr().out
    drawn = (tmp_path / "r/stage1/pattern_mask.png").stat().st_mtime_ns
    assert main.main([*words, *folders, "--max_steps", "2"]) == 0
    assert (tmp_path / "r/stage1/pattern_mask.png").stat().st_mtime_ns == drawn


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_changes_nothing_but_the_memory(trained, study_csv, tmp_path, stage):
    words = arguments(study_csv, tmp_path) if stage == 1 else refine_arguments(study_csv, trained)
    log, losses = "stage1/log.csv" if stage == 1 else "refine/log.csv", []
    for count in ("1", "2"):
        folders = ["--checkpoint_dir", str(tmp_path / count), "--result_dir", str(tmp_path / f"r{count}")]
        more = ["--augment", "flip", "affine", "--accumulate", count, "--max_steps", "3"]
        assert main.main([*words, *folders, *more]) == 0
        losses.append([float(row["loss"]) for row in read_csv(tmp_path / f"r{count}" / log) if row["loss"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_every_choice_of_stage_1_trains(study_csv, tmp_path):
    for number, more in enumerate([["--loss", "l1", "--sampler", "ddim", "--eta", "0.5"],
                                   ["--timestep_coupling", "shared", "--prediction", "epsilon"],
                                   ["--fusion", "late", "--pattern_weight", "0"], ["--optimiser", "muon"]]):
        words = arguments(study_csv, tmp_path / str(number), "--max_steps", "2", *more)
        assert main.main(words) == 0


def refusal(capsys, words: list[str]) -> str:
    assert main.main(words) == 2
    return capsys.readouterr().err


def test_R10_refinement_needs_a_backbone(study_csv, tmp_path, capsys):
    assert "resume_path" in refusal(capsys, arguments(study_csv, tmp_path, "--refine"))
    message = refusal(capsys, arguments(study_csv, tmp_path, "--refine", "--resume_path", str(tmp_path / "none.pth")))
    assert "none.pth" in message and "no such checkpoint" in message


def test_refinement_refuses_a_backbone_of_another_split(trained, study_csv, tmp_path, capsys):
    words = refine_arguments(study_csv, trained, "--fold", "1", "--checkpoint_dir", str(tmp_path / "c"))
    message = refusal(capsys, words)
    assert "fold: 0 there, 1 now" in message and "split" in message


def test_R9_stage_1_refuses_a_stage_2_checkpoint(trained, study_csv, tmp_path, capsys):
    words = arguments(study_csv, tmp_path, "--resume_path", str(trained / "checkpoints/best_refine.pth"))
    assert "stage 2" in refusal(capsys, words)


@pytest.mark.parametrize("name, epochs", [("best_refine.pth", "4"), ("last_refine.pth", "3")])
def test_stage_2_continues_from_its_own_checkpoint_alone(trained, study_csv, tmp_path, capsys, name, epochs):
    """It holds all that is needed: the backbone's file is not read. Also where it is finished, in a new folder."""
    words = arguments(study_csv, tmp_path, "--refine", "--resume_path", str(trained / "checkpoints" / name),
                      "--refine_epochs", epochs)
    assert main.main(words) == 0
    assert (tmp_path / "results/refine/metrics.csv").exists()
    assert (tmp_path / "checkpoints/best_refine.pth").exists()


def test_R8_damaged_or_malicious_checkpoints_run_no_code(trained, study_csv, tmp_path, capsys):
    for name, content in (("empty.pth", b""), ("page.pth", b"<html></html>"),
                          ("pickle.pth", pickle.dumps(Malicious(tmp_path / "owned")))):
        (tmp_path / name).write_bytes(content)
    torch.save({"format": 1, "stage": Malicious(tmp_path / "owned")}, tmp_path / "torch.pth")
    whole = (trained / "checkpoints/best_model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-1000])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name in ("empty", "page", "pickle", "torch", "cut", "flipped"):
        message = refusal(capsys, refine_arguments(study_csv, tmp_path, "--resume_path", str(tmp_path / f"{name}.pth")))
        assert f"{name}.pth" in message, name
    assert not (tmp_path / "owned").exists()


def test_the_newest_checkpoint_goes_on(study_csv, tmp_path, capsys):
    """An older file in resume_path does not take the run back."""
    words = arguments(study_csv, tmp_path, "--dropout", "0.2")
    assert main.main([*words, "--max_steps", "2"]) == 0
    (tmp_path / "older.pth").write_bytes((tmp_path / "checkpoints/last_model.pth").read_bytes())
    assert main.main([*words, "--max_steps", "4"]) == 0
    assert main.main([*words, "--max_steps", "5", "--resume_path", str(tmp_path / "older.pth")]) == 0
    assert "last_model.pth after step 4" in capsys.readouterr().out


def test_another_runs_best_is_left_alone(trained, study_csv, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    best = tmp_path / "checkpoints/best_model.pth"
    best.write_bytes((trained / "checkpoints/best_model.pth").read_bytes())
    before = best.read_bytes()
    assert "seed" in refusal(capsys, arguments(study_csv, tmp_path, "--seed", "5"))
    assert best.read_bytes() == before


def test_networks_that_the_table_does_not_have(study_csv, tmp_path, capsys):
    assert "opt.pattern_networks" in refusal(capsys, arguments(study_csv, tmp_path, "--pattern_networks", "visual"))


def test_devices_and_processes_that_are_not_there(study_csv, tmp_path, capsys, monkeypatch):
    message = refusal(capsys, arguments(study_csv, tmp_path, "--device", "cuda:99"))
    assert "opt.device = 'cuda:99'" in message and "choose auto or cpu" in message
    assert "is no device" in refusal(capsys, arguments(study_csv, tmp_path, "--device", "cpu:x"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not by torchrun" in refusal(capsys, arguments(study_csv, tmp_path))


def test_R9_a_warm_start_needs_the_same_network(trained, study_csv, tmp_path, capsys):
    words = refine_arguments(study_csv, trained, "--base_channels", "16", "--checkpoint_dir", str(tmp_path))
    message = refusal(capsys, words)
    assert "opt.warm_start" in message and "channels = 8 there, 16 now" in message
    assert main.main([*words, "--no-warm_start", "--result_dir", str(tmp_path)]) == 0


def test_R6_output_folder_that_cannot_be_written(study_csv, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refusal(capsys, arguments(study_csv, tmp_path, "--checkpoint_dir", str(tmp_path / "file" / "below")))
    assert "checkpoint_dir" in message


def test_T1_a_loss_that_is_not_finite_stops_the_run(study_csv, tmp_path, capsys, monkeypatch):
    import train

    monkeypatch.setattr(train, "pattern_aware_loss", lambda prediction, *_, **__: prediction.sum() * float("nan"))
    message = refusal(capsys, arguments(study_csv, tmp_path, "--epochs", "9"))
    assert "not finite" in message and "sub-0" in message
    saved = weights(tmp_path / "checkpoints/last_model.pth")["model"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_one_subject_and_one_fold(tmp_path, capsys):
    """The published configuration in small: late fusion, shared timesteps, epsilon; native space, one fold."""
    table = write_pairs(tmp_path / "one", subjects=1, name="{}_{}.nii.gz")
    assert main.main(arguments(table, tmp_path, "--preset", "paper", "--folds", "1", "--max_steps", "2")) == 0
    said = capsys.readouterr().out
    assert "scores say nothing about new subjects" in said and "MNI space" in said
    assert main.main(refine_arguments(table, tmp_path, "--preset", "paper", "--folds", "1", "--max_steps", "2")) == 0
    assert "test pairs" in capsys.readouterr().out


GOLDEN = [0.885358, 0.352946, 0.367551, 0.225074]


def test_T7_same_seed_same_losses_and_a_golden_value(study_csv, tmp_path):
    """And a loss that must not drift unnoticed: float32 on the CPU, four steps of the tiny configuration."""
    logs = []
    for name in ("a", "b"):
        assert main.main(arguments(study_csv, tmp_path / name, "--max_steps", "4")) == 0
        logs.append([row["loss"] for row in read_csv(tmp_path / name / "results/stage1/log.csv") if row["loss"]])
    assert logs[0] == logs[1]
    np.testing.assert_allclose([float(loss) for loss in logs[0]], GOLDEN, rtol=2e-3)


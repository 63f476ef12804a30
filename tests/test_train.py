"""Stage 1 run for real on tiny pairs: what it leaves, what its settings do, what it refuses."""

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import main
from data.study import read_study
from opt import PRESETS, opt
from tests.conftest import arguments, read_csv, refine_arguments, write_pairs
from train import Stage1
from utils.arguments import parse_arguments


def refusal(capsys, words: list[str]) -> str:
    assert main.main(words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def losses(folder, stage: str = "stage1") -> list[float]:
    return [float(row["loss"]) for row in read_csv(folder / "results" / stage / "log.csv") if row["loss"]]


def test_stage_1_leaves_what_the_readme_promises(trained):
    said = (trained / "stage1.txt").read_text()
    for word in ("device", "6 pairs", "fmri 12x13x11, dmri 16x17x14", "base_channels = 8"):
        assert word in said
    for picture in ("step_000006.png", "denoising_000006.png", "pattern_mask.png"):
        assert np.asarray(Image.open(trained / "results/stage1" / picture)).std() > 10
    rows = read_csv(trained / "results/stage1/log.csv")
    assert [row["kind"] for row in rows].count("training") == 6
    assert all(np.isfinite(float(row["x0_error"])) for row in rows if row["kind"] == "validation")


def test_outputs_lie_on_their_source_whatever_its_orientation(tmp_path):
    """The same study stored as LAS, LPS and RAS, trained on another grid: the same outputs, each on its own source."""
    images = {}
    for codes in ("RAS", "LAS", "LPS"):
        table = write_pairs(tmp_path / codes / "study", codes=codes)
        assert main.main(arguments(
            table, tmp_path / codes, "--augment", "flip", "affine", "intensity", "--max_steps", "2", "--image_size",
            "fmri=11x11x12", "dmri=14x14x14", "--resize", "resample")) == 0
        for path in sorted((tmp_path / codes / "results/stage1/samples").rglob("*.nii.gz")):
            subject, modality, kind = path.name.removesuffix(".nii.gz").split("_")
            source, image = nib.load(table.parent / f"{subject}_space-MNI_{modality}.nii.gz"), nib.load(path)
            assert nib.aff2axcodes(image.affine) == tuple(codes) and image.shape == source.shape
            np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
            images.setdefault((subject, modality, kind), []).append(nib.as_closest_canonical(image))
    assert len(images) == 4
    for first, *others in images.values():
        for other in others:
            np.testing.assert_allclose(other.affine, first.affine, atol=1e-4)
            np.testing.assert_allclose(other.get_fdata(), first.get_fdata(), atol=1e-2)  # of about 600


def test_the_pattern_mask_is_drawn_once_and_only_where_there_is_one(trained, tmp_path, capsys):
    pixels = np.asarray(Image.open(trained / "results/stage1/pattern_mask.png")).astype(int)
    assert ((pixels[..., 0] - pixels[..., 2]) > 60).sum() > 200  # orange
    native = write_pairs(tmp_path / "native", name="{}_{}.nii.gz")
    assert main.main(arguments(native, tmp_path, "--max_steps", "1")) == 0
    assert "6 of 6 visits are not known to be in MNI space" in capsys.readouterr().out
    assert not (tmp_path / "results/stage1/pattern_mask.png").exists()
    labels = str(native.parent / "sub-01_fmri.nii.gz")  # any image over the volumes; all above 0 counts
    words, drawn = arguments(native, tmp_path / "labels", "--pattern_file", labels), set()
    for steps in ("1", "2"):
        assert main.main([*words, "--max_steps", steps]) == 0 and "MNI" not in capsys.readouterr().out
        drawn.add((tmp_path / "labels/results/stage1/pattern_mask.png").stat().st_mtime_ns)
    assert len(drawn) == 1


@pytest.mark.parametrize("more", [
    ["--loss", "l1", "--sampler", "ddim", "--eta", "0.5"], ["--timestep_coupling", "shared", "--prediction", "epsilon"],
    ["--fusion", "late", "--pattern_weight", "0"], ["--optimiser", "muon", "--gradient_checkpointing"]])
def test_every_choice_of_stage_1_trains(study_csv, trained, tmp_path, more):
    words = arguments(study_csv, tmp_path, "--cache_dir", str(trained / "cache"), "--max_steps", "2")
    assert main.main([*words, *more]) == 0 and np.isfinite(losses(tmp_path)).all()


def test_the_published_configuration_trains_on_one_subject(tmp_path, capsys):
    """Late fusion, shared timesteps, epsilon, joint coarse volumes; in native space and one fold; both stages."""
    table = write_pairs(tmp_path / "one", subjects=1, name="{}_{}.nii.gz")
    more = ["--preset", "paper", "--folds", "1", "--max_steps", "2"]
    assert main.main(arguments(table, tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert "scores say nothing about new subjects" in said and "MNI space" in said
    assert main.main(refine_arguments(table, tmp_path, *more)) == 0
    assert "test pairs" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_losses_and_a_golden_value(trained, study_csv, tmp_path):
    """A loss that must not drift unnoticed: float32 on the CPU, the tiny configuration."""
    assert main.main(arguments(study_csv, tmp_path)) == 0
    assert losses(tmp_path) == losses(trained)
    np.testing.assert_allclose(losses(tmp_path)[:4], [1.27356, 0.7461, 1.6199, 1.5906], rtol=5e-3)


@pytest.mark.parametrize("stage", ["stage1", "refine"])
def test_augmentation_changes_the_loss_and_accumulation_only_the_memory(trained, study_csv, tmp_path, stage):
    words = (arguments if stage == "stage1" else refine_arguments)(study_csv, trained, "--augment", "flip", "affine")
    for count in ("1", "2"):
        folders = ["--checkpoint_dir", str(tmp_path / count), "--result_dir", str(tmp_path / count / "results")]
        assert main.main([*words, *folders, "--accumulate", count, "--max_steps", "3"]) == 0
    assert losses(tmp_path / "1", stage) != losses(trained, stage)[:3]
    np.testing.assert_allclose(losses(tmp_path / "2", stage), losses(tmp_path / "1", stage), rtol=1e-4)


def test_incomplete_visits_are_in_the_mean_volumes_of_stage_1_only(incomplete_csv, tmp_path, capsys):
    settings = parse_arguments(opt, PRESETS, arguments(incomplete_csv, tmp_path), "test")
    study = read_study(settings)
    stage = Stage1(settings, study, torch.device("cpu"))
    assert stage.complete == study.roles["train"] and not stage.incomplete
    assert len(study.trained_on) == len(stage.complete) + 3
    assert torch.equal(stage.network.net("fmri").mean, study.mean_volumes()["fmri"])
    assert main.main(arguments(incomplete_csv, tmp_path, "--max_steps", "1")) == 0
    said = capsys.readouterr().out
    assert "6 pairs and 3 with one scan" in said and "with one scan (3): here they are in the mean" in said


def test_a_run_resumes_its_newest_checkpoint(study_csv, trained, tmp_path, capsys):
    """An older file in resume_path does not take the run back."""
    words = arguments(study_csv, tmp_path, "--dropout", "0.2", "--cache_dir", str(trained / "cache"))
    assert main.main([*words, "--max_steps", "2"]) == 0
    (tmp_path / "older.pth").write_bytes((tmp_path / "checkpoints/last_model.pth").read_bytes())
    assert main.main([*words, "--max_steps", "4"]) == 0
    assert main.main([*words, "--max_steps", "5", "--resume_path", str(tmp_path / "older.pth")]) == 0
    assert "last_model.pth at step 4" in capsys.readouterr().out


def test_a_wrong_image_size_is_refused_with_the_right_one(study_csv, tmp_path, capsys):
    message = refusal(capsys, arguments(study_csv, tmp_path, "--image_size", "fmri=12x13x12", "dmri=16x17x14"))
    for word in ("sub-01_space-MNI_fmri.nii.gz", "12x13x12", "opt.image_size", "--image_size fmri=12x13x11"):
        assert word in message
    assert not list((tmp_path / "checkpoints").iterdir())


def test_networks_ranks_and_processes_that_cannot_be_are_refused(study_csv, tmp_path, capsys, monkeypatch):
    assert "opt.pattern_networks" in refusal(capsys, arguments(study_csv, tmp_path, "--pattern_networks", "visual"))
    with monkeypatch.context() as patch:
        patch.setattr("main.world_size", lambda: 3)
        message = refusal(capsys, arguments(study_csv, tmp_path, "--batch_size", "1"))
        assert "opt.batch_size = 1" in message and "3 ranks" in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not by torchrun" in refusal(capsys, arguments(study_csv, tmp_path))

"""A trained model in use: translate, draw pairs, continue, refuse."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import program
import sample
from tests.conftest import SIZES, read_csv, run_code, signalled


@pytest.fixture(scope="module")
def incomplete(study_csv, tmp_path_factory) -> Path:
    """The study's table, in which the first subject has no dmri and the second no fmri."""
    folder = tmp_path_factory.mktemp("incomplete")
    rows = read_csv(study_csv)
    for row in rows:
        for name in SIZES:
            row[name] = str(study_csv.parent / row[name])
    rows[0]["dmri"] = rows[1]["fmri"] = ""
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "pairs.csv"


def words(model: Path, table: Path, folder: Path, *more: str) -> list[str]:
    return ["--resume_path", str(model), "--data_root", str(table), "--sample_dir", str(folder / "out"), "--cache_dir",
            str(folder / "cache"), "--device", "cpu", "--precision", "fp32", "--coarse_samples", "1",
            "--sampling_steps", "3", *more]


def made(folder: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".nii.gz"): path for path in sorted((folder / "out").rglob("*.nii.gz"))}


@pytest.mark.parametrize("name, rows", [("best_refine.pth", "refined"), ("best_model.pth", "coarse")])
def test_scores_are_those_of_the_trainer(trained, study_csv, tmp_path, name, rows, capsys):
    """Of the same subjects: those of stage 2; those of its coarse volumes, which are the translations of stage 1."""
    assert sample.main(words(trained / "checkpoints" / name, study_csv, tmp_path)) == 0
    found = {(row["subject"], row["direction"], row["region"]): float(row["psnr"])
             for row in read_csv(tmp_path / "out/metrics.csv")}
    expected = {(row["subject"], row["direction"], row["region"]): float(row["psnr"])
                for row in read_csv(trained / "results/refine/metrics.csv")
                if row["volume"] == rows and row["region"] != "pattern"}
    assert len(found) == 6 * 2 * 2 and expected.keys() <= found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.01)


def test_a_missing_modality_is_made_in_its_place(trained, incomplete, study_csv, tmp_path, capsys):
    model = trained / "checkpoints/best_refine.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--uncertainty_samples", "3")) == 0
    files = made(tmp_path)
    assert len(files) == 2 * 10  # both of four, one of two; and a deviation for each
    for name, modality in (("sub-01_desc-synth_dwi", "dmri"), ("sub-02_desc-synth_boldref", "fmri"),
                           ("sub-03_desc-synth_dwi", "dmri")):
        image, truth = nib.load(files[name]), nib.load(study_csv.parent / f"{name[:6]}_space-MNI_{modality}.nii.gz")
        assert image.shape == truth.shape
        np.testing.assert_allclose(image.affine, truth.affine, atol=1e-4)
        assert image.header["sform_code"] == truth.header["sform_code"]
        error = np.corrcoef(image.get_fdata().ravel(), truth.get_fdata().ravel())[0, 1]
        assert error > 0.5  # in place, and in its units
    deviation = nib.load(files["sub-01_desc-std_dwi"]).get_fdata()
    assert deviation.min() >= 0 and deviation.max() > 0
    assert {row["subject"] for row in read_csv(tmp_path / "out/metrics.csv")} == {f"sub-0{n}" for n in range(3, 7)}
    assert (tmp_path / "out/synthesis.png").exists()


def test_output_in_the_space_of_the_source(trained, incomplete, study_csv, tmp_path, capsys):
    model = trained / "checkpoints/best_model.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--output_space", "source")) == 0
    image, source = nib.load(made(tmp_path)["sub-01_desc-synth_dwi"]), nib.load(
        study_csv.parent / "sub-01_space-MNI_fmri.nii.gz")
    assert image.shape == source.shape and np.allclose(image.affine, source.affine)


def test_a_table_of_one_modality_alone(trained, study_csv, tmp_path, capsys):
    table = tmp_path / "one.csv"
    table.write_text(f"subject,fmri\nnew,{study_csv.parent / 'sub-01_space-MNI_fmri.nii.gz'}\n")
    assert sample.main(words(trained / "checkpoints/best_model.pth", table, tmp_path)) == 0
    assert list(made(tmp_path)) == ["sub-new_desc-synth_dwi"] and not (tmp_path / "out/metrics.csv").exists()


def test_what_is_there_is_kept_and_what_is_damaged_made_again(trained, incomplete, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_model.pth", incomplete, tmp_path)
    assert sample.main(arguments) == 0
    files = made(tmp_path)
    contents = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    damaged, lost = files["sub-01_desc-synth_dwi"], files["sub-03_desc-synth_dwi"]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    lost.with_name("sub-03_desc-synth_dwi.json").unlink()
    assert sample.main(arguments) == 0
    for name, path in files.items():
        assert path.read_bytes() == contents[name][0]
        assert (path.stat().st_mtime_ns == contents[name][1]) == (path not in (damaged, lost)), name
    assert sample.main([*arguments, "--seed", "7"]) == 0  # made in another way: all again
    assert damaged.read_bytes() != contents["sub-01_desc-synth_dwi"][0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_and_finished(trained, incomplete, tmp_path, capsys, number):
    model = trained / "checkpoints/best_model.pth"
    arguments = words(model, incomplete, tmp_path)
    stopped = run_code(signalled("sample", "score", 3, number, program="sample"), *arguments)
    assert stopped.returncode == (-number if number == signal.SIGKILL else program.STOPPED), stopped.stderr
    before = {path: path.read_bytes() for path in made(tmp_path).values()}
    assert 2 <= len(before) < 10
    assert sample.main(arguments) == 0
    whole = tmp_path / "whole"
    assert sample.main(words(model, incomplete, whole)) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {name: path.read_bytes() for name, path in made(tmp_path).items() if path.is_relative_to(tmp_path / "out")} \
        == {name: path.read_bytes() for name, path in made(whole).items()}
    assert not [path for path in (tmp_path / "out").rglob(".*")]


def test_new_pairs(trained, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_model.pth", tmp_path, tmp_path, "--joint_samples", "3")
    assert sample.main(arguments) == 0
    files = made(tmp_path)
    assert len(files) == 6 and nib.load(files["sub-synth0002_desc-synth_dwi"]).shape == SIZES["dmri"]
    assert not np.array_equal(*(nib.load(files[f"sub-synth000{n}_desc-synth_dwi"]).get_fdata() for n in (1, 2)))
    first = files["sub-synth0001_desc-synth_boldref"].read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert sample.main([*arguments[:-1], "1"]) == 0  # the first of one is the first of three
    assert made(tmp_path)["sub-synth0001_desc-synth_boldref"].read_bytes() == first


def test_a_derivatives_tree(trained, incomplete, tmp_path, capsys):
    assert sample.main(words(trained / "checkpoints/best_refine.pth", incomplete, tmp_path)) == 0
    told = json.loads((tmp_path / "out/dataset_description.json").read_text())
    assert told["DatasetType"] == "derivative" and told["GeneratedBy"][0]["Name"] == "PDS"
    path = made(tmp_path)["sub-01_desc-synth_dwi"]
    assert path.relative_to(tmp_path / "out").parts[:2] == ("sub-01", "dwi")
    beside = json.loads(path.with_name("sub-01_desc-synth_dwi.json").read_text())
    assert beside["Sources"] == ["sub-01_space-MNI_fmri.nii.gz"] and beside["MadeWith"]["Stage"] == "stage 2"
    assert str(tmp_path) not in json.dumps(beside) and os.sep + "work" not in json.dumps(beside)


def test_refusals(trained, study_csv, tmp_path, capsys):
    for model, more, told in ((tmp_path / "none.pth", [], "none.pth"), (trained / "stage1.txt", [], "stage1.txt"),
                              (trained / "checkpoints/best_model.pth", ["--data_root", "nowhere"], "nowhere"),
                              (trained / "checkpoints/best_model.pth", ["--joint_samples", "-1"], "joint_samples")):
        assert sample.main(words(model, study_csv, tmp_path, *more)) == 2
        message = capsys.readouterr().err
        assert told in message and "Traceback" not in message
    assert sample.main(words("", study_csv, tmp_path)) == 2 and "opt.resume_path" in capsys.readouterr().err

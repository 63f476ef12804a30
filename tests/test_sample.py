"""A trained model in use: translate, draw pairs, continue, refuse."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import main
import program
import sample
import synthesis
import train
from data.pairs import find_pairs
from tests.conftest import BOTH, CHILD, ROOT, SIZES, arguments, read_csv, run_code, signalled, weights
from utils.metrics import nearest, reliability

NAMES = {"dmri": "{0}/dwi/{0}_desc-{1}_sbref", "fmri": "{0}/func/{0}_task-synth_desc-{1}_sbref"}


@pytest.fixture(scope="module")
def incomplete(study_csv, tmp_path_factory) -> Path:
    """The study's table, in which the first subject has no dmri and the second no fmri."""
    folder = tmp_path_factory.mktemp("incomplete")
    rows = read_csv(study_csv)
    for row in rows:
        for name in SIZES:
            row[name] = str(study_csv.parent / row[name])
    rows[0]["dmri"] = rows[1]["fmri"] = ""
    write_csv(folder / "pairs.csv", rows)
    return folder / "pairs.csv"


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def grouped(study_csv, tmp_path_factory) -> Path:
    """A folder with a stage-1 model of two groups, and its study."""
    folder = tmp_path_factory.mktemp("grouped")
    rows = [{**row, **{name: str(study_csv.parent / row[name]) for name in SIZES}, "group": "A-1" if n % 2 else "B"}
            for n, row in enumerate(read_csv(study_csv))]
    write_csv(folder / "pairs.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "FEWEST_OF_A_GROUP", 1)
        assert main.main(arguments(folder / "pairs.csv", folder, "--condition_on_group")) == 0
    return folder


def words(model: Path, table: Path, folder: Path, *more: str) -> list[str]:
    return ["--resume_path", str(model), "--data_root", str(table), "--sample_dir", str(folder / "out"), "--cache_dir",
            str(folder / "cache"), "--device", "cpu", "--precision", "fp32", "--coarse_samples", "1",
            "--sampling_steps", "3", *more]


def made(folder: Path) -> list[Path]:
    return sorted((folder / "out").rglob("*.nii.gz"))


def where(folder: Path, subject: str, modality: str, description: str = "synth", ending: str = ".nii.gz") -> Path:
    kind = "joint" if "synth" in subject else "translated"
    return folder / "out" / kind / (NAMES[modality].format(subject, description) + ending)


@pytest.mark.parametrize("name, rows", [("best_refine.pth", "refined"), ("best_model.pth", "coarse")])
def test_scores_are_those_of_the_trainer(trained, study_csv, tmp_path, name, rows, capsys):
    """Of the same subjects: those of stage 2; those of its coarse volumes, which are the translations of stage 1.

    Whoever else is in the table.
    """
    roles = {row["subject"]: row["role"] for row in read_csv(trained / "results/stage1/split.csv")}
    write_csv(tmp_path / "some.csv", [{**row, **{each: str(study_csv.parent / row[each]) for each in SIZES}}
                                      for row in read_csv(study_csv) if roles[row["subject"]] != "train"])
    assert sample.main(words(trained / "checkpoints" / name, tmp_path / "some.csv", tmp_path)) == 0
    found = {(row["subject"], row["direction"], row["region"]): float(row["psnr"])
             for row in read_csv(tmp_path / "out/translated/metrics.csv")}
    expected = {(row["subject"], row["direction"], row["region"]): float(row["psnr"])
                for row in read_csv(trained / "results/refine/metrics.csv")
                if row["volume"] == rows and row["region"] != "pattern"}
    assert expected and expected.keys() < found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.01)


def test_a_missing_modality_is_made_in_its_place(trained, incomplete, study_csv, tmp_path, capsys):
    model = trained / "checkpoints/best_refine.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--uncertainty_samples", "3")) == 0
    assert len(made(tmp_path)) == 3 * 10  # both of four, one of two; and a mean and a deviation for each
    for name, modality in (("sub-01", "dmri"), ("sub-02", "fmri"), ("sub-03", "dmri")):
        image = nib.load(where(tmp_path, name, modality))
        truth = nib.load(study_csv.parent / f"{name}_space-MNI_{modality}.nii.gz")
        assert image.shape == truth.shape
        np.testing.assert_allclose(image.affine, truth.affine, atol=1e-4)
        assert image.header["sform_code"] == truth.header["sform_code"]
        likeness = np.corrcoef(image.get_fdata().ravel(), truth.get_fdata().ravel())[0, 1]
        assert likeness > 0.5  # in place, and in its units
    deviation = nib.load(where(tmp_path, "sub-01", "dmri", "std")).get_fdata()
    assert deviation.min() >= 0 and deviation.max() > 0
    known = {f"sub-0{n}" for n in range(3, 7)}
    for name in ("metrics.csv", "uncertainty.csv"):
        assert {row["subject"] for row in read_csv(tmp_path / "out/translated" / name)} == known
    assert (tmp_path / "out/translated/synthesis.png").exists()
    assert (tmp_path / "out/translated/calibration.png").exists()


def test_reliability_of_errors_that_a_deviation_tells():
    generator = np.random.default_rng(0)
    deviation = generator.uniform(0.01, 0.3, (20, 20, 20))
    error, inside = generator.normal(0, deviation), np.ones((20, 20, 20), dtype=bool)
    found = reliability(deviation, error, inside)
    for count, variance, squares in found["bins"]:
        assert count < 400 or squares == pytest.approx(variance, rel=0.25)
    assert np.sum(found["bins"], axis=0)[0] == 8000 and found["rank_correlation"] > 0.4
    assert abs(reliability(deviation, generator.permutation(error.ravel()).reshape(error.shape), inside)
               ["rank_correlation"]) < 0.05
    assert reliability(np.full_like(deviation, 0.1), error, inside)["rank_correlation"] == 0


def test_output_in_the_space_of_the_source(trained, incomplete, study_csv, tmp_path, capsys):
    model = trained / "checkpoints/best_model.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--output_space", "source")) == 0
    image, source = nib.load(where(tmp_path, "sub-01", "dmri")), nib.load(
        study_csv.parent / "sub-01_space-MNI_fmri.nii.gz")
    assert image.shape == source.shape and np.allclose(image.affine, source.affine)


def test_a_table_of_one_modality_alone(trained, study_csv, tmp_path, capsys):
    table = tmp_path / "one.csv"
    table.write_text(f"subject,fmri\nnew_1,{study_csv.parent / 'sub-01_space-MNI_fmri.nii.gz'}\n")
    assert sample.main(words(trained / "checkpoints/best_model.pth", table, tmp_path)) == 0
    assert made(tmp_path) == [where(tmp_path, "sub-new1", "dmri")]  # BIDS allows no _ in labels
    assert not (tmp_path / "out/translated/metrics.csv").exists()
    table.write_text(table.read_text() + f"new1,{study_csv.parent / 'sub-02_space-MNI_fmri.nii.gz'}\n")
    assert sample.main(words(trained / "checkpoints/best_model.pth", table, tmp_path)) == 2
    assert "sub-new1" in capsys.readouterr().err


def test_what_is_there_is_kept_and_what_is_damaged_made_again(trained, incomplete, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_model.pth", incomplete, tmp_path)
    assert sample.main(arguments) == 0
    contents = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made(tmp_path)}
    damaged, lost = where(tmp_path, "sub-01", "dmri"), where(tmp_path, "sub-03", "dmri")
    damaged.write_bytes(damaged.read_bytes()[:-20])
    where(tmp_path, "sub-03", "dmri", ending=".json").unlink()
    assert sample.main(arguments) == 0
    for path, (content, time) in contents.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path not in (damaged, lost)), path
    capsys.readouterr()
    assert sample.main([*arguments, "--seed", "7"]) == 2  # would be made in another way
    assert "Seed" in capsys.readouterr().err and damaged.read_bytes() == contents[damaged][0]
    assert sample.main([*arguments, "--uncertainty_samples", "2"]) == 0  # the volumes themselves are the same
    assert len(made(tmp_path)) == 30 and damaged.read_bytes() == contents[damaged][0]


def test_what_a_json_or_the_description_says_is_verified(trained, incomplete, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_model.pth", incomplete, tmp_path)
    assert sample.main(arguments) == 0
    table = (tmp_path / "out/translated/metrics.csv").read_text()
    path = where(tmp_path, "sub-03", "dmri", ending=".json")
    whole = json.loads(path.read_text())
    for change in ({"Direction": {}}, {"Scores": {"volume": 3}}, {"Scores": "x"}, {"MadeWith": 3},
                   {"Scores": {"volume": {"psnr": 99.0, "ssim": 1.0, "mae": 1.0}}}):
        path.write_text(json.dumps({**whole, **change}))
        assert sample.main(arguments) == 0
        assert json.loads(path.read_text()) == whole and (tmp_path / "out/translated/metrics.csv").read_text() == table
    for content in ("x", "[]", '{"GeneratedBy": 5}'):  # made again from what the volumes' JSONs say
        (tmp_path / "out/translated/dataset_description.json").write_text(content)
        assert sample.main(arguments) == 0
    (tmp_path / "out/translated/dataset_description.json").unlink()
    assert sample.main([*arguments, "--seed", "7"]) == 2
    assert "(Seed)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_and_finished(trained, incomplete, tmp_path, capsys, number):
    model = trained / "checkpoints/best_model.pth"
    arguments = words(model, incomplete, tmp_path, "--batch_size", "2")
    stopped = run_code(signalled("sample", "score", 3, number, program="sample"), *arguments)
    assert stopped.returncode == (-number if number == signal.SIGKILL else program.STOPPED), stopped.stderr
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made(tmp_path)}
    assert 2 <= len(before) < 10
    assert sample.main(arguments) == 0
    other = tmp_path / "whole"
    assert sample.main(words(model, incomplete, other, "--batch_size", "2")) == 0
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == was for path, was in before.items())
    assert {path.name: path.read_bytes() for path in made(tmp_path)} \
        == {path.name: path.read_bytes() for path in made(other)}
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".bidsignore"]


def test_new_pairs(trained, study_csv, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_model.pth", study_csv, tmp_path, "--joint_samples", "3")
    assert sample.main(arguments) == 0
    assert len(made(tmp_path)) == 6 and nib.load(where(tmp_path, "sub-synth000002", "dmri")).shape == SIZES["dmri"]
    assert not np.array_equal(*(nib.load(where(tmp_path, f"sub-synth00000{n}", "dmri")).get_fdata() for n in (1, 2)))
    rows = read_csv(tmp_path / "out/joint/memorisation.csv")
    assert len(rows) == 6 and all(float(row["distance"]) > 0 for row in rows)
    pairs, problems = find_pairs(tmp_path / "out/joint/pairs.csv", BOTH)
    assert [pair.name for pair in pairs] == [f"sub-synth00000{n}" for n in (1, 2, 3)] and not problems
    first = nib.load(where(tmp_path, "sub-synth000001", "fmri")).get_fdata()
    shutil.rmtree(tmp_path / "out")
    assert sample.main([*arguments[:-1], "1"]) == 0  # the first of one is the first of three
    assert sample.main([*arguments[:-1], "2"]) == 0 and sample.main([*arguments[:-1], "1"]) == 0
    assert len(read_csv(tmp_path / "out/joint/pairs.csv")) == 2  # of all that is there
    np.testing.assert_allclose(nib.load(where(tmp_path, "sub-synth000001", "fmri")).get_fdata(), first, atol=0.1)


def test_new_pairs_of_each_group(grouped, tmp_path, capsys):
    arguments = words(grouped / "checkpoints/best_model.pth", grouped / "pairs.csv", tmp_path, "--joint_samples", "2")
    assert sample.main(arguments) == 0
    rows = {row["subject"]: row["group"] for row in read_csv(tmp_path / "out/joint/pairs.csv")}
    assert rows == {"sub-synthA1000001": "A-1", "sub-synthA1000002": "A-1", "sub-synthB000001": "B",
                    "sub-synthB000002": "B"}
    table = (tmp_path / "out/joint/participants.tsv").read_text().splitlines()
    assert table[:2] == ["participant_id\tgroup", "sub-synthA1000001\tA-1"] and len(made(tmp_path)) == 8


def test_the_group_changes_what_is_drawn_but_not_what_is_translated(grouped, capsys):
    settings = sample.parse_arguments(sample.opt, sample.PRESETS, words(grouped / "checkpoints/best_model.pth",
                                                                        grouped / "pairs.csv", grouped), "")
    model = synthesis.Model(settings, program.choose_device("cpu"))
    assert model.groups == ("A-1", "B")
    network = model.backbone.network
    for net in network.nets.values():
        net.group.weight[1] += 1
    drawn = [model.draw([(1, group)], iter)["fmri"] for group in (1, 2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.05
    source = np.zeros((1, *SIZES["fmri"]), dtype=np.float32)
    before = model.translate("fmri", "dmri", source, [0], 0, iter)["synth"]
    for net in network.nets.values():
        net.group.weight[1:] += 1
    np.testing.assert_array_equal(model.translate("fmri", "dmri", source, [0], 0, iter)["synth"], before)


def test_groups_must_be_there_and_not_be_single_subjects(study_csv, grouped, tmp_path, capsys):
    for table, words in ((study_csv, "of 0 groups"), (grouped / "pairs.csv", "of A-1 (")):
        assert main.main(arguments(table, tmp_path, "--condition_on_group")) == 2
        message = capsys.readouterr().err
        assert "opt.condition_on_group" in message and words in message
        assert main.main(arguments(table, tmp_path, "--condition_on_group", "--check")) == 2
        assert words in capsys.readouterr().out


def test_other_groups_are_another_run(grouped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "FEWEST_OF_A_GROUP", 1)
    rows = read_csv(grouped / "pairs.csv")
    write_csv(tmp_path / "pairs.csv", [{**row, "group": {"B": "C"}.get(row["group"], row["group"])} for row in rows])
    shutil.copytree(grouped / "checkpoints", tmp_path / "checkpoints")
    assert main.main(arguments(tmp_path / "pairs.csv", tmp_path, "--condition_on_group")) == 2
    assert "the groups: not the same" in capsys.readouterr().err


def test_copies_of_training_volumes_are_flagged(trained, study_csv, tmp_path, monkeypatch, capsys):
    roles = {row["subject"]: row["role"] for row in read_csv(trained / "results/stage1/split.csv")}
    copied = next(name for name, role in roles.items() if role == "train")

    def copies(model, numbers, watch):  # the first; the others are like nothing
        return {name: np.stack([model.read(name, study_csv.parent / f"{copied}_space-MNI_{name}.nii.gz")[0]
                                * (1 if number == 1 else -1) for number, _ in numbers]) for name in BOTH}

    monkeypatch.setattr(synthesis.Model, "draw", copies)
    assert sample.main(words(trained / "checkpoints/best_model.pth", study_csv, tmp_path, "--joint_samples", "2")) == 0
    rows = read_csv(tmp_path / "out/joint/memorisation.csv")
    assert len(rows) == 4
    for row in rows:
        copy = row["subject"] == "sub-synth000001"
        assert row["flagged"] == ("yes" if copy else "no") and (float(row["distance"]) < 0.05) == copy
        assert row["nearest"] == copied or not copy
    assert capsys.readouterr().out.count("1 of 2 (sub-synth000001); by chance") == 2


def test_copies_cannot_be_looked_for_without_the_training_volumes(trained, incomplete, tmp_path, capsys):
    model = trained / "checkpoints/best_model.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--joint_samples", "1")) == 0
    assert "not checked for copies" in capsys.readouterr().out
    assert not (tmp_path / "out/joint/memorisation.csv").exists()


def test_the_nearest_volume():
    volumes = np.zeros((2, 2, 2, 2))
    volumes[1] = 1
    distance, place = nearest(volumes, [np.full((2, 2, 2), value) for value in (0.75, 0.25, -3)])
    assert distance == pytest.approx([0.25, 0.25]) and place.tolist() == [1, 0]


def test_a_derivatives_tree(trained, incomplete, tmp_path, capsys):
    model = trained / "checkpoints/best_refine.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--uncertainty_samples", "2")) == 0
    described = json.loads((tmp_path / "out/translated/dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative" and described["GeneratedBy"][0]["Name"] == "PDS"
    told = json.loads(where(tmp_path, "sub-01", "dmri", ending=".json").read_text())
    assert told["Sources"] == ["sub-01_space-MNI_fmri.nii.gz"] and told["MadeWith"]["Stage"] == "stage 2"
    assert str(tmp_path) not in json.dumps(told) and os.sep + "work" not in json.dumps(told)
    for path in made(tmp_path):
        assert path.with_name(path.name.replace(".nii.gz", ".json")).exists()


@pytest.mark.skipif(not shutil.which("bids-validator-deno"), reason="bids-validator-deno is not installed")
def test_the_bids_validator_accepts_both_trees(trained, incomplete, grouped, tmp_path, capsys):
    assert sample.main(words(trained / "checkpoints/best_refine.pth", incomplete, tmp_path,
                             "--uncertainty_samples", "2")) == 0
    assert sample.main(words(grouped / "checkpoints/best_model.pth", grouped / "pairs.csv", tmp_path,
                             "--joint_samples", "1")) == 0
    for kind in ("translated", "joint"):
        found = subprocess.run(["bids-validator-deno", "--json", str(tmp_path / "out" / kind)], capture_output=True,
                               text=True, timeout=120)
        issues = json.loads(found.stdout)["issues"]["issues"]
        assert found.returncode == 0 and not [each for each in issues if each["severity"] == "error"], issues


def test_on_several_ranks_as_on_one(trained, incomplete, tmp_path, capsys):
    arguments = words(trained / "checkpoints/best_refine.pth", incomplete, tmp_path, "--batch_size", "2")
    done = subprocess.run(["torchrun", "--standalone", "--nproc-per-node", "2", "sample.py", *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=240, env={**CHILD, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("volumes are in") == 1
    other = tmp_path / "one"
    assert sample.main(words(trained / "checkpoints/best_refine.pth", incomplete, other, "--batch_size", "2")) == 0
    assert [path.name for path in made(tmp_path)] == [path.name for path in made(other)]
    for path, same in zip(made(tmp_path), made(other)):
        np.testing.assert_allclose(nib.load(path).get_fdata(), nib.load(same).get_fdata(), atol=0.5)
    table = [(tmp_path / "out/translated/metrics.csv"), (other / "out/translated/metrics.csv")]
    assert [row["subject"] for row in read_csv(table[0])] == [row["subject"] for row in read_csv(table[1])]


def test_without_a_prior_there_is_no_uncertainty(trained, incomplete, tmp_path, capsys):
    """And a prior that does not see the source cannot tell it; without it translations are made all the same."""
    state = weights(trained / "checkpoints/best_refine.pth")
    for coarse in ("none", "joint"):
        state["options"]["coarse"] = coarse
        torch.save(state, tmp_path / "other.pth")
        arguments = words(tmp_path / "other.pth", incomplete, tmp_path, "--sample_dir", str(tmp_path / f"out/{coarse}"))
        assert sample.main([*arguments, "--uncertainty_samples", "2"]) == 2
        assert f"opt.coarse = {coarse!r}" in capsys.readouterr().err
        assert sample.main(arguments) == 0
    assert len(made(tmp_path)) == 20


def test_reports_are_of_all_that_is_there(trained, incomplete, study_csv, tmp_path, capsys):
    model = trained / "checkpoints/best_model.pth"
    assert sample.main(words(model, incomplete, tmp_path, "--uncertainty_samples", "2")) == 0
    (tmp_path / "one.csv").write_text(f"subject,fmri\nnew,{study_csv.parent / 'sub-02_space-MNI_fmri.nii.gz'}\n")
    assert sample.main(words(model, tmp_path / "one.csv", tmp_path)) == 0
    known = {f"sub-0{n}" for n in range(3, 7)}
    for name in ("metrics.csv", "uncertainty.csv"):
        assert {row["subject"] for row in read_csv(tmp_path / "out/translated" / name)} == known
    (tmp_path / "one.csv").write_text(f"subject,fmri\nsub-01,{study_csv.parent / 'sub-02_space-MNI_fmri.nii.gz'}\n")
    assert where(tmp_path, "sub-01", "dmri", "std").exists()
    capsys.readouterr()
    assert sample.main(words(model, tmp_path / "one.csv", tmp_path)) == 0  # of another source than its deviation was
    assert "was made otherwise (Source" in capsys.readouterr().out
    assert where(tmp_path, "sub-01", "dmri").exists() and not where(tmp_path, "sub-01", "dmri", "std").exists()


def test_refusals(trained, study_csv, tmp_path, capsys):
    empty = tmp_path / "empty.csv"
    empty.write_text("subject,fmri\n")
    for model, more, told in ((tmp_path / "none.pth", [], "none.pth"), (trained / "stage1.txt", [], "stage1.txt"),
                              (trained / "checkpoints/best_model.pth", ["--data_root", "nowhere"], "nowhere"),
                              (trained / "checkpoints/best_model.pth", ["--joint_samples", "-1"], "joint_samples"),
                              (trained / "checkpoints/best_model.pth", ["--uncertainty_samples", "1"], "uncertainty"),
                              (trained / "checkpoints/best_model.pth", ["--data_root", str(empty)], "no visit has"),
                              (trained / "checkpoints/best_model.pth", ["--timesteps", "2000", "--sampling_steps",
                                                                        "1500"], "has 1000 timesteps")):
        assert sample.main(words(model, study_csv, tmp_path, *more)) == 2
        message = capsys.readouterr().err
        assert told in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()  # what is refused leaves nothing
    assert sample.main(words("", study_csv, tmp_path)) == 2 and "opt.resume_path" in capsys.readouterr().err

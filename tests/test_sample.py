"""sample.py run for real: translate, draw new pairs, resume, refuse."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import main
import sample
from data import split
from data.pairs import Pair, find_pairs
from synthesis.derivatives import read_sidecar, volume_path
from synthesis.report import some_of
from tests.conftest import BOTH, SIZES, arguments, read_csv, refine_arguments, run_code, save, signalled, weights
from tests.test_distributed import torchrun
from training.launch import STOPPED
from utils.files import write_table
from utils.metrics import METRICS


def write_csv(path: Path, rows: list[dict]) -> Path:
    write_table(path, tuple(rows[0]), rows)
    return path


def rows_of(study_csv: Path) -> list[dict]:
    """The rows of the tiny study, with absolute paths."""
    return [{**row, **{modality: str(study_csv.parent / row[modality]) for modality in SIZES}}
            for row in read_csv(study_csv)]


def words(model: Path, table: Path, folder: Path, *more: str) -> list[str]:
    return ["--resume_path", str(model), "--data_root", str(table), "--sample_dir", str(folder / "out"), "--cache_dir",
            str(table.parent / "sample_cache"), "--device", "cpu", "--precision", "fp32", "--sampling_steps", "3",
            *more]


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Bytes and time of all volumes."""
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted((folder / "out").rglob("*.nii.gz"))}


def where(folder: Path, subject: str, modality: str, description: str = "synth") -> Path:
    tree = folder / "out" / ("joint" if "synth" in subject else "translated")
    return volume_path(tree, Pair(subject, "", "", None, {}), modality, description)


@pytest.fixture(scope="module")
def incomplete(study_csv, tmp_path_factory) -> Path:
    """The study's table, in which the first subject has no dmri and the second no fmri."""
    rows = rows_of(study_csv)
    rows[0]["dmri"] = rows[1]["fmri"] = ""
    return write_csv(tmp_path_factory.mktemp("incomplete") / "pairs.csv", rows)


@pytest.fixture(scope="module")
def translated(trained, incomplete, tmp_path_factory) -> Path:
    """A folder with the translations of stage 2 and standard deviations; tests that write copy it."""
    folder, model = tmp_path_factory.mktemp("translated"), trained / "checkpoints/best_refine.pth"
    assert sample.main(words(model, incomplete, folder, "--uncertainty_samples", "3")) == 0
    return folder


@pytest.fixture(scope="module")
def grouped(study_csv, tmp_path_factory) -> Path:
    """A folder with new pairs of a stage-1 model of two groups."""
    folder, rows = tmp_path_factory.mktemp("grouped"), rows_of(study_csv)
    table = write_csv(folder / "pairs.csv", [{**row, "group": "A-1" if n % 2 else "B"} for n, row in enumerate(rows)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "MIN_GROUP_PAIRS", 1)
        assert main.main(arguments(table, folder, "--condition_on_group", "--max_steps", "1")) == 0
    assert sample.main(words(folder / "checkpoints/best_model.pth", table, folder, "--joint_samples", "2")) == 0
    return folder


def test_the_picture_shows_what_was_missing_and_what_is_new():
    """Of 12 rows half lack a scan, and of the complete visits those that the model has not seen come first."""
    model = SimpleNamespace(has_seen=lambda scans: "seen" in scans)
    visits = [*enumerate([{"a": 0}] * 20 + [{"seen": 0, "b": 0}] * 30 + [{"a": 0, "b": 0}] * 3)]
    assert [n for n, _ in some_of(visits, model)] == [0, 4, 8, 11, 15, 19, 50, 51, 52, 20, 34, 49]
    assert [n for n, _ in some_of(visits[:22], model)] == [0, 2, 4, 6, 8, 11, 13, 15, 17, 19, 20, 21]
    assert [n for n, _ in some_of(visits[-2:], model)] == [51, 52] and some_of([], model) == []


@pytest.mark.parametrize("name, volume", [("best_refine.pth", "refined"), ("best_model.pth", "coarse")])
def test_scores_equal_those_of_the_trainer(trained, study_csv, tmp_path, name, volume):
    roles = {row["subject"]: row["role"] for row in read_csv(trained / "results/stage1/split.csv")}
    table = write_csv(tmp_path / "some.csv", [row for row in rows_of(study_csv) if roles[row["subject"]] == "test"])
    assert sample.main(words(trained / "checkpoints" / name, table, tmp_path)) == 0
    found, expected = ({(row["subject"], row["direction"], row["region"]): {name: float(row[name]) for name in METRICS}
                        for row in read_csv(file) if row["volume"] == kind and row["region"] != "pattern"}
                       for file, kind in ((tmp_path / "out/translated/metrics.csv", "synthesised"),
                                          (trained / "results/refine/metrics.csv", volume)))
    assert expected and expected.keys() == found.keys()
    for key, scores in expected.items():
        assert found[key] == pytest.approx(scores, abs=2e-3, nan_ok=True) and scores["psnr"] > 0


def test_scores_inside_regions_of_the_users_own(trained, study_csv, tmp_path, capsys):
    """In the trainer's report and in sample.py the same; two subjects lack a label; another label gives new scores."""
    for number, subject in enumerate(row["subject"] for row in rows_of(study_csv)):
        labels = np.zeros(SIZES["fmri"], np.uint8)
        labels[3:9, 3:10, 3:8], labels[5:7, 5:8] = 1, 2 if number > 1 else 1
        save(tmp_path / f"{subject}_seg.nii", labels, nib.load(rows_of(study_csv)[number]["fmri"]).affine)
    regions = ["--region_file", str(tmp_path / "{subject}_seg.nii"), "--region_labels", "both=1,2", "core=2", "lost=9"]
    assert main.main(refine_arguments(study_csv, trained, "--checkpoint_dir", str(tmp_path / "c"), "--result_dir",
                                      str(tmp_path / "r"), "--max_steps", "1", *regions)) == 0
    note = f"note: opt.region_labels, lost: no image of {tmp_path / '{subject}_seg.nii'} has such a label"
    assert note in capsys.readouterr().out
    command = words(tmp_path / "c/best_refine.pth", study_csv, tmp_path)
    assert sample.main(command) == 0
    before = {path: time for path, (_, time) in contents(tmp_path).items()}
    assert sample.main([*command, *regions]) == 0 and note in capsys.readouterr().out
    after = {path: time for path, (_, time) in contents(tmp_path).items()}
    assert sample.main([*command, *regions]) == 0
    assert {path: time for path, (_, time) in contents(tmp_path).items()} == after
    assert before.keys() == after.keys() and not before.items() & after.items()  # there were other scores
    rows = read_csv(tmp_path / "out/translated/metrics.csv")
    assert {row["region"] for row in rows} == {"volume", "brain", "both", "core"}
    assert len({row["subject"] for row in rows if row["region"] == "core"}) == 4
    assert len({row["subject"] for row in rows if row["region"] == "both"}) == 6
    found, expected = ({(row["subject"], row["direction"], row["region"]): float(row["psnr"]) for row in read_csv(file)
                        if row["volume"] == kind and row["region"] in ("both", "core")}
                       for file, kind in ((tmp_path / "out/translated/metrics.csv", "synthesised"),
                                          (tmp_path / "r/refine/metrics.csv", "refined")))
    assert expected and all(found[key] == pytest.approx(psnr, abs=2e-3) for key, psnr in expected.items())
    sidecar = where(tmp_path, "sub-03", "dmri").with_suffix("").with_suffix(".json").read_text()
    assert json.loads(sidecar, parse_constant=pytest.fail)["Scores"]["core"]["sharpness"] == "nan"
    (tmp_path / "sub-02_seg.nii").unlink()
    assert sample.main([*command, *regions]) == 2 and "sub-02_seg.nii: no such file" in capsys.readouterr().err


def test_a_missing_modality_is_synthesised_in_its_place(translated, trained, study_csv):
    assert len(contents(translated)) == 2 * 10  # both of four, one of two; with a deviation each
    for name, modality in (("sub-01", "dmri"), ("sub-02", "fmri"), ("sub-03", "dmri")):
        image = nib.load(where(translated, name, modality))
        truth = nib.load(study_csv.parent / f"{name}_space-MNI_{modality}.nii.gz")
        assert image.shape == truth.shape and np.allclose(image.affine, truth.affine, atol=1e-4)
        assert image.header["sform_code"] == truth.header["sform_code"]
        assert np.corrcoef(image.get_fdata().ravel(), truth.get_fdata().ravel())[0, 1] > 0.5
    tree, roles = translated / "out/translated", {row["subject"]: row["role"] for row in
                                                  read_csv(trained / "results/stage1/split.csv")}
    assert {(row["subject"], row["volume"]) for row in read_csv(tree / "metrics.csv")} \
        == {(f"sub-0{n}", "synthesised" if roles[f"sub-0{n}"] == "test" else "trained on") for n in range(3, 7)}
    sidecar = read_sidecar(where(translated, "sub-01", "dmri"))
    assert sidecar["Sources"] == ["sub-01_space-MNI_fmri.nii.gz"] and sidecar["MadeWith"]["Stage"] == "stage 2"
    assert str(translated) not in str(sidecar) and (tree / "synthesis.png").exists()


@pytest.mark.skipif(not shutil.which("bids-validator-deno"), reason="bids-validator-deno is not installed")
def test_the_bids_validator_accepts_both_trees(translated, grouped):
    for tree in (translated / "out/translated", grouped / "out/joint"):
        found = subprocess.run(["bids-validator-deno", "--json", tree], capture_output=True, text=True, timeout=120)
        issues = json.loads(found.stdout)["issues"]["issues"]
        assert found.returncode == 0 and not [issue for issue in issues if issue["severity"] == "error"], issues


def test_complete_volumes_are_kept_and_damaged_ones_replaced(trained, incomplete, tmp_path, capsys, monkeypatch):
    command = words(trained / "checkpoints/best_model.pth", incomplete, tmp_path)
    assert sample.main(command) == 0
    before = contents(tmp_path)
    with monkeypatch.context() as patch:  # nothing is missing: no source is loaded
        patch.setattr(sample, "load_volume", None)
        assert sample.main(command) == 0 and contents(tmp_path) == before
    damaged = where(tmp_path, "sub-01", "dmri")
    damaged.write_bytes(damaged.read_bytes()[:-20])
    where(tmp_path, "sub-03", "dmri").with_suffix("").with_suffix(".json").unlink()
    assert sample.main(command) == 0
    after = contents(tmp_path)
    assert sum(before[path] != after[path] for path in before) == 2
    assert all(before[path][0] == after[path][0] for path in before)
    assert sample.main([*command, "--seed", "7"]) == 2  # a tree has one seed
    assert "(seed)" in capsys.readouterr().err and contents(tmp_path) == after
    assert sample.main([*command, "--uncertainty_samples", "2"]) == 0
    assert len(contents(tmp_path)) == 20 and after.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_and_resumed(trained, incomplete, tmp_path, number):
    command, other = (words(trained / "checkpoints/best_refine.pth", incomplete, folder, "--batch_size", "2")
                      for folder in (tmp_path, tmp_path / "other"))
    stopped = run_code(signalled("synthesis.derivatives", "_checksum", 3, number, program="sample"), *command)
    assert stopped.returncode == (-number if number == signal.SIGKILL else STOPPED), stopped.stderr
    before = contents(tmp_path)
    assert 2 <= len(before) < 10 and sample.main(command) == sample.main(other) == 0
    after, expected = contents(tmp_path), contents(tmp_path / "other")
    assert sum(after[path] == before[path] for path in before) >= len(before) - 1  # one had no sidecar yet
    assert [content for content, _ in after.values()] == [content for content, _ in expected.values()]
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".bidsignore"]


def test_two_ranks_write_what_one_writes(trained, incomplete, translated, tmp_path):
    command = words(trained / "checkpoints/best_refine.pth", incomplete, tmp_path, "--batch_size", "2")
    ranks = torchrun(*command, program="sample.py")
    printed, errors = ranks.communicate(timeout=240)
    assert ranks.returncode == 0, errors
    assert printed.count("volumes are in") == 1 and len(contents(tmp_path)) == 10
    for path in contents(tmp_path):
        one, two = (nib.load(folder / path).get_fdata() for folder in (translated, tmp_path))
        np.testing.assert_allclose(one, two, atol=0.5)


def test_another_table_adds_to_the_tree_and_another_source_replaces(trained, translated, study_csv, tmp_path, capsys):
    shutil.copytree(translated / "out", tmp_path / "out")
    model, table = trained / "checkpoints/best_refine.pth", tmp_path / "one.csv"
    fmri = study_csv.parent / "sub-02_space-MNI_fmri.nii.gz"
    for subject in ("new_1", "sub-01"):
        assert "replaced" not in capsys.readouterr().out
        table.write_text(f"subject,fmri\n{subject},{fmri}\n")
        assert sample.main(words(model, table, tmp_path)) == 0
    assert "replaced, because its source" in capsys.readouterr().out
    assert where(tmp_path, "sub-new1", "dmri").exists()  # BIDS names have no underscores
    assert where(tmp_path, "sub-01", "dmri").exists() and not where(tmp_path, "sub-01", "dmri", "std").exists()
    assert len({row["subject"] for row in read_csv(tmp_path / "out/translated/metrics.csv")}) == 4
    shutil.rmtree(tmp_path / "out")
    assert sample.main(words(model, table, tmp_path, "--output_space", "source")) == 0
    image, source = nib.load(where(tmp_path, "sub-01", "dmri")), nib.load(fmri)
    assert image.shape == source.shape and np.allclose(image.affine, source.affine)


def test_new_pairs_depend_on_their_number_alone(trained, study_csv, tmp_path, capsys):
    command = words(trained / "checkpoints/best_refine.pth", study_csv, tmp_path, "--joint_samples")
    assert sample.main([*command, "3"]) == 0
    assert len(contents(tmp_path)) == 6
    first, second = (nib.load(where(tmp_path, f"sub-synth00000{n}", "fmri")).get_fdata() for n in (1, 2))
    assert not np.array_equal(first, second) and "-m benchmarks.memorisation" in capsys.readouterr().out
    assert find_pairs(tmp_path / "out/joint/pairs.csv", BOTH)[1] == []  # no problems
    shutil.rmtree(tmp_path / "out")
    assert all(sample.main([*command, count]) == 0 for count in ("1", "2", "1"))
    assert len(read_csv(tmp_path / "out/joint/pairs.csv")) == 2  # all that are in the tree
    np.testing.assert_allclose(nib.load(where(tmp_path, "sub-synth000001", "fmri")).get_fdata(), first, atol=0.1)


def test_new_pairs_of_each_group(grouped):
    assert {row["subject"]: row["group"] for row in read_csv(grouped / "out/joint/pairs.csv")} == {
        f"sub-synth{label}00000{n}": group for label, group in (("A1", "A-1"), ("B", "B")) for n in (1, 2)}
    assert len({content for content, _ in contents(grouped).values()}) == 8


def test_realism_is_a_straight_line_from_the_refined_volume(trained, study_csv, tmp_path, capsys):
    model, found = trained / "checkpoints/best_refine.pth", []
    for realism in ("0", "0.5", "1"):
        assert sample.main(words(model, study_csv, tmp_path / realism, "--realism", realism)) == 0
        found.append(nib.load(where(tmp_path / realism, "sub-03", "dmri")).get_fdata())
    inside = (found[2] > found[0].min() + 1) & (found[2] < found[0].max() - 1)  # not clipped
    np.testing.assert_allclose(found[1][inside], (found[0] + found[2])[inside] / 2, atol=1)  # of about 600
    assert np.abs(found[2] - found[0]).max() > 20
    assert sample.main(words(model, study_csv, tmp_path / "1")) == 2  # a tree has one realism
    assert "(realism)" in capsys.readouterr().err


def test_a_model_of_joint_samples_translates_with_its_own_settings(trained, incomplete, tmp_path, capsys):
    state = weights(trained / "checkpoints/best_refine.pth")
    state["options"]["coarse"], state["backbone"]["options"]["prediction"] = "joint", "epsilon"
    torch.save(state, tmp_path / "joint.pth")
    command = words(tmp_path / "joint.pth", incomplete, tmp_path, "--seed", "5")
    assert sample.main([*command, "--realism", "0.5"]) == 2 and sample.main(command) == 0
    printed = capsys.readouterr()
    assert "opt.realism = 0.5" in printed.err and "ignored: opt.seed" in printed.out
    assert len(contents(tmp_path)) == 10


def test_refusals_name_the_cause_and_write_nothing(trained, study_csv, tmp_path, capsys):
    model, scans = trained / "checkpoints/best_model.pth", [row["fmri"] for row in rows_of(study_csv)]
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4)), tmp_path / "small.nii.gz")
    for name, rows in (("empty", ""), ("clash", f"new_1,{scans[0]}\nnew1,{scans[1]}\n"), ("size", "a,small.nii.gz\n")):
        (tmp_path / name).write_text(f"subject,fmri\n{rows}")
    for path, more, message in (
            (tmp_path / "none.pth", (), "none.pth"), ("", (), "opt.resume_path"),
            (model, ("--data_root", str(tmp_path / "empty")), "no visit has"),
            (model, ("--data_root", str(tmp_path / "clash")), "sub-new1, sub-new_1"),
            (model, ("--data_root", str(tmp_path / "size")), "small.nii.gz: has size 9x9x9"),
            (model, ("--timesteps", "2000", "--sampling_steps", "1500"), "has 1000 timesteps")):
        assert sample.main(words(path, study_csv, tmp_path, *more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""`python main.py --check`: all problems of a study in one run."""

import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import main
from data.alignment import Alignment
from data.cache import Reading
from data.check import _background, _describe, check_study
from data.volumes import read_volume
from opt import Options
from tests.conftest import LGG, TRACTOR, needs_shared, read_csv, run_program, save, write_pairs
from tests.test_volumes import AXES, DAMAGED, FORMS, SROW, VOXELS, with_header
from utils.stop import Interrupted, stop

SIZES = ("--image_size", "fmri=12x13x11", "dmri=16x17x14")
SUGGESTION = "suggested: --image_size fmri=12x13x11 dmri=16x17x14"


def words(root: Path, folder: Path, *more: str) -> list[str]:
    return ["--check", "--data_root", str(root), "--result_dir", str(folder / "results"), "--cache_dir",
            str(folder / "cache"), *more]


def rows(folder: Path) -> list[dict]:
    return read_csv(folder / "results/check.csv")


def suggestion(printed: str) -> list[str]:
    return printed.partition("suggested: ")[2].splitlines()[0].split()


def two_modalities(folder: Path, *sizes: tuple[int, int, int]) -> list[str]:
    """Write a study of modalities a and b, one subject for each size; returns the words that check it."""
    random, table = np.random.default_rng(0), ["subject,a,b"]
    for number, size in enumerate(sizes):
        for name in "ab":
            save(folder / f"{number}{name}.nii", random.normal(size=size).astype(np.float32), np.eye(4))
        table.append(f"{number},{number}a.nii,{number}b.nii")
    (folder / "pairs.csv").write_text("\n".join(table))
    return words(folder / "pairs.csv", folder, "--modalities", "a", "b", "--folds", "1")


def test_all_problems_of_a_broken_study_are_reported_in_one_run(tmp_path, capsys):
    """One fault for each subject."""
    table = write_pairs(tmp_path / "study", subjects=len(DAMAGED) + 12)
    intact, copy, missing, *others = sorted(table.parent.glob("*_fmri.nii.gz"))
    shutil.copy(intact, copy)
    table.write_text(table.read_text().replace(missing.name, ""))
    warnings = {"gives no orientation": (FORMS, bytes(4)), "1 voxels were NaN": (VOXELS, struct.pack("<f", np.nan))}
    errors = {"do not overlap": (SROW + 12, struct.pack("<f", 9000)),  # and has no ROI, see below
              "has size 11x13x11, most have 12x13x11": (AXES + 2, struct.pack("<h", 11)),
              "every voxel is 3": (VOXELS, np.full(12 * 13 * 11, 3, "<f4").tobytes())}
    faults = [*DAMAGED.values(), *((lambda good, field=field: with_header(good, field), what)
                                   for what, field in (warnings | errors).items())]
    expected = {missing.name[:6]: "has only dmri, so it is used", copy.name[:6]: "holds the same scan as"}
    for path, (damage, what) in zip(others, faults):
        path.write_bytes(damage(path.read_bytes()))
        expected[path.name[:6]] = what
    assert main.main(words(table, tmp_path, *SIZES, "--align", "grid")) == 2
    printed, found = capsys.readouterr().out, rows(tmp_path)
    said = {subject: " ".join(row["what"] for row in found if row["subject"] == subject) for subject in expected}
    assert {row["subject"] for row in found} == set(expected)  # no subject without a fault is listed
    assert all(what in said[subject] for subject, what in expected.items())
    assert sum("no voxel of it lies in the ROIs" in words for words in said.values()) == 1
    refused = [row["subject"] for row in found if row["fatal"] == "True"]
    assert {expected[subject] for subject in set(expected) - set(refused)} == {expected[missing.name[:6]], *warnings}
    assert all(row["what"] in printed and row["remedy"] in printed for row in found)
    assert f"{SUGGESTION} --resize resample\n" in printed
    assert f"not ready: {len(refused)} errors, {len(found) - len(refused)} warnings, listed in {tmp_path}" in printed
    assert printed.endswith("Next: correct the errors, and check again\n")
    assert printed.count("\nerror: ") == len(refused) and printed.rindex("\nerror: ") < printed.index("\nwarning: ")


def test_a_scan_with_grey_air_is_named(tmp_path):
    """As in a phase-sensitive T1 among ordinary ones."""
    table = write_pairs(tmp_path / "study")
    odd = table.parent / "sub-03_space-MNI_fmri.nii.gz"
    scan = read_volume(odd, "first")
    scan.voxels[4:8, 4:9, 3:8] = -900
    save(odd, scan.voxels, scan.affine)
    for how in (["grid"], ["world", "--box_size", "150", "150", "150"]):
        assert main.main(words(table, tmp_path, *SIZES, "--align", *how)) == 0
        assert [row["where"] for row in rows(tmp_path) if "outermost voxels" in row["what"]] == [str(odd)]
    assert np.isnan(_background(np.full((4, 4, 4), np.nan)))  # a box of which the scan sees no face
    alignment, reading = Alignment("grid"), Reading("a", None, "mean", "resample", "minmax")

    def named(complete: list[float], single: list[float]) -> int:
        files = [SimpleNamespace(pair=SimpleNamespace(is_complete=number < len(complete), name=""), path="", low=0,
                                 high=1, size=(9, 9, 9), spacing=np.ones(3), orientation="RAS", time_points=1,
                                 background=value) for number, value in enumerate(complete + single)]
        return len(_describe(files, reading, alignment)[1])

    assert named([-1] * 4, [0.0] * 9) == 9  # incomplete visits do not decide what is usual
    assert named([-1, -1, 0.2, 0.2], []) == named([np.nan] * 3, [-1]) == 0 and named([-1, -1, 0.2], []) == 1


def test_a_study_that_is_ready_unless_an_option_is_wrong_and_a_stop(study_csv, tmp_path, capsys, monkeypatch):
    assert main.main(words(study_csv, tmp_path, *SIZES)) == 0
    printed = capsys.readouterr().out
    for part in ("6 pairs", "12x13x11 (6)", "14x14x14 (6)", "RAS (6)", f"{SUGGESTION}\nlook at", "ready to train: 0"):
        assert part in printed
    assert "Next: the same command without --check" in printed
    assert rows(tmp_path) == [] and not list((tmp_path / "cache").glob("*"))
    wrong = ["--folds", "9", "--fold", "8", "--image_size", "12", "--exclude", "sub-99"]
    assert main.main(words(study_csv, tmp_path, *wrong)) == 2
    assert {row["where"].split(" =")[0] for row in rows(tmp_path)} == {
        "opt.image_size (fmri)", "opt.image_size (dmri)", "opt.folds", "opt.exclude names sub-99"}
    assert main.main(words(study_csv, tmp_path, *SIZES, "--condition_on_group")) == 2
    assert [row["where"] for row in rows(tmp_path)] == ["opt.condition_on_group = True"]
    assert main.main(words(tmp_path / "nowhere", tmp_path)) == 2
    assert "No such file" in rows(tmp_path)[0]["what"]
    monkeypatch.setattr(stop, "reason", "a test")
    with pytest.raises(Interrupted):
        check_study(Options(data_root=str(study_csv)))


@pytest.mark.parametrize("image_size", ["24x22x20", "3"])  # the second is too small for any study
@pytest.mark.parametrize("sizes, resize", [([(24, 22, 20), (24, 22, 20), (24, 22, 19)], ["--resize", "resample"]),
                                           ([(16, 16, 8)], ["--resize", "resample"]), ([(12, 13, 14)], [])])
def test_the_suggested_size_works(tmp_path, capsys, sizes, resize, image_size):
    asked = two_modalities(tmp_path, *sizes)
    assert main.main([*asked, "--image_size", image_size]) == 2
    suggested = suggestion(capsys.readouterr().out)
    assert suggested[3:] == resize and main.main([*asked, *suggested]) == 0


def test_a_size_that_was_not_given_is_no_error(tmp_path, capsys):
    asked = two_modalities(tmp_path, (12, 13, 14))
    assert main.main(asked) == 0
    printed = capsys.readouterr().out
    assert "suggested: --image_size a=12x13x14 b=12x13x14\n" in printed and "0 errors, 1 warning, " in printed


def test_a_visit_with_one_scan_is_read_only_where_training_reads_it(tmp_path):
    """A session of a test subject is left out; without any pair there is one error."""
    table = write_pairs(tmp_path / "study")
    subject, fmri, _ = table.read_text().splitlines()[1].split(",")
    assert main.main(words(table, tmp_path, *SIZES)) == 0
    header, *lines = table.read_text().splitlines()
    split = [f"{line},,{int(line.startswith(subject))}" for line in lines]
    table.write_text("\n".join([f"{header},session,fold", *split, f"{subject},damaged.nii,,2,1"]))
    (table.parent / "damaged.nii").write_bytes(b"no image")
    assert main.main(words(table, tmp_path, *SIZES, "--fold", "1", "--folds", "2")) == 0
    assert [row["what"].split(",")[0] for row in rows(tmp_path)] == ["left out because it has only fmri"]
    assert main.main(words(table, tmp_path, *SIZES, "--fold", "0", "--folds", "2")) == 2
    table.write_text(f"{header}\n{subject},{fmri},\n")
    assert main.main(words(table, tmp_path, *SIZES)) == 2
    assert [row["what"] for row in rows(tmp_path) if row["fatal"] == "True"] == ["no subject has both fmri and dmri"]


def test_incomplete_visits_do_not_decide_what_is_usual_and_can_be_done_without(tmp_path, capsys):
    asked = two_modalities(tmp_path, (16, 16, 16), (16, 16, 16))
    table = (tmp_path / "pairs.csv").read_text().splitlines()
    for number in range(4):
        save(tmp_path / f"single{number}.nii", np.random.default_rng(number).random((24, 24, 24)), np.eye(4))
        table.append(f"single{number},single{number}.nii,")
    (tmp_path / "single3.nii").write_bytes(b"no image")
    (tmp_path / "pairs.csv").write_text("\n".join(table))
    assert main.main([*asked, "--image_size", "16x16x16"]) == 2
    assert "suggested: --image_size a=16x16x16 b=16x16x16 --resize resample" in capsys.readouterr().out
    refused = {row["subject"]: row["remedy"] for row in rows(tmp_path) if row["fatal"] == "True"}
    assert [*sorted(refused)] == [f"sub-single{number}" for number in range(4)]
    assert refused["sub-single3"].endswith('or opt.incomplete = "leave_out", which leaves out all visits with one scan')
    assert main.main([*asked, "--image_size", "16x16x16", "--incomplete", "leave_out"]) == 0


def test_problems_that_only_show_on_the_grid_are_reported(tmp_path):
    """pad_crop can crop away all content of a volume, or make two files equal."""
    asked = two_modalities(tmp_path, (12, 12, 12), (12, 12, 12))
    inner = read_volume(tmp_path / "0b.nii").voxels
    save(tmp_path / "0a.nii", np.pad(np.ones((4, 4, 4), np.float32), (0, 26)), np.eye(4))
    save(tmp_path / "1b.nii", np.pad(inner, 2, constant_values=inner.min()), np.eye(4))
    assert main.main([*asked, "--image_size", "12", "--resize", "pad_crop", "--align", "grid"]) == 2
    found = {(row["subject"], row["what"].split()[0]) for row in rows(tmp_path) if row["fatal"] == "True"}
    assert found == {("sub-0", "every"), ("sub-1", "holds")}


def test_a_file_name_that_is_not_text(tmp_path):
    folder = tmp_path / "tree/sub-01/anat"
    folder.mkdir(parents=True)
    for name in (b"sub-01_acq-\xe9_a.nii", b"sub-01_b.nii"):
        (folder / os.fsdecode(name)).write_bytes(b"no image")
    done = run_program(*words(tmp_path / "tree", tmp_path, "--modalities", "a", "b"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "acq-" in done.stdout


@needs_shared
def test_real_studies(tmp_path, capsys):
    assert main.main(words(LGG, tmp_path, "--modalities", "t1", "flair", "--image_size", "64x64x32")) == 0
    assert "LPS (64)" in capsys.readouterr().out
    assert main.main(words(TRACTOR, tmp_path)) == 2
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("1 pair, brought together in world space, a box of 210x202x104 mm",
                                            "opt.folds = 5", "LAS (1)", "15 (1)",
                                            "fmri=64x62x26 dmri=84x81x42 --box_size 210"))
    assert main.main(words(TRACTOR, tmp_path, "--folds", "1", "--reduce", "fmri=std", "dmri=first",
                           *suggestion(printed))) == 0
    printed = capsys.readouterr().out
    assert "the dmri fits the fmri better if it is moved by about" in printed and "0 errors, 1 warning, " in printed

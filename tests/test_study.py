"""The study: volumes, masks and fingerprints."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec

from data.check import check_study
from data.problems import DataError
from data.split import ROLES
from data.study import Study, find_study, read_study, split_study
from opt import Options
from tests.conftest import SIZES, read_csv, save, write_pairs
from utils.errors import UserError
from utils.files import write_table


def options(table: Path, folder: Path, **settings) -> Options:
    return Options(data_root=str(table), cache_dir=str(folder / "cache"), image_size=SIZES,
                   **{"folds": 3, **settings})


@pytest.fixture
def study(study_csv, tmp_path) -> Study:
    return read_study(options(study_csv, tmp_path))


def test_volumes_and_their_means(study):
    for name, volume in study.volumes([2, 0]).items():
        assert volume.shape == (2, 1, *SIZES[name]) and volume.min() == -1 and volume.max() == 1
    train = study.roles["train"]
    study.pairs[train[0]].__dict__["group"] = "AD"
    mean = study.mean_volumes(("AD",))["fmri"]
    torch.testing.assert_close(mean[0], study.volumes(train)["fmri"].mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(mean[1], study.volumes(train[:1])["fmri"][0])
    low, high = study.train_range("fmri")
    assert -100 < low < high < 1000 and study.problems == []
    assert study.extent.tolist() == [14.0 * n for n in SIZES["fmri"]]


def test_the_scan_that_a_visit_lacks_is_unknown_everywhere(incomplete_csv, tmp_path):
    study, without = (read_study(options(incomplete_csv, tmp_path, incomplete=choice))
                      for choice in ("use", "leave_out"))
    volumes, masks = study.volumes([0, 6]), study.masks([0, 6])  # sub-07 has a dmri only
    assert study.has("dmri", 6) and not study.has("fmri", 6) and volumes["fmri"].shape == (2, 1, *SIZES["fmri"])
    assert volumes["fmri"][1].isnan().all() and not masks["fmri"][1].any()
    assert not any(each.isnan().any() for each in (volumes["fmri"][0], volumes["dmri"])) and masks["dmri"].any()
    there = [i for i in study.trained_on if study.has("fmri", i)]
    assert there == [*study.roles["train"], 7] and study.roles["incomplete"] == [6, 7, 8]
    torch.testing.assert_close(study.mean_volumes()["fmri"][0], study.volumes(there)["fmri"].mean(0), atol=1e-6, rtol=0)
    assert len(without.pairs) == 6 and without.roles == {role: study.roles[role] for role in ROLES}
    assert all(without.identity[name] != study.identity[name] for name in ("data", "split"))


def test_a_single_scan_that_cannot_be_used_is_refused_with_the_way_out(tmp_path):
    table = write_pairs(tmp_path / "s", incomplete=1)
    (table.parent / "sub-07_space-MNI_dmri.nii.gz").write_bytes(b"no volume")
    with pytest.raises(DataError, match='sub-07_space-MNI_dmri.*; or opt.incomplete = "leave_out"'):
        read_study(options(table, tmp_path))
    assert len(read_study(options(table, tmp_path, incomplete="leave_out")).pairs) == 6


def test_pattern_masks_need_mni_space(study, study_csv, tmp_path):
    mask, fingerprint = study.masks([0, 1])["dmri"], study.pattern_fingerprint()
    assert set(mask.unique().tolist()) == {0, 1} and mask.shape == (2, 1, *SIZES["dmri"])
    assert mask[0, 0].any() and study.has_pattern == [True] * 6
    study.set_pattern(options(study_csv, tmp_path, pattern_networks=("occipital",), space="mni"))
    assert all(study.has_pattern) and study.pattern_fingerprint() != fingerprint
    for changes in ({"pattern_networks": (), "space": "mni"}, {"space": "native"}):
        study.set_pattern(options(study_csv, tmp_path, **changes))
        assert not any(study.has_pattern) and study.masks([0])["dmri"].sum() == 0


def test_each_subject_may_have_its_own_label_image(tmp_path):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii.gz", incomplete=1)
    study = read_study(options(table, tmp_path))
    assert not any(study.has_pattern)  # not known to be in MNI space
    for number, pair in enumerate(study.pairs[:6]):  # the last one lacks the scan that labels are made from
        labels = np.zeros(SIZES["fmri"], np.uint8)
        labels[number:number + 2] = 1
        save(tmp_path / f"{pair.subject}_labels.nii.gz", labels, study.affines["fmri"][number])
    settings = options(table, tmp_path, pattern_file=str(tmp_path / "{subject}_labels.nii.gz"))
    study.set_pattern(settings)
    for number in (0, 3):
        mask = study.masks([number])["fmri"][0, 0]
        assert mask[number:number + 2].all() and mask.sum() == 2 * 13 * 11
        assert study.masks([number])["dmri"].any() and study.has_pattern[number]
    assert not study.has_pattern[6] and not study.masks([6])["dmri"].any()
    save(tmp_path / "far.nii", np.ones((4, 4, 4), np.uint8), from_matvec(np.eye(3), [3000.0, 0, 0]))
    wrong = ({"pattern_file": str(tmp_path / "none.nii")}, "no such file"), (
        {"pattern_file": str(tmp_path / "far.nii")}, "no pair has labels over the volumes; the images have 1"), (
        {"pattern_labels": (1, 4, 5)}, "no pair has labels 4, 5 of opt.pattern_labels; the images have 1")
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            study.set_pattern(replace(settings, **changes))


def test_a_subject_without_the_label_has_the_same_weight_everywhere_and_a_note_says_so(tmp_path, capsys):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii.gz")
    study = read_study(options(table, tmp_path))
    for number, pair in enumerate(study.pairs):
        labels = np.zeros(SIZES["fmri"], np.uint8)
        labels[4:8] = number > 0
        save(tmp_path / f"{pair.subject}_labels.nii.gz", labels, study.affines["fmri"][number])
    settings = options(table, tmp_path, pattern_file=str(tmp_path / "{subject}_labels.nii.gz"), pattern_labels=(1,))
    study = read_study(settings)
    assert study.has_pattern == [False, True, True, True, True, True] and not study.masks([0])["dmri"].any()
    assert "note: 1 of 6 visits have no such label in opt.pattern_file" in capsys.readouterr().out
    (tmp_path / "sub-03_labels.nii.gz").write_bytes(b"no image")
    assert not check_study(replace(settings, result_dir=str(tmp_path))) and "sub-03_labels" in capsys.readouterr().out


def test_the_same_scan_under_two_names_is_refused(tmp_path):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii.gz")
    shutil.copy(table.parent / "sub-01_dmri.nii.gz", table.parent / "sub-04_dmri.nii.gz")
    with pytest.raises(DataError, match=r"sub-04_dmri.nii.gz: holds the same scan as .*sub-01.* of sub-01"):
        read_study(options(table, tmp_path))


def test_three_orientations_of_one_study_are_the_same_study(tmp_path):
    """LAS, LPS and RAS copies of all subjects: the same volumes, masks and fingerprints."""
    studies = [read_study(options(write_pairs(tmp_path / codes, codes=codes), tmp_path))
               for codes in ("RAS", "LAS", "LPS")]
    assert len({(*study.identity.values(), study.pattern_fingerprint()) for study in studies}) == 1


def test_a_single_scan_outside_the_rois_is_refused_by_check_and_training_alike(tmp_path, capsys):
    table = write_pairs(tmp_path / "s", incomplete=1)
    path = table.parent / "sub-07_space-MNI_dmri.nii.gz"
    image = nib.load(path)
    save(path, image.get_fdata(dtype=np.float32), from_matvec(np.eye(3), [500, 0, 0]) @ image.affine)
    settings = options(table, tmp_path, align="grid", result_dir=str(tmp_path))
    message = f'{path}: no voxel of it lies in the ROIs; .* or opt.incomplete = "leave_out"'
    with pytest.raises(DataError, match=message):
        read_study(settings)
    assert not check_study(settings)
    assert [row["where"] for row in read_csv(tmp_path / "check.csv") if row["fatal"] == "True"] == [str(path)]
    assert check_study(replace(settings, incomplete="leave_out")) and check_study(replace(settings, space="native"))


def test_a_group_of_single_scans_only_is_named(tmp_path):
    table = write_pairs(tmp_path / "s", incomplete=2)
    rows = [{**row, "group": ("AD", "NC")[n % 2] if row["fmri"] and row["dmri"] else "MCI"}
            for n, row in enumerate(read_csv(table))]
    write_table(table, tuple(rows[0]), rows)
    for condition, named in ((True, ["sub-07", "sub-08"]), (False, [])):
        settings = options(table, tmp_path, condition_on_group=condition)
        *_, warnings = split_study(settings, find_study(settings)[0])
        assert [warning.subject for warning in warnings if "without its group, MCI" in warning.what] == named


def test_all_warnings_are_printed_and_pairs_left_out(tmp_path, capsys):
    table = write_pairs(tmp_path / "s", name="{}_{}.nii.gz")
    table.write_text(table.read_text().replace("sub-03_fmri.nii.gz", ""))
    path = table.parent / "sub-01_dmri.nii.gz"
    image = nib.load(path)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[3, 3, :2] = np.nan
    save(path, voxels, image.affine @ from_matvec(np.eye(3), [6, 0, 0]))
    settings = options(table, tmp_path, folds=1, align="grid", incomplete="leave_out")
    for _ in range(2):  # also if the volume comes from the cache
        study = read_study(settings)
        printed = capsys.readouterr().out
        assert len(study.pairs) == 5 and find_study(settings)[0] == study.pairs
        for part in ("note: sub-03: left out because it has no fmri", "5 of 5 visits are not known to be in MNI space",
                     "1 of 5 pairs are misaligned, for example sub-01_fmri.nii.gz and sub-01_dmri.nii.gz: their fields "
                     "of view differ by up to 72 mm", f"{path}: 2 voxels were NaN", "nothing about new subjects"):
            assert part in printed
    with pytest.raises(DataError, match="opt.exclude names sub-99"):
        read_study(replace(settings, exclude=("sub-99",)))

"""From file to tensor and back: reading, geometry, pairs, splits, masks, cache, demo."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.testing import data_path

from benchmarks import demo_ceiling
from data import phantom
from data.atlas import pattern_mask, roi_centres
from data.pairs import Pair, PairError, find_pairs, split_subjects, write_split
from data.study import Study, cached_volume, epoch_batches
from data.volumes import VolumeError, normalise, read_volume, resample, scale, to_units, write_volume
from tests.conftest import ROOT, SIZES, write_pairs

BOTH = ("fmri", "dmri")
AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 4.0, -30], [0, 0, 0, 1]])


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def ball(*size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(10, 2, size).astype(np.float32)


# ---- reading

def test_a_4d_file_is_reduced_by_name(tmp_path):
    voxels = ball(5, 4, 3, 6)
    path = save(tmp_path / "x_dwi.nii.gz", voxels)
    (tmp_path / "x_dwi.bval").write_text("0 1000 1000 5 2000 1000\n")
    expected = {"mean": voxels.mean(-1), "std": voxels.std(-1), "first": voxels[..., 0],
                "b0": voxels[..., [0, 3]].mean(-1), "shell": voxels[..., [1, 2, 4, 5]].mean(-1)}
    for name, volume in expected.items():
        np.testing.assert_allclose(read_volume(path, name)[0], volume, rtol=1e-5)
    cached = [cached_volume(path, "dmri", "b0", (5, 4, 3), "none", tmp_path / "cache")[1]["low"]]
    (tmp_path / "x_dwi.bval").write_text("1000 0 0 5 0 0\n")
    assert cached_volume(path, "dmri", "b0", (5, 4, 3), "none", tmp_path / "cache")[1]["low"] != cached[0]
    (tmp_path / "x_dwi.bval").write_text("0 1000")
    with pytest.raises(VolumeError, match="2 b-values, the image 6"):
        read_volume(path, "b0")
    (tmp_path / "x_dwi.bval").unlink()
    with pytest.raises(VolumeError, match="x_dwi.bval is not beside"):
        read_volume(path, "b0")


def test_real_files_of_nibabel():
    series, affine = read_volume(Path(data_path) / "example4d.nii.gz")
    assert series.ndim == 3 and np.isfinite(series).all() and (np.diag(affine)[:3] > 0).all()
    volume, _ = read_volume(Path(data_path) / "anatomical.nii")
    assert volume.std() > 0


@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR", "RAS"])
def test_orientations_give_the_same_volume_and_go_back(tmp_path, codes):
    original = nib.Nifti1Image(ball(5, 6, 7), AFFINE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    path = tmp_path / f"{codes}.nii.gz"
    nib.save(original.as_reoriented(turn), path)
    volume, affine = read_volume(path)
    np.testing.assert_allclose(volume, original.get_fdata(), atol=1e-5)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    write_volume(tmp_path / "out.nii.gz", volume, affine, path)
    written, reference = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    assert nib.aff2axcodes(written.affine) == tuple(codes) and written.shape == reference.shape
    np.testing.assert_allclose(written.affine, reference.affine, atol=1e-5)
    np.testing.assert_allclose(written.get_fdata(), reference.get_fdata(), atol=1e-5)
    for code in ("sform_code", "qform_code"):
        assert written.header[code] == reference.header[code]
    np.testing.assert_allclose(written.header.get_zooms()[:3], reference.header.get_zooms()[:3])


def test_not_finite_voxels_are_repaired_or_refused(tmp_path):
    voxels = ball(5, 4, 3)
    voxels[0, 0, :2] = np.nan, np.inf
    volume, _ = read_volume(save(tmp_path / "some.nii", voxels))
    assert np.isfinite(volume).all() and volume[0, 0, 0] == volume.min()
    with pytest.raises(VolumeError, match="no finite voxel"):
        read_volume(save(tmp_path / "all.nii", voxels * np.nan))


def test_unusable_files_are_named(tmp_path):
    save(tmp_path / "good.nii.gz", ball(20, 20, 20))
    whole = (tmp_path / "good.nii.gz").read_bytes()
    contents = {"cut": whole[:len(whole) // 2], "empty": b"", "page": b"<html>404</html>",
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}
    for name, content in contents.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
        with pytest.raises(VolumeError, match=f"{name}.nii.gz: cannot be read"):
            read_volume(tmp_path / f"{name}.nii.gz")
    with pytest.raises(VolumeError, match="no such file"):
        read_volume(tmp_path / "none.nii.gz")
    for name, shape in (("flat", (5, 5)), ("five", (4, 4, 4, 2, 3))):
        with pytest.raises(VolumeError, match="a 3-D or 4-D image is needed"):
            read_volume(save(tmp_path / f"{name}.nii", ball(*shape)))
    with pytest.raises(VolumeError, match="its voxels are complex"):
        read_volume(save(tmp_path / "complex.nii", ball(4, 4, 4).astype(np.complex64)))
    constant = save(tmp_path / "constant.nii", np.full((5, 5, 5), 7.0))
    with pytest.raises(VolumeError, match="every voxel is 7"):
        normalise(read_volume(constant)[0], constant)
    singular = save(tmp_path / "singular.nii", ball(4, 4, 4))
    header = bytearray(singular.read_bytes())
    header[252:254] = bytes(2)  # qform_code
    header[280:296] = bytes(16)  # srow_x
    singular.write_bytes(header)
    with pytest.raises(VolumeError, match="no invertible matrix"):
        read_volume(tmp_path / "singular.nii")


def test_intensities_there_and_back():
    volume, low, high = normalise(np.linspace(-5, 20, 5001).reshape(3, 1667, 1), Path("x"))
    assert volume.min() == -1 and volume.max() == 1
    assert (low, high) == pytest.approx((-4.975, 19.975))
    np.testing.assert_allclose(to_units(scale(np.array([3.0]), low, high), low, high), [3.0], rtol=1e-5)


def test_resampling_keeps_the_field_of_view(tmp_path):
    x = np.linspace(-1, 1, 24)
    smooth = np.exp(-(x[:, None, None] ** 2 + x[None, :20, None] ** 2 + x[None, None, :16] ** 2)).astype(np.float32)
    path = save(tmp_path / "native.nii", smooth)
    small, affine = resample(smooth, AFFINE, (12, 13, 11))
    assert small.shape == (12, 13, 11)
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_allclose(affine @ corner, AFFINE @ corner)
    np.testing.assert_allclose((affine @ [11.5, 12.5, 10.5, 1]), AFFINE @ [23.5, 19.5, 15.5, 1])
    write_volume(tmp_path / "back.nii", small, affine, path)
    back = nib.load(tmp_path / "back.nii")
    np.testing.assert_allclose(back.affine, AFFINE)
    inner = (slice(3, -3),) * 3
    assert np.abs(back.get_fdata() - smooth)[inner].max() < 0.05


# ---- pairs and splits

def test_a_table_and_a_bids_tree_find_the_same(tmp_path):
    table = write_pairs(tmp_path / "csv", subjects=3)
    tree = tmp_path / "bids"
    for pair in find_pairs(table, BOTH)[0]:
        for modality, (kind, suffix) in {"fmri": ("func", "task-rest_bold"), "dmri": ("dwi", "dwi")}.items():
            folder = tree / pair.subject / "ses-1" / kind
            folder.mkdir(parents=True)
            (folder / f"{pair.subject}_ses-1_{suffix}.nii.gz").write_bytes(pair.files[modality].read_bytes())
    (tree / "participants.tsv").write_text("participant_id\tgroup\nsub-02\tAD\n")
    pairs, notes = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01_ses-1", "sub-02_ses-1", "sub-03_ses-1"] and notes == []
    assert [pair.group for pair in pairs] == ["", "AD", ""]
    second = tree / "sub-01/ses-1/func/sub-01_ses-1_task-zzz_bold.nii.gz"
    second.write_bytes(b"")
    (tree / "sub-03/ses-1/dwi/sub-03_ses-1_dwi.nii.gz").unlink()
    pairs, notes = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01_ses-1", "sub-02_ses-1"]
    assert any("task-zzz" in note for note in notes) and any("no dmri" in note for note in notes)


@pytest.mark.parametrize("content, message", [
    ("subject,fmri,dmri\nsub-1,a,b\nsub-01,c,d\n", "same visit"),
    ("subject,fmri,dmri\n1,a,b\n2,a,d\n", "belongs to sub-1 and to sub-2"),
    ("subject,fmri,dmri\n1,a,a\n", "stands for both"),
    ("subject,t1,flair\n1,a,b\n", "Set opt.modalities to two of t1, flair"),
    ("subject,fmri,dmri\n1,a,\n", "no subject has both"),
    ("", "no column subject"),
    ("subject,fmri,dmri,fold\n1,a,b,x\n", "fold 'x' is not a number"),
    ("subject;fmri;dmri\n1;a;b\n", "separated by semicolons"),
    ("subject,session,fmri,dmri\n1,1,a,b\n1,ses-1,c,d\n", "stands for two visits"),
    ("subject,fmri,dmri\n/../x,a,b\n", "because they become file names")])
def test_unusable_tables_are_refused(tmp_path, content, message):
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(PairError, match=message):
        find_pairs(tmp_path / "pairs.csv", BOTH)


def test_a_missing_study_is_refused(tmp_path):
    with pytest.raises(PairError, match="no such file or folder"):
        find_pairs(tmp_path / "nowhere", BOTH)
    with pytest.raises(PairError, match="give a BIDS tree"):
        find_pairs(tmp_path, BOTH)


manifests = st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["{}", "sub-{}", "sub-{:02d}", "{:03d}"]),
                               st.sampled_from(["", "1", "2"]), st.sampled_from(["", "NC", "AD"])),
                     min_size=1, max_size=60)


@settings(max_examples=1000, deadline=None)
@given(manifests, st.integers(2, 6), st.integers(0, 5), st.integers(0, 3))
def test_no_subject_is_on_both_sides_of_a_split(rows, folds, fold, seed):
    pairs = [Pair(style.format(number), session, group, None, {}) for number, style, session, group in rows]
    try:
        roles = split_subjects(pairs, folds, fold % folds, 0.2, seed)
    except PairError:
        assert len({pair.person for pair in pairs}) < 2 * folds
        return
    people = {role: {pairs[i].person for i in members} for role, members in roles.items()}
    assert sorted(i for members in roles.values() for i in members) == list(range(len(pairs)))
    assert not people["train"] & people["test"] and not people["train"] & people["validation"]
    assert not people["test"] & people["validation"] and people["test"] and people["validation"] and people["train"]


def study_pairs(count: int, **fields) -> list[Pair]:
    return [Pair(f"sub-{n:02d}", "", "AD" if n % 3 == 0 else "NC", fields.get("fold", lambda n: None)(n), {})
            for n in range(count)]


def test_folds_cover_everyone_once_and_keep_the_groups():
    pairs = study_pairs(30)
    tests = [split_subjects(pairs, 5, fold, 0.2, 0)["test"] for fold in range(5)]
    assert sorted(i for test in tests for i in test) == list(range(30))
    assert all(sum(pairs[i].group == "AD" for i in test) == 2 for test in tests)
    assert split_subjects(pairs, 5, 0, 0.2, 0) == split_subjects(pairs, 5, 0, 0.2, 0)
    assert tests[0] != split_subjects(pairs, 5, 0, 0.2, 1)["test"]


def test_own_folds_one_fold_and_too_few(tmp_path):
    own = study_pairs(9, fold=lambda n: n % 3)
    roles = split_subjects(own, 3, 1, 0.2, 0)
    assert roles["test"] == [1, 4, 7]
    write_split(tmp_path / "split.csv", own, roles)
    assert [row["role"] for row in csv.DictReader((tmp_path / "split.csv").read_text().splitlines())].count("test") == 3
    with pytest.raises(PairError, match="fill it for all or for none"):
        split_subjects([*own, Pair("sub-77", "", "", None, {})], 3, 1, 0.2, 0)
    assert len(split_subjects(own, 3, 1, 0.95, 0)["train"]) == 1
    torn = [*own, Pair("sub-00", "2", "", 2, {})]
    with pytest.raises(PairError, match="in different folds"):
        split_subjects(torn, 3, 1, 0.2, 0)
    assert split_subjects(own, 1, 0, 0.2, 0) == {role: list(range(9)) for role in ("train", "validation", "test")}
    with pytest.raises(PairError, match="opt.folds lower"):
        split_subjects(own[:2], 5, 0, 0.2, 0)


def test_batches_cover_an_epoch():
    first = epoch_batches(list(range(10)), 4, 0, 0)
    assert sorted(i for batch in first for i in batch) == list(range(10)) and [len(b) for b in first] == [4, 4, 2]
    assert first == epoch_batches(list(range(10)), 4, 0, 0) != epoch_batches(list(range(10)), 4, 0, 1)


# ---- masks

def test_rois_of_dosenbach():
    counts = {"cingulo-opercular": 32, "default": 34, "fronto-parietal": 21, "occipital": 22, "sensorimotor": 33,
              "cerebellum": 18}
    for network, count in counts.items():
        assert roi_centres((network,)).shape == (count, 3)
    assert roi_centres(tuple(counts)).shape == (160, 3) and [6, 64, 3] in roi_centres(("default",)).tolist()
    with pytest.raises(ValueError, match="opt.pattern_networks names visual"):
        roi_centres(("visual",))


def test_masks_are_spheres_at_the_coordinates():
    affine = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])
    centres = np.array([[10.0, 20, 30], [-40, -50, 10]])
    mask = pattern_mask((91, 109, 91), affine, centres, 5.0)
    voxels = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(voxels[:, None] - centres, axis=-1)
    assert distance.min(axis=1).max() <= 5.0
    assert mask.sum() == 2 * 81  # points of a lattice within 2.5 steps of one of them
    for place, centre in enumerate(centres):
        np.testing.assert_allclose(voxels[distance[:, place] <= 5].mean(0), centre, atol=0.6)


def test_no_roi_vanishes_on_a_coarse_grid_and_none_is_painted_outside():
    affine = np.diag([12.0, 12, 12, 1])
    assert pattern_mask((8, 8, 8), affine, np.array([[30.0, 30, 30], [500, 0, 0]]), 1.0).sum() == 1


# ---- the cache and the study

def test_the_cache_is_used_and_never_stale(tmp_path):
    path = save(tmp_path / "x.nii.gz", ball(11, 12, 13))
    first, facts = cached_volume(path, "fmri", "mean", (11, 12, 13), "none", tmp_path / "cache")
    assert facts["low"] < facts["high"] and isinstance(first, np.memmap)
    times = {each: each.stat().st_mtime_ns for each in (tmp_path / "cache").iterdir()}
    cached_volume(path, "fmri", "mean", (11, 12, 13), "none", tmp_path / "cache")
    assert times == {each: each.stat().st_mtime_ns for each in (tmp_path / "cache").iterdir()}
    save(path, ball(11, 12, 13)[::-1] * 2)
    os.utime(path, ns=(1, 1))
    second, _ = cached_volume(path, "fmri", "mean", (11, 12, 13), "none", tmp_path / "cache")
    assert not np.allclose(first, second)
    with pytest.raises(VolumeError, match=r"size 11x12x13, but opt.image_size asks 12x12x12 of fmri.*fmri=11x12x13"):
        cached_volume(path, "fmri", "mean", (12, 12, 12), "none", tmp_path / "cache")


def test_study(tmp_path):
    pairs, _ = find_pairs(write_pairs(tmp_path / "s"), BOTH)
    roles = split_subjects(pairs, 3, 0, 0.2, 0)
    study = Study(pairs, roles, SIZES, {name: "mean" for name in BOTH}, "none", tmp_path / "cache")
    volumes = study.volumes([2, 0])
    for name, volume in volumes.items():
        assert volume.shape == (2, 1, *SIZES[name]) and volume.min() == -1 and volume.max() == 1
    expected = np.mean([study.volumes([i])["fmri"].numpy() for i in roles["train"]], axis=0)
    np.testing.assert_allclose(study.mean_volumes()["fmri"], expected, atol=1e-6)
    assert study.set_pattern(("default",), 5.0, "auto") == 6
    mask = study.masks([0, 1])["dmri"]
    assert set(mask.unique().tolist()) == {0, 1} and mask.shape == (2, 1, *SIZES["dmri"])
    assert study.set_pattern(("default",), 5.0, "native") == 0 and study.masks([0])["dmri"].sum() == 0
    assert study.apart() == []
    study.affines["dmri"][4][0, 3] += 60  # mm
    assert study.apart() == ["sub-05"]
    low, high = study.train_range("fmri")
    assert -100 < low < high < 1000


# ---- the demo

def test_the_demo_is_what_it_was():
    """Frozen, so that figures stay comparable: the first and the last subject, both scans, as they are written."""
    subjects = phantom.anatomies()
    assert len(subjects) == 60 and [s.group for s in subjects[:3]] == ["NC", "MCI", "AD"]
    digest = hashlib.sha256()
    for subject in (subjects[0], subjects[-1]):
        for image in phantom.scan(subject).values():
            digest.update(np.ascontiguousarray(image.dataobj).tobytes())
    assert digest.hexdigest() == RECORDED


RECORDED = "2c77e105073b12d54aaddb83995f44421fa25730384bd5418942b72279b553b8"


def test_the_demo_has_what_it_promises():
    normal, ill = (next(s for s in phantom.anatomies() if s.group == group) for group in ("NC", "AD"))
    clean, noisy = (phantom.render(normal, "dmri", noise=each)[..., 0] for each in (False, True))
    assert 0.01 < (clean - noisy).std() < 0.05
    thick = phantom.Anatomy(**{**ill.__dict__, "group": "NC"})
    mask = pattern_mask(phantom.GRIDS["fmri"][0], phantom.affine_of("fmri"), roi_centres(("default",)), 8.0)
    thinned = (phantom.render(ill, "fmri", False) - phantom.render(thick, "fmri", False)).mean(-1)
    assert np.abs(thinned[mask]).mean() > 3 * np.abs(thinned[~mask]).mean()
    assert phantom.render(normal, "fmri").shape == (32, 32, 18, 4)


def test_a_new_study_of_the_demo_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "SUBJECTS", 3)
    phantom.write_demo(tmp_path / "demo")
    pairs, notes = find_pairs(tmp_path / "demo", BOTH)
    assert len(pairs) == 3 and notes == [] and {pair.group for pair in pairs} == {"NC", "MCI", "AD"}
    image = nib.load(pairs[0].files["dmri"])
    assert image.shape == (48, 48, 30) and image.header["sform_code"] == 4
    assert (tmp_path / "demo" / phantom.COMPLETE).exists()


def test_the_ceiling_of_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom, "SUBJECTS", 2)
    phantom.write_demo(tmp_path / "demo")
    with open(tmp_path / "metrics.csv", "w") as file:
        print("subject,direction,volume,region,psnr", file=file)
        for number in (1, 2):
            for volume, psnr in (("mean", 20), ("refined", 24)):
                print(f"sub-{number:02d},fmri->dmri,{volume},volume,{psnr}", file=file)
    demo_ceiling.main(tmp_path / "metrics.csv", tmp_path / "demo")
    line = capsys.readouterr().out.splitlines()[1]
    best = float(line.split()[3])
    assert 27 < best < 31 and f"{4 / (best - 20):4.0%}" in line and "+4.00 dB" in line


LGG = ROOT.parent / "shared/data/lgg/pairs.csv"
TRACTOR = ROOT.parent / "shared/data/tractor"


@pytest.mark.skipif(not LGG.exists(), reason="the shared volumes are not here")
def test_real_pairs_of_a_table():
    pairs, notes = find_pairs(LGG, ("t1", "flair"))
    assert len(pairs) == 64 and notes == []
    assert read_volume(pairs[0].files["flair"])[0].shape == (64, 64, 32)


@pytest.mark.skipif(not TRACTOR.exists(), reason="the shared volumes are not here")
def test_a_real_bids_tree():
    pairs, _ = find_pairs(TRACTOR, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01"]
    assert nib.load(pairs[0].files["fmri"]).ndim == 4
    for name in BOTH:
        volume, affine = read_volume(pairs[0].files[name])
        assert volume.ndim == 3 and nib.aff2axcodes(affine) == ("R", "A", "S")

"""The cache, the study, its masks, and augmentation."""

from __future__ import annotations

import dataclasses
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data.atlas import AtlasError, LabelImage, pattern_mask, roi_centres
from data.augment import PairTransform
from data.cache import Reading
from data.pairs import find_pairs
from data.problems import DataError, PairError
from data.split import split_subjects
from data.study import Study, steps_per_epoch, training_batch
from tests.conftest import AFFINE, BOTH, ROOT, SIZES, ball, decoded, save, write_pairs


def test_batches_cover_an_epoch():
    positions = list(range(10))
    assert steps_per_epoch(positions, 4) == 3
    first, again, second = ([training_batch(positions, 4, 0, step) for step in steps]
                            for steps in (range(3), range(3), range(3, 6)))
    assert sorted(i for batch in first for i in batch) == positions and [len(b) for b in first] == [4, 4, 2]
    assert first == again != second and sorted(i for batch in second for i in batch) == positions


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


def test_labels_of_ones_own_on_another_grid(tmp_path):
    """A box of label 3 in millimetres, seen on a grid of other spacing and orientation."""
    labels = np.zeros((40, 40, 40), np.int16)
    labels[10:20, 12:24, 8:28], labels[30:, :, :] = 3, 7
    path = save(tmp_path / "labels.nii.gz", labels, np.diag([2.0, 2, 2, 1]))
    affine = np.array([[-5.0, 0, 0, 77.5], [0, 4.0, 0, 1], [0, 0, 10.0, 4], [0, 0, 0, 1]])
    mask = LabelImage(path, (3,)).mask((16, 20, 8), affine)
    places = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    assert (places >= [19, 23, 15]).all() and (places <= [39, 47, 55]).all()  # the box: -1 .. +1 mm around its voxels
    assert mask.sum() * 5 * 4 * 10 == pytest.approx(20 * 24 * 40, rel=0.15)
    assert LabelImage(path, ()).mask((16, 20, 8), affine).sum() > mask.sum()
    with pytest.raises(AtlasError, match=r"opt.pattern_labels names 4, 5, but .*labels.nii.gz has only 3, 7"):
        LabelImage(path, (3, 4, 5))


# ---- the cache

READING = Reading("fmri", (11, 12, 13))


def test_the_cache_is_used_and_never_stale(tmp_path):
    path = save(tmp_path / "x.nii.gz", ball(11, 12, 13))
    first, facts = decoded(path, READING, tmp_path / "cache")
    assert facts["low"] < facts["high"] and first.dtype == np.float32
    times = {each: each.stat().st_mtime_ns for each in (tmp_path / "cache").iterdir()}
    decoded(path, READING, tmp_path / "cache")
    assert times == {each: each.stat().st_mtime_ns for each in (tmp_path / "cache").iterdir()}
    before = path.stat()
    whole = nib.Nifti1Image(ball(11, 12, 13)[::-1].copy(), AFFINE).to_bytes()
    path.write_bytes(gzip.compress(whole, mtime=0)[:before.st_size].ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))  # same size, same time, another content
    try:
        second, _ = decoded(path, READING, tmp_path / "cache")
        assert not np.allclose(first, second)
    except DataError:
        pass  # cut to the old size it may be damaged: what matters is that the file was looked at


@pytest.mark.parametrize("change", [{"size": (12, 12, 12), "resize": "resample"}, {"intensity": "minmax"},
                                    {"reduce": "std"}])
def test_every_setting_has_its_own_entry(tmp_path, change):
    path = save(tmp_path / "x.nii.gz", ball(11, 12, 13, 3))
    first, _ = decoded(path, READING, tmp_path / "cache")
    second, _ = decoded(path, dataclasses.replace(READING, **change), tmp_path / "cache")
    assert first.shape != second.shape or not np.allclose(first, second)


def test_b_values_are_part_of_the_key(tmp_path):
    path, reading = save(tmp_path / "x_dwi.nii.gz", ball(11, 12, 13, 2)), dataclasses.replace(READING, reduce="b0")
    lows = []
    for content in ("0 1000\n", "1000 0\n"):
        (tmp_path / "x_dwi.bval").write_text(content)
        lows.append(decoded(path, reading, tmp_path / "cache")[1]["low"])
    assert lows[0] != lows[1]


def test_a_damaged_entry_is_made_again(tmp_path):
    path = save(tmp_path / "x.nii.gz", ball(11, 12, 13))
    first, _ = decoded(path, READING, tmp_path / "cache")
    expected = first.copy()
    for entry in (tmp_path / "cache").iterdir():
        for content in (entry.read_bytes()[:20], entry.read_bytes()[:-400] + bytes(400), b"{}"):
            entry.write_bytes(content)
            np.testing.assert_array_equal(decoded(path, READING, tmp_path / "cache")[0], expected)


def test_several_processes_fill_one_cache_at_once(tmp_path):
    table = write_pairs(tmp_path / "s", subjects=4)
    code = ("import sys, pathlib\nfrom data.pairs import find_pairs\nfrom data.cache import Reading\n"
            "from tests.conftest import decoded\n"
            "for pair in find_pairs(pathlib.Path(sys.argv[1]), ('fmri', 'dmri'))[0]:\n"
            "    for name, size in (('fmri', (12, 13, 11)), ('dmri', (16, 17, 14))):\n"
            "        volume, facts = decoded(pair.files[name], Reading(name, size), pathlib.Path(sys.argv[2]))\n"
            "        print(pair.name, name, facts['content'], volume.sum())\n")
    children = [subprocess.Popen([sys.executable, "-c", code, str(table), str(tmp_path / "cache")], cwd=ROOT, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
    told = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 6, told[0][1]
    assert len({out for out, _ in told}) == 1 and len(told[0][0].splitlines()) == 8
    assert len(list((tmp_path / "cache").iterdir())) == 16  # two files per volume, nothing temporary left


# ---- the study

def study_of(table: Path, cache: Path, **reading) -> Study:
    pairs, _ = find_pairs(table, BOTH)
    return Study(pairs, split_subjects(pairs, 3, 0, 0.2, 0),
                 {name: Reading(name, SIZES[name], **reading) for name in BOTH}, cache)


def test_study(tmp_path):
    study = study_of(write_pairs(tmp_path / "s"), tmp_path / "cache")
    for name, volume in study.volumes([2, 0]).items():
        assert volume.shape == (2, 1, *SIZES[name]) and volume.min() == -1 and volume.max() == 1
    expected = np.mean([study.volumes([i])["fmri"].numpy() for i in study.roles["train"]], axis=0)
    np.testing.assert_allclose(study.mean_volumes()["fmri"], expected, atol=1e-6)
    assert study.set_pattern(("default",), 5.0, "auto") == 6
    mask = study.masks([0, 1])["dmri"]
    assert set(mask.unique().tolist()) == {0, 1} and mask.shape == (2, 1, *SIZES["dmri"])
    assert mask[0, 0].any() and study.has_pattern == [True] * 6
    assert study.set_pattern(("default",), 5.0, "native") == 0 and study.masks([0])["dmri"].sum() == 0
    low, high = study.train_range("fmri")
    assert -100 < low < high < 1000 and study.problems == []


def test_a_pattern_of_ones_own_for_each_subject(tmp_path):
    study = study_of(write_pairs(tmp_path / "s", subjects=6, name="{}_{}.nii.gz"), tmp_path / "cache")
    assert study.set_pattern(("default",), 5.0, "auto") == 0  # native space: no spheres are painted
    for number, pair in enumerate(study.pairs):
        labels = np.zeros(SIZES["fmri"], np.uint8)
        labels[number:number + 2] = 1
        save(tmp_path / f"{pair.subject}_labels.nii.gz", labels, study.affines["fmri"][number])
    file = str(tmp_path / "{subject}_labels.nii.gz")
    assert study.set_pattern(("default",), 5.0, "auto", file) == 6
    for number in (0, 3):
        mask = study.masks([number])["fmri"][0, 0]
        assert mask[number:number + 2].all() and mask.sum() == 2 * 13 * 11
        assert study.masks([number])["dmri"].any()
    with pytest.raises(AtlasError, match="opt.pattern_labels names 9"):
        study.set_pattern(("default",), 5.0, "auto", file, (9,))
    with pytest.raises(DataError, match="no such file"):
        study.set_pattern(("default",), 5.0, "auto", str(tmp_path / "none.nii"))
    save(tmp_path / "far.nii", np.ones((4, 4, 4), np.uint8), np.eye(4) + 3000 * np.eye(4)[:, [3, 0, 1, 2]].T)
    with pytest.raises(AtlasError, match="no voxel of it lies in .*far.nii"):
        study.set_pattern(("default",), 5.0, "auto", str(tmp_path / "far.nii"))


def test_D8_the_same_scan_under_two_names_is_refused(tmp_path):
    table = write_pairs(tmp_path / "s")
    shutil.copy(table.parent / "sub-01_space-MNI_dmri.nii.gz", table.parent / "sub-04_space-MNI_dmri.nii.gz")
    with pytest.raises(PairError, match=r"sub-04_space-MNI_dmri.nii.gz: holds the same scan as .*sub-01.* of sub-01"):
        study_of(table, tmp_path / "cache")


def test_D3_repaired_voxels_are_told(tmp_path):
    table = write_pairs(tmp_path / "s")
    image = nib.load(table.parent / "sub-02_space-MNI_fmri.nii.gz")
    voxels = image.get_fdata(dtype=np.float32)
    voxels[3, 3, :2] = np.nan
    save(table.parent / "sub-02_space-MNI_fmri.nii.gz", voxels, image.affine)
    for _ in range(2):  # also where the volume comes from the cache
        problem, = study_of(table, tmp_path / "cache").problems
        assert problem.subject == "sub-02" and problem.what.startswith("2 voxels") and not problem.fatal


def test_D10_fields_of_view_that_differ_or_do_not_overlap(tmp_path):
    study = study_of(write_pairs(tmp_path / "s"), tmp_path / "cache")
    assert study.apart() == []
    study.affines["dmri"][4][0, 3] += 60  # mm
    study.affines["dmri"][5][0, 3] += 6000
    differ, far = study.apart()
    assert differ.subject == "sub-05" and "differ by up to 66 mm" in differ.what
    assert far.subject == "sub-06" and "do not overlap" in far.what


def test_D9_three_frames_of_one_study_are_the_same_study(tmp_path):
    """LAS, LPS and RAS copies of all subjects: the same tensors, masks and split."""
    studies = [study_of(write_pairs(tmp_path / codes, codes=codes), tmp_path / "cache") for codes in
               ("RAS", "LAS", "LPS")]
    for study in studies:
        study.set_pattern(("default",), 5.0, "auto")
    for other in studies[1:]:
        for i in range(6):
            for name in BOTH:
                torch.testing.assert_close(other.volumes([i])[name], studies[0].volumes([i])[name], atol=1e-5, rtol=0)
                assert torch.equal(other.masks([i])[name], studies[0].masks([i])[name])
        assert other.fingerprint == studies[0].fingerprint


# ---- augmentation

EXTENT = torch.tensor([160.0, 200.0, 120.0])


def transform(*kinds: str, keys=(0, 1, 2, 3)) -> PairTransform:
    return PairTransform(kinds, BOTH, EXTENT, [torch.Generator().manual_seed(key) for key in keys])


def blob(size: tuple[int, int, int], centre: torch.Tensor) -> torch.Tensor:
    """A smooth ball (4, 1, X, Y, Z) around `centre`, in mm from the middle; -1 outside, 1 inside."""
    axes = [(torch.arange(n) + 0.5) / n * extent - extent / 2 for n, extent in zip(size, EXTENT)]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return (2 * torch.exp(-((place - centre) ** 2).sum(-1) / (2 * 20.0**2)) - 1).expand(4, 1, *size)


def centroid(volume: torch.Tensor) -> torch.Tensor:
    """(4, 3) mm: where the blob is."""
    size = volume.shape[2:]
    axes = [(torch.arange(n) + 0.5) / n * extent - extent / 2 for n, extent in zip(size, EXTENT)]
    place, weight = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1), volume[:, 0] + 1
    return (weight[..., None] * place).sum((1, 2, 3)) / weight.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("kinds", [("flip",), ("affine",), ("intensity",), ("flip", "affine", "intensity")])
def test_augmentation_keeps_a_pair_a_pair(kinds):
    """The same place of the body goes to the same place of both grids, in mm, and of the mask."""
    centre, change = torch.tensor([30.0, -20.0, 10.0]), transform(*kinds)
    moved = {name: centroid(change.volume(name, blob(size, centre)))
             for name, size in (("fmri", (32, 32, 18)), ("dmri", (48, 60, 30)))}
    mask = centroid(change.mask((blob((48, 60, 30), centre) > 0).float() * 2 - 1))
    torch.testing.assert_close(moved["fmri"], moved["dmri"], atol=1.5, rtol=0)
    torch.testing.assert_close(mask, moved["dmri"], atol=2.5, rtol=0)
    away = (moved["dmri"] - centre).norm(dim=1)
    assert (away.max() > 2) == (kinds != ("intensity",)) and away.max() < 75


def test_augmentation_moves_as_it_says():
    volume = torch.rand(4, 1, 6, 5, 4) * 2 - 1
    flipped = transform("flip").volume("fmri", volume)
    ways = [torch.equal(a, b.flip(1)) - torch.equal(a, b) for a, b in zip(flipped, volume)]
    assert set(ways) == {1, -1}  # exactly mirrored along x, or exactly left alone
    bent = transform("intensity").volume("fmri", volume)
    assert not torch.equal(bent, volume) and torch.equal(bent.argsort(2), volume.argsort(2))
    ends = transform("intensity").volume("fmri", torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1, 1).expand(4, 1, 2, 1, 1))
    torch.testing.assert_close(ends[:, 0, :, 0, 0], torch.tensor([[-1.0, 1.0]]).expand(4, 2))
    assert torch.equal(transform().volume("fmri", volume), volume)
    mask = (volume > 0).float()
    assert set(transform("affine").mask(mask).unique().tolist()) == {0, 1}
    assert torch.equal(transform("intensity").mask(mask), mask)


def test_augmentation_depends_on_its_keys_alone():
    volume = torch.rand(4, 1, 8, 8, 8)
    together = transform("flip", "affine", keys=(5, 6, 7, 8)).volume("dmri", volume)
    alone = transform("flip", "affine", keys=(7,)).volume("dmri", volume[2:3])
    torch.testing.assert_close(together[2:3], alone)
